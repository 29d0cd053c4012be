"""Find image files under a folder, and decide which folders are studies."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .dicom import looks_like_dicom, study_uid
from .study import Skipped, StudyError, clean_text

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd")
# Folder names by which BIDS sorts the scans of one session.
BIDS_FOLDERS = {"anat", "dwi", "func", "fmap", "perf", "pet", "swi"}


def is_volume(path: Path) -> bool:
    """Whether the name is that of a NIfTI, MetaImage or NRRD file."""
    return path.name.lower().endswith(VOLUME_SUFFIXES)


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


def list_files(root: Path, follow_links: bool = False) -> tuple[list[Path], list[Skipped]]:
    """All regular files under a folder, sorted by path, and what was passed over.

    Links are not followed: a linked folder never, a linked file only if it stays inside the folder (where it is
    met anyway) or if ``follow_links`` is set. Pipes, devices and hidden files are passed over.
    """
    home = root.resolve()
    files: list[Path] = []
    skipped: list[Skipped] = []
    seen: set[Path] = set()

    def failed(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename or root), f"folder cannot be opened: {clean_text(error.strerror)}"))

    for folder, subfolders, names in os.walk(root, onerror=failed):
        kept = []
        for name in sorted(subfolders):
            if os.path.islink(os.path.join(folder, name)):
                skipped.append(Skipped(Path(folder, name), "a link to a folder: not followed"))
            elif name.startswith("."):
                skipped.append(Skipped(Path(folder, name), "a hidden folder"))
            else:
                kept.append(name)
        subfolders[:] = kept
        for name in sorted(names):
            path = Path(folder, name)
            reason = _why_not_file(path, home, follow_links, seen)
            if reason:
                skipped.append(Skipped(path, reason))
            else:
                files.append(path)
    return files, skipped


def _why_not_file(path: Path, home: Path, follow_links: bool, seen: set[Path]) -> str:
    if path.name.startswith("."):
        return "a hidden file"
    try:
        linked, target = path.is_symlink(), path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "a broken link" if path.is_symlink() else "the file cannot be opened"
    if linked and not follow_links and not target.is_relative_to(home):
        return "a link that leaves the study folder: not followed (follow_links=True follows it)"
    if not target.is_file():
        return "not a regular file"
    if linked:
        if target in seen or (target.is_relative_to(home) and not target.name.startswith(".")):
            return "a link to another file of this study"
        seen.add(target)
    return ""


def find_studies(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The paths to give to ``read_study``, one per study, sorted, none inside another.

    A file is a study. Under a folder:

    * DICOM: the folders whose first DICOM file has the same StudyInstanceUID are one study: their common parent. If
      that parent also holds files of other studies, each folder stands for itself, so that patients never mix.
    * other formats: a folder that directly holds volumes is one study with all below it; the session folder, if the
      folder is one of the BIDS kinds ("anat", "dwi", ...).

    A folder per scan ("patient/T1/scan.nii.gz") cannot be told from a folder per patient: name such studies one by
    one. Files of several studies in one flat folder are read as one study, with a note.

    Raises:
        StudyError: a path that does not exist, or no image under any of them.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: set[Path] = set()
    for path in map(Path, paths):
        if not path.exists():
            raise StudyError(f"{clean_text(str(path), 400)} does not exist: give a folder or an image file")
        found |= {path} if path.is_file() else _studies_under(path)
    if not found:
        places = ", ".join(clean_text(str(p), 200) for p in paths) or "an empty list"
        raise StudyError(f"no study under {places}: expected folders with DICOM files or {', '.join(VOLUME_SUFFIXES)} volumes")
    return sorted(p for p in found if not any(parent in found for parent in p.parents))


def _studies_under(root: Path) -> set[Path]:
    by_folder: dict[Path, list[Path]] = {}
    for path in list_files(root)[0]:
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
