"""Numbers as PTX has them, in numpy: conversions between formats, and the operations numpy has no name for."""

from __future__ import annotations

import numpy as np

DTYPES = {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "s8": np.int8, "s16": np.int16, "s32": np.int32,
          "s64": np.int64, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f16": np.float16,
          "f32": np.float32, "f64": np.float64}  # fmt: skip
RAW = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # how registers are kept, by size

_SMALLEST_NORMAL = {np.dtype(kind).itemsize: np.finfo(kind).tiny for kind in (np.float16, np.float32, np.float64)}


def flush(x: np.ndarray) -> np.ndarray:
    """Floats with subnormal numbers as zeros of their sign (``.ftz``)."""
    return x * (np.abs(x) >= _SMALLEST_NORMAL[x.dtype.itemsize])


def smallest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min of floats: of a number and NaN the number, of zeros the negative one."""
    made = np.fmin(a, b)
    if np.count_nonzero(made) == made.size:
        return made
    zeros = (made == 0) & (a == b)
    return np.where(zeros & np.signbit(a), a, np.where(zeros, b, made))


def largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max, likewise."""
    made = np.fmax(a, b)
    if np.count_nonzero(made) == made.size:
        return made
    zeros = (made == 0) & (a == b)
    return np.where(zeros & np.signbit(a), b, np.where(zeros, a, made))


def smallest_or_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min.NaN: NaN wins."""
    return np.where(np.isnan(a) | np.isnan(b), a + b, smallest(a, b))


def largest_or_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max.NaN."""
    return np.where(np.isnan(a) | np.isnan(b), a + b, largest(a, b))


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even: the bits, uint16."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits of mantissa, ties away from zero (``.rna``): the bits, uint32."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def halves(pairs: np.ndarray, kind: str) -> np.ndarray:
    """The two 16-bit numbers of each uint32, the low one first, as float32 along a new last axis."""
    bits = np.ascontiguousarray(pairs).view(np.uint16).reshape(*pairs.shape, 2)
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two arrays of 16 bits as one of 32."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


_ONE, _BELOW, _MIDDLE = np.uint64(1), np.uint64(35), np.uint64(1 << 63)
_SUBNORMAL = np.array(2.0**-125).view(np.uint64)[()] << _ONE


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c, rounded once."""
    product = a.astype(np.float64) * b  # exact
    total = product + c
    # To round that to float32 is right unless it lies in the middle between two of these, or they are subnormal.
    bits = total.view(np.uint64)
    unsure = bits << _BELOW == _MIDDLE
    unsure |= (bits << _ONE) - _ONE < _SUBNORMAL  # 0 becomes the largest of all
    if np.count_nonzero(unsure):
        total = np.where(unsure, _sum_to_odd(product, c, total), total)
    return total.astype(np.float32)


def fma_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The same, but what is not exact becomes the neighbour whose last bit is set.

    Rounded again, to float16 or bfloat16, the result is as if it had been rounded only then."""
    product = a.astype(np.float64) * b
    total = _sum_to_odd(product, c, product + c)
    short = total.astype(np.float32)
    return _to_odd(short, total - short)


def _sum_to_odd(x: np.ndarray, y: np.ndarray, total: np.ndarray) -> np.ndarray:
    """float64 x + y, of which ``total`` is the rounded sum, rounded to odd."""
    part = total - x
    return _to_odd(total, (x - (total - part)) + (y - part))


def _to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A rounded number and what it lacks: the number, or its neighbour on that side if the number's last bit is 0."""
    bits = rounded.view(RAW[rounded.dtype.itemsize])
    wrong = (error != 0) & np.isfinite(error) & (bits & bits.dtype.type(1) == 0)
    side = np.where(error > 0, rounded.dtype.type(np.inf), rounded.dtype.type(-np.inf))
    return np.where(wrong, np.nextafter(rounded, side), rounded)


def to_integer(x: np.ndarray, kind: str, rounding: str) -> np.ndarray:
    """A float to an integer: out of range becomes the nearest there is; NaN 0, or the top bit if one of the two has 64 bits."""
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(np.float64))
    limits = np.iinfo(DTYPES[kind])
    inside = np.clip(np.where(np.isnan(whole), 0, whole), float(limits.min), float(limits.max))
    top = inside >= float(limits.max)  # which float64 may not hold
    made = np.where(top, limits.max, np.where(top, 0, inside).astype(DTYPES[kind])).astype(DTYPES[kind])
    if limits.bits == 64 or x.dtype.itemsize == 8:
        made = np.where(np.isnan(x), np.array(1 << (limits.bits - 1), RAW[limits.bits // 8]).view(made.dtype), made)
    return made


def shift_left(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = x.dtype.itemsize * 8
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def shift_right(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Filled with the sign where ``x`` is signed."""
    bits = x.dtype.itemsize * 8
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers, towards zero; by zero all bits are set."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
        quotient = np.where((a < 0) != (safe < 0), quotient, a // safe)
    return np.where(b == 0, ~np.zeros_like(a), quotient)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - divide(a, b) * b


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product of integers."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = (
            {4: np.int64, 2: np.int32}[a.dtype.itemsize]
            if a.dtype.kind == "i"
            else {4: np.uint64, 2: np.uint32}[a.dtype.itemsize]
        )
        return (np.asarray(a, wide) * np.asarray(b, wide) >> wide(bits)).astype(a.dtype)
    product = np.asarray(a, object) * np.asarray(b, object) >> 64
    return product.astype(a.dtype)


def field(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: ``length`` bits from ``start`` on, filled up with zeros or, of signed numbers, the highest of them."""
    bits, wide = x.dtype.itemsize * 8, x.dtype.type
    start, length = np.asarray(start, np.int64) & 255, np.asarray(length, np.int64) & 255
    length = np.minimum(length, bits - np.minimum(start, bits if x.dtype.kind == "u" else bits - 1))
    up = np.minimum(bits - length - np.minimum(start, bits - 1), bits - 1)  # shifts the field to the top, and from there down
    taken = (x << up.astype(wide)) >> np.minimum(bits - length, bits - 1).astype(wide)
    return np.where((length <= 0), wide(0), taken)


def insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: ``length`` low bits of ``a`` put into ``b`` at ``start``."""
    ones = ~b.dtype.type(0)
    start, length = (np.asarray(x, np.int64).astype(b.dtype) & b.dtype.type(255) for x in (start, length))
    mask = shift_left(ones - shift_left(np.full_like(b, ones), length), start)
    return (b & ~mask) | (shift_left(a, start) & mask)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt without a mode: each nibble of ``selector`` names a byte of the eight, its top bit asks for that byte's sign."""
    eight = np.asarray(a, np.uint64) | (np.asarray(b, np.uint64) << np.uint64(32))
    selector = np.asarray(selector, np.uint64)
    made = np.zeros(np.broadcast(eight, selector).shape, np.uint64)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (eight >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        made |= byte << np.uint64(8 * i)
    return made.astype(np.uint32)


def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    """lop3: any function of three bits, given by its table of truth."""
    made = np.uint32(0) * (a | b | c)
    for i in range(8):
        if table >> i & 1:
            made |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return made


def funnel(low: np.ndarray, high: np.ndarray, by: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    """shf: 32 bits out of 64, shifted."""
    by = np.asarray(by, np.uint64)
    by = by & np.uint64(31) if wrap else np.minimum(by, np.uint64(32))
    both = np.asarray(low, np.uint64) | (np.asarray(high, np.uint64) << np.uint64(32))
    shifted = (both << by) >> np.uint64(32) if left else both >> by
    return shifted.astype(np.uint32)


def leading_zeros(x: np.ndarray) -> np.ndarray:
    """clz."""
    bits = x.dtype.itemsize * 8
    high = x >> x.dtype.type(bits // 2)
    part = np.where(high > 0, high, x)  # of which float64 holds every bit
    return (bits - np.frexp(part.astype(np.float64))[1] - np.where(high > 0, bits // 2, 0)).astype(np.uint32)


def ones(x: np.ndarray) -> np.ndarray:
    """popc."""
    return np.bitwise_count(x).astype(np.uint32)
