"""The tool that times other tiles, in Triton's interpreter: candidates, one that fails, the time limit, what it leaves."""

import csv
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import tune_tiles as tool  # noqa: E402
import tuning  # noqa: E402

from hlip_kernels.backends.triton.config import Config  # noqa: E402

SMALL = ["--dtype", "float16", "--head-dim", "16", "--heads", "1", "--lengths", "20", "--rows", "40", "--rounds", "1"]


def case(kernel="attention_forward", **changed):
    options = {"dtype": "float16", "head_dim": 16, "heads": 1, "length": 20, "rows": 40, "device": "cpu"}
    return tool.Case(kernel, **options | changed)


def test_neighbours_are_the_shipped_tiles_and_those_next_to_them():
    shipped = Config(64, 16, 4, 1, (16, 0))
    found = tool.neighbours(shipped)
    assert found[0] == shipped and len(set(found)) == len(found)
    assert found[1] in (Config(64, 16, 8, 1, (16, 0)), Config(32, 16, 4, 1, (16, 0)))  # one thing changed
    assert {c.block_m for c in found} == {32, 64, 128} and {c.block_n for c in found} == {16, 32}
    assert {c.num_warps for c in found} == {4, 8} and {c.num_stages for c in found} == {1, 2}
    assert {c.columns for c in found} == {(16, 0)}


@pytest.mark.parametrize("kernel", tool.TUNED)
def test_a_candidate_reaches_its_kernel_and_no_other(kernel, monkeypatch):
    asked = {}
    launch = tool.backend._launch
    monkeypatch.setattr(tool.backend, "_launch", lambda k, config, *rest, **more: (
        asked.__setitem__(k.fn.__name__, config), launch(k, config, *rest, **more)))  # fmt: skip
    monkeypatch.setattr(tool.backend.tables, "FUSED_FROM", 0)
    once = case(kernel).make()
    asked.clear()
    shipped = tool.backend.config_for
    once(Config(32, 32, 4, 1))
    assert asked.pop(kernel) == Config(32, 32, 4, 1, (16, 0))
    other = {"attention_backward_dq": "attention_backward_dkdv", "attention_backward_dkdv": "attention_backward_dq"}.get(kernel)
    assert asked == ({other: case(other).shipped()} if other else {})
    assert tool.backend.config_for is shipped


def test_times_are_sorted_and_written(capsys, tmp_path):
    arguments = [*SMALL, "--kernel", "attention_forward", "--out", str(tmp_path / "tiles.csv")]
    assert tool.main(arguments) == 0
    said = capsys.readouterr().out
    shipped = case().shipped()
    assert f"{shipped.block_m}x{shipped.block_n}, {shipped.num_warps} warps, {shipped.num_stages} stages  shipped" in said
    with (tmp_path / "tiles.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(tool.neighbours(shipped))
    times = [float(row["milliseconds"]) for row in rows]
    assert times == sorted(times) and min(times) > 0
    (own,) = [row for row in rows if row["shipped"] == "True"]
    assert float(own["over_shipped"]) == 1.0 and own["kernel"] == "attention_forward" and own["length"] == "20"


def test_a_candidate_that_fails_falls_away(monkeypatch):
    launch = tool.backend._launch

    def fails(kernel, config, *rest, **more):
        if config.block_n == 128:
            raise RuntimeError("out of resource: shared memory")
        return launch(kernel, config, *rest, **more)

    monkeypatch.setattr(tool.backend, "_launch", fails)
    runs = tuning.compile_all([case()], time.monotonic() + 60, 1)[case()]
    shipped = case().shipped()
    assert runs and all(config.block_n != 128 for config in runs)
    assert shipped in runs and len(runs) < len(tool.neighbours(shipped))


def test_no_time_left(capsys):
    many = len(tool.neighbours(case().shipped()))
    assert tuning.compile_all([case()], time.monotonic() - 1, 1) == {case(): []}
    assert f"no time for {many} of {many} candidates" in capsys.readouterr().err
    assert tuning.time_all(case(), [case().shipped()], time.monotonic() - 1, 1) == []


def test_candidates_are_tried_in_other_processes():
    cases = [case("attention_backward_dq"), case("attention_backward_dkdv")]
    found = tuning.compile_all(cases, time.monotonic() + 60, 2)
    assert {c: set(runs) for c, runs in found.items()} == {c: set(tool.neighbours(c.shipped())) for c in cases}


@pytest.mark.parametrize("dtype, length", [("float32", 600), ("float16", 20)])
def test_a_kernel_that_is_not_used_has_nothing_to_tune(capsys, dtype, length):
    arguments = ["--kernel", "attention_backward_fused", "--dtype", dtype, "--head-dim", "16", "--lengths", str(length)]
    assert tool.main(arguments) == 0 and capsys.readouterr().out == ""
