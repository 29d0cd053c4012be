"""Rows that a program owns, brought by its producer: all of an item's at once, those of the next item while this one is busy.

For each of ``OWN_STAGES`` items there is room, in ``PLACES`` places: one for all of its rows, or one for every consumer. One
barrier tells of all rows of all tensors. With a single stage the next item's rows come while this one's results are written.

The producer of every kernel is here too: :func:`produce`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .ring import (
    LOG2_E,
    ROWS,
    await_round_before,
    complete_use,
    item_of,
    load_part,
    make_bars,
    produce_record,
    row_of,
    tma_load,
)


@gluon.jit
def make_own(dtype: gl.constexpr, PLACE: gl.constexpr, BLOCK_D: gl.constexpr, PLACES: gl.constexpr, OWN_STAGES: gl.constexpr):
    """Places for ``PLACE`` rows of one tensor each: place ``i`` of use ``n`` is number ``n % OWN_STAGES * PLACES + i``."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PLACE, BLOCK_D], dtype)
    return gl.allocate_shared_memory(dtype, [OWN_STAGES * PLACES, PLACE, BLOCK_D], layout)


@gluon.jit
def make_own_bars(
    smem, BLOCK: gl.constexpr, TENSORS: gl.constexpr, READERS: gl.constexpr, PLACES: gl.constexpr, OWN_STAGES: gl.constexpr,
    OTHERS: gl.constexpr = 0,
):  # fmt: skip
    """Barriers *full*, where every tile of ``BLOCK`` rows of every tensor arrives, and ``OTHERS``; and *empty*, where every
    reader does."""
    TILES: gl.constexpr = smem.shape[1] // BLOCK
    return make_bars(OWN_STAGES, TENSORS * PLACES * TILES + OTHERS), make_bars(OWN_STAGES, READERS)


@gluon.jit
def make_own_statistics(lse, grad_lse, num_rows, PLACES: gl.constexpr, OWN_STAGES: gl.constexpr):
    """Where log-sum-exp of the rows comes from, ``(H, R)``, and its gradient if there is one, ``(base, head, row)`` or empty;
    and room for those of 64 rows a place."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    ROOM: gl.constexpr = ROWS * (4 if PLACES == 3 else PLACES)  # a power of two
    lse_smem = gl.allocate_shared_memory(gl.float32, [OWN_STAGES, ROOM], layout)
    if len(grad_lse) > 0:
        return lse, grad_lse, num_rows, lse_smem, gl.allocate_shared_memory(gl.float32, [OWN_STAGES, ROOM], layout)
    else:
        return lse, grad_lse, num_rows, lse_smem, lse_smem


@gluon.jit
def _load_statistics(of, head, start, record_rows):
    """The statistics of all rows of a record from ``start`` on that there is room for; zeros past its end.

    As in :func:`.ring.load_statistics`, nobody waits for them yet.
    """
    lse, grad_lse, num_rows, lse_smem, _ = of
    patch, patches, prefix, total = record_rows
    i = start + gl.arange(0, lse_smem.shape[1], layout=gl.BlockedLayout([1], [32], [4], [0]))
    rows_M = row_of(i, patch, patches, prefix)
    lse_M = gl.load(lse + head * num_rows + rows_M, mask=i < total, other=0.0)
    if len(grad_lse) > 0:
        base, head_stride, row_stride = grad_lse
        return lse_M, gl.load(base + head * head_stride + rows_M.to(gl.int64) * row_stride, mask=i < total, other=0.0)
    else:
        return lse_M, lse_M


@gluon.jit
def _leave(of, found, stage):
    """Leaves what :func:`_load_statistics` found for the consumers, log-sum-exp in base 2."""
    _, grad_lse, _, lse_smem, dlse_smem = of
    lse_smem.index(stage).store(found[0] * LOG2_E)
    if len(grad_lse) > 0:
        dlse_smem.index(stage).store(found[1])


@gluon.jit
def load_own_statistics(of, stage, INDEX: gl.constexpr, lse_layout: gl.constexpr, dlse_layout: gl.constexpr):
    """A consumer's own 64: log-sum-exp in base 2, and its gradient, zeros if there is none."""
    _, grad_lse, _, lse_smem, dlse_smem = of
    lse_log2_M = lse_smem.index(stage).slice(INDEX * ROWS, ROWS).load(lse_layout)
    if len(grad_lse) > 0:
        return lse_log2_M, dlse_smem.index(stage).slice(INDEX * ROWS, ROWS).load(dlse_layout)
    else:
        return lse_log2_M, gl.zeros([ROWS], gl.float32, dlse_layout)


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


@gluon.jit
def produce_own(
    own_sources, own_statistics, bars, number, start, own, done,
    PLACES: gl.constexpr, PART: gl.constexpr, OWN_STAGES: gl.constexpr, ALL_PLACES: gl.constexpr,
):  # fmt: skip
    """Brings use ``done``: rows ``start`` and on of head ``number``, of each of ``(desc, base, row, head, places)``.

    A place that begins behind the record's end is left as it is, unless ``ALL_PLACES``: then it gets zeros.
    """
    stage = done % OWN_STAGES
    bar = bars[0].index(stage)
    head = number.to(gl.int64)
    copied = 0
    if len(own_statistics) > 0:
        found = _load_statistics(own_statistics, head, start, own)
        copied += 1
    for t in gl.static_range(len(own_sources)):
        desc, base, row_stride, head_stride, smem = own_sources[t]
        for index in gl.static_range(PLACES):
            place = smem.index(stage * PLACES + index)
            at = start + index * place.shape[0]
            if (at < own[3]) | ALL_PLACES:
                copied += load_own(desc, base + head * head_stride, row_stride, number * head_stride, at, own, place, bar, PART)
            else:
                copied += place.shape[0] // desc.block_type.shape[0]
    if len(own_statistics) > 0:
        _leave(own_statistics, found, stage)
    hand_over_own(bars[0], done, copied, OWN_STAGES)


@gluon.jit
def produce(
    brought, STAGES: gl.constexpr, PART: gl.constexpr, PLACES: gl.constexpr, OWN_STAGES: gl.constexpr,
    ALL_PLACES: gl.constexpr, REST_FIRST: gl.constexpr,
):  # fmt: skip
    """For every item of this program its own rows (:func:`produce_own`), then those it meets (:func:`.ring.produce_record`).

    ``brought``: own tensors, own statistics, the tensors of the ring, their strides and the number of items, statistics of the
    ring's rows, barriers of own rows, the rings.
    """
    own_sources, own_statistics, sources, numbers, statistics, bars, rings = brought
    tiles, records = sources[4], sources[5]
    heads, num_items = numbers[4], numbers[5]
    made, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        _, start, own, met = item_of(tiles, records, item, heads)
        number = item % heads
        await_round_before(bars[1], done, OWN_STAGES)
        produce_own(own_sources, own_statistics, bars, number, start, own, done, PLACES, PART, OWN_STAGES, ALL_PLACES)
        done += 1
        made = produce_record(sources, rings, numbers, statistics, number, met, made, STAGES, PART, REST_FIRST)
