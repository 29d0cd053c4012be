"""Forward attention for Hopper in Gluon: loads by TMA, products of warpgroups, and the softmax beside them.

A program is a producer and ``CONSUMERS`` consumers, four warps each. The producer fills a ring of key and value tiles; every
consumer owns 64 query rows and goes over all tiles of the ring. Whole tiles of patch rows come by TMA; the last patch rows
and the prefix rows, which lie elsewhere, are loaded by address into the same ring.

At head dim 64 the exponentials take as long as the products, so both must go on at once (Shah et al., arXiv 2407.08608). Inside
a consumer the logits of the next tile are computed during the exponentials of this one; what that leaves open, the product
with the values, overlaps with the exponentials of the other consumers.

Shape letters as in the Triton kernels: ``M`` query rows, ``N`` key rows, ``D`` head dim.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .ring import (
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

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _softmax(logits_MN, max_M, sum_M, scale_log2, left, MASK: gl.constexpr):
    """Online softmax of one tile: probabilities, the new maximum and sum, and what older sums shrink by.

    ``left`` rows of the record begin with this tile's first; columns from there on do not count.
    """
    if MASK:
        n = gl.arange(0, logits_MN.shape[1], layout=gl.SliceLayout(0, logits_MN.type.layout))
        logits_MN = gl.where((n < left)[None, :], logits_MN, float("-inf"))
    new_max_M = gl.maximum(max_M, gl.max(logits_MN, 1))
    top_M = new_max_M * scale_log2
    p_MN = gl.exp2(logits_MN * scale_log2 - top_M[:, None])
    shrink_M = gl.exp2(max_M * scale_log2 - top_M)
    return p_MN, new_max_M, sum_M * shrink_M + gl.sum(p_MN, 1), shrink_M


@gluon.jit
def _begin_values(
    acc_MD, logits_MN, max_M, sum_M, v_smem, full_v, used, left, scale_log2, STAGES: gl.constexpr, MASK: gl.constexpr
):
    """Softmax of the logits of tile ``used``, then begins the product of its probabilities with its values."""
    await_use(full_v, used, STAGES)
    p_MN, max_M, sum_M, shrink_M = _softmax(logits_MN, max_M, sum_M, scale_log2, left, MASK)
    p_operand = as_operand(p_MN, acc_MD, v_smem.dtype)
    acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
    acc_MD = warpgroup_mma(p_operand, v_smem.index(used % STAGES), acc_MD, is_async=True)
    return acc_MD, max_M, sum_M


@gluon.jit
def _step(acc_MD, logits_MN, max_M, sum_M, q_MD, rings, used, scale_log2, STAGES: gl.constexpr):
    """Tile ``used`` from its logits on, while the logits of the next are computed.

    Three things keep ptxas (12.8 to 13.4) from undoing the overlap; ``tests/test_hopper_compile.py`` looks for it in the
    machine code. The wait for the values' tile is a loop, over which it moves no product, so the next logits begin before the
    exponentials. The wait for the products covers the values' product too, which needs the exponentials, so it cannot come
    before them. And no accumulator is in flight when the loop turns: it would wait after every single product.
    """
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    await_use(full_k, used + 1, STAGES)
    next_MN = begin_product(q_MD, k_smem, used + 1, STAGES)
    acc_MD, max_M, sum_M = _begin_values(acc_MD, logits_MN, max_M, sum_M, v_smem, full_v, used, 0, scale_log2, STAGES, False)
    acc_MD, next_MN = warpgroup_mma_wait(0, deps=(acc_MD, next_MN))
    complete_use(empty_k, used + 1, STAGES)
    complete_use(empty_v, used, STAGES)
    return acc_MD, next_MN, max_M, sum_M


@gluon.jit
def attend(q_MD, rings, used, k_total, scale_log2, STAGES: gl.constexpr):
    """64 query rows of one item over the ``k_total`` keys that come from use ``used`` on.

    Returns the output before it is divided by the sum, the maximum and the sum of its rows, and the use after its keys.
    """
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    BLOCK_D: gl.constexpr = k_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    last = (k_total + BLOCK_N - 1) // BLOCK_N - 1
    acc_MD = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
    max_M = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    sum_M = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    if last >= 0:
        await_use(full_k, used, STAGES)
        logits_MN = warpgroup_mma_wait(0, deps=(begin_product(q_MD, k_smem, used, STAGES),))
        complete_use(empty_k, used, STAGES)
        for step in range(last):  # all full: only the last tile of a record may not be
            acc_MD, logits_MN, max_M, sum_M = _step(
                acc_MD, logits_MN, max_M, sum_M, q_MD, rings, used + step, scale_log2, STAGES
            )
        used += last
        left = k_total - last * BLOCK_N
        acc_MD, max_M, sum_M = _begin_values(
            acc_MD, logits_MN, max_M, sum_M, v_smem, full_v, used, left, scale_log2, STAGES, True
        )
        acc_MD = warpgroup_mma_wait(0, deps=(acc_MD,))
        complete_use(empty_v, used, STAGES)
        used += 1
    else:  # rows outside every segment
        sum_M += 1.0
        max_M = gl.zeros_like(max_M)
    return acc_MD, max_M, sum_M, used


@gluon.jit
def write_output(acc_MD, max_M, sum_M, out, out_row, lse, at, own, scale_log2, dtype: gl.constexpr):
    """Output and log-sum-exp of one head for the 64 rows from position ``at`` of a record on."""
    BLOCK_D: gl.constexpr = acc_MD.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    patch, patches, prefix, total = own
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    i = at + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    ok_M = i < total
    rows_M = row_of(i, patch, patches, prefix)
    lse_M = gl.convert_layout((max_M * scale_log2 + gl.log2(sum_M)) * LN_2, gl.SliceLayout(1, layout))
    gl.store(lse + rows_M, lse_M, mask=ok_M)
    acc_MD = acc_MD / gl.convert_layout(sum_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
    store_rows(out, rows_M, out_row, d, ok_M, gl.convert_layout(acc_MD.to(dtype), layout))


@gluon.jit
def _consume(tensors, numbers, rings, INDEX: gl.constexpr, STAGES: gl.constexpr):
    """Query rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    q, out, lse, tiles, records = tensors
    q_row, q_head, out_row, out_head, num_rows, heads, num_items, scale_log2, sign = numbers
    k_smem = rings[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    BLOCK_D: gl.constexpr = k_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, row_layout))
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    used = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        q_patch, q_patches, q_prefix, q_total = own
        k_total = met[3]
        i = start + INDEX * ROWS + m
        rows_M = row_of(i, q_patch, q_patches, q_prefix)
        # In registers: a product of 64 x 64 with both sides in shared memory asks for all that it can give.
        q_MD = (load_rows(q + head * q_head, rows_M, q_row, d, i < q_total) * sign).to(k_smem.dtype)
        q_MD = gl.convert_layout(q_MD, gl.DotOperandLayout(0, s_layout, 2))
        acc_MD, max_M, sum_M, used = attend(q_MD, rings, used, k_total, scale_log2, STAGES)
        write_output(
            acc_MD, max_M, sum_M, out + head * out_head, out_row, lse + head * num_rows, start + INDEX * ROWS, own,
            scale_log2, k_smem.dtype,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "heads", "num_items"])  # they change with every batch
def attention_forward(
    k_desc, v_desc, q, k, v, out, lse, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, num_rows, heads, num_items, scale_log2, sign,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``out = softmax(scale q k^T) v`` and ``lse``: items ``program_id, program_id + num_programs, ...``.

    An item is one tile of ``64 CONSUMERS`` query rows of one head, the tiles with the most work first, all heads of one after
    the other: dealt out in turn, that leaves no multiprocessor idle for more than 1 part in 35 on the benchmarks' workloads.
    ``scale_log2`` is positive; ``sign`` is the scale's.
    """
    rings = make_rings(k_desc, v_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, False)
    sources = (k_desc, v_desc, k, v, tiles, records)
    strides = (k_row, k_head, v_row, v_head, heads, num_items)
    tensors = (q, out, lse, tiles, records)
    numbers = (q_row, q_head, out_row, out_head, num_rows, heads, num_items, scale_log2, sign)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, rings, 0, STAGES)),
                (_consume, (tensors, numbers, rings, 1, STAGES)),
                (produce, (sources, rings, strides, (), STAGES, PART)),
            ],
            [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, rings, 0, STAGES)),
                (_consume, (tensors, numbers, rings, 1, STAGES)),
                (_consume, (tensors, numbers, rings, 2, STAGES)),
                (produce, (sources, rings, strides, (), STAGES, PART)),
            ],
            [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
