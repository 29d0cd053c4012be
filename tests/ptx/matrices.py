"""Warp-wide matrix instructions: which lane holds which element, as the PTX ISA manual's figures say.

Registers of a warp's fragment are gathered into whole matrices, multiplied, and given back. Products are exact and summed in
float64, the sum rounded to float32 once: hardware rounds more often, in an order it does not tell.
"""

from __future__ import annotations

import functools

import numpy as np

from .numbers import halves
from .program import PtxError

_LANES = np.arange(32)
_GROUP, _IN_GROUP = _LANES // 4, _LANES % 4


@functools.cache
def places(which: str, shape: str) -> tuple[np.ndarray, int, int]:
    """For a fragment, by lane and element: place (row * columns + column) in the matrix, and its rows and columns."""
    m, n, k = (int(x) for x in shape.replace("m", " ").replace("n", " ").replace("k", " ").split())
    if (m, n) != (16, 8):
        raise PtxError(f"mma of shape {shape} is not known here")
    if which == "c":
        i = np.arange(4)
        row, column = _GROUP[:, None] + 8 * (i // 2), 2 * _IN_GROUP[:, None] + i % 2
        return row * 8 + column, 16, 8
    if k == 16 or which.endswith("16"):  # 16-bit elements, two a register
        i = np.arange(k // 2)
        if which[0] == "a":
            row, column = _GROUP[:, None] + 8 * (i // 2 % 2), 2 * _IN_GROUP[:, None] + i % 2 + 8 * (i // 4)
            return row * k + column, 16, k
        i = np.arange(k // 4)
        row, column = 2 * _IN_GROUP[:, None] + i % 2 + 8 * (i // 2), _GROUP[:, None] + 0 * i
        return row * 8 + column, k, 8
    if which[0] == "a":  # 32-bit elements, k of 4 or 8
        i = np.arange(k // 2)
        row, column = _GROUP[:, None] + 8 * (i % 2), _IN_GROUP[:, None] + 4 * (i // 2)
        return row * k + column, 16, k
    i = np.arange(k // 4)
    row, column = _IN_GROUP[:, None] + 4 * i, _GROUP[:, None] + 0 * i
    return row * 8 + column, k, 8


@functools.cache
def _order(which: str, shape: str) -> np.ndarray:
    """For each place of the matrix, which element of the (lane, element) list lies there."""
    at = places(which, shape)[0].reshape(-1)
    order = np.full(at.size, -1)
    order[at] = np.arange(at.size)
    assert (order >= 0).all(), "a fragment that does not hold the whole matrix"
    return order


def _matrix(elements: np.ndarray, which: str, shape: str) -> np.ndarray:
    """(warps * 32, elements) -> (warps, rows, columns)."""
    _, rows, columns = places(which, shape)
    return elements.reshape(-1, rows * columns)[:, _order(which, shape)].reshape(-1, rows, columns)


def multiply_add(shape: str, kinds: tuple[str, str], a: list, b: list, c: list) -> list[np.ndarray]:
    """``mma.sync.aligned.<shape>.row.col``: registers of a, b (uint32) and c (float32) -> those of the result (float32)."""
    with np.errstate(all="ignore"):
        left, right = (_elements(registers, kind) for registers, kind in zip((a, b), kinds, strict=True))
        suffix = "32" if kinds[0] == "tf32" else "16"
        product = _matrix(left, "a" + suffix, shape).astype(np.float64) @ _matrix(right, "b" + suffix, shape)
        total = (product + _matrix(np.stack(c, 1), "c", shape)).astype(np.float32)
    made = total.reshape(len(total), -1)[:, places("c", shape)[0].reshape(-1)].reshape(-1, 4)
    return [np.ascontiguousarray(made[:, i]) for i in range(4)]


def _elements(registers: list[np.ndarray], kind: str) -> np.ndarray:
    together = np.stack(registers, 1)
    if kind == "tf32":  # the lower 13 bits are not looked at
        return (together & np.uint32(0xFFFFE000)).view(np.float32)
    return halves(together, kind).reshape(len(together), -1)


def rows_of(addresses: np.ndarray, count: int) -> np.ndarray:
    """ldmatrix and stmatrix: (warps, count, 8) addresses of rows: lane l gives row l % 8 of matrix l / 8."""
    return addresses.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


def spread(matrices: np.ndarray, transposed: bool) -> list[np.ndarray]:
    """(warps, count, 8, 8) uint16 -> a register a matrix: lane l gets elements 2 (l % 4) and the next of row l / 4."""
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    warps, count = matrices.shape[:2]
    registers = np.ascontiguousarray(matrices).reshape(warps, count, 64).view(np.uint32)  # 32 pairs: a lane each
    return [np.ascontiguousarray(registers[:, i]).reshape(-1) for i in range(count)]


def collect(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """The other way round (stmatrix)."""
    made = np.stack([r.reshape(-1, 32) for r in registers], 1)
    matrices = np.ascontiguousarray(made).view(np.uint16).reshape(len(made), len(registers), 8, 8)
    return matrices.swapaxes(2, 3) if transposed else matrices
