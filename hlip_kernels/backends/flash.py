"""Delegates to the best varlen flash attention that can be imported (:mod:`.flash_implementations`): for long segments.

Such kernels take the rows of each segment side by side. Where they lie so already, as with no prefix rows or with one segment
alone, q, k and v are used where they are. Else one launch gathers them and one scatters what comes back
(:mod:`.flash_rows`); the backward pass gathers again, since nothing is kept between the two. docs/flash.md counts the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..kept import keep, to_device
from ..pattern import K_PATCHES, K_PREFIXES, Q_PATCH, Q_PATCHES, Q_PREFIX, Q_PREFIXES, Plan
from .base import Backend, Query, Support, aligned, on
from .determinism import wants_same_bits
from .flash_implementations import MAX_HEAD_DIM, Implementation, best_first
from .triton import installed

MAX_SEGMENTS = 65535  # the kernels count them in the second dimension of a grid


@dataclass(frozen=True)
class Segments:
    """Where varlen attention finds the rows of a plan.

    Attributes:
        cu_seqlens: int32 ``(segments + 1,)``: where each starts, in the order below. Empty segments are left out.
        longest: rows of the longest. total: rows of all.
        in_order: they are the first ``total`` rows of the packed buffer, as they lie there.
        rows: int32 ``(total,)``: the packed row at each place, -1 in the rows of zeros that keep segments apart.
        place: int32 ``(R,)``: where each packed row is, -1 if in no segment; ``None`` if every row is in its place already.
    """

    cu_seqlens: torch.Tensor
    longest: int
    total: int
    in_order: bool
    rows: torch.Tensor
    place: torch.Tensor | None


def segments_of(plan: Plan, device: torch.device, apart: int) -> Segments:
    """The segments of a plan that ``sees_itself``, at least ``apart`` rows apart, made once for each device and kept."""
    return keep(plan.kept, ("flash", device, apart), device, lambda: _make_segments(plan, device, apart))


def _make_segments(plan: Plan, device: torch.device, apart: int) -> Segments:
    lengths = plan.forward[:, Q_PATCHES] + plan.forward[:, Q_PREFIXES]
    live = (lengths > 0) & (plan.forward[:, K_PATCHES] + plan.forward[:, K_PREFIXES] > 0)
    records, lengths = plan.forward[live], lengths[live]
    before = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - np.repeat(before, lengths)
    patch, patches, prefix = (np.repeat(records[:, c], lengths) for c in (Q_PATCH, Q_PATCHES, Q_PREFIX))
    row = np.where(within < patches, patch + within, prefix + within - patches)
    if apart and len(lengths) > 1:  # between two segments, one of zeros
        shift = np.repeat(np.arange(len(lengths)) * apart, lengths)
        lengths = np.insert(lengths, np.arange(1, len(lengths)), apart)
    else:
        shift = 0
    rows = np.full(lengths.sum(), -1)
    rows[np.arange(len(row)) + shift] = row
    place = np.full(plan.num_rows, -1)
    place[row] = np.arange(len(row)) + shift
    in_order = bool((rows == np.arange(len(rows))).all())

    def table(values: np.ndarray) -> torch.Tensor:
        return to_device(values.astype(np.int32), device)

    return Segments(
        cu_seqlens=table(np.concatenate([[0], np.cumsum(lengths)])),
        longest=int(lengths.max(initial=0)),
        total=len(rows),
        in_order=in_order,
        rows=table(rows),
        place=None if in_order and len(rows) == plan.num_rows else table(place),
    )


class FlashBackend(Backend):
    """See the module. ``implementation``: delegates to this one alone, instead of the best there is."""

    name = "flash"
    dtypes = (torch.float16, torch.bfloat16)

    def __init__(self, implementation: Implementation | None = None):
        self.implementations = best_first() if implementation is None else (implementation,)

    def supports(self, query: Query) -> Support:
        why = self._why_not_here(query)
        if why:
            return Support.no(why)
        if query.dtype not in self.dtypes:
            return Support.no(f"takes float16 and bfloat16, got {str(query.dtype).removeprefix('torch.')}")
        if query.head_dim % 8 or query.head_dim > MAX_HEAD_DIM:
            return Support.no(f"takes head dims that are multiples of 8, up to {MAX_HEAD_DIM}, not {query.head_dim}")
        if not query.sees_itself:
            return Support.no("made for segments that see themselves alone: no neighbours, no summary")
        if query.lse_gradient:
            return Support.no("flash attention takes no gradient of lse")
        if self.implementation(query) is None:
            return Support.no("; ".join(f"{name}: {why}" for name, why in self.reasons(query)))
        return Support.yes()

    def _why_not_here(self, query: Query) -> str:
        if query.device_type != "cuda" or query.capability is None:
            return "needs an NVIDIA GPU"
        if query.capability < (8, 0):
            return f"needs compute capability 8.0, this GPU has {query.capability[0]}.{query.capability[1]}"
        return "" if installed() else "triton is not installed, which gathers the rows"

    def implementation(self, query: Query) -> Implementation | None:
        """The first that can do both passes, the backward one with the same bits every run if that is asked for.

        A query does not know whether gradients will be wanted. So the backward pass counts always, or the same call could
        fail in training alone. ``torch.use_deterministic_algorithms`` asks for the same bits too.
        """
        for implementation in self.implementations:
            if not self._why_not(implementation, query):
                return implementation
        return None

    def reasons(self, query: Query) -> list[tuple[str, str]]:
        """Each implementation, and why it cannot run the query; empty if it can."""
        return [(implementation.name, self._why_not(implementation, query)) for implementation in self.implementations]

    @staticmethod
    def _why_not(implementation: Implementation, query: Query) -> str:
        most = (MAX_SEGMENTS + 1) // 2 if implementation.reads_beyond else MAX_SEGMENTS  # rows of zeros are segments too
        if query.segments is not None and query.segments > most:
            return f"takes up to {most} segments, got {query.segments}"
        return implementation.why_not(query.capability, query.head_dim, wants_same_bits(query.numerics))

    def forward(self, q, k, v, plan, scale, numerics):
        implementation = self.implementation(Query.of(q, plan, numerics))
        segments = segments_of(plan, q.device, implementation.reads_beyond)
        lse_shape, made = (q.shape[1], q.shape[0]), {"dtype": torch.float32, "device": q.device}
        if not segments.total:
            return torch.zeros(q.shape, dtype=q.dtype, device=q.device), torch.zeros(lse_shape, **made)
        q, k, v = _gather([q, k, v], segments)
        with on(q.device):
            out, packed_lse = implementation.forward(q, k, v, segments.cu_seqlens, segments.longest, scale)
        if segments.place is None:
            return out.contiguous(), packed_lse.contiguous()
        lse = torch.empty(lse_shape, **made)
        (out,) = _scatter([out], segments, packed_lse, lse)
        return out, lse

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        implementation = self.implementation(Query.of(q, plan, numerics))
        segments = segments_of(plan, q.device, implementation.reads_beyond)
        if not segments.total:
            return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        if segments.in_order:
            packed_lse = lse[:, : segments.total].contiguous()
        else:
            packed_lse = torch.empty((lse.shape[0], segments.total), dtype=lse.dtype, device=lse.device)
        q, k, v, grad_out, out = _gather([q, k, v, grad_out, out], segments, lse, packed_lse)
        with on(q.device):
            grads = implementation.backward(
                grad_out, q, k, v, out, packed_lse, segments.cu_seqlens, segments.longest, scale, wants_same_bits(numerics)
            )
        return tuple(g.contiguous() for g in grads) if segments.place is None else _scatter(grads, segments)


def _gather(tensors: list[torch.Tensor], segments: Segments, lse=None, packed_lse=None) -> list[torch.Tensor]:
    """The rows of the segments side by side: views where they lie so, else moved into one buffer, with those of lse."""
    if segments.in_order:
        return [aligned(x[: segments.total]) for x in tensors]
    from . import flash_rows

    first = tensors[0]
    buffer = torch.empty((segments.total, len(tensors), *first.shape[1:]), dtype=first.dtype, device=first.device)
    packed = list(buffer.unbind(1))
    flash_rows.move(tensors, packed, segments.rows, lse, packed_lse)
    return packed


def _scatter(tensors, segments: Segments, packed_lse=None, lse=None) -> tuple[torch.Tensor, ...]:
    """Rows side by side back into packed ones ``(R, H, D)``, rows in no segment 0."""
    from . import flash_rows

    shape = (len(segments.place), *tensors[0].shape[1:])
    moved = tuple(torch.empty(shape, dtype=x.dtype, device=x.device) for x in tensors)
    flash_rows.move(tensors, moved, segments.place, packed_lse, lse)
    return moved
