"""Plain torch, one dense softmax per record: the definition the other backends are tested against."""

from __future__ import annotations

import torch

from ..pattern import Plan
from .base import Backend, Query, Support, stats_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that attention is defined for


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q k^T) v`` record by record, differentiable by autograd any number of times.

    Args:
        q, k, v: ``(R, H, D)``, one of :data:`DTYPES`; computed in float32, or float64 for float64 input.
        plan: which rows see which.
        scale: multiplies the logits.

    Returns:
        out ``(R, H, D)`` in the input dtype and lse ``(H, R)``; both 0 on rows outside every record.
    """
    stats = stats_dtype(q.dtype)
    outs, lses, rows = [], [], []
    for query_rows, key_rows in record_rows(plan, q.device):
        q_HLD = q[query_rows].to(stats).transpose(0, 1)
        k_HLD = k[key_rows].to(stats).transpose(0, 1)
        v_HLD = v[key_rows].to(stats).transpose(0, 1)
        logits = (q_HLD @ k_HLD.transpose(1, 2)) * scale
        lses.append(torch.logsumexp(logits, dim=-1))
        outs.append((torch.softmax(logits, dim=-1) @ v_HLD).transpose(0, 1))
        rows.append(query_rows)
    out = q.new_zeros(q.shape)
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=stats)
    if not rows:
        nothing = (q + k + v)[:0].sum()  # an empty sum: keeps the graph connected, gradients are zeros
        return out + nothing, lse + nothing.to(stats)
    index = torch.cat(rows)
    return out.index_copy(0, index, torch.cat(outs).to(q.dtype)), lse.index_copy(1, index, torch.cat(lses, dim=1))


def record_rows(plan: Plan, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``(query rows, key rows)`` as int64 indices, one pair for every record that has both."""
    pairs = []
    for q0, nq, qp0, nqp, k0, nk, kp0, nkp in plan.forward.tolist():
        if nq + nqp and nk + nkp:
            query = torch.cat([torch.arange(q0, q0 + nq), torch.arange(qp0, qp0 + nqp)])
            key = torch.cat([torch.arange(k0, k0 + nk), torch.arange(kp0, kp0 + nkp)])
            pairs.append((query.to(device), key.to(device)))
    return pairs


class ReferenceBackend(Backend):
    name = "reference"

    def supports(self, query: Query) -> Support:
        if query.dtype not in DTYPES:
            return Support.no(f"needs float16, bfloat16, float32 or float64, got {query.dtype}")
        return Support.yes()

    def forward(self, q, k, v, plan, scale, numerics):
        return attention(q, k, v, plan, scale)

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        stats = stats_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(t.shape, dtype=stats, device=t.device) for t in (q, k, v))
        for query_rows, key_rows in record_rows(plan, q.device):
            q_HLD, o_HLD, do_HLD = (t[query_rows].to(stats).transpose(0, 1) for t in (q, out, grad_out))
            k_HLD, v_HLD = (t[key_rows].to(stats).transpose(0, 1) for t in (k, v))
            p = torch.softmax((q_HLD @ k_HLD.transpose(1, 2)) * scale, dim=-1)
            dp = do_HLD @ v_HLD.transpose(1, 2) - (do_HLD * o_HLD).sum(-1, keepdim=True)
            if grad_lse is not None:
                dp = dp + grad_lse[:, query_rows, None].to(stats)
            ds = p * dp * scale
            dq[query_rows] += (ds @ k_HLD).transpose(0, 1)
            dk[key_rows] += (ds.transpose(1, 2) @ q_HLD).transpose(0, 1)
            dv[key_rows] += (p.transpose(1, 2) @ do_HLD).transpose(0, 1)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
