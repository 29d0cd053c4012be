"""Argument checks shared by the ops. Messages name the argument, what was found and what was expected."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.base import stats_dtype
from ..layout import Layout


def check_layout(layout: Layout, x: Tensor, name: str) -> None:
    """``layout`` is a Layout whose index tensors are on the device of ``x``, a tensor."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a hlip_kernels.Layout, got {type(layout).__name__}")
    _check_tensor(x, name)
    if layout.device != x.device:
        raise ValueError(f"{name} is on {x.device} but the layout is on {layout.device}: use layout.to({name}.device)")


def _check_tensor(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_rows(layout: Layout, x: Tensor, name: str, *, ndim: int) -> None:
    """``x`` is a floating packed buffer of this layout: ``ndim`` dimensions, ``layout.num_rows`` first."""
    _check_tensor(x, name)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim != ndim:
        shape = "(R, H, D)" if ndim == 3 else "(R, C)"
        raise ValueError(f"{name} must be packed rows {shape} with {ndim} dimensions, got {x.ndim}")
    if x.shape[0] != layout.num_rows:
        # Under torch.compile a size in the message would become a guard, and each new length a new compilation.
        found = "" if torch.compiler.is_compiling() else f" ({x.shape[0]} rows, the layout has {layout.num_rows})"
        raise ValueError(f"{name} does not belong to this layout: their numbers of rows differ{found}")


def check_op_rows(num_rows: int, q: Tensor, *others: Tensor) -> None:
    """What every kernel behind ``hlip::attention`` relies on, for those who call the op itself with a table of their own."""
    shape, dtype, device = q.shape, q.dtype, q.device
    ok = len(shape) == 3 and shape[0] == num_rows
    any_stride = shape[-1:] == (1,) or 0 in shape  # of one element or none, it means nothing
    for t in (q, *others):
        ok = ok and t.shape == shape and t.dtype is dtype and t.device == device and (any_stride or t.stride()[2] == 1)
    if not ok:
        raise ValueError(
            f"hlip::attention takes tensors (R, H, D) of one shape, dtype and device, contiguous in the last dimension, with "
            f"the R = {num_rows} rows of the pattern; got {', '.join(map(_described, (q, *others)))}"
        )


def check_op_lse(q: Tensor, lse: Tensor, grad_lse: Tensor | None) -> None:
    """That they are like the log-sum-exp that the forward pass returned for ``q``, and its gradient."""
    for t in (lse,) if grad_lse is None else (lse, grad_lse):
        if t.shape != (q.shape[1], q.shape[0]) or t.dtype != stats_dtype(q.dtype) or t.device != q.device:
            raise ValueError(
                "hlip::attention_backward takes lse and its gradient as the forward pass returns lse: "
                f"{stats_dtype(q.dtype)} {(q.shape[1], q.shape[0])} on {q.device}, got {_described(t)}"
            )


def _described(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} with strides {t.stride()} on {t.device}"


def check_scale(scale: float) -> float:
    """``scale`` as a float: a finite number, of Python or numpy."""
    if type(scale) is not float and isinstance(scale, Tensor):
        raise TypeError("scale must be a number, a tensor would get no gradient: multiply q by it and pass scale=1.0")
    return check_number(scale, "scale")


def check_number(value: float, name: str) -> float:
    """A finite number, of Python or numpy, as a float."""
    if type(value) is not float:  # the usual case costs nothing
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def refuse_tangents(op: str, instead: str, *tensors: Tensor) -> None:
    """Says no to forward-mode differentiation, which torch's custom operators answer with zeros."""
    if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in tensors):
        raise NotImplementedError(f"{op} has no forward-mode derivative (jvp, jacfwd): {instead}")


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # under vmap torch cannot tell
        return True
