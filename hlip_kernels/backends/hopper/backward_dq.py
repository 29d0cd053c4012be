"""dQ for Hopper in Gluon: a producer of keys and values, and consumers with queries, as in :mod:`.forward`.

What consumers own, queries, output, its gradient and their rows' statistics, the producer brings ahead (:mod:`.own`).
Every element is written by one consumer, without atomics: the same bits every run. The price, together with dK and dV
(:mod:`.backward_keys`), is 7 products where one kernel that adds dQ up needs 5. Probabilities are made again from the logits
and the log-sum-exp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .own import load_own_statistics, make_own, make_own_bars, make_own_statistics, produce
from .ring import (
    ROWS,
    as_operand,
    await_use,
    begin_product,
    complete_use,
    item_of,
    make_rings,
    pass_by,
    row_of,
    store_block,
)


@gluon.jit
def _step(
    dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used, left, scale_log2,
    STAGES: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """What key tile ``used`` adds to dQ. Its keys must be there; those of the next are, at the end, unless this is the last.

    The exponentials overlap with the product of dO and V: the wait for the next keys is a loop, over which ptxas does not move
    the wait for that product.
    """
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    logits_MN = begin_product(q_smem, k_smem, used, STAGES)
    await_use(full_v, used, STAGES)
    dp_MN = begin_product(do_smem, v_smem, used, STAGES)
    logits_MN = warpgroup_mma_wait(1, deps=(logits_MN,))
    p_MN = gl.exp2(logits_MN * scale_log2 - lse_log2_M[:, None])
    if LAST:
        n = gl.arange(0, p_MN.shape[1], layout=gl.SliceLayout(0, p_MN.type.layout))
        p_MN = gl.where((n < left)[None, :], p_MN, 0.0)
    if not LAST:
        await_use(full_k, used + 1, STAGES)
    dp_MN = warpgroup_mma_wait(0, deps=(dp_MN,))
    complete_use(empty_v, used, STAGES)
    ds_MN = as_operand(p_MN * (dp_MN - delta_M[:, None]), k_smem)
    dq_MD = warpgroup_mma(ds_MN, k_smem.index(used % STAGES), dq_MD, is_async=True)
    dq_MD = warpgroup_mma_wait(0, deps=(dq_MD,))
    complete_use(empty_k, used, STAGES)
    return dq_MD


@gluon.jit
def _consume(
    tensors, numbers, owned, rings,
    INDEX: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OWN_STAGES: gl.constexpr,
):  # fmt: skip
    """dQ and delta of rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    dq, delta, tiles, records = tensors
    dq_row, dq_head, num_rows, heads, num_items, scale, scale_log2 = numbers
    own_q, own_do, own_out, own_statistics, full_own, empty_own = owned
    k_smem, _, full_k, _, _, _ = rings
    dtype: gl.constexpr = k_smem.dtype
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    BLOCK_D: gl.constexpr = k_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows: gl.constexpr = gl.SliceLayout(1, row_layout)
    m = gl.arange(0, ROWS, layout=rows)
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        q_patch, q_patches, q_prefix, q_total = own
        k_total = met[3]
        last = (k_total + BLOCK_N - 1) // BLOCK_N - 1
        at = start + INDEX * ROWS
        await_use(full_own, done, OWN_STAGES)
        if at < q_total:
            stage = done % OWN_STAGES
            place = stage * CONSUMERS + INDEX
            q_smem, do_smem = own_q.index(place), own_do.index(place)
            lse_log2_M, dlse_M = load_own_statistics(own_statistics, stage, INDEX, s_rows, rows)
            delta_M = gl.sum(do_smem.load(row_layout).to(gl.float32) * own_out.index(place).load(row_layout).to(gl.float32), 1)
            delta_M -= dlse_M
            rows_M = row_of(at + m, q_patch, q_patches, q_prefix)
            gl.store(delta + head * num_rows + rows_M, delta_M, mask=at + m < q_total)
            delta_M = gl.convert_layout(delta_M, s_rows)

            dq_MD = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
            if last >= 0:
                await_use(full_k, used, STAGES)
                for step in range(last):  # all full: only the last tile of a record may not be
                    dq_MD = _step(dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used + step, 0, scale_log2, STAGES, False)
                left = k_total - last * BLOCK_N
                dq_MD = _step(dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used + last, left, scale_log2, STAGES, True)
                used += last + 1
            complete_use(empty_own, done, OWN_STAGES)
            store_block(dq + head * dq_head, dq_row, dq_MD * scale, at, own, dtype)
        else:
            complete_use(empty_own, done, OWN_STAGES)
            used = pass_by(rings, used, k_total, STAGES)
        done += 1


@gluon.jit(do_not_specialize=["dlse_head", "num_rows", "heads", "num_items"])  # they change with every batch
def attention_backward_dq(
    k_desc, v_desc, q_desc, do_desc, out_desc, q, k, v, out, grad_out, lse, grad_lse, dq, delta, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, do_row, do_head, dlse_head, dlse_row, dq_row, dq_head,
    num_rows, heads, num_items, scale, scale_log2,
    HAS_GRAD_LSE: gl.constexpr, OWN_STAGES: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dQ, and ``delta = rowsum(dO * O) - dLSE`` for the dK/dV kernel. Items as in the forward kernel."""
    gl.static_assert(BLOCK_N == ROWS)  # the tiles of all tensors
    own_q = make_own(k_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    own_do = make_own(k_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    own_out = make_own(k_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    if HAS_GRAD_LSE:
        own_statistics = make_own_statistics(lse, (grad_lse, dlse_head, dlse_row), num_rows, CONSUMERS, OWN_STAGES)
    else:
        own_statistics = make_own_statistics(lse, (), num_rows, CONSUMERS, OWN_STAGES)
    bars = make_own_bars(own_q, BLOCK_N, 3, CONSUMERS, CONSUMERS, OWN_STAGES, 1)
    owned = (own_q, own_do, own_out, own_statistics, bars[0], bars[1])
    rings = make_rings(k_desc, v_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, False)
    own_sources = (
        (q_desc, q, q_row, q_head, own_q),
        (do_desc, grad_out, do_row, do_head, own_do),
        (out_desc, out, out_row, out_head, own_out),
    )
    sources = (k_desc, v_desc, k, v, tiles, records)
    strides = (k_row, k_head, v_row, v_head, heads, num_items)
    tensors = (dq, delta, tiles, records)
    numbers = (dq_row, dq_head, num_rows, heads, num_items, scale, scale_log2)
    brought = (own_sources, own_statistics, sources, strides, (), bars, rings)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, owned, rings, 0, CONSUMERS, STAGES, OWN_STAGES)),
                (_consume, (tensors, numbers, owned, rings, 1, CONSUMERS, STAGES, OWN_STAGES)),
                (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, False, False)),
            ],
            [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, owned, rings, 0, CONSUMERS, STAGES, OWN_STAGES)),
                (_consume, (tensors, numbers, owned, rings, 1, CONSUMERS, STAGES, OWN_STAGES)),
                (_consume, (tensors, numbers, owned, rings, 2, CONSUMERS, STAGES, OWN_STAGES)),
                (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, False, False)),
            ],
            [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
