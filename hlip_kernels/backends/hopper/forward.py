"""Forward attention for Hopper in Gluon: loads by TMA, products of warpgroups, and the softmax beside them.

A program is a producer and ``CONSUMERS`` consumers, four warps each. The producer fills a ring of key and value tiles; every
consumer owns 64 query rows and goes over all tiles of the ring. Whole tiles of patch rows come by TMA; the last patch rows
and the prefix rows, which lie elsewhere, are loaded by address into the same ring.

At head dim 64 the exponentials take as long as the products, so both must go on at once (Shah et al., arXiv 2407.08608). Inside
a consumer the product of one tile's probabilities and values goes on during the exponentials of the next; what that leaves
open, the logits, overlaps with the exponentials of the other consumers. The instructions around them take as long again as
either, so they are few.

Shape letters as in the Triton kernels: ``M`` query rows, ``N`` key rows, ``D`` head dim.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .own import make_own, make_own_bars, produce
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
    rows_of_first,
    store_rows,
)

LN_2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.4028234e38)  # a maximum so far: finite, since a whole tile may be of logits that are -inf


@gluon.jit
def _softmax(logits_MN, top_M, sum_MP, scale_log2):
    """Online softmax of one tile: probabilities, the new maximum and sums, and what older sums shrink by.

    A row has 4 sums, one for each thread that holds some of it (``P``): so a thread adds what it holds itself, and nobody
    else's before the last tile.
    """
    # The scaled maximum goes from tile to tile. Were it scaled anew, in one instruction with the difference, an unchanged one
    # would shrink by its rounding at every tile.
    new_top_M = gl.maximum(top_M, gl.max(logits_MN, 1) * scale_log2)
    p_MN = gl.exp2(logits_MN * scale_log2 - new_top_M[:, None])
    shrink_M = gl.exp2(top_M - new_top_M)
    sum_MP = sum_MP * gl.convert_layout(shrink_M, gl.SliceLayout(1, sum_MP.type.layout))[:, None] + _sum_by_thread(p_MN)
    return p_MN, new_top_M, sum_MP, shrink_M


@gluon.jit
def _mask(logits_MN, left):
    """Only the first ``left`` columns."""
    n = gl.arange(0, logits_MN.shape[1], layout=gl.SliceLayout(0, logits_MN.type.layout))
    return gl.where((n < left)[None, :], logits_MN, float("-inf"))


@gluon.jit
def _sum_by_thread(x_MN):
    """Four sums of a row, each of two in every eight columns: a thread's own, as the layout of a product has it."""
    return gl.sum(gl.sum(x_MN.reshape([x_MN.shape[0], x_MN.shape[1] // 8, 4, 2]), 1), 2)


@gluon.jit
def _softmax_packed(logits_MN, top_M, sum_MP, scale_log2, v_smem):
    """:func:`_softmax`, the probabilities packed at once where there are many: they wait in half of the registers.

    Not where there are few: ptxas 12.9 takes the halves of a register that waits apart, and puts them together again.
    """
    p_MN, top_M, sum_MP, shrink_M = _softmax(logits_MN, top_M, sum_MP, scale_log2)
    if logits_MN.shape[1] > ROWS:
        return as_operand(p_MN, v_smem), top_M, sum_MP, shrink_M
    else:
        return p_MN, top_M, sum_MP, shrink_M


@gluon.jit
def _add_values(acc_MD, p_MN, v_smem, used, STAGES: gl.constexpr):
    """Begins adding the values of tile ``used``, which must be there, by their probabilities."""
    v = v_smem.index(used % STAGES)
    if v.shape[0] > ROWS:
        return warpgroup_mma(p_MN, v, acc_MD, is_async=True)
    else:
        return warpgroup_mma(as_operand(p_MN, v_smem), v, acc_MD, is_async=True)


@gluon.jit
def _step(acc_MD, p_MN, top_M, sum_MP, q, rings, used, scale_log2, STAGES: gl.constexpr):
    """From the probabilities of tile ``used``, whose values must be there, to those of the next, whose values are then.

    What keeps ptxas (12.8 to 13.4) from undoing the overlap; ``tests/test_hopper_compile.py`` looks for it in the machine
    code: the wait for the next values is a loop, over which it does not move the wait for the product with these, so that
    comes after the exponentials. And no accumulator is in flight when the loop turns: it would wait after every single
    product. What goes from turn to turn are probabilities: logits, made while those before them are still in use, would have to
    be copied at every turn to where the next expects them, 32 registers a thread.
    """
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    await_use(full_k, used + 1, STAGES)
    logits_MN = begin_product(q, k_smem, used + 1, STAGES)
    acc_MD = _add_values(acc_MD, p_MN, v_smem, used, STAGES)
    logits_MN = warpgroup_mma_wait(1, deps=(logits_MN,))
    complete_use(empty_k, used + 1, STAGES)
    p_MN, top_M, sum_MP, shrink_M = _softmax_packed(logits_MN, top_M, sum_MP, scale_log2, v_smem)
    await_use(full_v, used + 1, STAGES)
    acc_MD = warpgroup_mma_wait(0, deps=(acc_MD,))
    complete_use(empty_v, used, STAGES)
    acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
    return acc_MD, p_MN, top_M, sum_MP


@gluon.jit
def _attend_few(
    acc_MD, top_M, sum_MP, q, rings, used, left, scale_log2,
    STAGES: gl.constexpr, FEW: gl.constexpr, IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A first tile of at most ``FEW`` keys: the output so far, maximum and sums, in place of those given."""
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FEW, 16])
    k, v = k_smem.index(used % STAGES).slice(0, FEW), v_smem.index(used % STAGES).slice(0, FEW)
    if IN_REGISTERS:
        q = gl.convert_layout(q, gl.DotOperandLayout(0, layout, 2))
    await_use(full_k, used, STAGES)
    zero = gl.zeros([ROWS, FEW], gl.float32, layout)
    logits_MN = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    logits_MN = _mask(warpgroup_mma_wait(0, deps=(logits_MN,)), left)
    complete_use(empty_k, used, STAGES)
    few_top_M = gl.maximum(gl.max(logits_MN, 1) * scale_log2, LOWEST)
    p_MN = gl.exp2(logits_MN * scale_log2 - few_top_M[:, None])
    top_M = gl.convert_layout(few_top_M, top_M.type.layout)
    sum_MP = gl.convert_layout(_sum_by_thread(p_MN), sum_MP.type.layout)
    await_use(full_v, used, STAGES)
    acc_MD = warpgroup_mma(as_operand(p_MN, v_smem), v, acc_MD, is_async=True)
    acc_MD = warpgroup_mma_wait(0, deps=(acc_MD,))
    complete_use(empty_v, used, STAGES)
    return acc_MD, top_M, sum_MP


@gluon.jit
def attend(q, rings, used, k_total, scale_log2, STAGES: gl.constexpr, FEW: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """64 query rows of one item, in registers or in shared memory, over the ``k_total`` keys that come from use ``used`` on.

    The tile that may not be full comes first: so the loop needs no mask, and nothing stands between it and the end. If it has
    at most ``FEW`` keys, a product of as many does (a slice of 14 x 14 patches and its prefix has three tiles of 64 and some
    keys), and one of 64 if it has no more.
    Returns the output before it is divided by the sum, the scaled maximum and the sum of its rows, and the use after its keys.
    """
    k_smem, v_smem, full_k, full_v, empty_k, empty_v = rings
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    BLOCK_D: gl.constexpr = k_smem.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    last = (k_total + BLOCK_N - 1) // BLOCK_N - 1
    acc_MD = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
    top_M = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, s_layout))
    sum_M = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, s_layout))
    sum_MP = _sum_by_thread(gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout))
    if last >= 0:
        left = k_total - last * BLOCK_N
        first = rows_of_first(left, k_total, BLOCK_N, FEW)
        few = first < BLOCK_N
        if few:
            if (BLOCK_N > ROWS) & (first > FEW):
                acc_MD, top_M, sum_MP = _attend_few(
                    acc_MD, top_M, sum_MP, q, rings, used, left, scale_log2, STAGES, ROWS, IN_REGISTERS
                )
            else:
                acc_MD, top_M, sum_MP = _attend_few(
                    acc_MD, top_M, sum_MP, q, rings, used, left, scale_log2, STAGES, FEW, IN_REGISTERS
                )
            used += 1
            last -= 1
        left = gl.where(few, BLOCK_N, left)
        await_use(full_k, used, STAGES)
        logits_MN = warpgroup_mma_wait(0, deps=(begin_product(q, k_smem, used, STAGES),))
        complete_use(empty_k, used, STAGES)
        p_MN, top_M, sum_MP, shrink_M = _softmax_packed(_mask(logits_MN, left), top_M, sum_MP, scale_log2, v_smem)
        if few:
            acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, o_layout))[:, None]
        await_use(full_v, used, STAGES)
        for step in range(last):  # all full
            acc_MD, p_MN, top_M, sum_MP = _step(acc_MD, p_MN, top_M, sum_MP, q, rings, used + step, scale_log2, STAGES)
        used += last
        acc_MD = warpgroup_mma_wait(0, deps=(_add_values(acc_MD, p_MN, v_smem, used, STAGES),))
        complete_use(empty_v, used, STAGES)
        used += 1
        sum_M = gl.convert_layout(gl.sum(sum_MP, 1), gl.SliceLayout(1, s_layout))
    else:  # rows outside every segment
        top_M = gl.zeros_like(top_M)
    return acc_MD, top_M, sum_M, used


@gluon.jit
def write_output(acc_MD, top_M, sum_M, out, out_row, lse, at, own, dtype: gl.constexpr):
    """Output and log-sum-exp of one head for the 64 rows from position ``at`` of a record on."""
    BLOCK_D: gl.constexpr = acc_MD.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    patch, patches, prefix, total = own
    i = at + gl.arange(0, ROWS, layout=top_M.type.layout)
    # One instruction, right to 2^-22; gl.log2 is some thirty.
    log2_M = gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [sum_M], gl.float32, True, 1)
    lse_M = (top_M + gl.where(sum_M == 1.0, 0.0, log2_M)) * LN_2
    gl.store(lse + row_of(i, patch, patches, prefix), lse_M, mask=i < total)
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    i = at + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    acc_MD = acc_MD * gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]
    rows_M = row_of(i, patch, patches, prefix)
    store_rows(out, rows_M, out_row, d, i < total, gl.convert_layout(acc_MD.to(dtype), layout))


@gluon.jit
def _consume(
    tensors, numbers, owned, rings, INDEX: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    PART: gl.constexpr, OWN_STAGES: gl.constexpr, OWN_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Query rows ``64 INDEX`` to ``64 INDEX + 63`` of every item of this program."""
    out, lse, tiles, records = tensors
    out_row, out_head, num_rows, heads, num_items, scale_log2 = numbers
    own_q, full_own, empty_own = owned
    dtype: gl.constexpr = rings[0].dtype
    BLOCK_N: gl.constexpr = rings[0].shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    used, done = 0, 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        head, start, own, met = item_of(tiles, records, item, heads)
        k_total = met[3]
        at = start + INDEX * ROWS
        await_use(full_own, done, OWN_STAGES)
        if at < own[3]:
            q = own_q.index(done % OWN_STAGES * CONSUMERS + INDEX)
            if OWN_IN_REGISTERS:
                q = q.load(gl.DotOperandLayout(0, s_layout, 2))
                complete_use(empty_own, done, OWN_STAGES)
            acc_MD, top_M, sum_M, used = attend(q, rings, used, k_total, scale_log2, STAGES, PART, OWN_IN_REGISTERS)
            if not OWN_IN_REGISTERS:
                complete_use(empty_own, done, OWN_STAGES)
            write_output(acc_MD, top_M, sum_M, out + head * out_head, out_row, lse + head * num_rows, at, own, dtype)
        else:
            complete_use(empty_own, done, OWN_STAGES)
            used = pass_by(rings, used, k_total, STAGES)
        done += 1


@gluon.jit(do_not_specialize=["num_rows", "heads", "num_items"])  # they change with every batch
def attention_forward(
    q_desc, k_desc, v_desc, q, k, v, out, lse, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, num_rows, heads, num_items, scale_log2,
    OWN_STAGES: gl.constexpr, OWN_IN_REGISTERS: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``out = softmax(scale q k^T) v`` and ``lse``: items ``program_id, program_id + num_programs, ...``.

    An item is one tile of ``64 CONSUMERS`` query rows of one head, the tiles with the most work first, all heads of one after
    the other: dealt out in turn, that leaves no multiprocessor idle for more than 1 part in 35 on the benchmarks' workloads.
    ``scale_log2`` is positive. Queries are multiplied from registers or, where those are short, from shared memory.
    """
    own_q = make_own(q_desc.dtype, ROWS, BLOCK_D, CONSUMERS, OWN_STAGES)
    bars = make_own_bars(own_q, ROWS, 1, CONSUMERS, CONSUMERS, OWN_STAGES)
    owned = (own_q, bars[0], bars[1])
    rings = make_rings(k_desc, v_desc, BLOCK_N, BLOCK_D, STAGES, CONSUMERS, False)
    sources = (k_desc, v_desc, k, v, tiles, records)
    strides = (k_row, k_head, v_row, v_head, heads, num_items)
    tensors = (out, lse, tiles, records)
    numbers = (out_row, out_head, num_rows, heads, num_items, scale_log2)
    own_sources = ((q_desc, q, q_row, q_head, own_q),)
    brought = (own_sources, (), sources, strides, (), bars, rings)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, owned, rings, 0, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (_consume, (tensors, numbers, owned, rings, 1, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, False, True)),
            ],
            [4, 4], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, owned, rings, 0, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (_consume, (tensors, numbers, owned, rings, 1, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (_consume, (tensors, numbers, owned, rings, 2, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, False, True)),
            ],
            [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 4)
        gl.warp_specialize(
            [
                (_consume, (tensors, numbers, owned, rings, 0, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (_consume, (tensors, numbers, owned, rings, 1, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (_consume, (tensors, numbers, owned, rings, 2, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (_consume, (tensors, numbers, owned, rings, 3, CONSUMERS, STAGES, PART, OWN_STAGES, OWN_IN_REGISTERS)),
                (produce, (brought, STAGES, PART, CONSUMERS, OWN_STAGES, False, True)),
            ],
            [4, 4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
