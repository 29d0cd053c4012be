"""dQ for Hopper in Gluon: a producer of keys and values, and consumers with queries, as in :mod:`.forward`.

Every element is written by one consumer, without atomics: the same bits every run. The price, together with dK and dV
(:mod:`.backward_keys`), is 7 products where one kernel that adds dQ up needs 5. Probabilities are made again from the logits
and the log-sum-exp.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .ring import (
    LOG2_E,
    ROWS,
    as_operand,
    await_use,
    begin_product,
    complete_use,
    item_of,
    load_rows,
    make_rings,
    produce,
    row_of,
    store_rows,
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
    ds_MN = as_operand(p_MN * (dp_MN - delta_M[:, None]), dq_MD, k_smem.dtype)
    dq_MD = warpgroup_mma(ds_MN, k_smem.index(used % STAGES), dq_MD, is_async=True)
    dq_MD = warpgroup_mma_wait(0, deps=(dq_MD,))
    complete_use(empty_k, used, STAGES)
    return dq_MD


@gluon.jit
def _consume(tensors, numbers, q_smems, do_smems, rings, INDEX: gl.constexpr, STAGES: gl.constexpr, HAS_GRAD_LSE: gl.constexpr):
    """dQ and delta of rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    q, out, grad_out, lse, grad_lse, dq, delta, tiles, records = tensors
    (
        q_row, q_head, out_row, out_head, do_row, do_head, dlse_head, dlse_row, dq_row, dq_head,
        num_rows, heads, num_items, scale, scale_log2,
    ) = numbers  # fmt: skip
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    BLOCK_D: gl.constexpr = k_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, row_layout))
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    q_smem, do_smem = q_smems.index(INDEX), do_smems.index(INDEX)
    used = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        q_patch, q_patches, q_prefix, q_total = own
        _, _, _, k_total = met
        last = (k_total + BLOCK_N - 1) // BLOCK_N - 1

        i = start + INDEX * ROWS + m
        ok_M = i < q_total
        rows_M = row_of(i, q_patch, q_patches, q_prefix)
        q_smem.store(load_rows(q + head * q_head, rows_M, q_row, d, ok_M))
        do_MD = load_rows(grad_out + head * do_head, rows_M, do_row, d, ok_M)
        do_smem.store(do_MD)
        fence_async_shared()
        out_MD = load_rows(out + head * out_head, rows_M, out_row, d, ok_M)
        delta_M = gl.sum(do_MD.to(gl.float32) * out_MD.to(gl.float32), 1)
        if HAS_GRAD_LSE:
            delta_M -= gl.load(grad_lse + head * dlse_head + rows_M.to(gl.int64) * dlse_row, mask=ok_M, other=0.0)
        gl.store(delta + head * num_rows + rows_M, delta_M, mask=ok_M)
        lse_log2_M = gl.load(lse + head * num_rows + rows_M, mask=ok_M, other=0.0) * LOG2_E
        delta_M = gl.convert_layout(delta_M, gl.SliceLayout(1, s_layout))
        lse_log2_M = gl.convert_layout(lse_log2_M, gl.SliceLayout(1, s_layout))

        dq_MD = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        if last >= 0:
            await_use(full_k, used, STAGES)
            for step in range(last):  # all full: only the last tile of a record may not be
                dq_MD = _step(dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used + step, 0, scale_log2, STAGES, False)
            left = k_total - last * BLOCK_N
            dq_MD = _step(dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used + last, left, scale_log2, STAGES, True)
            used += last + 1
        values = gl.convert_layout((dq_MD * scale).to(q_smem.dtype), row_layout)
        store_rows(dq + head * dq_head, rows_M, dq_row, d, ok_M, values)


@gluon.jit(do_not_specialize=["dlse_head", "num_rows", "heads", "num_items"])  # they change with every batch
def attention_backward_dq(
    k_desc, v_desc, q, k, v, out, grad_out, lse, grad_lse, dq, delta, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, do_row, do_head, dlse_head, dlse_row, dq_row, dq_head,
    num_rows, heads, num_items, scale, scale_log2,
    HAS_GRAD_LSE: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dQ, and ``delta = rowsum(dO * O) - dLSE`` for the dK/dV kernel. Items as in the forward kernel."""
    dtype: gl.constexpr = k_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    q_smems = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], tile_layout)
    do_smems = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], tile_layout)
    rings = make_rings(k_desc, v_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, False)
    sources = (k_desc, v_desc, k, v, tiles, records)
    strides = (k_row, k_head, v_row, v_head, heads, num_items)
    tensors = (q, out, grad_out, lse, grad_lse, dq, delta, tiles, records)
    numbers = (
        q_row, q_head, out_row, out_head, do_row, do_head, dlse_head, dlse_row, dq_row, dq_head,
        num_rows, heads, num_items, scale, scale_log2,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, q_smems, do_smems, rings, 0, STAGES, HAS_GRAD_LSE)),
                (_consume, (tensors, numbers, q_smems, do_smems, rings, 1, STAGES, HAS_GRAD_LSE)),
                (produce, (sources, rings, strides, (), STAGES, PART)),
            ],
            [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, q_smems, do_smems, rings, 0, STAGES, HAS_GRAD_LSE)),
                (_consume, (tensors, numbers, q_smems, do_smems, rings, 1, STAGES, HAS_GRAD_LSE)),
                (_consume, (tensors, numbers, q_smems, do_smems, rings, 2, STAGES, HAS_GRAD_LSE)),
                (produce, (sources, rings, strides, (), STAGES, PART)),
            ],
            [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
