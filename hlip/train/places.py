"""Which folders and files below a folder are the studies that training and evaluation take."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from .tables import REPORT, study_name

log = logging.getLogger(__name__)


def study_places(
    folder: Path, named: Iterable[str] = (), *, follow_links: bool = False, with_reports: bool = False
) -> dict[str, Path]:
    """Where each study is, by name, sorted.

    A study is a sub-folder of ``folder``; or what a table names: a folder or a file at that path below ``folder``
    ("patient/visit", as of BIDS sessions), or the one volume file of that name wherever below ``folder`` it lies, as the
    tables of CT-RATE name theirs. A sub-folder that is only on the way to such studies is none itself.

    Args:
        named: in tables; what is not there is passed over, and so is what is not below the folder.
        follow_links: also take links that lead out of the folder, which otherwise are told of.
        with_reports: also take deeper folders that hold a report, where their sub-folder holds none.

    Raises:
        ValueError: several files have a name in a table.
    """
    from ..data.find import NOT_FOLLOWED
    from ..data.study import count

    home, named = folder.resolve(), set(named)
    found: dict[str, Path] = {}
    deeper: dict[str, Path] = {}
    links: set[Path] = set()  # that lead out of the folder, and are not followed

    def take(name: str, place: Path, into: dict[str, Path]) -> None:
        if follow_links or not _leaves(place, home):
            into[name] = place
        elif links.isdisjoint(place.parents):
            links.add(place)

    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            take(study_name(entry.name), entry, found)
    unknown = set()
    for name in sorted(named - set(found)):
        place = _below(folder, name)
        if place is not None:
            take(name, place, deeper)
        else:
            unknown.add(name)
    deeper |= _files_named(folder, unknown, deeper, follow_links, links)
    if with_reports:
        for top in found.values():
            if not (top / REPORT).is_file():
                deeper |= {study_name(p.relative_to(folder).as_posix()): p for p in _with_report(top, follow_links, links)}
    if links:
        log.warning("%s: passed over %s to elsewhere, %s", folder, count(len(links), "link"), NOT_FOLLOWED)
    on_the_way = {study_name(place.relative_to(folder).parts[0]) for place in deeper.values()}
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
        place = place / part if os.path.exists(place / part) else _alike(place, part)  # not there: also what cannot be a name
        if place is None:
            return None
    return place


def _files_named(
    folder: Path, names: Iterable[str], taken: Mapping[str, Path], follow_links: bool, links: set[Path]
) -> dict[str, Path]:
    """Where below the folder the volume files of these names are; adds to ``links`` those that are not followed.

    Raises:
        ValueError: there are several of one name, or one that is also ``taken``, by another name.
    """
    from ..data.find import NOT_FOLLOWED, is_volume, list_files

    wanted = {name for name in names if is_volume(Path(name)) and "/" not in name}
    found: dict[str, Path] = {}
    if not wanted:
        return found
    files, skipped = list_files(folder, follow_links)
    passed = (s.path for s in skipped if s.reason.endswith(NOT_FOLLOWED))
    links |= {path for path in passed if path.is_dir() or study_name(path.name) in wanted}
    others = {place: name for name, place in taken.items()}
    for file in files:
        name = study_name(file.name)
        if name not in wanted:
            continue
        if name in found:
            raise ValueError(f"{name!r} in a table could be {found[name]} or {file}: name its path below {folder}")
        if file in others:
            raise ValueError(f"{others[file]!r} and {name!r} in tables are the same file, {file}; keep one name")
        found[name] = file
    return found


def _alike(folder: Path, name: str) -> Path | None:
    """The entry of that name whose accented letters are written with other characters."""
    if name.isascii() or not folder.is_dir():
        return None
    return next((p for p in folder.iterdir() if study_name(p.name) == name and p.exists()), None)


def _with_report(top: Path, follow_links: bool, links: set[Path]) -> Iterable[Path]:
    """The folders below ``top`` that hold a report, none inside another; adds to ``links`` those that are not followed."""
    from ..data.find import NOT_FOLLOWED, why_not_folder

    home, seen = top.resolve(), set()
    for place, folders, files in os.walk(top, followlinks=follow_links):
        reasons = {name: why_not_folder(Path(place, name), home, follow_links, seen) for name in sorted(folders)}
        links |= {Path(place, name) for name, reason in reasons.items() if reason.endswith(NOT_FOLLOWED)}
        folders[:] = [name for name, reason in reasons.items() if not reason]
        if REPORT in files and Path(place) != top:
            folders[:] = []
            yield Path(place)
