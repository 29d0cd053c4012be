"""The emulator of Gluon: a small right kernel passes, and everything that can be wrong with it is reported, in every order."""

import sys
import threading

import pytest
import torch
from gluon_emulation import DescriptorArgument, KernelError, launch, load_kernels
from gluon_emulation_values import (
    NVMMADistributedLayout,
    Scalar,
    SliceLayout,
    Tile,
    float16,
    float32,
    inline_asm_elementwise,
    int32,
    int64,
    max_,
    sum_,
)

HEAD = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
"""

# out = sum of a b_i^T over the tiles b_i of 64 rows: those of even number come by TMA, the others by address.
RING = (
    HEAD
    + """
@gluon.jit
def addresses(start, row_layout: gl.constexpr, ROWS: gl.constexpr):
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout))
    d = gl.arange(0, 64, layout=gl.SliceLayout(0, row_layout))
    return (start + m)[:, None] * 64 + d[None, :]


@gluon.jit
def consume(a, out, a_smems, ring, full, empty, steps, INDEX: gl.constexpr, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    a_smem = a_smems.index(INDEX)
    a_smem.store(gl.load(a + addresses(64 * INDEX, row_layout, 64)))
    fence_async_shared()
    acc = gl.zeros([64, 64], gl.float32, layout)
    for i in range(steps):
        mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
        acc = warpgroup_mma(a_smem, ring.index(i % STAGES).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(i % STAGES), count=1)
    gl.store(out + addresses(64 * INDEX, row_layout, 64), gl.convert_layout(acc, row_layout))


@gluon.jit
def produce(b_desc, b, ring, full, empty, steps, STAGES: gl.constexpr):
    row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in range(steps):
        mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)
        if i % 2 == 0:
            mbarrier.expect(full.index(i % STAGES), b_desc.block_type.nbytes)
            tma.async_load(b_desc, [i * 64, 0], full.index(i % STAGES), ring.index(i % STAGES))
        else:
            for part in gl.static_range(4):
                values = gl.load(b + addresses(i * 64 + part * 16, row_layout, 16))
                ring.index(i % STAGES).slice(part * 16, 16).store(values)
            fence_async_shared()
            mbarrier.arrive(full.index(i % STAGES), count=1)


@gluon.jit
def kernel(b_desc, a, b, out, steps, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    a_smems = gl.allocate_shared_memory(gl.float16, [2, 64, 64], layout)
    ring = gl.allocate_shared_memory(gl.float16, [STAGES, 64, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (consume, (a, out, a_smems, ring, full, empty, steps, 0, STAGES)),
            (consume, (a, out, a_smems, ring, full, empty, steps, 1, STAGES)),
            (produce, (b_desc, b, ring, full, empty, steps, STAGES)),
        ],
        [4, 4], [152, 56],
    )
"""
)
SEEDS = range(8)


def changed(text: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    return text


def run_ring(text: str, seed: int):
    torch.manual_seed(0)
    steps = 7
    a, b = torch.randn(128, 64).half(), torch.randn(64 * steps, 64).half()
    out = torch.full((128, 64), float("nan"))
    described = DescriptorArgument(b, tuple(b.shape), (64, 64))
    buffers = launch(load_kernels({"ring": text}).kernel, 1, described, a, b, out, steps, seed=seed, STAGES=3)
    return a, b, out, buffers


@pytest.mark.parametrize("seed", SEEDS)
def test_a_right_kernel_passes(seed):
    a, b, out, buffers = run_ring(RING, seed)
    expected = sum(a.double() @ tile.double().T for tile in b.split(64))
    assert torch.allclose(out.double(), expected, atol=1e-4)
    assert (buffers["out"].times_stored() == 1).all() and not buffers["a"].times_stored().any()


CONSUMER_LOOP = "    for i in range(steps):\n        mbarrier.wait(full"
PRODUCER_LOOP = "    for i in range(steps):\n        mbarrier.wait(empty"
WAIT_FULL = "        mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)\n"
WAIT_EMPTY = "        mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)\n"
WAIT_PRODUCT = "        acc = warpgroup_mma_wait(0, deps=(acc,))\n"
RELEASE = "        mbarrier.arrive(empty.index(i % STAGES), count=1)\n"
FENCE_RING = "            fence_async_shared()\n"
FENCE_A = "    fence_async_shared()\n    acc"
STORE_A = "    a_smem.store(gl.load(a + addresses(64 * INDEX, row_layout, 64)))\n"
INIT_FULL = "        mbarrier.init(full.index(i), count=1)\n"
INIT_EMPTY = "        mbarrier.init(empty.index(i), count=2)\n"
RIGHT_OPERAND = "ring.index(i % STAGES).permute((1, 0))"
STORE_OUT = "gl.store(out + addresses(64 * INDEX"
ZEROS = "gl.zeros([64, 64], gl.float32, layout)"
BYTES = "b_desc.block_type.nbytes"
AFTER_READ = "nothing that orders it after the read"
AFTER_WRITE = "nothing that orders it after the write"
ANY_RACE = "nothing that orders it after|is unwritten|more often than its count|lapped|told to expect"

# What is wrong, the report (several where the order of things decides which shows first), and how it comes about.
WRONG = [
    ("no wait for a full tile", f"{AFTER_WRITE}|is unwritten", (WAIT_FULL, "")),
    ("no wait for an empty tile", ANY_RACE, (WAIT_EMPTY, "")),
    ("the wrong parity", "is unwritten|deadlock|orders it after", ("(i // STAGES) & 1)\n", "((i // STAGES) & 1) ^ 1)\n")),
    ("the wrong stage", ANY_RACE, (RIGHT_OPERAND, "ring.index((i + 1) % STAGES).permute((1, 0))")),
    ("a stage that is not there", "takes number 3 of 3", (RIGHT_OPERAND, "ring.index(STAGES).permute((1, 0))")),
    ("no fence after a store", "multiplies ring.* without a fence_async_shared", (FENCE_RING, "")),
    ("no fence before the own product", "multiplies a_smems.* without a fence_async_shared", (FENCE_A, "    acc")),
    ("a fence before the store", "without a fence_async_shared", (FENCE_RING, ""),
     ("            for part", FENCE_RING + "            for part")),
    ("a fence after the arrival", "without a fence_async_shared", (FENCE_RING, ""),
     ("            mbarrier.arrive(full.index(i % STAGES), count=1)\n",
      "            mbarrier.arrive(full.index(i % STAGES), count=1)\n" + FENCE_RING)),
    ("a release before the product has been waited for", f"{AFTER_READ}: consume",
     (WAIT_PRODUCT + RELEASE, RELEASE + WAIT_PRODUCT)),
    ("no release", "deadlock: .*waits for the phase of parity . of empty", (RELEASE, "")),
    ("two releases", f"{AFTER_READ}|{AFTER_WRITE}|lapped|deadlock", (RELEASE, RELEASE * 2)),
    ("a product never waited for", f"no warpgroup_mma_wait has returned|in flight|{AFTER_READ}", (WAIT_PRODUCT, "")),
    ("a wait that leaves the product open", "takes from a wait the product .* does not cover", ("mma_wait(0", "mma_wait(1")),
    ("a product used before the wait", "reads the product begun at .*warpgroup_mma",
     (WAIT_PRODUCT, "        acc = acc * 2.0\n" + WAIT_PRODUCT)),
    ("a product in flight at the end", "ends with a product in flight",
     ("    " + STORE_OUT, "    warpgroup_mma(a_smem, a_smem, acc, is_async=True)\n    " + STORE_OUT)),
    ("one tile too few", "deadlock: .*waits for the phase of parity 0 of full",
     (PRODUCER_LOOP, PRODUCER_LOOP.replace("steps", "steps - 1"))),
    ("one tile too many", "ends with a TMA load in flight, into ring",
     (CONSUMER_LOOP, CONSUMER_LOOP.replace("steps", "steps - 1"))),
    ("an element stored twice", "writes out a second time", (STORE_OUT, "gl.store(out + addresses(32 * INDEX")),
    ("an element stored twice at once", "writes out (twice at once|a second time)",
     (STORE_OUT, "gl.store(out + 0 * addresses(64 * INDEX")),
    ("a load beyond the end", r"accesses b \(448, 64\) outside",
     ("gl.load(b + addresses(i * 64", "gl.load(b + addresses(i * 96")),
    ("a load before the beginning", "accesses a .*outside its elements, at offset -64",
     ("gl.load(a + addresses(64 * INDEX", "gl.load(a + addresses(64 * INDEX - 1")),
    ("a load of what the launch stores", "writes out where this launch reads it",
     (ZEROS, "gl.convert_layout(gl.load(out + addresses(64 * INDEX, row_layout, 64)), layout)")),
    ("too small a count", f"{ANY_RACE}|deadlock", (INIT_EMPTY, INIT_EMPTY.replace("2", "1"))),
    ("too large a count", "deadlock: .*1 arrivals", (INIT_EMPTY, INIT_EMPTY.replace("2", "3"))),
    ("too few bytes", "told to expect 4096", (BYTES, BYTES + " // 2")),
    ("too many bytes", "deadlock: .*8192 bytes to come", (BYTES, BYTES + " * 2")),
    ("shared memory that nobody wrote", "multiplies a_smems.*which is unwritten", (STORE_A, "")),
    ("a part of a tile that nobody wrote", f"is unwritten|{AFTER_WRITE}", ("static_range(4)", "static_range(3)")),
    ("a store over what is being multiplied", f"stores into a_smems.*{AFTER_READ}: consume",
     (WAIT_PRODUCT, "    " + STORE_A + WAIT_PRODUCT)),
    ("a barrier not initialised", "full.*which is not initialised", (INIT_FULL, "")),
    ("a barrier initialised twice", "initialises full.* a second time", (INIT_FULL, INIT_FULL * 2)),
    ("a barrier initialised by one partition alone", "which is not initialised|whose initialisation it does not know of",
     (INIT_FULL, ""), (PRODUCER_LOOP, "    for i in gl.static_range(STAGES):\n" + INIT_FULL + PRODUCER_LOOP)),
    ("different layouts", "layouts differ", ("gl.convert_layout(acc, row_layout)", "acc")),
    ("the wrong shape", r"multiplies \[64, 64\] by \[64, 32\]",
     (RIGHT_OPERAND, "ring.index(i % STAGES).slice(0, 32).permute((1, 0))")),
    ("a constant known only at run time", "gives consume a INDEX known only", ("steps, 0, STAGES", "steps, steps, STAGES")),
    ("warps that do not add up", "gives .4. warps to 2 partitions", ("[4, 4], [152", "[4], [152")),
    ("an unknown name", "the emulator has no gl.nothing", ("gl.zeros(", "gl.nothing(")),
]  # fmt: skip


@pytest.mark.parametrize("message, replacements", [(m, r) for _, m, *r in WRONG], ids=[name for name, *_ in WRONG])
def test_a_wrong_kernel_is_reported(message, replacements):
    text = changed(RING, *replacements)
    for seed in SEEDS:
        with pytest.raises((KernelError, AttributeError), match=message) as caught:
            run_ring(text, seed)
        if caught.type is KernelError and "ends with" not in str(caught.value):
            assert "ring.py:" in str(caught.value)


# Three programs and more add their rows to the same 64, in turn.
TURNS = (
    HEAD
    + """
@gluon.jit
def kernel(x, total, turns):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    d = gl.arange(0, 64, layout=layout)
    values = gl.load(x + gl.program_id(0) * 64 + d)
    while gl.atomic_add(turns, 0, sem="acquire") != gl.program_id(0):
        pass
    gl.atomic_add(total + d, values, sem="relaxed")
    gl.barrier()
    gl.atomic_add(turns, 1, sem="release")
"""
)


def run_turns(text: str, seed: int, ordered=("total",)):
    torch.manual_seed(0)
    x, total, turns = torch.randn(8, 64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    buffers = launch(load_kernels({"turns": text}).kernel, 8, x, total, turns, seed=seed, ordered=ordered)
    assert (buffers["total"].times_stored() == 8).all()
    assert torch.allclose(total, x.sum(0), atol=1e-5)
    return total


def test_additions_in_turn_are_the_same_bits_in_every_order():
    found = [run_turns(TURNS, seed) for seed in SEEDS]
    assert all(torch.equal(found[0], other) for other in found)


SPIN = '    while gl.atomic_add(turns, 0, sem="acquire") != gl.program_id(0):\n        pass\n'


def test_additions_in_any_order_are_not_and_a_seed_repeats_its_order():
    text = changed(TURNS, (SPIN, ""))
    found = [run_turns(text, seed, ordered=()) for seed in SEEDS]
    assert not all(torch.equal(found[0], other) for other in found)
    assert torch.equal(run_turns(text, 5, ordered=()), found[5])


@pytest.mark.parametrize(
    "old, new, message",
    [
        (SPIN, "", "adds to total in no fixed order"),
        ('sem="acquire"', 'sem="relaxed"', "adds to total in no fixed order"),
        ('1, sem="release"', '1, sem="relaxed"', "adds to total in no fixed order"),
        ('1, sem="release"', '0, sem="release"', "deadlock: .*spins while turns is 0"),
        ("    gl.barrier()\n", "", "releases at turns with no barrier"),
        ("values, sem", "values + gl.load(total + d), sem", "adds to total where this launch reads or writes it"),
    ],
)  # fmt: skip
def test_wrong_turns_are_reported(old, new, message):
    for seed in SEEDS:
        with pytest.raises(KernelError, match=message):
            run_turns(changed(TURNS, (old, new)), seed)


def scalar(x, dtype=int32):
    return Scalar(x, dtype)


def tile(*values, dtype=int32):
    return Tile(torch.tensor(values, dtype=dtype.torch), dtype, ROW)


PRODUCTS = NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
ROW = SliceLayout(1, PRODUCTS)


def test_integers_have_their_width():
    big = scalar(2**16)
    assert (big.to(int64) * big).value == 2**32 and (big.to(int64) * big).dtype is int64
    for product in (lambda: big * big, lambda: tile(2**16, 1) * 2**15, lambda: scalar(2**31 - 1) + 1):
        with pytest.raises(KernelError, match="int32 overflows"):
            product()
    assert (tile(2**16).to(int64) * 2**16).data.tolist() == [2**32]
    for negative in (lambda: scalar(-1) // 2, lambda: tile(3, -1) % 2):
        with pytest.raises(KernelError, match="of a negative number"):
            negative()
    with pytest.raises(KernelError, match="integers by /"):
        scalar(1) / 2


def test_dtypes_follow_triton():
    half = tile(1.0, 2049.0, dtype=float16)
    assert (half * 2).dtype is float16 and (half * 0.1).dtype is float16  # a Python number gives way
    assert (half * scalar(2.0, float32)).dtype is float32 and (half / half).dtype is float32
    assert (tile(1) + 1.5).dtype is float32 and (tile(1) < 2).data.dtype is torch.bool
    assert (half + 1).data[1] == 2048  # rounded at every step
    assert (scalar(1.0, float32) * 0.1).value == torch.tensor(0.1).item()


def test_assembly_that_is_not_known_is_refused():
    log2 = ("lg2.approx.ftz.f32 $0, $1;", "=f,f")
    assert inline_asm_elementwise(*log2, [tile(8.0, dtype=float32)], float32, True, 1).data.tolist() == [3]
    for asm, packed in (("ex2.approx.ftz.f32 $0, $1;", 1), (log2[0], 2)):
        with pytest.raises(KernelError, match="is not emulated"):
            inline_asm_elementwise(asm, log2[1], [tile(8.0, dtype=float32)], float32, True, packed)


def test_layouts_do_not_mix():
    across = Tile(torch.zeros(2, dtype=torch.int32), int32, SliceLayout(0, PRODUCTS))
    with pytest.raises(KernelError, match="layouts differ"):
        tile(1, 2) + across
    assert (tile(1, 2)[:, None] + across[None, :]).shape == [2, 2]
    with pytest.raises(KernelError, match=r"a new axis 0 needs SliceLayout\(0"):
        tile(1, 2)[None, :]
    with pytest.raises(KernelError, match="shapes differ"):
        tile(1, 2) + tile(1, 2, 3)
    eights = Tile(torch.arange(16.0), float32, ROW).reshape([2, 8])
    assert sum_(eights, 0).data.tolist() == [8 + 2 * i for i in range(8)] and sum_(eights, 1).layout == SliceLayout(
        1, eights.layout
    )
    with pytest.raises(KernelError, match="layouts differ"):
        eights + Tile(torch.zeros(2, 8), float32, PRODUCTS)
    with pytest.raises(KernelError, match="not as many elements"):
        eights.reshape([4, 8])
    nan = Tile(torch.tensor([[float("nan"), 1.0], [float("nan")] * 2]), float32, PRODUCTS)
    assert max_(nan, 1).layout == ROW and max_(nan, 1).data[0] == 1 and max_(nan, 1).data[1].isnan()


def test_masked_lanes_are_not_touched():
    text = (
        HEAD
        + """
@gluon.jit
def kernel(x, out, size):
    d = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + d, gl.load(x + d, mask=d < size, other=7.0), mask=d < size + 1)
"""
    )
    x, out = torch.arange(10.0)[:5], torch.full((6,), -1.0)
    launch(load_kernels({"masks": text}).kernel, 1, x, out, 5, seed=0)
    assert out.tolist() == [0, 1, 2, 3, 4, 7]
    with pytest.raises(KernelError, match=r"accesses x \(5,\) outside"):  # inside its storage, but not inside the view
        launch(load_kernels({"masks": text}).kernel, 1, x, torch.empty(7), 6, seed=0)
    with pytest.raises(KernelError, match=r"accesses out \(6,\) outside"):
        launch(load_kernels({"masks": text}).kernel, 1, torch.zeros(9), out, 6, seed=0)


def test_the_real_triton_stays():
    before = {name: id(module) for name, module in sys.modules.items() if name.startswith("triton")}
    load_kernels({"ring": RING})
    after = {name: id(module) for name, module in sys.modules.items() if name.startswith(("triton", "emulated_0"))}
    assert before == after


def test_no_thread_outlives_a_launch():
    before = threading.active_count()
    run_ring(RING, 0)
    assert threading.active_count() == before
    for replacement in ((WAIT_PRODUCT, ""), (RELEASE, "")):
        with pytest.raises(KernelError):
            run_ring(changed(RING, replacement), 0)
        assert threading.active_count() == before
