"""The performance model: its counts against counting by hand, its bounds, and the report that shows it."""

import dataclasses
import itertools

import pytest
import torch

from hlip_kernels import Layout
from hlip_kernels.backends.triton.config import FUSED_FROM, config_for
from hlip_kernels.packs import packs_of
from hlip_kernels.pattern import Plan
from hlip_kernels.performance import LAUNCH, RATES, predict, predict_kernel
from hlip_kernels.performance_short import predict_short, steps_of

H200 = RATES["H200"]
BF16 = {"heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "rates": H200}


def _issued(lengths, prefix, rows, keys):
    """(computed, real) logits of all segments, a tile at a time: whole tiles of patch rows, then the rest."""
    computed = real = 0
    for n in lengths:
        tiles = -(-(n + prefix) // rows)
        steps = n // keys + -(-(n % keys + prefix) // keys)
        computed += tiles * steps * rows * keys
        real += (n + prefix) ** 2
    return computed, real


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward_dq", "attention_backward_dkdv"])
def test_the_share_of_padding_is_what_counting_by_hand_gives(kernel, prefix):
    lengths = [1, 63, 64, 65, 127, 128, 129, 700]
    plan = Plan.of(Layout.from_lengths(lengths, num_prefix=prefix, levels=("slice",)).pattern("slice"))
    config = config_for(kernel, torch.bfloat16, 64, "hopper")
    sides = (config.block_m, config.block_n)
    computed, real = _issued(lengths, prefix, *(sides[::-1] if kernel.endswith("dkdv") else sides))
    assert predict_kernel(kernel, plan, 2, 64, torch.bfloat16, H200).useful == pytest.approx(real / computed)


def test_the_fast_backward_pass_counts_what_it_issues_and_moves():
    # 132 x 128 keys, one head: a tile of 128 keys for every multiprocessor, each over all rows.
    rows, heads, dim = 132 * 128, 1, 64
    layout = Layout.from_lengths([rows], num_prefix=0, levels=("study",))
    plan = Plan.of(layout.pattern("study"))
    config = config_for("attention_backward_fused", torch.bfloat16, dim, "hopper")
    assert config.block_n == 128 and rows % config.block_m == 0
    no_l2 = dataclasses.replace(H200, l2=1e30)
    got = predict_kernel("attention_backward_fused", plan, heads, dim, torch.bfloat16, no_l2)
    units = [128 * rows * 10 * dim / 4096, 128 * rows / 16, 128 * rows * 6 / 128]
    assert got.overlapped == pytest.approx(max(units) / H200.clock + LAUNCH) and got.binds == "matrix"
    assert got.serial == pytest.approx(sum(units) / H200.clock + LAUNCH)
    assert got.memory == pytest.approx(rows * dim * (6 * 2 + 2 * 4) / H200.bandwidth)
    got = predict_kernel("attention_backward_fused", plan, heads, dim, torch.bfloat16, H200)
    added = 132 * rows * dim  # floats: by every tile of keys to every row
    assert got.binds == "l2" and got.overlapped == pytest.approx(8 * added / H200.l2 + LAUNCH)
    whole = predict(layout, "study", **{**BF16, "heads": heads}, backward=True, deterministic=False)
    # Beside it: dO and O read and zeros written for delta, then the sums read and dQ written.
    assert whole.memory == pytest.approx(rows * dim * (20 + 2 * 2 + 4 + 4 + 2) / H200.bandwidth)


def test_the_fast_backward_pass_pays_for_long_segments_alone():
    def gain(length, **options):
        layout = Layout.from_lengths([length] * (65536 // length), num_prefix=0, levels=("study",))
        kind = BF16 | {"heads": 12} | options
        split, fast = (predict(layout, "study", **kind, backward=True, deterministic=d) for d in (True, False))
        return split.overlapped / fast.overlapped, split.serial / fast.serial

    assert gain(8192)[0] > 1.2 and gain(8192)[1] > 1.5
    assert max(gain(256)) < 1 < min(gain(1100))
    overlapped, serial = gain(FUSED_FROM)  # between the lengths from which one bound and the other says it pays
    assert overlapped < 1 < serial
    # No tiles: the same kernels.
    assert gain(8192, head_dim=256) == gain(8192, dtype=torch.float32) == (1, 1)


def test_tf32_products_take_twice_the_time_of_16_bit_ones_and_their_operands_are_rounded():
    layout = Layout.from_lengths([12800], num_prefix=0, levels=("study",))
    kind = {"heads": 1, "head_dim": 64, "dtype": torch.float32, "rates": H200}
    got = predict(layout, "study", **kind, allow_tf32=True)
    block = config_for("attention_forward", torch.float32, 64, "hopper", allow_tf32=True).block_m
    assert block == 128
    logits = 128 * 12800
    units = [logits * 4 * 64 / 2048, logits / 16, logits * (5 + 3 + 3 * 2 * 64 / 128) / 128]
    assert got.overlapped == pytest.approx(max(units) / H200.clock + LAUNCH)
    assert got.serial == pytest.approx(sum(units) / H200.clock + LAUNCH)
    assert predict(layout, "study", **kind).overlapped > 4 * got.overlapped


def test_one_long_segment_takes_as_long_as_its_units():
    # 12800 rows, one head: 100 tiles of 128 rows on 132 multiprocessors, so the time is that of one tile.
    layout = Layout.from_lengths([12800], num_prefix=0, levels=("study",))
    got = predict(layout, "study", heads=1, head_dim=64, dtype=torch.bfloat16, rates=H200)
    logits = 128 * 12800
    units = [logits * 4 * 64 / 4096, logits / 16, logits * 5 / 128]
    assert got.overlapped == pytest.approx(max(units) / H200.clock + LAUNCH)
    assert got.serial == pytest.approx(sum(units) / H200.clock + LAUNCH)
    assert got.binds == "matrix" and got.useful == 1.0 and got.balance == pytest.approx(100 / 132)


@pytest.mark.parametrize("backward", [False, True])
def test_bounds_are_ordered_and_grow_with_the_work(backward):
    times = []
    for scans in (1, 2, 4, 8):
        layout = Layout.from_grids([[(8, 14, 14)] * scans] * 16, num_prefix=2)
        p = predict(layout, "study", backward=backward, **BF16)
        assert p.memory < p.overlapped < p.serial and 0 < p.useful <= 1 and 0 < p.balance <= 1
        times.append(p.serial)
    # Twice the scans is four times the attention.
    assert all(3 < b / a < 4.5 for a, b in itertools.pairwise(times))


def test_short_segments_are_bound_by_memory_and_by_its_bandwidth():
    layout = Layout.from_lengths([30] * 4000, num_prefix=1, levels=("slice",))
    p = predict(layout, "slice", **BF16)
    slow = predict(layout, "slice", **{**BF16, "rates": dataclasses.replace(H200, bandwidth=H200.bandwidth / 2)})
    assert p.binds == "memory" and slow.memory == pytest.approx(2 * p.memory)
    assert p.memory == pytest.approx(4 * layout.num_rows * 2 * 64 * 2 / H200.bandwidth)


def test_nothing_to_do_takes_a_launch():
    assert predict(Layout.from_lengths([], num_prefix=0, levels=("slice",)), "slice", **BF16).serial == pytest.approx(LAUNCH)


def test_rates_at_a_measured_clock():
    seen = H200.measured(790e12, 4.3e12)
    assert seen.clock == pytest.approx(790e12 / 132 / 4096) and seen.bandwidth == 4.3e12
    layout = Layout.from_grids([[(8, 14, 14)] * 8] * 8, num_prefix=2)
    fast, slow = (predict(layout, "study", **{**BF16, "rates": r}) for r in (H200, seen))
    assert slow.serial / fast.serial == pytest.approx(H200.clock / seen.clock, rel=1e-2)


def test_the_report_shows_predictions_where_there_are_any():
    pytest.importorskip("pytest_benchmark")
    from benchmarks.report import COLUMNS, markdown

    row = dict.fromkeys(COLUMNS, "") | {
        "what": "attention", "part": "forward", "workload": "w", "level": "study", "median_s": 2e-3, "p10_s": 2e-3,
        "p90_s": 2e-3, "flops": 1e9, "bytes": 1e6, "matmul_flops": 1e12, "copy_bandwidth": 1e12,
    }  # fmt: skip
    ours = row | {"implementation": "hlip triton", "predicted_overlapped_s": 1e-3, "predicted_serial_s": 3e-3}
    text = markdown([ours, row | {"implementation": "peer", "median_s": 4e-3}])
    assert "| 1 ms to 3 ms | 2.00x |" in text and "|  | 1.00x |" in text
    assert "predicted" not in markdown([row | {"implementation": "peer"}])


def test_steps_of_the_short_kernels_are_what_counting_rows_gives():
    lengths = [5, 0, 64, 1, 1, 1, 40, 63, 100, 17, 198, 3, 2, 30, 272, 60, 60, 8]
    plan = Plan.of(Layout.from_lengths(lengths, num_prefix=0, levels=("slice",)).pattern("slice"))
    packs = packs_of(plan, torch.device("cpu"))
    expected = 0
    for first, count, _, _ in packs.packs.tolist():
        span_of_row = []
        for record in range(first, first + count):
            start = len(span_of_row)
            span_of_row += [(start, start + lengths[record])] * lengths[record]
        for tile in range(0, len(span_of_row), 16):
            spans = span_of_row[tile : tile + 16]
            expected += -(-(max(s[1] for s in spans) - min(s[0] for s in spans) // 16 * 16) // 16)
    assert steps_of(packs) == expected


def test_the_short_kernels_of_one_slice_take_as_long_as_their_units():
    layout = Layout.from_lengths([196] * 132, num_prefix=2, levels=("slice",))
    kind = {"heads": 1, "head_dim": 64, "dtype": torch.bfloat16, "rates": H200}
    steps = 13 * 13  # of 16 x 16 logits, on each of the 132 multiprocessors
    moved = 198 * 64 * 2
    forward = predict_short(layout, "slice", **kind)
    assert forward.memory == pytest.approx(4 * 132 * moved / H200.bandwidth)
    assert forward.binds == "memory" and forward.overlapped == pytest.approx(forward.memory + LAUNCH)
    assert forward.useful == pytest.approx(198**2 / (208 * 224))  # a warp has 32 queries
    logits, loads = 208 * 224, 13 * 7 * 2 * 4  # of one operand each, 512 bytes, for four products
    clocks = logits * 2 * 2 * 64 / (0.63 * H200.matrix[2]) + (loads * 512 + 2 * moved) / 128 + logits / 16 + logits * 5 / 128
    assert forward.serial == pytest.approx(forward.memory + clocks / H200.clock + LAUNCH)
    backward = predict_short(layout, "slice", backward=True, **kind)
    # 7 warps keep 32 keys each, but of the four schedulers three have two of them; dQ is shared by all 8.
    flops = (4 * 13 * 16 + steps) * 4 * 2 * 16**3
    assert backward.binds == "matrix"
    assert backward.overlapped == pytest.approx(flops / (0.63 * H200.matrix[2]) / H200.clock + LAUNCH)
    assert backward.useful == pytest.approx(198**2 / (208 * 224))
    assert backward.serial > backward.overlapped > forward.overlapped
    halves = predict_short(layout, "slice", backward=True, halves=True, **kind)
    assert halves.binds == "shared memory"
    assert halves.overlapped == pytest.approx((steps * 7 * 4 * 512 + 4 * moved) / 128 / H200.clock + LAUNCH)


@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_the_backward_pass_of_mixed_lengths_is_the_sum_of_its_kernels(gpu):
    """Large segments, middling ones and packs: a kernel each, where there is one."""
    kinds = {"large": [200] * 40, "small": [90] * 40, "packs": [10] * 300}
    kind = {"heads": 4, "head_dim": 64, "dtype": torch.bfloat16, "rates": RATES[gpu]}

    def serial(lengths, **options):
        layout = Layout.from_lengths(lengths, levels=("slice",))
        return predict_short(layout, "slice", backward=True, **kind, **options).serial

    together = serial([*kinds["packs"], *kinds["large"], *kinds["small"]])
    assert together == pytest.approx(sum(map(serial, kinds.values())))
    assert together < serial([n for lengths in kinds.values() for n in lengths], halves=True)
