"""The model that simulates the Hopper kernels' order: between its bounds, and right where the answer is plain."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hlip_kernels import Layout
from hlip_kernels.backends.hopper.config import BACKWARD_WHOLE, FORWARD, FORWARD_WHOLE, KERNELS, Config
from hlip_kernels.performance import LAUNCH, RATES
from hlip_kernels.performance_hopper import (
    BARRIER,
    FIRST,
    ISSUED,
    OUTSIDE,
    PRODUCT_LATENCY,
    STEPS,
    Compute,
    clocks_per_step,
    predict_hopper,
    units,
)
from hlip_kernels.resources import read_rows
from hlip_kernels.resources_hopper import HopperResources

H200 = RATES["H200"]
CODEGEN = Path(__file__).parent / "codegen"


def config(consumers, block=64):
    return Config(consumers, block, stages=4, part=16, consumer_registers=160, producer_registers=32)


def test_every_kernel_has_its_order():
    assert set(STEPS) == set(KERNELS)


def test_units_of_a_step():
    """64 x 64 logits at head dim 64: 128 clocks a product, 256 of exponentials, counted by hand."""
    found = units("attention_forward", config(3), 64, H200)
    assert found["matrix"] == 3 * 2 * 128
    assert found["exponentials"] == 3 * 4096 / 16
    assert found["issue"] == 3 * ISSUED["attention_forward", 64][0]
    # Queries and keys for the logits, values; and the tiles that come in.
    assert found["shared memory"] == 3 * 3 * 64 * 64 * 2 / 128 + 2 * 64 * 64 * 2 / 128


def test_issue_slots_are_those_of_the_record():
    """Of every kernel with the triton that the device has; others may take a seventh more or less."""
    rows = {v: read_rows(CODEGEN / f"hopper-{v}.csv", HopperResources) for v in ("3.6", "3.8", "3.9")}
    for (kernel, head_dim), (issued, of_third_group) in ISSUED.items():
        for triton, found in rows.items():
            rows_of = [r for r in found if (r.kernel, r.head_dim) == (kernel, head_dim)]
            assert rows_of
            sizes = KERNELS[kernel][head_dim]
            share = sizes.block * sizes.own_blocks / 64  # of 64 x 64 logits in a step
            counts = [(r.instructions / share, r.reducer_instructions / 2) for r in rows_of]
            if triton == "3.6":
                assert max(n for n, _ in counts) - issued in (0, 1), (kernel, head_dim, counts)
            assert all(abs(n - issued) <= issued / 7 for n, _ in counts), (kernel, head_dim, triton, counts)
            assert all(abs(n - of_third_group) <= 0.2 * of_third_group for _, n in counts), (kernel, head_dim, triton, counts)


def test_shares_of_issue_slots_add_up():
    for kernel, actions in STEPS.items():
        assert sum(a.issue for a in actions if isinstance(a, Compute)) == pytest.approx(1), kernel


def test_one_consumer_has_only_its_own_overlap():
    """Values hide behind the exponentials, which hide some instructions; everything else is one after the other."""
    issued = ISSUED["attention_forward", 64][0]
    chain = 0.6 * issued + BARRIER + 128 + 4096 / 16 + 2 * (PRODUCT_LATENCY + BARRIER)
    assert clocks_per_step("attention_forward", config(1), 64, H200) == pytest.approx(chain)


@pytest.mark.parametrize("kernel", KERNELS)
def test_between_the_busiest_unit_and_no_overlap_at_all(kernel):
    alone = clocks_per_step(kernel, config(1), 64, H200)
    for consumers in (1, 2, 3):
        clocks = clocks_per_step(kernel, config(consumers), 64, H200)
        assert max(units(kernel, config(consumers), 64, H200).values()) <= clocks * 1.001
        assert clocks <= consumers * alone * 1.001


def test_three_consumers_of_64_rows_keep_the_tensor_cores_busiest():
    """What the forward kernel ships with: a larger share of busy tensor cores than with one or two."""
    share = {}
    for consumers in (1, 2, 3):
        share[consumers] = (
            units("attention_forward", config(consumers), 64, H200)["matrix"]
            / clocks_per_step("attention_forward", config(consumers), 64, H200)
        )  # fmt: skip
    assert share[1] < share[2] < share[3] and FORWARD[64].consumers == 3
    assert 0.3 < share[1] < 0.4 and 0.55 < share[2] < 0.75 and share[3] > 0.9


def test_time_of_one_segment_counted_by_hand():
    """132 tiles of 192 rows by one head: one tile a multiprocessor, 198 key tiles each."""
    layout = Layout.from_lengths([132 * 192], levels=("segment",))
    found = predict_hopper(layout, "segment", heads=1, head_dim=64, dtype=torch.bfloat16, rates=H200)
    steps = 132 * 192 // 128
    clocks = steps * clocks_per_step("attention_forward", FORWARD[64], 64, H200) + 3 * OUTSIDE["attention_forward"]
    assert found.seconds == pytest.approx(clocks / H200.clock + LAUNCH)
    assert found.balance == pytest.approx(1.0) and found.overlapped <= found.seconds < found.serial


@pytest.mark.parametrize("rest, keys, steps", [(10, 16, 0.2), (40, 64, 0.6), (70, 128, 1), (128, 128, 1)])
def test_the_first_tile_has_as_few_keys_as_will_do(rest, keys, steps):
    """192 rows of a segment of 384 and some more meet three tiles of 128 keys and a first one."""
    layout = Layout.from_lengths([384 + rest], levels=("segment",))
    alone = replace(H200, bandwidth=1e15, multiprocessors=1)
    found = predict_hopper(layout, "segment", heads=1, head_dim=64, dtype=torch.bfloat16, rates=alone)
    rows = 384 + rest
    blocks = -(-rest // 64)  # consumers with rows, in the third tile of queries
    assert found.useful == pytest.approx(rows**2 / ((6 + blocks) * 64 * (384 + keys)))
    issue = (6 + blocks) * ((3 + steps) * 2 * ISSUED["attention_forward", 64][0] + OUTSIDE["attention_forward"])
    exponentials = (6 + blocks) * (3 + steps) * 128 * 64 / 16
    assert found.overlapped == pytest.approx(max(issue, exponentials) / H200.clock + LAUNCH)


def test_time_of_whole_segments_counted_by_hand():
    """40 items a multiprocessor, of 198 rows: three tiles of 64 keys and one of 16, each consumer with one block of queries;
    or seven of 32 queries, each with two of keys."""
    layout = Layout.from_lengths([198] * (40 * 132), levels=("segment",))
    slow = replace(H200, bandwidth=1e15)  # so that bytes take no time
    rest = {"heads": 1, "head_dim": 64, "dtype": torch.bfloat16, "rates": slow}
    for kernel, table, tiles, blocks in (
        ("attention_forward_whole", FORWARD_WHOLE, 3 + FIRST[16], 1), ("attention_backward_whole", BACKWARD_WHOLE, 7, 2),
    ):  # fmt: skip
        found = predict_hopper(layout, "segment", **rest, backward="backward" in kernel)
        step = clocks_per_step(kernel, table[64], 64, slow)
        clocks = 40 * (tiles * blocks * step + table[64].consumers * OUTSIDE[kernel])
        assert found.seconds == pytest.approx(clocks / slow.clock + LAUNCH)
        busy = {unit: tiles * blocks * count for unit, count in units(kernel, table[64], 64, slow).items()}
        busy["issue"] += table[64].consumers * OUTSIDE[kernel]
        assert found.overlapped == pytest.approx(40 * max(busy.values()) / slow.clock + LAUNCH)
        assert found.useful == pytest.approx(
            198**2 / (256 * (3 * 64 + 16 if blocks == 1 else 7 * 32))
        ) and found.balance == pytest.approx(1.0)
    assert predict_hopper(layout, "segment", **rest | {"rates": replace(H200, bandwidth=1e12)}).binds == "memory"


def test_consumers_without_rows_cost_nothing_forward():
    half, whole = (Layout.from_lengths([n] * 1320, levels=("segment",)) for n in (128, 256))
    rest = {"heads": 1, "head_dim": 64, "dtype": torch.bfloat16, "rates": replace(H200, bandwidth=1e15)}
    times = [predict_hopper(layout, "segment", **rest).overlapped - LAUNCH for layout in (half, whole)]
    # By issue slots: half the rows, half the keys.
    clocks = [
        c * (tiles * ISSUED["attention_forward_whole", 64][0] + OUTSIDE["attention_forward_whole"])
        for c, tiles in ((2, 2), (4, 4))
    ]
    assert times == pytest.approx([10 * c / H200.clock for c in clocks])


def test_consumers_without_rows_cost_nothing_backward():
    """Head dim 128, two kernels of two consumers: of 64 rows one consumer has a step, of 128 both have two."""
    rest = {"heads": 1, "head_dim": 128, "dtype": torch.bfloat16, "rates": replace(H200, bandwidth=1e15), "backward": True}
    kernels = ("attention_backward_dq", "attention_backward_dkdv")
    for rows, busy, steps in ((64, 1, 1), (128, 2, 2)):
        layout = Layout.from_lengths([rows] * 1320, levels=("segment",))
        clocks = 0
        for kernel in kernels:
            alone = replace(KERNELS[kernel][128], consumers=busy)
            by_unit = {unit: steps * count for unit, count in units(kernel, alone, 128, H200).items()}
            by_unit["issue"] += busy * OUTSIDE[kernel]
            clocks += 10 * max(by_unit.values())
        assert predict_hopper(layout, "segment", **rest).overlapped == pytest.approx(clocks / H200.clock + 2 * LAUNCH)


def test_one_backward_kernel_is_predicted_faster_than_two_and_two_slower_than_forward():
    layout = Layout.from_lengths([12560] * 8, levels=("segment",))
    rest = {"heads": 12, "head_dim": 64, "dtype": torch.bfloat16, "rates": H200}
    forward = predict_hopper(layout, "segment", **rest).seconds
    two = predict_hopper(layout, "segment", **rest, backward=True).seconds
    one = predict_hopper(layout, "segment", **rest, backward=True, fused=True).seconds
    assert forward < one < two
    assert two / one == pytest.approx(7 / 5, rel=0.05)


def test_refusal_names_the_head_dim():
    layout = Layout.from_lengths([100], levels=("segment",))
    with pytest.raises(ValueError, match="head dim 80"):
        predict_hopper(layout, "segment", heads=1, head_dim=80, dtype=torch.bfloat16, rates=H200, backward=True)


def test_at_head_dim_128_there_is_one_way_back():
    layout = Layout.from_lengths([12560], levels=("segment",))
    rest = {"heads": 6, "head_dim": 128, "dtype": torch.bfloat16, "rates": H200, "backward": True}
    assert predict_hopper(layout, "segment", **rest) == predict_hopper(layout, "segment", **rest, fused=True)
