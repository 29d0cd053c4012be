"""Rows that a program owns, brought by its producer: all of an item's at once, those of the next item while this one is busy.

A ring of ``OWN_STAGES`` places, with room for all rows of an item in each. Where a place has several tensors, one barrier tells
of all.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ring import ROWS, complete_use, load_part, make_bars, tma_load


@gluon.jit
def make_own(dtype: gl.constexpr, BLOCK_D: gl.constexpr, BLOCKS: gl.constexpr, OWN_STAGES: gl.constexpr):
    """Places for ``64 BLOCKS`` rows of one tensor."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCKS * ROWS, BLOCK_D], dtype)
    return gl.allocate_shared_memory(dtype, [OWN_STAGES, BLOCKS * ROWS, BLOCK_D], layout)


@gluon.jit
def make_own_bars(smem, BLOCK: gl.constexpr, TENSORS: gl.constexpr, READERS: gl.constexpr, OWN_STAGES: gl.constexpr):
    """Barriers *full*, where every tile of ``BLOCK`` rows of every tensor arrives, and *empty*, where every reader does."""
    ROWS_OWNED: gl.constexpr = smem.shape[1]
    return make_bars(OWN_STAGES, TENSORS * (ROWS_OWNED // BLOCK)), make_bars(OWN_STAGES, READERS)


@gluon.jit
def load_own(desc, base, row_stride, column, start, record_rows, place, bar, PART: gl.constexpr):
    """Begins loading the record's rows from ``start`` on, as many as the place has, zeros past the end.

    Whole tiles of patch rows come by TMA and arrive at ``bar`` themselves. Returns how many did not: they are there already,
    and :func:`hand_over_own` arrives for them.
    """
    patch, patches = record_rows[0], record_rows[1]
    BLOCK: gl.constexpr = desc.block_type.shape[0]
    TILES: gl.constexpr = place.shape[0] // BLOCK
    copied = 0
    for part in gl.static_range(TILES):
        at = start + part * BLOCK
        tile = place.slice(part * BLOCK, BLOCK)
        if at + BLOCK <= patches:
            mbarrier.expect(bar, desc.block_type.nbytes)
            tma_load(desc, [patch + at, column], bar, tile)
        else:
            for piece in gl.static_range(BLOCK // PART):
                rows = load_part(base, row_stride, at + piece * PART, record_rows, place.shape[1], PART)
                tile.slice(piece * PART, PART).store(rows)
            copied += 1
    return copied


@gluon.jit
def hand_over_own(full_own, i, copied, OWN_STAGES: gl.constexpr):
    """Arrives for ``copied`` tiles of use ``i``, which products may read, and where later ones may come by TMA."""
    fence_async_shared()
    for _ in range(copied):
        complete_use(full_own, i, OWN_STAGES)
