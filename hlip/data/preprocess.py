"""Prepare scans for the model: named presets, stated as data, and the few steps they are made of.

Published presets give the same values, bit for bit, as the preparation of the HLIP repository (Zch0414/hlip; arXiv
2505.21862) on images that its readers accept. Ragged presets do the same to each slice and keep every slice.
The model subtracts its mean and divides by its standard deviation itself; nothing here does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from .placement import Axis, affine_of, as_in_file
from .study import Scan

# Slices resized at once, and their pixels: bounds the float32 copy, and does not change a bit of the result.
_SLICES_AT_ONCE = 64
_PIXELS_AT_ONCE = 2**26
# A small file must not ask for more memory than there is, by a wrong spacing or by sides of very different length.
_MOST_VOXELS = 2**30  # of a resampled scan
_MOST_PIXELS = 2**26  # of a slice padded to a square: 8192 x 8192
_MOST_BYTES = 2**29  # of a result: 10699 slices of 224 x 224 in uint8, 1189 of 336 x 336 in float32


@dataclass(frozen=True)
class Window:
    """Grey values from ``low`` to ``high`` (Hounsfield units) become 0 to 1. ``name`` is added to the scan's name."""

    name: str
    low: float
    high: float

    @classmethod
    def centred(cls, name: str, width: float, level: float) -> Window:
        """From window width and level, as scanners and viewers give them."""
        return cls(name, level - width / 2, level + width / 2)


@dataclass(frozen=True)
class Preset:
    """How a scan becomes one or more volumes. The steps run in the order of the fields.

    Attributes:
        orientation: directions in which columns, rows and slices are made to grow ("RPI": right, posterior,
            inferior), by flips and swaps of axes only; None leaves the axes as stored.
        depth: "largest spacing": the axis with the largest spacing becomes depth (axial z, y, x; coronal y, z, x;
            sagittal x, z, y). "slices": the stored slice axis stays depth.
        tie: spacings less than this share below the largest count as equal; of equals the first of z, y, x wins.
        thin: where the slice axis is known (a DICOM series) it stays depth, unless another spacing is more than so many
            times larger; 0: that does not count.
        resample_mm: spacing (depth, rows, columns) to resample to, trilinear; None: none.
        percentiles: clip to these percentiles of the whole volume and scale to [0, 1]; None: ``windows`` instead.
        windows: one volume for each, clipped and scaled to [0, 1].
        levels: cut to 256 levels before resizing, as 8-bit storage does (value x 255, truncated).
        num_slices: slices of every volume; None keeps the scan's own number.
        max_slices: with ``num_slices=None``: longer scans are thinned evenly to this many.
        depth_by: how ``num_slices`` is reached: "nearest" (torch's nearest-exact) or "crop" (centred; padded with 0).
        resize: zero-pad rows and columns to a square, then bilinear to this size; None: neither.
        crop: central rows and columns kept; smaller volumes are padded with 0 all round.
        dtype: of the result; ``torch.uint8`` is rounded to the nearest of 0 .. 255, ``torch.float32`` is in [0, 1].
    """

    name: str
    source: str
    orientation: str | None = "RPI"
    depth: str = "largest spacing"
    tie: float = 0.0
    thin: float = 0.0
    resample_mm: tuple[float, float, float] | None = None
    percentiles: tuple[float, float] | None = None
    windows: tuple[Window, ...] = ()
    levels: bool = True
    num_slices: int | None = None
    max_slices: int | None = None
    depth_by: str = "nearest"
    resize: int | None = 256
    crop: int = 224
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if (self.percentiles is None) == (not self.windows):
            raise ValueError(f"preset {self.name}: give either percentiles or windows")
        for name, allowed in (("depth", ("largest spacing", "slices")), ("depth_by", ("nearest", "crop"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"preset {self.name}: {name} is one of {allowed}, got {getattr(self, name)!r}")
        if self.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"preset {self.name}: dtype is torch.uint8 or torch.float32, got {self.dtype}")

    @property
    def max_value(self) -> float:
        """The stored value that means 1."""
        return 255.0 if self.dtype == torch.uint8 else 1.0


@dataclass
class Prepared:
    """A volume ready for the model.

    Attributes:
        voxels: (D, H, W), contiguous; uint8, or float32 in [0, 1].
        name: the scan's name, and the window's if there are several.
        spacing: mm between slices, rows, columns, after all resizing.
        plane: "axial", "coronal" or "sagittal" (nearest).
        affine: (4, 4), see :func:`hlip.data.placement.affine_of`; in the geometry of the file, also where metadata gave the
            scan another, so that viewers lay it over the file.
    """

    voxels: Tensor
    name: str
    spacing: tuple[float, float, float]
    plane: str
    affine: np.ndarray


_HEAD_WINDOWS = (
    Window.centred("BrainWindow", width=80, level=40),
    Window.centred("BloodWindow", width=200, level=80),
    Window.centred("BoneWindow", width=2800, level=600),
)
_CHEST_WINDOW = (Window("", -1150, 350),)
_MRI = "HLIP repository, data/pub_brain_5 (stored as uint8) and src/hlip_test/pub_brain_5_embed.py"
_CHEST = "HLIP repository, data/ct_rate/process.py and src/hlip_train/data_chest_ct.py, input 'crop'"
# The preparation of HeadCT240K is not published: windows of the same group's NeuroVFM, the rest as for MRI. But a CT is
# reconstructed in axial slices, often thinner than their pixels are wide: those of a DICOM series stay its slices.
_HEAD = "windows by analogy (NeuroVFM), geometry as for MRI; HLIP's own head CT preparation is not published"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("mri", _MRI + ", every slice kept", tie=1e-3, percentiles=(0.5, 99.5)),
        Preset("mri-published-48", _MRI, percentiles=(0.5, 99.5), num_slices=48, dtype=torch.float32),
        Preset("mri-published-144", _MRI, percentiles=(0.5, 99.5), num_slices=144, dtype=torch.float32),
        Preset(
            "chest-ct",
            _CHEST,
            orientation=None,
            depth="slices",
            resample_mm=(3, 1, 1),
            windows=_CHEST_WINDOW,
            levels=False,
            num_slices=112,
            depth_by="crop",
            resize=None,
            crop=336,
            dtype=torch.float32,
        ),
        # CT-RATE is used as stored, which others' readers take for left, posterior, superior, the axes of a DICOM
        # series. Files of other origin are turned that way, so that all are upright alike.
        Preset(
            "chest-ct-ragged",
            _CHEST + ", every slice kept, axes turned to LPS",
            orientation="LPS",
            depth="slices",
            resample_mm=(3, 1, 1),
            windows=_CHEST_WINDOW,
            levels=False,
            resize=None,
            crop=336,
            dtype=torch.float32,
        ),
        Preset("head-ct", _HEAD + ", every slice kept", tie=1e-3, thin=1.5, windows=_HEAD_WINDOWS),
        Preset("head-ct-published-48", _HEAD, thin=1.5, windows=_HEAD_WINDOWS, num_slices=48, dtype=torch.float32),
    )
}


def prepare(scan: Scan, preset: str | Preset) -> list[Prepared]:
    """The volumes that a preset makes of a scan: one, or one for each window.

    Args:
        scan: as ``read_study`` gives it; it is not changed.
        preset: a name in ``PRESETS``, or a ``Preset`` (``dataclasses.replace(PRESETS["mri"], max_slices=64)``).

    Raises:
        ValueError: there is no preset of that name; or the scan is metres wide and would have to be resampled; or it
            has slices beyond 8192 pixels on a side, or by the thousand, that would take hundreds of megabytes.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"no preset named {preset!r}: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    image, order, plane = _oriented(scan, preset)
    voxels = sitk.GetArrayFromImage(image).transpose(order)  # of z, y, x
    spacing = tuple(image.GetSpacing()[2 - axis] for axis in order)
    axes = [Axis(n) for n in voxels.shape]
    voxels = _bounded(voxels, preset)
    if preset.resample_mm:
        voxels, spacing = _resampled(voxels, spacing, preset.resample_mm)
        axes = [axis.stretched(n) for axis, n in zip(axes, voxels.shape, strict=True)]
    affine = affine_of(image, order, _sized_axes(axes, preset))
    if scan.spacing_in_file not in (None, scan.image.GetSpacing()):
        affine = as_in_file(affine, scan.image, scan.spacing_in_file)
    found = []
    for window, values in _scaled(voxels, preset):
        volume, mm = _sized(values, spacing, preset)
        found.append(Prepared(volume, f"{scan.name} {window}".rstrip(), mm, plane, affine))
    return found


def _oriented(scan: Scan, preset: Preset) -> tuple[sitk.Image, list[int], str]:
    """The scan turned, which of its axes z, y, x become D, H, W, and the plane of its slices."""
    image = scan.image
    if preset.orientation:
        image = sitk.DICOMOrient(image, preset.orientation)
    spacing = image.GetSpacing()[::-1]
    letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())[::-1]
    axis = 0
    if preset.depth == "largest spacing":
        axis = int(np.argmax(np.array(spacing) >= max(spacing) * (1 - preset.tie)))
        slices = _slice_axis(scan.image, image)
        if scan.slices_known and max(spacing) <= preset.thin * spacing[slices]:
            axis = slices
    order = [axis, *(i for i in range(3) if i != axis)]
    planes = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}
    return image, order, planes[letters[axis]]


def _slice_axis(stored: sitk.Image, turned: sitk.Image) -> int:
    """Which of z, y, x of the turned image is z of the stored one."""
    before, after = (np.array(image.GetDirection()).reshape(3, 3) for image in (stored, turned))
    return 2 - int(np.argmax(np.abs(after.T @ before[:, 2])))


def _bounded(voxels: np.ndarray, preset: Preset) -> np.ndarray:
    """Floating-point values so large that sums or differences would overflow, made smaller: others as they are.

    Percentiles take any scale; windows cut such values off.
    """
    if voxels.dtype.kind != "f":
        return voxels
    largest = max(-float(voxels.min()), float(voxels.max()))
    single = preset.resample_mm or preset.windows  # the steps to come are in float32
    most = float(np.finfo(np.float32 if single else voxels.dtype).max) / 4
    if largest <= most:
        return voxels
    return np.clip(voxels, -most, most) if preset.windows else voxels * 2.0 ** -math.ceil(math.log2(largest / most))


def _resampled(
    voxels: np.ndarray, spacing: tuple[float, ...], target: tuple[float, ...]
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Trilinear resampling to about ``target`` mm (sizes are rounded down): float32."""
    size = tuple(max(1, int(n * mm / to)) for n, mm, to in zip(voxels.shape, spacing, target, strict=True))
    if math.prod(size) > _MOST_VOXELS:
        shape, mm = (" x ".join(f"{each:.4g}" for each in row) for row in (voxels.shape, spacing))
        raise ValueError(f"a scan of {shape} voxels of {mm} mm is too large to resample: is its spacing right?")
    values = torch.from_numpy(voxels.astype(np.float32))[None, None]
    values = F.interpolate(values, size=size, mode="trilinear", align_corners=False)[0, 0]
    return values.numpy(), tuple(n * mm / m for n, mm, m in zip(voxels.shape, spacing, size, strict=True))


def _scaled(voxels: np.ndarray, preset: Preset) -> Iterator[tuple[str, Tensor]]:
    """(window name, values): uint8 if the preset cuts to 256 levels, else float32 in [0, 1]."""
    if preset.percentiles:
        # Two calls with plain floats: the type of the percentiles, and so of the result, follows the voxels.
        low, high = (np.percentile(voxels, p) for p in preset.percentiles)
        values = np.clip(voxels, low, high)
        low, high = values.min(), values.max()
        values = (values - low) / (high - low + 1e-8)
        values = (values * 255).astype(np.uint8) if preset.levels else values.astype(np.float32)
        yield "", torch.from_numpy(np.ascontiguousarray(values))
    for window in preset.windows:
        values = torch.from_numpy(voxels.astype(np.float32))  # a copy: the steps below are in place, to save memory
        values.sub_(window.low).div_(window.high - window.low).clamp_(0, 1)
        yield window.name, values.mul_(255).to(torch.uint8) if preset.levels else values


def _sized(values: Tensor, spacing: tuple[float, ...], preset: Preset) -> tuple[Tensor, tuple[float, float, float]]:
    """To the preset's number of slices, rows and columns, and to its type."""
    depth, rows, columns = values.shape
    mm = list(spacing)
    slices = _num_slices(depth, preset)
    if slices is not None and preset.depth_by == "nearest":
        # Picking slices before resizing them is the same as after, and less work.
        values = values[_nearest(depth, slices)]
        mm[0] *= depth / slices
    elif slices is not None:  # so is cutting them before
        values = _middle(values, 0, slices)
    side = max(rows, columns)
    if preset.resize and side**2 > _MOST_PIXELS:
        raise ValueError(f"slices of {rows} x {columns}, padded to a square, are too large to resize: is this a scan?")
    if len(values) * preset.crop**2 * preset.dtype.itemsize > _MOST_BYTES:
        made = f"{len(values)} slices of {preset.crop} x {preset.crop}, more than {_MOST_BYTES >> 20} MB"
        raise ValueError(f"a scan of {depth} slices would become {made}: is this a scan? (max_slices of a preset thins it)")
    if preset.resize:
        mm[1:] = [each * side / preset.resize for each in mm[1:]]
    parts = []
    for part in values.split(max(1, min(_SLICES_AT_ONCE, _PIXELS_AT_ONCE // side**2))):
        part = part.float() / 255 if part.dtype == torch.uint8 else part
        if preset.resize:
            part = _square(part[None])
            part = F.interpolate(part, size=(preset.resize, preset.resize), mode="bilinear", align_corners=False)[0]
        part = _centred(part, (part.shape[0], preset.crop, preset.crop))
        parts.append((part * 255).round().to(torch.uint8) if preset.dtype == torch.uint8 else part)
    values = torch.cat(parts)
    if slices is not None and preset.depth_by == "crop":
        values = _centred(values, (slices, preset.crop, preset.crop))
    return values.contiguous(), (mm[0], mm[1], mm[2])


def _sized_axes(axes: Sequence[Axis], preset: Preset) -> list[Axis]:
    """What :func:`_sized` does to the axes."""
    depth, rows, columns = axes
    slices = _num_slices(depth.length, preset)
    if slices is not None:
        depth = depth.stretched(slices) if preset.depth_by == "nearest" else depth.centred(slices)
    plane = [rows, columns]
    if preset.resize:
        plane = [axis.centred(max(rows.length, columns.length)).stretched(preset.resize) for axis in plane]
    return [depth, *(axis.centred(preset.crop) for axis in plane)]


def _num_slices(depth: int, preset: Preset) -> int | None:
    """How many slices a scan of ``depth`` becomes; ``None``: it keeps them."""
    if preset.num_slices is None and preset.max_slices and depth > preset.max_slices:
        return preset.max_slices
    return preset.num_slices


def _nearest(depth: int, slices: int) -> Tensor:
    """The slice that torch's nearest-exact interpolation takes for each of ``slices`` places."""
    index = torch.arange(depth, dtype=torch.float32).view(1, 1, depth, 1, 1)
    return F.interpolate(index, size=(slices, 1, 1), mode="nearest-exact").view(-1).long()


def _square(values: Tensor) -> Tensor:
    """Zero-pad the last two axes to the longer one; the odd pixel goes below or to the right."""
    rows, columns = values.shape[-2:]
    high, wide = max(columns - rows, 0), max(rows - columns, 0)
    return F.pad(values, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def _centred(values: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Cut the centre where larger, then pad with 0: (D, H, W) -> ``size``."""
    for axis, to in enumerate(size):
        values = _middle(values, axis, to)
    short = [to - n for n, to in zip(values.shape, size, strict=True)]
    return F.pad(values, [pad for n in reversed(short) for pad in (n // 2, n - n // 2)])


def _middle(values: Tensor, axis: int, most: int) -> Tensor:
    """At most so many of an axis, from its middle: a view."""
    extra = max(values.shape[axis] - most, 0)
    return values.narrow(axis, extra // 2, values.shape[axis] - extra)
