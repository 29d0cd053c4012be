"""Where prepared voxels lie: against a scan whose values are their own places."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from hlip.data import PRESETS, Scan, prepare
from hlip.data.placement import Axis, image_of
from hlip.data.preprocess import Window

TURNS = {
    "LPS": np.eye(3),
    "RAS": np.diag([-1.0, -1.0, 1.0]),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "oblique": np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]),
}


def ramp(turn, axis, size, spacing):
    """A CT whose values are the millimetres along one axis of the patient."""
    image = sitk.Image(size, sitk.sitkFloat64)
    image.SetSpacing(spacing)
    image.SetOrigin((-31.0, 12.5, 7.0))
    image.SetDirection(TURNS[turn].flatten().tolist())
    index = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1)  # x, y, z
    places = index * spacing @ TURNS[turn].T + (-31.0, 12.5, 7.0)
    values = sitk.GetImageFromArray(places[..., axis].transpose(2, 1, 0).copy())
    values.CopyInformation(image)
    return Scan(values, "ramp", modality="CT")


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("preset", PRESETS)
def test_every_voxel_has_its_place(preset, axis, turn):
    window = Window("", -700.0, 700.0)
    for size, spacing in (((60, 51, 9), (1.5, 1.5, 6.0)), ((30, 47, 80), (4.0, 4.0, 4.25))):
        scan = ramp(turn, axis, size, spacing)
        asked = replace(PRESETS[preset], percentiles=None, windows=(window,), levels=False, dtype=torch.float32, crop=71)
        asked = replace(asked, resize=asked.resize and 80, num_slices=asked.num_slices and 23)  # small, and of odd sizes
        (made,) = prepare(scan, asked)
        voxels = made.voxels.numpy() * 1400 - 700
        index = np.stack(np.meshgrid(*(np.arange(n) for n in voxels.shape), indexing="ij"), -1)
        places = index @ made.affine[:3, :3].T + made.affine[:3, 3]
        inside = voxels != -700  # the rest is padding
        # Interpolation stands still in the outer half of the outer voxels.
        inverse = np.linalg.inv(TURNS[turn] * spacing)
        before = (places - (-31.0, 12.5, 7.0)) @ inverse.T
        inside &= ((before >= 0) & (before <= np.array(size) - 1)).all(-1)
        assert inside.mean() > 0.05
        # Whole slices are picked, half a slice away at the most; else exactly.
        off = max(spacing) / 2 + 1e-3 if asked.num_slices is not None and asked.depth_by == "nearest" else 2e-3
        assert np.abs(voxels - places[..., axis])[inside].max() <= off
        assert np.allclose(np.linalg.norm(made.affine[:3, :3], axis=0), made.spacing)


def test_an_image_has_the_affine():
    (made,) = prepare(ramp("oblique", 0, (20, 22, 9), (1.0, 1.0, 4.0)), "mri")
    image = image_of(made.voxels.numpy(), made.affine)
    for index in ((0, 0, 0), (3, 50, 7)):
        expected = made.affine @ [*index, 1]
        assert np.allclose(image.TransformIndexToPhysicalPoint(index[::-1]), expected[:3])
    assert np.array_equal(sitk.GetArrayFromImage(image), made.voxels.numpy())


def test_steps_of_an_axis_follow_each_other():
    axis = Axis(10).centred(13).stretched(26).centred(20)
    assert axis.length == 20
    # 13 pads one in front; each voxel becomes two; three are cut in front.
    assert [axis.scale * i + axis.first for i in (0, 1)] == pytest.approx([0.5 * 3 - 0.25 - 1, 0.5 * 4 - 0.25 - 1])
