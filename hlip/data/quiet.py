"""Keep the C and C++ readers from writing to the terminal."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_inside = 0
_saved: list[tuple[int, int]] = []


@contextmanager
def quiet() -> Iterator[None]:
    """Send file descriptors 1 and 2 of this process to the null device while the block runs.

    ITK, NIfTI, MetaIO and OpenJPEG print to the descriptors themselves, past ``sys.stderr`` and past ITK's own switch.
    Every failure reaches the caller as an exception, so nothing is lost. Nested and concurrent use is counted: the
    first one in redirects, the last one out restores. What other threads print meanwhile is lost, so keep it short.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _redirect()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore()


def _redirect() -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
    except OSError:
        return
    for target in (1, 2):
        try:
            copy = os.dup(target)
        except OSError:  # closed: nothing can be printed there
            continue
        os.dup2(null, target)
        _saved.append((copy, target))
    os.close(null)


def _restore() -> None:
    while _saved:
        copy, target = _saved.pop()
        os.dup2(copy, target)
        os.close(copy)
