"""The traffic of the short-segment kernels, counted while their PTX runs: every tensor moved once, and no bank conflicts."""

import pytest
import test_whole_backward as whole
import torch
from emulated_attention import plan_of
from ptx.counts import counting
from ptx.extension import CompiledCudaBackend, extension
from ptx.extension_build import cuda_toolkit
from test_compiled_extension import CAPABILITIES

from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.cuda import HEAD_DIMS

DTYPE = torch.bfloat16
PACKED = [100, 20, 5, 3, 64, 1, 1, 9]  # segments that share packs, and one that does not
SLICE = [196]  # of the published models, with 2 prefix rows
COUNTED_WITH = "13.0"  # nvcc


def counted(lengths, num_prefix, head_dim, backend, heads=1):
    """Counts of forward and backward, and the bytes of one tensor."""
    plan = plan_of(lengths, num_prefix)
    q, k, v, grad = whole.KINDS["packed"](plan.num_rows, DTYPE, head_dim, heads=heads)
    scale = head_dim**-0.5
    with counting() as forward:
        out, lse = backend.forward(q, k, v, plan, scale, Numerics())
    with counting() as backward:
        backend.backward(grad, None, q, k, v, out, lse, plan, scale, Numerics())
    return forward, backward, plan.num_rows * heads * head_dim * DTYPE.itemsize, plan.num_rows * heads


def no_conflicts(counts, spared=0):
    for kind, count in counts.shared.items():
        assert count.units <= count.least + (spared if kind == "copy" else 0), f"bank conflicts: {kind}: {count}"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packs(head_dim):
    """Keys and values, and for backward queries and output gradients, are copied; queries (outputs) go to registers."""
    forward, backward, tensor, rows = counted(PACKED, 1, head_dim, CompiledCudaBackend(halves=True))
    no_conflicts(forward)
    no_conflicts(backward)
    assert forward.device["copy"].bytes == 2 * tensor and backward.device["copy"].bytes == 4 * tensor
    tables = 64 * rows  # looked up by every row, most of them in a cache
    assert tensor <= forward.device["load"].bytes <= tensor + tables
    assert tensor <= backward.device["load"].bytes <= tensor + tables
    assert forward.device["store"].bytes == tensor + 4 * rows and backward.device["store"].bytes == 3 * tensor
    for count in (forward.device["copy"], backward.device["copy"], backward.device["store"]):
        assert 32 * count.units == count.bytes, "sectors moved in part"


@whole.ways
def test_whole_segments(way):
    lengths = [way.lengths[1]]
    backend = CompiledCudaBackend(capability=CAPABILITIES[way.card], multiprocessors=1)
    extension().start_anew()
    _, backward, tensor, rows = counted(lengths, 0, way.head_dim, backend)
    assert "whole_backward" in extension().launches[-1].what
    padded = -(-lengths[0] // 16) * 16
    no_conflicts(backward, spared=2 * -(-padded // 32))  # two statistics of each row: 4 bytes to every 8
    assert backward.device["copy"].bytes == 5 * tensor + 4 * rows
    assert backward.device["load"].bytes < 200
    assert backward.device["store"].bytes == 3 * tensor


@pytest.mark.parametrize("halves, most_forward, most_backward", [(True, 22_200, 64_700), (False, 22_200, 65_200)])
def test_instructions_of_a_published_slice(halves, most_forward, most_backward):
    """PTX instructions of warps, a segment and head: machine code has fewer, and follows them. Code that decides for every
    logit whether it counts took 39,500 and 90,800; copying chunk by chunk, each with its row looked up, and 16 queries a warp
    forward, 30,600 and 73,400."""
    nvcc = cuda_toolkit.nvcc_version()
    if nvcc != COUNTED_WITH:
        pytest.skip(f"the limits are of nvcc {COUNTED_WITH}, this is {nvcc}")
    forward, backward, *_ = counted(SLICE, 2, 64, CompiledCudaBackend(halves=halves))
    assert sum(forward.instructions.values()) <= most_forward
    assert sum(backward.instructions.values()) <= most_backward
    product = 13 * 13 * 4 * 2  # of 16 x 8 x 16 in one product of 13 x 13 tiles by a head dim of 64
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    # The kernels for whole segments have 14 tiles, two a warp: of queries forward, of keys in four of five products backward.
    assert forward.instructions[mma] == 2 * product * 14 // 13
    assert backward.instructions[mma] == product * (7 if halves else 4 * 14 / 13 + 1)
