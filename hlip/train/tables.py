"""What people write beside their studies: reports and labels, in CSV files or beside the images."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..csv_file import csv_rows
from ..text_file import read_text
from .sentences import split_sentences

REPORT = "report.txt"  # beside a study's images
# Other names of columns, for which the tables of CT-RATE need not be written anew; several are joined.
_CT_RATE = {"study": ("VolumeName",), "report": ("Findings_EN", "Impressions_EN")}


def read_reports(path: str | Path) -> dict[str, list[str]]:
    """Sentences by study from a CSV with columns ``study`` and ``report``; several rows of one study are joined.

    Likewise ``VolumeName`` with ``Findings_EN`` and ``Impressions_EN``, one or both, as CT-RATE has them.

    Raises:
        FileNotFoundError: no such file. ValueError: not text, a column is missing, or a row that does not fit the header.
    """
    reports: dict[str, list[str]] = {}
    for _, row in _rows(path, "reports", ("study", "report")):
        reports.setdefault(row["study"], []).extend(split_sentences(row["report"]))
    return reports


def read_labels(path: str | Path, classes: Sequence[str]) -> dict[str, list[float]]:
    """Labels by study, 0, 1 or NaN, from a CSV with a column ``study`` and one of 0, 1 or nothing for each class.

    Several rows of one study complete each other. The column ``study`` may be called ``VolumeName``.

    Raises:
        FileNotFoundError: no such file. ValueError: not text, a missing column, a value that is not 0 or 1, a row that does
            not fit the header, or two rows of one study that contradict each other.
    """
    labels: dict[str, list[float]] = {}
    lines: dict[str, list[int]] = {}  # where each label comes from
    for line, row in _rows(path, "labels", ("study", *classes)):
        study, values = row["study"], [row[c] for c in classes]
        if any(v not in ("", "0", "1", "0.0", "1.0") for v in values):
            raise ValueError(f"{path}, line {line}: labels are 0, 1 or empty, got {values}")
        known, where = labels.setdefault(study, [math.nan] * len(values)), lines.setdefault(study, [line] * len(values))
        for i, value in enumerate(values):
            if value and not math.isnan(known[i]) and known[i] != float(value):
                raise ValueError(
                    f"{path}, lines {where[i]} and {line}: study {study!r} has both {known[i]:.0f} and {float(value):.0f} for "
                    f"{classes[i]!r}; keep one row"
                )
            if value:
                known[i], where[i] = float(value), line
    return labels


def study_name(name: str) -> str:
    """A study's name as names are compared: one for each path ("a/b", not "./a/b/"), and one for each accented letter.

    Of the latter some systems make two characters, others one (NFC).
    """
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


def report_file(folder: Path) -> list[str]:
    """The sentences of ``report.txt`` in a study's folder; none without such a file.

    Raises:
        ValueError: it is not text. OSError: it cannot be opened.
    """
    file = folder / REPORT
    return split_sentences(read_text(file)) if file.is_file() else []


def _rows(path: str | Path, what: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """``(line number, stripped cells by column)`` for every row of a CSV that is not empty."""
    rows = csv_rows(path, what)
    _, header = next(rows)
    called = {column: _called(column, header) for column in columns}
    wanted = [name for names in called.values() for name in names]
    for problem, wrong in (
        ("lacks", [c for c in wanted if c not in header]),
        ("has twice", [c for c in wanted if header.count(c) > 1]),
    ):
        if wrong:
            names = "'study' and 'report'" if what == "reports" else "'study' and one for each class"
            raise ValueError(
                f"{path}: {problem} the column(s) {', '.join(wrong)}; expected columns {names}, "
                f"found {', '.join(header) or 'none'}"
            )
    at = {column: [header.index(name) for name in names] for column, names in called.items()}
    for line, row in rows:
        cells = {column: "\n".join(row[i] for i in places) for column, places in at.items()}
        if not cells["study"]:
            raise ValueError(f"{path}, line {line}: no study is named (column {called['study'][0]!r})")
        yield line, {**cells, "study": study_name(cells["study"])}


def _called(column: str, header: Sequence[str]) -> list[str]:
    """What a column is called in this header: by its own name, or as CT-RATE has it."""
    there = [name for name in _CT_RATE.get(column, ()) if name in header]
    return [column] if column in header or not there else there
