"""DICOM series become scans: order, geometry, volumes at the same positions, values."""

from __future__ import annotations

import struct

import numpy as np
import pydicom
import pytest
from data_files import (
    AXIAL,
    CORONAL,
    SAGITTAL,
    array,
    compressed,
    dicom,
    enhanced,
    failure,
    plane,
    reasons,
    stack,
)
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from hlip.data import read_study

# --- DICOM: order and geometry -------------------------------------------------------------------------------------


def test_slices_are_sorted_by_position_whatever_their_names_and_numbers(tmp_path):
    rng = np.random.default_rng(0)
    for copy in "ab":
        names, numbers = rng.permutation(9), rng.permutation(9)
        for i in range(9):
            dicom(tmp_path / copy / f"{names[i]:03d}.x", plane(i), ImagePositionPatient=[7, 8, 2.5 * i - 3],
                  InstanceNumber=int(numbers[i]))  # fmt: skip
    a, b = read_study(tmp_path / "a"), read_study(tmp_path / "b")
    (scan,) = a.scans
    np.testing.assert_array_equal(array(scan), np.stack([plane(i) for i in range(9)]))
    assert scan.shape == (9, 6, 5)
    assert scan.spacing == pytest.approx((2.5, 2, 1.5))  # positions, not the SliceThickness of 9
    assert scan.image.GetOrigin() == (7, 8, -3)
    assert scan.orientation == "LPS" and scan.notes == [] and scan.files == 9 and a.skipped == [] and scan.slices_known
    np.testing.assert_array_equal(array(scan), array(b.scans[0]))


@pytest.mark.parametrize(
    ("orientation", "normal", "code"),
    [(AXIAL, (0, 0, 1), "LPS"), (CORONAL, (0, 1, 0), "LIP"), (SAGITTAL, (-1, 0, 0), "PIR")],
)
def test_geometry_is_kept_for_every_plane(tmp_path, orientation, normal, code):
    stack(tmp_path, [0, 3, 6, 9], normal=normal, ImageOrientationPatient=list(orientation))
    (scan,) = read_study(tmp_path).scans
    assert scan.orientation == code
    corner = scan.image.TransformContinuousIndexToPhysicalPoint((0, 0, 3))
    assert corner == pytest.approx([9 * n for n in normal])
    assert scan.image.TransformContinuousIndexToPhysicalPoint((1, 0, 0)) == pytest.approx([1.5 * r for r in orientation[:3]])


def test_uneven_spacing_uses_the_median_and_says_so(tmp_path):
    stack(tmp_path, [0, 4, 8, 12, 13.1, 20.1, 27.1])
    (scan,) = read_study(tmp_path).scans
    assert scan.shape[0] == 7
    assert scan.spacing[0] == pytest.approx(4)
    assert scan.notes == ["slice spacing uneven: 1.1 to 7 mm; the median is used"]


def test_missing_slices_are_counted(tmp_path):
    stack(tmp_path, [0, 5, 10, 20, 25, 30, 35, 45, 50])
    (scan,) = read_study(tmp_path).scans
    assert scan.notes == ["2 of 11 slices missing"] and scan.spacing[0] == pytest.approx(5)


def test_gantry_tilt_is_noted_and_spacing_measured_along_the_normal(tmp_path):
    angle = np.radians(18.5)
    tilted = [1, 0, 0, 0, float(np.cos(angle)), float(-np.sin(angle))]
    stack(tmp_path, [0, 4, 8, 12], ImageOrientationPatient=tilted, Modality="CT", SOPClassUID=CTImageStorage,
          RescaleIntercept=-1024, RescaleSlope=1)  # fmt: skip
    (scan,) = read_study(tmp_path).scans
    assert scan.spacing[0] == pytest.approx(4 * np.cos(angle), abs=1e-5)
    assert scan.notes == ["gantry tilt 18.5°: slices kept as they are, not sheared back"]


def test_scans_are_ordered_by_series_number_then_name_then_uid(tmp_path):
    for i, (number, text) in enumerate([(10, "b"), (2, "z"), (10, "a"), (None, "none")]):
        tags = {"SeriesNumber": number} if number else {"SeriesNumber": None}
        stack(tmp_path, [0, 1, 2], name=f"{9 - i}_", SeriesInstanceUID=f"1.{i}", SeriesDescription=text, **tags)
    study = read_study(tmp_path)
    assert [(s.number, s.name) for s in study.scans] == [(2, "z"), (10, "a"), (10, "b"), (None, "none")]


def test_pixel_spacings_that_differ_by_rounding_are_one_scan_and_others_are_not(tmp_path):
    near = [[0.48499, 0.48501], [0.48501, 0.48499], [0.485, 0.485], [0.48499, 0.48499]]
    stack(tmp_path, [0, 1, 2, 3], PixelSpacing=near)
    (scan,) = read_study(tmp_path).scans
    assert scan.shape[0] == 4 and scan.notes == []
    stack(tmp_path, [0, 1, 2], name="t", PixelSpacing=[[0.5, 0.5]] * 3)
    assert sorted(s.shape[0] for s in read_study(tmp_path).scans) == [3, 4]


@pytest.mark.parametrize("uid", [None, ""])
def test_series_without_uid_are_told_apart_by_number_and_name(tmp_path, uid):
    for i, (number, name) in enumerate([(1, "T1"), (2, "T2"), (2, "FLAIR")]):
        stack(tmp_path, [0, 1, 2], name=name, first=10 * i, SeriesInstanceUID=uid, SeriesNumber=number, SeriesDescription=name)
    scans = read_study(tmp_path).scans
    assert [(s.name, int(array(s)[0, 0, 0])) for s in scans] == [("T1", 0), ("FLAIR", 2000), ("T2", 1000)]
    assert all(s.notes == [] for s in scans) and len({s.uid for s in scans}) == 3


def test_series_without_uid_number_and_name_are_told_apart_by_plane_and_size(tmp_path):
    nothing = dict(SeriesInstanceUID=None, SeriesNumber=None, SeriesDescription=None)
    stack(tmp_path, [0, 1, 2], name="a", **nothing)
    stack(tmp_path, [0, 1, 2], name="b", normal=(0, 1, 0), ImageOrientationPatient=list(CORONAL), **nothing)
    for i in range(3):
        dicom(tmp_path / f"c{i}", plane(i, (8, 8)), ImagePositionPatient=[0, 0, i], **nothing)
    scans = read_study(tmp_path).scans
    assert sorted((s.shape, s.orientation) for s in scans) == [((3, 6, 5), "LIP"), ((3, 6, 5), "LPS"), ((3, 8, 8), "LPS")]
    assert {s.name for s in scans} == {"series without name"}


# --- DICOM: several volumes in one series --------------------------------------------------------------------------


def test_two_echoes_at_the_same_positions_become_two_scans(tmp_path):
    heights = [0, 3, 6, 9]
    stack(tmp_path, heights, name="long", first=50, EchoTime=90.0)
    stack(tmp_path, heights, name="short", first=0, EchoTime=12.0)
    study = read_study(tmp_path)
    assert [s.name for s in study.scans] == ["scan [0]", "scan [1]"]
    np.testing.assert_array_equal(array(study.scans[0]), np.stack([plane(i) for i in range(4)]))
    np.testing.assert_array_equal(array(study.scans[1]), np.stack([plane(50 + i) for i in range(4)]))
    assert study.scans[0].notes == ["volume 1 of 2 at the same positions, told apart by echo time (12)"]


def test_diffusion_needs_two_elements_and_is_capped(tmp_path):
    heights = [0, 3, 6]
    for k, (b, direction) in enumerate([(1000, "x"), (0, "x"), (1000, "y"), (1000, "z")]):
        tags = {"DiffusionBValue": float(b), "SequenceName": f"ep_{b}_{direction}"}
        stack(tmp_path, heights, name=f"v{k}_", first=10 * k, **tags)
    study = read_study(tmp_path)
    assert len(study.scans) == 2
    np.testing.assert_array_equal(array(study.scans[0])[0], plane(10))  # b = 0 first
    assert "only the first 2 of 4 volumes are kept (max_volumes)" in study.scans[0].notes
    assert "volumes beyond the first 2 of 4" in reasons(study)
    assert sum(item.files for item in study.skipped) == 6
    assert len(read_study(tmp_path, max_volumes=9).scans) == 4


def test_volumes_without_a_telling_element_follow_instance_numbers(tmp_path):
    heights = [0, 3, 6, 9]
    stack(tmp_path, heights, name="a", first=20, InstanceNumber=[8, 7, 6, 5])
    stack(tmp_path, heights, name="b", first=0, InstanceNumber=[1, 2, 3, 4])
    study = read_study(tmp_path)
    assert [array(s)[:, 0, 0].tolist() for s in study.scans] == [[0, 100, 200, 300], [2000, 2100, 2200, 2300]]
    assert "instance numbers" in study.scans[0].notes[0]


@pytest.mark.parametrize("numbers", [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_a_few_repeated_slices_do_not_make_a_volume(tmp_path, numbers):
    stack(tmp_path, [0, 3, 6, 9, 12, 15], AcquisitionNumber=numbers)
    stack(tmp_path, [6], name="again", first=70, InstanceNumber=99, AcquisitionNumber=2)
    study = read_study(tmp_path)
    (scan,) = study.scans
    np.testing.assert_array_equal(array(scan), np.stack([plane(i) for i in range(6)]))
    assert scan.notes == ["1 slice at positions already taken left out"]
    assert "1 slice at positions already taken" in reasons(study)


def test_stacks_of_two_directions_in_one_series_become_two_scans(tmp_path):
    angle = np.radians(20)
    turned = [1, 0, 0, 0, float(np.cos(angle)), float(np.sin(angle))]
    stack(tmp_path, [0, 3, 6, 9], name="a")
    normal = (0, -np.sin(angle), np.cos(angle))
    stack(tmp_path, [100, 103, 106], name="b", normal=normal, ImageOrientationPatient=turned)
    study = read_study(tmp_path)
    assert [s.shape[0] for s in study.scans] == [4, 3]
    assert [s.name for s in study.scans] == ["scan [0]", "scan [1]"]
    assert "2 stacks of different direction or size" in study.scans[1].notes[0]


def test_one_series_of_two_sizes_becomes_two_scans(tmp_path):
    stack(tmp_path, [0, 3, 6], name="a")
    for i in range(4):
        dicom(tmp_path / f"b{i}", plane(i, (8, 8)), ImagePositionPatient=[0, 0, i])
    assert sorted(s.shape for s in read_study(tmp_path).scans) == [(3, 6, 5), (4, 8, 8)]


# --- DICOM: multi-frame --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_multi_frame_files_are_sorted_and_rescaled_frame_by_frame(tmp_path, syntax):
    frames = np.stack([plane(i, dtype=np.uint16) for i in (2, 0, 3, 1)])
    enhanced(tmp_path / "e", frames, [6, 0, 9, 3], scales=[(2, 1), (1, 0), (3, 2), (1, 5)], syntax=syntax)
    (scan,) = read_study(tmp_path / "e").scans
    assert scan.spacing == pytest.approx((3, 2, 1.5)) and scan.files == 1
    expected = np.stack([plane(0), plane(1) + 5, plane(2) * 2 + 1, plane(3) * 3 + 2])
    np.testing.assert_array_equal(array(scan), expected)


def test_multi_frame_file_of_two_time_points(tmp_path):
    frames = np.stack([plane(i, dtype=np.uint16) for i in range(8)])
    enhanced(tmp_path / "e", frames, [0, 3, 6, 9] * 2, times=[1] * 4 + [2] * 4)
    study = read_study(tmp_path)
    assert [s.shape[0] for s in study.scans] == [4, 4]
    np.testing.assert_array_equal(array(study.scans[1]), frames[4:])


def test_multi_frame_without_or_with_too_few_positions_is_skipped(tmp_path):
    frames = np.stack([plane(i, dtype=np.uint16) for i in range(4)])
    dicom(tmp_path / "bare", frames)
    enhanced(tmp_path / "short", frames, [0, 3, 6, 9], missing=True)
    text = reasons(failure(tmp_path))
    assert "4 frames without position" in text and "4 frames, but 3 frame descriptions" in text


# --- DICOM: values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype", "kind"),
    [(1, -1024, np.uint16, np.int16), (2, 10, np.int16, np.int16), ("1.5", "0.25", np.int16, np.float32),
     (1000, 0, np.uint16, np.int32)],
)  # fmt: skip
def test_rescaling(tmp_path, slope, intercept, dtype, kind):
    for i in range(3):
        dicom(tmp_path / str(i), plane(i, dtype=dtype), ImagePositionPatient=[0, 0, i], RescaleSlope=slope,
              RescaleIntercept=intercept)  # fmt: skip
    voxels = array(read_study(tmp_path).scans[0])
    assert voxels.dtype == kind
    expected = np.stack([plane(i) for i in range(3)]) * float(slope) + float(intercept)
    np.testing.assert_array_equal(voxels, expected)


def test_slope_that_differs_between_slices_and_slope_zero(tmp_path):
    stack(tmp_path, [0, 1, 2], RescaleSlope=["2", "0", "0.5"], RescaleIntercept="0")
    voxels = array(read_study(tmp_path).scans[0])
    np.testing.assert_allclose(voxels, np.stack([plane(0) * 2.0, plane(1), plane(2) * 0.5]))


def test_monochrome1_is_inverted(tmp_path):
    stack(tmp_path, [0, 1, 2], PhotometricInterpretation="MONOCHROME1")
    (scan,) = read_study(tmp_path).scans
    stored = np.stack([plane(i) for i in range(3)])
    np.testing.assert_array_equal(array(scan), stored.max() + stored.min() - stored)
    assert "MONOCHROME1" in scan.notes[0]


@pytest.mark.parametrize("tags", [dict(Modality="CT"), dict(Modality="PT"), dict(Modality="OT", RescaleType="HU")])
def test_measured_values_are_not_inverted(tmp_path, tags):
    stack(tmp_path, [0, 1, 2], RescaleIntercept=-1024, RescaleSlope=1, PhotometricInterpretation="MONOCHROME1", **tags)
    (scan,) = read_study(tmp_path).scans
    np.testing.assert_array_equal(array(scan), np.stack([plane(i) - 1024 for i in range(3)]))
    assert scan.notes == []


def test_only_the_slices_that_are_monochrome1_are_inverted(tmp_path):
    shown = np.stack([plane(i) for i in range(4)])
    shown[:, 0, 0] = 0  # black somewhere in every slice
    for i, values in enumerate(shown):
        kind, stored = ("MONOCHROME1", 500 - values) if i % 2 else ("MONOCHROME2", values)
        dicom(tmp_path / str(i), stored, ImagePositionPatient=[0, 0, i], PhotometricInterpretation=kind)
    (scan,) = read_study(tmp_path).scans
    np.testing.assert_array_equal(array(scan), shown)
    assert scan.notes == ["2 of 4 slices stored with black and white swapped (MONOCHROME1): inverted"]


def test_ct_without_negative_values_is_noted(tmp_path):
    stack(tmp_path, [0, 1, 2], Modality="CT")
    assert "may not be Hounsfield units" in read_study(tmp_path).scans[0].notes[0]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(("dtype", "first", "bits"), [(np.uint16, 3, 16), (np.int16, -4, 12), (np.uint16, 0, 8)])
def test_a_table_of_values_takes_the_place_of_slope_and_intercept(tmp_path, dtype, first, bits, syntax):
    table = (np.arange(200) ** 2 % 10007 % 2**bits).astype(np.uint16)
    words = table if bits > 8 else table[::2] + 256 * table[1::2]
    for i in range(3):
        item = Dataset()
        item.LUTDescriptor, item.ModalityLUTType = [len(table), first, bits], "US"
        item.add_new("LUTData", "OW", words.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes())
        dicom(tmp_path / str(i), plane(0, dtype=dtype) + dtype(9 * i), ImagePositionPatient=[0, 0, i], syntax=syntax,
              ModalityLUTSequence=[item], RescaleSlope=2, RescaleIntercept=7)  # fmt: skip
    voxels = array(read_study(tmp_path).scans[0])
    stored = np.stack([plane(0) + 9 * i for i in range(3)])
    np.testing.assert_array_equal(voxels, table[np.clip(stored - first, 0, 199)])


def test_a_damaged_table_of_values_leaves_the_slice_out(tmp_path):
    stack(tmp_path, [0, 1, 2, 3])
    for name, descriptor in (("s0", [90, 0, 16]), ("s1", None)):
        d, item = pydicom.dcmread(tmp_path / name), Dataset()
        item.add_new("LUTData", "OW", bytes(40))
        if descriptor:
            item.LUTDescriptor = descriptor
        d.ModalityLUTSequence = [item]
        d.save_as(tmp_path / name)
    text = reasons(failure(tmp_path))
    assert "ModalityLUTSequence) is damaged: 40 of 90 entries" in text and text.count("ModalityLUTSequence) is damaged") == 2


PADDED = "voxels of padding (PixelPaddingValue): set to the smallest of the other values"


def padded(tmp_path, value, dtype=np.int16, *, shift=0, **tags):
    """Three slices of 0 to 229 whose first column is ``value``, and the scan that they become."""
    for i in range(3):
        stored = plane(i, dtype=dtype) + dtype(shift)
        stored[:, 0] = value
        dicom(tmp_path / str(i), stored, ImagePositionPatient=[0, 0, i], **tags)
    (scan,) = read_study(tmp_path).scans
    return scan, array(scan)[:, :, 0], array(scan)[:, :, 1:]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(("value", "dtype"), [(65535, np.uint16), (-2000, np.int16), (32767, np.int16)])
def test_padding_becomes_background(tmp_path, value, dtype, syntax):
    scan, padding, rest = padded(tmp_path, value, dtype, syntax=syntax, PixelPaddingValue=value)
    assert (padding == 1).all() and rest.min() == 1 and rest.max() == 229
    assert scan.notes == [f"18 {PADDED}"]


def test_padding_of_a_ct_stays_below_and_does_not_stay_above(tmp_path):
    tags = dict(Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)
    scan, padding, _ = padded(tmp_path / "below", -2000, **tags, PixelPaddingValue=-2000)
    assert (padding == -3024).all() and scan.notes == []
    scan, padding, rest = padded(tmp_path / "above", 65535, np.uint16, **tags, PixelPaddingValue=65535)
    assert (padding == -1023).all() and rest.min() == -1023 and scan.notes == [f"18 {PADDED}"]


def test_padding_written_with_the_other_sign_a_range_and_inverted_slices(tmp_path):
    padded(tmp_path / "sign", -2000, PixelPaddingValue=-2000)
    for path in (tmp_path / "sign").iterdir():
        raw = path.read_bytes()
        assert raw.count(b"\x28\0\x20\1SS") == 1
        path.write_bytes(raw.replace(b"\x28\0\x20\1SS", b"\x28\0\x20\1US"))
    assert (array(read_study(tmp_path / "sign").scans[0])[:, :, 0] == 1).all()
    _, padding, rest = padded(tmp_path / "range", [900, 905, 910, 915, 920, 925], PixelPaddingValue=925,
                              PixelPaddingRangeLimit=900)  # fmt: skip
    assert (padding == 1).all() and rest.max() == 229
    tags = dict(PixelPaddingValue=65535, PhotometricInterpretation="MONOCHROME1")
    _, padding, rest = padded(tmp_path / "inverted", 65535, np.uint16, **tags)
    assert (padding == 1).all() and rest.min() == 1 and rest[0, 0, 0] == 229


def test_padding_that_is_dark_already_or_amid_the_image_is_kept(tmp_path):
    scan, padding, _ = padded(tmp_path / "dark", 0, PixelPaddingValue=0)
    assert (padding == 0).all() and scan.notes == []
    scan, padding, _ = padded(tmp_path / "amid", 0, Modality="CT", shift=-100, PixelPaddingValue=0)  # water
    assert (padding == 0).all() and "amid the others: kept" in scan.notes[0]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_uncompressed_and_run_length_coding(tmp_path, syntax):
    stack(tmp_path, [0, 1, 2], syntax=syntax)
    np.testing.assert_array_equal(array(read_study(tmp_path).scans[0]), np.stack([plane(i) for i in range(3)]))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_data_sets_without_preamble_and_file_meta(tmp_path, syntax):
    stack(tmp_path, [0, 1, 2], syntax=syntax, meta=False)
    assert (tmp_path / "s0").read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(array(read_study(tmp_path).scans[0]), np.stack([plane(i) for i in range(3)]))


def test_compressed_pixels_are_rescaled_once_and_checked(tmp_path):
    for i in range(4):
        compressed(tmp_path / str(i), plane(i, (32, 24), np.uint16), ImagePositionPatient=[0, 0, i],
                   RescaleSlope=2, RescaleIntercept=-1000, PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    (scan,) = read_study(tmp_path).scans
    values = np.stack([plane(i, (32, 24)) * 2 - 1000 for i in range(4)])
    np.testing.assert_array_equal(array(scan), values.max() + values.min() - values)
    # A code stream whose own size is not that of the header never reaches the decoder.
    data = bytearray((tmp_path / "3").read_bytes())
    at = data.find(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">2I", 2**30, 2**30)
    (tmp_path / "3").write_bytes(data)
    study = read_study(tmp_path)
    assert study.scans[0].shape[0] == 3 and "code stream says 1073741824 x 1073741824" in reasons(study)


def test_coding_that_no_decoder_knows_is_skipped(tmp_path):
    stack(tmp_path, [0, 1, 2])
    for path in list(tmp_path.iterdir()):
        d = pydicom.dcmread(path)
        d.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
        d.PixelData = pydicom.encaps.encapsulate([b"\x00\x00\x01\xb3" + bytes(60)])
        d["PixelData"].VR, d["PixelData"].is_undefined_length = "OB", True
        d.save_as(path)
    assert "damaged pixel data" in reasons(failure(tmp_path))
