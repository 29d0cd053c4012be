"""Barriers of the compiled kernels: right with one warp far ahead of the others, and wrong, which is seen, without them.

Elsewhere the warps of a block keep pace with one another in tests/ptx, and would not miss a barrier.
"""

import re

import pytest
import test_short_attention as short
import torch
from ptx.extension import CompiledCudaBackend, extension
from ptx.machine import warps_apart
from ptx.own_process import compiled
from ptx.program import PtxError, parse
from test_compiled_triton import HOPPER, LONG, TRITON, check

# Segments that share packs, and one for each of the kernels for whole ones, whose blocks take both heads one after the other.
LENGTHS = [20, 5, 66, 130]
# Barriers that only packs with a value that is not finite come to.
SPARED = {"short_attention_forward": 1, "short_attention_backward": 1, "short_attention_whole_backward": 1}


def attend(halves, seed):
    made = extension()
    made.start_anew()
    made.seed = seed
    with warps_apart():
        short.check(CompiledCudaBackend(halves=halves, multiprocessors=1), LENGTHS, 1, torch.float16, 32)
    return [launch.kernel for launch in made.launches]


@pytest.mark.parametrize("halves", [False, True], ids=["cuda", "cuda_halves"])
def test_short_attention(halves):
    attend(halves, 5)


def survivors(name, halves):
    """Barriers (their number) that nobody misses."""
    made = extension()
    text, found = made.texts[name], []
    places = list(re.finditer(r"bar\.(sync|red\.or\.pred)\s[^;]*;", text))
    for number, place in enumerate(places):
        if place.group(1) != "sync":
            continue  # its vote is needed too
        wrong = text[: place.start()] + text[place.end() :]
        made.replaced = {name: parse(wrong)[name]}
        try:
            for seed in (0, 5, 9):
                attend(halves, seed)
            found.append(number)
        except (AssertionError, PtxError):
            pass
        finally:
            made.replaced = {}
    return found, len(places)


@pytest.mark.parametrize("halves, what", [(True, "short_attention_forward"), (True, "short_attention_backward"),
                                          (False, "short_attention_whole_backward")])  # fmt: skip
def test_short_attention_without_a_barrier(halves, what):
    names = [name for name in dict.fromkeys(attend(halves, 0)) if f"{len(what)}{what}I" in name]
    assert len(names) == (2 if "whole" in what else 1)
    for name in names:
        found, count = survivors(name, halves)
        assert count >= 3 and len(found) <= SPARED[what], f"{name}: without barrier {found} of {count} all is as before"


@pytest.mark.parametrize("way", [*TRITON, *HOPPER])
@compiled
def test_triton_and_gluon(way):
    capability = (9, 0) if way in HOPPER else (8, 0)
    with warps_apart():
        check("bfloat16", LONG["bfloat16"], 1, "study", 1, 64, way=way, capability=capability)


@pytest.mark.parametrize("way", TRITON)
@compiled
def test_triton_without_barriers(way):
    from ptx import triton_driver

    def without(text):
        return parse(re.sub(r"bar\.sync\s+0;", "", text))

    before, triton_driver._read = triton_driver._read, without
    try:
        with warps_apart(), pytest.raises((AssertionError, PtxError)):
            check("bfloat16", LONG["bfloat16"], 1, "study", 1, 64, way=way)
    finally:
        triton_driver._read = before
