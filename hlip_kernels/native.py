"""The bridge to the CUDA extension ``hlip_kernels._C``: tensors in, raw addresses and a stream handle out.

The memory-bound kernels also run on CPU tensors (a host loop over the device code), which the tests use; everyday CPU work
goes to plain torch, which is faster. The attention kernels run on GPUs, and in the tests' emulator.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backends.cuda_whole import Whole
    from .packs import Packs

try:
    from . import _C
except ImportError as _error:
    _C = None
    _IMPORT_ERROR = str(_error)
else:
    _IMPORT_ERROR = ""

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = math.log2(math.e)
VOXEL_TYPES = (*FLOAT_TYPES, torch.uint8, torch.int16)


def why_missing() -> str:
    """Why the extension is not there, or ``""`` when it is."""
    if _C is not None:
        return ""
    note = Path(__file__).with_name("_build_note.txt")
    reason = note.read_text().strip() if note.exists() else ""
    return reason if reason and reason != "built" else (_IMPORT_ERROR or "not built")


def architectures() -> tuple[str, ...]:
    """The CUDA architectures the extension was built for, e.g. ``("80", "90")``; empty without the extension."""
    return () if _C is None else tuple(_C.architectures.split())


def nvcc_version() -> str:
    """The compiler the extension was built with; empty without the extension."""
    return "" if _C is None else _C.nvcc_version


def usable(x: Tensor, types: tuple[torch.dtype, ...] = FLOAT_TYPES) -> bool:
    """Whether the CUDA kernels should take ``x``."""
    return _C is not None and x.is_cuda and torch.version.hip is None and x.dtype in types


def _type(dtype: torch.dtype):
    return getattr(_C.Type, str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def _target(x: Tensor):
    """The stream of the device of ``x``, with that device current; host memory for CPU tensors."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield _C.Target(False, torch.cuda.current_stream(x.device).cuda_stream)
    else:
        yield _C.Target(True, 0)


def segment_mean(x: Tensor, offsets: Tensor, chunks: Tensor, chunk_offsets: Tensor) -> Tensor:
    """``x`` (R, C) contiguous -> (S, C)."""
    num_segments, channels = len(offsets) - 1, x.shape[1]
    out = torch.empty((num_segments, channels), dtype=x.dtype, device=x.device)
    partial = torch.empty((len(chunks), channels), dtype=torch.float32, device=x.device)
    with _target(x) as target:
        _C.segment_mean(
            target, _type(x.dtype), x.data_ptr(), out.data_ptr(), partial.data_ptr(), offsets.data_ptr(), chunks.data_ptr(),
            chunk_offsets.data_ptr(), len(chunks), num_segments, channels,
        )  # fmt: skip
    return out


def segment_mean_backward(grad_out: Tensor, offsets: Tensor, chunks: Tensor, num_tokens: int, num_rows: int) -> Tensor:
    """``grad_out`` (S, C) contiguous -> (R, C)."""
    channels = grad_out.shape[1]
    grad_x = torch.empty((num_rows, channels), dtype=grad_out.dtype, device=grad_out.device)
    with _target(grad_out) as target:
        _C.segment_mean_backward(
            target, _type(grad_out.dtype), grad_out.data_ptr(), grad_x.data_ptr(), offsets.data_ptr(), chunks.data_ptr(),
            len(chunks), num_tokens, num_rows, channels,
        )  # fmt: skip
    return grad_x


def switch_tail(source: Tensor, children: Tensor, parents: Tensor, num_prefix: int, up: bool, divide: bool) -> Tensor:
    """Prefix rows ``source`` (tail rows, C) contiguous of one level -> those of another, same shape."""
    result = torch.empty_like(source)
    if num_prefix == 0:
        return result.zero_()
    with _target(source) as target:
        _C.switch_tail(
            target, _type(source.dtype), source.data_ptr(), result.data_ptr(), children.data_ptr(), parents.data_ptr(),
            len(children) - 1, len(parents), num_prefix, source.shape[0], source.shape[1], up, divide,
        )  # fmt: skip
    return result


def patchify(
    voxels: Tensor, scans: Tensor, keep: Tensor | None, num_patches: int, patch: tuple[int, int, int],
    scale: float, shift: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Flat ``voxels`` -> (num_patches, prod(patch)) of ``dtype``."""
    out = torch.empty((num_patches, patch[0] * patch[1] * patch[2]), dtype=dtype, device=voxels.device)
    with _target(voxels) as target:
        _C.patchify(
            target, _type(voxels.dtype), _type(dtype), voxels.data_ptr(), out.data_ptr(), scans.data_ptr(),
            0 if keep is None else keep.data_ptr(), len(scans), num_patches, *patch, scale, shift,
        )  # fmt: skip
    return out


def patchify_backward(
    grad_out: Tensor, scans: Tensor, keep: Tensor | None, num_voxels: int, patch: tuple[int, int, int],
    scale: float, voxel_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``grad_out`` (num_patches, prod(patch)) contiguous -> flat gradient of the voxels."""
    grad = torch.zeros(num_voxels, dtype=voxel_dtype, device=grad_out.device)
    with _target(grad_out) as target:
        _C.patchify_backward(
            target, _type(voxel_dtype), _type(grad_out.dtype), grad_out.data_ptr(), grad.data_ptr(), scans.data_ptr(),
            0 if keep is None else keep.data_ptr(), len(scans), grad_out.shape[0], *patch, scale,
        )  # fmt: skip
    return grad


def short_attention_forward(q: Tensor, k: Tensor, v: Tensor, packs: Packs, scale: float) -> tuple[Tensor, Tensor]:
    """``(R, H, D)`` views with rows on 16 bytes -> out ``(R, H, D)``, lse ``(H, R)`` float32. GPU only."""
    num_rows, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, num_rows), dtype=torch.float32, device=q.device)
    with _target(q) as target:
        _C.short_attention_forward(
            target, _type(q.dtype), head_dim, _view(q), _view(k), _view(v), out.data_ptr(), lse.data_ptr(), _tables(packs),
            _extent(packs), heads, num_rows, scale * LOG2_E,
        )  # fmt: skip
    return out, lse


def short_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, packs: Packs,
    scale: float, whole: Whole,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, ``(R, H, D)`` contiguous. ``whole``: packs that have a kernel of their own. GPU only."""
    num_rows, heads, head_dim = q.shape
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    lse_gradient = (0, 0, 0) if grad_lse is None else (grad_lse.data_ptr(), *grad_lse.stride())
    with _target(q) as target:
        _C.short_attention_backward(
            target, _type(q.dtype), head_dim, *(_view(t) for t in (q, k, v, out, grad_out)), lse.data_ptr(), *lse_gradient,
            dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), _tables(packs), _extent(packs, *whole),
            heads, num_rows, scale, scale * LOG2_E,
        )  # fmt: skip
    return dq, dk, dv


def _view(x: Tensor):
    return _C.View(x.data_ptr(), x.stride(0), x.stride(1))


def _tables(packs: Packs):
    return _C.Tables(packs.packs.data_ptr(), packs.starts.data_ptr(), packs.records.data_ptr())


def _extent(packs: Packs, *whole):
    return _C.Extent(len(packs.packs), len(packs.alone), packs.rows, *whole)
