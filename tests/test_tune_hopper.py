"""The tool that times other sizes of the Hopper kernels: its candidates, computed by the emulator, and one that is wrong."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from emulated_hopper import EmulatedHopperBackend

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import tune_hopper as tool  # noqa: E402
import tuning  # noqa: E402

from hlip_kernels.backends.hopper.config import KERNELS, REGISTERS  # noqa: E402

LENGTHS = {"attention_forward_whole": 198, "attention_backward_whole": 198}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setattr(tool.hopper, "HopperBackend", EmulatedHopperBackend)


def case(kernel, **changed):
    options = {"dtype": "float16", "head_dim": 64, "heads": 1, "length": LENGTHS.get(kernel, 300), "rows": 300, "device": "cpu"}
    return tool.Case(kernel, **options | changed)


@pytest.mark.parametrize("kernel", KERNELS)
def test_neighbours_are_the_shipped_sizes_and_those_next_to_them(kernel):
    for head_dim, shipped in KERNELS[kernel].items():
        found = tool.neighbours(kernel, shipped)
        assert found[0] == shipped and len(set(found)) == len(found) >= 3, head_dim
        for config in found:
            registers = config.consumers * config.consumer_registers + config.producer_registers + config.reducer_registers
            groups = config.consumers + 1 + (config.reducer_registers > 0)
            assert 128 * registers <= REGISTERS and 128 * groups * config.max_registers <= REGISTERS, config
            assert config.consumer_registers % 8 == 0 and config.stages >= 2 and config.block % config.part == 0, config
            if kernel.endswith("_whole"):  # what they hold is theirs alone
                assert config.rows == shipped.rows


def test_forward_has_all_that_tuning_notes_want_timed():
    found = tool.neighbours("attention_forward", KERNELS["attention_forward"][64])
    kinds = {(c.consumers, c.block, c.own_in_registers) for c in found}
    assert kinds == {(n, block, where) for n in (2, 3) for block in (64, 128) for where in (True, False)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kind_of_candidate_computes_what_the_shipped_one_does(kernel):
    """The nearest of every kind: other numbers of stages differ in nothing but when they wait."""
    of = case(kernel)
    kinds = {}
    for config in of.candidates():
        kinds.setdefault((config.consumers, config.block, config.own_in_registers), config)
    extremes = [min(of.candidates(), key=lambda c: c.stages * c.block)]
    for config in [*kinds.values(), *extremes]:
        assert tuning.try_once(of, config) is None, config
    assert KERNELS[kernel][64] == of.shipped() == tool.neighbours(kernel, of.shipped())[0]


def test_a_candidate_that_computes_something_else_falls_away(monkeypatch, capsys):
    of, wrong = case("attention_forward"), []

    class Broken(EmulatedHopperBackend):
        def forward(self, *args):
            out, lse = super().forward(*args)
            config = KERNELS["attention_forward"][64]
            if config.consumers == 2 and wrong.append(config) is None:
                out = out * 1.1
            return out, lse

    monkeypatch.setattr(tool.hopper, "HopperBackend", Broken)
    few = [c for c in of.candidates() if c.stages == of.shipped().stages and c.block == of.shipped().block]
    monkeypatch.setattr(tool.Case, "candidates", lambda self: few)
    runs = tuning.compile_all([of], float("inf"), 1)[of]
    assert set(few) - set(runs) == set(wrong) and wrong and of.shipped() in runs
    assert "2 consumers" in capsys.readouterr().err


def test_a_kernel_that_is_not_used_has_nothing_to_tune():
    assert case("attention_forward_whole", length=257).shipped() is None
    assert case("attention_backward_fused", head_dim=128).shipped() is None
    assert case("attention_forward", length=198).shipped() is not None  # the tool asks for it, and takes whole=False


def test_times_are_printed_and_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tool, "why_not", lambda: "")
    on_cpu = tool.Case
    monkeypatch.setattr(tool.Case, "candidates", lambda self: tool.neighbours(self.kernel, self.shipped())[:3])
    monkeypatch.setattr(tool, "Case", lambda *fields: on_cpu(*fields[:-1], "cpu"))
    sizes = ["--dtype", "float16", "--heads", "1", "--lengths", "20", "257", "--rows", "257"]
    out = tmp_path / "hopper.csv"
    kernels = ["--kernel", "attention_forward", "attention_backward_fused"]
    assert tool.main([*sizes, *kernels, "--rounds", "1", "--processes", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "attention_forward, float16, head dim 64, segments of 257 rows: 3 timed" in said
    assert "3 consumers, 4 tiles of 128, 160 registers, queries in shared memory  shipped" in said
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == ["attention_forward"] * 3 + ["attention_backward_fused"] * 3
    assert {row["length"] for row in rows} == {"257"}  # of short segments there are other kernels
    assert all(float(row["milliseconds"]) > 0 for row in rows) and {row["stages"] for row in rows[:3]} >= {"4"}


def test_without_a_hopper_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tool.main([]) == 2 and "torch sees no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert tool.main([]) == 2 and "this GPU has 8.0" in capsys.readouterr().err
    monkeypatch.delitem(tool.BACKENDS, "hopper")
    assert tool.main([]) == 2 and "HLIP_KERNELS_WITHOUT" in capsys.readouterr().err
