"""Find image files under a folder, and decide which folders are studies."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .dicom import looks_like_dicom, study_uid
from .study import Skipped, StudyError, clean_text, count, summarise

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
# Other formats of images, by suffix, and why they are not read.
_UNREAD = {
    **dict.fromkeys((".mhd", ".nhdr", ".hdr"), "a header whose voxels are in another file"),
    **dict.fromkeys((".mgz", ".mgh", ".mnc", ".img", ".npy", ".npz"), "a format that is not read"),
}
# Folder names by which BIDS sorts the scans of one session.
BIDS_FOLDERS = {"anat", "dwi", "func", "fmap", "perf", "pet", "swi"}

# The end of the reason why a link is passed over: how to have it followed.
NOT_FOLLOWED = "not followed (follow_links does: --follow-links; data.follow_links in a config; a parameter in Python)"
_NOT_FETCHED = "its content has not been fetched (git-annex or DataLad: git annex get, datalad get)"
_BROKEN_LINK, _CANNOT_OPEN = "a broken link", "the file cannot be opened"
# The ends of reasons for which part of a scan may be missing.
_MAYBE_SCANS = (NOT_FOLLOWED, _NOT_FETCHED, _BROKEN_LINK, _CANNOT_OPEN)

log = logging.getLogger(__name__)


def is_volume(path: Path) -> bool:
    """Whether the name is that of a NIfTI, MetaImage or NRRD file."""
    return path.name.lower().endswith(VOLUME_SUFFIXES)


def unread_format(path: Path) -> str:
    """Why a file that is named as an image of another format is not read, and what to do; empty for all other names."""
    reason = _UNREAD.get(path.suffix.lower(), "")
    return f"{path.suffix}, {reason}: convert it to .nii.gz" if reason else ""


def stem(path: Path) -> str:
    """The file name without .nii.gz, .nii, .mha or .nrrd."""
    suffix = next((s for s in sorted(VOLUME_SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_label_name(name: str) -> bool:
    """Whether a file or folder name says that it holds a segmentation or a mask, not an image.

    The published preparation drops every name that contains "seg" or "mask"; here they must be words or the ends of
    words ("T1_seg", "aparc+aseg", "brainmask", "lesionMask", "segmentation"), so that "segond" is kept.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[a-z]+", spaced.lower())
    return any(word.endswith(("seg", "segs", "mask", "masks")) or word.startswith("segment") for word in words)


def label_in(path: Path, root: Path) -> str:
    """The part of a volume file's path below ``root`` that says it holds no image (see :func:`is_label_name`), or nothing."""
    parts = [*path.relative_to(root).parts[:-1], stem(path)]
    return next((part for part in parts if is_label_name(part)), "")


def volumes_of(path: Path, follow_links: bool = False) -> list[Path]:
    """The volume files that ``read_study`` reads at a path."""
    root, files = (path.parent, [path]) if path.is_file() else (path, list_files(path, follow_links)[0])
    return [file for file in files if is_volume(file) and not label_in(file, root)]


def list_files(root: Path, follow_links: bool = False) -> tuple[list[Path], list[Skipped]]:
    """All regular files under a folder, sorted by path, and what was passed over.

    A link that stays inside the folder leads to what is met anyway, and is passed over; so are pipes, devices and all
    that is hidden. A link that leads out of the folder, to a file or to a folder, is only followed with
    ``follow_links``; never to a folder around this one. Nothing is listed twice.
    """
    home = root.resolve()
    files: list[Path] = []
    skipped: list[Skipped] = []
    seen: set[Path] = set()  # where links have led, so that loops end

    def failed(error: OSError) -> None:
        skipped.append(
            Skipped(Path(error.filename or root), f"folder cannot be opened: {clean_text(error.strerror)}", broken=True)
        )

    for folder, subfolders, names in os.walk(root, onerror=failed, followlinks=follow_links):
        kept = []
        for name in sorted(subfolders):
            reason = why_not_folder(Path(folder, name), home, follow_links, seen)
            if reason:
                skipped.append(Skipped(Path(folder, name), reason, broken=reason.endswith(_MAYBE_SCANS)))
            else:
                kept.append(name)
        subfolders[:] = kept
        for name in sorted(names):
            path = Path(folder, name)
            reason = _why_not_file(path, home / path.relative_to(root), home, follow_links, seen)
            if reason:
                skipped.append(Skipped(path, reason, broken=reason.endswith(_MAYBE_SCANS)))
            else:
                files.append(path)
    return files, skipped


def why_not_folder(path: Path, home: Path, follow_links: bool, seen: set[Path]) -> str:
    """Why a folder inside ``home`` is passed over; empty if it is not. ``seen``: where links have led before."""
    if path.name.startswith("."):
        return "a hidden folder"
    if not path.is_symlink():
        return ""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return _broken(path)
    if _is_met(target, home):
        return "a link to another folder of this study"
    if home.is_relative_to(target):
        return "a link to a folder around this study: never followed"
    if not follow_links:
        return f"a link to a folder elsewhere: {NOT_FOLLOWED}"
    if target in seen:
        return "a link to a folder that another link leads to"
    seen.add(target)
    return ""


def _why_not_file(path: Path, plain: Path, home: Path, follow_links: bool, seen: set[Path]) -> str:
    """``plain``: where the file is if no link leads to it."""
    if path.name.startswith("."):
        return "a hidden file"
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return _broken(path) if path.is_symlink() else _CANNOT_OPEN
    linked = target != plain
    if linked and not follow_links and not target.is_relative_to(home):
        return f"a link that leaves the study folder: {NOT_FOLLOWED}"
    if not target.is_file():
        return "not a regular file"
    if linked:
        if target in seen or _is_met(target, home):
            return "a link to another file of this study"
        seen.add(target)
    return ""


def _is_met(target: Path, home: Path) -> bool:
    """Whether a place is inside the folder, and not hidden there: then it is met without a link."""
    return target.is_relative_to(home) and not any(p.startswith(".") for p in target.relative_to(home).parts)


def _broken(path: Path) -> str:
    if "annex" in Path(os.readlink(path)).parts:
        return _NOT_FETCHED
    return _BROKEN_LINK


def find_studies(paths: str | os.PathLike | Iterable[str | os.PathLike], *, follow_links: bool = False) -> list[Path]:
    """The paths to give to ``read_study``, one per study, sorted, none inside another.

    A file is a study. Under a folder:

    * DICOM: the folders whose first DICOM file has the same StudyInstanceUID are one study: their common parent. If
      that parent also holds files of other studies, each folder stands for itself, so that patients never mix.
    * other formats: a folder that directly holds volumes is one study with all below it; the session folder, if the
      folder is one of the BIDS kinds ("anat", "dwi", ...).

    A folder per scan ("patient/T1/scan.nii.gz") cannot be told from a folder per patient: name such studies one by
    one. Files of several studies in one flat folder are read as one study, with a note.

    Args:
        paths: one or several; a path that is a link itself is always followed.
        follow_links: follow links that lead out of the given folder, as ``read_study`` does with the same option.
            Without it, a warning tells how many there were outside of studies.

    Raises:
        StudyError: a path that does not exist, or no image under any of them; ``skipped`` says what was passed over.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: set[Path] = set()
    skipped: list[Skipped] = []
    unread: list[Skipped] = []
    for path in map(Path, paths):
        if not path.exists():
            raise StudyError(f"{clean_text(str(path), 400)} does not exist: give a folder or an image file")
        if path.is_file():
            found.add(path)
        else:
            files, passed = list_files(path, follow_links)
            found |= _studies_of(path, files)
            skipped += passed
            unread += [Skipped(file, unread_format(file)) for file in files if unread_format(file)]
    if not found:
        places = ", ".join(clean_text(str(p), 200) for p in paths) or "an empty list"
        expected = f"folders with DICOM files or {', '.join(VOLUME_SUFFIXES)} volumes"
        skipped += unread
        passed = f". Passed over:\n{summarise(skipped)}" if skipped else ""
        raise StudyError(f"no study under {places}: expected {expected}{passed}", skipped)
    links = [s for s in skipped if s.reason.endswith(NOT_FOLLOWED) and not any(p in found for p in s.path.parents)]
    if links:
        log.warning("%s outside of studies, such as %s", count(len(links), "link"), links[0])
    return sorted(p for p in found if not any(parent in found for parent in p.parents))


def _studies_of(root: Path, files: list[Path]) -> set[Path]:
    by_folder: dict[Path, list[Path]] = {}
    for path in files:
        by_folder.setdefault(path.parent, []).append(path)
    by_uid: dict[str, list[Path]] = {}
    found: set[Path] = set()
    for folder, files in by_folder.items():
        uid = next(filter(None, (study_uid(p) for p in files if not is_volume(p) and looks_like_dicom(p))), "")
        if uid:
            by_uid.setdefault(uid, []).append(folder)
        elif any(is_volume(p) for p in files):
            found.add(folder.parent if folder.name.lower() in BIDS_FOLDERS and folder != root else folder)
    below: dict[Path, set[str]] = {}
    for uid, folders in by_uid.items():
        for folder in folders:
            for parent in (folder, *folder.parents):
                below.setdefault(parent, set()).add(uid)
    for folders in by_uid.values():
        parent = Path(os.path.commonpath(folders))
        found |= {parent} if len(below[parent]) == 1 else set(folders)
    return found
