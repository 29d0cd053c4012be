"""From the prefix rows of one level to those of another, in place: ``switch_level``, and ``hlip::switch_tail`` under it.

Down: every child gets its parent's prefix. Up: a parent's prefix is the mean over all its children (the rule of HLIP,
arXiv 2505.21862). Patch rows are neither read nor written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends.base import stats_dtype
from ..layout import Layout
from .checks import check_layout, check_rows, refuse_tangents


def switch_level(x: Tensor, layout: Layout, old: str, new: str, *, inplace: bool = True) -> Tensor:
    """Rewrites the tail of ``x`` from level ``old`` to level ``new`` and returns ``x``.

    Autograd and ``torch.compile`` see a mutation of ``x``. Under gradient checkpointing, switch between the checkpointed
    blocks: a block is recomputed from its input, which must be as it was. Mutating that input inside the block makes
    torch raise in the backward pass; use ``inplace=False`` there.

    Args:
        x: packed rows ``(R, C)``, floating point, contiguous; not a leaf that requires a gradient.
        layout: the ragged shape, on the device of ``x``.
        old: the level whose prefix rows the tail holds.
        new: the level whose prefix rows it shall hold. Equal to ``old``: nothing happens.
        inplace: ``False`` works on a copy of all rows and leaves ``x`` as it is.

    Returns:
        ``x`` itself, or the copy: prefix rows of ``new``, then zeros to the end. A parent without children gets 0.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device, stride or level. NotImplementedError: ``x`` carries a tangent of
            forward-mode differentiation.
    """
    check_layout(layout, x, "x")
    check_rows(layout, x, "x", ndim=2)
    low, high = layout.index(old), layout.index(new)
    if not inplace:
        x = x.clone(memory_format=torch.contiguous_format)
    elif not x.is_contiguous():
        raise ValueError("x must be contiguous: its tail is rewritten in place")
    if low == high:
        return x
    refuse_tangents("switch_level", "it is linear, so apply it to the tangent", x)
    up = low < high
    child, parent = (old, new) if up else (new, old)
    change = layout.children(child, parent), layout.parents(child, parent), layout.num_tokens, layout.num_prefix, up
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or type(x) is not Tensor
    return _rewrite(x, *change, up) if traced else _Rewrite.apply(x, *change)


def _rewrite(x: Tensor, children: Tensor, parents: Tensor, num_tokens: int, num_prefix: int, up: bool, divide: bool) -> Tensor:
    """Writes the new tail. torch's copy mutates x, the op does not: what an op of ours does to an input of a compiled graph,
    autograd would not see."""
    tail = x[num_tokens:]
    tail.copy_(torch.ops.hlip.switch_tail(tail, children, parents, num_prefix, up, divide))
    return x


class _Rewrite(torch.autograd.Function):
    """The same in eager mode: the backward pass of torch's copy goes over the gradient rows three times, this one once."""

    @staticmethod
    def forward(ctx, x, children, parents, num_tokens, num_prefix, up):
        ctx.mark_dirty(x)
        ctx.save_for_backward(children, parents)
        ctx.sizes = num_tokens, num_prefix
        ctx.up = up
        return _rewrite(x, children, parents, num_tokens, num_prefix, up, up)

    @staticmethod
    def backward(ctx, grad):
        # A copy, because autograd may hand the same gradient to somebody else.
        grad_x = grad.clone(memory_format=torch.contiguous_format)
        return _rewrite(grad_x, *ctx.saved_tensors, *ctx.sizes, not ctx.up, ctx.up), None, None, None, None, None


@torch.library.custom_op("hlip::switch_tail", mutates_args=())
def _switch_tail(source: Tensor, children: Tensor, parents: Tensor, num_prefix: int, up: bool, divide: bool) -> Tensor:
    source = source.contiguous()  # a gradient may be anything
    if source.numel() and native.usable(source):
        return native.switch_tail(source, children, parents, num_prefix, up, divide)
    return torch_switch_tail(source, children, parents, num_prefix, up, divide)


@_switch_tail.register_fake
def _(source, children, parents, num_prefix, up, divide):
    return torch.empty_like(source, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, children, parents, *ctx.options = inputs
    ctx.save_for_backward(children, parents)


def _backward(ctx, grad):  # transposed: the gradient of a mean is a divided broadcast, that of a broadcast is a sum
    num_prefix, up, divide = ctx.options
    grad_source = torch.ops.hlip.switch_tail(grad, *ctx.saved_tensors, num_prefix, not up, divide)
    return grad_source, None, None, None, None, None


_switch_tail.register_autograd(_backward, setup_context=_setup)


@_switch_tail.register_vmap
def _(info, in_dims, source, *rest):  # a batch of tails is one of as many channels
    if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
        raise ValueError("under vmap, switch_level takes a batch of x with one layout")
    rows = source.movedim(in_dims[0], 1)
    return torch.ops.hlip.switch_tail(rows.flatten(1), *rest).view(rows.shape), 1


def torch_switch_tail(source: Tensor, children: Tensor, parents: Tensor, num_prefix: int, up: bool, divide: bool) -> Tensor:
    """Prefix rows (tail rows, C) of one level -> those of another, in plain torch, on any device, without synchronising.

    ``up``: the sum over each parent's children; down: each child's parent. ``divide``: over the number of children.
    """
    stats = stats_dtype(source.dtype)
    result = torch.zeros_like(source)
    num_parents, num_children, channels = len(children) - 1, len(parents), source.shape[1]
    counts = children.diff().clamp(min=1)[:, None]
    live_parents, live_children = num_parents * num_prefix, num_children * num_prefix
    if live_parents == 0 or live_children == 0 or channels == 0:
        return result
    if up:
        rows = source[:live_children].to(stats).view(num_children, num_prefix * channels)
        sums = torch.segment_reduce(rows, "sum", offsets=children.long(), axis=0, initial=0.0)
        if divide:
            sums = sums / counts
        result[:live_parents] = sums.view(live_parents, channels)
    else:
        rows = source[:live_parents].to(stats).view(num_parents, num_prefix * channels)
        if divide:
            rows = rows / counts
        result[:live_children] = rows.index_select(0, parents).view(live_children, channels)
    return result
