"""Warp-wide matrix instructions: which lane holds which element, as the PTX ISA manual's figures say.

Registers of a warp's fragment are gathered into whole matrices, multiplied, and given back. Products are exact and summed in
float64, the sum rounded to float32 once: hardware rounds more often, in an order it does not tell.
"""

from __future__ import annotations

import functools

import numpy as np

from .numbers import bf16_to_f32
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
def _sources(which: str, shape: str, count: int) -> np.ndarray:
    """(warps, rows, columns): where each element lies when the registers of ``count`` lanes stand one behind the other."""
    at, rows, columns = places(which, shape)
    order = np.full(at.size, -1)
    order[at.reshape(-1)] = np.arange(at.size)
    assert (order >= 0).all(), "a fragment that does not hold the whole matrix"
    lane, element = np.divmod(order.reshape(rows, columns), at.shape[1])
    together = 2 if which.endswith("16") else 1  # elements a register
    warps = np.arange(0, count, 32)[:, None, None]
    return (element // together * count + warps + lane) * together + element % together


@functools.cache
def _results(shape: str, count: int) -> np.ndarray:
    """(registers, lanes): which element of all the matrices each lane gets."""
    at, rows, columns = places("c", shape)
    return (at.T[:, None] + rows * columns * np.arange(count // 32)[:, None]).reshape(at.shape[1], count)


def multiply_add(shape: str, kinds: tuple[str, str], a: list, b: list, c: list) -> list[np.ndarray]:
    """``mma.sync.aligned.<shape>.row.col``: registers of a, b (uint32) and c (float32) -> those of the result (float32)."""
    count = len(c[0])
    suffix = "32" if kinds[0] == "tf32" else "16"
    sums = np.concatenate(c).take(_sources("c", shape, count))
    with np.errstate(all="ignore"):
        left = _matrices(a, kinds[0], _sources("a" + suffix, shape, count))
        right = _matrices(b, kinds[1], _sources("b" + suffix, shape, count))
        total = (left @ right + sums).astype(np.float32)
    return list(total.take(_results(shape, count)))


def _matrices(registers: list[np.ndarray], kind: str, sources: np.ndarray) -> np.ndarray:
    """Fragments as whole matrices of float64."""
    together = np.concatenate(registers)
    if kind == "tf32":  # the lower 13 bits are not looked at
        elements = (together & np.uint32(0xFFFFE000)).view(np.float32)
    elif kind == "bf16":
        elements = bf16_to_f32(together.view(np.uint16))
    else:
        elements = together.view(np.float16)
    return elements.take(sources).astype(np.float64)


def rows_of(addresses: np.ndarray, count: int) -> np.ndarray:
    """ldmatrix and stmatrix: (warps, count, 8) addresses of rows: lane l gives row l % 8 of matrix l / 8."""
    return addresses.reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)


def spread(matrices: np.ndarray, transposed: bool) -> list[np.ndarray]:
    """(warps, count, 8, 4) pairs of 16 bits -> a register a matrix: lane l gets the pair l % 4 of row l / 4."""
    warps, count = matrices.shape[:2]
    if transposed:
        matrices = np.ascontiguousarray(matrices.view(np.uint16).swapaxes(2, 3)).view(np.uint32)
    return list(np.ascontiguousarray(matrices.reshape(warps, count, 32).swapaxes(0, 1)).reshape(count, -1))


def collect(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """The other way round (stmatrix)."""
    made = np.stack([r.reshape(-1, 32) for r in registers], 1)
    matrices = np.ascontiguousarray(made).view(np.uint16).reshape(len(made), len(registers), 8, 8)
    return matrices.swapaxes(2, 3) if transposed else matrices
