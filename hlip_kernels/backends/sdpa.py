"""torch's own fused attention over groups of segments of equal length: no padding, any device.

Records are grouped by (query length, key length); each group's rows are gathered into ``(n, H, L, D)`` and attended in one
call. A group whose rows already lie one after the other is used where it is, without a copy, or if its patch rows and its
prefix rows each do, as in a rectangular batch, joined from the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..pattern import K_PATCH, K_PATCHES, K_PREFIX, K_PREFIXES, Q_PATCH, Q_PATCHES, Q_PREFIX, Q_PREFIXES, Plan
from .base import Backend, Query, Support, stats_dtype

aten = torch.ops.aten


@dataclass(frozen=True)
class Rows:
    """The rows of ``n`` segments of ``length`` rows, each its patch rows and then its prefix rows.

    Attributes:
        index: int64 ``(n * length,)``: all of them.
        runs: where they lie, if the patch rows of the segments follow one another and so do their prefix rows: per run its
            first row and the rows it gives to each segment. One run is a view, two are concatenated, without the index.
    """

    n: int
    length: int
    index: torch.Tensor
    runs: tuple[tuple[int, int], ...] = ()

    def _parts(self, x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """Views of the runs in ``x``, dimension ``dim`` unflattened into (n, rows of each)."""
        return [x.narrow(dim, start, self.n * each).unflatten(dim, (self.n, each)) for start, each in self.runs]

    def _take(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        if not self.runs:
            return x.index_select(dim, self.index).unflatten(dim, (self.n, self.length))
        parts = self._parts(x, dim)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim + 1)

    def _put(self, x: torch.Tensor, values: torch.Tensor, dim: int) -> None:
        if not self.runs:
            x.index_copy_(dim, self.index, values.flatten(dim, dim + 1).to(x.dtype))
            return
        sizes = [each for _, each in self.runs]
        for part, value in zip(self._parts(x, dim), values.split(sizes, dim + 1), strict=True):
            part.copy_(value)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """``(R, H, D)`` -> ``(n, H, length, D)``, a view where possible."""
        return self._take(x, 0).transpose(1, 2)

    def scatter(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """``(n, H, length, D)`` into the rows of ``out`` ``(R, H, D)``."""
        self._put(out, values.transpose(1, 2), 0)

    def add(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Adds to rows that may occur more than once; the order of the additions is fixed on every device."""
        values = values.transpose(1, 2).flatten(0, 1).to(out.dtype)
        if out.device.type == "cpu":
            out.index_add_(0, self.index, values)
        else:
            out.index_put_((self.index,), values, accumulate=True)  # sorts, unlike index_add_, which races

    def gather_lse(self, lse: torch.Tensor) -> torch.Tensor:
        """``(H, R)`` -> ``(n, H, length)``."""
        return self._take(lse, 1).transpose(0, 1)

    def scatter_lse(self, lse: torch.Tensor, values: torch.Tensor) -> None:
        self._put(lse, values.transpose(0, 1), 1)


@dataclass(frozen=True)
class Groups:
    groups: list[tuple[Rows, Rows]]
    dead: torch.Tensor | None  # rows no group writes
    keys_overlap: bool  # a key row is seen by more than one record, or by none


def groups_of(plan: Plan, device: torch.device) -> Groups:
    """The groups of a plan, made once and kept with it."""
    key = ("sdpa", device)
    if key not in plan.kept:
        plan.kept[key] = _make_groups(plan, device)
    return plan.kept[key]


def _make_groups(plan: Plan, device: torch.device) -> Groups:
    records = plan.forward
    lengths = np.stack([records[:, Q_PATCHES] + records[:, Q_PREFIXES], records[:, K_PATCHES] + records[:, K_PREFIXES]], axis=1)
    live = (lengths > 0).all(axis=1)
    groups = []
    seen = np.zeros(plan.num_rows, dtype=np.int64)
    written = np.zeros(plan.num_rows, dtype=bool)
    for nq, nk in np.unique(lengths[live], axis=0):
        chosen = records[live & (lengths == (nq, nk)).all(axis=1)]
        query, query_rows = _make_rows(chosen[:, [Q_PATCH, Q_PATCHES, Q_PREFIX, Q_PREFIXES]], device)
        keys, key_rows = _make_rows(chosen[:, [K_PATCH, K_PATCHES, K_PREFIX, K_PREFIXES]], device)
        written[query_rows] = True
        seen += np.bincount(key_rows, minlength=plan.num_rows)
        groups.append((query, keys))
    dead = np.flatnonzero(~written)
    return Groups(
        groups,
        torch.from_numpy(dead).to(device, non_blocking=True) if len(dead) else None,
        bool((seen[written] != 1).any() or seen[~written].any()),
    )


def _make_rows(ranges: np.ndarray, device: torch.device) -> tuple[Rows, np.ndarray]:
    """From (patch start, patch count, prefix start, prefix count) per record; and the row numbers, int64 on the host."""
    length = int(ranges[0, 1] + ranges[0, 3])
    i = np.arange(length)[None, :]
    patch, patches, prefix, _ = (column[:, None] for column in ranges.T)
    rows = np.where(i < patches, patch + i, prefix + i - patches).astype(np.int64).ravel()
    return Rows(len(ranges), length, torch.from_numpy(rows).to(device, non_blocking=True), _runs(ranges)), rows


def _runs(ranges: np.ndarray) -> tuple[tuple[int, int], ...]:
    """``Rows.runs``, or nothing if the segments' rows do not follow one another."""
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

    def forward(self, q, k, v, plan, scale):
        plan_groups = groups_of(plan, q.device)
        out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), _empty_lse(q)
        _zero(plan_groups, out, lse)
        for query_rows, key_rows in plan_groups.groups:
            group_out, group_lse = _forward(query_rows.gather(q), key_rows.gather(k), key_rows.gather(v), scale)
            query_rows.scatter(out, group_out)
            query_rows.scatter_lse(lse, group_lse)
        return out, lse

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale):
        plan_groups = groups_of(plan, q.device)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _zero(plan_groups, dq)
        if plan_groups.keys_overlap:
            dk = torch.zeros(k.shape, dtype=stats_dtype(k.dtype), device=k.device)
            dv = torch.zeros_like(dk)
        else:
            dk, dv = torch.empty_like(dq), torch.empty_like(dq)
            _zero(plan_groups, dk, dv)
        for query_rows, key_rows in plan_groups.groups:
            gathered = query_rows.gather(q), key_rows.gather(k), key_rows.gather(v)
            group_lse = query_rows.gather_lse(lse)
            grads = _backward(query_rows.gather(grad_out), *gathered, query_rows.gather(out), group_lse, scale)
            if grad_lse is not None:
                _add_lse_gradient(grads, query_rows.gather_lse(grad_lse), *gathered[:2], group_lse, scale)
            query_rows.scatter(dq, grads[0])
            for into, grad in ((dk, grads[1]), (dv, grads[2])):
                if plan_groups.keys_overlap:
                    key_rows.add(into, grad)
                else:
                    key_rows.scatter(into, grad)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    return torch.empty((q.shape[1], q.shape[0]), dtype=stats_dtype(q.dtype), device=q.device)


def _zero(plan_groups: Groups, x: torch.Tensor, *more: torch.Tensor) -> None:
    """Zeroes the rows no group writes; an ``(H, R)`` lse is recognised by having two dimensions."""
    if plan_groups.dead is not None:
        for t in (x, *more):
            t.index_fill_(0 if t.ndim == 3 else 1, plan_groups.dead, 0)


def _has_fused(q: torch.Tensor) -> str | None:
    """Which of torch's fused kernels returns its log-sum-exp here: ``"cpu"``, ``"efficient"`` (CUDA) or none."""
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        return "efficient"
    return None


def _forward(q, k, v, scale):
    """Dense attention ``(n, H, L, D)`` -> out, lse ``(n, H, Lq)``."""
    fused = _has_fused(q)
    if fused == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=None, scale=scale)
    if fused == "efficient":
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
        return out, lse[..., : q.shape[2]]
    stats = stats_dtype(q.dtype)
    logits = (q.to(stats) @ k.to(stats).transpose(-1, -2)) * scale
    return (torch.softmax(logits, -1) @ v.to(stats)).to(q.dtype), torch.logsumexp(logits, -1)


def _backward(grad_out, q, k, v, out, lse, scale):
    """Gradients of :func:`_forward`'s first output."""
    fused = _has_fused(q)
    if fused == "cpu":
        return list(
            aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out, q, k, v, out, lse.contiguous(), 0.0, False, attn_mask=None, scale=scale
            )
        )
    if fused == "efficient":
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is not there
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, None, out, padded, seed, seed, 0.0, [True, True, True, False], False, scale=scale
        )
        return list(grads[:3])
    stats = stats_dtype(q.dtype)
    grad_out, q, k, v, out = (t.to(stats) for t in (grad_out, q, k, v, out))
    p = torch.exp((q @ k.transpose(-1, -2)) * scale - lse[..., None])
    dp = grad_out @ v.transpose(-1, -2)
    ds = p * (dp - (grad_out * out).sum(-1, keepdim=True)) * scale
    return [ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out]


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
