"""Pixels of DICOM slices, and the volume they make.

Uncompressed and run-length coded pixels are decoded by pydicom, which checks their length (GDCM does not: it fills
what is missing with whatever is in memory). JPEG, JPEG-LS and JPEG 2000 are decoded by the GDCM inside SimpleITK, so no
further package is needed; it is handed the bare code stream, and rescaling is done here, per slice.
"""

from __future__ import annotations

import math
import struct
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels import pixel_array
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from .dicom import Slice
from .quiet import quiet
from .series import Stack, heights, normal_of
from .study import Limits, Scan, Skipped, clean_text

_PIXEL_KEYWORDS = (
    "Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit "
    "PixelRepresentation ModalityLUTSequence PixelData FloatPixelData DoubleFloatPixelData"
).split()
# Multi-frame grey-scale word secondary capture: an object type that GDCM reads without any rescaling of its own.
_PLAIN_STACK = "1.2.840.10008.5.1.4.1.1.7.3"


class PixelError(ValueError):
    """Pixels that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Table:
    """What stored values mean, one by one, in the place of slope and intercept (ModalityLUTSequence)."""

    first: int  # the stored value of the first entry
    entries: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> Table | None:
        """The table of a file.

        Raises:
            PixelError: it is damaged.
        """
        try:
            if not dataset.get("ModalityLUTSequence"):
                return None
            item = dataset.ModalityLUTSequence[0]
            count, first, _ = item.LUTDescriptor
            count, data = count or 2**16, item.LUTData
            if isinstance(data, bytes):
                words = np.frombuffer(data, "<u2" if dataset.original_encoding[1] else ">u2").astype("<u2")
                data = words if len(words) >= count else words.view("u1")  # two entries to a word, the first one low
            entries = np.asarray(data).astype(np.uint16)[:count]
        except Exception as error:  # pydicom raises many kinds on damaged elements
            raise PixelError(f"its table of values (ModalityLUTSequence) is damaged ({clean_text(error, 120)})") from None
        if len(entries) != count:
            raise PixelError(f"its table of values (ModalityLUTSequence) is damaged: {len(entries)} of {count} entries")
        return cls(int(first), entries)

    def looked_up(self, plane: np.ndarray) -> np.ndarray:
        """Stored values below the table take its first entry, those above it its last."""
        first = np.array(self.first).astype(plane.dtype)  # is often written with the other sign, as padding is
        return self.entries[np.clip(plane.astype(np.int64) - int(first), 0, len(self.entries) - 1)]


@dataclass(frozen=True)
class Stored:
    """The pixels of a file before rescaling, (frames, rows, columns) in native byte order, and its table if it has one."""

    values: np.ndarray
    table: Table | None


def read_stack(stack: Stack, limits: Limits) -> tuple[Scan | None, list[Skipped]]:
    """Decode a stack into a scan. Files that cannot be decoded are left out, with a note on the scan.

    Returns:
        The scan, or None if fewer than ``min_slices`` could be decoded; and what was skipped.
    """
    header, notes = stack.header, list(stack.notes)
    first = stack.slices[0]
    if len(stack.slices) * first.rows * first.columns > limits.max_voxels:
        size = f"{first.columns} x {first.rows} x {len(stack.slices)}"
        reason = f"{header.name}: {size} voxels exceed the limit of {limits.max_voxels} (max_voxels)"
        return None, [Skipped(first.path, reason, stack.files)]
    failed: dict[Path, str] = {}
    frames: dict[Path, Stored] = {}
    slices = []
    for s in stack.slices:
        for path in (s.path, *stack.copies.get(s.path, ())):
            if s.path in frames or path in failed:
                continue
            try:
                frames[s.path] = stored_pixels(path, s.rows, s.columns)
            except PixelError as error:
                failed[path] = str(error)
        if s.path in frames:
            slices.append(s)
    skipped = _one_per_reason(failed, header.name)
    if len(slices) < limits.min_slices:
        return None, skipped
    if lost := len(stack.slices) - len(slices):
        notes.append(f"{lost} of {len(stack.slices)} slices left out: their pixels could not be decoded")
    voxels = finite(_values(slices, frames, header.modality, notes), notes)
    if voxels is None:
        return None, [*skipped, Skipped(first.path, f"{header.name}: no finite value in it", stack.files, broken=True)]
    image = sitk.GetImageFromArray(voxels)
    height = heights(slices)
    between = float(np.median(np.diff(height))) if len(slices) > 1 else 1.0
    image.SetSpacing((slices[0].pixel_spacing[1], slices[0].pixel_spacing[0], between))
    image.SetOrigin(slices[0].position)
    image.SetDirection(_direction(slices[0]))
    scan = Scan(
        image=image,
        name=header.name if stack.volumes == 1 else f"{header.name} [{stack.volume}]",
        modality=header.modality,
        number=header.number,
        files=len({s.path for s in slices}),
        notes=notes,
        body_part=header.body_part,
        uid=header.series,
        volume=stack.volume,
        path=slices[0].path,
        slices_known=True,
    )
    return scan, skipped


def _values(slices: list[Slice], frames: dict[Path, Stored], modality: str, notes: list[str]) -> np.ndarray:
    """What the stored values mean: (D, H, W)."""
    planes = [frames[s.path].values[s.frame] for s in slices]
    tables = [frames[s.path].table for s in slices]
    scales = [(s.slope, s.intercept) if t is None else (1.0, 0.0) for s, t in zip(slices, tables, strict=True)]
    meant = [plane if t is None else t.looked_up(plane) for plane, t in zip(planes, tables, strict=True)]
    voxels = _rescaled(meant, scales)
    padding = _padding(planes, slices, voxels, notes)
    inverted = np.array([s.inverted for s in slices])
    if inverted.any():
        some = "" if inverted.all() else f"{inverted.sum()} of {len(slices)} slices "
        notes.append(f"{some}stored with black and white swapped (MONOCHROME1): inverted")
        voxels = _inverted(voxels, inverted, padding)
    voxels = _darkened(voxels, padding, modality, notes)
    if modality == "CT" and voxels.min() >= 0:
        notes.append("no value below 0: these may not be Hounsfield units")
    return voxels


def _one_per_reason(failed: dict[Path, str], name: str) -> list[Skipped]:
    by_reason: dict[str, list[Path]] = {}
    for path, reason in failed.items():
        by_reason.setdefault(reason, []).append(path)
    return [Skipped(min(paths), f"{name}: {reason}", len(paths), broken=True) for reason, paths in by_reason.items()]


def _direction(s: Slice) -> tuple[float, ...]:
    """Direction cosines, row-major 3 x 3: columns are the ways in which x, y and z grow. Made exactly orthonormal."""
    row, normal = np.array(s.row_direction), normal_of(s)
    row = row / np.linalg.norm(row)
    return tuple(np.stack([row, np.cross(normal, row), normal], axis=1).ravel().tolist())


def finite(voxels: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """The array with NaN and infinity replaced by its smallest finite value (and a note); None if nothing is finite."""
    if voxels.dtype.kind != "f":
        return voxels
    good = np.isfinite(voxels)
    if good.all():
        return voxels
    if not good.any():
        return None
    notes.append(f"{int((~good).sum())} voxels were not numbers (NaN or infinite): set to the smallest value")
    return np.where(good, voxels, voxels[good].min())


def _rescaled(planes: list[np.ndarray], scales: list[tuple[float, float]]) -> np.ndarray:
    """Stored values x slope + intercept, slice by slice: (D, H, W) int16 or int32 where exact, else float32."""
    voxels = np.stack(planes)
    if voxels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # of float64; what becomes infinite is told of later
            voxels = voxels.astype(np.float32)
    if all(scale == (1.0, 0.0) for scale in scales):
        return voxels
    shape = (-1, 1, 1)
    slope = np.array([s for s, _ in scales]).reshape(shape)
    intercept = np.array([i for _, i in scales]).reshape(shape)
    whole = voxels.dtype.kind in "iu" and (slope == np.rint(slope)).all() and (intercept == np.rint(intercept)).all()
    bound = float(np.abs(slope).max()) * max(abs(int(voxels.min())), abs(int(voxels.max()))) if whole else 0.0
    if not whole or bound + float(np.abs(intercept).max()) >= 2**31:
        with np.errstate(over="ignore", invalid="ignore"):
            return voxels.astype(np.float32) * slope.astype(np.float32) + intercept.astype(np.float32)
    voxels = voxels.astype(np.int32) * slope.astype(np.int32) + intercept.astype(np.int32)
    small = np.iinfo(np.int16)
    return voxels.astype(np.int16) if small.min <= voxels.min() and voxels.max() <= small.max else voxels


def _inverted(voxels: np.ndarray, which: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """These slices turned over in the range of all: black of the one kind of slice becomes that of the other."""
    low, high = _range_without(padding, voxels)
    turned = voxels.copy()
    if voxels.dtype.kind == "f":
        turned[which] = (low + high) - voxels[which]
    else:
        turned[which] = (int(low) + int(high) - voxels[which].astype(np.int64)).astype(voxels.dtype)
    return turned


def _padding(planes: list[np.ndarray], slices: list[Slice], voxels: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """Where the headers declare padding (PixelPaddingValue): (D, H, W), or None for nowhere.

    Such values lie beyond those of the image. A declared value amid them is a mistake, or was right before some software
    shifted the values: to believe it would punch holes into the image.
    """
    if all(s.padding is None for s in slices):
        return None
    padding = np.stack([_declared(plane, s.padding) for plane, s in zip(planes, slices, strict=True)])
    if not padding.any() or padding.all():
        return None
    low, high = _range_without(padding, voxels)
    amid = padding & (voxels > low) & (voxels < high)
    if amid.any():
        notes.append(f"{int(amid.sum())} voxels of declared padding (PixelPaddingValue) have values amid the others: kept")
    return padding & ~amid


def _declared(plane: np.ndarray, padding: tuple[float, float] | None) -> np.ndarray:
    if padding is None:
        return np.zeros(plane.shape, bool)
    if plane.dtype.kind in "iu":  # a signed value is often written as an unsigned one, and the reverse
        with np.errstate(invalid="ignore"):  # a floating-point padding value that no integer is
            padding = tuple(np.array(padding).astype(np.int64).astype(plane.dtype))
    return (plane >= min(padding)) & (plane <= max(padding))


def _range_without(padding: np.ndarray | None, voxels: np.ndarray) -> tuple[np.number, np.number]:
    """Smallest and largest value elsewhere, numbers only (all, if there are none elsewhere)."""
    rest = voxels if padding is None or padding.all() else voxels[~padding]
    if rest.dtype.kind == "f" and np.isfinite(rest).any():
        rest = rest[np.isfinite(rest)]
    return rest.min(), rest.max()


def _darkened(voxels: np.ndarray, padding: np.ndarray | None, modality: str, notes: list[str]) -> np.ndarray:
    """Padding at the smallest of the other values, unless it is as dark as it is.

    That is, below the others in a CT, whose windows cut it off; close below them elsewhere.
    """
    if padding is None or not padding.any():
        return voxels
    low, high = (float(value) for value in _range_without(padding, voxels))
    darkest = -math.inf if modality == "CT" else low - 0.01 * (high - low)
    wrong = padding & ((voxels > low) | (voxels < darkest))
    if not wrong.any():
        return voxels
    notes.append(f"{int(wrong.sum())} voxels of padding (PixelPaddingValue): set to the smallest of the other values")
    return np.where(wrong, np.array(low, voxels.dtype), voxels)


def stored_pixels(path: Path, rows: int, columns: int) -> Stored:
    """Decode a file.

    Raises:
        PixelError: missing, truncated or damaged pixels, or a coding that cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True, specific_tags=_PIXEL_KEYWORDS)
            if not any(k in dataset for k in _PIXEL_KEYWORDS[-3:]):
                raise PixelError("no pixels in the file")
            syntax = UID(dataset.file_meta.get("TransferSyntaxUID", "") if hasattr(dataset, "file_meta") else "")
            if not syntax:  # a bare data set: pydicom has found out how it is encoded
                implicit, little = dataset.original_encoding
                explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                syntax = ImplicitVRLittleEndian if implicit else explicit
                dataset.file_meta = FileMetaDataset()
                dataset.file_meta.TransferSyntaxUID = syntax
            if not syntax.is_compressed or syntax == RLELossless or syntax.is_deflated:
                values = pixel_array(dataset, raw=True, decoding_plugin="pydicom" if syntax == RLELossless else "")
            else:
                values = _decoded_by_gdcm(dataset, syntax, rows, columns)
            table = Table.of(dataset)
    except PixelError:
        raise
    except Exception as error:  # pydicom raises many kinds on damaged pixels
        text = clean_text(error, 400)
        if "less than expected" in text:
            raise PixelError("pixel data cut short") from None
        raise PixelError(f"pixels cannot be decoded ({clean_text(text, 120) or type(error).__name__})") from None
    values = values.astype(values.dtype.newbyteorder("="), copy=False).reshape(-1, *values.shape[-2:])
    if values.shape[1:] != (rows, columns):
        raise PixelError(f"pixels are {values.shape[1]} x {values.shape[2]}, the header says {rows} x {columns}")
    return Stored(values, table)


def _decoded_by_gdcm(dataset: Dataset, syntax: UID, rows: int, columns: int) -> np.ndarray:
    frames = int(dataset.get("NumberOfFrames") or 1)
    streams = list(generate_frames(dataset.PixelData, number_of_frames=frames))
    if len(streams) != frames:
        raise PixelError(f"pixel data cut short: {len(streams)} of {frames} frames")
    for stream in streams:
        size = _coded_size(stream)
        if size != (rows, columns):
            found = "no size" if size is None else f"{size[0]} x {size[1]}"
            raise PixelError(f"damaged pixel data: its code stream says {found}, the header {rows} x {columns}")
    plain = Dataset()
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = syntax
    plain.file_meta.MediaStorageSOPClassUID = plain.SOPClassUID = _PLAIN_STACK
    plain.file_meta.MediaStorageSOPInstanceUID = plain.SOPInstanceUID = generate_uid()
    for keyword in _PIXEL_KEYWORDS[:9]:
        if keyword in dataset:
            plain[keyword] = dataset[keyword]
    plain.NumberOfFrames = frames
    plain.PhotometricInterpretation = "MONOCHROME2"
    plain.PixelData = dataset.PixelData
    plain["PixelData"].VR = "OB"
    plain["PixelData"].is_undefined_length = True
    with tempfile.TemporaryDirectory(prefix="hlip-") as folder:
        bare = Path(folder, "image.dcm")
        plain.save_as(bare, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(bare))
        try:
            with quiet():
                return sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError:
            coding = clean_text(syntax.name, 80)
            raise PixelError(f"pixels cannot be decoded ({coding}; damaged or not supported)") from None


def _coded_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 code stream declares, or None if it declares none."""
    start = stream.find(b"\xff\x4f\xff\x51", 0, 256)  # JPEG 2000: start of code stream, image size
    if start >= 0 and len(stream) >= start + 24:
        x1, y1, x0, y0 = struct.unpack(">4I", stream[start + 8 : start + 24])
        return y1 - y0, x1 - x0
    at = 2
    while at + 9 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # a fill byte; markers without a segment
            at += 1 if marker == 0xFF else 2
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # start of frame
            return struct.unpack(">2H", stream[at + 5 : at + 9])
        else:
            at += 2 + struct.unpack(">H", stream[at + 2 : at + 4])[0]
    return None
