"""Reading whole studies: what is left out and why, paths, links, limits, finding studies, and the real data."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from data_files import (
    AXIAL,
    CORONAL,
    DATA,
    SAGITTAL,
    array,
    dicom,
    failure,
    plane,
    real,
    reasons,
    stack,
    volume,
)
from pydicom.dataset import Dataset
from pydicom.uid import (
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from hlip.data import Scan, StudyError, find_studies, iter_study, read_study
from hlip.data.study import clean_text

# --- DICOM: what is no scan ----------------------------------------------------------------------------------------


def test_everything_that_is_no_scan_is_named_and_the_scan_is_kept(tmp_path, capfd):
    stack(tmp_path / "series", [0, 1, 2])
    bad = tmp_path / "bad"
    rgb = np.zeros((4, 4, 3), np.uint8)
    dicom(bad / "scout", plane(0), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.1")
    dicom(bad / "rgb", rgb[..., 0], SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0,
          PixelData=rgb.tobytes())  # fmt: skip
    dicom(bad / "capture", plane(0), SOPClassUID=SecondaryCaptureImageStorage)
    dicom(bad / "mosaic", plane(0), ImageType=["DERIVED", "PRIMARY", "PERFUSION", "MOSAIC"])
    dicom(bad / "seg", plane(0), SOPClassUID=SegmentationStorage, Modality="SEG")
    dicom(bad / "xray", plane(0), Modality="CR", SeriesInstanceUID="1.2")
    dicom(bad / "report", plane(0), Modality="SR", Rows=None, Columns=None, PixelData=None)
    dicom(bad / "nowhere", plane(0), ImagePositionPatient=None)
    dicom(bad / "single", plane(0), SeriesInstanceUID="1.5", SeriesDescription="alone")
    dicom(bad / "huge", plane(0), Rows=65535, Columns=65535)
    dicom(bad / "skew", plane(0), ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0])
    dicom(bad / "flat", plane(0), PixelSpacing=[0, 1])
    (bad / "notes.txt").write_text("hello")
    (bad / "empty").write_bytes(b"")
    (bad / "almost.dcm").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI")
    (bad / "zeros.dcm").write_bytes(b"\x08\x00" + bytes(500))
    (bad / ".hidden").write_text("x")
    study = read_study(tmp_path)
    assert [s.shape for s in study.scans] == [(3, 6, 5)]
    text = reasons(study)
    for name, reason in {
        "scout": "a localizer (image type LOCALIZER)",
        "rgb": "a colour picture (RGB)",
        "capture": "a secondary capture",
        "mosaic": "a mosaic",
        "seg": "not an image but a segmentation (SEG)",
        "xray": "a projection, ultrasound or photograph (CR)",
        "report": "not an image but a structured report (SR)",
        "nowhere": "no position and orientation",
        "single": "alone: only 1 slice, fewer than min_slices=3",
        "huge": "65535 x 65535 x 1 voxels in one file: more than the limit of 1073741824",
        "skew": "orientation in the header is not two unit vectors at a right angle",
        "flat": "no valid pixel spacing",
        "notes.txt": "not an image file",
        "empty": "not an image file",
        "almost.dcm": "",
        "zeros.dcm": "",
        ".hidden": "a hidden file",
    }.items():
        assert f"{name}: {reason}" in text
    assert len(study.skipped) == 17 and study.warning() == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("preamble", [True, False])
def test_dicomdir_is_not_followed(tmp_path, preamble):
    outside = tmp_path / "outside"
    stack(outside, [0, 1, 2])
    inside = tmp_path / "study"
    record = Dataset()
    record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", ["OUTSIDE", "S0"]
    d = dicom(inside / "DICOMDIR", plane(0), DirectoryRecordSequence=[record], PixelData=None, Rows=None, Modality=None)
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = "1.2.840.10008.1.3.10"
    d.save_as(inside / "DICOMDIR", enforce_file_format=preamble)
    assert "a DICOMDIR: it only lists other files, and is not followed" in reasons(failure(inside))


@pytest.mark.parametrize("each", [1, 4])
def test_localizers_by_geometry(tmp_path, each):
    for k, (orientation, normal) in enumerate([(AXIAL, (0, 0, 1)), (CORONAL, (0, 1, 0)), (SAGITTAL, (-1, 0, 0))]):
        stack(tmp_path, range(each), name=f"{k}_", normal=normal, ImageOrientationPatient=list(orientation))
    text = reasons(failure(tmp_path))
    assert f"scan: {3 * each} slices in 3" in text and "a localizer" in text


def test_truncated_slices_are_dropped_with_a_note(tmp_path):
    stack(tmp_path, [0, 1, 2, 3, 4, 5], cut=[0, 0, 2, 0, 0, 0])
    study = read_study(tmp_path)
    (scan,) = study.scans
    np.testing.assert_array_equal(array(scan), np.stack([plane(i) for i in (0, 1, 3, 4, 5)]))
    assert "1 of 6 slices left out: their pixels could not be decoded" in scan.notes and scan.files == 5
    assert "s2: scan: pixel data cut short" in reasons(study)
    assert study.warning() == "1 file could not be read: 1 x scan: pixel data cut short"


def test_a_damaged_series_does_not_harm_the_others(tmp_path):
    stack(tmp_path, [0, 1, 2], name="good", SeriesInstanceUID="1.1", SeriesDescription="good")
    stack(tmp_path, [0, 1, 2], name="bad", SeriesInstanceUID="1.2", SeriesDescription="bad", cut=10)
    (tmp_path / "broken.nii.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    study = read_study(tmp_path)
    assert [s.name for s in study.scans] == ["good"]
    assert "bad: pixel data cut short" in reasons(study) and "broken.nii.gz: " in reasons(study)


def test_images_that_share_an_instance_uid_are_no_copies(tmp_path):
    """As some tools for anonymising leave them: told apart by position, series, or what tells volumes apart."""
    stack(tmp_path, [0, 1, 2, 3], name="a", SOPInstanceUID="1.9")
    stack(tmp_path, [0, 1, 2, 3], name="b", first=10, SOPInstanceUID="1.9", SeriesInstanceUID="1.2.3.5", SeriesNumber=2)
    stack(tmp_path, [0, 1, 2, 3], name="c", first=20, SOPInstanceUID="1.9", EchoTime=90.0)
    study = read_study(tmp_path)
    assert study.skipped == [] and [array(s)[0, 0, 0] for s in study.scans] == [0, 2000, 1000]
    shutil.copytree(tmp_path, tmp_path / "again")
    study = read_study(tmp_path)
    assert len(study.scans) == 3 and sum(item.files for item in study.skipped) == 12


def test_copies_are_used_once_and_only_if_needed(tmp_path):
    stack(tmp_path / "b", [0, 1, 2, 3])
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    study = read_study(tmp_path)
    assert study.scans[0].shape[0] == 4 and study.scans[0].notes == [] and study.scans[0].files == 4
    assert [item.files for item in study.skipped] == [4] and "same SOPInstanceUID" in reasons(study)
    # The first copy of one slice is cut short: the second one serves.
    damaged = (tmp_path / "b" / "s1").read_bytes()
    (tmp_path / "b" / "s1").write_bytes(damaged[:-20])
    study = read_study(tmp_path)
    np.testing.assert_array_equal(array(study.scans[0]), np.stack([plane(i) for i in range(4)]))


def test_patients_that_were_mixed_up_are_noted_without_naming_them(tmp_path):
    stack(tmp_path, [0, 1, 2], name="a", SeriesInstanceUID="1.1", PatientID="SECRET-1", StudyInstanceUID="5.1")
    stack(tmp_path, [0, 1, 2], name="b", SeriesInstanceUID="1.2", PatientID="SECRET-2", StudyInstanceUID="5.2")
    study = read_study(tmp_path)
    assert "2 different patients" in study.notes[0] and "2 different DICOM studies" in study.notes[1]
    assert "SECRET" not in str(study)


def test_names_from_headers_are_made_safe(tmp_path):
    stack(tmp_path, [0, 1, 2], SeriesDescription="T2\x1b[31m \u202eAX\x07\r\n Größe 头 " + "x" * 40,
          SpecificCharacterSet="ISO_IR 192")  # fmt: skip
    name = read_study(tmp_path).scans[0].name
    assert name.startswith("T2 [31m AX Größe 头 xx") and name.isprintable()
    assert clean_text("y" * 500) == "y" * 77 + "..."
    stack(tmp_path / "none", [0, 1, 2], SeriesDescription=None, SeriesNumber=7, SeriesInstanceUID="1.9")
    assert read_study(tmp_path / "none").scans[0].name == "series 7"


# --- paths ---------------------------------------------------------------------------------------------------------


def test_paths_with_nothing_to_read(tmp_path):
    assert "does not exist" in str(failure(tmp_path / "no" / "such"))
    assert "empty folder" in str(failure(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    error = failure(tmp_path)
    assert "1 x not an image file" in str(error) and "*.nii.gz" in str(error) and len(error.skipped) == 1
    assert "not an image file" in str(failure(tmp_path / "a.txt"))


def test_a_single_slice_file_can_be_read_if_asked_for(tmp_path):
    dicom(tmp_path / "one.dcm", plane(3))
    assert "min_slices=3" in str(failure(tmp_path / "one.dcm"))
    (scan,) = read_study(tmp_path / "one.dcm", min_slices=1).scans
    assert scan.shape == (1, 6, 5) and "a single slice" in scan.notes[0]


def test_limits_are_checked(tmp_path):
    stack(tmp_path, [0, 1, 2])
    assert "90 voxels" not in reasons(failure(tmp_path, max_voxels=89))
    assert "exceed the limit of 89" in reasons(failure(tmp_path, max_voxels=89))
    assert len(read_study(tmp_path, max_voxels=90).scans) == 1
    with pytest.raises(ValueError, match="min_slices must be at least 1"):
        read_study(tmp_path, min_slices=0)


def test_links_and_pipes(tmp_path):
    outside, study = tmp_path / "outside", tmp_path / "study"
    stack(outside, [0, 1, 2])
    volume(outside / "far.nii.gz")
    volume(study / "near.nii.gz")
    (study / "folder").symlink_to(outside)
    (study / "file.nii.gz").symlink_to(outside / "far.nii.gz")
    (study / "again.nii.gz").symlink_to(study / "near.nii.gz")
    (study / "dead.nii.gz").symlink_to(outside / "gone")
    (study / "loop").symlink_to(study)
    os.mkfifo(study / "pipe.nii.gz")
    found = read_study(study)
    assert [s.name for s in found.scans] == ["near"]
    text = reasons(found)
    for line in (
        "folder: a link to a folder elsewhere: not followed (follow_links does: ",
        "loop: a link to another folder of this study",
        "file.nii.gz: a link that leaves the study folder: not followed (follow_links does: ",
        "again.nii.gz: a link to another file of this study",
        "dead.nii.gz: a broken link",
        "pipe.nii.gz: not a regular file",
    ):
        assert line in text
    followed = read_study(study, follow_links=True)
    assert [s.name for s in followed.scans] == ["scan", "file", "near"]
    assert "folder/far.nii.gz: a link to another file of this study" in reasons(followed)


def test_iter_study_gives_the_same_one_at_a_time(tmp_path):
    stack(tmp_path, [0, 1, 2])
    volume(tmp_path / "T1.nii.gz")
    (tmp_path / "junk").write_text("x")
    items = list(iter_study(tmp_path))
    assert [i.name for i in items if isinstance(i, Scan)] == ["scan", "T1"] and len(items) == 3


def test_no_file_is_changed_and_text_of_a_study_is_complete(tmp_path):
    stack(tmp_path, [0, 1, 3, 4])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    text = str(read_study(tmp_path))
    assert "1 scan, 0 left out" in text and "note: 1 of 5 slices missing" in text
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


# --- finding studies -----------------------------------------------------------------------------------------------


def test_find_studies(tmp_path):
    for patient in ("p1", "p2"):
        for series in "12":
            uids = {"StudyInstanceUID": f"7.{patient[1]}", "SeriesInstanceUID": f"7.{patient[1]}.{series}"}
            stack(tmp_path / "dcm" / patient / series, [0, 1, 2], **uids)
        volume(tmp_path / "nii" / patient / "T1.nii.gz")
        volume(tmp_path / "nii" / patient / "derived" / "T2.nii.gz")
        volume(tmp_path / "bids" / patient / "anat" / "T1w.nii.gz")
        volume(tmp_path / "bids" / patient / "dwi" / "dwi.nii.gz")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").write_text("x")
    found = [str(p.relative_to(tmp_path)) for p in find_studies(tmp_path)]
    assert found == [f"{kind}/{patient}" for kind in ("bids", "dcm", "nii") for patient in ("p1", "p2")]
    assert find_studies(str(tmp_path / "nii" / "p1" / "T1.nii.gz")) == [tmp_path / "nii" / "p1" / "T1.nii.gz"]
    assert [len(read_study(p).scans) for p in find_studies(tmp_path)] == [2] * 6


def test_find_studies_never_joins_series_folders_across_studies(tmp_path):
    for i, (folder, uid) in enumerate([("s1", "7.1"), ("s2", "7.2"), ("s3", "7.1"), ("s4", "7.2")]):
        stack(tmp_path / folder, [0, 1, 2], StudyInstanceUID=uid, SeriesInstanceUID=f"8.{i}")
    assert [p.name for p in find_studies([tmp_path])] == ["s1", "s2", "s3", "s4"]


def test_find_studies_says_what_is_missing(tmp_path):
    with pytest.raises(StudyError, match="does not exist"):
        find_studies(tmp_path / "none")
    with pytest.raises(StudyError, match="no study under"):
        find_studies([tmp_path])


def test_the_package_needs_no_kernels():
    for path in (Path(__file__).parents[1] / "hlip" / "data").glob("*.py"):
        assert "hlip_kernels" not in path.read_text() and "pickle" not in path.read_text(), path.name


# --- real data -----------------------------------------------------------------------------------------------------


def summary(folder: str, **limits) -> list[tuple]:
    study = read_study(DATA / folder, **limits)
    return [(s.name, s.modality, s.shape, tuple(round(mm, 2) for mm in s.spacing), s.orientation) for s in study.scans]


@real
def test_real_mixed_mri():
    assert summary("brain-mri-mixed-dicom") == [
        ("mocoMEMPRAGE_220FOV RMS", "MR", (29, 192, 192), (6.0, 1.15, 1.15), "PIR"),
        ("AX FSE T2", "MR", (28, 512, 384), (5.0, 0.43, 0.43), "LPS"),
    ]
    study = read_study(DATA / "brain-mri-mixed-dicom")
    assert sorted(item.path.name for item in study.skipped) == ["36747043", "36747062", "README.md"]
    assert reasons(study).count("a mosaic") == 2 and all(s.notes == [] for s in study.scans)
    # SimpleITK's own series reader agrees on every voxel and on the geometry, but for the side it starts from.
    series = [p for p in sorted((DATA / "brain-mri-mixed-dicom").glob("3*")) if pydicom.dcmread(p).SeriesNumber == 6]
    names = [str(p) for p in sorted(series, key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])]
    peer = sitk.ReadImage(names)
    np.testing.assert_array_equal(array(study.scans[1]), sitk.GetArrayFromImage(peer))
    assert study.scans[1].image.GetDirection() == pytest.approx(peer.GetDirection(), abs=1e-6)
    assert study.scans[1].image.GetSpacing() == pytest.approx(peer.GetSpacing(), abs=1e-3)


@real
def test_real_nifti():
    shape, mm = (140, 160, 124), (1.0, 1.0, 1.0)
    names = [(name, "", shape, mm, "RAS") for name in ("FLAIR", "T1", "T2")]
    assert summary("brain-mri-stroke-nifti") == names
    name = "LIDC-IDRI-0314_1.56x1.56x4mm"
    assert summary("chest-ct-nifti") == [(name, "", (68, 256, 256), (4.0, 1.56, 1.56), "LPS")]


@real
def test_real_tilted_head_ct():
    assert summary("head-ct-tilted-dicom") == [("series 2", "CT", (28, 512, 512), (4.0, 0.49, 0.49), "LPS")]
    (scan,) = read_study(DATA / "head-ct-tilted-dicom").scans
    assert scan.notes == [
        "slice spacing uneven: 1.08 to 7 mm; the median is used",
        "gantry tilt 18.5°: slices kept as they are, not sheared back",
    ]
    assert array(scan).min() < -900 and array(scan).max() > 1500


@real
def test_real_folders_without_a_scan():
    expected = {
        "ct-phantom-study-dicom": ["a DICOMDIR", "a localizer", "a secondary capture", "a colour picture"],
        "dicom-messy/broken-headers": ["a radiotherapy dose", "only 1 slice", "not an image file"],
        "dicom-messy/dicomdir-tiny/98892003": ["ANGIO Projected", "FAST LOCALIZER", "T/S/C RF FAST PILOT"],
        "dicom-messy/enhanced-multiframe": ["10 frames without position"],
        "dicom-messy/non-image": ["a segmentation", "a structured report", "a radiotherapy plan"],
        "dicom-messy/scout-oblique": ["3 slices in 3 directions, no two of them parallel"],
        "dicom-messy/secondary-capture": ["a colour picture"],
        "dicom-messy/transfer-syntaxes": ["same SOPInstanceUID", "only 1 slice"],
    }
    for folder, words in expected.items():
        error = failure(DATA / folder)
        assert all(word in reasons(error) for word in words), folder


def test_other_formats_say_what_to_do(tmp_path):
    for name in ("a.mhd", "a.raw", "brain.MGZ", "c.img"):
        (tmp_path / name).write_bytes(b"ObjectType = Image" + bytes(200))
    for found in (read_study, find_studies):
        with pytest.raises(StudyError) as caught:
            found(tmp_path)
        text = str(caught.value)
        assert "1 x .mhd, a header whose voxels are in another file: convert it to .nii.gz" in text
        assert "1 x .MGZ, a format that is not read: convert it to .nii.gz" in text and ".img, a format" in text
    dicom(tmp_path / "c.img", np.zeros((4, 4), np.uint16))  # whatever it is named
    assert find_studies(tmp_path) == [tmp_path]


@real
def test_real_small_dicom_series():
    assert summary("dicom-messy/oblique-implicit") == [("series 10", "MR", (4, 64, 64), (4.0, 2.34, 2.34), "PIR")]
    assert summary("dicom-messy/dicomdir-tiny") == [
        ("Routine Brain", "CT", (4, 16, 16), (1.25, 0.49, 0.49), "LPS"),
        ("SmartScore - Gated 0.5 sec", "CT", (5, 16, 16), (2.5, 0.49, 0.49), "LPS"),
    ]
    study = read_study(DATA / "dicom-messy" / "dicomdir-tiny")
    assert study.scans[0].notes == ["161 of 165 slices missing"] and "2 different patients" in study.notes[0]


@real
@pytest.mark.parametrize("name", ["small_implicit", "small_bigendian", "small_RLE", "small_jp2klossless",
                                  "small_jpeg_ls_lossless"])  # fmt: skip
def test_real_transfer_syntaxes_agree(name):
    folder = DATA / "dicom-messy" / "transfer-syntaxes"
    (plain,) = read_study(folder / "MR_small.dcm", min_slices=1).scans
    (other,) = read_study(folder / f"MR_{name}.dcm", min_slices=1).scans
    np.testing.assert_array_equal(array(other), array(plain))
    assert other.image.GetSpacing() == plain.image.GetSpacing()


@real
def test_real_jpeg_lossless_with_a_damaged_sequence():
    (scan,) = read_study(DATA / "dicom-messy" / "transfer-syntaxes" / "bad_sequence.dcm", min_slices=1).scans
    assert scan.shape == (1, 512, 512) and (array(scan).min(), array(scan).max()) == (-1011, 1243)


@real
def test_real_truncated_pixels():
    error = failure(DATA / "dicom-messy" / "broken-headers" / "MR_truncated.dcm", min_slices=1)
    assert "pixel data cut short" in reasons(error)


@real
def test_real_data_as_one_tree(capfd):
    found = [p.relative_to(DATA).as_posix() for p in find_studies(DATA)]
    for folder in ("brain-mri-mixed-dicom", "brain-mri-stroke-nifti", "chest-ct-nifti", "head-ct-tilted-dicom"):
        assert folder in found
    assert "ct-phantom-study-dicom/S21570" in found and "dicom-messy/dicomdir-tiny/98892001" in found
    study = read_study(DATA)
    assert len(study.scans) == 10 and len({(s.uid, s.volume) for s in study.scans}) == 10
    assert capfd.readouterr() == ("", "")
