"""What the Hopper kernels share: items and their rows, products, two rings of tiles, and what fills them.

A ring has ``full`` and ``empty`` barriers, one of each for every stage. A counter gives stage and parity: use ``i`` of a ring
of ``n`` stages is stage ``i % n``, round ``i // n``. What Gluon renamed between triton 3.6 and 3.9 has one name here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # rows of a consumer: what one warpgroup MMA takes


@gluon.jit
def item_of(tiles, records, item, heads):
    """An item: its head, the first position of its tile, and its record's rows, the tile's own and those they meet.

    Rows are ``(patch, patches, prefix, total)``: the first patch row, how many there are, the first prefix row, rows in all.
    """
    tile = tiles + 2 * (item // heads)
    record = records + gl.load(tile) * 8
    own_patches, met_patches = gl.load(record + 1), gl.load(record + 5)
    own = (gl.load(record), own_patches, gl.load(record + 2), gl.load(record + 3) + own_patches)
    met = (gl.load(record + 4), met_patches, gl.load(record + 6), gl.load(record + 7) + met_patches)
    return (item % heads).to(gl.int64), gl.load(tile + 1), own, met


@gluon.jit
def row_of(i, patch, patches, prefix):
    """Row of the packed buffer at position ``i`` of a record's virtual sequence."""
    return gl.where(i < patches, patch + i, prefix + (i - patches))


@gluon.jit
def load_rows(base, rows, row_stride, d, ok):
    """Rows of one head, zeros where not ``ok``. 64-bit row addresses."""
    return gl.load(base + rows[:, None].to(gl.int64) * row_stride + d[None, :], mask=ok[:, None], other=0.0)


@gluon.jit
def store_rows(base, rows, row_stride, d, ok, values):
    gl.store(base + rows[:, None].to(gl.int64) * row_stride + d[None, :], values, mask=ok[:, None])


@gluon.jit
def store_block(base, row_stride, acc_ND, at, own, dtype: gl.constexpr):
    """Writes 64 rows of a gradient of one head, those from position ``at`` of the record on."""
    BLOCK_D: gl.constexpr = acc_ND.shape[1]
    patch, patches, prefix, total = own
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    j = at + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    values = gl.convert_layout(acc_ND.to(dtype), layout)
    store_rows(base, row_of(j, patch, patches, prefix), row_stride, d, j < total, values)


@gluon.jit
def begin_product(a, b_smem, i, STAGES: gl.constexpr):
    """Begins ``a b^T`` for tile ``i`` of a ring; ``a`` is 64 rows. The tile must be there."""
    BLOCK: gl.constexpr = b_smem.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    zero = gl.zeros([ROWS, BLOCK], gl.float32, layout)
    return warpgroup_mma(a, b_smem.index(i % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def as_operand(x, b_smem):
    """A result of one product as the left operand of another, with a tile of the ring ``b_smem``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, b_smem.shape[2], 16])
    return gl.convert_layout(x.to(b_smem.dtype), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def make_bars(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """A barrier for each stage, that ``COUNT`` arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def make_rings(
    a_desc, b_desc, BLOCK: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    STATISTICS: gl.constexpr,
):  # fmt: skip
    """Two rings of ``STAGES`` tiles with their barriers: filled by one producer, emptied by all consumers.

    A tile comes in boxes, as many rows as a descriptor has, and is full once all have arrived. ``STATISTICS``: a tile of the
    first ring once its rows' statistics are there too (:func:`make_statistics`).
    """
    a_smem = gl.allocate_shared_memory(a_desc.dtype, [STAGES, BLOCK, BLOCK_D], a_desc.layout)
    b_smem = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK, BLOCK_D], b_desc.layout)
    BOXES: gl.constexpr = BLOCK // a_desc.block_type.shape[0]
    full_a, full_b = make_bars(STAGES, BOXES + 1 if STATISTICS else BOXES), make_bars(STAGES, BOXES)
    empty_a, empty_b = make_bars(STAGES, CONSUMERS), make_bars(STAGES, CONSUMERS)
    return a_smem, b_smem, full_a, full_b, empty_a, empty_b


@gluon.jit
def make_statistics(lse, delta, num_rows, STAGES: gl.constexpr, BLOCK: gl.constexpr):
    """Where the two float32 statistics of every row come from, ``(H, R)``, and room for those of a ring's rows."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], layout)
    return lse, delta, num_rows, lse_smem, gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], layout)


@gluon.jit
def stage_of(bars, i, STAGES: gl.constexpr):
    """The barrier of use ``i``, and the parity of the phase that use completes."""
    return bars.index(i % STAGES), (i // STAGES) & 1


@gluon.jit
def await_use(bars, i, STAGES: gl.constexpr):
    """Waits until use ``i`` has been completed."""
    bar, parity = stage_of(bars, i, STAGES)
    mbarrier.wait(bar, parity)


@gluon.jit
def await_round_before(bars, i, STAGES: gl.constexpr):
    """Waits until the use of the same stage one round before ``i`` has been completed; in the first round there is none."""
    bar, parity = stage_of(bars, i, STAGES)
    mbarrier.wait(bar, parity ^ 1)


@gluon.jit
def complete_use(bars, i, STAGES: gl.constexpr):
    """Arrives for use ``i``."""
    bar, _ = stage_of(bars, i, STAGES)
    mbarrier.arrive(bar, count=1)


@gluon.jit
def pass_by(rings, used, total, STAGES: gl.constexpr):
    """The ``total`` rows of an item of which this consumer has no rows: given back as they come. Returns the use after them."""
    a_smem, _, full_a, full_b, empty_a, empty_b = rings
    BLOCK: gl.constexpr = a_smem.shape[1]
    for _ in range(0, total, BLOCK):
        await_use(full_a, used, STAGES)
        complete_use(empty_a, used, STAGES)
        await_use(full_b, used, STAGES)
        complete_use(empty_b, used, STAGES)
        used += 1
    return used


@gluon.jit
def load_box(desc, row, column, tile, box: gl.constexpr, bar):
    """Begins loading box ``box`` of a tile whose rows are those from ``row`` on; it arrives at ``bar`` itself."""
    BOX: gl.constexpr = desc.block_type.shape[0]
    mbarrier.expect(bar, desc.block_type.nbytes)
    tma_load(desc, [row + box * BOX, column], bar, tile.slice(box * BOX, BOX))


@gluon.jit
def produce_by_tma(desc, row, column, smem, full, empty, i, STAGES: gl.constexpr):
    """Begins loading use ``i``: the tile of consecutive rows at ``row``, columns from ``column`` on."""
    await_round_before(empty, i, STAGES)
    bar, _ = stage_of(full, i, STAGES)
    for box in gl.static_range(smem.shape[1] // desc.block_type.shape[0]):
        load_box(desc, row, column, smem.index(i % STAGES), box, bar)


@gluon.jit
def load_part(base, row_stride, at, record_rows, BLOCK_D: gl.constexpr, PART: gl.constexpr):
    """``PART`` rows of one head from position ``at`` of a record on, zeros past its end.

    Few, so that few registers hold them on their way. Zeros, because what lies beyond the record in memory may be NaN, and a
    probability of 0 times NaN is NaN.
    """
    patch, patches, prefix, total = record_rows
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    position = at + gl.arange(0, PART, layout=gl.SliceLayout(1, layout))
    return load_rows(base, row_of(position, patch, patches, prefix), row_stride, d, position < total)


@gluon.jit
def rows_of_first(left, total, BLOCK: gl.constexpr, PART: gl.constexpr):
    """Rows of the tile for the last ``left`` of a record's ``total`` rows: as few as will do of ``PART``, 64 and ``BLOCK``,
    which is at least 64. One tile of a record has always ``BLOCK``.
    """
    least = gl.where(left <= PART, PART, gl.where(left <= ROWS, ROWS, BLOCK))
    return gl.where(total > BLOCK, least, BLOCK)


@gluon.jit
def produce_by_address(sources, columns, strides, at, met, rings, i, rows, STAGES: gl.constexpr, PART: gl.constexpr):
    """Loads use ``i`` of both rings: positions ``at`` and on of a record's rows, and only the first ``rows`` of the tile.

    ``sources``: two descriptors and two tensors, those of one head; ``columns``: where it begins for the descriptors. What is
    a whole box of patch rows, where a tile has several, comes by TMA.
    """
    a_desc, b_desc, a, b = sources
    a_column, b_column = columns
    a_row, b_row = strides
    a_smem, b_smem, full_a, full_b, empty_a, empty_b = rings
    BLOCK_D: gl.constexpr = a_smem.shape[2]
    BOX: gl.constexpr = a_desc.block_type.shape[0]
    BOXES: gl.constexpr = a_smem.shape[1] // BOX
    a_tile, b_tile = a_smem.index(i % STAGES), b_smem.index(i % STAGES)
    await_round_before(empty_a, i, STAGES)
    await_round_before(empty_b, i, STAGES)
    for box in gl.static_range(BOXES - 1):  # with the last box the whole tile would be of patch rows
        if at + (box + 1) * BOX <= met[1]:
            load_box(a_desc, met[0] + at, a_column, a_tile, box, full_a.index(i % STAGES))
            load_box(b_desc, met[0] + at, b_column, b_tile, box, full_b.index(i % STAGES))
    copied = 0
    for box in gl.static_range(BOXES):
        if (box == BOXES - 1) | (at + (box + 1) * BOX > met[1]):
            for part in gl.static_range(box * BOX // PART, (box + 1) * BOX // PART):
                if part * PART < rows:
                    a_part = load_part(a, a_row, at + part * PART, met, BLOCK_D, PART)
                    b_part = load_part(b, b_row, at + part * PART, met, BLOCK_D, PART)
                    a_tile.slice(part * PART, PART).store(a_part)
                    b_tile.slice(part * PART, PART).store(b_part)
            copied += 1
    fence_async_shared()
    for _ in range(copied):
        complete_use(full_a, i, STAGES)
        complete_use(full_b, i, STAGES)


@gluon.jit
def load_statistics(of, head, at, met, BLOCK: gl.constexpr):
    """Log-sum-exp and delta of positions ``at`` and on. Beyond the record zeros, as its rows are: nothing to add.

    Nothing is computed of them here, so nobody waits for them yet.
    """
    lse, delta, num_rows, _, _ = of
    patch, patches, prefix, total = met
    i = at + gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    rows = head * num_rows + row_of(i, patch, patches, prefix)
    return gl.load(lse + rows, mask=i < total, other=0.0), gl.load(delta + rows, mask=i < total, other=0.0)


@gluon.jit
def produce_statistics(of, lse_M, delta_M, full, i, STAGES: gl.constexpr):
    """Hands over the statistics of use ``i``, log-sum-exp in base 2. Its tile must be one that this group may write."""
    _, _, _, lse_smem, delta_smem = of
    lse_smem.index(i % STAGES).store(lse_M * LOG2_E)
    delta_smem.index(i % STAGES).store(delta_M)
    complete_use(full, i, STAGES)


@gluon.jit
def produce_record(
    sources, rings, numbers, statistics, number, met, made, STAGES: gl.constexpr, PART: gl.constexpr,
    REST_FIRST: gl.constexpr,
):  # fmt: skip
    """All rows of one record of head ``number``, of two tensors, from use ``made`` on. Returns the use after them.

    Forward and dQ go over keys and values, dK and dV over queries and the gradient of the output; these bring ``statistics``
    (:func:`make_statistics`), which are empty for the others. Whole tiles of patch rows, then the rest; with ``REST_FIRST``
    the other way round, the tile that may not be full before all others, and as few rows of it as :func:`rows_of_first` says.
    """
    a_desc, b_desc, a, b, _, _ = sources
    a_smem, b_smem, full_a, full_b, empty_a, empty_b = rings
    a_row, a_head, b_row, b_head, _, _ = numbers
    BLOCK: gl.constexpr = a_smem.shape[1]
    patch, patches, _, total = met
    whole = (patches // BLOCK) * BLOCK
    head = number.to(gl.int64)
    a_base, b_base = a + head * a_head, b + head * b_head
    a_column, b_column = number * a_head, number * b_head
    by_address = (a_desc, b_desc, a_base, b_base)
    columns, strides = (a_column, b_column), (a_row, b_row)
    if REST_FIRST:
        gl.static_assert(len(statistics) == 0)
        tiles = (total - whole + BLOCK - 1) // BLOCK
        for i in range(tiles):
            at = whole + (tiles - 1 - i) * BLOCK
            rows = rows_of_first(total - at, total, BLOCK, PART)
            produce_by_address(by_address, columns, strides, at, met, rings, made, rows, STAGES, PART)
            made += 1
    if len(statistics) > 0:  # always on their way a tile ahead
        lse_M, delta_M = load_statistics(statistics, head, 0, met, BLOCK)
    for at in range(0, whole, BLOCK):
        produce_by_tma(a_desc, patch + at, a_column, a_smem, full_a, empty_a, made, STAGES)
        produce_by_tma(b_desc, patch + at, b_column, b_smem, full_b, empty_b, made, STAGES)
        if len(statistics) > 0:
            produce_statistics(statistics, lse_M, delta_M, full_a, made, STAGES)
            lse_M, delta_M = load_statistics(statistics, head, at + BLOCK, met, BLOCK)
        made += 1
    if not REST_FIRST:
        for at in range(whole, total, BLOCK):
            produce_by_address(by_address, columns, strides, at, met, rings, made, BLOCK, STAGES, PART)
            if len(statistics) > 0:
                produce_statistics(statistics, lse_M, delta_M, full_a, made, STAGES)
                lse_M, delta_M = load_statistics(statistics, head, at + BLOCK, met, BLOCK)
            made += 1
    return made
