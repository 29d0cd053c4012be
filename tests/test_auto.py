"""The tables of ``auto``: which line is taken, the user's before the shipped, broken files, and the command that measures."""

import json

import pytest
import torch

from hlip_kernels import backends, measure_auto
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
            assert "predicted" in line.evidence  # until a GPU has been measured


def test_length_decides(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setitem(BACKENDS, name, Can(272 if name == "cuda" else None))
    chosen = [decide(Query("cuda", (9, 0), torch.bfloat16, 64, longest=n)).backend for n in (1, 128, 129, 9000)]
    assert chosen == ["cuda", "cuda", "triton", "triton"]
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
    lines = (auto.Choice("cuda", "cuda", "a", (9, 0), "bfloat16", 64, 128), auto.Choice("cpu", "sdpa", "b"))
    auto.write(list(lines), own)
    assert auto.read(own) == lines and auto.table()[:2] == lines
    assert [p.name for p in own.parent.iterdir()] == ["auto.json"]


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


def test_bands_with_one_winner_are_one_line():
    measured = {32: {"a": 1.0, "b": 2.0}, 64: {"a": 1.0, "b": 2.0}, 128: {"a": 2.0, "b": 1.0}, 256: {"b": 1.0}}
    lines = measure_auto.lines_of(measured, torch.device("cpu"), torch.float32, 64)
    assert [(line.backend, line.longest) for line in lines] == [("a", 64), ("b", None)]
    assert "a 1e+03 ms, b 2e+03 ms at 64 rows" in lines[0].evidence
