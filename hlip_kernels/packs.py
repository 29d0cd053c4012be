"""How the short-segment kernels deal out their work: packs of rows that one thread block holds whole.

A pack is one segment, or several tiny ones in a row, of one pattern in which every segment sees itself and nothing else (the
level patterns). See ``csrc/short_attention/pack.cuh`` for what a block does with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .kept import keep, to_device
from .pattern import K_PATCHES, K_PREFIXES, Q_PATCHES, Q_PREFIXES, Plan

TILE = 16  # rows of a warp; kShort* in csrc/short_attention/arguments.h count in these
PACK_ROWS = 128  # of packs that are shared, by segments of up to half as many; kPackRows there
DEAD_ROWS = 256  # of packs of rows that no segment holds


@dataclass(frozen=True)
class Packs:
    """The tables of one pattern, on a device, and their extent, on the host.

    Attributes:
        packs: int32 ``(blocks, 4)``: first record, records, first row inside the record, rows. Those of one segment
            alone come first, then shared ones, then rows that no segment holds; the largest of each kind first.
        starts: int32 ``(N,)``: where in its pack each record starts.
        records: int32 ``(N, 8)``, those of the plan.
        alone: rows of the packs that hold one segment alone, which come first; on the host.
        rows: of the largest pack, but for those of rows that no segment holds.
    """

    packs: torch.Tensor
    starts: torch.Tensor
    records: torch.Tensor
    alone: np.ndarray
    rows: int


def packs_of(plan: Plan, device: torch.device, pack_rows: int = PACK_ROWS) -> Packs:
    """The packs of a plan, made once for each device and kept with it.

    Args:
        plan: one that ``sees_itself``. device: to put the tables on. pack_rows: the most rows of a shared pack.
    """

    def make() -> Packs:
        packs, starts, *extent = _pack(plan.forward, pack_rows)
        return Packs(*(to_device(t, device) for t in (packs, starts, plan.forward.astype(np.int32))), *extent)

    return keep(plan.kept, ("packs", device, pack_rows), device, make)


def _pack(records: np.ndarray, pack_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(packs, starts, rows of packs of one segment alone, rows of the largest pack)."""
    lengths = records[:, Q_PATCHES] + records[:, Q_PREFIXES]
    live = (records[:, K_PATCHES] + records[:, K_PREFIXES] > 0) & (lengths > 0)
    tiny = live & (lengths <= pack_rows // 2)
    alone = np.flatnonzero(live & ~tiny)
    shared = _share(np.flatnonzero(tiny), lengths, pack_rows)
    made = [np.stack([alone, np.ones_like(alone), np.zeros_like(alone), lengths[alone]], axis=1), shared]
    starts = np.zeros(len(records), dtype=np.int64)
    if len(shared):
        before = np.cumsum(lengths) - lengths
        of_pack = np.repeat(before[shared[:, 0]], shared[:, 1])
        members = np.concatenate([np.arange(first, first + count) for first, count in shared[:, :2]])
        starts[members] = before[members] - of_pack
    packs = np.concatenate([kind[np.argsort(-kind[:, 3], kind="stable")] for kind in made])
    for dead in np.flatnonzero((lengths > 0) & ~live):
        first = np.arange(0, lengths[dead], DEAD_ROWS)
        rows = np.minimum(DEAD_ROWS, lengths[dead] - first)
        packs = np.concatenate([packs, np.stack([np.full_like(first, dead), np.ones_like(first), first, rows], axis=1)])
    live_rows = int(max(lengths[alone].max(initial=0), shared[:, 3].max(initial=0)))
    return packs.astype(np.int32), starts.astype(np.int32), packs[: len(alone), 3], live_rows


def _share(members: np.ndarray, lengths: np.ndarray, pack_rows: int) -> np.ndarray:
    """Packs of neighbouring records, each as full as the next record allows."""
    if len(members) == 0:
        return np.empty((0, 4), dtype=np.int64)
    # Records between two members are not in any pack, so a pack may not reach across one that has rows; empty ones do no harm,
    # but keep to runs of neighbours all the same.
    total = np.concatenate([[0], np.cumsum(lengths[members])])
    run_end = np.concatenate([np.flatnonzero(np.diff(members) != 1) + 1, [len(members)]])
    ends = run_end[np.searchsorted(run_end, np.arange(len(members)), side="right")]
    reach = np.minimum(np.searchsorted(total, total[:-1] + pack_rows, side="right") - 1, ends).tolist()
    packs, at = [], 0
    while at < len(members):
        stop = reach[at]
        packs.append((members[at], stop - at, 0, total[stop] - total[at]))
        at = stop
    return np.array(packs, dtype=np.int64)
