"""torch's own fused attention over groups of segments of equal length: no padding, on CPUs and GPUs.

Records are grouped by (query length, key length). All rows are gathered once, in the order of the groups, and each group is
attended in one call on a view ``(n, H, L, D)``. Rows that lie in that order already are used where they are; in a
rectangular batch, where the patch rows and the prefix rows of the one group each lie together, the two are joined.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from ..kept import keep, to_device
from ..pattern import K_PATCH, K_PATCHES, K_PREFIX, K_PREFIXES, Q_PATCH, Q_PATCHES, Q_PREFIX, Q_PREFIXES, Plan
from .base import Backend, Query, Support, aligned, stats_dtype
from .determinism import deterministic_algorithms, wants_same_bits

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """The query rows or the key rows of all groups, group after group: ``N`` rows out of ``R``.

    Attributes:
        shapes: (segments, rows of each) per group.
        index: int64 ``(N,)``: the rows; in each segment its patch rows and then its prefix rows.
        place: int64 ``(R,)``: where each row is in that order; ``N`` for a row that is in none of the groups.
        dead: the rows that are in none; ``None`` if there are none.
        runs: where they lie if there is no need to gather: first row, and rows given to each segment of the (then only)
            group. One run is a view, two are concatenated.
    """

    shapes: list[tuple[int, int]]
    index: torch.Tensor
    place: torch.Tensor
    dead: torch.Tensor | None
    runs: tuple[tuple[int, int], ...] = ()

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``(R, H, D)`` -> ``(n, H, length, D)`` per group; an lse ``(H, R)`` -> ``(n, H, length)``."""
        dim = 0 if x.ndim == 3 else 1
        if not self.runs:
            return self._groups(x.index_select(dim, self.index))
        parts = self._parts(x, dim)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim + 1)
        return [joined.transpose(1, 2) if dim == 0 else joined.transpose(0, 1)]

    def scatter(self, values: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The opposite of :meth:`gather`, rows outside the groups 0; each row must be in one group at most."""
        first = values[0]
        dim, tail = (0, (first.shape[1], first.shape[3])) if first.ndim == 4 else (1, first.shape[1:2])
        made = {"dtype": dtype, "device": first.device}
        if not self.runs:
            # Through a buffer in the order of the groups and its rows picked: one pass more, but gathering is quick, unlike
            # writing to scattered rows.
            total = len(self.index)
            rows = torch.empty((total + 1, *tail) if dim == 0 else (*tail, total + 1), **made)
            rows.select(dim, total).zero_()
            for view, value in zip(self._groups(rows), values, strict=True):
                view.copy_(value)
            return rows.index_select(dim, self.place)
        out = torch.empty((len(self.place), *tail) if dim == 0 else (*tail, len(self.place)), **made)
        if self.dead is not None:
            out.index_fill_(dim, self.dead, 0)
        sizes = [each for _, each in self.runs]
        for part, value in zip(self._parts(out, dim), first.split(sizes, 2), strict=True):
            part.copy_(value.transpose(1, 2) if dim == 0 else value.transpose(0, 1))
        return out

    def add(self, values: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """As :meth:`scatter`, for rows that may be in several groups; the order of the additions is fixed on every device."""
        rows = torch.cat([v.transpose(1, 2).flatten(0, 1) for v in values]).to(stats_dtype(dtype))
        out = rows.new_zeros((len(self.place), *rows.shape[1:]))
        if out.device.type == "cpu":
            out.index_add_(0, self.index, rows)
        else:
            out.index_put_((self.index,), rows, accumulate=True)  # sorts, unlike index_add_, which races
        return out.to(dtype)

    def _parts(self, x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Views of the runs in ``x``, dimension ``dim`` unflattened into (segments, rows of each)."""
        n = self.shapes[0][0]
        return [x.narrow(dim, start, n * each).unflatten(dim, (n, each)) for start, each in self.runs]

    def _groups(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """A fresh ``(N, H, D)`` or ``(H, N)`` in the order of the index -> a view ``(n, H, length[, D])`` of each group.

        One ``as_strided`` each: where every segment has a length of its own, more would cost what attention does.
        """
        views, start = [], 0
        for n, length in self.shapes:
            if rows.ndim == 3:
                _, heads, dim = rows.shape
                row = heads * dim
                size, strides, offset = (n, heads, length, dim), (length * row, dim, row, 1), start * row
            else:
                heads, total = rows.shape
                size, strides, offset = (n, heads, length), (length, total, 1), start
            views.append(rows.as_strided(size, strides, offset))
            start += n * length
        return views


@dataclass(frozen=True)
class Groups:
    query: Rows
    keys: Rows
    keys_overlap: bool  # a key row is seen by more than one record

    def __bool__(self) -> bool:
        return bool(self.query.shapes)


def groups_of(plan: Plan, device: torch.device) -> Groups:
    """The groups of a plan, made once and kept with it."""
    return keep(plan.kept, ("sdpa", device), device, lambda: _make_groups(plan, device))


def _make_groups(plan: Plan, device: torch.device) -> Groups:
    records = plan.forward
    lengths = np.stack([records[:, Q_PATCHES] + records[:, Q_PREFIXES], records[:, K_PATCHES] + records[:, K_PREFIXES]], axis=1)
    live = (lengths > 0).all(axis=1)
    records, lengths = records[live], lengths[live]
    # Groups in the order of their first records, so that segments all unlike stay in theirs.
    _, first, group_of = np.unique(lengths, axis=0, return_index=True, return_inverse=True)
    groups = [records[group_of.ravel() == g] for g in np.argsort(first)]
    query = _make_rows([g[:, [Q_PATCH, Q_PATCHES, Q_PREFIX, Q_PREFIXES]] for g in groups], plan.num_rows, device)
    keys = _make_rows([g[:, [K_PATCH, K_PATCHES, K_PREFIX, K_PREFIXES]] for g in groups], plan.num_rows, device)
    return Groups(query[0], keys[0], bool((np.bincount(keys[1], minlength=1) > 1).any()))


def _make_rows(groups: list[np.ndarray], num_rows: int, device: torch.device) -> tuple[Rows, np.ndarray]:
    """From (patch start, patch count, prefix start, prefix count) per record of each group; and the rows, on the host."""
    shapes, rows = [], [np.empty(0, dtype=np.int64)]
    for ranges in groups:
        length = int(ranges[0, 1] + ranges[0, 3])
        i = np.arange(length)[None, :]
        patch, patches, prefix, _ = (column[:, None] for column in ranges.T)
        shapes.append((len(ranges), length))
        rows.append(np.where(i < patches, patch + i, prefix + i - patches).ravel())
    index = np.concatenate(rows)
    place = np.full(num_rows, len(index))
    place[index] = np.arange(len(index))
    dead = np.flatnonzero(place == len(index))
    index_table, place_table, dead_table = (to_device(t, device) for t in (index, place, dead))
    runs = _runs(groups[0]) if len(groups) == 1 else ()
    return Rows(shapes, index_table, place_table, dead_table if len(dead) else None, runs), index


def _runs(ranges: np.ndarray) -> tuple[tuple[int, int], ...]:
    """``Rows.runs`` of one group, or nothing if the rows of its segments do not follow one another."""
    runs = []
    for starts, counts in (ranges[:, :2].T, ranges[:, 2:].T):
        if (counts != counts[0]).any():
            return ()
        if counts[0]:
            if (np.diff(starts) != counts[0]).any():
                return ()
            runs.append((int(starts[0]), int(counts[0])))
    if len(runs) == 2 and len(ranges) == 1 and sum(runs[0]) == runs[1][0]:  # the prefixes come right after the patches
        runs = [(runs[0][0], runs[0][1] + runs[1][1])]
    return tuple(runs)


class SdpaBackend(Backend):
    name = "sdpa"

    def supports(self, query: Query) -> Support:
        if query.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            return Support.no(f"no fused attention in torch for {query.dtype}")
        if query.device_type not in ("cpu", "cuda"):
            return Support.no(f"made for cpu and cuda, not {query.device_type}")
        return Support.yes()

    def forward(self, q, k, v, plan, scale, numerics):
        groups = groups_of(plan, q.device)
        if not groups:
            return torch.zeros(q.shape, dtype=q.dtype, device=q.device), _zero_lse(q)
        gathered, fused = (groups.query.gather(q), groups.keys.gather(k), groups.keys.gather(v)), _fused(q)
        outs, lses = zip(*(_forward(fused, *group, scale) for group in zip(*gathered, strict=True)), strict=True)
        return groups.query.scatter(outs, q.dtype), groups.query.scatter(lses, stats_dtype(q.dtype))

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        groups = groups_of(plan, q.device)
        if not groups:
            return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        query, keys = groups.query, groups.keys
        gathered = query.gather(grad_out), query.gather(q), keys.gather(k), keys.gather(v), query.gather(out)
        lses, fused = query.gather(lse), _fused(q)
        # Else torch splits the keys among blocks and adds up dQ in any order. (The other ways have one order anyhow.)
        same_bits = fused == "efficient" and wants_same_bits(numerics)
        with deterministic_algorithms() if same_bits else contextlib.nullcontext():
            grads = [_backward(fused, *group, scale) for group in zip(*gathered, lses, strict=True)]
        if grad_lse is not None:
            for group_grads, *group in zip(grads, query.gather(grad_lse), gathered[1], gathered[2], lses, strict=True):
                _add_lse_gradient(group_grads, *group, scale)
        put = keys.add if groups.keys_overlap else keys.scatter
        dq, dk, dv = zip(*grads, strict=True)
        return query.scatter(dq, q.dtype), put(dk, k.dtype), put(dv, v.dtype)


def _zero_lse(q: torch.Tensor) -> torch.Tensor:
    return torch.zeros((q.shape[1], q.shape[0]), dtype=stats_dtype(q.dtype), device=q.device)


def _fused(q: torch.Tensor) -> str | None:
    """Which of torch's fused kernels takes this and returns its log-sum-exp: ``"cpu"``, ``"efficient"`` (CUDA) or none.

    The memory-efficient kernels take head dims of a multiple of 16 bytes, and bfloat16 from compute capability 8.0 on, as
    ``can_use_mem_efficient_attention`` in torch's sdp_utils.cpp says. They make a float32 product from three of TF32, which
    together keep the bits of float32 (``OpMultiplyAddFastF32``); not on AMD GPUs, whose kernels are others.
    """
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or q.shape[-1] * q.itemsize % 16:
        return None
    if torch.version.hip is not None:
        return None if q.dtype == torch.float32 else "efficient"
    if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return None
    return "efficient"


def _forward(fused, q, k, v, scale):
    """Dense attention ``(n, H, L, D)`` -> out, lse ``(n, H, Lq)``."""
    if fused == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, False, attn_mask=None, scale=scale)
    if fused == "efficient":
        q, k, v = map(aligned, (q, k, v))
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True, 0.0, False, scale=scale)
        return out, lse[..., : q.shape[2]]
    stats = stats_dtype(q.dtype)
    logits = (q.to(stats) @ k.to(stats).transpose(-1, -2)) * scale
    return (torch.softmax(logits, -1) @ v.to(stats)).to(q.dtype), torch.logsumexp(logits, -1)


def _backward(fused, grad_out, q, k, v, out, lse, scale) -> list[torch.Tensor]:
    """Gradients of :func:`_forward`'s first output."""
    if fused == "cpu":
        return list(
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
                grad_out, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=None, scale=scale
            )
        )
    if fused == "efficient":
        grad_out, q, k, v = map(aligned, (grad_out, q, k, v))  # out lies so, and must keep the strides it has
        lse = _statistics(lse)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is not there
        grads = aten._scaled_dot_product_efficient_attention_backward.default(
            grad_out, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], False, scale=scale
        )
        return list(grads[:3])
    stats = stats_dtype(q.dtype)
    grad_out, q, k, v, out = (t.to(stats) for t in (grad_out, q, k, v, out))
    p = torch.exp((q @ k.transpose(-1, -2)) * scale - lse[..., None])
    dp = grad_out @ v.transpose(-1, -2)
    ds = p * (dp - (grad_out * out).sum(-1, keepdim=True)) * scale
    return [ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out]


def _statistics(lse: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp as the memory-efficient backward kernels read it: to a multiple of 32 queries, AMD's as it is."""
    if torch.version.hip is not None:
        return lse.contiguous()  # attention_backward.cu views it as (n * H, L)
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))


def _add_lse_gradient(grads, grad_lse, q, k, lse, scale, chunk_elements: int = 2**24) -> None:
    """Adds d(lse)/dq and d(lse)/dk: ``p = softmax(logits)`` is the gradient of lse by the logits.

    Fused kernels do not take a gradient for their lse, so the probabilities are made again, some queries at a time.
    """
    stats = stats_dtype(q.dtype)
    n, heads, num_keys = q.shape[0], q.shape[1], k.shape[2]
    step = max(1, chunk_elements // max(1, n * heads * num_keys))
    k_stats = k.to(stats)
    dq, dk = grads[0].to(stats), grads[1].to(stats)
    for start in range(0, q.shape[2], step):
        rows = slice(start, start + step)
        q_rows = q[:, :, rows].to(stats)
        ds = (
            torch.exp((q_rows @ k_stats.transpose(-1, -2)) * scale - lse[:, :, rows, None]) * grad_lse[:, :, rows, None] * scale
        )
        dq[:, :, rows] += ds @ k_stats
        dk += ds.transpose(-1, -2) @ q_rows
    grads[0], grads[1] = dq, dk
