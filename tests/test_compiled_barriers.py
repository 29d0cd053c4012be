"""Barriers of the compiled kernels: right with one warp far ahead of the others, and wrong, which is seen, without them.

Elsewhere the warps of a block keep pace with one another in tests/ptx, and would not miss a barrier.
"""

import re
from functools import partial

import pytest
import test_short_attention as short
import torch
from ptx.extension import CompiledCudaBackend, extension
from ptx.extension_build import readable
from ptx.machine import warps_apart
from ptx.own_process import compiled
from ptx.program import PtxError, parse
from settled import CUDA_KERNELS, TRITON_KERNELS
from test_compiled_triton import HOPPER, LONG, TRITON, check

# Segments that share packs, and one for each of the kernels for whole ones, whose blocks take both heads one after the other.
LENGTHS = [20, 5, 66, 130]
FULL = [20, 5, 95, 90, 207]  # for blocks, two of 4 warps and one of 8, with room for the keys of one segment only


def attend(seed, halves=False, capability=(9, 0), lengths=LENGTHS):
    """Forward and backward, one warp ahead of the others; the kernels launched."""
    made = extension()
    made.start_anew()
    made.seed = seed
    with warps_apart():
        short.check(CompiledCudaBackend(halves, capability, multiprocessors=1), lengths, 1, torch.float16, 32)
    return [launch.kernel for launch in made.launches]


def one_by_one(seed, where):
    """The same of packs that are gone over segment by segment, for a value that is not finite."""
    made = extension()
    made.start_anew()
    made.seed = seed
    with warps_apart():
        short.leaves_its_pack_alone(
            CompiledCudaBackend(halves=True, multiprocessors=1), torch.float16, 32, where, float("nan"), (6,)
        )
    return [launch.kernel for launch in made.launches]


# What comes to every barrier of each kernel, between them.
TRIALS = {
    "short_attention_forward": [partial(attend, halves=True), partial(one_by_one, where="v")],
    "short_attention_whole_forward": [partial(attend, halves=True, lengths=n) for n in ([66], [80, 70])],
    "short_attention_backward": [partial(attend, halves=True), partial(one_by_one, where="k")],
    "short_attention_whole_backward": [attend, partial(attend, capability=(8, 6), lengths=FULL)],
}
everything = pytest.mark.parametrize("what, trial", [(what, n) for what in TRIALS for n in range(2)])


@everything
def test_short_attention(what, trial):
    assert any(f"{len(what)}{what}I" in name for name in TRIALS[what][trial](5))


def survivors(name, trials):
    """Barriers (their number) that nobody misses, and how many there are."""
    made = extension()
    text, found = made.texts[name], []
    places = list(re.finditer(r"bar\.(sync|red\.or\.pred)\s[^;]*;", text))
    for number, place in enumerate(places):
        if place.group(1) != "sync":
            continue  # its vote is needed too
        wrong = text[: place.start()] + text[place.end() :]
        made.replaced = {name: parse(wrong)[name]}
        try:
            for seed in (0, 5):
                for trial in trials:
                    trial(seed)
            found.append(number)
        except (AssertionError, PtxError):
            pass
        finally:
            made.replaced = {}
    return found, len(places)


@pytest.mark.settles(*CUDA_KERNELS, packages=["nvcc"])
@pytest.mark.parametrize("what", TRIALS)
def test_short_attention_without_a_barrier(what):
    launched = [set(trial(0)) for trial in TRIALS[what]]
    names = {name: readable(name) for name in set().union(*launched) if f"{len(what)}{what}I" in name}
    assert len(names) == (3 if what.endswith("whole_backward") else 1)
    for name, template in names.items():
        found, count = survivors(name, [trial for trial, who in zip(TRIALS[what], launched, strict=True) if name in who])
        # With 64 queries a step there is always room for the keys of two segments, and one barrier that no launch comes to.
        unused = what.endswith("whole_backward") and ", 64, 1>" in template
        assert count >= 2 and len(found) == unused, f"{template}: without barrier {found} of {count} all is as before"


@pytest.mark.parametrize("way", [*TRITON, *HOPPER])
@compiled
def test_triton_and_gluon(way):
    capability, head_dim = (9, 0) if way in HOPPER else (8, 0), 128 if "128" in way else 64
    level = "slice" if "whole" in way else "study"
    with warps_apart():
        check("bfloat16", LONG["bfloat16"], 1, level, 1, head_dim, way=way, capability=capability)


@pytest.mark.settles(*TRITON_KERNELS, packages=["triton"])
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
