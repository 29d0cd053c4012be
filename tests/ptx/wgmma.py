"""Products of warpgroups (wgmma): where matrices lie in shared memory and in registers, after the PTX ISA manual, 9.7.15."""

from __future__ import annotations

import functools
import re

import numpy as np

from .numbers import halves
from .program import PtxError

_LANES = np.arange(32)
_GROUP, _IN_GROUP = _LANES // 4, _LANES % 4
_WARP_ROWS = 16


def sizes(shape: str) -> tuple[int, int, int]:
    """m, n and k of e.g. m64n128k16."""
    return tuple(int(x) for x in re.fullmatch(r"m(\d+)n(\d+)k(\d+)", shape).groups())


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """Where a byte really lies when rows of ``span`` bytes (32, 64, 128; 0: as it is) have their 16-byte pieces permuted."""
    if span == 0:
        return addresses
    bits = {32: 1, 64: 2, 128: 3}[span]
    return addresses ^ (((addresses >> 7) & ((1 << bits) - 1)) << 4)


def addresses(descriptor: int, shape: str, which: str, kind: str, transposed: bool) -> np.ndarray:
    """Of each element of a (m, k) or b (k, n), in the window of shared memory.

    ``transposed``: neighbours in memory are neighbours in m or n, not in k."""
    start, leading, stride = (((descriptor >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise PtxError("descriptors with a base offset are not known here")
    span = (0, 128, 64, 32)[mode]
    m, n, k = sizes(shape)
    element = 4 if kind == "tf32" else 2
    outer, inner = np.meshgrid(np.arange(m if which == "a" else n), np.arange(k), indexing="ij")  # (m or n, k)
    if not transposed:
        byte = inner * element
        if span:
            at = outer // 8 * stride + outer % 8 * span + byte  # k must stay within a row of the pattern
            if (start % span + byte).max() >= span:
                raise PtxError("a product reads beyond the rows of its swizzle pattern")
        else:
            at = outer // 8 * stride + outer % 8 * 16 + byte // 16 * leading + byte % 16
    else:
        byte = outer * element
        if span:
            at = byte // span * leading + inner // 8 * stride + inner % 8 * span + byte % span
        else:
            at = byte // 16 * stride + inner // 8 * leading + inner % 8 * 16 + byte % 16
    found = swizzled(start + at, span)
    return found if which == "a" else found.T


def values(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements of shared memory as float32."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


@functools.cache
def _sum_places(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each thread's accumulators: (128, n / 2)."""
    i = np.arange(n // 2)
    thread = np.arange(128)[:, None]
    row = thread // 32 * _WARP_ROWS + thread % 32 // 4 + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * (thread % 4) + i % 2


def accumulators(shape: str, registers_: list[np.ndarray]) -> np.ndarray:
    """(64, n) of the float32 registers of 128 threads."""
    _, n, _ = sizes(shape)
    made = np.empty((64, n), np.float32)
    made[_sum_places(n)] = np.stack(registers_, 1)
    return made


def registers(shape: str, matrix: np.ndarray) -> list[np.ndarray]:
    """The other way round."""
    _, n, _ = sizes(shape)
    found = matrix[_sum_places(n)]
    return [found[:, i] for i in range(n // 2)]


def left(shape: str, kind: str, fragment: list[np.ndarray]) -> np.ndarray:
    """(64, k): a, of four registers a thread."""
    _, _, k = sizes(shape)
    thread = np.arange(128)[:, None]
    together = np.stack(fragment, 1)
    made = np.empty((64, k), np.float32)
    row = thread // 32 * _WARP_ROWS + thread % 32 // 4
    if kind == "tf32":
        i = np.arange(4)
        made[row + 8 * (i % 2), thread % 4 + 4 * (i // 2)] = (together & np.uint32(0xFFFFE000)).view(np.float32)
    else:
        i = np.arange(8)
        made[row + 8 * (i // 2 % 2), 2 * (thread % 4) + i % 2 + 8 * (i // 4)] = halves(together, kind).reshape(128, 8)
    return made
