"""What the paths on the command line mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data import StudyError, find_studies


def studies_at(paths: Sequence[str], follow_links: bool = False) -> tuple[list[Path], int]:
    """The studies under all paths, and how many paths hold none (each is named on stderr; the rest goes on).

    Raises:
        ValueError: there is no study under any of them.
    """
    found: list[Path] = []
    failed = 0
    for path in paths:
        try:
            found += [study for study in find_studies(path, follow_links=follow_links) if study not in found]
        except StudyError as error:
            print(f"{error}\n", file=sys.stderr)
            failed += 1
    if not found:
        raise ValueError("nothing to read; see above")
    return found, failed


def output_file(name: str, option: str) -> Path:
    """The file to write, as it is named; a link's target.

    Args:
        option: that names it, for messages.

    Raises:
        ValueError: it could not be written, which is better known before hours of work.
    """
    path = Path(name).expanduser().resolve()
    there = next(place for place in (path, *path.parents) if place.exists())
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, expected a file to write")
    if path.exists() and not path.is_file():
        raise ValueError(f"{option}: {path} is not a plain file, and cannot be replaced by one")
    if there != path and not there.is_dir():
        raise ValueError(f"{option}: {there} is a file, expected a folder to write in")
    folder = path.parent if there == path else there
    if not os.access(there, os.W_OK) or not os.access(folder, os.W_OK):
        raise ValueError(f"{option}: no permission to write {path}")
    return path


def output_folder(name: str, option: str) -> Path:
    """The folder to write in, which need not be there yet; a link's target.

    Raises:
        ValueError: it is a file, or cannot be written in.
    """
    path = Path(name).expanduser().resolve()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{option}: {there} is a file, expected a folder to write in")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option}: no permission to write in {there}")
    return path
