"""Triton kernels of hierarchical attention: forward, dQ, and dK with dV.

A program handles one tile of rows of one record (see :mod:`hlip_kernels.pattern`) and one head. A record's rows form one
virtual sequence, its patch rows followed by its prefix rows, so prefix rows need no concatenation: they only change the
address of the last few rows. Softmax is online, base 2, in float32 (Dao, arXiv 2307.08691). Every output element is
written by exactly one program, without atomics, so results are the same bits every run.

Shape letters: ``M`` rows of a query tile, ``N`` rows of a key tile, ``D`` columns of a head (see :mod:`.tiles`).
"""

import triton
import triton.language as tl

from .tiles import (
    as_operand,
    dot_of_d,
    dot_over_d,
    load_operand,
    load_tile,
    operand,
    over,
    row_of,
    store_tile,
    strides,
    sum_over_d,
    tile_of,
    times,
    zeros,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234e38)  # a maximum so far: finite, since a whole tile may be of logits that are -inf


@triton.jit
def _forward_step(
    acc_MD, top_M, sum_M, q_MD, k_base, v_base, k_stride, v_stride, rows_N, ok_N, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    ROOM: tl.constexpr,
):  # fmt: skip
    """``top_M`` is the largest scaled logit so far. With ``ROOM``, scaling a logit and subtracting that is one instruction.

    The scaled maximum goes from step to step. Were it scaled anew, an unchanged one would shrink by its rounding at every step.
    """
    k_ND = load_operand(k_base, rows_N, k_stride, ok_N, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS, PRECISION)
    logits_MN = dot_over_d(q_MD, k_ND, PRECISION)
    if not ROOM:
        logits_MN *= scale_log2
    if MASK_ROWS:
        logits_MN = tl.where(ok_N[None, :], logits_MN, float("-inf"))
    if ROOM:
        new_top_M = tl.maximum(top_M, tl.max(logits_MN, 1) * scale_log2)
        p_MN = tl.exp2(logits_MN * scale_log2 - new_top_M[:, None])
    else:
        new_top_M = tl.maximum(top_M, tl.max(logits_MN, 1))
        p_MN = tl.exp2(logits_MN - new_top_M[:, None])
    shrink_M = tl.exp2(top_M - new_top_M)
    v_ND = load_operand(v_base, rows_N, v_stride, ok_N, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS, PRECISION)
    acc_MD = dot_of_d(operand(p_MN.to(v_ND[0].dtype), PRECISION), v_ND, times(acc_MD, shrink_M[:, None]), PRECISION)
    return acc_MD, new_top_M, sum_M * shrink_M + tl.sum(p_MN, 1)


@triton.jit(do_not_specialize=["num_rows"])  # it changes with every batch
def attention_forward(
    q, k, v, out, lse, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, num_rows, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """``out = softmax(scale q k^T) v`` and ``lse``, for one tile of query rows of one head. The scale must be above 0."""
    q_row, q_head = strides(q_row, q_head, MULTIPLE)
    k_row, k_head = strides(k_row, k_head, MULTIPLE)
    v_row, v_head = strides(v_row, v_head, MULTIPLE)
    out_row, out_head = strides(out_row, out_head, MULTIPLE)
    head, start, own, seen = tile_of(tiles, records)
    q_patch, q_patches, q_prefix, q_total = own
    k_patch, k_patches, k_prefix, k_total = seen

    n = tl.arange(0, BLOCK_N)
    i = start + tl.arange(0, BLOCK_M)
    ok_M = i < q_total
    rows_M = row_of(i, q_patch, q_patches, q_prefix)
    q_MD = load_operand(q + head * q_head, rows_M, q_row, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION)

    acc_MD = zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    top_M = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    sum_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    k_base = k + head * k_head
    v_base = v + head * v_head
    whole = (k_patches // BLOCK_N) * BLOCK_N
    # Fewer instructions, for more registers, where a tile has them: the scale with the exponentials, and addresses of a tile's
    # rows that stay while their base moves.
    ROOM: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16 and BLOCK_E == 0 and BLOCK_D <= 128
    for at in range(0, whole, BLOCK_N):  # whole tiles of patch rows: one address run, no masks
        rows_N = n if ROOM else k_patch + at + n
        to = (k_patch + at).to(tl.int64) if ROOM else 0
        acc_MD, top_M, sum_M = _forward_step(
            acc_MD, top_M, sum_M, q_MD, k_base + to * k_row, v_base + to * v_row, k_row, v_row, rows_N, n < BLOCK_N, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_E, False, PRECISION, ROOM,
        )  # fmt: skip
    for at in range(whole, k_total, BLOCK_N):  # the last patch rows and the prefix rows
        rows_N = row_of(at + n, k_patch, k_patches, k_prefix)
        acc_MD, top_M, sum_M = _forward_step(
            acc_MD, top_M, sum_M, q_MD, k_base, v_base, k_row, v_row, rows_N, at + n < k_total, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION, ROOM,
        )  # fmt: skip

    if k_total == 0:  # rows outside every segment
        sum_M += 1.0
        top_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    store_tile(out + head * out_head, rows_M, out_row, ok_M, over(acc_MD, sum_M[:, None]), HEAD_DIM)
    tl.store(lse + head * num_rows + rows_M, (top_M + tl.log2(sum_M)) * LN_2, mask=ok_M)


@triton.jit
def _dq_step(
    dq_MD, sum_M, q_MD, do_MD, lse_log2_M, delta_M, k_base, v_base, k_stride, v_stride, rows_N, ok_N, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k_ND = load_operand(k_base, rows_N, k_stride, ok_N, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS, PRECISION)
    v_ND = load_operand(v_base, rows_N, v_stride, ok_N, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS, PRECISION)
    logits_MN = dot_over_d(q_MD, k_ND, PRECISION) * scale_log2
    p_MN = tl.exp2(logits_MN - lse_log2_M[:, None])
    if MASK_ROWS:
        p_MN = tl.where(ok_N[None, :], p_MN, 0.0)
    if k_ND[0].dtype == tl.float32 and PRECISION == "ieee":
        sum_M += tl.sum(p_MN, 1)
    dp_MN = dot_over_d(do_MD, v_ND, PRECISION)
    ds_MN = p_MN * (dp_MN - delta_M[:, None])
    return dot_of_d(operand(ds_MN.to(k_ND[0].dtype), PRECISION), k_ND, dq_MD, PRECISION), sum_M


@triton.jit(do_not_specialize=["num_rows", "dlse_head"])  # they change with every batch
def attention_backward_dq(
    q, k, v, out, grad_out, lse, grad_lse, dq, delta, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, do_row, do_head, dq_row, dq_head,
    dlse_head, dlse_row, num_rows, scale, scale_log2,
    HAS_GRAD_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of query rows of one head; also writes ``delta = rowsum(dO * O) - dLSE`` for the dK/dV kernel.

    ``delta`` is ``(2, H, R)``. For float32 input its second half takes what the recomputed probabilities of a row must be
    multiplied by to sum to 1 again: beside logits in the hundreds, the log-sum-exp itself is rounded by more than the error
    that float32 is held to (though not by more than TF32, which does without).
    """
    q_row, q_head = strides(q_row, q_head, MULTIPLE)
    k_row, k_head = strides(k_row, k_head, MULTIPLE)
    v_row, v_head = strides(v_row, v_head, MULTIPLE)
    out_row, out_head = strides(out_row, out_head, MULTIPLE)
    do_row, do_head = strides(do_row, do_head, MULTIPLE)
    dq_row, dq_head = strides(dq_row, dq_head, MULTIPLE)
    head, start, own, seen = tile_of(tiles, records)
    q_patch, q_patches, q_prefix, q_total = own
    k_patch, k_patches, k_prefix, k_total = seen

    n = tl.arange(0, BLOCK_N)
    i = start + tl.arange(0, BLOCK_M)
    ok_M = i < q_total
    rows_M = row_of(i, q_patch, q_patches, q_prefix)
    do_MD = load_tile(grad_out + head * do_head, rows_M, do_row, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, True)
    out_MD = load_tile(out + head * out_head, rows_M, out_row, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, True)
    delta_M = sum_over_d(do_MD, out_MD)
    if HAS_GRAD_LSE:
        delta_M -= tl.load(grad_lse + head * dlse_head + rows_M.to(tl.int64) * dlse_row, mask=ok_M, other=0.0)
    tl.store(delta + head * num_rows + rows_M, delta_M, mask=ok_M)
    do_MD = as_operand(do_MD, PRECISION)
    lse_log2_M = tl.load(lse + head * num_rows + rows_M, mask=ok_M, other=0.0) * LOG2_E
    q_MD = load_operand(q + head * q_head, rows_M, q_row, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION)

    dq_MD = zeros(BLOCK_M, BLOCK_D, BLOCK_E)
    sum_M = tl.zeros([BLOCK_M], dtype=tl.float32)
    k_base = k + head * k_head
    v_base = v + head * v_head
    whole = (k_patches // BLOCK_N) * BLOCK_N
    for at in range(0, whole, BLOCK_N):
        rows_N = k_patch + at + n
        dq_MD, sum_M = _dq_step(
            dq_MD, sum_M, q_MD, do_MD, lse_log2_M, delta_M, k_base, v_base, k_row, v_row, rows_N, n < BLOCK_N, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_E, False, PRECISION,
        )  # fmt: skip
    for at in range(whole, k_total, BLOCK_N):
        rows_N = row_of(at + n, k_patch, k_patches, k_prefix)
        dq_MD, sum_M = _dq_step(
            dq_MD, sum_M, q_MD, do_MD, lse_log2_M, delta_M, k_base, v_base, k_row, v_row, rows_N, at + n < k_total, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION,
        )  # fmt: skip
    if q_MD[0].dtype == tl.float32 and PRECISION == "ieee":
        norm_M = 1.0 / tl.where(sum_M > 0, sum_M, 1.0)
        tl.store(delta + (tl.num_programs(1) + head) * num_rows + rows_M, norm_M, mask=ok_M)
        dq_MD = times(dq_MD, norm_M[:, None])
    store_tile(dq + head * dq_head, rows_M, dq_row, ok_M, times(dq_MD, scale), HEAD_DIM)


@triton.jit
def _dkdv_step(
    dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse_base, delta_base, norm_base, q_stride, do_stride, rows_M, ok_M,
    scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, MASK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_MD = load_operand(q_base, rows_M, q_stride, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS, PRECISION)
    do_MD = load_operand(do_base, rows_M, do_stride, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, MASK_ROWS, PRECISION)
    if MASK_ROWS:
        lse_M = tl.load(lse_base + rows_M, mask=ok_M, other=float("inf"))  # exp2(... - inf) = 0
        delta_M = tl.load(delta_base + rows_M, mask=ok_M, other=0.0)
    else:
        lse_M = tl.load(lse_base + rows_M)
        delta_M = tl.load(delta_base + rows_M)
    if q_MD[0].dtype == tl.float32 and PRECISION == "ieee":
        # Operands in the order of the other kernels, so that the logits are the same to the last bit.
        logits_NM = tl.trans(dot_over_d(q_MD, k_ND, PRECISION)) * scale_log2
    else:
        logits_NM = dot_over_d(k_ND, q_MD, PRECISION) * scale_log2
    p_NM = tl.exp2(logits_NM - (lse_M * LOG2_E)[None, :])
    if q_MD[0].dtype == tl.float32 and PRECISION == "ieee":
        p_NM *= tl.load(norm_base + rows_M, mask=ok_M, other=0.0)[None, :]
    dv_ND = dot_of_d(operand(p_NM.to(do_MD[0].dtype), PRECISION), do_MD, dv_ND, PRECISION)
    dp_NM = dot_over_d(v_ND, do_MD, PRECISION)
    ds_NM = p_NM * (dp_NM - delta_M[None, :])
    dk_ND = dot_of_d(operand(ds_NM.to(q_MD[0].dtype), PRECISION), q_MD, dk_ND, PRECISION)
    return dk_ND, dv_ND


@triton.jit(do_not_specialize=["num_rows"])  # it changes with every batch
def attention_backward_dkdv(
    q, k, v, grad_out, lse, delta, dk, dv, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, dk_row, dk_head, dv_row, dv_head,
    num_rows, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of key rows of one head, over the query rows that see it (transposed records)."""
    q_row, q_head = strides(q_row, q_head, MULTIPLE)
    k_row, k_head = strides(k_row, k_head, MULTIPLE)
    v_row, v_head = strides(v_row, v_head, MULTIPLE)
    do_row, do_head = strides(do_row, do_head, MULTIPLE)
    dk_row, dk_head = strides(dk_row, dk_head, MULTIPLE)
    dv_row, dv_head = strides(dv_row, dv_head, MULTIPLE)
    head, start, own, seen = tile_of(tiles, records)
    k_patch, k_patches, k_prefix, k_total = own
    q_patch, q_patches, q_prefix, q_total = seen

    m = tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    ok_N = j < k_total
    rows_N = row_of(j, k_patch, k_patches, k_prefix)
    k_ND = load_operand(k + head * k_head, rows_N, k_row, ok_N, HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION)
    v_ND = load_operand(v + head * v_head, rows_N, v_row, ok_N, HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION)

    dk_ND = zeros(BLOCK_N, BLOCK_D, BLOCK_E)
    dv_ND = zeros(BLOCK_N, BLOCK_D, BLOCK_E)
    q_base = q + head * q_head
    do_base = grad_out + head * do_head
    lse_base = lse + head * num_rows
    delta_base = delta + head * num_rows
    norm_base = delta + (tl.num_programs(1) + head) * num_rows
    whole = (q_patches // BLOCK_M) * BLOCK_M
    for at in range(0, whole, BLOCK_M):
        rows_M = q_patch + at + m
        dk_ND, dv_ND = _dkdv_step(
            dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse_base, delta_base, norm_base, q_row, do_row, rows_M, m < BLOCK_M,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_E, False, PRECISION,
        )  # fmt: skip
    for at in range(whole, q_total, BLOCK_M):
        rows_M = row_of(at + m, q_patch, q_patches, q_prefix)
        dk_ND, dv_ND = _dkdv_step(
            dk_ND, dv_ND, k_ND, v_ND, q_base, do_base, lse_base, delta_base, norm_base, q_row, do_row, rows_M, at + m < q_total,
            scale_log2, HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION,
        )  # fmt: skip
    store_tile(dk + head * dk_head, rows_N, dk_row, ok_N, times(dk_ND, scale), HEAD_DIM)
    store_tile(dv + head * dv_head, rows_N, dv_row, ok_N, dv_ND, HEAD_DIM)
