"""Backward attention for Hopper in Gluon: dQ, and dK with dV, each a producer and consumers as in :mod:`.forward`.

Every output element is written by one consumer, without atomics: the same bits every run. The price is 7 products where one
kernel that adds dQ in any order needs 5.

Probabilities are made again from the logits and the log-sum-exp. A consumer of dK and dV computes its logits transposed,
``k q^T``, so that they come out of one product as the left operand of the next without passing through shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from .ring import await_use, complete_use, load_rows, produce, row_of, store_rows

LOG2_E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # rows of a consumer: what one warpgroup product takes


@gluon.jit
def begin_product(a_smem, b_smem, i, STAGES: gl.constexpr):
    """Begins ``a b^T`` for tile ``i`` of a ring. The tile must be there."""
    BLOCK: gl.constexpr = b_smem.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    zero = gl.zeros([ROWS, BLOCK], gl.float32, layout)
    return warpgroup_mma(a_smem, b_smem.index(i % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def as_operand(x, acc, dtype: gl.constexpr):
    """A result of one product as the left operand of another."""
    return gl.convert_layout(x.to(dtype), gl.DotOperandLayout(0, acc.type.layout, 2))


@gluon.jit
def _dq_step(
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
def _consume_dq(
    tensors, numbers, q_smems, do_smems, rings, INDEX: gl.constexpr, STAGES: gl.constexpr, HAS_GRAD_LSE: gl.constexpr
):
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
        head = (item % heads).to(gl.int64)
        tile = tiles + 2 * (item // heads)
        record = records + gl.load(tile) * 8
        start = gl.load(tile + 1) + INDEX * ROWS
        q_patch, q_patches = gl.load(record), gl.load(record + 1)
        q_prefix, q_total = gl.load(record + 2), gl.load(record + 3) + q_patches
        k_total = gl.load(record + 5) + gl.load(record + 7)
        last = (k_total + BLOCK_N - 1) // BLOCK_N - 1

        i = start + m
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
                dq_MD = _dq_step(dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used + step, 0, scale_log2, STAGES, False)
            left = k_total - last * BLOCK_N
            dq_MD = _dq_step(dq_MD, q_smem, do_smem, lse_log2_M, delta_M, rings, used + last, left, scale_log2, STAGES, True)
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
    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_smems = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], row_layout)
    do_smems = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], row_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], v_desc.layout)
    full_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    full_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_k.index(i), count=1)
        mbarrier.init(full_v.index(i), count=1)
        mbarrier.init(empty_k.index(i), count=CONSUMERS)
        mbarrier.init(empty_v.index(i), count=CONSUMERS)

    rings = (k_smem, v_smem, full_k, full_v, empty_k, empty_v)
    sources = (k_desc, v_desc, k, v, tiles, records)
    strides = (k_row, k_head, v_row, v_head, heads, num_items)
    tensors = (q, out, grad_out, lse, grad_lse, dq, delta, tiles, records)
    numbers = (
        q_row, q_head, out_row, out_head, do_row, do_head, dlse_head, dlse_row, dq_row, dq_head,
        num_rows, heads, num_items, scale, scale_log2,
    )  # fmt: skip
    gl.static_assert(CONSUMERS == 3)
    gl.warp_specialize(
        [
            (_consume_dq, (tensors, numbers, q_smems, do_smems, rings, 0, STAGES, HAS_GRAD_LSE)),
            (_consume_dq, (tensors, numbers, q_smems, do_smems, rings, 1, STAGES, HAS_GRAD_LSE)),
            (_consume_dq, (tensors, numbers, q_smems, do_smems, rings, 2, STAGES, HAS_GRAD_LSE)),
            (produce, (sources, rings, strides, STAGES, PART)),
        ],
        [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _dkdv_step(
    dk_ND, dv_ND, k_smem, v_smem, lse_base, delta_base, rows_M, ok_M, rings, used, scale_log2, STAGES: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """What query tile ``used`` adds to dK and dV.

    The exponentials overlap with the product of V and dO, and the rest with that of the probabilities and dO: every wait
    follows a product that needs what was computed before it, so ptxas can move none of them up.
    """
    q_smem, do_smem, full_q, full_do, empty_q, empty_do = rings
    if MASK:
        lse_M = gl.load(lse_base + rows_M, mask=ok_M, other=float("inf"))  # exp2(... - inf) = 0
        delta_M = gl.load(delta_base + rows_M, mask=ok_M, other=0.0)
    else:
        lse_M = gl.load(lse_base + rows_M)
        delta_M = gl.load(delta_base + rows_M)
    await_use(full_q, used, STAGES)
    logits_NM = begin_product(k_smem, q_smem, used, STAGES)
    await_use(full_do, used, STAGES)
    dp_NM = begin_product(v_smem, do_smem, used, STAGES)
    logits_NM = warpgroup_mma_wait(1, deps=(logits_NM,))
    p_NM = gl.exp2(logits_NM * scale_log2 - (lse_M * LOG2_E)[None, :])
    p_operand = as_operand(p_NM, dv_ND, q_smem.dtype)
    dv_ND = warpgroup_mma(p_operand, do_smem.index(used % STAGES), dv_ND, is_async=True)
    dp_NM = warpgroup_mma_wait(1, deps=(dp_NM,))
    ds_operand = as_operand(p_NM * (dp_NM - delta_M[None, :]), dk_ND, q_smem.dtype)
    dk_ND = warpgroup_mma(ds_operand, q_smem.index(used % STAGES), dk_ND, is_async=True)
    dk_ND, dv_ND = warpgroup_mma_wait(0, deps=(dk_ND, dv_ND))
    complete_use(empty_q, used, STAGES)
    complete_use(empty_do, used, STAGES)
    return dk_ND, dv_ND


@gluon.jit
def _consume_dkdv(tensors, numbers, k_smems, v_smems, rings, INDEX: gl.constexpr, STAGES: gl.constexpr):
    """dK and dV of key rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    k, v, lse, delta, dk, dv, tiles, records = tensors
    k_row, k_head, v_row, v_head, dk_row, dk_head, dv_row, dv_head, num_rows, heads, num_items, scale, scale_log2 = numbers
    q_smem, do_smem, full_q, full_do, empty_q, empty_do = rings
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_D: gl.constexpr = q_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, row_layout))
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
    k_smem, v_smem = k_smems.index(INDEX), v_smems.index(INDEX)
    used = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head = (item % heads).to(gl.int64)
        tile = tiles + 2 * (item // heads)
        record = records + gl.load(tile) * 8
        start = gl.load(tile + 1) + INDEX * ROWS
        k_patch, k_patches = gl.load(record), gl.load(record + 1)
        k_prefix, k_total = gl.load(record + 2), gl.load(record + 3) + k_patches
        q_patch, q_patches = gl.load(record + 4), gl.load(record + 5)
        q_prefix, q_total = gl.load(record + 6), gl.load(record + 7) + q_patches
        whole = (q_patches // BLOCK_M) * BLOCK_M

        j = start + n
        ok_N = j < k_total
        rows_N = row_of(j, k_patch, k_patches, k_prefix)
        k_smem.store(load_rows(k + head * k_head, rows_N, k_row, d, ok_N))
        v_smem.store(load_rows(v + head * v_head, rows_N, v_row, d, ok_N))
        fence_async_shared()

        dk_ND = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        dv_ND = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        lse_base = lse + head * num_rows
        delta_base = delta + head * num_rows
        for at in range(0, whole, BLOCK_M):
            dk_ND, dv_ND = _dkdv_step(
                dk_ND, dv_ND, k_smem, v_smem, lse_base, delta_base, q_patch + at + m, m >= 0, rings, used, scale_log2,
                STAGES, False,
            )  # fmt: skip
            used += 1
        for at in range(whole, q_total, BLOCK_M):
            rows_M = row_of(at + m, q_patch, q_patches, q_prefix)
            dk_ND, dv_ND = _dkdv_step(
                dk_ND, dv_ND, k_smem, v_smem, lse_base, delta_base, rows_M, at + m < q_total, rings, used, scale_log2,
                STAGES, True,
            )  # fmt: skip
            used += 1
        dk_values = gl.convert_layout((dk_ND * scale).to(q_smem.dtype), row_layout)
        store_rows(dk + head * dk_head, rows_N, dk_row, d, ok_N, dk_values)
        dv_values = gl.convert_layout(dv_ND.to(q_smem.dtype), row_layout)
        store_rows(dv + head * dv_head, rows_N, dv_row, d, ok_N, dv_values)


@gluon.jit(do_not_specialize=["num_rows", "heads", "num_items"])  # they change with every batch
def attention_backward_dkdv(
    q_desc, do_desc, q, k, v, grad_out, lse, delta, dk, dv, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, dk_row, dk_head, dv_row, dv_head,
    num_rows, heads, num_items, scale, scale_log2,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV over the query rows that see each key (transposed records), ``BLOCK_N`` of them a tile of the ring.

    An item is one tile of ``64 CONSUMERS`` key rows of one head.
    """
    dtype: gl.constexpr = q_desc.dtype
    row_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], dtype)
    bar_layout: gl.constexpr = mbarrier.MBarrierLayout()
    k_smems = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], row_layout)
    v_smems = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BLOCK_D], row_layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], do_desc.layout)
    full_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    full_do = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    empty_do = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_q.index(i), count=1)
        mbarrier.init(full_do.index(i), count=1)
        mbarrier.init(empty_q.index(i), count=CONSUMERS)
        mbarrier.init(empty_do.index(i), count=CONSUMERS)

    rings = (q_smem, do_smem, full_q, full_do, empty_q, empty_do)
    sources = (q_desc, do_desc, q, grad_out, tiles, records)
    strides = (q_row, q_head, do_row, do_head, heads, num_items)
    tensors = (k, v, lse, delta, dk, dv, tiles, records)
    numbers = (
        k_row, k_head, v_row, v_head, dk_row, dk_head, dv_row, dv_head, num_rows, heads, num_items, scale, scale_log2,
    )  # fmt: skip
    gl.static_assert(CONSUMERS == 2)
    gl.warp_specialize(
        [
            (_consume_dkdv, (tensors, numbers, k_smems, v_smems, rings, 0, STAGES)),
            (_consume_dkdv, (tensors, numbers, k_smems, v_smems, rings, 1, STAGES)),
            (produce, (sources, rings, strides, STAGES, PART)),
        ],
        [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
