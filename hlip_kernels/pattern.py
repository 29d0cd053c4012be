"""Which rows attend to which: a pattern as a small table of row ranges, and the tiles a kernel runs for it.

A pattern is block-sparse at segment granularity. Every segment's queries see one contiguous range of patch rows and one
contiguous range of prefix rows, whatever the pattern:

===========================  =============================  ==============================
pattern                      patch rows seen                prefix rows seen
===========================  =============================  ==============================
level                        the segment's own              the segment's own
``neighbours=n``             of the n segments before and   of the same segments
                             after, same parent
``summary="study"``          as above                       of every sibling in that study
===========================  =============================  ==============================

so a record is eight numbers, and a kernel that sees only records pays nothing for the hierarchy:

    query patches (start, count), query prefixes (start, count), key patches (start, count), key prefixes (start, count)

The table is an int32 CPU tensor ``(1 + N + M, 8)``: a header ``[N, M, R, 0, ...]``, ``N`` forward records, then ``M``
transposed ones in which the first four numbers are *key* rows and the last four the *query* rows that see them. ``M == 0``
means the pattern is its own transpose. Being a tensor, it passes through ``torch.library`` ops and ``torch.compile`` with
lengths that change from batch to batch; everything derived from it is made once and kept by :class:`Plan`.
"""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from .compiling import any_length
from .kept import from_array, keep, to_device
from .layout_input import is_int

if TYPE_CHECKING:
    from .layout import Layout

Q_PATCH, Q_PATCHES, Q_PREFIX, Q_PREFIXES, K_PATCH, K_PATCHES, K_PREFIX, K_PREFIXES = range(8)


def pattern_table(layout: Layout, level: str, neighbours: int, summary: str | None) -> torch.Tensor:
    """Builds the table of one pattern of ``layout``. Users call :meth:`Layout.pattern`, which keeps the result.

    Raises:
        ValueError: ``neighbours`` negative or used on the coarsest level (there is no parent to stay inside), ``summary``
            not coarser than ``level``, or used without prefix rows.
    """
    index = layout.index(level)
    if not is_int(neighbours) or neighbours < 0:
        raise ValueError(f"neighbours must be an int >= 0, got {neighbours!r}")
    num = layout.num_segments(level)
    own = np.arange(num)
    first, last = own, own + 1  # the segments whose patches are seen
    if neighbours:
        if index + 1 == len(layout.levels):
            raise ValueError(
                f"neighbours={neighbours} needs a level above {level!r} whose segments the neighbours share; "
                f"{level!r} is the coarsest of {layout.levels}"
            )
        neighbours = min(neighbours, num)
        lo, hi = _siblings(layout, level, layout.levels[index + 1])
        first, last = np.maximum(own - neighbours, lo), np.minimum(own + neighbours + 1, hi)
    summary_first, summary_last = first, last  # the segments whose prefixes are seen
    if summary is not None:
        if layout.index(summary) <= index:
            raise ValueError(f"summary={summary!r} must be a coarser level than {level!r} (finest first: {layout.levels})")
        if layout.num_prefix == 0:
            raise ValueError("summary shares prefix rows among siblings, but this layout has num_prefix=0")
        summary_first, summary_last = _siblings(layout, level, summary)

    forward = _records(layout, level, (own, own + 1), (own, own + 1), (first, last), (summary_first, summary_last))
    dead = layout.prefix_rows(level).stop
    if dead < layout.num_rows:  # rows outside every segment: one record that sees nothing, so that they come back 0
        forward = np.concatenate([forward, [[dead, layout.num_rows - dead, 0, 0, 0, 0, 0, 0]]])

    transposed = np.empty((0, 8), dtype=np.int64)
    if summary is not None:
        # Patches of s are seen by the segments that list s as a neighbour (a symmetric relation); prefixes by everybody
        # in the same summary segment, so those are taken together.
        nothing = (own, own)
        patches = _records(layout, level, (own, own + 1), nothing, (first, last), (first, last))
        groups = layout.host_children(level, summary)
        lo, hi = groups[:-1], groups[1:]
        prefixes = _records(layout, level, (lo, lo), (lo, hi), (lo, hi), (lo, hi))
        transposed = np.concatenate([patches, prefixes, forward[num:]])

    header = np.zeros((1, 8), dtype=np.int64)
    header[0, :3] = len(forward), len(transposed), layout.num_rows
    return any_length(from_array(np.concatenate([header, forward, transposed]).astype(np.int32)))


def _siblings(layout: Layout, level: str, parent: str) -> tuple[np.ndarray, np.ndarray]:
    """For every segment of ``level``: the first and one past the last segment with the same ``parent``."""
    children = layout.host_children(level, parent)
    counts = np.diff(children)
    return np.repeat(children[:-1], counts), np.repeat(children[1:], counts)


def _records(layout: Layout, level: str, q_patch, q_prefix, k_patch, k_prefix) -> np.ndarray:
    """Segment ranges -> row ranges. Each argument is ``(first, last)``: segments ``[first, last)`` of ``level``."""
    offsets, T, P = layout.host_offsets(level), layout.num_tokens, layout.num_prefix
    columns = []
    for patch, prefix in ((q_patch, q_prefix), (k_patch, k_prefix)):
        columns += [offsets[patch[0]], offsets[patch[1]] - offsets[patch[0]]]
        columns += [T + prefix[0] * P, (prefix[1] - prefix[0]) * P]
    return np.stack(columns, axis=1).astype(np.int64)


class Plan:
    """What is derived from a pattern table and kept: its records, and per block size and device the tiles to launch.

    The layout that made the table owns its plan, and :meth:`of` finds it again from the table that an op was given, so
    all layers, and forward and backward, share one. A table that no plan is alive for (it came out of ``torch.export``,
    say) gets a new one, made from its contents.
    """

    _alive: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()

    def __init__(self, table: torch.Tensor):
        _check_table(table)
        self.table = table
        rows = table.numpy().astype(np.int64)
        num_forward, num_transposed, self.num_rows = (int(n) for n in rows[0, :3])
        self.forward = rows[1 : 1 + num_forward]
        self.transposed = rows[1 + num_forward : 1 + num_forward + num_transposed] if num_transposed else self.forward
        self.symmetric = num_transposed == 0
        self._tiles: dict = {}
        self.kept: dict = {}  # for backends that derive something of their own (group indices, say)
        Plan._alive[table.data_ptr()] = self

    @classmethod
    def of(cls, table: torch.Tensor) -> Plan:
        """The plan of a table. Plans own their table, so an equal address means the same table."""
        plan = cls._alive.get(table.data_ptr())
        if plan is None or plan.table.shape != table.shape:
            plan = cls(table)
            _check_records(plan)
        return plan

    @cached_property
    def longest(self) -> int:
        """The most rows one record sees."""
        return int((self.forward[:, K_PATCHES] + self.forward[:, K_PREFIXES]).max(initial=0))

    @cached_property
    def sees_itself(self) -> bool:
        """Whether every segment sees itself and nothing else, as in the level patterns."""
        alive = self.forward[:, K_PATCHES] + self.forward[:, K_PREFIXES] > 0
        return self.symmetric and bool((self.forward[alive, :4] == self.forward[alive, 4:]).all())

    def tiles(self, block: int, device: torch.device, *, transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The tiles of ``block`` rows that cover every record, those with the most work first.

        Returns:
            ``tiles`` int32 ``(num_tiles, 2)``: record and first row inside it; ``records`` int32 ``(num_records, 8)``;
            both on ``device``. A tile is real work: there are none for empty segments.
        """
        transposed = transposed and not self.symmetric
        made = keep(self._tiles, (block, device, transposed), device, lambda: self._make_tiles(block, device, transposed))
        return made, self._records_on(device, transposed)

    def _make_tiles(self, block: int, device: torch.device, transposed: bool) -> torch.Tensor:
        records = self.transposed if transposed else self.forward
        lengths = records[:, Q_PATCHES] + records[:, Q_PREFIXES]
        counts = -(-lengths // block)
        of_record = np.repeat(np.arange(len(records)), counts)
        start = (np.arange(len(of_record)) - np.repeat(np.cumsum(counts) - counts, counts)) * block
        work = (records[:, K_PATCHES] + records[:, K_PREFIXES])[of_record]
        order = np.argsort(-work, kind="stable")
        return to_device(np.stack([of_record, start], axis=1)[order].astype(np.int32), device)

    def _records_on(self, device: torch.device, transposed: bool) -> torch.Tensor:
        records = self.transposed if transposed else self.forward
        return keep(self._tiles, ("records", device, transposed), device, lambda: to_device(records.astype(np.int32), device))

    def dense_mask(self) -> torch.Tensor:
        """Boolean ``(R, R)`` on the CPU: row ``i`` may attend to row ``j``."""
        mask = torch.zeros(self.num_rows, self.num_rows, dtype=torch.bool)
        for r in self.forward.tolist():
            for q, nq in ((r[0], r[1]), (r[2], r[3])):
                for k, nk in ((r[4], r[5]), (r[6], r[7])):
                    mask[q : q + nq, k : k + nk] = True
        return mask


def _check_table(table: torch.Tensor) -> None:
    ok = table.device.type == "cpu" and table.dtype == torch.int32 and table.ndim == 2 and table.shape[1] == 8
    if not ok or not table.is_contiguous() or len(table) == 0:
        raise ValueError(
            "a pattern is the contiguous int32 CPU table (1 + records, 8) made by Layout.pattern(); got "
            f"{table.dtype} {tuple(table.shape)} on {table.device}"
        )
    header = table[0, :2].tolist()
    if min(header) < 0 or 1 + sum(header) != len(table):
        raise ValueError(f"broken pattern table: its header names {header} records, it holds {len(table) - 1}")


def _check_records(plan: Plan) -> None:
    """A table that no layout made: its ranges lie inside the rows that its header names."""
    for records in (plan.forward, plan.transposed):
        first, count = records[:, 0::2], records[:, 1::2]
        if min(first.min(initial=0), count.min(initial=0)) < 0 or (first + count).max(initial=0) > plan.num_rows:
            raise ValueError(f"broken pattern table: it names rows beyond the {plan.num_rows} of its header")
