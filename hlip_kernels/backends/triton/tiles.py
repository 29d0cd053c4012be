"""Tiles of rows of one head, as the Triton kernels hold them: loaded, multiplied, written.

Shapes in triton are powers of two, head dims need not be. So a tile is a tuple of one block of columns, or of two of unlike
width (80 columns are 64 and 16), and a product over its columns, or of them, is one or two products. In shape letters ``D`` is
the columns, however many blocks they are; see ``config.WIDTHS``.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(tiles, records):
    """This program's head, where its tile begins in the record, and the rows of the record: its own, and those they see.

    Rows are (first patch row, how many, first prefix row, rows in all).
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    record = records + tl.load(tiles + 2 * tile) * 8
    start = tl.load(tiles + 2 * tile + 1)
    return head, start, _rows(record), _rows(record + 4)


@triton.jit
def _rows(record):
    patch, patches = tl.load(record), tl.load(record + 1)
    return patch, patches, tl.load(record + 2), tl.load(record + 3) + patches


@triton.jit
def strides(row, head, MULTIPLE: tl.constexpr):
    """Row and head stride of a tensor, for the compiler to know that they are multiples of 8: then 8 elements are one load.

    Multiples of 16 it finds out by itself at launch. But the head stride of a packed projection is the head dim, 72 say.
    """
    if MULTIPLE == 8:
        row, head = row // 8 * 8, head // 8 * 8
    return row, head


@triton.jit
def row_of(i, patch, patches, prefix):
    """Row of the packed buffer at position ``i`` of a record's virtual sequence."""
    return tl.where(i < patches, patch + i, prefix + (i - patches))


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x`` as a matrix product takes it: rounded to TF32 if that is asked for.

    The tensor cores drop the 13 bits that TF32 lacks, which makes every product some 7e-4 smaller. So half a unit in the last
    place is added first: rounding to nearest. NaN and Inf stay what they are.
    """
    if PRECISION == "tf32":
        power = (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)  # sign and exponent alone
        x = (tl.fma(power, 2.0**-11, x).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _load_block(base, rows, row_stride, d, ok, HEAD_DIM: tl.constexpr, MASK_COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr):
    pointers = base + rows[:, None].to(tl.int64) * row_stride + d[None, :]
    if MASK_ROWS:
        if MASK_COLUMNS:
            block = tl.load(pointers, mask=ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        else:
            block = tl.load(pointers, mask=ok[:, None], other=0.0)
    else:
        if MASK_COLUMNS:
            block = tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
        else:
            block = tl.load(pointers)
    return block


@triton.jit
def load_tile(
    base, rows, row_stride, ok,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one head, zeros beyond the head dim and, with ``MASK_ROWS``, where not ``ok``. 64-bit row addresses."""
    d = tl.arange(0, BLOCK_D)
    if BLOCK_E == 0:
        return (_load_block(base, rows, row_stride, d, ok, HEAD_DIM, HEAD_DIM < BLOCK_D, MASK_ROWS),)
    else:
        e = tl.arange(0, BLOCK_E) + BLOCK_D
        return (
            _load_block(base, rows, row_stride, d, ok, HEAD_DIM, False, MASK_ROWS),
            _load_block(base, rows, row_stride, e, ok, HEAD_DIM, HEAD_DIM < BLOCK_D + BLOCK_E, MASK_ROWS),
        )


@triton.jit
def load_operand(
    base, rows, row_stride, ok,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, as matrix products take it."""
    return as_operand(load_tile(base, rows, row_stride, ok, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS), PRECISION)


@triton.jit
def as_operand(tile, PRECISION: tl.constexpr):
    if len(tile) == 1:
        return (operand(tile[0], PRECISION),)
    else:
        return operand(tile[0], PRECISION), operand(tile[1], PRECISION)


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr):
    if BLOCK_E == 0:
        return (tl.zeros([ROWS, BLOCK_D], dtype=tl.float32),)
    else:
        return tl.zeros([ROWS, BLOCK_D], dtype=tl.float32), tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)


@triton.jit
def times(tile, factor):
    """Times one factor, or one for each row: ``(rows, 1)``."""
    if len(tile) == 1:
        return (tile[0] * factor,)
    else:
        return tile[0] * factor, tile[1] * factor


@triton.jit
def over(tile, divisor):
    """Each row over its divisor, ``(rows, 1)``."""
    if len(tile) == 1:
        return (tile[0] / divisor,)
    else:
        return tile[0] / divisor, tile[1] / divisor


@triton.jit
def dot_over_d(a, b, PRECISION: tl.constexpr):
    """``a b^T``: the product of every row of ``a`` with every row of ``b``."""
    c = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) == 2:
        c = tl.dot(a[1], tl.trans(b[1]), c, input_precision=PRECISION)
    return c


@triton.jit
def dot_of_d(a, b, c, PRECISION: tl.constexpr):
    """``a b + c`` for a matrix ``a`` without ``D``."""
    if len(b) == 1:
        return (tl.dot(a, b[0], c[0], input_precision=PRECISION),)
    else:
        return tl.dot(a, b[0], c[0], input_precision=PRECISION), tl.dot(a, b[1], c[1], input_precision=PRECISION)


@triton.jit
def sum_over_d(a, b):
    """The sum of ``a * b`` of each row, in float32."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total


@triton.jit
def _store_block(base, rows, row_stride, d, ok, values, HEAD_DIM: tl.constexpr):
    pointers = base + rows[:, None].to(tl.int64) * row_stride + d[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=ok[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def store_tile(base, rows, row_stride, ok, tile, HEAD_DIM: tl.constexpr):
    width: tl.constexpr = tile[0].shape[1]
    _store_block(base, rows, row_stride, tl.arange(0, width), ok, tile[0], HEAD_DIM)
    if len(tile) == 2:
        _store_block(base, rows, row_stride, tl.arange(0, tile[1].shape[1]) + width, ok, tile[1], HEAD_DIM)


@triton.jit
def _add_block(
    base, rows, row_stride, d, ok, values, HEAD_DIM: tl.constexpr, MASK_COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr
):
    pointers = base + rows[:, None].to(tl.int64) * row_stride + d[None, :]
    if MASK_ROWS:
        tl.atomic_add(pointers, values, mask=ok[:, None] & (d < HEAD_DIM)[None, :], sem="relaxed")
    elif MASK_COLUMNS:
        tl.atomic_add(pointers, values, mask=(d < HEAD_DIM)[None, :], sem="relaxed")
    else:
        tl.atomic_add(pointers, values, sem="relaxed")


@triton.jit
def add_tile(base, rows, row_stride, ok, tile, HEAD_DIM: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Adds to float32 rows in memory, atomically; all rows, or with ``MASK_ROWS`` those that are ``ok``."""
    width: tl.constexpr = tile[0].shape[1]
    _add_block(base, rows, row_stride, tl.arange(0, width), ok, tile[0], HEAD_DIM, HEAD_DIM < width, MASK_ROWS)
    if len(tile) == 2:
        e = tl.arange(0, tile[1].shape[1]) + width
        _add_block(base, rows, row_stride, e, ok, tile[1], HEAD_DIM, HEAD_DIM < width + tile[1].shape[1], MASK_ROWS)
