"""CSV files that people write: every mistake that can be told is told with its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from .text_file import read_text


def csv_rows(path: str | Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """``(line number, stripped cells)``: of the header, empty if the file is, then of every row that is not empty.

    Rows are as long as the header.

    Args:
        what: the file holds, for messages.

    Raises:
        FileNotFoundError: no such file. ValueError: not text, not CSV, or a row that is longer than the header.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what} file")
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        yield reader.line_num, header
        for row in reader:
            row = [cell.strip() for cell in row]
            if not any(row):
                continue
            if any(row[len(header) :]):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but the header has {len(header)}; "
                    'text with commas goes into quotation marks: "..."'
                )
            yield reader.line_num, (row + [""] * (len(header) - len(row)))[: len(header)]
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise ValueError(
            f"{where}: not readable as CSV ({error}): is a quotation mark not closed, or not doubled inside a text?"
        ) from error
