"""What the paths on the command line mean."""

from __future__ import annotations

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
