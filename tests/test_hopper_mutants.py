"""Every way of breaking the Hopper kernels that came to mind is noticed: by the emulator, or as an error of the result.

If one of these passes, the tests of tests/test_hopper.py prove less than they seem to. A mutation that no longer finds its text
fails too: rewrite it for what the kernels have become.
"""

import functools

import pytest
from emulated_hopper import WAYS, Case, EmulatedHopperBackend, sources
from gluon_emulation import KernelError, load_kernels

CASES = {
    "level": Case([[[193, 0, 70], [3]]], 2, "scan"),
    "summary": Case([[[66] + [2] * 20]], 3, "slice", heads=1, options={"neighbours": 1, "summary": "study"}),
    "neighbours": Case([[[70, 58], [128], [128]] * 4], 0, "slice", options={"neighbours": 1}),
    "negative": Case([[[130]]], 0, "slice", scale=-0.2),
    "large": Case([[[130, 65]]], 1, "study", logits=(10.0, 0.0)),
    "mixed": Case([[[193, 65]]], 1, "slice", strides="mixed"),
    "far below 0": Case([[[130, 65]]], 1, "scan", logits=(1.0, 4.0)),
    "grad of lse": Case([[[130, 65]]], 1, "scan", with_grad_lse=True),
    "far": Case([[[130, 65]]], 1, "scan"),
    "short": Case([[[196, 60, 33, 254], [100]]], 2, "slice"),
    "dead rows": Case([[[60, 33], [5]]], 2, "scan"),
    "very short": Case([[[100, 33, 70, 100, 90, 60, 120, 100, 110]]], 2, "slice"),
    "short and far": Case([[[130, 65]]], 1, "slice"),
}
# What is reported; several reports where the order of things decides which shows first.
WRONG = "error .*, allowed"  # the result is
RACE = "nothing that orders it after|is unwritten|more often than its count|lapped|told to expect"
STUCK = "deadlock"
FENCE = "without a fence_async_shared"
OUTSIDE = "outside its elements"
TWICE = "a second time|twice at once"

WAIT_STEP = "    acc_MD = warpgroup_mma_wait(0, deps=(acc_MD,))\n"
RELEASE_STEP = "    complete_use(empty_v, used, STAGES)\n"
WAIT_LAST = "        acc_MD = warpgroup_mma_wait(0, deps=(_add_values(acc_MD, p_MN, v_smem, used, STAGES),))\n"

# Released too early alone, keys do no harm, nor do values in dQ: the producer fills both in turn, and waits for both. Nor do
# keys of a whole segment by a consumer that passes them by: two places for queries keep it less than a round of the ring ahead.
# File, kernel's direction, name, case, report, text, what it becomes.
MUTANTS = [
    # the ring
    ("ring", "f", "no wait for an empty tile", "level", RACE, "    mbarrier.wait(bar, parity ^ 1)\n", ""),
    ("ring", "f", "empty tiles by the wrong parity", "level", f"{RACE}|{STUCK}", "parity ^ 1", "parity"),
    ("ring", "f", "no wait for a full tile", "level", RACE, "    mbarrier.wait(bar, parity)\n", ""),
    ("ring", "f", "a parity that turns too often", "level", f"{RACE}|{STUCK}", "(i // STAGES) & 1", "i & 1"),
    ("ring", "f", "no fence", "level", FENCE, "    fence_async_shared()\n", ""),
    ("ring", "f", "the fence after the arrival", "level", FENCE,
     "    fence_async_shared()\n    complete_use(full_a, i, STAGES)\n",
     "    complete_use(full_a, i, STAGES)\n    fence_async_shared()\n"),
    ("ring", "f", "half the bytes", "level", "told to expect", "desc.block_type.nbytes", "desc.block_type.nbytes // 2"),
    ("ring", "f", "twice the bytes", "level", STUCK, "desc.block_type.nbytes", "desc.block_type.nbytes * 2"),
    ("ring", "f", "an arrival too many", "level", f"{RACE}|{STUCK}", "count=1", "count=2"),
    ("ring", "f", "a tile loaded a row late", "level", WRONG, "[row, column]", "[row + 1, column]"),
    ("ring", "f", "loads into the next stage", "level", f"{RACE}|{WRONG}",
     "tma_load(desc, [row, column], bar, smem.index(i % STAGES))",
     "tma_load(desc, [row, column], bar, smem.index((i + 1) % STAGES))"),
    ("ring", "f", "parts in the wrong places", "level", f"{WRONG}|{RACE}", "a_tile.slice(part * PART",
     "a_tile.slice((part ^ 1) * PART"),
    ("ring", "split", "a part left out", "negative", "is unwritten", "static_range(BLOCK // PART)",
     "static_range(BLOCK // PART - 1)"),
    ("ring", "f", "prefix rows counted from the record", "level", f"{OUTSIDE}|{WRONG}", "prefix + (i - patches)", "prefix + i"),
    ("ring", "f", "no prefix rows", "level", WRONG, "position < total)", "position < patches)"),
    ("ring", "f", "rows past the end not zeroed", "level", WRONG, "mask=ok[:, None], other=0.0", "mask=ok[:, None]"),
    ("ring", "f", "rows past the end loaded", "level", f"{OUTSIDE}|{WRONG}",
     "gl.load(base + rows[:, None].to(gl.int64) * row_stride + d[None, :], mask=ok[:, None], other=0.0)",
     "gl.load(base + rows[:, None].to(gl.int64) * row_stride + d[None, :])"),
    ("ring", "f", "TMA past the patches", "level", f"{WRONG}|{RACE}|{STUCK}", "whole = (patches // BLOCK) * BLOCK",
     "whole = ((patches + BLOCK - 1) // BLOCK) * BLOCK"),
    ("ring", "f", "the queries' prefix rows", "summary", f"{WRONG}|{STUCK}|{RACE}",
     "gl.load(record + 6), gl.load(record + 7) + met_patches", "gl.load(record + 2), gl.load(record + 3) + met_patches"),
    ("ring", "f", "one tensor's stride for the other", "mixed", f"{OUTSIDE}|{WRONG}", "b + head * b_head",
     "b + head * a_head"),
    ("ring", "f", "row addresses of 32 bits", "far", "int32 overflows", "rows[:, None].to(gl.int64)", "rows[:, None]"),
    # forward
    ("forward", "f", "no wait for the first keys", "level", RACE, "        await_use(full_k, used, STAGES)\n", ""),
    ("forward", "f", "no wait for the next keys", "level", RACE, "    await_use(full_k, used + 1, STAGES)\n", ""),
    ("forward", "f", "no wait for the first values", "level", RACE, "        await_use(full_v, used, STAGES)\n", ""),
    ("forward", "f", "no wait for the next values", "level", RACE, "    await_use(full_v, used + 1, STAGES)\n", ""),
    ("forward", "f", "a key too many", "level", WRONG, "n < left", "n <= left"),
    ("forward", "f", "no rescaling of the accumulator", "level", WRONG,
     "    acc_MD = acc_MD * gl.convert_layout(shrink_M, gl.SliceLayout(1, acc_MD.type.layout))[:, None]\n", ""),
    ("forward", "f", "no rescaling of the sum", "level", WRONG,
     "sum_MP * gl.convert_layout(shrink_M, gl.SliceLayout(1, sum_MP.type.layout))[:, None]", "sum_MP"),
    ("forward", "f", "rescaling by too much", "level", WRONG, "gl.exp2(top_M - new_top_M)", "gl.exp2(top_M - 2 * new_top_M)"),
    ("forward", "f", "values released before the product", "level", "after the read", WAIT_STEP + RELEASE_STEP,
     RELEASE_STEP + WAIT_STEP),
    ("forward", "f", "the last values released before the product", "level", f"{RACE}|after the read",
     WAIT_LAST + "    " + RELEASE_STEP, "    " + RELEASE_STEP + WAIT_LAST),
    ("forward", "f", "keys never released", "level", STUCK, "    complete_use(empty_k, used + 1, STAGES)\n", ""),
    ("forward", "f", "values never released", "level", STUCK, RELEASE_STEP + "    acc_MD", "    acc_MD"),
    ("forward", "f", "this tile's keys released twice", "level", f"{RACE}|{STUCK}|after the read",
     "complete_use(empty_k, used + 1, STAGES)", "complete_use(empty_k, used, STAGES)"),
    ("forward", "f", "a wait for all products but two", "level", "does not cover", "wait(1, deps=(logits_MN,))",
     "wait(2, deps=(logits_MN,))"),
    ("forward", "f", "a wait for all products but one", "level", "does not cover", WAIT_STEP + RELEASE_STEP,
     WAIT_STEP.replace("0", "1") + RELEASE_STEP),
    ("forward", "f", "a product not waited for", "level", "reads the product", WAIT_STEP + RELEASE_STEP, RELEASE_STEP),
    ("forward", "f", "this tile's logits again", "level", f"{WRONG}|{STUCK}|{RACE}|after the read", "k_smem, used + 1, STAGES",
     "k_smem, used, STAGES"),
    ("forward", "f", "the next tile's values", "level", f"{RACE}|{WRONG}", "v_smem.index(used % STAGES)",
     "v_smem.index((used + 1) % STAGES)"),
    ("forward", "f", "the first tile unmasked", "level", WRONG, "_softmax(_mask(logits_MN, left)", "_softmax(logits_MN"),
    ("forward", "f", "the first tile cut short", "level", WRONG, "left = k_total - last * BLOCK_N",
     "left = k_total - last * BLOCK_N - 1"),
    ("forward", "f", "few keys unmasked", "level", WRONG, "_mask(warpgroup_mma_wait(0, deps=(logits_MN,)), left)",
     "warpgroup_mma_wait(0, deps=(logits_MN,))"),
    ("forward", "f", "no wait for few keys", "level", RACE, "    await_use(full_k, used, STAGES)\n    zero", "    zero"),
    ("forward", "f", "few keys never released", "level", STUCK,
     "    complete_use(empty_k, used, STAGES)\n    top_M", "    top_M"),
    ("forward", "f", "few values never released", "level", STUCK,
     "    complete_use(empty_v, used, STAGES)\n    return acc_MD, top_M, _", "    return acc_MD, top_M, _"),
    ("forward", "f", "no rescaling after few keys", "level", WRONG,
     "        if few:\n            acc_MD = acc_MD *", "        if False:\n            acc_MD = acc_MD *"),
    ("forward", "f", "few keys without their sum", "level", WRONG,
     "            sum_MP = gl.convert_layout(few_sum_MP, sum_MP.type.layout)\n", ""),
    ("ring", "f", "more than few keys", "short", WRONG, "(left <= PART) &", "(left <= 40) &"),
    ("forward", "f", "the last tile comes last", "level", WRONG, "made, STAGES, PART, True)", "made, STAGES, PART, False)"),
    ("forward", "f", "tiles counted once too often", "level", f"{RACE}|{STUCK}", "        used += 1\n",
     "        used += 2\n"),
    ("forward", "f", "a tile too few", "level", f"{STUCK}|{WRONG}|{RACE}|in flight", "BLOCK_N - 1) // BLOCK_N - 1",
     "BLOCK_N - 1) // BLOCK_N - 2"),
    ("forward", "f", "the keys' prefix rows", "summary", f"{OUTSIDE}|{TWICE}|{WRONG}", "number * q_head, at, own, place",
     "number * q_head, at, met, place"),
    ("forward", "f", "rows outside every segment as 0 / 0", "level", WRONG, "gl.full([ROWS], 1.0,", "gl.full([ROWS], 0.0,"),
    ("forward", "f", "lse in base 2", "level", WRONG, "log2_M)) * LN_2", "log2_M))"),
    ("forward", "f", "lse without the maximum", "level", WRONG, "(top_M + gl.where", "(gl.where"),
    ("forward", "f", "the maximum so far forgotten", "large", f"{WRONG}|nan",
     "gl.maximum(top_M, gl.max(logits_MN, 1) * scale_log2)", "gl.max(logits_MN, 1) * scale_log2"),
    ("forward", "f", "the queries' stride for the output", "mixed", f"{OUTSIDE}|{TWICE}|{WRONG}", "out_row, lse + head",
     "out_row + 8, lse + head"),
    ("forward", "f", "all consumers on the same rows", "level", f"{TWICE}|{RACE}", "+ INDEX * ROWS", "+ 0 * ROWS"),
    ("forward", "f", "rows past the end written", "level", f"{OUTSIDE}|{TWICE}", "lse_M, mask=i < total", "lse_M"),
    ("ring", "f", "one consumer's release is enough", "level", f"{RACE}|after the read",
     "empty_b = make_bars(STAGES, CONSUMERS)", "empty_b = make_bars(STAGES, 1)"),
    ("forward", "f", "items dealt out twice", "level", TWICE, "gl.num_programs(0)", "1"),
    ("ring", "f", "the head's address in 32 bits", "far", "int32 overflows|" + OUTSIDE, "(item % heads).to(gl.int64), ",
     "(item % heads) * 1000000, "),
    # forward, whole segments
    ("forward", "fw", "no wait for queries", "short", RACE, "        await_use(full_own, done, OWN_STAGES)\n", ""),
    ("forward", "fw", "queries given back before they are read", "short", f"{RACE}|after the read",
     "        await_use(full_own, done, OWN_STAGES)\n",
     "        await_use(full_own, done, OWN_STAGES)\n        complete_use(empty_own, done, OWN_STAGES)\n"),
    ("forward", "fw", "queries never given back", "short", STUCK,
     "            complete_use(empty_own, done, OWN_STAGES)\n            write_output", "            write_output"),
    ("forward", "fw", "queries never given back by who has none", "very short", STUCK,
     "            complete_use(empty_own, done, OWN_STAGES)\n            used =", "            used ="),
    ("forward", "fw", "no wait for an empty place", "short", f"{RACE}|after the read",
     "        await_round_before(empty_own, done, OWN_STAGES)\n", ""),
    ("forward", "fw", "the next item's queries", "short", f"{RACE}|{WRONG}",
     "own_q.index(done % OWN_STAGES * CONSUMERS + INDEX)", "own_q.index((done + 1) % OWN_STAGES * CONSUMERS + INDEX)"),
    ("forward", "fw", "all consumers on the same queries", "short", WRONG, "CONSUMERS + INDEX)", "CONSUMERS)"),
    ("forward", "fw", "keys not given back by who has no rows", "very short", STUCK,
     "        complete_use(empty_k, used, STAGES)\n", ""),
    ("forward", "fw", "given back by three of four", "short", f"{RACE}|after the read|more often",
     "make_bars(OWN_STAGES, CONSUMERS))\n", "make_bars(OWN_STAGES, CONSUMERS - 1))\n"),
    ("forward", "fw", "keys' stride for queries", "mixed", f"{WRONG}|{OUTSIDE}", "q + head * q_head, q_row",
     "q + head * q_head, q_row + 8"),
    # dQ, then dK with dV
    ("backward_dq", "split", "no wait for the next keys", "level", RACE, "        await_use(full_k, used + 1, STAGES)\n",
     "        pass\n"),
    ("backward_dq", "split", "no wait for the first keys", "level", RACE, "            await_use(full_k, used, STAGES)\n", ""),
    ("backward_dq", "split", "no mask where logits are far below 0", "far below 0", WRONG,
     "p_MN = gl.where((n < left)[None, :], p_MN, 0.0)", "p_MN = p_MN * 1.0"),
    ("backward_dq", "split", "no delta in dQ", "level", WRONG, "dp_MN - delta_M[:, None]", "dp_MN"),
    ("backward_keys", "split", "no delta in dK", "level", WRONG, "dp_NM - delta_M[None, :]", "dp_NM"),
    ("backward_dq", "split", "no gradient of lse", "grad of lse", WRONG, "delta_M -= gl.load", "delta_M += 0.0 * gl.load"),
    ("backward_dq", "split", "keys released too early", "level", "after the read",
     "    dq_MD = warpgroup_mma_wait(0, deps=(dq_MD,))\n    complete_use(empty_k, used, STAGES)\n",
     "    complete_use(empty_k, used, STAGES)\n    dq_MD = warpgroup_mma_wait(0, deps=(dq_MD,))\n"),
    ("backward_keys", "split", "queries never released", "level", STUCK, "    complete_use(empty_q, used, STAGES)\n", ""),
    ("backward_keys", "split", "a product read too early", "level", "does not cover", "logits_NM = warpgroup_mma_wait(1",
     "logits_NM = warpgroup_mma_wait(2"),
    ("backward_keys", "split", "no fence", "level", FENCE, "        fence_async_shared()\n\n", "\n"),
    ("backward_keys", "split", "operands exchanged", "level", f"{RACE}|{WRONG}", "warpgroup_mma(p_operand, do_smem",
     "warpgroup_mma(p_operand, q_smem"),
    ("ring", "split", "rows of lse from the wrong place", "mixed", f"{WRONG}|{OUTSIDE}",
     "num_rows + row_of(i, patch, patches, prefix)", "num_rows + i"),
    ("ring", "split", "lse of another head", "level", WRONG, "rows = head * num_rows", "rows = 0 * head * num_rows"),
    ("ring", "split", "lse in base e", "level", WRONG, "lse_M * LOG2_E", "lse_M * 1.0"),
    ("ring", "split", "statistics that nobody waits for", "level", RACE, "2 if STATISTICS else 1", "1"),
    ("ring", "split", "statistics before their tile is free", "level", f"{RACE}|after the read",
     "lse_smem.index(i % STAGES)", "lse_smem.index((i + 1) % STAGES)"),
    ("ring", "split", "statistics never handed over", "level", STUCK,
     "    complete_use(full, i, STAGES)\n\n\n@gluon.jit\ndef produce(",
     "\n\n@gluon.jit\ndef produce("),
    ("backward_keys", "split", "delta where lse belongs", "level", WRONG, "lse_log2_M = lse_smem", "lse_log2_M = delta_smem"),
    ("backward_keys", "split", "no scale", "level", WRONG, "(dk_ND * scale)", "(dk_ND * 1.0)"),
    ("backward_keys", "split", "dv where dk belongs", "level", f"{TWICE}|{WRONG}|{OUTSIDE}", "store_rows(dv + head * dv_head",
     "store_rows(dk + head * dk_head"),
    # all three in one
    ("backward_keys", "ordered", "dS written over", "level", RACE, "        await_round_before(empty_ds, used, DS_STAGES)\n",
     ""),
    ("backward_keys", "ordered", "no fence after dS", "level", FENCE, "            fence_async_shared()\n", ""),
    ("backward_keys", "ordered", "dS handed over before it is there", "level", f"{FENCE}|{RACE}",
     "            fence_async_shared()\n            complete_use(full_ds, used, DS_STAGES)\n",
     "            complete_use(full_ds, used, DS_STAGES)\n            fence_async_shared()\n"),
    ("backward_keys", "ordered", "one half of dS is enough", "level", RACE, "make_bars(DS_STAGES, CONSUMERS)",
     "make_bars(DS_STAGES, 1)"),
    ("backward_keys", "ordered", "keys written over while the reducer reads", "level", RACE,
     "                await_use(empty_ds, used - 1, DS_STAGES)", "                pass"),
    ("backward_keys", "ordered", "no wait for dS", "level", RACE, "            await_use(full_ds, used, DS_STAGES)\n", ""),
    ("backward_keys", "ordered", "dS never given back", "level", STUCK,
     "            complete_use(empty_ds, used, DS_STAGES)\n", ""),
    ("backward_keys", "ordered", "both consumers in the same half", "level", f"{RACE}|{WRONG}",
     ".slice(INDEX * ROWS, ROWS).store(ds_NM)", ".slice(0, ROWS).store(ds_NM)"),
    ("backward_keys", "ordered", "nobody waits for their turn", "level", "in no fixed order", "!= number:", "< 0:"),
    ("backward_keys", "ordered", "turns that begin with 1", "level", STUCK, "// BLOCK_N  # of", "// BLOCK_N + 1  # of"),
    ("backward_keys", "ordered", "a turn given on too early", "level", "no barrier", "                barrier()",
     "                pass"),
    ("backward_keys", "ordered", "a turn given on without a release", "level", "in no fixed order",
     'atomic_add(turn, 1, sem="release")', 'atomic_add(turn, 1, sem="relaxed")'),
    ("backward_keys", "ordered", "a turn taken without an acquire", "level", "in no fixed order", 'sem="acquire"',
     'sem="relaxed"'),
    ("backward_keys", "ordered", "no mask where logits are far below 0", "far below 0", WRONG,
     "p_NM = gl.where(ok_N[:, None], p_NM, 0.0)", "p_NM = p_NM * 1.0"),
    ("backward_keys", "any order", "rows past the end added", "level", f"{OUTSIDE}|{WRONG}", "mask=(i < q_total)[:, None]",
     "mask=(i >= 0)[:, None]"),
    ("backward_keys", "any order", "the reducer reads dS as it lies", "level", f"{WRONG}|multiplies", ".permute((1, 0))", ""),
    ("backward_keys", "any order", "no scale in dQ", "level", WRONG, "dq_MD * scale", "dq_MD * 1.0"),
    # all three of whole segments
    ("backward_whole", "whole", "no wait for keys", "short", RACE,
     "        await_use(full_own, done, OWN_STAGES)\n        k_smem, v_smem",
     "        k_smem, v_smem"),
    ("backward_whole", "whole", "the next item's keys", "short", f"{RACE}|{WRONG}|after the read",
     "own_k.index(done % OWN_STAGES), own_v", "own_k.index((done + 1) % OWN_STAGES), own_v"),
    ("backward_whole", "whole", "keys never given back", "short", STUCK,
     "        complete_use(empty_own, done, OWN_STAGES)\n        done += 1\n        dk_base",
     "        done += 1\n        dk_base"),
    ("backward_whole", "whole", "keys given back by two of three", "short", f"{RACE}|after the read|more often",
     "2, CONSUMERS + 1,", "2, CONSUMERS,"),
    ("backward_whole", "whole", "no wait for an empty place", "short", f"{RACE}|after the read|more often",
     "        await_round_before(empty_own, done, OWN_STAGES)\n", ""),
    ("own", "whole", "the first tile is enough", "short", RACE, "make_bars(OWN_STAGES, TENSORS * (ROWS_OWNED // BLOCK))",
     "make_bars(OWN_STAGES, 1)"),
    ("own", "whole", "the last tile does not count", "short", f"{RACE}|{STUCK}", "(ROWS_OWNED // BLOCK)",
     "(ROWS_OWNED // BLOCK) - 1"),
    ("backward_whole", "whole", "values that nobody waits for", "short", f"{RACE}|{STUCK}", "BLOCK_N, 2, CONSUMERS + 1",
     "BLOCK_N, 1, CONSUMERS + 1"),
    ("own", "whole", "half the bytes", "short", f"{RACE}|{STUCK}", "desc.block_type.nbytes", "desc.block_type.nbytes // 2"),
    ("own", "whole", "no fence after keys by address", "short", FENCE, "    fence_async_shared()\n", ""),
    # Where keys by address come behind queries by address, their fence would do; not among neighbours.
    ("own", "f", "no fence after queries by address", "neighbours", FENCE, "    fence_async_shared()\n", ""),
    ("own", "whole", "TMA past the patches", "short", f"{WRONG}|{OUTSIDE}", "at + BLOCK <= patches",
     "at + BLOCK <= patches + 2"),
    ("backward_whole", "whole", "values where keys belong", "short", WRONG, "k_desc, k + head * k_head, k_row",
     "v_desc, v + head * v_head, v_row"),
    ("own", "whole", "the first tile again", "short", WRONG, "[patch + at, column]", "[patch + start, column]"),
    ("own", "whole", "an arrival too few", "short", f"{RACE}|{STUCK}", "range(copied)", "range(copied - 1)"),
    ("backward_whole", "whole", "dS of a block without rows left as it was", "very short", "is unwritten",
     "    ds_smem.index(used % DS_STAGES).slice(INDEX * ROWS, ROWS).store(nothing)\n", ""),
    ("backward_whole", "whole", "no fence after its zeros", "very short", FENCE,
     "    fence_async_shared()\n    complete_use(full_ds", "    complete_use(full_ds"),
    ("backward_whole", "whole", "queries not given back for it", "short", f"{STUCK}|{RACE}",
     "    complete_use(empty_q, used, STAGES)\n",
     ""),
    ("backward_whole", "whole", "one consumer's dS is enough", "short", RACE, "make_bars(DS_STAGES, CONSUMERS)",
     "make_bars(DS_STAGES, 1)"),
    ("backward_whole", "whole", "tiles of queries given back by one of two", "short", f"{RACE}|after the read|more often",
     "STAGES, CONSUMERS, True)", "STAGES, 1, True)"),
    ("backward_keys", "whole", "dS handed over after the first block", "short", f"{RACE}|{FENCE}|more often",
     "        if LAST:\n            fence", "        if True:\n            fence"),
    ("backward_keys", "whole", "queries given back after the first block", "short", f"{RACE}|after the read|more often",
     "    if LAST:\n        complete_use(empty_q", "    if True:\n        complete_use(empty_q"),
    ("backward_whole", "whole", "no statistics of the first tile", "short", f"{STUCK}|{RACE}",
     "            _hand_over(statistics, found, full_q, used, STAGES)\n", "            pass\n"),
    ("backward_whole", "whole", "statistics of the wrong tile", "short", WRONG, "at + 2 * BLOCK_M", "at + BLOCK_M"),
    ("backward_whole", "whole", "statistics handed over a tile too late", "short",
     f"{STUCK}|{RACE}|{WRONG}|after the read|more often",
     "full_q, used + 1, STAGES)", "full_q, used, STAGES)"),
    ("backward_whole", "whole", "no wait for dS", "short", RACE, "            await_use(full_ds, used, DS_STAGES)\n", ""),
    ("backward_whole", "whole", "dS never given back", "short", STUCK,
     "            complete_use(empty_ds, used, DS_STAGES)\n", ""),
    ("backward_whole", "whole", "keys as they lie", "short", "multiplies", "k_smem.permute((1, 0))", "k_smem"),
    ("backward_whole", "whole", "no scale in dQ", "short", WRONG, "dq_DM * scale", "dq_DM * 1.0"),
    ("backward_whole", "whole", "no scale in dK", "short", WRONG, "dk1 * scale", "dk1 * 1.0"),
    ("backward_whole", "whole", "dK of one block in the place of the other", "short", f"{TWICE}|{WRONG}",
     "dk1 * scale, start + OTHER * ROWS", "dk1 * scale, start + INDEX * ROWS"),
    ("backward_whole", "whole", "keys past the end counted", "far below 0", WRONG, "start + OTHER * ROWS + n < k_total",
     "start + OTHER * ROWS + n < k_total + 200"),
    ("backward_whole", "whole", "queries past the end written", "short", f"{TWICE}|{OUTSIDE}|{WRONG}",
     "values, mask=(i < total)[None, :]",
     "values, mask=(i >= 0)[None, :]"),
    ("backward_whole", "whole", "rows outside every segment left as they are", "dead rows", WRONG, "if q_total == 0:",
     "if q_total < 0:"),
    ("backward_whole", "whole", "row addresses of 32 bits", "short and far", "int32 overflows|overflows",
     "prefix).to(gl.int64) * row_stride",
     "prefix) * row_stride"),
    ("backward_whole", "whole", "no gradient of lse", "grad of lse", WRONG, "    if HAS_GRAD_LSE:", "    if not HAS_GRAD_LSE:"),
    ("backward_whole", "whole", "delta without the gradient of lse", "grad of lse", WRONG,
     ", 1) - dlse_M", ", 1) + 0.0 * dlse_M"),
    ("backward_whole", "whole", "delta of the wrong rows", "short", f"{WRONG}|{OUTSIDE}",
     "out_MD = load_rows(out + head * out_head, rows_M,",
     "out_MD = load_rows(out + head * out_head, rows_M * 0 + patch,"),
    ("backward_whole", "whole", "the output's stride for its gradient", "mixed", f"{WRONG}|{OUTSIDE}",
     "grad_out + head * do_head, rows_M, do_row",
     "grad_out + head * do_head, rows_M, out_row + 8"),
]  # fmt: skip


@functools.cache
def source():
    return sources()


def run(kernels, direction: str, case: str, seed: int) -> None:
    options, deterministic = WAYS.get(direction, ({"whole": direction == "fw"}, True))
    backend = EmulatedHopperBackend(kernels, programs=3, far="far" in case.split(), seed=seed, **options)
    case = CASES[case]
    case.check(case.forward(backend) if direction in ("f", "fw") else case.backward(backend, deterministic))


@pytest.mark.parametrize(
    "file, direction, case, report, old, new",
    [(file, direction, *rest) for file, direction, _, *rest in MUTANTS],
    ids=[f"{file}: {name}" for file, _, name, *_ in MUTANTS],
)
def test_a_broken_kernel_is_noticed(request, file, direction, case, report, old, new):
    if case == "dead rows":
        request.getfixturevalue("poisoned")  # not for all: it asks for the same bits, as a caller does
    assert old in source()[file], f"{file}.py has no {old!r} any more"
    kernels = load_kernels(source() | {file: source()[file].replace(old, new)})
    with pytest.raises((KernelError, AssertionError), match=report):
        for seed in range(24):  # some need an order of things that few draws give
            run(kernels, direction, case, seed)


@pytest.mark.parametrize("direction, case", sorted({(direction, case) for _, direction, _, case, *_ in MUTANTS}))
def test_the_kernels_themselves_pass(direction, case):
    for seed in range(3):
        run(None, direction, case, seed)
