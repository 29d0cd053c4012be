"""Other public implementations of the same function, measured in the same process.

Each takes packed q, k, v ``(R, H, D)`` and gives packed out, doing everything it needs on the way: padding, gathering,
concatenating. What its users could prepare once per batch (index tensors, masks) is prepared outside the measured call, and
rows are moved as someone who knows torch would move them: see :mod:`.order`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.hopper.config import FUSED, backward_kernels
from hlip_kernels.backends.triton import is_fused
from hlip_kernels.pattern import Plan

from .order import Order, equal_lengths, segment_lengths
from .workloads import Workload

# On a GPU, a forward call of more than this that is mostly padding is not worth the minutes its rounds take.
MOST_PADDED_FLOPS = 60e12
# Graphs FlexAttention may compile. It takes two or three for everything; a limit, so that a mistake is an error.
MOST_FLEX_GRAPHS = 16


@dataclass(frozen=True)
class Peer:
    """``run(q, k, v) -> out``; ``backward`` says whether gradients flow through it here, ``forward`` whether its forward pass
    is worth a row: not where it is another's."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: bool = True
    forward: bool = True


def peers(workload: Workload, level: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Peer]]:
    """Name -> a function that prepares the implementation, for those that can run here.

    It skips the test that calls it where the implementation would do little but pad; see :func:`too_much`.
    """
    made: dict[str, Callable[[], Peer]] = {}
    plan = Plan.of(workload.layout.pattern(level))
    query = Query(device.type, _capability(device), dtype, workload.head_dim, plan.longest, plan.sees_itself)
    for name, backend in BACKENDS.items():
        # The interpreter is for tests, the reference for truth: neither is worth a row.
        if name != "reference" and backend.supports(query) and not (name == "triton" and device.type == "cpu"):
            made[f"hlip {name}"] = lambda name=name: _ours(workload, level, device, name)
    fast = Numerics(deterministic=False)
    if "hlip triton" in made and is_fused(device, dtype, workload.head_dim, plan.longest, fast):
        made["hlip triton fast"] = lambda: _ours(workload, level, device, "triton", fast=True)
    if "hlip hopper" in made and backward_kernels(plan, workload.head_dim, in_one=True) == FUSED:
        made["hlip hopper fast"] = lambda: _ours(workload, level, device, "hopper", fast=True)
    made["published path"] = _affordable(workload, level, device, lambda: _published(workload, level, device))
    made["padded SDPA"] = _affordable(workload, level, device, lambda: _padded(workload, level, device, dtype))
    made["FlexAttention"] = lambda: _flex(workload, level, device)
    if has_flash(device, dtype):
        if _installed("torch.nn.attention.varlen"):
            made["torch varlen"] = lambda: _varlen("torch varlen", workload, level, device, torch_varlen)
        for name, module in FLASH_ATTN.items():
            if _installed(module):
                made[name] = lambda name=name, module=module: _varlen(name, workload, level, device, _flash_attn(module))
        if equal_lengths(workload, level) and torch.version.hip is None:
            made["cuDNN SDPA"] = lambda: _cudnn(workload, level, device)
    return made


def _capability(device: torch.device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels of others run here at all: 16 bits, and from sm_80 on."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _installed(module: str) -> bool:
    """Whether a module can be found; a folder without code of its own (``flash_attn`` beside flash-attn 4) does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent is not there
        return False
    return spec is not None and spec.origin is not None


# ---------------------------------------------------------------------- how much work


def padded_flops(workload: Workload, level: str) -> float:
    """Forward floating-point operations once every segment is as long as the longest."""
    lengths = segment_lengths(workload, level)
    return dense_flops(len(lengths), int(lengths.max(initial=0)), workload.dim)


def dense_flops(segments: int, length: int, dim: int) -> float:
    """Forward floating-point operations of attention in so many segments of one length, ``dim`` over all heads."""
    return 4.0 * segments * float(length) ** 2 * dim


def too_much(flops: float, work: float, device: torch.device) -> str:
    """Why one attention call of ``flops``, forward, is left out; empty if it is measured.

    A call whose work is the work itself always is, and so is everything on a CPU, where workloads are small.
    """
    if device.type == "cpu" or flops <= MOST_PADDED_FLOPS or flops <= 1.05 * work:
        return ""
    most = MOST_PADDED_FLOPS / 1e12
    return f"padded to {flops / 1e12:.0f} TFLOP a forward call for {work / 1e12:.1f} of work; measured up to {most:.0f}"


def _affordable(workload: Workload, level: str, device: torch.device, make: Callable[[], Peer]) -> Callable[[], Peer]:
    """``make``, or a skip that says how much it would compute."""
    reason = too_much(padded_flops(workload, level), workload.attention_flops(level), device)
    return partial(pytest.skip, reason) if reason else make


# ---------------------------------------------------------------------- the implementations


def _ours(workload: Workload, level: str, device: torch.device, backend: str, fast: bool = False) -> Peer:
    """One of our backends; ``fast`` with ``deterministic=False``, which changes the backward pass alone, as do
    the halves of ``cuda_halves``."""
    layout = workload.layout.to(device)
    options = {"backend": backend, "deterministic": not fast}
    name = f"hlip {backend} fast" if fast else f"hlip {backend}"
    forward = not fast and backend != "cuda_halves"
    return Peer(name, lambda q, k, v: attention(q, k, v, layout, level, **options), forward=forward)


def _published(workload: Workload, level: str, device: torch.device) -> Peer:
    """The published data path: rectangular batches only, so shorter segments are made as long as the longest.

    They are filled with their own tokens, which costs what repeating scans costs there. These copies are tokens like any
    other: gradients reach them, and theirs end there. On ragged batches the result therefore differs from the others and is
    not compared.

    The public code keeps prefix tokens beside their patches and concatenates only where the level changes. Here rows come
    packed, so q, k and v are joined at each call; ``test_model.py`` measures the encoder as it is published.
    """
    order = Order.of(workload, level, device, "repeated")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return order.packed(F.scaled_dot_product_attention(*(order.dense(t) for t in (q, k, v))))

    return Peer("published path", run)


def _padded(workload: Workload, level: str, device: torch.device, dtype: torch.dtype) -> Peer:
    """SDPA over segments padded to the longest, with a key mask; no mask when all are equally long."""
    order = Order.of(workload, level, device, "padding")
    mask = order.mask(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return order.packed(F.scaled_dot_product_attention(*(order.dense(t) for t in (q, k, v)), attn_mask=mask))

    return Peer("padded SDPA", run)


def _flex(workload: Workload, level: str, device: torch.device) -> Peer:
    """FlexAttention over the packed rows themselves, with a document mask (compiled).

    Gathering rows first would leave out 0 to 40% of the blocks, most where segments are short; at full size, moving q, k, v
    and out then takes about twice the time that those blocks do.
    """
    block_mask, compiled = flex_mask(workload, level, device), _compiled_flex()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Without gradients, no graph that keeps what a backward pass needs.
        with torch.set_grad_enabled(torch.is_grad_enabled() and q.requires_grad):
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            return compiled(q, k, v, block_mask=block_mask)[0].transpose(0, 1)

    return Peer("FlexAttention", run, backward=device.type == "cuda")


@cache
def _compiled_flex() -> Callable:
    """One compiled function for all cases.

    Dynamo counts graphs per function, whatever ``torch.compile`` object they come from, and after 8 it calls the unfused
    function, which makes all scores, without an error. With static shapes every case is a graph. So shapes are dynamic from
    the first call on, and all cases share a graph (letting torch find out which change fails to compile in C++: torch 2.14),
    and with ``fullgraph`` too many graphs are an error.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_FLEX_GRAPHS)
    # Or a compiled backward pass refuses retain_graph=True, which measuring it again and again needs.
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def flex_mask(workload: Workload, level: str, device: torch.device, size: int = 128):
    """The block mask that ``create_block_mask`` finds by making all ``R * R`` entries, from the offsets."""
    from torch.nn.attention.flex_attention import BlockMask

    layout, offsets = workload.layout, workload.layout.host_offsets(level)
    rows, tail, P = layout.num_rows, layout.num_tokens, layout.num_prefix
    document = np.full(-(-rows // size) * size, -1, dtype=np.int32)
    document[:tail] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    document[tail : layout.prefix_rows(level).stop] = np.repeat(np.arange(len(offsets) - 1), P)

    meet = np.zeros((len(document) // size,) * 2, dtype=bool)
    for s, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        runs = (start, stop), (tail + s * P, tail + (s + 1) * P)
        blocks = [slice(first // size, (last - 1) // size + 1) for first, last in runs if first < last]
        for a in blocks:
            for b in blocks:
                meet[a, b] = True
    of_block = document.reshape(-1, size)
    owner = np.where((of_block == of_block[:, :1]).all(1), of_block[:, 0], -1)  # the segment that has the block to itself
    full = (owner[:, None] == owner) & (owner >= 0)

    def lists(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
        """How many there are in each row, and which, the others after them."""
        counts, order = blocks.sum(1, dtype=np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        return tuple(torch.from_numpy(t)[None, None].to(device) for t in (counts, order))

    of_row = torch.from_numpy(document[:rows]).to(device)

    def same(b, h, i, j):
        return (of_row[i] == of_row[j]) & (of_row[i] >= 0)

    return BlockMask.from_kv_blocks(
        *lists(meet & ~full), *lists(full), BLOCK_SIZE=size, mask_mod=same, seq_lengths=(rows, rows)
    )  # fmt: skip


def _varlen(name: str, workload: Workload, level: str, device: torch.device, attend: Callable) -> Peer:
    """Rows gathered into one run per segment (prefix rows beside their patches), attended, scattered back."""
    order = Order.of(workload, level, device)
    offsets = order.offsets()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return order.scatter(attend(*(order.gather(t) for t in (q, k, v)), offsets, order.longest))

    return Peer(name, run)


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """torch's own varlen attention: cuDNN or flash attention, as torch sees fit."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, offsets, offsets, longest, longest)


# The packages called flash-attn, by the module that has ``flash_attn_varlen_func``.
FLASH_ATTN = {
    "flash-attn varlen": "flash_attn",
    "flash-attn 3 varlen": "flash_attn_interface",
    "flash-attn 4 varlen": "flash_attn.cute",
}


def _flash_attn(module: str) -> Callable:
    """``flash_attn_varlen_func`` of a package, called by the names of its arguments; some give the lse too."""
    function = importlib.import_module(module).flash_attn_varlen_func
    known = inspect.signature(function).parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        out = function(q, k, v, **{name: value for name, value in (
            ("cu_seqlens_q", offsets), ("cu_seqlens_k", offsets), ("max_seqlen_q", longest), ("max_seqlen_k", longest),
        ) if name in known})  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attend


def _cudnn(workload: Workload, level: str, device: torch.device) -> Peer:
    """cuDNN's attention, on batches of equally long segments, joined first.

    Called directly: the context that makes SDPA choose it would be part of the time. Rows joined segment by segment, heads
    inside, are one of the layouts it takes without a copy.
    """
    order = Order.of(workload, level, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lse = torch.is_grad_enabled() and q.requires_grad
        out, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*(order.dense(t) for t in (q, k, v)), None, lse)
        return order.packed(out)

    return Peer("cuDNN SDPA", run)
