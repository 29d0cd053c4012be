"""Text files that people bring: what they are encoded in is found out or refused, never guessed into garbage."""

from __future__ import annotations

import codecs
from pathlib import Path

# The longer marks first: that of UTF-32 (little endian) begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path) -> str:
    """A file as text: by its byte order mark if it has one (UTF-8, UTF-16, UTF-32), else as UTF-8. Line ends stay as they are.

    Raises:
        ValueError: the file is neither; the message names it and says what to do. OSError: it cannot be opened.
    """
    data = Path(path).read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not {encoding.upper()} text (at byte {error.start}); {_ADVICE}") from error
    if "\0" in text:  # UTF-16 without a mark, or no text at all
        raise ValueError(f"{path}: not text in UTF-8 (it holds zero bytes); {_ADVICE}")
    return text


_ADVICE = "save it as UTF-8 (in Excel: 'CSV UTF-8'), or convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
