"""The benchmarks' own machinery, as on a GPU: what is timed, kept, put first and left out."""

import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import conftest, measure, report, workloads  # noqa: E402
from hlip_kernels import timing  # noqa: E402

ROW = dict(what="attention", part="forward", workload="long_tail", level="study", implementation="hlip triton")


class Gpu:
    """Stands for the parts of torch.cuda that timing asks for. Its clock is the number of things done on it."""

    type = "cuda"

    def __init__(self, monkeypatch):
        self.done = []
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                gpu.done.append("record")
                self.at = len(gpu.done)

            def synchronize(self):
                gpu.done.append("synchronize")

            def elapsed_time(self, stop):
                return 1e3 * (stop.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.done.append(("busy", cycles)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.done.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
        monkeypatch.setattr(measure, "device", lambda: self)
        monkeypatch.setattr(measure, "_flush_buffer", lambda: torch.zeros(8))
        monkeypatch.setattr(measure, "machine", lambda: {"device": "made up", "torch": "2", "triton": "3", "python": "3"})
        monkeypatch.setattr(measure, "ceilings", lambda: (1e15, 4e12))


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used: arguments come from a setup, if that gives any."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, setup=None, rounds=1):
        for _ in range(rounds):
            given = setup() if setup else None
            if given:  # of a tensor, an error
                raise AssertionError(f"setup gave {given}")
            function()


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_a_call_is_queued_while_the_gpu_is_busy(gpu):
    call = lambda: gpu.done.append("call")  # noqa: E731
    assert timing.timed(call, gpu, host=1e-3) == 2  # nothing but the call between the events
    assert gpu.done == [("busy", int((1.5e-3 + 1e-4) * timing.CYCLES)), "record", "call", "record", "synchronize"]
    gpu.done.clear()
    assert timing.timed(call, gpu) == 2 and gpu.done[0] == "record"
    gpu.done.clear()
    timing.timed(call, gpu, host=60.0)
    assert gpu.done[0] == ("busy", int(timing.MOST * timing.CYCLES))


def test_what_the_host_takes(gpu):
    assert timing.host_seconds(lambda: time.sleep(0.02), gpu) >= 0.02
    assert gpu.done == ["synchronize", "synchronize"]
    assert timing.host_seconds(lambda: 1 / 0, torch.device("cpu")) == 0.0  # not called


def test_on_a_cpu_time_is_the_walls():
    assert 0.02 <= timing.timed(lambda: time.sleep(0.02), torch.device("cpu")) < 2


def test_a_row_of_a_gpu(gpu):
    benchmark = Benchmark()
    measure.run(benchmark, lambda: gpu.done.append("call"), flops=8.0, nbytes=2.0, beside={"other": lambda: None}, **ROW)
    ours, other = report.rows_of(benchmark.extra_info, "2026-01-01")
    assert (ours["implementation"], other["implementation"]) == ("hlip triton", "other")
    assert ours["peak_bytes"] == 12345 and ours["flops"] == 8.0 and ours["date"] == "2026-01-01"
    assert ours["median_s"] == 2 and other["median_s"] == 1 and ours["rounds"] == 3  # seconds: the fewest rounds


@pytest.mark.parametrize("kind, seconds, rounds", [
    ("cuda", 1e-4, 30), ("cuda", 0.05, 10), ("cuda", 1.0, 3), ("cpu", 0.01, 30), ("cpu", 0.1, 10), ("cpu", 2.0, 5),
    ("cpu", 0.0, 30),
])  # fmt: skip
def test_rounds(kind, seconds, rounds):
    assert measure.rounds_of(seconds, kind) == rounds


def test_rows_are_kept_one_by_one(tmp_path):
    info = dict(ROW, seconds=[0.3, 0.1, 0.2], flops=8.0, bytes=2.0, device="made up", matmul_flops=1e12, copy_bandwidth=1e12)
    path = tmp_path / "new" / "rows.csv"
    for implementation in ("hlip triton", "padded SDPA"):
        report.write(report.rows_of(info | {"implementation": implementation}, "2026-01-01"), path, append=True)
    rows = report.read(path)
    assert [row["implementation"] for row in rows] == ["hlip triton", "padded SDPA"] and rows[0]["median_s"] == 0.2
    assert "| **hlip triton** | 200 ms | 100 ms - 300 ms |" in report.markdown(rows)


def case(**params):
    return SimpleNamespace(params=params)


def test_what_the_goals_are_about_comes_first():
    assert all(name in workloads.NAMES and level in workloads.make(name, full=True).levels for name, level in conftest.FIRST)
    cases = [
        case(name=name, level=level, implementation=implementation)
        for implementation in ("padded SDPA", "hlip cuda") for name in ("chest_ct", "brain_mri_h3")
        for level in ("slice", "study")
    ]  # fmt: skip
    found = [(c.params["name"], c.params["level"], c.params["implementation"]) for c in sorted(cases, key=conftest.order)]
    assert found[:3] == [
        ("brain_mri_h3", "study", "hlip cuda"), ("brain_mri_h3", "study", "padded SDPA"),
        ("brain_mri_h3", "slice", "hlip cuda"),
    ]  # fmt: skip
    assert found[-1] == ("chest_ct", "study", "padded SDPA")
    assert conftest.order(None) < conftest.order(cases[0]) and conftest.order(case(stored=1)) == conftest.order(None)


@pytest.mark.parametrize("implementation, outcome", [("padded SDPA", pytest.skip.Exception), ("hlip", torch.OutOfMemoryError)])
def test_memory_that_is_not_there_is_a_peers_right(implementation, outcome, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    item = SimpleNamespace(callspec=case(name="long_tail", level="study", implementation=implementation))
    call = conftest.pytest_pyfunc_call(item)
    next(call)
    with pytest.raises(outcome):
        call.throw(torch.OutOfMemoryError("CUDA out of memory.\nmore"))


def test_no_measurement_begins_after_the_time_is_up(monkeypatch):
    item = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: 5.0))
    monkeypatch.setattr(conftest, "_started", time.monotonic())
    conftest.pytest_runtest_setup(item)
    monkeypatch.setattr(conftest, "_started", time.monotonic() - 6)
    with pytest.raises(pytest.skip.Exception, match="no time"):
        conftest.pytest_runtest_setup(item)
