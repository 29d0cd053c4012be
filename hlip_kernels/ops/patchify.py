"""Ragged volumes to normalised patch rows, straight from the stored dtype: ``hlip::patchify``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import native
from ..backends.base import stats_dtype
from ..layout_input import is_int
from .checks import check_number, refuse_tangents

Shape = tuple[int, int, int]


def patch_grids(shapes: Sequence[Shape], patch: Shape, *, edge: str = "pad") -> list[Shape]:
    """Token grid ``(d, h, w)`` of each volume ``(D, H, W)``.

    Args:
        shapes: volume sizes in voxels.
        patch: patch size ``(pd, ph, pw)`` in voxels.
        edge: ``"pad"`` rounds up (voxels beyond the volume read as 0), ``"crop"`` rounds down (voxels beyond the last
            whole patch are left out, as a strided convolution does).

    Raises:
        TypeError, ValueError: a patch or volume size that is not three positive ints, or an unknown ``edge``.
    """
    if edge not in ("pad", "crop"):
        raise ValueError(f"edge must be 'pad' or 'crop', got {edge!r}")
    pd, ph, pw = _three_ints(patch, 1, "patch must be three positive ints (pd, ph, pw)")
    if not isinstance(shapes, (Sequence, np.ndarray)):
        raise TypeError(f"shapes must be a list of (D, H, W), got {shapes!r}")
    grids = []
    for i, shape in enumerate(shapes):
        d, h, w = _three_ints(shape, 0, f"volume {i}: a shape is three ints (D, H, W) >= 0")
        if edge == "pad":
            d, h, w = d + pd - 1, h + ph - 1, w + pw - 1
        grids.append((d // pd, h // ph, w // pw))
    return grids


def _three_ints(values: Shape, least: int, rule: str) -> Shape:
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
        raise TypeError(f"{rule}, got {values!r}")
    if len(values) != 3 or not all(is_int(n) and least <= n < 2**31 for n in values):
        raise ValueError(f"{rule}, got {tuple(values)!r}")
    return tuple(int(n) for n in values)


def patchify(
    volumes: Tensor | Sequence[Tensor],
    patch: Shape,
    *,
    shapes: Sequence[Shape] | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    max_value: float | None = None,
    edge: str = "pad",
    dtype: torch.dtype = torch.float32,
    keep: Tensor | None = None,
) -> Tensor:
    """Cuts single-channel volumes into patches and normalises them: ``(voxel / max_value - mean) / std``.

    The rows come out in the order of a packed buffer: volume by volume, then depth, height, width. A row is flattened
    ``(pd, ph, pw)``, so that ``rows @ conv.weight.flatten(1).T`` is a Conv3d with kernel = stride = patch.

    Args:
        volumes: a list of ``(D, H, W)`` tensors of one dtype and device, or all their voxels as one flat tensor with
            ``shapes``. uint8, int16, float16, bfloat16, float32, float64.
        patch: patch size ``(pd, ph, pw)`` in voxels.
        shapes: sizes ``(D, H, W)`` of the volumes in a flat tensor.
        mean, std: of the values in [0, 1].
        max_value: the stored value that means 1; default 255 for uint8, else 1.
        edge: ``"pad"`` or ``"crop"``; see :func:`patch_grids`.
        dtype: of the result, floating point.
        keep: int32 or int64 ``(T_kept,)``, on the device of the volumes: make only these patches (rows of
            the full result), each at most once.

    Returns:
        ``(T, pd * ph * pw)`` of ``dtype``. Differentiable in floating-point volumes.

    Raises:
        TypeError, ValueError: naming the argument and what was expected. NotImplementedError: the volumes carry a tangent
            of forward-mode differentiation.
    """
    if isinstance(volumes, Tensor):
        if shapes is None or volumes.ndim != 1:
            raise ValueError(
                "volumes must be a list of (D, H, W) tensors, or one flat tensor together with shapes=[(D, H, W), ...]; "
                f"got a tensor of {volumes.ndim} dimensions" + (" without shapes" if shapes is None else "")
            )
        voxels = volumes.contiguous()
    else:
        if shapes is not None:
            raise ValueError("shapes belongs to a flat tensor of all voxels: the volumes of a list have their own")
        voxels, shapes = _flatten(volumes)
    if voxels.dtype not in (*native.VOXEL_TYPES, torch.float64):
        raise TypeError(f"volumes must be uint8, int16 or floating point, got {voxels.dtype}")
    refuse_tangents("patchify", "it is linear but for the mean, so apply it with mean=0 to the tangent", voxels)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    if max_value is None:
        max_value = 255.0 if voxels.dtype == torch.uint8 else 1.0
    mean, std, max_value = check_number(mean, "mean"), check_number(std, "std"), check_number(max_value, "max_value")
    if std <= 0 or max_value <= 0:
        raise ValueError(f"std and max_value must be positive, got std={std}, max_value={max_value}")
    grids = patch_grids(shapes, patch, edge=edge)
    sizes = [int(n) for shape in shapes for n in shape]
    total = sum(d * h * w for d, h, w in zip(sizes[::3], sizes[1::3], sizes[2::3], strict=True))
    if total != voxels.numel():
        raise ValueError(f"shapes hold {total} voxels in all, volumes holds {voxels.numel()}")
    num_patches = sum(d * h * w for d, h, w in grids)
    if keep is not None:
        if not isinstance(keep, Tensor):
            raise TypeError(f"keep must be a tensor of int32 or int64 (T_kept,), got {type(keep).__name__}")
        if keep.ndim != 1 or keep.dtype not in (torch.int32, torch.int64) or keep.device != voxels.device:
            raise ValueError(
                f"keep must be int32 or int64 (T_kept,) on {voxels.device}, "
                f"got {keep.dtype} {tuple(keep.shape)} on {keep.device}"
            )
        limits = torch.iinfo(torch.int32)
        keep = keep.clamp(limits.min, limits.max).int()  # what int32 cannot hold stays out of range
        num_patches = len(keep)
    scale, shift = 1.0 / (max_value * std), -mean / std
    return torch.ops.hlip.patchify(voxels, sizes, keep, num_patches, [int(p) for p in patch], edge, scale, shift, dtype)


def _flatten(volumes: Sequence[Tensor]) -> tuple[Tensor, list[Shape]]:
    if not isinstance(volumes, Iterable):
        raise TypeError(f"volumes must be a list of (D, H, W) tensors, got {type(volumes).__name__}")
    volumes = list(volumes)
    if not volumes:
        raise ValueError("volumes is empty: pass at least one (D, H, W) tensor, or a flat tensor with shapes=[]")
    for i, volume in enumerate(volumes):
        if not isinstance(volume, Tensor) or volume.ndim != 3:
            raise ValueError(f"volumes[{i}] must be a (D, H, W) tensor, got {getattr(volume, 'shape', type(volume))}")
        if volume.dtype != volumes[0].dtype or volume.device != volumes[0].device:
            raise ValueError(
                f"volumes must share dtype and device: volumes[0] is {volumes[0].dtype} on {volumes[0].device}, "
                f"volumes[{i}] is {volume.dtype} on {volume.device}"
            )
    flat = [volume.reshape(-1) for volume in volumes]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), [tuple(volume.shape) for volume in volumes]


def _scans(sizes: list[int], patch: list[int], edge: str) -> Tensor:
    """The scan table of volumes of ``sizes`` (D, H, W one after the other)."""
    shapes = np.array(sizes, dtype=np.int64).reshape(-1, 3)
    whole = shapes + np.array(patch) - 1 if edge == "pad" else shapes
    return _scan_table(shapes, whole // patch)


def _scan_table(shapes: Sequence[Shape], grids: Sequence[Shape]) -> Tensor:
    """int64 CPU ``(num_scans, 8)``: first voxel, D, H, W, grid d, h, w, first patch."""
    table = np.zeros((len(shapes), 8), dtype=np.int64)
    if len(shapes):
        table[:, 1:4], table[:, 4:7] = shapes, grids
        for column, sizes in ((0, table[:, 1:4]), (7, table[:, 4:7])):
            volume = sizes.prod(axis=1)
            table[:, column] = np.cumsum(volume) - volume
    return torch.from_numpy(table)


@torch.library.custom_op("hlip::patchify", mutates_args=())
def _patchify(
    voxels: Tensor, sizes: list[int], keep: Tensor | None, num_patches: int, patch: list[int], edge: str,
    scale: float, shift: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    # The table is made here: built outside, torch.compile would tie its numbers, the sizes of the volumes, to the graph.
    scans = _scans(sizes, patch, edge)
    if num_patches and native.usable(voxels, native.VOXEL_TYPES) and dtype in native.FLOAT_TYPES:
        table = _live(scans).to(voxels.device, non_blocking=True)
        return native.patchify(voxels, table, keep, num_patches, tuple(patch), scale, shift, dtype)
    return torch_patchify(voxels, scans, keep, tuple(patch), scale, shift, dtype)


@_patchify.register_fake
def _(voxels, sizes, keep, num_patches, patch, edge, scale, shift, dtype):
    return voxels.new_empty((num_patches, patch[0] * patch[1] * patch[2]), dtype=dtype)


@torch.library.custom_op("hlip::patchify_backward", mutates_args=())
def _patchify_backward(
    grad: Tensor, sizes: list[int], keep: Tensor | None, num_voxels: int, patch: list[int], edge: str,
    scale: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    scans = _scans(sizes, patch, edge)
    if len(grad) and native.usable(grad) and dtype in native.FLOAT_TYPES:
        table = _live(scans).to(grad.device, non_blocking=True)
        return native.patchify_backward(grad.contiguous(), table, keep, num_voxels, tuple(patch), scale, dtype)
    return torch_patchify_backward(grad, scans, keep, num_voxels, tuple(patch), scale, dtype)


@_patchify_backward.register_fake
def _(grad, sizes, keep, num_voxels, patch, edge, scale, dtype):
    return grad.new_empty((num_voxels,), dtype=dtype)


def _live(scans: Tensor) -> Tensor:
    """The scans that have patches: the kernel finds a patch's scan by bisection on first patches, which must differ."""
    return scans[scans[:, 4:7].prod(dim=1) > 0]


def torch_patchify(
    voxels: Tensor, scans: Tensor, keep: Tensor | None, patch: Shape, scale: float, shift: float, dtype: torch.dtype
) -> Tensor:
    """The same in plain torch, one scan after the other."""
    stats = stats_dtype(dtype)
    pd, ph, pw = patch
    counts = scans[:, 4:7].prod(dim=1).tolist()
    patches = torch.empty((sum(counts), pd * ph * pw), dtype=stats, device=voxels.device)
    for (first, d, h, w, gd, gh, gw, row), count in zip(scans.tolist(), counts, strict=True):
        volume = voxels[first : first + d * h * w].view(d, h, w)[: gd * pd, : gh * ph, : gw * pw]
        missing = (gw * pw - volume.shape[2], gh * ph - volume.shape[1], gd * pd - volume.shape[0])
        if any(missing):
            volume = torch.nn.functional.pad(volume, (0, missing[0], 0, missing[1], 0, missing[2]))
        split = volume.unflatten(2, (gw, pw)).unflatten(1, (gh, ph)).unflatten(0, (gd, pd))
        # One pass: the copy converts the stored dtype while it rearranges.
        patches[row : row + count].view(gd, gh, gw, pd, ph, pw).copy_(split.permute(0, 2, 4, 1, 3, 5))
    if keep is not None:
        patches = patches.index_select(0, keep)
    return patches.mul_(scale).add_(shift).to(dtype)


def torch_patchify_backward(
    grad: Tensor, scans: Tensor, keep: Tensor | None, num_voxels: int, patch: Shape, scale: float, dtype: torch.dtype
) -> Tensor:
    """The gradient of :func:`torch_patchify` by the voxels, flat."""
    stats = stats_dtype(dtype)
    pd, ph, pw = patch
    grad = (grad.to(stats) * scale).to(dtype)
    if keep is not None:
        total = int(scans[:, 4:7].prod(dim=1).sum())
        grad = grad.new_zeros((total, grad.shape[1])).index_copy(0, keep.long(), grad)
    out = grad.new_zeros((num_voxels,))
    for first, d, h, w, gd, gh, gw, patch0 in scans.tolist():
        rows = grad[patch0 : patch0 + gd * gh * gw].view(gd, gh, gw, pd, ph, pw).permute(0, 3, 1, 4, 2, 5)
        volume = rows.reshape(gd * pd, gh * ph, gw * pw)[:d, :h, :w]
        a, b, c = volume.shape
        out[first : first + d * h * w].view(d, h, w)[:a, :b, :c] = volume
    return out


def _setup(ctx, inputs, output):
    voxels, ctx.sizes, keep, _, ctx.patch, ctx.edge, ctx.scale, _, _ = inputs
    ctx.num_voxels, ctx.dtype = voxels.shape[0], voxels.dtype
    ctx.save_for_backward(keep)


def _backward(ctx, grad):
    grad_voxels = None
    if ctx.needs_input_grad[0]:
        (keep,) = ctx.saved_tensors
        grad_voxels = torch.ops.hlip.patchify_backward(
            grad, ctx.sizes, keep, ctx.num_voxels, ctx.patch, ctx.edge, ctx.scale, ctx.dtype
        )
    return grad_voxels, *(None,) * 8


def _setup_backward(ctx, inputs, output):
    grad, ctx.sizes, keep, _, ctx.patch, ctx.edge, ctx.scale, _ = inputs
    ctx.num_patches, ctx.dtype = grad.shape[0], grad.dtype
    ctx.save_for_backward(keep)


def _backward_of_backward(ctx, grad_voxels):  # but for the shift, the op is linear: the transpose of its transpose is itself
    (keep,) = ctx.saved_tensors
    grad = torch.ops.hlip.patchify(
        grad_voxels, ctx.sizes, keep, ctx.num_patches, ctx.patch, ctx.edge, ctx.scale, 0.0, ctx.dtype
    )
    return grad, *(None,) * 7


_patchify.register_autograd(_backward, setup_context=_setup)
_patchify_backward.register_autograd(_backward_of_backward, setup_context=_setup_backward)
