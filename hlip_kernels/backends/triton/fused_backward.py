"""The fast backward pass: dQ, dK and dV in one kernel, with five matrix products a logit instead of seven.

A program holds one tile of keys and goes through the query rows that see it (transposed records, as dK and dV do in
:mod:`.kernels`). Logits and dP are made once and serve all three gradients; what a tile of keys adds to dQ goes to a float32
buffer by atomic additions, in whatever order programs come by. So results differ in their last bits from run to run, and the
kernel runs only where the caller said ``deterministic=False`` (Dao, arXiv 2307.08691, algorithm 2).

Here probabilities are not made to sum to 1 again (see ``attention_backward_dq``), which takes a sum over all keys before the
first use. Float32 without TF32 therefore stays with the two kernels, where products bind anyway; beside the rounding to TF32
that of the log-sum-exp is small. Head dims without an entry in the table of tiles stay with the two kernels as well.

Shape letters as in :mod:`.kernels`.
"""

import triton
import triton.language as tl

from .kernels import LOG2_E
from .tiles import (
    add_tile,
    dot_of_d,
    dot_over_d,
    load_operand,
    load_tile,
    operand,
    row_of,
    store_tile,
    strides,
    sum_over_d,
    tile_of,
    times,
    zeros,
)


@triton.jit(do_not_specialize=["num_rows", "dlse_head"])  # they change with every batch
def attention_backward_delta(
    out, grad_out, grad_lse, delta, dq_sum,
    out_row, out_head, do_row, do_head, sum_row, sum_head, dlse_head, dlse_row, num_rows,
    HAS_GRAD_LSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """``delta = rowsum(dO * O) - dLSE`` of a block of rows of one head, and zeros where their dQ will be summed."""
    out_row, out_head = strides(out_row, out_head, MULTIPLE)
    do_row, do_head = strides(do_row, do_head, MULTIPLE)
    sum_row, sum_head = strides(sum_row, sum_head, MULTIPLE)
    head = tl.program_id(1).to(tl.int64)
    rows_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok_M = rows_M < num_rows
    do_MD = load_tile(grad_out + head * do_head, rows_M, do_row, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, True)
    out_MD = load_tile(out + head * out_head, rows_M, out_row, ok_M, HEAD_DIM, BLOCK_D, BLOCK_E, True)
    delta_M = sum_over_d(do_MD, out_MD)
    if HAS_GRAD_LSE:
        delta_M -= tl.load(grad_lse + head * dlse_head + rows_M.to(tl.int64) * dlse_row, mask=ok_M, other=0.0)
    tl.store(delta + head * num_rows + rows_M, delta_M, mask=ok_M)
    store_tile(dq_sum + head * sum_head, rows_M, sum_row, ok_M, zeros(BLOCK_M, BLOCK_D, BLOCK_E), HEAD_DIM)


@triton.jit
def _fused_step(
    dk_ND, dv_ND, k_ND, v_ND, ok_N, q_base, do_base, sum_base, lse_base, delta_base, q_stride, do_stride, sum_stride,
    rows_M, ok_M, scale, scale_log2,
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
    logits_NM = dot_over_d(k_ND, q_MD, PRECISION) * scale_log2
    p_NM = tl.exp2(logits_NM - (lse_M * LOG2_E)[None, :])
    # Keys past the end are zeros and so are their logits, but exp2 of -lse may be Inf, and Inf times the zeros of K is NaN.
    p_NM = tl.where(ok_N[:, None], p_NM, 0.0)
    dv_ND = dot_of_d(operand(p_NM.to(do_MD[0].dtype), PRECISION), do_MD, dv_ND, PRECISION)
    dp_NM = dot_over_d(v_ND, do_MD, PRECISION)
    ds_NM = operand((p_NM * (dp_NM - delta_M[None, :])).to(q_MD[0].dtype), PRECISION)
    dk_ND = dot_of_d(ds_NM, q_MD, dk_ND, PRECISION)
    dq_MD = dot_of_d(tl.trans(ds_NM), k_ND, zeros(rows_M.shape[0], BLOCK_D, BLOCK_E), PRECISION)
    add_tile(sum_base, rows_M, sum_stride, ok_M, times(dq_MD, scale), HEAD_DIM, MASK_ROWS)
    return dk_ND, dv_ND


@triton.jit(do_not_specialize=["num_rows"])  # it changes with every batch
def attention_backward_fused(
    q, k, v, grad_out, lse, delta, dq_sum, dk, dv, tiles, records,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, sum_row, sum_head, dk_row, dk_head, dv_row, dv_head,
    num_rows, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of key rows of one head, and what it adds to dQ of the query rows that see it.

    ``dq_sum``: float32 ``(R, H, D)``, zeros before; ``delta``: ``(H, R)``, both from :func:`attention_backward_delta`.
    """
    q_row, q_head = strides(q_row, q_head, MULTIPLE)
    k_row, k_head = strides(k_row, k_head, MULTIPLE)
    v_row, v_head = strides(v_row, v_head, MULTIPLE)
    do_row, do_head = strides(do_row, do_head, MULTIPLE)
    sum_row, sum_head = strides(sum_row, sum_head, MULTIPLE)
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
    sum_base = dq_sum + head * sum_head
    lse_base = lse + head * num_rows
    delta_base = delta + head * num_rows
    whole = (q_patches // BLOCK_M) * BLOCK_M
    for at in range(0, whole, BLOCK_M):
        rows_M = q_patch + at + m
        dk_ND, dv_ND = _fused_step(
            dk_ND, dv_ND, k_ND, v_ND, ok_N, q_base, do_base, sum_base, lse_base, delta_base, q_row, do_row, sum_row,
            rows_M, m < BLOCK_M, scale, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_E, False, PRECISION,
        )  # fmt: skip
    for at in range(whole, q_total, BLOCK_M):
        rows_M = row_of(at + m, q_patch, q_patches, q_prefix)
        dk_ND, dv_ND = _fused_step(
            dk_ND, dv_ND, k_ND, v_ND, ok_N, q_base, do_base, sum_base, lse_base, delta_base, q_row, do_row, sum_row,
            rows_M, at + m < q_total, scale, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_E, True, PRECISION,
        )  # fmt: skip
    store_tile(dk + head * dk_head, rows_N, dk_row, ok_N, times(dk_ND, scale), HEAD_DIM)
    store_tile(dv + head * dv_head, rows_N, dv_row, ok_N, dv_ND, HEAD_DIM)
