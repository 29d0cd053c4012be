"""The performance model of the short-segment CUDA kernels, counted from their packs; see :mod:`hlip_kernels.performance`.

In shared packs a warp takes 16 rows at a time and goes over the keys they see in steps of 16. Each step is counted as the
kernel issues it: matrix products (two ``mma.m16n8k16`` for every 16 x 16 x 16), what they load from shared memory (512 bytes
for two of them: one operand, since the other stays in registers), exponentials, and float32 operations. Unlike the Triton
kernels' model there is a fourth unit, shared memory: with one operand of 16 rows a warp, its 128 bytes a clock last for 2
products in 4 clocks.

The kernels for segments that have a pack of their own (``whole_forward.cuh`` and ``whole_backward.cuh`` in
``csrc/short_attention``) are counted apart: a warp has 32 queries, or keeps 32 keys, so that an operand serves four products.
Backward, warps are dealt to the four schedulers of a multiprocessor in turn, so that 5 warps with keys take as long as 8.

*Overlapped*: the slowest of units and device memory. *Serial*: units one after the other, and loading not hidden behind them.
Several blocks share a multiprocessor, or one copies its next segment while it computes, and a kernel should lie near the first.
"""

from __future__ import annotations

import numpy as np
import torch

from .backends.cuda_whole import whole
from .layout import Layout
from .packs import TILE, Packs, packs_of
from .pattern import Plan
from .performance import LAUNCH, Prediction, Rates

# mma.sync reaches about this share of the matrix rate on Hopper, whose peak is for warpgroup MMAs (Luo et al.,
# arXiv 2402.13499, measure 62.9% on average). Elsewhere it is the matrix instruction, and reaches all of it.
_MMA_SYNC = {"hopper": 0.63, "ampere": 1.0}
_SHARED_BYTES = 128  # a clock and multiprocessor

# Products of 16 x 16 x D, exponentials and other float32 operations per logit, and tensors moved once, or written to shared
# memory: forward, and the two halves of the backward kernel together.
_FORWARD = {"products": 2, "exponentials": 1, "floats": 6, "tensors": 4, "staged": 2}
_BACKWARD = {"products": 7, "exponentials": 2, "floats": 14, "tensors": 8, "staged": 4}
# The kernels of whole segments.
_WHOLE_FORWARD = {"exponentials": 1, "floats": 5, "staged": 2}
_WHOLE = {"exponentials": 1, "floats": 7, "staged": 5}
_SCHEDULERS = 4
_BLOCK_SHARED_MEMORY = {"ampere": 163 << 10, "hopper": 227 << 10}  # of an A100, and of the newer cards


def steps_of(packs: Packs, begin: int = 0, end: int | None = None) -> int:
    """Steps of 16 keys, summed over all tiles of 16 rows of packs ``begin`` to ``end``."""
    table, starts, records = (t.cpu().numpy().astype(np.int64) for t in (packs.packs[begin:end], packs.starts, packs.records))
    alive = records[:, 5] + records[:, 7] > 0
    table = table[alive[table[:, 0]]]
    lengths = records[:, 1] + records[:, 3]
    alone = table[table[:, 1] == 1]
    tiles = -(-lengths[alone[:, 0]] // TILE)
    steps = int((tiles * tiles).sum())
    for first, count, _, rows in table[table[:, 1] > 1]:
        ends = starts[first : first + count] + lengths[first : first + count]
        tops = np.arange(0, rows, TILE)
        bottoms = np.minimum(tops + TILE, rows) - 1
        low = starts[first + np.searchsorted(ends, tops, side="right")]
        high = ends[np.searchsorted(ends, bottoms, side="right")]
        steps += int((-(-(high - low // TILE * TILE) // TILE)).sum())
    return steps


def _clocks(packs: Packs, first: int, last: int | None, work: dict, head_dim: int) -> dict[str, float]:
    """What packs ``first`` to ``last`` take of each unit, for one head: FLOPs, bytes, exponentials, operations, logits."""
    logits = float(steps_of(packs, first, last) * TILE * TILE)
    products = logits / TILE**2 * work["products"] * head_dim / TILE  # of 16 x 16 x 16
    return {
        "matrix": products * 2 * TILE**3,
        "shared memory": products * 512 + _staged(packs, first, last, work, head_dim),
        "exponentials": logits * work["exponentials"],
        "floats": logits * work["floats"],
        "logits": logits,
    }


def _whole_forward_clocks(packs: Packs, first: int, last: int, head_dim: int) -> dict[str, float]:
    """The same of ``whole_forward.cuh``, for packs that hold one segment alone."""
    tiles = -(-packs.packs[first:last, 3].cpu().numpy().astype(np.int64) // TILE)
    pairs = tiles * -(-tiles // 2)  # of two tiles of queries and one of keys
    logits = float(2 * pairs.sum() * TILE**2)
    parts = head_dim // TILE
    return {
        "matrix": logits * 2 * 2 * head_dim,
        "shared memory": float(pairs.sum() * 2 * parts * 512) + _staged(packs, first, last, _WHOLE_FORWARD, head_dim),
        "exponentials": logits * _WHOLE_FORWARD["exponentials"],
        "floats": logits * _WHOLE_FORWARD["floats"],
        "logits": logits,
    }


def _whole_clocks(packs: Packs, first: int, last: int, head_dim: int) -> dict[str, float]:
    """The same of ``whole_backward.cuh``, for packs that hold one segment alone."""
    tiles = -(-packs.packs[first:last, 3].cpu().numpy().astype(np.int64) // TILE)
    warps = -(-tiles // 2)  # that have keys, 32 each
    slots = -(-warps // _SCHEDULERS) * _SCHEDULERS  # that are busy or wait for one of those
    parts = head_dim // TILE
    passed, exchanged = tiles * warps * 2, tiles * tiles  # squares of 16 x 16: of P and dS, and of dS as an operand of dQ
    logits = float((tiles * slots * 2).sum() * TILE**2)
    return {
        "matrix": float((4 * tiles * slots * 2 + exchanged).sum() * parts * 2 * TILE**3),
        # An operand for four products; dS written; dS read once for every 32 columns of dQ, beside the keys.
        "shared memory": float((passed * (4 * parts * 256 + 512) + exchanged * (parts // 2 + parts) * 512).sum())
        + _staged(packs, first, last, _WHOLE, head_dim),
        "exponentials": logits * _WHOLE["exponentials"],
        "floats": logits * _WHOLE["floats"],
        "logits": float(passed.sum() * TILE**2),
    }


def _staged(packs: Packs, first: int, last: int | None, work: dict, head_dim: int) -> float:
    """Bytes written to shared memory as rows arrive."""
    return float(packs.packs[first:last, 3].sum()) * work["staged"] * 2 * head_dim


def predict_short(
    layout: Layout, level: str, *, heads: int, head_dim: int, dtype: torch.dtype, rates: Rates,
    backward: bool = False, halves: bool = False,
) -> Prediction:  # fmt: skip
    """The time of ``attention`` with the ``cuda`` backend, forward or backward.

    Args:
        layout, level: as in :func:`hlip_kernels.attention`, with segments the kernels can hold.
        heads, head_dim, dtype: of q, k and v. rates: of the GPU. backward: the backward kernel instead of the forward one.
        halves: with the backend ``cuda_halves``.
    """
    plan = Plan.of(layout.pattern(level))
    packs = packs_of(plan, torch.device("cpu"))
    work = _BACKWARD if backward else _FORWARD
    parts, waiting = [], 0  # one for each kernel that is started; the first pack that none was started for
    if not backward and len(packs.alone):
        waiting = len(packs.alone)
        parts.append(_whole_forward_clocks(packs, 0, waiting, head_dim))
    if backward and not halves:
        _, *stretches = whole(packs, head_dim, _BLOCK_SHARED_MEMORY[rates.family])
        for first, last, _ in stretches:
            if first == last:
                continue
            if first > waiting:
                parts.append(_clocks(packs, waiting, first, work, head_dim))
            parts.append(_whole_clocks(packs, first, last, head_dim))
            waiting = last
    if waiting < len(packs.packs) or not parts:
        parts.append(_clocks(packs, waiting, None, work, head_dim))
    of_each = heads / rates.multiprocessors  # heads a multiprocessor has to do of everything
    clocks = {unit: of_each * sum(part[unit] for part in parts) for unit in parts[0]}
    logits = clocks.pop("logits")
    clocks["matrix"] /= rates.matrix[dtype.itemsize] * _MMA_SYNC[rates.family]
    clocks["shared memory"] /= _SHARED_BYTES
    clocks["exponentials"] /= rates.exponentials
    clocks["floats"] /= rates.floats
    memory = work["tensors"] * plan.num_rows * heads * head_dim * dtype.itemsize / rates.bandwidth
    times = {unit: count / rates.clock for unit, count in clocks.items()} | {"memory": memory}
    lengths = (plan.forward[:, 5] + plan.forward[:, 7]).astype(float)
    real = float((lengths**2).sum()) * of_each
    binds = max(times, key=times.__getitem__)
    launches = len(parts) * LAUNCH
    return Prediction(times[binds] + launches, sum(times.values()) + launches, memory, binds, real / max(logits, 1.0), 1.0)
