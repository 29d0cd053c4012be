"""Moves rows between the packed buffer and the layout of varlen flash attention: one launch each way.

Varlen flash attention wants the rows of a segment side by side: its patch rows, then its prefix rows. Both ways are the same
kernel, driven by where each row of the result comes from: ``index[i]`` is the source row of row ``i``, ``-1`` for none, and
a row with no source is 0. So no atomics, no second pass that clears, and every element of the result is written once.

Only the ``flash`` backend imports this module, and only when it runs: it needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .base import on, strides_of

BLOCK_ROWS = 16
BLOCK_COLUMNS = 256
NUM_WARPS = 4
MOST = 5  # tensors one launch can move


@triton.jit
def _move(
    source, row_stride, head_stride, target, target_row, rows, live, i, ok, columns, width,
    HEAD_DIM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of one tensor. 64-bit row addresses on both sides."""
    offsets = (columns // HEAD_DIM) * (head_stride * UNIT) + columns % HEAD_DIM
    inside = (columns < width)[None, :]
    tile = tl.load(source + rows[:, None] * (row_stride * UNIT) + offsets[None, :], mask=live[:, None] & inside, other=0.0)
    tl.store(target + i.to(tl.int64)[:, None] * (target_row * UNIT) + columns[None, :], tile, mask=ok[:, None] & inside)


@triton.jit(do_not_specialize=["num_rows", "stats_head", "stats_row"])  # they change with every batch
def move_rows(
    a, b, c, d, e, to_a, to_b, to_c, to_d, to_e, stats, to_stats, index,
    a_row, a_head, b_row, b_head, c_row, c_head, d_row, d_head, e_row, e_head, to_row, stats_head, stats_row,
    num_rows, heads,
    COUNT: tl.constexpr, HAS_STATS: tl.constexpr, HEAD_DIM: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """``to_x[i] = x[index[i]]`` for the first ``COUNT`` of five ``(rows, H, D)`` tensors, and the same for ``(H, rows)`` stats.

    A program moves a block of rows times a block of the ``H * D`` columns; the last program of a block of rows the stats.
    Strides are counted in ``UNIT`` elements: that they are multiples of 8 then stands in the code, and with it that 16 bytes
    can be moved at a time.
    """
    part = tl.program_id(1)
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = i < num_rows
    rows = tl.load(index + i, mask=ok, other=-1).to(tl.int64)
    live = rows >= 0
    width = heads * HEAD_DIM
    columns = part * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    if part * BLOCK_COLUMNS < width:
        _move(a, a_row, a_head, to_a, to_row, rows, live, i, ok, columns, width, HEAD_DIM, UNIT)
        if COUNT > 1:
            _move(b, b_row, b_head, to_b, to_row, rows, live, i, ok, columns, width, HEAD_DIM, UNIT)
        if COUNT > 2:
            _move(c, c_row, c_head, to_c, to_row, rows, live, i, ok, columns, width, HEAD_DIM, UNIT)
        if COUNT > 3:
            _move(d, d_row, d_head, to_d, to_row, rows, live, i, ok, columns, width, HEAD_DIM, UNIT)
        if COUNT > 4:
            _move(e, e_row, e_head, to_e, to_row, rows, live, i, ok, columns, width, HEAD_DIM, UNIT)
    elif HAS_STATS:
        source = stats + rows * stats_row
        target = to_stats + i
        for _ in range(0, heads):
            tl.store(target, tl.load(source, mask=live, other=0.0), mask=ok)
            source += stats_head
            target += num_rows


def move(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    index: torch.Tensor,
    stats: torch.Tensor | None = None,
    to_stats: torch.Tensor | None = None,
) -> None:
    """Fills every target with the rows of its source, ``targets[n][i] = sources[n][index[i]]``, or 0 where ``index[i] < 0``.

    Args:
        sources: 1 to 5 tensors ``(rows, H, D)`` of one dtype, any strides with a contiguous last dimension.
        targets: as many ``(N, H, D)``, with one row stride and each row contiguous.
        index: int32 ``(N,)``. stats: ``(H, rows)``, any strides. to_stats: ``(H, N)``, contiguous.
    """
    count = len(sources)
    num_rows, heads, head_dim = targets[0].shape
    pad = [sources[0]] * (MOST - count), [targets[0]] * (MOST - count)  # never read, never written
    strides = [*strides_of(*sources, *pad[0]), targets[0].stride(0)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    has_stats = stats is not None
    if not has_stats:
        stats = to_stats = index
    columns = min(BLOCK_COLUMNS, triton.next_power_of_2(heads * head_dim))
    grid = triton.cdiv(num_rows, BLOCK_ROWS), triton.cdiv(heads * head_dim, columns) + has_stats
    with on(index.device):
        move_rows[grid](
            *sources, *pad[0], *targets, *pad[1], stats, to_stats, index,
            *(stride // unit for stride in strides), *(stats.stride() if has_stats else (0, 0)),
            num_rows, heads,
            COUNT=count, HAS_STATS=has_stats, HEAD_DIM=head_dim, UNIT=unit,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=columns, num_warps=NUM_WARPS,
        )  # fmt: skip
