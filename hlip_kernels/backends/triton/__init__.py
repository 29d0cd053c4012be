"""The Triton backend: launches the kernels of :mod:`.kernels` over the tiles of a plan.

Importing this module never imports triton; the kernels are loaded on first use, so a machine without triton works.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from ..base import LEAST_SCALE, LOG2_E, Backend, Numerics, Query, Support, copied, on, strides_of
from ..determinism import wants_same_bits
from . import config as tables
from .config import DTYPES, MAX_HEAD_DIM, config_for, has_tf32, tile_family


def interpreted() -> bool:
    """Whether triton runs its kernels in its CPU interpreter (``TRITON_INTERPRET=1``, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


@functools.cache
def installed() -> bool:
    """Whether triton can be imported. Kept, since looking takes longer than all the rest of choosing a backend."""
    return importlib.util.find_spec("triton") is not None


class TritonBackend(Backend):
    name = "triton"

    def supports(self, query: Query) -> Support:
        if not installed():
            return Support.no("triton is not installed")
        if query.device_type == "cpu":
            if not interpreted():
                return Support.no("needs a GPU (or TRITON_INTERPRET=1, triton's slow interpreter, for tests)")
            if query.dtype == torch.bfloat16:
                return Support.no("triton's CPU interpreter is wrong for bfloat16 products")
        elif query.device_type != "cuda":
            return Support.no(f"made for NVIDIA and AMD GPUs, not {query.device_type}")
        elif query.capability is not None and query.capability < (8, 0):
            return Support.no(f"needs compute capability 8.0, this GPU has {query.capability[0]}.{query.capability[1]}")
        if query.dtype not in DTYPES:
            return Support.no(f"takes float16, bfloat16 and float32, got {str(query.dtype).removeprefix('torch.')}")
        if query.head_dim > MAX_HEAD_DIM:
            return Support.no(f"head dim {query.head_dim} is larger than {MAX_HEAD_DIM}")
        return Support.yes()

    def forward(self, q, k, v, plan, scale, numerics):
        from . import kernels

        num_rows, heads, head_dim = q.shape
        tf32, family = _tf32(q, numerics), tile_family(q.device)
        if scale < 0:  # the kernel takes the largest logit before it scales
            q, scale = -q, -scale
        q, k, v = map(_regular, (q, k, v))
        config = config_for("attention_forward", q.dtype, head_dim, family, tf32)
        tiles, records = plan.tiles(config.block_m, q.device)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((heads, num_rows), dtype=torch.float32, device=q.device)
        _launch(
            kernels.attention_forward, config, tiles, heads, head_dim, tf32, q.device,
            (q, k, v, out, lse, tiles, records), strides_of(q, k, v, out), (num_rows, max(scale * LOG2_E, LEAST_SCALE)),
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        has_grad_lse = grad_lse is not None
        if not has_grad_lse:
            grad_lse = lse  # never read
        q, k, v, grad_out = map(_regular, (q, k, v, grad_out))
        run = _fused_backward if is_fused(q.device, q.dtype, q.shape[-1], plan.longest, numerics) else _split_backward
        return run(grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale, _tf32(q, numerics))


def _tf32(q: torch.Tensor, numerics: Numerics) -> bool:
    return numerics.allow_tf32 and q.dtype == torch.float32 and has_tf32(q.device)


def is_fused(device: torch.device, dtype: torch.dtype, head_dim: int, longest: int, numerics: Numerics) -> bool:
    """Whether the backward pass is the fast one: allowed, by torch's own switch too, worth it, and with tiles in the table.

    ``longest``: the most rows one segment sees.
    """
    if wants_same_bits(numerics) or longest < tables.FUSED_FROM:
        return False
    tf32 = numerics.allow_tf32 and has_tf32(device)
    return config_for("attention_backward_fused", dtype, head_dim, tile_family(device), tf32) is not None


def _split_backward(grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale, tf32):
    """dQ, then dK with dV: every element written by one program, so the same bits every run."""
    from . import kernels

    num_rows, heads, head_dim = q.shape
    family = tile_family(q.device)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty((2, *lse.shape), dtype=lse.dtype, device=lse.device)

    config = config_for("attention_backward_dq", q.dtype, head_dim, family, tf32)
    tiles, records = plan.tiles(config.block_m, q.device)
    _launch(
        kernels.attention_backward_dq, config, tiles, heads, head_dim, tf32, q.device,
        (q, k, v, out, grad_out, lse, grad_lse, dq, delta, tiles, records), strides_of(q, k, v, out, grad_out, dq),
        (*grad_lse.stride(), num_rows, scale, scale * LOG2_E),
        HAS_GRAD_LSE=has_grad_lse,
    )  # fmt: skip

    config = config_for("attention_backward_dkdv", q.dtype, head_dim, family, tf32)
    tiles, records = plan.tiles(config.block_n, q.device, transposed=True)
    _launch(
        kernels.attention_backward_dkdv, config, tiles, heads, head_dim, tf32, q.device,
        (q, k, v, grad_out, lse, delta, dk, dv, tiles, records), strides_of(q, k, v, grad_out, dk, dv),
        (num_rows, scale, scale * LOG2_E),
    )  # fmt: skip
    return dq, dk, dv


def _fused_backward(grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale, tf32):
    """delta, then all three gradients at once; dQ is summed in float32 by atomic additions, in any order."""
    from . import fused_backward as kernels

    heads, head_dim = q.shape[1:]
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    delta, dq_sum = prepare_fused(out, grad_out, grad_lse, has_grad_lse, tf32)
    config = config_for("attention_backward_fused", q.dtype, head_dim, tile_family(q.device), tf32)
    tiles, records = plan.tiles(config.block_n, q.device, transposed=True)
    _launch(
        kernels.attention_backward_fused, config, tiles, heads, head_dim, tf32, q.device,
        (q, k, v, grad_out, lse, delta, dq_sum, dk, dv, tiles, records), strides_of(q, k, v, grad_out, dq_sum, dk, dv),
        (q.shape[0], scale, scale * LOG2_E),
    )  # fmt: skip
    return dq_sum.to(q.dtype), dk, dv


def prepare_fused(out, grad_out, grad_lse, has_grad_lse, tf32=False) -> tuple[torch.Tensor, torch.Tensor]:
    """``rowsum(dO * O) - dLSE``, float32 ``(H, R)``, and zeros to sum dQ in, float32 ``(R, H, D)``: one kernel."""
    from . import fused_backward as kernels

    num_rows, heads, head_dim = out.shape
    dq_sum = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    delta = torch.empty((heads, num_rows), dtype=torch.float32, device=out.device)
    config = config_for("attention_backward_delta", out.dtype, head_dim, tile_family(out.device), tf32)
    strides = strides_of(out, grad_out, dq_sum)
    with on(out.device):
        kernels.attention_backward_delta[_grid(-(-num_rows // config.block_m), heads)](
            out, grad_out, grad_lse, delta, dq_sum, *strides, *grad_lse.stride(), num_rows,
            HAS_GRAD_LSE=has_grad_lse, HEAD_DIM=head_dim, BLOCK_D=config.columns[0], BLOCK_E=config.columns[1],
            BLOCK_M=config.block_m, MULTIPLE=_multiple(strides),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return delta, dq_sum


def _grid(blocks: int, heads: int) -> tuple[int, int]:
    """A program for each block of rows and head. triton's launcher multiplies them as an int: from 2^31 on none would run."""
    if blocks * heads >= 2**31:
        raise ValueError(
            f"{blocks} blocks of rows times {heads} heads are too many programs for one launch (2^31 or more): "
            "split the batch, or attend with some of the heads at a time"
        )
    return blocks, heads


def _regular(t: torch.Tensor) -> torch.Tensor:
    """An ``(R, H, D)`` tensor, or a copy if its rows and heads do not begin at multiples of 8 elements, as in projections.

    What the compiler makes of other strides loads element by element, and spills. (A head dim that is no multiple of 8 gets
    that all the same.)
    """
    fits = t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) % 8 == 0
    return t if fits or t.shape[-1] % 8 else copied(t)


def _multiple(strides: list[int]) -> int:
    """What they all are multiples of, as far as the kernels want to know: 16, 8 or 1."""
    return next(m for m in (16, 8, 1) if not any(stride % m for stride in strides))


def _launch(kernel, config, tiles, heads, head_dim, tf32, device, tensors, strides, numbers, **constants) -> None:
    """One launch over real tiles only; none when there are none."""
    if len(tiles) == 0:
        return
    with on(device):
        kernel[_grid(len(tiles), heads)](
            *tensors,
            *strides,
            *numbers,
            **constants,
            HEAD_DIM=head_dim,
            BLOCK_D=config.columns[0],
            BLOCK_E=config.columns[1],
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PRECISION="tf32" if tf32 else "ieee",
            MULTIPLE=_multiple(strides),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
