"""Tables of what the headers of volume files do not hold, or hold wrong: as CT-RATE has them beside its NIfTI files."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..csv_file import csv_rows
from .find import volumes_of
from .study import clean_text

log = logging.getLogger(__name__)

_NAMES = ("VolumeName", "file")
_VALUES = ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")


@dataclass(frozen=True)
class FileMetadata:
    """What a table says of one volume file; ``None``: nothing.

    Attributes:
        slope, intercept: the values that are meant are those stored in the file times slope plus intercept.
        columns_mm, rows_mm, slices_mm: between voxels, along the first, second and third stored axis.
    """

    slope: float | None = None
    intercept: float | None = None
    columns_mm: float | None = None
    rows_mm: float | None = None
    slices_mm: float | None = None


class Metadata(Mapping[str, FileMetadata]):
    """By base name of the file. Written out it is another for other content, wherever it was read from."""

    def __init__(self, files: Mapping[str, FileMetadata], source: str = "the metadata"):
        self._files, self.source = dict(files), source
        content = repr(sorted(self._files.items(), key=lambda item: item[0]))
        self._digest = hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()[:24]

    def __getitem__(self, name: str) -> FileMetadata:
        return self._files[_name(name)]

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"Metadata({len(self)} files, {self._digest})"


def read_metadata(path: str | os.PathLike) -> Metadata:
    """A table from a CSV, or from all CSVs in a folder.

    Columns: ``VolumeName`` or ``file``, of which only the base name counts; and any of ``RescaleSlope``,
    ``RescaleIntercept``, ``XYSpacing`` (mm along the first and the second stored axis, "[0.7, 0.7]", or one number for both)
    and ``ZSpacing`` (along the third). A cell may be empty. Several rows of one file complete each other.

    Raises:
        FileNotFoundError: no such file. ValueError: not text, no column of names or of values, a number that cannot be read
            or cannot be, or two rows of one file that contradict each other.
    """
    path = Path(path)
    sources = [path]
    if path.is_dir():
        sources = sorted(p for p in path.iterdir() if p.suffix.lower() == ".csv" and not p.name.startswith("."))
        if not sources:
            raise FileNotFoundError(f"{path}: no CSV of metadata in this folder")
    found: dict[str, dict[str, float]] = {}
    told: dict[tuple[str, str], str] = {}  # where each value comes from
    for source in sources:
        for where, name, values in _rows(source):
            known = found.setdefault(name, {})
            for field, value in values.items():
                if known.setdefault(field, value) != value:
                    before = f"{known[field]:g} in {told[name, field]}"
                    raise ValueError(f"{where}: {field} of {name!r} is {value:g} here and {before}; keep one row")
                told.setdefault((name, field), where)
    return Metadata({name: FileMetadata(**values) for name, values in found.items()}, str(path))


def tell_missing(metadata: Metadata, paths: Iterable[Path], follow_links: bool = False) -> None:
    """Warns of how many volume files of the studies at these paths the table does not name."""
    files = [file for path in paths for file in volumes_of(path, follow_links)]
    missing = [file for file in files if file.name not in metadata]
    if missing:
        log.warning(
            "%d of %d volume files have no row in %s and are read as their headers say, e.g. %s",
            len(missing), len(files), metadata.source, clean_text(missing[0], 400),
        )  # fmt: skip


def _name(name: str) -> str:
    """As names are compared: some systems make two characters of an accented letter."""
    return unicodedata.normalize("NFC", name)


def _rows(path: Path) -> Iterable[tuple[str, str, dict[str, float]]]:
    """``(file and line, base name, values)`` of each row."""
    rows = csv_rows(path, "metadata")
    _, header = next(rows)
    twice = [column for column in (*_NAMES, *_VALUES) if header.count(column) > 1]
    if twice:
        raise ValueError(f"{path}: has twice the column(s) {', '.join(twice)}")
    named = next((column for column in _NAMES if column in header), "")
    columns = [column for column in _VALUES if column in header]
    if not (named and columns):
        raise ValueError(
            f"{path}: expected a column {' or '.join(_NAMES)} and at least one of {', '.join(_VALUES)}, "
            f"found {', '.join(header) or 'none'}"
        )
    for line, cells in rows:
        where, row = f"{path}, line {line}", dict(zip(header, cells, strict=True))
        name = _name(PurePosixPath(row[named]).name)
        if not name:
            raise ValueError(f"{where}: no file is named (column {named})")
        values: dict[str, float] = {}
        for column in columns:
            if row[column]:
                values |= _numbers(column, row[column], where)
        yield where, name, values


def _numbers(column: str, cell: str, where: str) -> dict[str, float]:
    """The fields that a cell gives."""
    fields = {
        "RescaleSlope": ("slope",), "RescaleIntercept": ("intercept",), "XYSpacing": ("columns_mm", "rows_mm"),
        "ZSpacing": ("slices_mm",),
    }[column]  # fmt: skip
    parts = cell.strip("[]() ").split(",") if column == "XYSpacing" else [cell]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    positive = column.endswith("Spacing")
    fine = all(math.isfinite(n) and (n > 0 or not positive) and (n != 0 or column != "RescaleSlope") for n in numbers)
    if not fine or len(numbers) not in (1, len(fields)):
        expected = {"XYSpacing": "one or two lengths in mm, as [0.7, 0.7]", "ZSpacing": "a length in mm",
                    "RescaleSlope": "a number other than 0", "RescaleIntercept": "a number"}[column]  # fmt: skip
        raise ValueError(f"{where}: {column} is {clean_text(cell)!r}, expected {expected}")
    return dict(zip(fields, numbers * len(fields), strict=False))
