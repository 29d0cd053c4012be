"""Rows of a workload in another order, for the peers that want segments side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .workloads import Workload


def segment_lengths(workload: Workload, level: str) -> np.ndarray:
    """Rows of each segment, prefix rows included."""
    return np.diff(workload.layout.host_offsets(level)) + workload.layout.num_prefix


def equal_lengths(workload: Workload, level: str) -> bool:
    return len(set(segment_lengths(workload, level).tolist())) == 1


def segment_rows(workload: Workload, level: str) -> list[np.ndarray]:
    """The rows of each segment: patch rows, then prefix rows."""
    layout, offsets = workload.layout, workload.layout.host_offsets(level)
    tail, P = layout.num_tokens, layout.num_prefix
    return [
        np.concatenate([np.arange(offsets[s], offsets[s + 1]), np.arange(tail + s * P, tail + (s + 1) * P)])
        for s in range(len(offsets) - 1)
    ]


@dataclass(frozen=True)
class Order:
    """Another order of the packed rows, with segments side by side, and the ways there and back.

    What torch makes of ``x[index]`` by itself is slow in the backward pass: it adds, after sorting or with atomics, where
    rows only move. Here they move in both directions: picked by an index on the way there and by its inverse on the way back
    and, where all segments are equally long, as blocks, without an index.

    Attributes:
        index: int64: the packed row at each place.
        place: int64 ``(R,)``: the place of each packed row; anything for dead rows.
        live: rows that are in a segment, the first ones. rows: ``R``.
        copies: what the places that no row needs hold: ``""`` if there are none; ``"padding"`` nothing of worth, their
            gradients are none; ``"repeated"`` other tokens of the segment, as good as any.
        blocks: where all segments are equally long: how many, patch rows of each, prefix rows of each.
        lengths: rows of each segment. longest: of the longest.
    """

    index: Tensor
    place: Tensor
    live: int
    rows: int
    copies: str
    blocks: tuple[int, int, int] | None
    in_order: bool
    lengths: np.ndarray
    longest: int

    @classmethod
    def of(cls, workload: Workload, level: str, device: torch.device, copies: str = "") -> Order:
        """Segments one after the other, or (``copies``) all made as long as the longest."""
        rows, P = segment_rows(workload, level), workload.layout.num_prefix
        lengths = np.array([len(r) for r in rows])
        longest = int(lengths.max(initial=0))
        if equal_lengths(workload, level):
            copies = ""
        if copies == "padding":
            index = np.stack([np.pad(r, (0, longest - len(r))) for r in rows])
        elif copies == "repeated":
            index = np.stack([_repeated(r, longest, P) for r in rows])
        else:
            index = np.concatenate(rows)
        own = np.ones(index.shape, dtype=bool)
        if copies:
            column, short = np.arange(longest), lengths[:, None]
            own = column < short if copies == "padding" else (column < short - P) | (column >= longest - P)
        place = np.zeros(workload.layout.num_rows, dtype=np.int64)
        place[index[own]] = np.flatnonzero(own)
        index, in_order = index.ravel(), bool((index.ravel() == np.arange(index.size)).all())
        blocks = (len(rows), longest - P, P) if equal_lengths(workload, level) else None
        tables = (torch.from_numpy(t).to(device) for t in (index, place))
        return cls(*tables, int(lengths.sum()), len(place), copies, blocks, in_order, lengths, longest)

    def gather(self, x: Tensor) -> Tensor:
        """Packed rows ``(R, ...)`` -> rows in this order."""
        if self.in_order:
            return x if self.live == self.rows else x[: self.live]
        return _moved(x, self.take, self.put)

    def scatter(self, y: Tensor) -> Tensor:
        """The opposite of :meth:`gather`, copies dropped, dead rows 0."""
        if self.in_order:
            return y if self.live == self.rows else torch.cat([y, y.new_zeros((self.rows - self.live, *y.shape[1:]))])
        return _moved(y, self.put, self.take_gradients)

    def dense(self, x: Tensor) -> Tensor:
        """Packed rows ``(R, H, D)`` -> ``(segments, H, longest, D)``."""
        return self.gather(x).unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)

    def packed(self, y: Tensor) -> Tensor:
        """The opposite of :meth:`dense`."""
        return self.scatter(y.transpose(1, 2).flatten(0, 1))

    def offsets(self) -> Tensor:
        """``cu_seqlens`` on the device of the index, int32."""
        return torch.from_numpy(np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)).to(self.index.device)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """To add to the scores of :meth:`dense` rows; ``None`` if all are equally long.

        Its rows are whole multiples of 16 elements apart, or SDPA would copy it at every call.
        """
        if not self.copies:
            return None
        beyond = np.arange(-(-self.longest // 16) * 16) >= self.lengths[:, None]
        added = torch.from_numpy(np.where(beyond, -np.inf, 0.0)).to(self.index.device, dtype)
        return added[:, None, None, : self.longest]

    def take(self, x: Tensor) -> Tensor:
        """:meth:`gather` without gradients."""
        if self.blocks is None:
            return _pick(x, self.index)
        n, patches, prefix = self.blocks
        parts = x[: n * patches].unflatten(0, (n, patches)), x[n * patches : self.live].unflatten(0, (n, prefix))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def put(self, y: Tensor) -> Tensor:
        """:meth:`scatter` without gradients."""
        if self.blocks is None:
            out = _pick(y, self.place)
        else:
            n, patches, prefix = self.blocks
            out, both = y.new_empty((self.rows, *y.shape[1:])), y.unflatten(0, (n, patches + prefix))
            out[: n * patches].unflatten(0, (n, patches)).copy_(both[:, :patches])
            out[n * patches : self.live].unflatten(0, (n, prefix)).copy_(both[:, patches:])
        out[self.live :] = 0
        return out

    def take_gradients(self, g: Tensor) -> Tensor:
        """:meth:`take`, but nothing for padding."""
        if self.copies != "padding":
            return self.take(g)
        return g.new_zeros((len(self.index), *g.shape[1:])).index_copy_(0, self.place[: self.live], g[: self.live])


def _repeated(rows: np.ndarray, longest: int, prefix: int) -> np.ndarray:
    """A segment made ``longest`` by repeating its patch rows, prefix rows last; row 0 where there is nothing to repeat."""
    patches = rows[: len(rows) - prefix] if len(rows) > prefix else np.zeros(1, dtype=np.int64)
    return np.concatenate([np.resize(patches, longest - prefix), rows[len(rows) - prefix :]])


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x``. On a GPU ``x[index]`` copies 16 bytes at a time, ``index_select`` single elements; on a CPU the latter
    is the faster."""
    return x[index] if x.is_cuda else x.index_select(0, index)


class _Moved(torch.autograd.Function):
    """Rows moved there, and their gradients back."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.back(g), None, None


def _moved(x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return _Moved.apply(x, there, back) if torch.is_grad_enabled() and x.requires_grad else there(x)
