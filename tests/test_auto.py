"""The tables of ``auto``: which line is taken, the user's before the shipped, broken files, and the command that measures."""

import json
import re

import pytest
import torch

from hlip_kernels import backends, measure_auto, predict_auto
from hlip_kernels.backends import BACKENDS, Query, auto, choose, decide

CPU = Query("cpu", None, torch.float32, 64, longest=100)
HOPPER = Query("cuda", (9, 0), torch.bfloat16, 64, longest=100)


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A user's table of this test's own; not there yet."""
    path = tmp_path / "conf" / "auto.json"
    monkeypatch.setenv("HLIP_KERNELS_AUTO", str(path))
    auto.table.cache_clear()
    yield path
    auto.table.cache_clear()


class Can(backends.Backend):
    """A backend that says it can run anything up to a length."""

    forward = backward = None

    def __init__(self, longest=None):
        self.longest = longest

    def supports(self, query):
        fits = self.longest is None or query.longest <= self.longest
        return backends.Support.yes() if fits else backends.Support.no("too long")


def test_the_shipped_table_says_what_each_line_rests_on():
    assert all(line.backend in BACKENDS and line.evidence for line in auto.SHIPPED)
    for line in auto.SHIPPED:
        if line.device_type == "cuda" and line.backend != "sdpa":
            assert re.search(r"^(predicted|compiled)\b.*; not yet run on a GPU$|which nobody has listed$", line.evidence)


def test_the_shipped_lines_for_short_segments_are_what_the_models_say():
    shipped = tuple(line for line in auto.SHIPPED if line.backend == "cuda")
    assert shipped == predict_auto.lines(), "python -m hlip_kernels.predict_auto prints what auto.SHIPPED should hold"


def test_a_line_of_the_models_ends_where_one_of_the_cards_falls_behind(monkeypatch):
    made_up = {"H100": {16: 0.5, 32: 0.7, 48: 0.9, 64: 0.99}, "H200": {16: 0.6, 32: 0.8, 48: 1.0, 64: 1.01, 80: 0.4}}
    serial = {16: 0.9, 32: 1.5, 48: 0.7}  # ahead again at 48, which does not count

    def ratios(gpu, head_dim, length):
        return made_up[gpu].get(length, 0.5), serial.get(length, 0.1)

    monkeypatch.setattr(predict_auto, "ratios", ratios)
    assert predict_auto.numbers("hopper", 64) == (48, 1.0, 0.7, 16)
    monkeypatch.setattr(predict_auto, "max_rows", lambda head_dim, capability: 47)
    assert predict_auto.numbers("hopper", 64) == (32, 0.8, 1.5, 16)  # what the kernels can hold
    made_up["H200"][16] = 1.2
    assert predict_auto.numbers("hopper", 64) is None


@pytest.mark.parametrize(
    "capability, family",
    [((8, 0), "ampere"), ((8, 9), "ampere"), ((9, 0), "hopper"), ((10, 3), "blackwell"), ((11, 0), "blackwell"),
     ((12, 1), "ampere"), (None, "amd"), ((14, 0), None)],
)  # fmt: skip
def test_families(monkeypatch, capability, family):
    for name in ("cuda", "triton"):
        monkeypatch.setitem(BACKENDS, name, Can())
    query = Query("cuda", capability, torch.float16, 80, longest=16)
    assert auto.family_of(query) == family
    assert auto.family_of(Query("cpu", capability, torch.float16, 80)) is None
    line = decide(query)
    assert line.family == family and line.backend == ("triton" if family in ("amd", None) else "cuda")
    assert auto.Choice("cuda", "x", "y", family="hopper").applies(query) == (family == "hopper")


def test_dtype_groups_and_head_dims(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setitem(BACKENDS, name, Can())
    chosen = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (64, 72):
            chosen[dtype, head_dim] = decide(Query("cuda", (8, 0), dtype, head_dim, longest=100)).backend
    assert [case for case, backend in chosen.items() if backend == "cuda"] == [(torch.float16, 64), (torch.bfloat16, 64)]


def test_length_decides(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setitem(BACKENDS, name, Can(272 if name == "cuda" else None))
    chosen = [decide(Query("cuda", (9, 0), torch.bfloat16, 64, longest=n)).backend for n in (1, 128, 129, 9000)]
    assert chosen == ["cuda", "cuda", "triton", "triton"]
    chosen = [decide(Query("cuda", (10, 0), torch.bfloat16, 80, longest=n)).backend for n in (112, 113)]
    assert chosen == ["cuda", "triton"]
    # Without a known length nothing says that segments are short.
    assert decide(Query("cuda", (9, 0), torch.bfloat16, 64)).backend == "triton"


def test_a_line_whose_backend_cannot_is_passed_over(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cuda", Can(10))
    monkeypatch.setitem(BACKENDS, "triton", Can(10))
    assert decide(HOPPER).backend == "sdpa"


def test_the_users_lines_come_first_and_only_where_they_apply(own):
    assert decide(CPU).backend == "sdpa"
    auto.write([auto.Choice("cpu", "reference", "told so", None, "float32", 64, 128)], own)
    assert decide(CPU).backend == "reference" and choose(CPU, "auto") is BACKENDS["reference"]
    for other in (
        Query("cpu", None, torch.float64, 64, longest=100),
        Query("cpu", None, torch.float32, 32, longest=100),
        Query("cpu", None, torch.float32, 64, longest=129),
        Query("cpu", None, torch.float32, 64),
    ):
        assert decide(other).backend == "sdpa"
    auto.write([auto.Choice("cuda", "sdpa", "told so", (8, 0))], own)
    assert decide(Query("cuda", (8, 0), torch.bfloat16, 64, longest=100)).evidence == "told so"
    assert decide(HOPPER).evidence != "told so"


def test_a_table_survives_writing_and_reading(own):
    lines = (
        auto.Choice("cuda", "cuda", "a", (9, 0), "bfloat16", 64, 128),
        auto.Choice("cpu", "sdpa", "b"),
        auto.Choice("cuda", "triton", "c", dtype="16-bit", family="hopper"),
    )
    auto.write(list(lines), own)
    assert auto.read(own) == lines and auto.table()[:3] == lines
    assert [p.name for p in own.parent.iterdir()] == ["auto.json"]


def test_a_table_written_before_there_were_families_is_still_read(own):
    own.parent.mkdir()
    own.write_text("""{"version": 1, "lines": [{"device_type": "cuda", "backend": "triton", "evidence": "measured on X",
        "capability": [9, 0], "dtype": "bfloat16", "head_dim": 64, "longest": 32}]}""")
    assert auto.table()[0] == auto.Choice("cuda", "triton", "measured on X", (9, 0), "bfloat16", 64, 32)
    auto.write(list(auto.read(own)), own)
    assert "family" not in own.read_text()  # so that an older version reads what a newer one measured


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2, "lines": []}', '{"version": 1, "lines": [{"backend": 1}]}',
                                  '{"version": 1, "lines": [3]}', "\x00"])  # fmt: skip
def test_a_broken_table_is_ignored_with_a_word(own, text):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.warns(UserWarning, match="measure_auto"):
        assert decide(CPU).backend == "sdpa"
    assert decide(CPU).backend == "sdpa"  # said once


def test_a_table_naming_a_backend_that_is_not_there(own):
    auto.write([auto.Choice("cpu", "of tomorrow", "x")], own)
    assert decide(CPU).backend == "sdpa"


def test_the_command_measures_and_writes(own, capsys):
    code = measure_auto.main(["--bands", "8", "16", "--rows", "64", "--rounds", "2", "--head-dim", "16"])
    printed = capsys.readouterr().out
    assert code == 0 and str(own) in printed and "segments of 8 rows" in printed
    lines = json.loads(own.read_text())["lines"]
    assert lines and lines[-1]["longest"] is None
    assert all("measured on" in line["evidence"] and " ms" in line["evidence"] for line in lines)
    name = lines[-1]["backend"]
    query = Query("cuda" if torch.cuda.is_available() else "cpu", None, torch.float32, 16, longest=1000)
    if not torch.cuda.is_available():
        assert decide(query).backend == name and "measured on" in decide(query).evidence


def test_a_backend_that_fails_is_left_out_of_the_measurement(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backends.BACKENDS["sdpa"], "forward", fail)
    monkeypatch.setitem(backends.BACKENDS, "sound", backends.sdpa.SdpaBackend())
    found = measure_auto.measure_band(8, torch.float32, 16, rows=16, heads=1, rounds=1, device=torch.device("cpu"))
    assert "sound" in found and "sdpa" not in found
    assert "sdpa at 8 rows left out: RuntimeError: no such instruction" in capsys.readouterr().err


def test_bands_with_one_winner_are_one_line():
    measured = {32: {"a": 1.0, "b": 2.0}, 64: {"a": 1.0, "b": 2.0}, 128: {"a": 2.0, "b": 1.0}, 256: {"b": 1.0}}
    lines = measure_auto.lines_of(measured, torch.device("cpu"), torch.float32, 64)
    assert [(line.backend, line.longest) for line in lines] == [("a", 64), ("b", None)]
    assert "a 1e+03 ms, b 2e+03 ms at 64 rows" in lines[0].evidence
