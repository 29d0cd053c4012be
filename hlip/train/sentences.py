"""Reports as sentences."""

from __future__ import annotations

import re

# What stands before an item of a list: "1." or "(2)", "a)", a bullet. "3.5 cm", "-5 HU" and "(L) MCA" are none.
_MARKERS = re.compile(r"\s*(?:(?:\(?\d{1,2}[.)](?=\s|$|[^\W\d_])|[a-z]\)(?=\s)|[-–—*](?=\s|[^\W\d_])|[•·●▪])\s*)*")
# After a full stop: a letter (whether it is a capital, re cannot tell), or the number of the next item. After a heading's
# colon: the first item's.
_END = re.compile(
    r"(?<=[.!?])\s+(?=[^\W\d_])"
    r"|(?<=[.!?;])\s+(?=\(?\d{1,2}[.)]\s+[^\W\d_])"
    r"|(?<=:)\s+(?=\(?1[.)]\s+[^\W\d_])"
)  # fmt: skip
# Full stops that end no sentence: "Dr. Smith", "Dr. J. Smith", "vs. Old infarct".
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:D[rR]s?|dr|Mr|Mrs|Ms|Prof|prof|St|vs|cf|approx|e\.g|i\.e)\.(?:\s[^\W\d_a-z]\.)?$")
_LONGEST = 16  # characters of an abbreviation with what is around it
_WORD = re.compile(r"[^\W\d_]{2}")


def split_sentences(report: str) -> list[str]:
    """A report as sentences: split at line ends, and at a full stop followed by a space and a capital letter.

    The numbers and bullets of lists go, and so does what says nothing by itself: headings on a line of their own
    (``IMPRESSION:``) and pieces without a word (``2.``, ``____``).
    """
    parts = []
    for line in report.splitlines():
        start = 0
        for end in _END.finditer(line):
            first = line[end.end()]
            if first.isalpha() and not first.isupper():
                continue
            if not _ABBREVIATION.search(line, max(0, end.start() - _LONGEST), end.start()):
                parts.append(line[start : end.start()])
                start = end.end()
        parts.append(line[start:])
    sentences = (part[_MARKERS.match(part).end() :].strip() for part in parts)
    return [sentence for sentence in sentences if _WORD.search(sentence) and not sentence.endswith(":")]
