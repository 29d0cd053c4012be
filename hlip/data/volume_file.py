"""Scans from volume files: NIfTI (.nii, .nii.gz), MetaImage (.mha), NRRD (.nrrd)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .find import stem
from .nifti import NiftiError, check_content, read_nifti_header
from .pixels import finite
from .quiet import quiet
from .study import Limits, Scan, Skipped, clean_text

_READERS = {".nii": "NiftiImageIO", ".gz": "NiftiImageIO", ".mha": "MetaImageIO", ".nrrd": "NrrdImageIO"}


class VolumeError(ValueError):
    """A volume file that cannot be read; the message says why."""


class _ShearedAxes(VolumeError):
    """ITK refuses axes that are not at right angles unless told otherwise."""


def read_volume(path: Path, uid: str, limits: Limits) -> list[Scan | Skipped]:
    """The scans in one file: one, or of a 4-D file the first ``max_volumes``, named "... [0]", "... [1]".

    Never raises on a bad file: what cannot be read comes back as ``Skipped``.
    """
    try:
        try:
            return _read(path, uid, limits, [])
        except _ShearedAxes as error:
            with _sheared_axes_allowed():
                return _read(path, uid, limits, [str(error)])
    except (VolumeError, NiftiError) as error:
        return [Skipped(path, str(error))]
    except Exception as error:  # SimpleITK, memory, file system
        lines = str(error).strip().splitlines()
        return [Skipped(path, f"cannot be read ({clean_text(lines[-1] if lines else type(error).__name__, 120)})")]


def _read(path: Path, uid: str, limits: Limits, notes: list[str]) -> list[Scan | Skipped]:
    nifti = _READERS[path.suffix.lower()] == "NiftiImageIO"
    if nifti:
        header = read_nifti_header(path)
        if not header.has_sizes:
            notes.append("no valid voxel size in the header: 1 mm is assumed")
        if not header.has_orientation:
            notes.append("no orientation in the header: the stored axes are taken for it")
    else:
        _refuse_data_elsewhere(path)
    reader = _opened(path)
    size = list(reader.GetSize())
    _refuse_other_shapes(size, reader.GetNumberOfComponents(), limits)
    volumes = math.prod(size[3:])
    kept = min(volumes, limits.max_volumes)
    each = math.prod(size[:3])
    bad = check_content(path, header, kept * each) if nifti else np.empty(0, np.int64)
    name = clean_text(stem(path)) or "scan without name"
    found: list[Scan | Skipped] = []
    for i in range(kept):
        own = list(notes)
        if volumes > 1:
            own.append(f"volume {i + 1} of {volumes} in a 4-D file")
        if volumes > kept:
            own.append(f"only the first {kept} of {volumes} volumes are kept (max_volumes)")
        title = f"{name} [{i}]" if volumes > 1 else name
        image = _finite(_volume(reader, size, i), bad[bad // each == i] % each, own)
        if image is None:
            found.append(Skipped(path, f"{title}: no finite value in it"))
        else:
            found.append(Scan(image, title, notes=own, uid=uid, volume=i, path=path))
    if volumes > kept:
        found.append(Skipped(path, f"volumes beyond the first {kept} of {volumes} (max_volumes)"))
    return found


def _opened(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
        with quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise _ShearedAxes("axes not at right angles: the nearest right-angled ones are used") from None
        raise VolumeError(f"not a readable {path.suffix.lstrip('.')} file (damaged, or another format)") from None
    return reader


@contextmanager
def _sheared_axes_allowed() -> Iterator[None]:
    """ITK's own switch is an environment variable, read whenever a NIfTI file is opened."""
    switch = "ITK_NIFTI_SFORM_PERMISSIVE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _refuse_other_shapes(size: list[int], components: int, limits: Limits) -> None:
    shape = " x ".join(map(str, size))
    if components > 1:
        raise VolumeError(f"{components} values per voxel (colour, vector or complex): not a scan")
    if len(size) > 4:
        raise VolumeError(f"{len(size)} dimensions ({shape}): expected 3, or 4 for several volumes")
    if len(size) < 3 or min(size[:3]) < limits.min_slices:
        raise VolumeError(f"only {shape} voxels: thinner than min_slices={limits.min_slices}")
    if math.prod(size[:3]) > limits.max_voxels:
        raise VolumeError(f"{shape} voxels exceed the limit of {limits.max_voxels} (max_voxels)")


def _volume(reader: sitk.ImageFileReader, size: list[int], index: int) -> sitk.Image:
    """Volume ``index`` of the opened file, 3-D."""
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, index])
    try:
        with quiet():
            image = reader.Execute()
    except RuntimeError:
        raise VolumeError("voxels cannot be read (file cut short or damaged)") from None
    if not all(math.isfinite(mm) and mm > 0 for mm in image.GetSpacing()):
        raise VolumeError(f"voxel spacing in the header is {image.GetSpacing()}: expected positive millimetres")
    return image


def _finite(image: sitk.Image, bad: np.ndarray, notes: list[str]) -> sitk.Image | None:
    """The image with all that is not a number (also at the places ``bad``, which ITK has set to 0) at the minimum."""
    voxels = sitk.GetArrayViewFromImage(image)
    if len(bad):
        voxels = voxels.copy()
        voxels.reshape(-1)[bad] = np.nan
    clean = finite(voxels, notes)
    if clean is None or clean is voxels:
        return None if clean is None else image
    fixed = sitk.GetImageFromArray(clean)
    fixed.CopyInformation(image)
    return fixed


def _refuse_data_elsewhere(path: Path) -> None:
    """MetaImage and NRRD headers can name other files as the place of their voxels: never follow them."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if path.suffix.lower() == ".nrrd":
        if not head.startswith(b"NRRD"):
            raise VolumeError("not a NRRD file (empty, damaged, or another format)")
        lines = head.partition(b"\n\n")[0].replace(b"\r", b"").split(b"\n")
        if any(line.lower().replace(b" ", b"").startswith(b"datafile:") for line in lines):
            raise VolumeError("its voxels are in another file, which is not followed: save as a single .nrrd file")
        return
    values = [line.partition(b"=")[2].strip() for line in head.split(b"\n") if line.startswith(b"ElementDataFile")]
    if not values:
        raise VolumeError("not a MetaImage file (empty, damaged, or another format)")
    if values[0].upper() != b"LOCAL":
        raise VolumeError("its voxels are in another file, which is not followed: save as a single .mha file")
