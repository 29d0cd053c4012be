"""Which folders and files below a folder are the studies that training and evaluation take."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from .tables import REPORT, study_name

log = logging.getLogger(__name__)


def study_places(
    folder: Path, named: Iterable[str] = (), *, follow_links: bool = False, with_reports: bool = False
) -> dict[str, Path]:
    """Where each study is, by name, sorted.

    A study is a sub-folder of ``folder``; or what a table names: a folder or a file at that path below ``folder``
    ("patient/visit", as of BIDS sessions). A sub-folder that is only on the way to such studies is none itself.

    Args:
        named: in tables; what is not there is passed over, and so is what is not below the folder.
        follow_links: also take links that lead out of the folder, which otherwise are told of.
        with_reports: also take deeper folders that hold a report, where their sub-folder holds none.
    """
    home = folder.resolve()
    found: dict[str, Path] = {}
    links = 0
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            if follow_links or not _leaves(entry, home):
                found[study_name(entry.name)] = entry
            else:
                links += 1
    if links:
        from ..data.find import NOT_FOLLOWED

        log.warning("%s: %d of its folders are links to elsewhere, %s", folder, links, NOT_FOLLOWED)
    deeper: dict[str, Path] = {}
    for name in named:
        if name not in found:
            place = _below(folder, name)
            if place is not None and (follow_links or not _leaves(place, home)):
                deeper[name] = place
    if with_reports:
        for place in found.values():
            if not (place / REPORT).is_file():
                deeper |= {study_name(p.relative_to(folder).as_posix()): p for p in _with_report(place, follow_links)}
    named = set(named)
    on_the_way = {PurePosixPath(name).parts[0] for name in deeper}
    kept = {name: place for name, place in found.items() if name in named or name not in on_the_way}
    return dict(sorted({**kept, **deeper}.items()))


def _leaves(path: Path, home: Path) -> bool:
    """Whether a path leads out of a folder, by a link."""
    return not path.resolve().is_relative_to(home)


def _below(folder: Path, name: str) -> Path | None:
    """What a name in a table stands for; ``None`` if there is nothing, or it is hidden or not below the folder."""
    parts = PurePosixPath(name).parts
    if not parts or any(part.startswith((".", "/")) for part in parts):
        return None
    place = folder
    for part in parts:
        place = next(
            (p for p in (place / part, *_alike(place, part)) if os.path.exists(p)), None
        )  # not there: also what cannot be a name
        if place is None:
            return None
    return place


def _alike(folder: Path, name: str) -> Iterable[Path]:
    """Entries of that name whose accented letters are written with other characters."""
    if not name.isascii() and folder.is_dir():
        yield from (p for p in folder.iterdir() if study_name(p.name) == name)


def _with_report(top: Path, follow_links: bool) -> Iterable[Path]:
    """The folders below ``top`` that hold a report, none inside another."""
    for place, folders, files in os.walk(top, followlinks=False):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not Path(place, f).is_symlink())
        if REPORT in files and Path(place) != top:
            folders[:] = []
            yield Path(place)
