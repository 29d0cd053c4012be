"""DICOM headers: which files are slices of a scan, where each slice lies, and which files are not slices at all.

Only headers are read here, and only the elements named below; pixels come later (``pixels.py``). Nothing in a file
is followed to another file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, MediaStorageDirectoryStorage

from .study import clean_text

# Elements by which volumes at the same positions of one series are told apart, in order of preference. Each row: the
# words for a person, then the keywords, classic header first, enhanced (multi-frame) after it.
TELLERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("b-value", ("DiffusionBValue",)),
    ("echo time", ("EchoTime", "EffectiveEchoTime")),
    ("inversion time", ("InversionTime", "InversionTimes")),
    ("image type", ("FrameType", "ImageType")),
    ("kind of value", ("ComplexImageComponent",)),
    ("temporal position", ("TemporalPositionIndex", "TemporalPositionIdentifier")),
    ("cardiac phase", ("NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime", "TriggerTime")),
    ("sequence name", ("SequenceName",)),
    ("gradient direction", ("DiffusionGradientOrientation",)),
    ("flip angle", ("FlipAngle",)),
    ("repetition time", ("RepetitionTime",)),
    ("reconstruction kernel", ("ConvolutionKernel",)),
    ("stack", ("StackID",)),
    ("acquisition number", ("FrameAcquisitionNumber", "AcquisitionNumber")),
    ("acquisition time", ("FrameAcquisitionDateTime", "AcquisitionDateTime", "AcquisitionTime")),
    ("content time", ("ContentTime",)),
)

_PLAIN_TAGS = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID SeriesNumber SeriesDescription ProtocolName "
    "StudyDescription BodyPartExamined Modality PatientID ImageType Rows Columns NumberOfFrames SamplesPerPixel "
    "PhotometricInterpretation PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit FloatPixelPaddingValue "
    "FloatPixelPaddingRangeLimit DoubleFloatPixelPaddingValue DoubleFloatPixelPaddingRangeLimit ImageOrientationPatient "
    "ImagePositionPatient PixelSpacing RescaleSlope RescaleIntercept RescaleType InstanceNumber "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
).split()
_TAGS = [*_PLAIN_TAGS, *{keyword for _, keywords in TELLERS for keyword in keywords}]

_NOT_IMAGES = {
    "SEG": "a segmentation",
    "RTDOSE": "a radiotherapy dose",
    "RTSTRUCT": "radiotherapy contours",
    "RTPLAN": "a radiotherapy plan",
    "RTRECORD": "a radiotherapy record",
    "RTIMAGE": "a radiotherapy image",
    "SR": "a structured report",
    "PR": "a presentation state",
    "KO": "a list of key images",
    "REG": "a registration",
    "FID": "fiducials",
    "RWV": "a value mapping",
    "DOC": "a document",
}
_NOT_STACKS = set("CR DX MG IO PX RF US IVUS ES XC GM SM OP OPT ECG HD".split())
# Modalities and units whose values are measurements. MONOCHROME1 says how to show them: bone is 1000 HU in white and in black.
_MEASURED = {"CT", "PT", "HU"}
_SCOUT_WORDS = {"LOCALIZER", "SCOUT", "SURVEY", "SURVIEW", "TOPOGRAM"}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# pydicom inflates the whole file at once, to up to about 1000 times its size.
_MAX_DEFLATED_BYTES = 4 * 2**20


class NotASlice(ValueError):
    """A file that is not part of a scan; the message says why."""


class BrokenFile(NotASlice):
    """A file that does not parse, or contradicts itself: it may be part of a scan."""


@dataclass(frozen=True)
class Slice:
    """One slice: a classic file, or one frame of a multi-frame file. Geometry in mm, patient coordinates (LPS)."""

    path: Path
    frame: int
    rows: int
    columns: int
    row_direction: tuple[float, float, float]
    column_direction: tuple[float, float, float]
    position: tuple[float, float, float]
    pixel_spacing: tuple[float, float]  # between rows, between columns
    slope: float
    intercept: float
    inverted: bool
    padding: tuple[float, float] | None  # two stored values; they, and all between them, mean "no image here"
    instance: int
    tellers: tuple[float | str | None, ...]  # one value per row of TELLERS


@dataclass(frozen=True)
class Header:
    """One DICOM file of a scan."""

    path: Path
    uid: str
    study: str
    series: str
    patient: str
    number: int | None
    name: str
    modality: str
    body_part: str
    slices: tuple[Slice, ...]

    @property
    def sort_key(self) -> tuple:
        """Series number (those without one last), name, series UID."""
        return (self.number is None, self.number or 0, self.name, self.series)


def looks_like_dicom(path: Path) -> bool:
    """Whether the first bytes are a DICOM preamble, or a bare data set that begins at group 0002 or 0008."""
    try:
        with open(path, "rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:132] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00") or head[:3] == b"\x00\x08\x00"


def study_uid(path: Path) -> str:
    """The StudyInstanceUID of an image file (its folder, if it has none), or "" for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = _parse(path, ["SOPClassUID", "StudyInstanceUID", "Rows"])
            return str(dataset.get("StudyInstanceUID") or (path.parent if dataset.get("Rows") else ""))
        except Exception:  # a DICOMDIR, or a file that does not parse
            return ""


def read_header(path: Path, max_voxels: int) -> Header:
    """What one DICOM file holds.

    Raises:
        NotASlice: with a reason for a person; also for files that do not parse.
    """
    with warnings.catch_warnings():  # pydicom warns on every odd value
        warnings.simplefilter("ignore")
        try:
            dataset = _parse(path, _TAGS)
        except NotASlice:
            raise
        except Exception as error:  # pydicom raises many kinds on damaged files
            raise BrokenFile(f"damaged DICOM file ({clean_text(error, 120) or type(error).__name__})") from None
        _refuse_other_objects(dataset)
        return _header(path, dataset, max_voxels)


def _header(path: Path, dataset: Dataset, max_voxels: int) -> Header:
    top = _getter(dataset)
    frames = _frame_getters(dataset)
    rows, columns = _integer(top("Rows")) or 0, _integer(top("Columns")) or 0
    if rows * columns * len(frames) > max_voxels:
        raise NotASlice(f"{rows} x {columns} x {len(frames)} voxels in one file: more than the limit of {max_voxels}")
    slices = tuple(_slice(path, i, rows, columns, get) for i, get in enumerate(frames))
    number = _integer(top("SeriesNumber"))
    name = clean_text(_text(top("SeriesDescription")) or _text(top("ProtocolName")))
    about = [_text(top(k)) for k in ("BodyPartExamined", "ProtocolName", "StudyDescription")]
    return Header(
        path=path,
        uid=_text(top("SOPInstanceUID")),
        study=_text(top("StudyInstanceUID")),
        series=_text(top("SeriesInstanceUID")) or _series_without_uid(top, number, name, slices[0]),
        patient=_text(top("PatientID")),
        number=number,
        name=name or ("series without name" if number is None else f"series {number}"),
        modality=clean_text(_text(top("Modality")), 16).upper(),
        body_part=clean_text(" ".join(filter(None, about)), 200),
        slices=slices,
    )


def _series_without_uid(top: Callable[[str], object], number: int | None, name: str, first: Slice) -> str:
    """What stands for a missing SeriesInstanceUID: number and name, or else size and plane of the slices."""
    about: list[object] = [top("StudyInstanceUID"), top("Modality"), number, name]
    if number is None and not name:
        (a, b, c), (d, e, f) = first.row_direction, first.column_direction
        normal = [abs(b * f - c * e), abs(c * d - a * f), abs(a * e - b * d)]
        about += [first.rows, first.columns, ("sagittal", "coronal", "axial")[normal.index(max(normal))]]
    return clean_text("no series UID " + " ".join(_text(value) for value in about), 400)


def _parse(path: Path, tags: list[str]) -> Dataset:
    with open(path, "rb") as file:
        deflated = DeflatedExplicitVRLittleEndian.encode() in file.read(4096)
    if deflated and path.stat().st_size > _MAX_DEFLATED_BYTES:
        raise NotASlice(f"a deflated DICOM file of more than {_MAX_DEFLATED_BYTES >> 20} MB: not opened")
    dataset = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=tags)
    kinds = dataset.get("SOPClassUID"), dataset.file_meta.get("MediaStorageSOPClassUID")
    if MediaStorageDirectoryStorage in kinds:
        raise NotASlice("a DICOMDIR: it only lists other files, and is not followed")
    return dataset


def _refuse_other_objects(dataset: Dataset) -> None:
    """Raise ``NotASlice`` for everything that is not a grey-scale slice of a tomographic scan."""
    get = _getter(dataset)
    modality, kind = _text(get("Modality")).upper(), _text(get("SOPClassUID"))
    words = {word.upper() for word in _text(get("ImageType")).split("\\")}
    kind_name = clean_text(UID(kind).name if kind else "no SOP class", 60)
    if not (kind or modality or get("Rows")):
        raise NotASlice("not a DICOM image: it starts like one, but has neither modality nor size")
    if modality in _NOT_IMAGES:
        raise NotASlice(f"not an image but {_NOT_IMAGES[modality]} ({modality})")
    if not (_integer(get("Rows")) and _integer(get("Columns"))):
        raise NotASlice(f"no image in it ({kind_name})")
    colours = _text(get("PhotometricInterpretation")).upper()
    if (_integer(get("SamplesPerPixel")) or 1) > 1 or colours.startswith(("RGB", "YBR", "PALETTE")):
        raise NotASlice(f"a colour picture ({clean_text(colours, 20)}), not a grey-scale slice")
    if kind == _SECONDARY_CAPTURE or kind.startswith(_SECONDARY_CAPTURE + "."):
        raise NotASlice("a secondary capture (screenshot or result page), not a slice")
    if modality in _NOT_STACKS:
        raise NotASlice(f"a projection, ultrasound or photograph ({modality}), not a slice")
    if words & _SCOUT_WORDS:
        raise NotASlice(f"a localizer (image type {clean_text(min(words & _SCOUT_WORDS), 20)})")
    if "MOSAIC" in words:
        raise NotASlice("a mosaic (many slices tiled into one picture)")


def _frame_getters(dataset: Dataset) -> list[Callable[[str], object]]:
    """Per frame a function keyword -> value, which looks in the frame's, the shared and the top-level elements."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    frames = _integer(_getter(dataset)("NumberOfFrames"))
    if frames is None and "NumberOfFrames" in dataset:
        raise BrokenFile("its number of frames is not a number")
    frames = 1 if frames is None else frames
    if len(per_frame) == 0:
        if frames != 1:
            raise NotASlice(f"{frames} frames without position: the header does not say where each one lies")
        return [_getter(dataset, *(_flatten(item) for item in shared[:1]))]
    if len(per_frame) != frames:
        raise BrokenFile(f"damaged header: {frames} frames, but {len(per_frame)} frame descriptions")
    common = [_flatten(item) for item in shared[:1]]
    return [_getter(dataset, *common, _flatten(item)) for item in per_frame]


def _flatten(item: Dataset) -> Dataset:
    """All elements of the nested functional groups in one data set; the first one wins."""
    flat = Dataset()
    for element in item.iterall():
        if element.VR != "SQ" and element.tag not in flat:
            flat.add(element)
    return flat


def _getter(*datasets: Dataset) -> Callable[[str], object]:
    """keyword -> value in the last data set that has one; None where absent, empty or not decodable."""

    def get(keyword: str) -> object:
        for dataset in reversed(datasets):
            try:
                value = dataset.get(keyword)
            except Exception:  # a value that its type cannot hold, such as "1A" for an integer
                continue
            if value is not None and value != "":
                return value
        return None

    return get


def _slice(path: Path, frame: int, rows: int, columns: int, get: Callable[[str], object]) -> Slice:
    orientation = _numbers(get("ImageOrientationPatient"), 6)
    position = _numbers(get("ImagePositionPatient"), 3)
    spacing = _numbers(get("PixelSpacing"), 2)
    if orientation is None or position is None:
        raise NotASlice("no position and orientation in the header (ImagePositionPatient, ImageOrientationPatient)")
    if spacing is None or min(spacing) <= 0:
        raise NotASlice("no valid pixel spacing in the header (PixelSpacing)")
    row, column = orientation[:3], orientation[3:]
    across = sum(a * b for a, b in zip(row, column, strict=True))
    if max(abs(math.hypot(*row) - 1), abs(math.hypot(*column) - 1), abs(across)) > 0.01:
        raise NotASlice("orientation in the header is not two unit vectors at a right angle (ImageOrientationPatient)")
    slope, intercept = _number(get("RescaleSlope")), _number(get("RescaleIntercept"))
    measured = {_text(get("Modality")).upper(), _text(get("RescaleType")).upper()} & _MEASURED
    return Slice(
        path=path,
        frame=frame,
        rows=rows,
        columns=columns,
        row_direction=row,
        column_direction=column,
        position=position,
        pixel_spacing=spacing,
        slope=slope or 1.0,  # a slope of 0 would wipe the image: such headers mean "none"
        intercept=intercept or 0.0,
        inverted=not measured and _text(get("PhotometricInterpretation")).upper() == "MONOCHROME1",
        padding=_padding(get),
        instance=_integer(get("InstanceNumber")) or 0,
        tellers=tuple(_teller(get, keywords) for _, keywords in TELLERS),
    )


def _padding(get: Callable[[str], object]) -> tuple[float, float] | None:
    for kind in ("", "Float", "DoubleFloat"):
        value, limit = (_number(get(f"{kind}PixelPadding{end}")) for end in ("Value", "RangeLimit"))
        if value is not None:
            return value, value if limit is None else limit
    return None


def _teller(get: Callable[[str], object], keywords: tuple[str, ...]) -> float | str | None:
    for keyword in keywords:
        value = get(keyword)
        if value is not None:
            number = _number(value)
            return _text(value) if number is None else number
    return None


def _text(value: object) -> str:
    if value is None:
        return ""
    return "\\".join(str(v) for v in value) if isinstance(value, MultiValue | list | tuple) else str(value)


def _number(value: object) -> float | None:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _integer(value: object) -> int | None:
    number = _number(value)
    return None if number is None or number != int(number) else int(number)


def _numbers(value: object, count: int) -> tuple[float, ...] | None:
    if not isinstance(value, MultiValue | list | tuple) or len(value) != count:
        return None
    numbers = tuple(_number(v) for v in value)
    return None if None in numbers else numbers  # type: ignore[return-value]
