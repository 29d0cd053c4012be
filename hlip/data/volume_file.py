"""Scans from volume files: NIfTI (.nii, .nii.gz), MetaImage (.mha), NRRD (.nrrd)."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .amend import amended
from .find import stem
from .metadata import FileMetadata
from .metaimage import MetaImageError, metaimage_header_for_itk
from .nifti import NiftiError, NiftiHeader, check_content, read_nifti_header
from .nrrd import NrrdError, nrrd_header_for_itk
from .pixels import finite
from .quiet import quiet
from .study import Limits, Scan, Skipped, clean_text

_READERS = {".nii": "NiftiImageIO", ".gz": "NiftiImageIO", ".mhd": "MetaImageIO", ".nhdr": "NrrdImageIO"}
# Formats whose headers can name other files: ITK is shown a header made here.
_REWRITTEN = {".mha": (".mhd", metaimage_header_for_itk), ".nrrd": (".nhdr", nrrd_header_for_itk)}


class VolumeError(ValueError):
    """A volume file that cannot be read; the message says why."""


class _Unwanted(VolumeError):
    """Not a scan, or beyond the limits: nothing is wrong with the file."""


class _ShearedAxes(VolumeError):
    """ITK refuses axes that are not at right angles unless told otherwise."""


def read_volume(path: Path, uid: str, limits: Limits, known: FileMetadata | None = None) -> list[Scan | Skipped]:
    """The scans in one file: one, or of a 4-D file the first ``max_volumes``, named "... [0]", "... [1]".

    ``known``: what to take in place of what its header says.

    Never raises on a bad file: what cannot be read comes back as ``Skipped``.
    """
    try:
        try:
            return _read(path, uid, limits, known, [])
        except _ShearedAxes as error:
            with _sheared_axes_allowed():
                return _read(path, uid, limits, known, [str(error)])
    except (VolumeError, MetaImageError, NiftiError, NrrdError) as error:
        return [Skipped(path, str(error), broken=not isinstance(error, _Unwanted))]
    except Exception as error:  # SimpleITK, memory, file system
        lines = str(error).strip().splitlines()
        why = f"cannot be read ({clean_text(lines[-1] if lines else type(error).__name__, 120)})"
        return [Skipped(path, why, broken=True)]


def _read(path: Path, uid: str, limits: Limits, known: FileMetadata | None, notes: list[str]) -> list[Scan | Skipped]:
    header = None
    if path.name.lower().endswith((".nii", ".nii.gz")):
        header = read_nifti_header(path)
        if not header.has_sizes:
            notes.append("no valid voxel size in the header: 1 mm is assumed")
        if not header.has_orientation:
            notes.append("no orientation in the header: the stored axes are taken for it")
    with _alone(path) as place:
        return _scans(path, _opened(place), header, uid, limits, known, notes)


def _scans(
    path: Path, reader: sitk.ImageFileReader, header: NiftiHeader | None, uid: str, limits: Limits,
    known: FileMetadata | None, notes: list[str],
) -> list[Scan | Skipped]:  # fmt: skip
    size = list(reader.GetSize())
    _refuse_other_shapes(size, reader.GetNumberOfComponents(), limits)
    volumes = math.prod(size[3:])
    kept = min(volumes, limits.max_volumes)
    each = math.prod(size[:3])
    bad = check_content(path, header, kept * each) if header else np.empty(0, np.int64)
    name = clean_text(stem(path)) or "scan without name"
    found: list[Scan | Skipped] = []
    for i in range(kept):
        own = list(notes)
        if volumes > 1:
            own.append(f"volume {i + 1} of {volumes} in a 4-D file")
        if volumes > kept:
            own.append(f"only the first {kept} of {volumes} volumes are kept (max_volumes)")
        title = f"{name} [{i}]" if volumes > 1 else name
        image = _volume(reader, size, i)
        if header and any(header.negative):
            _turn_back(image, header.negative)
        image = _finite(image, bad[bad // each == i] % each, own)
        if image is None:
            found.append(Skipped(path, f"{title}: no finite value in it", broken=True))
        else:
            scan = Scan(image, title, notes=own, uid=uid, volume=i, path=path)
            if known:
                scan.image, scan.spacing_in_file = amended(image, header, known, own), image.GetSpacing()
            found.append(scan)
    if volumes > kept:
        found.append(Skipped(path, f"volumes beyond the first {kept} of {volumes} (max_volumes)"))
    return found


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A link to the file in a folder of its own, with nothing else there for ITK to read.

    ITK ends the process at a name that is not UTF-8, takes the voxels of "a.nii.gz" from an "a.nii" beside it, and
    follows the headers of MetaImage and NRRD files to any other file.
    """
    ending = path.name[len(stem(path)) :].lower()
    with tempfile.TemporaryDirectory(prefix="hlip-") as folder:
        place = Path(folder, f"scan{ending}")
        place.symlink_to(path.absolute())
        if ending in _REWRITTEN:
            other, header_of = _REWRITTEN[ending]
            header = header_of(place, place.name)
            place = place.with_suffix(other)
            place.write_text(header, encoding="ascii")
        yield place


def _opened(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[path.suffix])
    reader.SetFileName(str(path))
    try:
        with quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise _ShearedAxes("axes not at right angles: the nearest right-angled ones are used") from None
        raise VolumeError("not a readable image file (damaged, or another format)") from None
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
        raise _Unwanted(f"{components} values per voxel (colour, vector or complex): not a scan")
    if len(size) > 4:
        raise _Unwanted(f"{len(size)} dimensions ({shape}): expected 3, or 4 for several volumes")
    if len(size) < 3 or min(size[:3]) < limits.min_slices:
        raise _Unwanted(f"only {shape} voxels: thinner than min_slices={limits.min_slices}")
    if math.prod(size[:3]) > limits.max_voxels:
        raise _Unwanted(f"{shape} voxels exceed the limit of {limits.max_voxels} (max_voxels)")


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


def _turn_back(image: sitk.Image, axes: tuple[bool, ...]) -> None:
    """ITK turns an axis round where its voxel size is negative. Only the amount counts: the direction is said elsewhere."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    image.SetDirection(np.where(axes, -direction, direction).ravel().tolist())


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
