"""The lines for short segments that :mod:`hlip_kernels.backends.auto` ships, worked out from the two performance models.

    python -m hlip_kernels.predict_auto        # prints them, to be pasted there; tests/test_auto.py compares

For every family of GPUs and head dim, batches of equal segments of 16, 32, ... rows are put to both models, forward and
backward together, bfloat16. The ``cuda`` backend is proposed up to the last length until which its overlapped time is at most
Triton's on every card that stands for the family, and never beyond 128 rows, where the bet ends (docs/short_segments.md).

For Blackwell, whose share of ``mma.sync`` nobody in this repository has a figure for, the model takes Hopper's.
"""

from __future__ import annotations

import sys

import torch

from .backends.auto import CARDS, Choice, short
from .backends.cuda import HEAD_DIMS, max_rows
from .layout import Layout
from .performance import RATES, predict
from .performance_short import predict_short

CAPABILITY = {"ampere": (8, 0), "hopper": (9, 0), "blackwell": (10, 0)}  # of those cards
LENGTHS = range(16, 129, 16)
ROWS, HEADS = 65536, 12  # of a batch


def ratios(gpu: str, head_dim: int, length: int) -> tuple[float, float]:
    """Predicted time of the ``cuda`` backend over that of ``triton``, forward and backward together: (overlapped, serial)."""
    layout = Layout.from_lengths([length] * (ROWS // length), levels=("segment",))
    kind = {"heads": HEADS, "head_dim": head_dim, "dtype": torch.bfloat16, "rates": RATES[gpu]}
    cuda, triton = (
        [model(layout, "segment", backward=backward, **kind) for backward in (False, True)]
        for model in (predict_short, predict)
    )
    return (
        sum(p.overlapped for p in cuda) / sum(p.overlapped for p in triton),
        sum(p.serial for p in cuda) / sum(p.serial for p in triton),
    )


def numbers(family: str, head_dim: int) -> tuple[int, float, float, int] | None:
    """(longest, overlapped, serial, sure) of :func:`auto.short`; ``None`` where Triton is ahead from the start."""
    found, sure = None, 0
    for length in LENGTHS:
        if length > max_rows(head_dim, CAPABILITY[family]):
            break
        overlapped, serial = map(max, zip(*(ratios(gpu, head_dim, length) for gpu in CARDS[family]), strict=True))
        if overlapped > 1:
            break
        if serial <= 1 and sure == length - LENGTHS.step:
            sure = length
        found = length, round(overlapped, 2), round(serial, 2), sure
    return found


def rows() -> list[tuple]:
    """The arguments of every line for short segments, in the order of the table."""
    every = ((family, head_dim, numbers(family, head_dim)) for family in CARDS for head_dim in HEAD_DIMS)
    return [(family, head_dim, *found) for family, head_dim, found in every if found]


def lines() -> tuple[Choice, ...]:
    """Those lines."""
    return tuple(short(*row) for row in rows())


def main() -> int:
    for family, *numbers in rows():
        print("    short({}),".format(", ".join([f'"{family}"', *map(str, numbers)])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
