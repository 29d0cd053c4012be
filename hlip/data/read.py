"""Read a study: every scan under one path, whatever mixture of files lies there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from .dicom import BrokenFile, Header, NotASlice, looks_like_dicom, read_header
from .find import VOLUME_SUFFIXES, is_volume, label_in, list_files, stem, unread_format
from .metadata import FileMetadata, Metadata
from .pixels import read_stack
from .series import Stack, stacks_of
from .study import Limits, Scan, Skipped, Study, StudyError, clean_text, summarise
from .volume_file import read_volume

_ACCEPTED = f"DICOM files, or volumes named {', '.join('*' + s for s in VOLUME_SUFFIXES)}"


def read_study(path: str | os.PathLike, *, metadata: Metadata | None = None, **limits) -> Study:
    """Read all scans of a study.

    Args:
        path: a folder (searched with all folders below it; DICOM series may lie flat or nested and mixed with other
            files) or a single file. DICOM is recognised by content; NIfTI, MetaImage and NRRD by name.
        metadata: what to take in place of what the headers of volume files say, see :func:`hlip.data.read_metadata`.
        limits: fields of ``Limits``: ``min_slices`` (default 3), ``max_volumes`` (2), ``max_voxels`` (2**30),
            ``follow_links`` (False).

    Returns:
        The scans in a fixed order (series number, then name, then UID; file names play no part for DICOM), and all
        that was skipped, with reasons. Spacing between slices is the median distance of their positions.

    Raises:
        StudyError: the path does not exist, or there is no readable scan under it. Anything less than that, be it a
            damaged file or a whole series, is listed in ``study.skipped`` and does not raise.
    """
    scans: list[Scan] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    for item in iter_study(path, notes=notes, metadata=metadata, **limits):
        (scans if isinstance(item, Scan) else skipped).append(item)
    path = Path(path)
    if not scans:
        place = clean_text(str(path), 400)
        if not skipped:
            raise StudyError(f"{place} is an empty folder: expected {_ACCEPTED}")
        raise StudyError(
            f"no readable scan in {place}. Found:\n{summarise(skipped)}\n"
            f"Expected {_ACCEPTED}, with at least {Limits(**limits).min_slices} parallel slices "
            "(min_slices of hlip.data.read_study). "
            "Check that this is the folder of the study, or see .skipped of this error for every file.",
            skipped,
        )
    return Study(scans, skipped, path, notes)


def iter_study(
    path: str | os.PathLike, *, notes: list[str] | None = None, metadata: Metadata | None = None, **limits
) -> Iterator[Scan | Skipped]:
    """As ``read_study``, but one scan at a time, so that only one is in memory; files passed over come first.

    Args:
        notes: a list to which notes on the study as a whole are added. metadata, limits: see ``read_study``.

    Raises:
        StudyError: only if the path does not exist.
    """
    path, bounds = Path(path), Limits(**limits)
    if not path.exists():
        raise StudyError(f"{clean_text(str(path), 400)} does not exist: give a folder or an image file")
    if path.is_file():
        root, (files, skipped) = path.parent, ([path], [])
    else:
        root, (files, skipped) = path, list_files(path, bounds.follow_links)
    yield from skipped
    volumes, headers = [], []
    for file in files:
        kind = _classify(file, root, bounds)
        if isinstance(kind, Header):
            headers.append(kind)
        elif isinstance(kind, Skipped):
            yield kind
        else:
            volumes.append(file)
    stacks, left_out = stacks_of(headers, bounds)
    yield from left_out
    if notes is not None:
        notes += _notes_on(headers)
    for _, load in sorted(_plan(stacks, volumes, root, bounds, metadata or Metadata({})), key=lambda entry: entry[0]):
        yield from load()


def _classify(file: Path, root: Path, bounds: Limits) -> Header | Skipped | None:
    """A DICOM header, something to skip, or None for a volume file."""
    if is_volume(file):
        label = label_in(file, root)
        if not label:
            return None
        named = f'named like a segmentation or mask ("{clean_text(label, 60)}"): rename it if it is a scan'
        return Skipped(file, named)
    if not looks_like_dicom(file):
        return Skipped(file, unread_format(file) or "not an image file (no DICOM, and not named as a volume)")
    try:
        return read_header(file, bounds.max_voxels)
    except NotASlice as error:
        return Skipped(file, str(error), broken=isinstance(error, BrokenFile))
    except Exception as error:  # the file vanished, is locked, ...
        return Skipped(file, f"cannot be read ({clean_text(error, 120) or type(error).__name__})", broken=True)


def _notes_on(headers: list[Header]) -> list[str]:
    """Warnings about files that do not belong together. Identifiers themselves are never shown."""
    notes = []
    patients = {h.patient for h in headers if h.patient}
    studies = {h.study for h in headers if h.study}
    if len(patients) > 1:
        notes.append(f"files of {len(patients)} different patients (PatientID), read as one study: separate them")
    if len(studies) > 1:
        notes.append(f"files of {len(studies)} different DICOM studies (StudyInstanceUID), read as one")
    return notes


_Loader = Callable[[], list[Scan | Skipped]]


def _plan(
    stacks: list[Stack], volumes: list[Path], root: Path, bounds: Limits, metadata: Metadata
) -> list[tuple[tuple, _Loader]]:
    """(sort key, how to load it) for every scan: series number (those without last), name, UID, volume."""
    plan: list[tuple[tuple, _Loader]] = []
    for stack in stacks:
        plan.append(((*stack.header.sort_key, stack.volume), partial(_load_stack, stack, bounds)))
    stems = Counter(stem(file) for file in volumes)
    for file in volumes:
        uid = file.relative_to(root).as_posix()
        key = (True, 0, stem(file), uid, 0)
        name = uid if stems[stem(file)] > 1 else ""  # "T1/scan.nii.gz" and "T2/scan.nii.gz"
        plan.append((key, partial(_load_volume, file, uid, name, bounds, metadata.get(file.name))))
    return plan


def _load_stack(stack: Stack, bounds: Limits) -> list[Scan | Skipped]:
    try:
        scan, skipped = read_stack(stack, bounds)
    except Exception as error:  # out of memory, geometry that SimpleITK refuses, ...
        reason = f"{stack.header.name}: cannot be read ({clean_text(error, 120) or type(error).__name__})"
        return [Skipped(stack.slices[0].path, reason, stack.files, broken=True)]
    return [*skipped, *([] if scan is None else [scan])]


def _load_volume(file: Path, uid: str, name: str, bounds: Limits, known: FileMetadata | None) -> list[Scan | Skipped]:
    items = read_volume(file, uid, bounds, known)
    for item in items if name else ():
        if isinstance(item, Scan):
            ending = item.name[len(clean_text(stem(file))) :]
            item.name = clean_text(name[: len(name) - len(file.name) + len(stem(file))]) + ending
    return items
