"""Presets: the published transforms against plain transcriptions, bit for bit; windows, orientation, ragged sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from data_files import DATA, real

from hlip.data import PRESETS, Preset, Scan, Study, Window, auto_preset, prepare, read_study, scan_presets

LPS = (1, 0, 0, 0, 1, 0, 0, 0, 1)


def scan(voxels: np.ndarray, spacing=(1.0, 1.0, 1.0), direction=LPS, **fields) -> Scan:
    """A scan of (D, H, W) voxels; ``spacing`` in the same order."""
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(tuple(spacing)[::-1])
    image.SetDirection(direction)
    return Scan(image, fields.pop("name", "scan"), **fields)


def noise(shape, dtype=np.int16, seed=0) -> np.ndarray:
    values = np.random.default_rng(seed).gamma(2, 200, shape)
    return values.astype(dtype) if np.dtype(dtype).kind != "u" else (values % 250).astype(dtype)


# --- the published transforms, as plainly as they can be written ---------------------------------------------------


def plain_mri(image: sitk.Image, num_slices: int) -> torch.Tensor:
    """Pub-Brain-5: stored as uint8, then loaded."""
    image = sitk.DICOMOrient(image, "RPI")
    array, spacing = sitk.GetArrayFromImage(image), np.array(image.GetSpacing(), float)[::-1]
    axis = int(np.argmax(spacing))
    array = np.transpose(array, [(0, 1, 2), (1, 0, 2), (2, 0, 1)][axis])
    lower, upper = np.percentile(array, 0.5), np.percentile(array, 99.5)
    array = np.clip(array, lower, upper)
    array = (array - array.min()) / (array.max() - array.min() + 1e-8)
    stored = torch.from_numpy(np.ascontiguousarray((array * 255).astype(np.uint8)))

    x = stored[None].float() / 255.0
    h, w = x.shape[-2:]
    size = max(h, w)
    top, left = (size - h) // 2, (size - w) // 2
    x = torch.nn.functional.pad(x, (left, size - w - left, top, size - h - top), mode="constant", value=0)
    x = torch.nn.functional.interpolate(x, size=(256, 256), mode="bilinear")
    x = torch.nn.functional.interpolate(x[None], size=(num_slices, 256, 256), mode="nearest-exact")
    return x[0, 0, :, 16:240, 16:240]


def plain_chest(image: sitk.Image) -> torch.Tensor:
    """CT-RATE: resampled and stored in Hounsfield units, then loaded with "crop"."""
    array, (x, y, z) = sitk.GetArrayFromImage(image), image.GetSpacing()
    size = (int(array.shape[0] * z / 3), int(array.shape[1] * y / 1), int(array.shape[2] * x / 1))
    stored = torch.nn.functional.interpolate(torch.from_numpy(array).float()[None, None], size=size, mode="trilinear")
    v = torch.clip((stored - -1150.0) / (350.0 - -1150.0), 0.0, 1.0)
    pads = []
    for n, to in zip(v.shape[:1:-1], (336, 336, 112), strict=True):
        pads += [max(to - n, 0) // 2, max(to - n, 0) - max(to - n, 0) // 2]
    v = torch.nn.functional.pad(v, pads, mode="constant", value=0)[0, 0]
    d, h, w = ((n - to) // 2 for n, to in zip(v.shape, (112, 336, 336), strict=True))
    return v[d : d + 112, h : h + 336, w : w + 336]


OBLIQUE = tuple(
    sitk.Euler3DTransform((0, 0, 0), 0.3, -0.1, 0.2).GetMatrix()  # angles in radians
)
MRI_CASES = {
    "axial": dict(shape=(20, 70, 60), spacing=(5, 0.9, 0.9)),
    "coronal": dict(shape=(40, 13, 61), spacing=(1, 6, 1), dtype=np.uint8),
    "sagittal": dict(shape=(50, 51, 17), spacing=(1.1, 1.1, 4), dtype=np.float32),
    "isotropic": dict(shape=(65, 45, 33), spacing=(1, 1, 1), dtype=np.float64),
    "oblique": dict(shape=(19, 90, 64), spacing=(3.3, 0.7, 0.8), direction=OBLIQUE, dtype=np.uint16),
    "turned": dict(shape=(12, 300, 280), spacing=(4, 0.8, 0.8), direction=(0, 0, -1, 1, 0, 0, 0, -1, 0)),
    "odd": dict(shape=(7, 3, 256), spacing=(2, 2, 1), dtype=np.int32),
    "near tie": dict(shape=(30, 31, 32), spacing=(0.9999, 1, 1)),
    "one slice": dict(shape=(1, 20, 20), spacing=(9, 1, 1)),
}


@pytest.mark.parametrize("slices", [48, 144])
@pytest.mark.parametrize("case", MRI_CASES)
def test_published_mri_is_equal_bit_for_bit(case, slices):
    options = dict(MRI_CASES[case])
    s = scan(noise(options.pop("shape"), options.pop("dtype", np.int16)), **options)
    (prepared,) = prepare(s, f"mri-published-{slices}")
    assert prepared.voxels.dtype == torch.float32 and prepared.voxels.shape == (slices, 224, 224)
    assert torch.equal(prepared.voxels, plain_mri(s.image, slices))


def test_published_mri_with_many_slices_at_once():
    s = scan(noise((400, 24, 20)), (1.5, 1, 1))  # more slices than are resized together
    assert torch.equal(prepare(s, "mri-published-144")[0].voxels, plain_mri(s.image, 144))


@pytest.mark.parametrize("direction", [LPS, (-1, 0, 0, 0, -1, 0, 0, 0, 1)])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((30, 80, 90), (5, 2, 2)),
        ((110, 100, 90), (4, 4.1, 4.2)),
        ((400, 30, 30), (1, 1, 1)),
        ((113, 20, 400), (3, 1, 1)),
    ],
)
def test_published_chest_ct_is_equal_bit_for_bit(shape, spacing, direction):
    s = scan(noise(shape) - 1000, spacing, direction)
    (prepared,) = prepare(s, "chest-ct")
    assert prepared.voxels.shape == (112, 336, 336) and prepared.voxels.is_contiguous()
    assert torch.equal(prepared.voxels, plain_chest(s.image))  # stored axes, whatever the direction


# --- ragged presets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in MRI_CASES if c != "near tie"])
def test_ragged_mri_keeps_every_slice_and_the_published_values(case):
    options = dict(MRI_CASES[case])
    s = scan(noise(options.pop("shape"), options.pop("dtype", np.int16)), **options)
    (prepared,) = prepare(s, "mri")
    assert prepared.voxels.dtype == torch.uint8 and prepared.voxels.shape[1:] == (224, 224)
    depth = len(prepared.voxels)
    assert depth in s.shape
    expected = (plain_mri(s.image, depth) * 255).round().to(torch.uint8)
    assert torch.equal(prepared.voxels, expected)


def test_ragged_chest_ct_keeps_every_slice_and_turns_to_lps():
    values = noise((40, 60, 70)) - 1000
    (upright,) = prepare(scan(values, (4.5, 3, 3)), "chest-ct-ragged")
    assert upright.voxels.shape == (60, 336, 336)
    stored_otherwise = scan(values[:, ::-1, ::-1].copy(), (4.5, 3, 3), (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    assert torch.equal(prepare(stored_otherwise, "chest-ct-ragged")[0].voxels, upright.voxels)
    (fixed,) = prepare(scan(values, (4.5, 3, 3)), "chest-ct")
    assert torch.equal(fixed.voxels[26:86], upright.voxels)
    assert upright.spacing == pytest.approx((3, 1, 1))


def test_max_slices_thins_evenly_only_what_is_longer():
    s = scan(noise((31, 20, 20)), (3, 1, 1))
    (all_slices,) = prepare(s, "mri")
    (thinned,) = prepare(s, replace(PRESETS["mri"], max_slices=10))
    index = [int((i + 0.5) * 3.1) for i in range(10)]
    assert torch.equal(thinned.voxels, all_slices.voxels[index])
    assert thinned.spacing[0] == pytest.approx(9.3)
    assert torch.equal(prepare(s, replace(PRESETS["mri"], max_slices=31))[0].voxels, all_slices.voxels)


# --- orientation, plane, spacing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["LPS", "RAS", "RPI", "LAI", "PIR", "ASL", "SRP", "IPL", "LIP", "RSA"])
@pytest.mark.parametrize(("thick", "plane"), [(None, "axial"), ("S", "axial"), ("P", "coronal"), ("L", "sagittal")])
def test_a_mark_ends_up_at_the_same_place_from_every_orientation(code, thick, plane):
    values = np.zeros((16, 16, 16), np.uint8)
    values[12:, :4, :4] = 200  # superior, anterior, right of an LPS volume
    spacing = {None: (1, 1, 1), "S": (3, 1, 1), "P": (1, 3, 1), "L": (1, 1, 3)}[thick]
    s = scan(values, spacing)
    turned = Scan(sitk.DICOMOrient(s.image, code), "turned")
    assert turned.orientation == code
    (prepared,) = prepare(turned, "mri")
    assert prepared.plane == plane
    assert torch.equal(prepared.voxels, prepare(s, "mri")[0].voxels)
    # Slices run superior to inferior, anterior to posterior or left to right; rows go down the picture likewise.
    corner = {"axial": (0, 10, 200), "coronal": (0, 10, 200), "sagittal": (15, 10, 10)}[plane]
    assert prepared.voxels[corner] == 254
    assert int((prepared.voxels > 127).sum()) * 20 < prepared.voxels.numel()


def test_spacing_after_resizing():
    (axial,) = prepare(scan(noise((12, 100, 80)), (5, 0.8, 0.7)), "mri")
    assert axial.spacing == pytest.approx((5, 0.8 * 100 / 256, 0.7 * 100 / 256))
    (coronal,) = prepare(scan(noise((40, 10, 64)), (1.2, 6, 1.1)), "mri-published-48")
    assert coronal.plane == "coronal"
    assert coronal.spacing == pytest.approx((6 * 10 / 48, 1.2 * 64 / 256, 1.1 * 64 / 256))


def test_equal_and_nearly_equal_spacings():
    s = scan(noise((10, 11, 12)), (0.9999, 1, 1.0004))
    assert prepare(s, "mri")[0].plane == "axial"  # scans of one study must not differ by rounding in their headers
    assert prepare(s, "mri-published-48")[0].plane == "sagittal"  # as published
    assert prepare(scan(noise((10, 11, 12)), (1, 2, 2)), "mri-published-48")[0].plane == "coronal"


@pytest.mark.parametrize("code", ["LPS", "PIR", "LIP"])
@pytest.mark.parametrize("name", ["head-ct", "head-ct-published-48"])
def test_thin_slices_of_a_ct_series_stay_its_slices(code, name):
    plane = {"LPS": "axial", "PIR": "sagittal", "LIP": "coronal"}[code]
    direction = sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(code)
    thin = scan(noise((40, 10, 12)), (0.4, 0.488, 0.488), direction, slices_known=True)
    found = prepare(thin, name)
    assert {p.plane for p in found} == {plane} and len(found[0].voxels) == (40 if name == "head-ct" else 48)
    assert found[0].spacing[0] == pytest.approx(0.4 * 40 / len(found[0].voxels))
    thinner = scan(noise((40, 10, 12)), (0.3, 0.488, 0.488), direction, slices_known=True)
    unknown = scan(noise((40, 10, 12)), (0.4, 0.488, 0.488), direction)
    assert prepare(thinner, name)[0].plane != plane and prepare(unknown, name)[0].plane != plane


def test_the_slice_axis_of_an_mr_series_is_that_of_the_largest_spacing_as_published():
    s = scan(noise((20, 30, 32)), (0.9, 1, 1), slices_known=True)
    assert [prepare(s, name)[0].plane for name in ("mri", "mri-published-48")] == ["coronal"] * 2
    assert torch.equal(prepare(s, "mri-published-48")[0].voxels, plain_mri(s.image, 48))


# --- windows and values --------------------------------------------------------------------------------------------


def test_head_ct_windows():
    values = np.full((5, 16, 16), -2000, np.int16)
    levels = [-3000, -801, -20, 0, 40, 80, 180, 600, 2000, 3000]
    values[2, 8, 3:13] = levels
    found = prepare(scan(values, (4, 1, 1), name="CT 5"), replace(PRESETS["head-ct"], resize=None, crop=16))
    assert [p.name for p in found] == ["CT 5 BrainWindow", "CT 5 BloodWindow", "CT 5 BoneWindow"]
    # RPI: the slices and the columns are turned.
    rows = [p.voxels[2, 8, 3:13].flip(0).tolist() for p in found]
    assert rows[0] == [0, 0, 0, 0, 127, 255, 255, 255, 255, 255]
    assert rows[1] == [0, 0, 0, 25, 76, 127, 255, 255, 255, 255]
    assert rows[2] == [0, 0, 71, 72, 76, 80, 89, 127, 255, 255]


def test_head_ct_sizes():
    s = scan(noise((30, 64, 64)), (4, 1, 1))
    assert [tuple(p.voxels.shape) for p in prepare(s, "head-ct")] == [(30, 224, 224)] * 3
    fixed = prepare(s, "head-ct-published-48")
    assert [(tuple(p.voxels.shape), p.voxels.dtype) for p in fixed] == [((48, 224, 224), torch.float32)] * 3


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [0, 7, -1000])
def test_every_preset_on_constant_and_tiny_volumes(name, value):
    for shape in ((1, 1, 1), (3, 4, 5)):
        for prepared in prepare(scan(np.full(shape, value, np.int16), (3, 1, 1)), name):
            preset = PRESETS[name]
            assert prepared.voxels.dtype == preset.dtype and prepared.voxels.ndim == 3
            assert prepared.voxels.is_contiguous()
            assert 0 <= prepared.voxels.min() and prepared.voxels.max() <= preset.max_value
            assert torch.isfinite(prepared.voxels.float()).all()


@pytest.mark.parametrize("name", PRESETS)
def test_a_scan_is_not_changed(name):
    s = scan(noise((6, 20, 20), np.float32), (3, 1, 1))
    before = sitk.GetArrayFromImage(s.image)
    first = [p.voxels for p in prepare(s, name)]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(s.image), before)
    assert all(torch.equal(a, p.voxels) for a, p in zip(first, prepare(s, name), strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_over_the_whole_range_of_a_type_are_scaled_like_any_others(dtype):
    values = (np.arange(4096).reshape(16, 16, 16) - 2048).astype(np.float64)
    wide = (values / 2048 * float(np.finfo(dtype).max)).astype(dtype)
    (expected,), (found,) = (prepare(scan(v.astype(dtype), (5, 2, 2)), "mri-published-48") for v in (values, wide))
    torch.testing.assert_close(found.voxels, expected.voxels, rtol=0, atol=1.01 / 255)
    assert len(found.voxels.unique()) > 200
    chest = replace(PRESETS["chest-ct"], percentiles=(0.5, 99.5), windows=())
    (expected,), (found,) = (prepare(scan(v.astype(dtype), (5, 2, 2)), chest) for v in (values, wide))
    torch.testing.assert_close(found.voxels, expected.voxels, rtol=0, atol=1e-5)
    for name in PRESETS:  # windows: below is 0, above is 1
        for prepared in prepare(scan(wide, (5, 2, 2)), name):
            assert torch.isfinite(prepared.voxels.float()).all() and prepared.voxels.max() >= 0.98 * PRESETS[name].max_value


# --- errors and guesses --------------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="no preset named 'brain': choose one of mri, "):
        prepare(scan(noise((3, 4, 5))), "brain")
    with pytest.raises(ValueError, match="is its spacing right"):
        prepare(scan(noise((3, 4, 5)), (1e5, 1e5, 1e5)), "chest-ct")
    with pytest.raises(ValueError, match="slices of 3 x 9000, padded to a square, are too large to resize"):
        prepare(scan(noise((3, 3, 9000)), (5, 1, 1)), "mri")
    with pytest.raises(ValueError, match="11000 slices would become 11000 slices of 224 x 224, more than 512 MB"):
        prepare(scan(noise((11000, 3, 3)), (5, 1, 1)), "mri")
    with pytest.raises(ValueError, match="either percentiles or windows"):
        Preset("x", "nowhere")
    with pytest.raises(ValueError, match="depth_by is one of"):
        Preset("x", "nowhere", windows=(Window("", 0, 1),), depth_by="luck")
    with pytest.raises(ValueError, match="torch.uint8 or torch.float32"):
        Preset("x", "nowhere", windows=(Window("", 0, 1),), dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "columns", "most"),
    [("mri", 400, 2 * 400 * 400), ("chest-ct", 4000, 112 * 336 * 336), ("chest-ct-ragged", 4000, 60 * 336 * 336)],
)
def test_long_slices_take_little_memory(name, columns, most, monkeypatch):
    """Counts the elements of all that is made on the way: 10 times more if all slices were padded to squares at once."""
    s = scan(noise((60, 3, columns), np.uint8), (3, 1, 1))
    before = prepare(s, name)[0].voxels
    made = []
    for function in ("pad", "interpolate"):
        plain = getattr(F, function)
        monkeypatch.setattr(F, function, lambda *a, f=plain, **k: made.append((r := f(*a, **k)).numel()) or r)
    monkeypatch.setattr("hlip.data.preprocess._PIXELS_AT_ONCE", 2 * 400 * 400)
    assert torch.equal(prepare(s, name)[0].voxels, before)
    assert max(made) <= most


def test_presets_are_named_by_their_keys_and_give_their_source():
    assert all(name == preset.name and preset.source for name, preset in PRESETS.items())
    assert PRESETS["mri"].max_value == 255 and PRESETS["chest-ct"].max_value == 1


@pytest.mark.parametrize(
    ("fields", "field_mm", "expected"),
    [
        (dict(modality="MR", name="AX T2 brain"), 240, "mri"),
        (dict(modality="CT", name="Thorax 1.0"), 240, "chest-ct-ragged"),
        (dict(modality="CT", name="series 3", body_part="HEAD"), 400, "head-ct"),
        (dict(modality="CT"), 230, "head-ct"),
        (dict(modality="CT"), 380, "chest-ct-ragged"),
        (dict(modality="PT"), 600, "mri"),
        (dict(name="sub-01_T1w"), 230, "mri"),
        (dict(name="flair"), 230, "mri"),
        (dict(name="ct_lung"), 230, "chest-ct-ragged"),
        (dict(name="image"), 230, "mri"),
    ],
)
def test_guesses(fields, field_mm, expected):
    values = noise((4, 10, 10))
    guess = auto_preset(scan(values, (3, field_mm / 10, field_mm / 10), **fields))
    assert guess.preset == expected and guess.reason


def test_guess_from_values_and_for_a_study(tmp_path):
    ct = scan(noise((4, 10, 10)) - 1000, (3, 38, 38), name="image")
    assert auto_preset(ct).preset == "chest-ct-ragged" and "Hounsfield" in auto_preset(ct).reason
    mr = scan(noise((4, 10, 10)), name="flair")
    guess = auto_preset(Study([ct, mr, mr], [], tmp_path))
    assert guess.preset == "mri" and "2 of 3 scans; others: chest-ct-ragged" in guess.reason
    assert auto_preset(Study([], [], tmp_path)).preset == "mri"


def test_values_are_scaled_as_suits_each_scan_and_sizes_as_suits_the_study(tmp_path):
    ct = scan(noise((4, 10, 10)) - 1000, (3, 38, 38), modality="CT", name="lung")
    pet, mr = scan(noise((4, 10, 10)), (3, 38, 38), modality="PT"), scan(noise((4, 10, 10)), modality="MR")
    chest, mri = PRESETS["chest-ct-ragged"], PRESETS["mri"]
    first, second, third = scan_presets(Study([ct, ct, pet], [], tmp_path))
    assert first == second == chest
    assert third == replace(chest, name=third.name, percentiles=mri.percentiles, windows=())
    assert third.name == "chest-ct-ragged, values as for mri"
    (prepared,) = prepare(pet, third)
    assert prepared.voxels.shape == prepare(ct, first)[0].voxels.shape and len(prepared.voxels.unique()) > 1000
    assert scan_presets(Study([mr, pet, ct], [], tmp_path))[:2] == [mri, mri]
    assert scan_presets(Study([mr, pet, ct], [], tmp_path))[2].windows == chest.windows
    names = {"mri": "mri-published-48", "head-ct": "head-ct-published-48", "chest-ct-ragged": "head-ct-published-48"}
    named = scan_presets(Study([mr, pet, ct], [], tmp_path), names)
    assert named[0] == PRESETS["mri-published-48"] and named[2].windows == PRESETS["head-ct"].windows
    assert scan_presets(Study([], [], tmp_path)) == []


def test_windows_of_a_ct_among_others_follow_its_header_but_not_its_size(tmp_path):
    chest = scan(noise((4, 10, 10)), (3, 38, 38), modality="CT", body_part="CHEST")
    small = scan(noise((4, 10, 10)), (3, 20, 20), modality="CT")
    head = scan(noise((4, 10, 10)), (3, 20, 20), modality="CT", body_part="HEAD")
    presets = scan_presets(Study([chest, chest, chest, small, head], [], tmp_path))
    assert [p.windows for p in presets] == [PRESETS["chest-ct-ragged"].windows] * 4 + [PRESETS["head-ct"].windows]
    assert len({(p.crop, p.dtype) for p in presets}) == 1


def test_a_thin_head_ct_among_mr_keeps_its_slices(tmp_path):
    ct = scan(noise((40, 10, 12)), (0.4, 0.488, 0.488), modality="CT", slices_known=True)
    mr = scan(noise((4, 10, 10)), modality="MR")
    own = scan_presets(Study([mr, mr, ct], [], tmp_path))[2]
    assert own.crop == PRESETS["mri"].crop and [len(p.voxels) for p in prepare(ct, own)] == [40] * 3


# --- real data -----------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("folder", "preset", "shapes", "planes"),
    [
        ("brain-mri-mixed-dicom", "mri", [(29, 224, 224), (28, 224, 224)], ["sagittal", "axial"]),
        ("brain-mri-stroke-nifti", "mri", [(140, 224, 224)] * 3, ["axial"] * 3),
        ("chest-ct-nifti", "chest-ct-ragged", [(90, 336, 336)], ["axial"]),
        ("head-ct-tilted-dicom", "head-ct", [(28, 224, 224)] * 3, ["axial"] * 3),
        ("dicom-messy/oblique-implicit", "mri", [(4, 224, 224)], ["sagittal"]),
    ],
)
def test_real_studies_with_the_guessed_preset(folder, preset, shapes, planes):
    study = read_study(DATA / folder)
    guess = auto_preset(study)
    assert guess.preset == preset
    volumes = [p for s in study.scans for p in prepare(s, guess.preset)]
    assert [tuple(p.voxels.shape) for p in volumes] == shapes and [p.plane for p in volumes] == planes
    for p in volumes:
        share = (p.voxels > 0.2 * PRESETS[preset].max_value).float().mean().item()
        assert 0.1 < share < 0.9, (p.name, share)  # neither empty nor flat


@real
def test_real_published_transforms_are_equal_bit_for_bit():
    for s in [*read_study(DATA / "brain-mri-mixed-dicom").scans, *read_study(DATA / "brain-mri-stroke-nifti").scans]:
        assert torch.equal(prepare(s, "mri-published-48")[0].voxels, plain_mri(s.image, 48))
    (s,) = read_study(DATA / "chest-ct-nifti").scans
    path = next((DATA / "chest-ct-nifti").glob("*.nii.gz"))
    assert torch.equal(prepare(s, "chest-ct")[0].voxels, plain_chest(sitk.ReadImage(str(path))))


@real
def test_real_scans_of_one_study_lie_on_each_other():
    flair, t1, _ = (prepare(s, "mri")[0].voxels > 20 for s in read_study(DATA / "brain-mri-stroke-nifti").scans)
    assert 2 * (flair & t1).sum() / (flair.sum() + t1.sum()) > 0.95
