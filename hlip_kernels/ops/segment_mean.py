"""The mean over each segment's patch rows: ``hlip::segment_mean``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..backends.base import stats_dtype
from ..layout import Layout
from .checks import check_layout, check_rows, refuse_tangents


def segment_mean(x: Tensor, layout: Layout, level: str) -> Tensor:
    """Mean over the patch rows of every segment of one level (prefix rows are not counted).

    Args:
        x: packed rows ``(R, C)``, floating point.
        layout: the ragged shape, on the device of ``x``.
        level: the level whose segments are averaged.

    Returns:
        ``(S, C)`` in the dtype of ``x``, summed in float32 (float64 for float64). Empty segments give 0.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device or level. NotImplementedError: ``x`` carries a tangent of
            forward-mode differentiation.
    """
    check_layout(layout, x, "x")
    check_rows(layout, x, "x", ndim=2)
    refuse_tangents("segment_mean", "it is linear, so apply it to the tangent", x)
    chunks, chunk_offsets = layout.chunks(level)
    return torch.ops.hlip.segment_mean(
        x, layout.offsets(level), chunks, chunk_offsets, layout.num_tokens, layout.num_segments(level)
    )


@torch.library.custom_op("hlip::segment_mean", mutates_args=())
def _segment_mean(
    x: Tensor, offsets: Tensor, chunks: Tensor, chunk_offsets: Tensor, num_tokens: int, num_segments: int
) -> Tensor:
    if native.usable(x):
        return native.segment_mean(x.contiguous(), offsets, chunks, chunk_offsets)
    return torch_segment_mean(x, offsets, num_tokens)


@_segment_mean.register_fake
def _(x, offsets, chunks, chunk_offsets, num_tokens, num_segments):
    return x.new_empty((num_segments, x.shape[1]))


@torch.library.custom_op("hlip::segment_mean_backward", mutates_args=())
def _segment_mean_backward(
    grad_out: Tensor, offsets: Tensor, chunks: Tensor, chunk_offsets: Tensor, num_tokens: int, num_rows: int
) -> Tensor:
    if native.usable(grad_out):
        return native.segment_mean_backward(grad_out.contiguous(), offsets, chunks, num_tokens, num_rows)
    return torch_segment_mean_backward(grad_out, offsets, num_tokens, num_rows)


@_segment_mean_backward.register_fake
def _(grad_out, offsets, chunks, chunk_offsets, num_tokens, num_rows):
    return grad_out.new_empty((num_rows, grad_out.shape[1]))


def torch_segment_mean(x: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """The same in plain torch, on any device, without synchronising."""
    lengths = offsets.diff()
    if len(lengths) == 0 or x.shape[1] == 0:
        return x.new_zeros((len(lengths), x.shape[1]))
    stats = stats_dtype(x.dtype)
    sums = torch.segment_reduce(x[:num_tokens].to(stats), "sum", offsets=offsets.long(), axis=0, initial=0.0)
    return (sums / lengths.clamp(min=1)[:, None]).to(x.dtype)


def torch_segment_mean_backward(grad_out: Tensor, offsets: Tensor, num_tokens: int, num_rows: int) -> Tensor:
    """The gradient of :func:`torch_segment_mean`."""
    grad_x = grad_out.new_zeros((num_rows, grad_out.shape[1]))
    lengths = offsets.diff()
    if num_tokens and len(lengths):
        stats = stats_dtype(grad_out.dtype)
        rows = (grad_out.to(stats) / lengths.clamp(min=1)[:, None]).to(grad_out.dtype)
        segment = torch.repeat_interleave(lengths.long(), output_size=num_tokens)
        torch.index_select(rows, 0, segment, out=grad_x[:num_tokens])
    return grad_x


def _setup(ctx, inputs, output):
    x, *tables, ctx.num_tokens, _ = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(*tables)


def _backward(ctx, grad_out):
    grad_x = torch.ops.hlip.segment_mean_backward(grad_out, *ctx.saved_tensors, ctx.num_tokens, ctx.num_rows)
    return grad_x, None, None, None, None, None


def _setup_backward(ctx, inputs, output):
    grad_out, *tables, ctx.num_tokens, _ = inputs
    ctx.num_segments = grad_out.shape[0]
    ctx.save_for_backward(*tables)


def _backward_of_backward(ctx, grad_x):  # the op is linear: the transpose of its transpose is itself
    grad_out = torch.ops.hlip.segment_mean(grad_x, *ctx.saved_tensors, ctx.num_tokens, ctx.num_segments)
    return grad_out, None, None, None, None, None


_segment_mean.register_autograd(_backward, setup_context=_setup)
_segment_mean_backward.register_autograd(_backward_of_backward, setup_context=_setup_backward)
