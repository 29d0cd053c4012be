"""The performance model of the short-segment CUDA kernels, counted from their packs; see :mod:`hlip_kernels.performance`.

A warp takes 16 rows at a time and goes over the keys they see in steps of 16. Each step is counted as the kernel issues it:
matrix products (two ``mma.m16n8k16`` for every 16 x 16 x 16), what they load from shared memory (512 bytes for two of them: one
operand, since the other stays in registers), exponentials, and float32 operations. Unlike the Triton kernels' model there is a
fourth unit, shared memory: with one operand of 16 rows a warp, its 128 bytes a clock last for 2 products in 4 clocks.

*Overlapped*: the slowest of units and device memory. *Serial*: units one after the other, and loading not hidden behind them.
Several blocks share a multiprocessor, so that one loads while another computes, and a kernel should lie near the first.
"""

from __future__ import annotations

import numpy as np
import torch

from .layout import Layout
from .packs import TILE, Packs, packs_of
from .pattern import Plan
from .performance import LAUNCH, Prediction, Rates

# mma.sync reaches about this share of the matrix rate on Hopper, whose peak is for warpgroup products (Luo et al.,
# arXiv 2402.13499, measure 62.9% on average). Elsewhere it is the matrix instruction, and reaches all of it.
_MMA_SYNC = {"hopper": 0.63, "ampere": 1.0}
_SHARED_BYTES = 128  # a clock and multiprocessor

# Products of 16 x 16 x D, exponentials and other float32 operations per logit, and tensors moved once: forward, and the two
# halves of the backward kernel together.
_FORWARD = {"products": 2, "exponentials": 1, "floats": 6, "tensors": 4, "staged": 2}
_BACKWARD = {"products": 7, "exponentials": 2, "floats": 14, "tensors": 8, "staged": 4}


def steps_of(packs: Packs) -> int:
    """Steps of 16 keys, summed over all tiles of 16 rows of all packs."""
    table, starts, records = (t.cpu().numpy().astype(np.int64) for t in (packs.packs, packs.starts, packs.records))
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


def predict_short(
    layout: Layout, level: str, *, heads: int, head_dim: int, dtype: torch.dtype, rates: Rates, backward: bool = False
) -> Prediction:
    """The time of ``attention`` with the ``cuda`` backend, forward or backward.

    Args:
        layout, level: as in :func:`hlip_kernels.attention`, with segments the kernels can hold.
        heads, head_dim, dtype: of q, k and v. rates: of the GPU. backward: the backward kernel instead of the forward one.
    """
    plan = Plan.of(layout.pattern(level))
    packs = packs_of(plan, torch.device("cpu"))
    work = _BACKWARD if backward else _FORWARD
    steps = steps_of(packs) * heads / rates.multiprocessors
    logits = steps * TILE * TILE
    products = steps * work["products"] * (head_dim / 16)
    moved = work["tensors"] * plan.num_rows * heads * head_dim * dtype.itemsize
    staged = moved * work["staged"] / work["tensors"] / rates.multiprocessors  # written to shared memory
    clocks = {
        "matrix": products * 2 * TILE**3 / (rates.matrix[dtype.itemsize] * _MMA_SYNC[rates.family]),
        "shared memory": (products * 512 + staged) / _SHARED_BYTES,
        "exponentials": logits * work["exponentials"] / rates.exponentials,
        "floats": logits * work["floats"] / rates.floats,
    }
    memory = moved / rates.bandwidth
    times = {unit: count / rates.clock for unit, count in clocks.items()} | {"memory": memory}
    lengths = (plan.forward[:, 5] + plan.forward[:, 7]).astype(float)
    real = float((lengths**2).sum()) * heads / rates.multiprocessors
    binds = max(times, key=times.__getitem__)
    return Prediction(times[binds] + LAUNCH, sum(times.values()) + LAUNCH, memory, binds, real / max(logits, 1.0), 1.0)
