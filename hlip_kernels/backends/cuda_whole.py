"""Which segments the backward kernel for whole ones takes (``csrc/short_attention/whole_backward.cuh``), and its launches.

Mirrors ``csrc/short_attention/arguments.h``, which decides; ``tests/test_cuda_compile.py`` compares.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from ..packs import Packs

HEAD_DIMS = (32, 64)
ROWS = (128, 256)  # that blocks of 4 and of 8 warps can hold, 32 a warp


class Launch(NamedTuple):
    """Warps of a block, queries of a step, segments there is room for the keys of, blocks a multiprocessor holds."""

    warps: int
    step: int
    keys: int
    blocks: int


_LARGE = (Launch(8, 64, 2, 1), Launch(8, 32, 2, 1), Launch(8, 32, 1, 1))
_SMALL = {
    64: (Launch(4, 32, 2, 2), Launch(4, 32, 1, 2)),
    32: (Launch(4, 32, 2, 3), Launch(4, 32, 1, 3), Launch(4, 32, 2, 2), Launch(4, 32, 1, 2)),
}


def whole_bytes(rows: int, head_dim: int, step: int, keys: int) -> int:
    """Shared memory of a block."""
    return 4 * 32 + -(-rows // 16) * 16 * (2 * 8 + 2 * 2 * step + (4 + keys) * 2 * head_dim)


def whole_launch(rows: int, head_dim: int, shared: int) -> Launch | None:
    """The launch for segments of up to ``rows`` rows where a block may have ``shared`` bytes; ``None``: there is none."""
    if head_dim not in HEAD_DIMS or rows > ROWS[1]:
        return None
    for launch in _LARGE if rows > ROWS[0] else _SMALL[head_dim]:
        if launch.blocks * (whole_bytes(rows, head_dim, launch.step, launch.keys) + 1024) <= shared + 1024:
            return launch
    return None


@cache
def whole_rows(head_dim: int, shared: int) -> tuple[int, int]:
    """The longest segments that blocks of 4 and of 8 warps take; 0: none."""
    small, large = (
        max((rows for rows in range(least, most + 1, 16) if whole_launch(rows, head_dim, shared)), default=0)
        for least, most in ((16, ROWS[0]), (ROWS[0] + 16, ROWS[1]))
    )
    return small, large


class Whole(NamedTuple):
    """Bytes of shared memory a block may have, and packs (first, last, rows of the largest) for blocks of 8 and of 4 warps."""

    shared: int
    large: tuple[int, int, int]
    small: tuple[int, int, int]


def whole(packs: Packs, head_dim: int, shared: int) -> Whole:
    """Which packs the kernel takes. Those of one segment alone come first, the longest in front."""
    rows = packs.alone
    counts = np.searchsorted(-rows, [-ROWS[0], *(-limit for limit in whole_rows(head_dim, shared))], side="left")
    above, above_small, above_large = map(int, counts)  # packs of more than 128 rows, or than the limits
    return Whole(shared, _stretch(rows, above_large, above), _stretch(rows, max(above, above_small), len(rows)))


def _stretch(rows: np.ndarray, first: int, last: int) -> tuple[int, int, int]:
    return (first, last, int(rows[first])) if first < last else (last, last, 0)
