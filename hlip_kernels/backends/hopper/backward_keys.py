"""dK and dV for Hopper in Gluon, alone or with dQ: a producer of queries and output gradients, two consumers with keys.

A program owns 128 keys, brought ahead as in :mod:`.own`, and goes over the queries that see them. Each consumer makes logits
and dP of 64 keys, transposed (``k q^T``), so that they come out of one product as the left operand of the next without passing
through shared memory, and adds to its dK and dV: the same bits every run.

With dQ, that is five products where dQ apart takes seven. What both consumers make of a tile of queries, dS, they leave in
shared memory for a third group, the *reducer*: it multiplies it with the keys and adds the result to a float32 dQ in device
memory. Several programs add to the same dQ. ``ORDERED``, they do so one after the other, by tile of keys: ``turns`` counts for
every tile of queries how many have added, and a reducer waits for its number. The same bits every run. Nobody waits long:
programs take items in order and go over queries in order, so each follows the one before it at a distance of a tile or two.
Nobody waits for ever: the lowest item not done waits for none, and all programs run at once (a cooperative launch fails where
they cannot). Not ordered, they add whenever they come by. Level patterns only: with others, tiles of several records meet the
same queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .own import make_own, make_own_bars, produce
from .ring import (
    ROWS,
    as_operand,
    await_round_before,
    await_use,
    barrier,
    begin_product,
    complete_use,
    item_of,
    make_bars,
    make_rings,
    make_statistics,
    pass_by,
    row_of,
    store_block,
)


@gluon.jit
def add_query_tile(
    dk_ND, dv_ND, k_smem, v_smem, ok_N, rings, statistics, handed, used, scale_log2,
    INDEX: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr, LAST: gl.constexpr = True,
):  # fmt: skip
    """What query tile ``used`` adds to dK and dV, and, if there is a reducer (``DS_STAGES``), its dS for that.

    ``LAST`` unless this consumer has another block of keys for the tile: then it is done with the tile, and hands dS over.
    The exponentials overlap with the product of V and dO, and the rest with that of the probabilities and dO: every wait
    follows a product that needs what was computed before it, so ptxas can move none of them up.
    """
    q_smem, do_smem, full_q, full_do, empty_q, empty_do = rings
    _, _, _, lse_smem, delta_smem = statistics
    await_use(full_q, used, STAGES)
    logits_NM = begin_product(k_smem, q_smem, used, STAGES)
    await_use(full_do, used, STAGES)
    dp_NM = begin_product(v_smem, do_smem, used, STAGES)
    logits_NM = warpgroup_mma_wait(1, deps=(logits_NM,))
    row_layout: gl.constexpr = gl.SliceLayout(0, logits_NM.type.layout)
    lse_log2_M = lse_smem.index(used % STAGES).load(row_layout)
    p_NM = gl.exp2(logits_NM * scale_log2 - lse_log2_M[None, :])
    if DS_STAGES > 0:
        # Keys past the end are zeros and so are their logits, but exp2 of -lse may be Inf, and Inf times the zeros of K is NaN.
        p_NM = gl.where(ok_N[:, None], p_NM, 0.0)
    p_operand = as_operand(p_NM, do_smem)
    dv_ND = warpgroup_mma(p_operand, do_smem.index(used % STAGES), dv_ND, is_async=True)
    dp_NM = warpgroup_mma_wait(1, deps=(dp_NM,))
    delta_M = delta_smem.index(used % STAGES).load(row_layout)
    ds_NM = (p_NM * (dp_NM - delta_M[None, :])).to(q_smem.dtype)
    if DS_STAGES > 0:
        ds_smem, full_ds, empty_ds = handed
        await_round_before(empty_ds, used, DS_STAGES)
        ds_smem.index(used % DS_STAGES).slice(INDEX * ROWS, ROWS).store(ds_NM)
        if LAST:
            fence_async_shared()
            complete_use(full_ds, used, DS_STAGES)
    ds_operand = as_operand(ds_NM, q_smem)
    dk_ND = warpgroup_mma(ds_operand, q_smem.index(used % STAGES), dk_ND, is_async=True)
    dk_ND, dv_ND = warpgroup_mma_wait(0, deps=(dk_ND, dv_ND))
    if LAST:
        complete_use(empty_q, used, STAGES)
        complete_use(empty_do, used, STAGES)
    return dk_ND, dv_ND


@gluon.jit
def _consume(
    tensors, numbers, owned, rings, statistics, handed,
    INDEX: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, DS_STAGES: gl.constexpr, OWN_STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of key rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    dk, dv, tiles, records = tensors
    dk_row, dk_head, dv_row, dv_head, heads, num_items, scale, scale_log2 = numbers
    own_k, own_v, full_own, empty_own = owned
    q_smem = rings[0]
    dtype: gl.constexpr = q_smem.dtype
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_D: gl.constexpr = q_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        k_total, q_total = own[3], met[3]
        at = start + INDEX * ROWS
        await_use(full_own, done, OWN_STAGES)
        if (at < k_total) | (DS_STAGES > 0):  # a reducer expects dS of every consumer
            place = done % OWN_STAGES * CONSUMERS + INDEX
            k_smem, v_smem = own_k.index(place), own_v.index(place)
            dk_ND = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            dv_ND = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            for _ in range(0, q_total, BLOCK_M):
                dk_ND, dv_ND = add_query_tile(
                    dk_ND, dv_ND, k_smem, v_smem, at + n < k_total, rings, statistics, handed, used, scale_log2,
                    INDEX, STAGES, DS_STAGES,
                )  # fmt: skip
                used += 1
            complete_use(empty_own, done, OWN_STAGES)
            store_block(dk + head * dk_head, dk_row, dk_ND * scale, at, own, dtype)
            store_block(dv + head * dv_head, dv_row, dv_ND, at, own, dtype)
        else:
            complete_use(empty_own, done, OWN_STAGES)
            used = pass_by(rings, used, q_total, STAGES)
        done += 1


@gluon.jit(do_not_specialize=["num_rows", "heads", "num_items"])  # they change with every batch
def attention_backward_dkdv(
    q_desc, do_desc, k_desc, v_desc, q, k, v, grad_out, lse, delta, dk, dv, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, dk_row, dk_head, dv_row, dv_head,
    num_rows, heads, num_items, scale, scale_log2,
    OWN_STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV over the query rows that see each key (transposed records), ``BLOCK_N`` of them a tile of the ring.

    An item is one tile of 128 key rows of one head.
    """
    gl.static_assert(BLOCK_N == ROWS)  # the tiles of all tensors
    own_k = make_own(q_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    own_v = make_own(q_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    bars = make_own_bars(own_k, BLOCK_N, 2, CONSUMERS, CONSUMERS, OWN_STAGES)
    owned = (own_k, own_v, bars[0], bars[1])
    rings = make_rings(q_desc, do_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, True)
    statistics = make_statistics(lse, delta, num_rows, STAGES, BLOCK_N)
    sources = (q_desc, do_desc, q, grad_out, tiles, records)
    strides = (q_row, q_head, do_row, do_head, heads, num_items)
    own_sources = ((k_desc, k, k_row, k_head, own_k), (v_desc, v, v_row, v_head, own_v))
    brought = (own_sources, (), sources, strides, statistics, bars, rings)
    tensors = (dk, dv, tiles, records)
    numbers = (dk_row, dk_head, dv_row, dv_head, heads, num_items, scale, scale_log2)
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize(
        [
            (_consume, (tensors, numbers, owned, rings, statistics, (), 0, CONSUMERS, STAGES, 0, OWN_STAGES)),
            (_consume, (tensors, numbers, owned, rings, statistics, (), 1, CONSUMERS, STAGES, 0, OWN_STAGES)),
            (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, False, False)),
        ],
        [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _sum(
    dq_sum, turns, tiles, records, numbers, owned, handed,
    BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, DS_STAGES: gl.constexpr, OWN_STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """Adds ``dS k`` of every tile of queries of every item to dQ."""
    sum_row, sum_head, num_rows, heads, num_items, scale = numbers
    ds_smem, full_ds, empty_ds = handed
    own_k, full_own, empty_own = owned[0], owned[2], owned[3]
    BLOCK_D: gl.constexpr = own_k.shape[2]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_D, BLOCK_D // 4], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, row_layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, row_layout))
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, _, met = item_of(tiles, records, item, heads)
        number = start // (CONSUMERS * ROWS)  # of this tile of keys in its record
        q_patch, q_patches, q_prefix, q_total = met
        await_use(full_own, done, OWN_STAGES)
        place = done % OWN_STAGES * CONSUMERS
        for at in range(0, q_total, BLOCK_M):
            await_use(full_ds, used, DS_STAGES)
            dq_MD = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, o_layout)
            for index in gl.static_range(CONSUMERS):
                ds_MN = ds_smem.index(used % DS_STAGES).slice(index * ROWS, ROWS).permute((1, 0))
                dq_MD = warpgroup_mma(ds_MN, own_k.index(place + index), dq_MD, use_acc=index > 0, is_async=True)
            dq_MD = warpgroup_mma_wait(0, deps=(dq_MD,))
            complete_use(empty_ds, used, DS_STAGES)
            used += 1
            values = gl.convert_layout(dq_MD * scale, row_layout)
            i = at + m
            rows_M = row_of(i, q_patch, q_patches, q_prefix)
            pointers = dq_sum + head * sum_head + rows_M[:, None].to(gl.int64) * sum_row + d[None, :]
            # No two tiles of queries share their first row, so it names the tile.
            turn = turns + head * num_rows + row_of(at, q_patch, q_patches, q_prefix)
            if ORDERED:
                while gl.atomic_add(turn, 0, sem="acquire") != number:
                    pass
            gl.atomic_add(pointers, values, mask=(i < q_total)[:, None], sem="relaxed")
            if ORDERED:
                barrier()  # all four warps have added before one says so
                gl.atomic_add(turn, 1, sem="release")
        complete_use(empty_own, done, OWN_STAGES)
        done += 1


@gluon.jit(do_not_specialize=["num_rows", "heads", "num_items"])  # they change with every batch
def attention_backward_fused(
    q_desc, do_desc, k_desc, v_desc, q, k, v, grad_out, lse, delta, dq_sum, turns, dk, dv, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, sum_row, sum_head, dk_row, dk_head, dv_row, dv_head,
    num_rows, heads, num_items, scale, scale_log2,
    ORDERED: gl.constexpr, OWN_STAGES: gl.constexpr, DS_STAGES: gl.constexpr, REDUCER_REGISTERS: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK, dV, and ``dq_sum += scale dS k``, float32 ``(R, H, D)``. ``turns``: int32 ``(H, R)``, zeros; used if ``ORDERED``.

    An item is one tile of 128 key rows of one head, ``BLOCK_N`` query rows a tile of the ring.
    """
    gl.static_assert(BLOCK_N == ROWS)  # the tiles of all tensors
    own_k = make_own(q_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    own_v = make_own(q_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    bars = make_own_bars(own_k, BLOCK_N, 2, CONSUMERS + 1, CONSUMERS, OWN_STAGES)
    owned = (own_k, own_v, bars[0], bars[1])
    rings = make_rings(q_desc, do_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, True)
    statistics = make_statistics(lse, delta, num_rows, STAGES, BLOCK_N)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMERS * ROWS, BLOCK_N], q_desc.dtype)
    ds_smem = gl.allocate_shared_memory(q_desc.dtype, [DS_STAGES, CONSUMERS * ROWS, BLOCK_N], ds_layout)
    handed = (ds_smem, make_bars(DS_STAGES, CONSUMERS), make_bars(DS_STAGES, 1))
    sources = (q_desc, do_desc, q, grad_out, tiles, records)
    strides = (q_row, q_head, do_row, do_head, heads, num_items)
    own_sources = ((k_desc, k, k_row, k_head, own_k), (v_desc, v, v_row, v_head, own_v))
    brought = (own_sources, (), sources, strides, statistics, bars, rings)
    tensors = (dk, dv, tiles, records)
    numbers = (dk_row, dk_head, dv_row, dv_head, heads, num_items, scale, scale_log2)
    sums = (sum_row, sum_head, num_rows, heads, num_items, scale)
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize(
        [
            (_consume, (tensors, numbers, owned, rings, statistics, handed, 0, CONSUMERS, STAGES, DS_STAGES, OWN_STAGES)),
            (_consume, (tensors, numbers, owned, rings, statistics, handed, 1, CONSUMERS, STAGES, DS_STAGES, OWN_STAGES)),
            (_sum, (dq_sum, turns, tiles, records, sums, owned, handed, BLOCK_N, CONSUMERS, DS_STAGES, OWN_STAGES, ORDERED)),
            (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, True, False)),
        ],
        [4, 4, 4], [CONSUMER_REGISTERS, REDUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
