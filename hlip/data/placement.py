"""Where the voxels of a prepared volume lie in the patient: what its preset does to the axes of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk


@dataclass(frozen=True)
class Axis:
    """Positions of one axis after steps that take it apart or stretch it: position ``i`` was at ``scale * i + first``.

    Positions are those of voxel centres, and so may lie between voxels.
    """

    length: int
    scale: float = 1.0
    first: float = 0.0

    def stretched(self, length: int) -> Axis:
        """As ``interpolate(align_corners=False)`` has it: the edges of the outer voxels stay."""
        by = self.length / length
        return self._then(length, by, (by - 1) / 2)

    def centred(self, length: int) -> Axis:
        """Cut, or padded, from the middle; the odd voxel at the end."""
        cut = (self.length - length) // 2 if self.length > length else -((length - self.length) // 2)
        return self._then(length, 1.0, float(cut))

    def _then(self, length: int, scale: float, first: float) -> Axis:
        return Axis(length, self.scale * scale, self.scale * first + self.first)


def affine_of(image: sitk.Image, order: Sequence[int], axes: Sequence[Axis]) -> np.ndarray:
    """``(4, 4)``: from the position (D, H, W) in a prepared volume to mm, toward left, posterior, superior (LPS).

    Args:
        image: that the volume was made of. order: which of its axes z, y, x (0, 1, 2) D, H and W are.
        axes: what became of those three.
    """
    direction = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())  # columns for x, y, z
    columns = direction[:, ::-1][:, list(order)]
    affine = np.eye(4)
    affine[:3, :3] = columns * [axis.scale for axis in axes]
    affine[:3, 3] = np.array(image.GetOrigin()) + columns @ [axis.first for axis in axes]
    return affine


def as_in_file(affine: np.ndarray, image: sitk.Image, spacing: Sequence[float]) -> np.ndarray:
    """The affine of a volume made of ``image``, where the file that this came from has another spacing (x, y, z)."""
    direction, origin = np.array(image.GetDirection()).reshape(3, 3), np.array(image.GetOrigin())
    stretch = direction @ np.diag(np.divide(spacing, image.GetSpacing())) @ direction.T
    found = affine.copy()
    found[:3, :3] = stretch @ affine[:3, :3]
    found[:3, 3] = stretch @ (affine[:3, 3] - origin) + origin
    return found


def image_of(voxels: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """``(D, H, W)`` voxels as an image that viewers lay over the scan."""
    image = sitk.GetImageFromArray(voxels)
    columns = affine[:3, :3][:, ::-1]  # for x, y, z
    spacing = np.linalg.norm(columns, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((columns / spacing).flatten().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image
