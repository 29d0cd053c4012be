"""Block-sparse hierarchical attention over packed rows: the public function and the ``hlip::attention`` op under it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..backends import Query, choose, reference
from ..backends.base import Numerics, stats_dtype
from ..layout import Layout
from ..pattern import Plan
from .checks import check_layout, check_op_lse, check_op_rows, check_rows, check_scale, refuse_tangents


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    level: str,
    *,
    scale: float | None = None,
    neighbours: int = 0,
    summary: str | None = None,
    backend: str = "auto",
    deterministic: bool = True,
    allow_tf32: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention inside every segment of one level of a packed, ragged batch.

    Each segment's queries (its patch rows and its ``P`` prefix rows) attend to the rows of the same segment; nothing is
    padded, concatenated or copied. The attention of HLIP (arXiv 2505.21862) at one level of its hierarchy.

    Args:
        q, k, v: ``(R, H, D)``, same shape, dtype and device, ``R = layout.num_rows``. Any strides with a contiguous last
            dimension: views of one packed ``(R, 3, H, D)`` projection are used where they are. float16, bfloat16,
            float32; float64 on the ``reference`` and ``sdpa`` backends. Under ``torch.autocast`` of their device all but
            float64 are cast to its dtype first, as ``scaled_dot_product_attention`` casts them, and need not share one.
        layout: the ragged shape, on the same device. That of another batch which happens to have as many rows cannot be told
            from the right one: rows would attend across its borders, without an error.
        level: the name of the level to attend at.
        scale: multiplies the logits; a finite number, default ``D ** -0.5``. For a learned one, multiply ``q`` by it.
        neighbours: also see the patch and prefix rows of this many segments before and after, inside the same parent.
        summary: a coarser level; also see the prefix rows of every sibling inside the same segment of that level.
        backend: ``"auto"``, or one of ``hlip_kernels.backends.BACKENDS``; a named one never falls back.
        deterministic: same inputs, same bits, every run. ``False`` allows a backward pass whose sums depend on timing,
            where a backend has a faster one.
        allow_tf32: float32 inputs may be multiplied in TF32 (10 bits of mantissa) where tensor or matrix cores do that
            faster; errors grow to those of float16. No effect on other dtypes.
        return_lse: also return the natural log-sum-exp of the scaled logits.

    Returns:
        out ``(R, H, D)`` in the dtype of ``v`` (as cast under autocast), contiguous. With ``return_lse`` also lse
        ``(H, R)``, float32 (float64 for float64 input). Rows outside every segment are 0 in both. Both are differentiable:
        any number of times on ``reference``, once on the others.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device, stride, level or option, naming the argument.
        NotImplementedError: the named backend cannot run this; the message lists every backend and its reason. Or an input
            carries a tangent of forward-mode differentiation, which only ``reference`` can follow.
    """
    check_layout(layout, q, "q")
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_rows(layout, t, name, ndim=3)
    q, k, v = _autocast(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(-1) != 1 and t.shape[-1] != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension (head dim); call .contiguous() on it")
        if t.shape != q.shape:
            raise ValueError(
                f"q, k and v must have one shape (R, H, D): {name} differs from q in its number of heads or head dim"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device: q is {q.dtype} on {q.device}, {name} is {t.dtype} on {t.device}"
            )
    if q.dtype not in reference.DTYPES:
        raise ValueError(f"q, k and v must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if q.shape[-1] == 0:
        raise ValueError("q, k and v must have a head dim of 1 or more, got 0")
    scale = q.shape[-1] ** -0.5 if scale is None else check_scale(scale)
    plain = backend == "reference" and not torch.compiler.is_compiling()
    if not plain:
        refuse_tangents("attention", 'only backend="reference", not compiled, can be differentiated forward', q, k, v)
    pattern = layout.pattern(level, neighbours=neighbours, summary=summary)
    if backend != "auto" and not torch.compiler.is_compiling():
        numerics = Numerics(deterministic, allow_tf32)
        choose(Query.of(q, Plan.of(pattern), numerics), backend)  # says no before the graph is built, with the reasons
    if plain:
        with _as_written(q.device):
            out, lse = reference.attention(q, k, v, Plan.of(pattern), scale)  # plain autograd, any number of times
    else:
        out, lse = torch.ops.hlip.attention(q, k, v, pattern, scale, backend, deterministic, allow_tf32)
    return (out, lse) if return_lse else out


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Of ``torch.autocast`` on this device, ``None`` where it is off."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)  # an error for meta, which has none
    return torch.get_autocast_dtype(device.type) if on else None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast, all but float64: torch's rule for ``scaled_dot_product_attention``."""
    dtype = _autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _as_written(device: torch.device) -> AbstractContextManager:
    """Without autocast: what a backend computes in float32 with torch's own products stays float32."""
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


@torch.library.custom_op("hlip::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Tensor, scale: float, backend: str,
    deterministic: bool = True, allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = Plan.of(pattern)
    check_op_rows(plan.num_rows, q, k, v)
    if q.numel() == 0:
        return _empty_outputs(q)
    numerics = Numerics(deterministic, allow_tf32)
    with _as_written(q.device):
        return choose(Query.of(q, plan, numerics), backend).forward(q, k, v, plan, scale, numerics)


@_attention.register_fake
def _(q, k, v, pattern, scale, backend, deterministic=True, allow_tf32=False):
    return _empty_outputs(q)


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=stats_dtype(q.dtype))


@torch.library.custom_op("hlip::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Tensor,
    scale: float,
    backend: str,
    deterministic: bool = True,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_out.stride(-1) != 1:  # an expanded gradient, from .sum() say
        grad_out = grad_out.contiguous()
    plan = Plan.of(pattern)
    check_op_rows(plan.num_rows, q, k, v, out, grad_out)
    check_op_lse(q, lse, grad_lse)
    if q.numel() == 0:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    numerics = Numerics(deterministic, allow_tf32)
    chosen = choose(Query.of(q, plan, numerics, lse_gradient=grad_lse is not None), backend)
    with _as_written(q.device):
        return chosen.backward(grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics)


@_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, out, lse, pattern, scale, backend, deterministic=True, allow_tf32=False):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, pattern, *ctx.options = inputs  # scale, backend, deterministic, allow_tf32
    ctx.save_for_backward(q, k, v, *output, pattern)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, pattern = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv = torch.ops.hlip.attention_backward(grad_out, grad_lse, q, k, v, out, lse, pattern, *ctx.options)
    return dq, dk, dv, *(None,) * 5


_attention.register_autograd(_backward, setup_context=_setup)
