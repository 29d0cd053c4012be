"""Tissue maps of an average head: the MNI152 grey and white matter nilearn packages, with fluid, skull and scalp around."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TISSUES = ("grey", "white", "fluid", "skull", "scalp")
RESOLUTION = 2  # mm
_MARGIN = 10  # voxels around the brain, for skull and scalp
# An ellipsoid (mm) around skull and scalp; all beyond it is air.
_HEAD_CENTRE, _HEAD_RADII = torch.tensor([0.0, -18.0, 6.0]), torch.tensor([98.0, 118.0, 107.0])


@lru_cache(maxsize=1)
def tissue_maps() -> tuple[Tensor, Tensor]:
    """The maps, loaded once per process.

    Returns:
        float32 ``(1, 5, Z, Y, X)``, the share of each of :data:`TISSUES` in each voxel, axes growing to superior, anterior
        and right; and float32 ``(3,)``: the position of voxel (x, y, z) = (0, 0, 0) in mm (MNI space).
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    from scipy.ndimage import binary_fill_holes, distance_transform_edt, gaussian_filter

    whole = load_mni152_template(resolution=RESOLUTION)
    grey, white, head = (
        np.pad(np.asarray(image.get_fdata(), dtype=np.float32).clip(0, 1), _MARGIN)
        for image in (load_mni152_gm_template(resolution=RESOLUTION), load_mni152_wm_template(resolution=RESOLUTION), whole)
    )
    brain = binary_fill_holes(head > 0.1)
    outside = distance_transform_edt(~brain) * RESOLUTION  # mm beyond the brain
    soft = gaussian_filter(brain.astype(np.float32), 0.5)
    around = (outside > 0) & (outside <= 3)  # a thin layer of fluid between brain and skull
    fluid = np.clip(soft - grey - white, 0, 1) + around * 0.9 * (1 - soft)
    skull = gaussian_filter(((outside > 3) & (outside <= 9)).astype(np.float32), 0.5)
    scalp = gaussian_filter(((outside > 9) & (outside <= 14)).astype(np.float32), 0.5)
    maps = np.stack([grey, white, fluid, skull, scalp])
    origin = whole.affine[:3, 3] - _MARGIN * RESOLUTION * np.sign(np.diag(whole.affine)[:3])
    steps = np.diag(whole.affine)[:3]
    for axis in range(3):  # every axis growing to right, anterior, superior
        if steps[axis] < 0:
            maps = np.flip(maps, axis=axis + 1)
            origin[axis] += steps[axis] * (maps.shape[axis + 1] - 1)
    maps = np.ascontiguousarray(maps.transpose(0, 3, 2, 1), dtype=np.float32)
    return torch.from_numpy(maps)[None], torch.from_numpy(origin.astype(np.float32))


@lru_cache(maxsize=1)
def _table() -> tuple[Tensor, Tensor, Tensor]:
    """The maps as rows ``(Z * Y * X, 5)``, the strides of x, y, z, and the offsets of a cell's eight corners."""
    maps, _ = tissue_maps()
    _, _, _, height, width = maps.shape
    strides = torch.tensor([1, width, width * height])
    corners = torch.tensor([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)]) @ strides
    return maps[0].flatten(1).T.contiguous(), strides, corners


def sample(points: Tensor) -> Tensor:
    """The tissues at points in MNI space.

    Args:
        points: float32 ``(D, H, W, 3)``, mm: right, anterior, superior.

    Returns:
        float32 ``(5, D, H, W)``, linear interpolation, 0 outside.
    """
    maps, origin = tissue_maps()
    table, strides, corners = _table()
    shape = points.shape[:3]
    points = points.reshape(-1, 3)
    last = origin + (torch.tensor(maps.shape[:1:-1]) - 1) * RESOLUTION
    head = (((points - _HEAD_CENTRE) / _HEAD_RADII) ** 2).sum(1) < 1
    inside = (head & ((points >= origin) & (points < last)).all(1)).nonzero()[:, 0]
    at = (points[inside] - origin) / RESOLUTION
    low = at.floor()
    x, y, z = (torch.stack([1 - part, part], dim=1) for part in (at - low).unbind(1))
    weights = (z[:, :, None, None] * y[:, None, :, None] * x[:, None, None, :]).flatten(1)  # (N, 8)
    rows = (low.long() @ strides)[:, None] + corners
    # Eight weighted rows each: an interpolation is a bag of embeddings.
    found = F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
    out = torch.zeros(len(TISSUES), len(points))
    out[:, inside] = found.T
    return out.view(len(TISSUES), *shape)


@lru_cache(maxsize=1)
def white_matter_points() -> np.ndarray:
    """float32 ``(N, 3)``: positions (mm) well inside white matter of the cerebrum, where lesions and spots are put."""
    maps, origin = tissue_maps()
    z, y, x = np.nonzero((maps[0, 1] > 0.7).numpy())
    points = np.stack([x, y, z], axis=1) * RESOLUTION + origin.numpy()
    # Above the cerebellum, off the midline, and not at the very top.
    return points[(points[:, 2] > -5) & (points[:, 2] < 50) & (np.abs(points[:, 0]) > 12)].astype(np.float32)
