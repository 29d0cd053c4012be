"""Progress bars that fit where they are shown: lively in a terminal, a line every half minute in a log file."""

from __future__ import annotations

import sys


def progress_bar(iterable=None, **options):
    """``tqdm`` with an interval for the place it writes to; ``options`` are tqdm's."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 30.0, **options)
