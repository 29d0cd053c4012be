"""dQ, dK and dV of short segments for Hopper in Gluon: everything is read once, and five products are made.

A program takes one segment of one head after the other, of at most 256 rows, and holds its keys and values in shared memory,
those of the next arriving meanwhile. Two consumers own 128 keys each, in two blocks of 64, with dK and dV of both in
registers. Queries and output gradients pass by once, 32 rows a tile. What all blocks make of a tile of queries, dS, they leave
in shared memory, and a third group multiplies it with all keys: that is dQ, whole, so nothing is added up in memory, and the
bits are the same every run. That group also makes delta.

Level patterns only: rows that see anything but their own segment meet several programs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .backward_keys import add_query_tile
from .own import make_own, make_own_bars, produce
from .ring import (
    ROWS,
    await_use,
    complete_use,
    item_of,
    load_rows,
    make_bars,
    make_rings,
    make_statistics,
    produce_statistics,
    row_of,
    store_block,
)


@gluon.jit
def _store_columns(base, row_stride, acc_DM, at, own, dtype: gl.constexpr):
    """Writes rows of dQ of one head that are columns here, those from position ``at`` of the record on."""
    BLOCK_D: gl.constexpr = acc_DM.shape[0]
    BLOCK_M: gl.constexpr = acc_DM.shape[1]
    patch, patches, prefix, total = own
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_D // 8, 256 // BLOCK_D], [1, 4], [0, 1])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(1, layout))
    i = at + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    rows_M = row_of(i, patch, patches, prefix).to(gl.int64) * row_stride
    values = gl.convert_layout(acc_DM.to(dtype), layout)
    gl.store(base + rows_M[None, :] + d[:, None], values, mask=(i < total)[None, :])


@gluon.jit
def _pass_by(rings, handed, used, layout: gl.constexpr, INDEX: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr):
    """Query tile ``used`` for a block without rows: nothing but its dS, zeros. There is room: the other block waited for it."""
    q_smem, _, _, _, empty_q, empty_do = rings
    ds_smem, full_ds, _ = handed
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    nothing = gl.zeros([ROWS, BLOCK_M], q_smem.dtype, layout)
    ds_smem.index(used % DS_STAGES).slice(INDEX * ROWS, ROWS).store(nothing)
    fence_async_shared()
    complete_use(full_ds, used, DS_STAGES)
    complete_use(empty_q, used, STAGES)
    complete_use(empty_do, used, STAGES)


@gluon.jit
def _consume(
    tensors, numbers, owned, rings, statistics, handed,
    INDEX: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr, OWN_STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of blocks ``INDEX`` and ``INDEX + 2`` of every item of this program."""
    dk, dv, tiles, records = tensors
    dk_row, dk_head, dv_row, dv_head, heads, num_items, scale, scale_log2 = numbers
    own_k, own_v, full_own, empty_own = owned
    q_smem = rings[0]
    dtype: gl.constexpr = q_smem.dtype
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_D: gl.constexpr = q_smem.shape[2]
    OTHER: gl.constexpr = INDEX + 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        k_total, q_total = own[3], met[3]
        await_use(full_own, done, OWN_STAGES)
        k_smem, v_smem = own_k.index(done % OWN_STAGES), own_v.index(done % OWN_STAGES)
        k0, v0 = k_smem.slice(INDEX * ROWS, ROWS), v_smem.slice(INDEX * ROWS, ROWS)
        k1, v1 = k_smem.slice(OTHER * ROWS, ROWS), v_smem.slice(OTHER * ROWS, ROWS)
        ok0, ok1 = start + INDEX * ROWS + n < k_total, start + OTHER * ROWS + n < k_total
        dk0, dv0 = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout), gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        dk1, dv1 = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout), gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        for _ in range(0, q_total, BLOCK_M):
            dk0, dv0 = add_query_tile(
                dk0, dv0, k0, v0, ok0, rings, statistics, handed, used, scale_log2, INDEX, STAGES, DS_STAGES, False
            )
            if OTHER * ROWS < k_total:
                dk1, dv1 = add_query_tile(
                    dk1, dv1, k1, v1, ok1, rings, statistics, handed, used, scale_log2, OTHER, STAGES, DS_STAGES
                )
            else:
                _pass_by(rings, handed, used, s_layout, OTHER, STAGES, DS_STAGES)
            used += 1
        complete_use(empty_own, done, OWN_STAGES)
        done += 1
        dk_base, dv_base = dk + head * dk_head, dv + head * dv_head
        store_block(dk_base, dk_row, dk0 * scale, start + INDEX * ROWS, own, dtype)
        store_block(dv_base, dv_row, dv0, start + INDEX * ROWS, own, dtype)
        store_block(dk_base, dk_row, dk1 * scale, start + OTHER * ROWS, own, dtype)
        store_block(dv_base, dv_row, dv1, start + OTHER * ROWS, own, dtype)


@gluon.jit
def _ask(sources, numbers, head, at, met, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """What the statistics of positions ``at`` and on are made of: log-sum-exp, its gradient, output and output gradient.

    Nothing is computed of them here, so nobody waits for them yet. Beyond the record zeros, as its rows are: nothing to add.
    """
    lse, grad_lse, out, grad_out = sources
    out_row, out_head, do_row, do_head, dlse_row, dlse_head, num_rows = numbers
    patch, patches, prefix, total = met
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    i = at + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    ok_M = i < total
    rows_M = row_of(i, patch, patches, prefix)
    lse_M = gl.load(lse + (head * num_rows + rows_M), mask=ok_M, other=0.0)
    out_MD = load_rows(out + head * out_head, rows_M, out_row, d, ok_M)
    do_MD = load_rows(grad_out + head * do_head, rows_M, do_row, d, ok_M)
    if len(grad_lse) > 0:
        dlse_M = gl.load(grad_lse[0] + head * dlse_head + rows_M.to(gl.int64) * dlse_row, mask=ok_M, other=0.0)
    else:
        dlse_M = gl.zeros_like(lse_M)
    return lse_M, dlse_M, out_MD, do_MD


@gluon.jit
def _hand_over(statistics, found, full_q, i, STAGES: gl.constexpr):
    """Makes delta of what :func:`_ask` found, and hands over the statistics of use ``i`` of the ring.

    Their place is free: this group has dS of use ``i - 2``, so the consumers are done with use ``i - 3``.
    """
    gl.static_assert(STAGES >= 3)
    lse_M, dlse_M, out_MD, do_MD = found
    delta_M = gl.sum(do_MD.to(gl.float32) * out_MD.to(gl.float32), 1) - dlse_M
    produce_statistics(statistics, lse_M, delta_M, full_q, i, STAGES)


@gluon.jit
def _make_dq(
    dq, tiles, records, numbers, made_of, made_of_numbers, owned, rings, statistics, handed,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr, OWN_STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of every item, and before that the statistics of its queries, which this group has the time to make.

    It asks for what they are made of two tiles ahead of dQ, and hands them over a tile ahead. dQ comes out transposed
    (``k' dS``), so that a tile of queries may have fewer rows than a product takes.
    """
    full_q = rings[2]
    dq_row, dq_head, heads, num_items, scale = numbers
    own_k, full_own, empty_own = owned[0], owned[2], owned[3]
    ds_smem, full_ds, empty_ds = handed
    dtype: gl.constexpr = own_k.dtype
    BLOCK_N: gl.constexpr = own_k.shape[1]
    BLOCK_D: gl.constexpr = own_k.shape[2]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        total, q_total = own[3], met[3]
        base = dq + head * dq_head
        found = _ask(made_of, made_of_numbers, head, 0, met, BLOCK_M, BLOCK_D)
        if q_total > 0:
            _hand_over(statistics, found, full_q, used, STAGES)
        found = _ask(made_of, made_of_numbers, head, BLOCK_M, met, BLOCK_M, BLOCK_D)
        await_use(full_own, done, OWN_STAGES)
        k_smem = own_k.index(done % OWN_STAGES)
        for at in range(0, q_total, BLOCK_M):
            if at + BLOCK_M < q_total:
                _hand_over(statistics, found, full_q, used + 1, STAGES)
            await_use(full_ds, used, DS_STAGES)
            zero = gl.zeros([BLOCK_D, BLOCK_M], gl.float32, o_layout)
            ds_NM = ds_smem.index(used % DS_STAGES)
            dq_DM = warpgroup_mma(k_smem.permute((1, 0)), ds_NM, zero, use_acc=False, is_async=True)
            dq_DM = warpgroup_mma_wait(0, deps=(dq_DM,))
            complete_use(empty_ds, used, DS_STAGES)
            used += 1
            _store_columns(base, dq_row, dq_DM * scale, at, own, dtype)
            found = _ask(made_of, made_of_numbers, head, at + 2 * BLOCK_M, met, BLOCK_M, BLOCK_D)
        complete_use(empty_own, done, OWN_STAGES)
        done += 1
        if q_total == 0:  # rows outside every segment
            for at in range(start, gl.minimum(total, start + BLOCK_N), BLOCK_M):
                _store_columns(base, dq_row, gl.zeros([BLOCK_D, BLOCK_M], gl.float32, o_layout), at, own, dtype)


@gluon.jit(do_not_specialize=["dlse_head", "num_rows", "heads", "num_items"])  # they change with every batch
def attention_backward_whole(
    q_desc, do_desc, k_desc, v_desc, q, k, v, out, grad_out, lse, grad_lse, dq, dk, dv, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, do_row, do_head, dlse_head, dlse_row,
    dq_row, dq_head, dk_row, dk_head, dv_row, dv_head, num_rows, heads, num_items, scale, scale_log2,
    HAS_GRAD_LSE: gl.constexpr, OWN_STAGES: gl.constexpr, DS_STAGES: gl.constexpr, REDUCER_REGISTERS: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All gradients of segments of at most 256 rows. An item is a segment of a head, a tile of the ring ``BLOCK_N`` queries."""
    dtype: gl.constexpr = q_desc.dtype
    BLOCKS: gl.constexpr = 2 * CONSUMERS
    own_k = make_own(dtype, BLOCKS * ROWS, BLOCK_D, 1, OWN_STAGES)
    own_v = make_own(dtype, BLOCKS * ROWS, BLOCK_D, 1, OWN_STAGES)
    bars = make_own_bars(own_k, BLOCK_N, 2, CONSUMERS + 1, 1, OWN_STAGES)
    owned = (own_k, own_v, bars[0], bars[1])
    rings = make_rings(q_desc, do_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, True)
    statistics = make_statistics((), (), num_rows, STAGES, BLOCK_N)  # not from memory, but of this:
    if HAS_GRAD_LSE:
        made_of = (lse, (grad_lse,), out, grad_out)
    else:
        made_of = (lse, (), out, grad_out)
    made_of_numbers = (out_row, out_head, do_row, do_head, dlse_row, dlse_head, num_rows)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCKS * ROWS, BLOCK_N], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [DS_STAGES, BLOCKS * ROWS, BLOCK_N], ds_layout)
    handed = (ds_smem, make_bars(DS_STAGES, CONSUMERS), make_bars(DS_STAGES, 1))
    own_sources = ((k_desc, k, k_row, k_head, own_k), (v_desc, v, v_row, v_head, own_v))
    sources = (q_desc, do_desc, q, grad_out, tiles, records)
    strides = (q_row, q_head, do_row, do_head, heads, num_items)
    brought = (own_sources, (), sources, strides, (), bars, rings)
    tensors = (dk, dv, tiles, records)
    numbers = (dk_row, dk_head, dv_row, dv_head, heads, num_items, scale, scale_log2)
    sums = (dq_row, dq_head, heads, num_items, scale)
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize(
        [
            (_consume, (tensors, numbers, owned, rings, statistics, handed, 0, STAGES, DS_STAGES, OWN_STAGES)),
            (_consume, (tensors, numbers, owned, rings, statistics, handed, 1, STAGES, DS_STAGES, OWN_STAGES)),
            (
                _make_dq,
                (dq, tiles, records, sums, made_of, made_of_numbers, owned, rings, statistics, handed,
                 BLOCK_N, STAGES, DS_STAGES, OWN_STAGES),
            ),
            (produce, (brought, STAGES, PART, 1, OWN_STAGES, True, False)),
        ],
        [4, 4, 4], [CONSUMER_REGISTERS, REDUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
