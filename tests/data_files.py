"""Writers of awkward image files for the tests of hlip.data, and where the real ones lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from hlip.data import Scan, StudyError, read_study

DATA = Path(os.environ.get("HLIP_DATA") or Path(__file__).parents[2] / "shared" / "data")
AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)


def dicom(path: Path, pixels: np.ndarray, *, syntax=ExplicitVRLittleEndian, cut: int = 0, meta=True, **tags) -> Dataset:
    """Write one DICOM file; ``cut`` bytes are missing from the pixel data; ``tags`` override, None removes."""
    d = Dataset()
    d.SOPClassUID, d.SOPInstanceUID = MRImageStorage, generate_uid()
    d.StudyInstanceUID, d.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    d.Modality, d.SeriesNumber, d.SeriesDescription, d.InstanceNumber = "MR", 1, "scan", 1
    d.PatientID, d.ImageType = "p", ["ORIGINAL", "PRIMARY", "M"]
    d.ImageOrientationPatient, d.ImagePositionPatient, d.PixelSpacing = list(AXIAL), [0, 0, 0], [2, 1.5]
    d.SliceThickness = 9
    d.Rows, d.Columns = pixels.shape[-2:]
    d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
    d.BitsAllocated = d.BitsStored = pixels.dtype.itemsize * 8
    d.HighBit, d.PixelRepresentation = d.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        d.NumberOfFrames = len(pixels)
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    raw = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    d.PixelData = raw[: len(raw) - cut]
    d["PixelData"].VR = "OW"
    for keyword, value in tags.items():
        if value is None:
            del d[keyword]
        else:
            setattr(d, keyword, value)
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID, d.file_meta.MediaStorageSOPInstanceUID = d.SOPClassUID, d.SOPInstanceUID
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    if syntax == RLELossless:
        d.compress(RLELossless)
    path.parent.mkdir(parents=True, exist_ok=True)
    if meta:
        d.save_as(path, enforce_file_format=True)
    else:
        d.file_meta = FileMetaDataset()
        pydicom.dcmwrite(path, d, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=order == "<")
    return d


def plane(value: int, shape=(6, 5), dtype=np.int16) -> np.ndarray:
    """A slice that can be told from all others, and its rows from its columns."""
    return (np.arange(np.prod(shape)).reshape(shape) + 100 * value).astype(dtype)


def stack(folder: Path, heights, *, name="s", normal=(0, 0, 1), first=0, **tags) -> None:
    """A series of slices at the given heights along ``normal``; slice i has the pixels ``plane(first + i)``."""
    for i, height in enumerate(heights):
        position = [float(height * n) for n in normal]
        own = {k: v[i] if isinstance(v, list) and k != "ImageOrientationPatient" else v for k, v in tags.items()}
        own = {"ImagePositionPatient": position, "InstanceNumber": i + 1, **own}
        dicom(folder / f"{name}{i}", plane(first + i), **own)


def array(scan: Scan) -> np.ndarray:
    return sitk.GetArrayFromImage(scan.image)


def reasons(study_or_error) -> str:
    return "\n".join(str(item) for item in study_or_error.skipped)


def failure(path, **limits) -> StudyError:
    with pytest.raises(StudyError) as caught:
        read_study(path, **limits)
    return caught.value


def enhanced(path: Path, frames: np.ndarray, heights, *, scales=None, times=None, missing=False, **tags) -> None:
    """An enhanced MR file: geometry only in the functional groups, frames in any order."""
    shared, per_frame = Dataset(), []
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing = [2, 1.5]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    for i, height in enumerate(heights):
        item, position, content = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, float(height)]
        item.PlanePositionSequence = [position]
        if times:
            content.TemporalPositionIndex = times[i]
            item.FrameContentSequence = [content]
        if scales:
            transform = Dataset()
            transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = *scales[i], "US"
            item.PixelValueTransformationSequence = [transform]
        per_frame.append(item)
    dicom(path, frames, SOPClassUID=EnhancedMRImageStorage, ImageOrientationPatient=None, ImagePositionPatient=None,
          PixelSpacing=None, SharedFunctionalGroupsSequence=[shared],
          PerFrameFunctionalGroupsSequence=per_frame[:-1] if missing else per_frame, **tags)  # fmt: skip


def compressed(path: Path, pixels: np.ndarray, **tags) -> None:
    """A JPEG 2000 slice, encoded by SimpleITK."""
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path) + ".dcm")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000")
    writer.Execute(sitk.GetImageFromArray(pixels[None]))
    coded = pydicom.dcmread(str(path) + ".dcm")
    os.remove(str(path) + ".dcm")
    assert coded.file_meta.TransferSyntaxUID.is_compressed
    d = dicom(path, pixels, **tags)
    d.file_meta.TransferSyntaxUID = coded.file_meta.TransferSyntaxUID
    d.PixelData = coded.PixelData
    d["PixelData"].VR, d["PixelData"].is_undefined_length = "OB", True
    d.save_as(path)


def volume(path: Path, shape=(5, 6, 7), spacing=(1.0, 2.0, 3.0), dtype=np.int16) -> np.ndarray:
    """Write (D, H, W) voxels with a direction that is not the default."""
    values = np.random.default_rng(len(path.name)).integers(0, 1000, shape).astype(dtype)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return values


real = pytest.mark.skipif(not DATA.is_dir(), reason="the real data is not at hand (set HLIP_DATA)")
