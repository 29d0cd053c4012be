"""The Hopper backend: Gluon kernels on sm_90, for long segments and for short ones, launched over the tiles of a plan.

Importing this never imports triton.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import triton as triton_backend
from ..base import LEAST_SCALE, LOG2_E, Backend, Query, Support, aligned, copied, on, strides_of
from ..determinism import wants_same_bits
from .config import (
    BACKWARD_DKDV,
    BACKWARD_DQ,
    BACKWARD_FUSED,
    BACKWARD_WHOLE,
    DTYPES,
    FUSED,
    HEAD_DIMS,
    KERNELS,
    SPLIT,
    WHOLE,
    Config,
    backward_kernels,
    forward_kernel,
    function_of,
)


@functools.cache
def _why_no_gluon() -> str:
    """Why the kernels cannot be compiled here; empty if they can."""
    try:
        major, minor = (int(part) for part in version("triton").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return "triton is not installed"
    return "" if (major, minor) >= (3, 6) else f"needs triton >= 3.6 for Gluon, found {version('triton')}"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class HopperBackend(Backend):
    """See the module.

    Args:
        ordered: where the same bits are asked for, sum dQ in a fixed order in one kernel instead of making it in another.
        whole: take the kernels that hold short segments whole where they can.
    """

    def __init__(self, ordered: bool = False, whole: bool = True):
        self.ordered, self.whole = ordered, whole
        self.name = "hopper_ordered" if ordered else "hopper"

    def supports(self, query: Query) -> Support:
        if query.device_type != "cuda" or query.capability is None:
            return Support.no("needs an NVIDIA GPU of compute capability 9.0")
        if query.capability != (9, 0):
            found = "{}.{}".format(*query.capability)
            return Support.no(f"its products are those of compute capability 9.0, this GPU has {found}")
        if _why_no_gluon():
            return Support.no(_why_no_gluon())
        if triton_backend.interpreted():
            return Support.no("Gluon has no interpreter: unset TRITON_INTERPRET")
        return self.takes(query)

    def takes(self, query: Query) -> Support:
        """Whether there are kernels for this, wherever they may run."""
        if query.dtype not in DTYPES:
            return Support.no(f"takes float16 and bfloat16, got {str(query.dtype).removeprefix('torch.')}")
        if query.head_dim not in HEAD_DIMS:
            return Support.no(f"has kernels for head dims {', '.join(map(str, HEAD_DIMS))}, not {query.head_dim}")
        return Support.yes()

    def forward(self, q, k, v, plan, scale, numerics):
        num_rows, heads, head_dim = q.shape
        name = forward_kernel(plan, head_dim, self.whole)
        config = KERNELS[name][head_dim]
        if scale < 0:  # the kernels look for the largest logit before they scale
            q, scale = -q, -scale
        q, k, v = map(_loadable, (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((heads, num_rows), dtype=torch.float32, device=q.device)
        tiles, records = plan.tiles(config.rows, q.device)
        items = len(tiles) * heads
        if items:
            self.launch(
                name, config, items, [q, k, v],
                q, k, v, out, lse, tiles, records,
                *strides_of(q, k, v, out), num_rows, heads, items,
                max(scale * LOG2_E, LEAST_SCALE),
            )  # fmt: skip
        return out, lse

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        head_dim = q.shape[-1]
        has_grad_lse = grad_lse is not None
        if not has_grad_lse:
            grad_lse = lse  # never read
        q, k, v, grad_out = map(_loadable, (q, k, v, grad_out))
        any_order = not wants_same_bits(numerics)
        names = backward_kernels(plan, head_dim, any_order or self.ordered, self.whole)
        run = {SPLIT: self._split, FUSED: functools.partial(self._fused, ordered=not any_order), WHOLE: self._whole}[names]
        return run(grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale)

    def _split(self, grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale):
        """dQ, then dK with dV: seven products."""
        num_rows, heads, head_dim = q.shape
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        delta = torch.empty_like(lse)
        out = _loadable(out)

        config = BACKWARD_DQ[head_dim]
        tiles, records = plan.tiles(config.rows, q.device)
        items = len(tiles) * heads
        if items:
            self.launch(
                "attention_backward_dq", config, items, [k, v, q, grad_out, out],
                q, k, v, out, grad_out, lse, grad_lse, dq, delta, tiles, records,
                *strides_of(q, k, v, out, grad_out), grad_lse.stride(0), grad_lse.stride(1), *strides_of(dq),
                num_rows, heads, items, scale, scale * LOG2_E,
                HAS_GRAD_LSE=has_grad_lse,
            )  # fmt: skip

        config = BACKWARD_DKDV[head_dim]
        tiles, records = plan.tiles(config.rows, q.device, transposed=True)
        items = len(tiles) * heads
        if items:
            self.launch(
                "attention_backward_dkdv", config, items, [q, grad_out, k, v],
                q, k, v, grad_out, lse, delta, dk, dv, tiles, records,
                *strides_of(q, k, v, grad_out, dk, dv), num_rows, heads, items, scale, scale * LOG2_E,
            )  # fmt: skip
        return dq, dk, dv

    def _fused(self, grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale, ordered):
        """All three at once: five products, and dQ summed in float32."""
        num_rows, heads, head_dim = q.shape
        dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
        delta, dq_sum = self.prepare(out, grad_out, grad_lse, has_grad_lse)
        config = BACKWARD_FUSED[head_dim]
        turns = torch.zeros(lse.shape if ordered else (0,), dtype=torch.int32, device=q.device)
        tiles, records = plan.tiles(config.rows, q.device, transposed=True)
        items = len(tiles) * heads
        if items:
            self.launch(
                "attention_backward_fused", config, items, [q, grad_out, k, v],
                q, k, v, grad_out, lse, delta, dq_sum, turns, dk, dv, tiles, records,
                *strides_of(q, k, v, grad_out, dq_sum, dk, dv), num_rows, heads, items, scale, scale * LOG2_E,
                ORDERED=ordered,
            )  # fmt: skip
        return dq_sum.to(q.dtype), dk, dv

    def _whole(self, grad_out, grad_lse, has_grad_lse, q, k, v, out, lse, plan, scale):
        """All three at once where a program holds a whole segment: five products, everything read and written once."""
        num_rows, heads, head_dim = q.shape
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        config = BACKWARD_WHOLE[head_dim]
        tiles, records = plan.tiles(config.rows, q.device)
        items = len(tiles) * heads
        if items:
            self.launch(
                "attention_backward_whole", config, items, [q, grad_out, k, v],
                q, k, v, out, grad_out, lse, grad_lse, dq, dk, dv, tiles, records,
                *strides_of(q, k, v, out, grad_out), grad_lse.stride(0), grad_lse.stride(1), *strides_of(dq, dk, dv),
                num_rows, heads, items, scale, scale * LOG2_E,
                HAS_GRAD_LSE=has_grad_lse,
            )  # fmt: skip
        return dq, dk, dv

    prepare = staticmethod(triton_backend.prepare_fused)

    def launch(self, name: str, config: Config, items: int, loaded: list[torch.Tensor], *args, **constants) -> None:
        """Runs kernel ``name`` with a program for each multiprocessor, or for each item if there are fewer.

        Args:
            loaded: ``(R, H, D)`` tensors that come by TMA, ``config.box`` rows at a time.
            args: the kernel's other arguments, up to its constants. constants: those that are not in the config.
        """
        device = loaded[0].device
        with on(device):
            kernel_named(name)[(min(items, _multiprocessors(device)),)](
                *(_descriptor(t, config.box) for t in loaded),
                *args,
                **constants,
                **constants_of(config, loaded[0].shape[-1]),
                num_warps=4,
                maxnreg=config.max_registers,
                enable_fp_fusion=True,
                launch_cooperative_grid=bool(constants.get("ORDERED")),
            )


def kernel_named(name: str):
    """The kernel of that name; imports triton."""
    from . import backward_dq, backward_keys, backward_whole, forward

    name = function_of(name)
    return next(vars(module)[name] for module in (forward, backward_dq, backward_keys, backward_whole) if name in vars(module))


def constants_of(config: Config, head_dim: int) -> dict[str, int]:
    """A kernel's compile-time constants."""
    reducer = {"DS_STAGES": config.reducer_stages, "REDUCER_REGISTERS": config.reducer_registers}
    return {
        "BLOCK_D": head_dim,
        "BLOCK_N": config.block,
        "CONSUMERS": config.consumers,
        "STAGES": config.stages,
        "PART": config.part,
        "CONSUMER_REGISTERS": config.consumer_registers,
        "PRODUCER_REGISTERS": config.producer_registers,
        **(reducer if config.reducer_stages else {}),
        "OWN_STAGES": config.own_stages,
        **({} if config.own_in_registers is None else {"OWN_IN_REGISTERS": config.own_in_registers}),
    }


def extent(t: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of an ``(R, H, D)`` tensor taken as a matrix: head ``h`` is the columns from ``h`` head strides on."""
    return t.shape[0], (t.shape[1] - 1) * t.stride(1) + t.shape[2]


def _loadable(t: torch.Tensor) -> torch.Tensor:
    """``t``, or a copy where TMA could not load it: it wants 16-byte addresses and strides, and 32-bit coordinates."""
    columns = extent(t)[1]
    # Not heads first: what the driver says of rows that overlap is not known here.
    fits = t.stride(0) >= columns and (t.stride(1) > 0 or t.shape[1] == 1) and columns < 2**31
    return aligned(t) if fits else copied(t)


def _descriptor(t: torch.Tensor, rows: int):
    """How TMA finds tiles of ``rows`` rows of one head of an ``(R, H, D)`` tensor."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = tile_layout(gl, t.dtype, rows, t.shape[-1])
    return TensorDescriptor(t, list(extent(t)), [t.stride(0), 1], [rows, t.shape[-1]], layout)


@functools.cache
def tile_layout(gl, dtype: torch.dtype, rows: int, head_dim: int):
    element = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], element)
