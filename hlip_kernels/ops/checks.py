"""Argument checks shared by the ops. Messages name the argument, what was found and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout


def check_layout(layout: Layout, x: Tensor, name: str) -> None:
    """``layout`` is a Layout whose index tensors are on the device of ``x``."""
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a hlip_kernels.Layout, got {type(layout).__name__}")
    if layout.device != x.device:
        raise ValueError(f"{name} is on {x.device} but the layout is on {layout.device}: use layout.to({name}.device)")


def check_rows(layout: Layout, x: Tensor, name: str, *, ndim: int) -> None:
    """``x`` is a floating packed buffer of this layout: ``ndim`` dimensions, ``layout.num_rows`` first."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim != ndim:
        shape = "(R, H, D)" if ndim == 3 else "(R, C)"
        raise ValueError(f"{name} must be packed rows {shape} with {ndim} dimensions, got {x.ndim}")
    if x.shape[0] != layout.num_rows:
        # Under torch.compile a size in the message would become a guard, and each new length a new compilation.
        found = "" if torch.compiler.is_compiling() else f" ({x.shape[0]} rows, the layout has {layout.num_rows})"
        raise ValueError(f"{name} does not belong to this layout: their numbers of rows differ{found}")
