"""NIfTI, MetaImage and NRRD files become scans, and damaged or hostile ones do no harm."""

from __future__ import annotations

import gzip
import os
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from data_files import array, failure, reasons, volume

from hlip.data import read_study
from hlip.data.find import is_label_name


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ", ".mha", ".nrrd"])
def test_volume_files(tmp_path, ending):
    values = volume(tmp_path / "T1 post.nii")
    if ending != ".nii":
        image = sitk.ReadImage(str(tmp_path / "T1 post.nii"))
        (tmp_path / "T1 post.nii").unlink()
        sitk.WriteImage(image, str(tmp_path / f"x{ending.lower()}"))
        (tmp_path / f"x{ending.lower()}").rename(tmp_path / f"T1 post{ending}")
    (scan,) = read_study(tmp_path).scans
    np.testing.assert_array_equal(array(scan), values)
    assert scan.name == "T1 post" and scan.spacing == pytest.approx((3, 2, 1)) and scan.orientation == "RAS"
    assert scan.modality == "" and scan.notes == []
    assert read_study(tmp_path / f"T1 post{ending}").scans[0].name == "T1 post"


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_four_dimensional_files_are_split_and_capped(tmp_path, ending):
    parts = [np.full((4, 5, 6), i, np.int16) + np.arange(6, dtype=np.int16) for i in range(5)]
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(p) for p in parts]), str(tmp_path / f"dwi{ending}"))
    study = read_study(tmp_path)
    assert [s.name for s in study.scans] == ["dwi [0]", "dwi [1]"]
    for scan, part in zip(study.scans, parts, strict=False):
        np.testing.assert_array_equal(array(scan), part)
    assert "only the first 2 of 5 volumes are kept (max_volumes)" in study.scans[1].notes
    assert "volumes beyond the first 2 of 5" in reasons(study)
    assert len(read_study(tmp_path, max_volumes=10).scans) == 5


@pytest.mark.parametrize(
    "name", ["seg", "T1_seg", "t1-Mask", "brainmask", "lesionMask", "aparc+aseg", "segmentation_2", "x_dseg", "masks"]
)
def test_label_names(name):
    assert is_label_name(name)


@pytest.mark.parametrize("name", ["segond", "T1", "unmasked", "passege", "flair_ax", "", "masking"])
def test_other_names(name):
    assert not is_label_name(name)


def test_segmentations_and_masks_are_skipped_by_name(tmp_path):
    for name in ("flair.nii.gz", "segond.nii.gz", "flair_seg.nii.gz", "Mask.mha", "segmentations/liver.nii.gz"):
        volume(tmp_path / name)
    study = read_study(tmp_path)
    assert [s.name for s in study.scans] == ["flair", "segond"]
    assert reasons(study).count("named like a segmentation or mask") == 3
    assert '("segmentations")' in reasons(study)


def test_equal_file_names_are_told_apart_by_their_folder(tmp_path):
    for folder in ("t2", "t1"):
        volume(tmp_path / folder / "scan.nii.gz")
    assert [s.name for s in read_study(tmp_path).scans] == ["t1/scan", "t2/scan"]


def test_values_that_are_not_numbers_become_the_minimum(tmp_path):
    values = np.linspace(-3, 9, 60, dtype=np.float32).reshape(3, 4, 5)
    values[1, 2, 3], values[0, 0, 4], values[2, 0, 0] = np.nan, np.inf, -np.inf
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(np.full((3, 4, 5), np.nan)), str(tmp_path / "b.nii.gz"))
    study = read_study(tmp_path)
    (scan,) = study.scans
    expected = np.where(np.isfinite(values), values, -3)
    np.testing.assert_array_equal(array(scan), expected)
    assert "3 voxels were not numbers" in scan.notes[0]
    assert "no finite value" in reasons(study)


@pytest.mark.parametrize("packed", [False, True])
def test_values_that_are_not_numbers_are_found_across_pieces_of_the_file(tmp_path, packed, monkeypatch):
    values = np.random.default_rng(0).normal(size=(7, 8, 9)) - 5
    bad = np.zeros(values.shape, bool)
    bad[0, 0, 0] = bad[3, 1, 4] = bad[6, 7, 8] = True
    values[bad] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "a.nii"))
    raw = (tmp_path / "a.nii").read_bytes()
    head = bytearray(raw[:348]) + b"\x01\x00\x00\x00" + struct.pack("<2i", 1648, 6) + bytes(1640)
    head[108:112] = struct.pack("<f", 2000)  # an extension lies between the header and the voxels
    (tmp_path / "a.nii").unlink()
    content = bytes(head) + raw[352:]
    (tmp_path / f"a.nii{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    monkeypatch.setattr("hlip.data.nifti._CHUNK", 1001)
    (scan,) = read_study(tmp_path).scans
    np.testing.assert_array_equal(array(scan), np.where(bad, values[~bad].min(), values))
    assert scan.notes[-1].startswith("3 voxels were not numbers")


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=["both", "qform", "sform", "neither"])
@pytest.mark.parametrize("volumes", [1, 2])
def test_the_sign_of_voxel_sizes_means_nothing(tmp_path, codes, volumes):
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    image = sitk.JoinSeries([sitk.GetImageFromArray(values)] * volumes) if volumes > 1 else sitk.GetImageFromArray(values)
    image.SetSpacing((1, 2, 5, 1)[: image.GetDimension()])
    turned = np.eye(image.GetDimension())
    turned[:3, :3] = np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.1, 0.2).GetMatrix(), (3, 3))
    image.SetDirection(turned.ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[252:256] = struct.pack("<2h", *codes)
    read = []
    for signs in ((1, 1, 1), (-1, -1, -1), (-1, 1, 1), (1, 1, -1)):
        raw[80:92] = struct.pack("<3f", *(mm * sign for mm, sign in zip((1, 2, 5), signs, strict=True)))
        (tmp_path / "a.nii").write_bytes(raw)
        read.append(read_study(tmp_path).scans[-1])
    for scan in read:
        assert scan.spacing == pytest.approx((5, 2, 1)) and scan.notes == read[0].notes
        assert scan.image.GetDirection() == pytest.approx(read[0].image.GetDirection(), abs=1e-6)
        assert scan.image.GetOrigin() == pytest.approx(read[0].image.GetOrigin())
        np.testing.assert_array_equal(array(scan), values)


def test_damaged_volume_files(tmp_path, capfd):
    volume(tmp_path / "good.nii.gz")
    volume(tmp_path / "x.nii", (20, 30, 40))
    raw = (tmp_path / "x.nii").read_bytes()
    (tmp_path / "x.nii").unlink()
    packed = gzip.compress(raw)
    bomb = bytearray(raw[:352])
    bomb[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    large = bytearray(raw[:352])
    large[42:48] = struct.pack("<3h", 900, 900, 900)
    no_dims = bytearray(raw)
    no_dims[40:42] = struct.pack("<h", 99)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((20, 30, 40), np.int16)), str(tmp_path / "c.mha"))
    mha = (tmp_path / "c.mha").read_bytes()
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((20, 30, 40), np.int16)), str(tmp_path / "c.nrrd"))
    nrrd = (tmp_path / "c.nrrd").read_bytes()
    files = {
        "cut.nii": (raw[:-1], "cut short"),
        "cut.nii.gz": (packed[:-4000], "cut short"),
        "half.nii.gz": (gzip.compress(raw[: len(raw) // 2]), "cut short"),
        "flipped.nii.gz": (flipped, ""),
        "junk.nii": (b"hello " * 200, "not a NIfTI file"),
        "junk.nii.gz": (b"\x1f\x8bnonsense" * 20, "damaged gzip file"),
        "empty.nii.gz": (b"", "not a NIfTI file"),
        "bomb.nii": (bomb, "exceed the limit"),
        "large.nii.gz": (gzip.compress(bytes(large)), "cut short"),
        "dims.nii": (no_dims, "damaged NIfTI header"),
        "c.mha": (mha[:-100], "cut short or damaged"),
        "c.nrrd": (nrrd[:-100], "cut short or damaged"),
        "junk.mha": (b"hello", "not a MetaImage file"),
        "junk.nrrd": (b"hello", "not a NRRD file"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    study = read_study(tmp_path)
    assert [s.name for s in study.scans] == ["good"]
    text = reasons(study)
    for name, (_, reason) in files.items():
        assert any(f"/{name}: " in line and reason in line for line in text.splitlines()), name
    assert capfd.readouterr() == ("", "")


def test_several_gzip_members_are_one_file(tmp_path):
    values = volume(tmp_path / "x.nii", (20, 30, 40))
    raw = (tmp_path / "x.nii").read_bytes()
    (tmp_path / "x.nii").unlink()
    (tmp_path / "y.nii.gz").write_bytes(gzip.compress(raw[:9000]) + gzip.compress(raw[9000:]))
    np.testing.assert_array_equal(array(read_study(tmp_path).scans[0]), values)


def test_shapes_that_are_no_scan(tmp_path):
    vector = sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(vector, str(tmp_path / "colour.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6), np.int16)), str(tmp_path / "flat.nii.gz"))
    volume(tmp_path / "thin.nii.gz", (2, 6, 7))
    volume(tmp_path / "thin2.nii.gz", (6, 7, 2))
    error = failure(tmp_path)
    assert "3 values per voxel" in reasons(error) and reasons(error).count("thinner than min_slices=3") == 3
    assert len(read_study(tmp_path, min_slices=2).scans) == 2


def test_headers_without_orientation_or_with_sheared_axes(tmp_path, capfd):
    values = volume(tmp_path / "a.nii", (5, 6, 7))
    raw = (tmp_path / "a.nii").read_bytes()
    plain = bytearray(raw)
    plain[252:256] = bytes(4)  # neither qform nor sform
    plain[88:92] = struct.pack("<f", 0)  # spacing of the third axis
    (tmp_path / "a.nii").write_bytes(plain)
    sheared = bytearray(raw)
    sheared[252:256] = struct.pack("<2h", 0, 1)
    sheared[280:328] = struct.pack("<12f", 1, 0, 0, 0, 0, 2, 0.6, 0, 0, 0, 3, 0)
    (tmp_path / "b.nii").write_bytes(sheared)
    a, b = read_study(tmp_path).scans
    assert a.notes == [
        "no valid voxel size in the header: 1 mm is assumed",
        "no orientation in the header: the stored axes are taken for it",
    ]
    assert b.notes == ["axes not at right angles: the nearest right-angled ones are used"]
    np.testing.assert_array_equal(array(b), values)
    assert "ITK_NIFTI_SFORM_PERMISSIVE" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_voxels_in_another_file_are_never_followed(tmp_path):
    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(range(256)))
    study = tmp_path / "study"
    volume(study / "good.nii.gz")
    head = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = "
    (study / "a.mha").write_text(head + "../secret.raw\n")
    (study / "b.mha").write_text(head + "LIST\n../secret.raw\n")
    (study / "c.nrrd").write_text(
        "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: ../secret.raw\n\n"
    )
    found = read_study(study)
    assert [s.name for s in found.scans] == ["good"]
    assert reasons(found).count("its voxels are in another file, which is not followed") == 3
