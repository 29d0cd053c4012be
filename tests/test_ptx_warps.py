"""The machine that runs PTX: branches, barriers, and what the threads of a warp do together."""

import itertools

import numpy as np
import pytest
from ptx.snippets import PtxError, each, run

FULL = "0xFFFFFFFF"


# ---------------------------------------------------------------- branches


def test_branches_part_and_meet():
    body = """
    and.b32 %r1, %t, 3; setp.eq.s32 %p1, %r1, 0; setp.lt.u32 %p2, %t, 40;
    @%p1 bra FOURTH;
    @!%p2 bra FAR;
    mov.u32 %r0, 1; bra MEET;
    FAR: mov.u32 %r0, 2; bra.uni MEET;
    FOURTH: mov.u32 %r0, 3;
    MEET: vote.sync.ballot.b32 %r2, %p1, 0xFFFFFFFF; popc.b32 %r2, %r2; mad.lo.s32 %r0, %r2, 100, %r0;
    """
    assert each(body) == [800 + (3 if t % 4 == 0 else 1 if t < 40 else 2) for t in range(64)]


def test_loops_of_different_length():
    body = """
    mov.u32 %r0, 0; mov.u32 %r1, 0;
    ROUND: setp.ge.u32 %p1, %r1, %r9; @%p1 bra DONE;
    add.s32 %r0, %r0, %r1; add.s32 %r1, %r1, 1; bra ROUND;
    DONE: shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xFFFFFFFF; mad.lo.s32 %r0, %r2, 1000, %r0;
    """
    trips = [(t * 7) % 11 for t in range(64)]
    assert each(body, values=np.array(trips, np.int32)) == [n * (n - 1) // 2 + 1000 * trips[t ^ 1] for t, n in enumerate(trips)]


def test_some_threads_end_early():
    """By ret and exit; the others go on, alone in their warp too."""
    body = """
    setp.lt.u32 %p1, %t, 5; mov.u32 %r0, 7; st.global.b32 [%e0], %r0; @%p1 ret;
    setp.ge.u32 %p2, %t, 60; @%p2 bra LEAVE; bra STAY; LEAVE: exit;
    STAY: mov.u32 %r0, 8;
    """
    assert each(body) == [8 if 5 <= t < 60 else 7 for t in range(64)]


def test_trap():
    body = "setp.eq.s32 %p1, %t, {0}; @%p1 trap; mov.u32 %r0, 1;"
    assert each(body.format(99)) == [1] * 64
    with pytest.raises(PtxError, match="trap"):
        each(body.format(63))
    with pytest.raises(PtxError, match="trap"):
        each("setp.ne.s32 %p1, %t, 3; @%p1 bra OUT; trap;")


@pytest.mark.parametrize("code", [
    "@%p1 trap; mov.u32 %r0, 1;",
    "mov.u32 %r0, 1; @%p1 st.global.b32 [%a0 + 4000], %r0;",
    "mov.u32 %r0, 1; @%p1 ld.global.b32 %r0, [%a0 + 4000];",
    "mov.u32 %r0, 1; @%p1 red.global.add.u32 [%a0 + 4000], 1;",
    "mov.u32 %r0, 1; @%p1 bra BAD; bra OUT; BAD: trap;",
    "mov.u32 %r0, 1; @%p2 shfl.sync.idx.b32 %r0, %r0, 0, 31, 0xFFFFFFFF;",
    "mov.u32 %r0, 1; @%p3 shfl.sync.idx.b32 %r0, %r0, 0, 31, 0xFFFFFFFF;",
    "redux.sync.max.u32 %r0, %r1, 0xFFFFFFFF; sub.s32 %r0, %r0, 45; setp.lt.u32 %p3, %t, 32; @%p3 mov.u32 %r0, 1;",
    "vote.sync.any.pred %p3, %p1, 0xFFFFFFFF; selp.b32 %r0, 0, 1, %p3;",
    "vote.sync.all.pred %p3, %p2, 0xFFFFFFFF; selp.b32 %r0, 1, 0, %p3;",
    "bar.red.or.pred %p3, 0, %p1; selp.b32 %r0, 0, 1, %p3;",
    "bar.red.popc.u32 %r0, 0, %p2; sub.s32 %r0, %r0, 46;",
])  # fmt: skip
def test_lanes_without_a_thread_do_nothing(code):
    """A block of 47 threads: what registers would hold of the 17 lanes that are not there does not matter."""
    head = "mov.u32 %r1, %warpid; mov.u32 %r2, %laneid; mad.lo.u32 %r1, %r1, 32, %r2;"
    head += "setp.ge.u32 %p1, %r1, 47; setp.lt.u32 %p2, %r1, 47; setp.eq.u32 %p3, %r9, %r9;"
    assert each(f"{head} {code}", threads=47) == [1] * 47


def test_lanes_that_have_ended_do_not_count():
    """20 of 32 leave before the others reduce and vote."""
    head = "mov.u32 %r0, 5; st.global.b32 [%e0], %r0; setp.lt.u32 %p1, %t, 20; @%p1 exit;"
    for code, result in (
        ("redux.sync.min.u32 %r0, %t, 0xFFFFFFFF;", 20), ("redux.sync.add.s32 %r0, %r9, 0xFFFFFFFF;", sum(range(20, 32))),
        ("vote.sync.ballot.b32 %r0, !%p1, 0xFFFFFFFF; popc.b32 %r0, %r0;", 12),
        ("shfl.sync.idx.b32 %r0, %r9, 25, 31, 0xFFFFFFFF;", 25),
        ("bar.warp.sync 0xFFFFFFFF; mov.u32 %r0, 1;", 1), ("bar.red.popc.u32 %r0, 0, !%p1;", 12),
    ):  # fmt: skip
        assert each(f"{head} {code}", threads=32) == [5] * 20 + [result] * 12, code


# ---------------------------------------------------------------- barriers


def test_barrier_between_all():
    body = """
    mov.u32 %r1, room; mad.lo.u32 %r2, %t, 4, %r1; st.shared.b32 [%r2], %r9; {0}
    sub.s32 %r3, 95, %t; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.b32 %r0, [%r3];
    """
    for barrier in (
        "bar.sync 0;",
        "barrier.sync 1;",
        "barrier.sync.aligned 15, 96;",
        "bar.cta.sync 2;",
        "barrier.cta.sync.aligned 3, 96;",
    ):
        assert each(body.replace("{0}", barrier), threads=96, module=".shared .b32 room[96];") == list(range(95, -1, -1))


def test_warps_may_meet_at_different_instructions():
    body = "setp.lt.u32 %p1, %t, 32; @%p1 bra FIRST; bar.sync 0; mov.u32 %r0, 1; bra OUT; FIRST: bar.sync 0; mov.u32 %r0, 2;"
    assert each(body) == [2] * 32 + [1] * 32


def test_threads_that_have_ended_are_not_waited_for():
    for leave in ("@%p1 ret;", "@%p1 bra OUT;"):
        body = f"setp.ge.u32 %p1, %t, 32; mov.u32 %r0, 5; st.global.b32 [%e0], %r0; {leave} bar.sync 0; mov.u32 %r0, 6;"
        assert each(body) == [6] * 32 + [5] * 32


def test_named_barrier_of_two_warps():
    """The third goes by."""
    body = """
    shr.u32 %r1, %t, 5; setp.eq.s32 %p1, %r1, 1; @%p1 bra OUT;
    mov.u32 %r2, room; mad.lo.u32 %r3, %t, 4, %r2; st.shared.b32 [%r3], %t;
    mov.u32 %r4, 3; bar.sync %r4, 64;
    xor.b32 %r5, %t, 64; mad.lo.u32 %r5, %r5, 4, %r2; ld.shared.b32 %r0, [%r5];
    """
    assert each(body, threads=96, module=".shared .b32 room[96];") == [t ^ 64 if t // 32 != 1 else -1 for t in range(96)]


def test_producer_and_consumer():
    """Warp 0 fills one place of shared memory five times, warp 1 empties it: arrive and sync on two barriers."""
    body = """
    setp.ge.u32 %p1, %t, 32; and.b32 %r1, %t, 31; mov.u32 %r2, room; mad.lo.u32 %r2, %r1, 4, %r2; mov.u32 %r3, 0;
    mov.u32 %r0, 0; @%p1 bra CONSUME;
    PRODUCE: bar.sync 1, 64; mad.lo.s32 %r4, %r3, 10, %r1; st.shared.b32 [%r2], %r4; bar.arrive 2, 64;
    add.s32 %r3, %r3, 1; setp.lt.s32 %p2, %r3, 5; @%p2 bra PRODUCE; bra OUT;
    CONSUME: bar.arrive 1, 64; bar.sync 2, 64; ld.shared.b32 %r4, [%r2]; mad.lo.s32 %r0, %r0, 3, %r4;
    add.s32 %r3, %r3, 1; setp.lt.s32 %p2, %r3, 5; @%p2 bra CONSUME;
    """
    expected = [sum((10 * n + lane) * 3 ** (4 - n) for n in range(5)) for lane in range(32)]
    assert each(body, module=".shared .b32 room[32];") == [0] * 32 + expected


def test_reductions_at_barriers():
    ones = [t for t in range(64) if t % 3 == 0]
    for place in ("0", "4, 64"):
        assert each(f"rem.u32 %r1, %t, 3; setp.eq.u32 %p1, %r1, 0; bar.red.popc.u32 %r0, {place}, %p1;") == [len(ones)] * 64
        assert (
            each(f"rem.u32 %r1, %t, 3; setp.eq.u32 %p1, %r1, 0; barrier.red.popc.aligned.u32 %r0, {place}, !%p1;") == [42] * 64
        )
        for how, count in itertools.product(("and", "or"), (0, 1, 64)):
            got = each(f"setp.lt.u32 %p1, %t, {count}; bar.red.{how}.pred %p2, {place}, %p1; selp.b32 %r0, 1, 0, %p2;")
            assert got == [int(count == 64 if how == "and" else count > 0)] * 64


@pytest.mark.parametrize("body, said", [
    ("setp.lt.u32 %p1, %t, 32; @%p1 bra OTHER; bar.sync 1; bra OUT; OTHER: bar.sync 2;", "bar.sync [12].*bar.sync [12]"),
    ("bar.sync 3, 96;", "bar.sync 3, 96"),
    ("setp.lt.u32 %p1, %t, 32; @%p1 bra OUT; bar.sync 3, 64;", "bar.sync 3, 64"),
    ("setp.lt.u32 %p1, %t, 32; @%p1 bra OTHER; bar.sync 3, 64; bra OUT; OTHER: bar.sync 3, 32;", "barrier 3"),
    ("setp.lt.u32 %p1, %t, 32; @%p1 bra OUT; bar.arrive 3, 64; bar.arrive 3, 64;", "barrier 3"),
    ("bar.sync 3, 32;", "barrier 3"),
])  # fmt: skip
def test_barriers_that_cannot_be(body, said):
    """The error says where it is."""
    with pytest.raises(PtxError, match=said):
        each(body)


# ---------------------------------------------------------------- what a warp does together


def test_collectives_wait_for_the_others():
    """Lanes that come by a way which lies behind in the text."""
    body = """
    setp.lt.u32 %p1, %t, 10; @%p1 bra FAR;
    BACK: shfl.sync.idx.b32 %r0, %r9, 3, 31, 0xFFFFFFFF; bra OUT;
    FAR: add.s32 %r9, %r9, 100; bra BACK;
    """
    assert each(body) == [103] * 32 + [35] * 32


@pytest.mark.parametrize("code", [
    "shfl.sync.idx.b32 %r0, %r9, 3, 31, 0xFFFFFFFF;", "vote.sync.any.pred %p2, %p1, 0xFFFFFFFF;",
    "redux.sync.add.s32 %r0, %r9, 0xFFFFFFFF;",
    "bar.warp.sync 0xFFFFFFFF;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [room];",
    "stmatrix.sync.aligned.m8n8.x1.shared.b16 [room], {%r0};",
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r0, %r1}, {%r4}, {%f0, %f1, %f2, %f3};",
])  # fmt: skip
def test_collectives_of_a_part_of_a_warp(code):
    """The other half comes to another one, or is kept away by a predicate."""
    module = ".shared .align 16 .b8 room[128];"
    with pytest.raises(PtxError):
        each(f"setp.lt.u32 %p1, %t, 16; @%p1 bra OTHER; {code} bra OUT; OTHER: bar.warp.sync 0xFFFFFFFF;", module=module)
    with pytest.raises(PtxError, match="divided"):
        each(f"setp.lt.u32 %p1, %t, 16; @%p1 {code}", module=module)
    each(f"setp.lt.u32 %p1, %t, 32; @%p1 {code}", module=module)  # a whole warp of two


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The lane read from, and the predicate: the manual's pseudocode."""
    mask, c, b = c >> 8 & 31, c & 31, b & 31
    highest = (lane & mask) | (c & ~mask & 31)
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": (lane & mask) | (b & ~mask & 31)}[mode]
    inside = j >= highest if mode == "up" else j <= highest
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    values = np.random.default_rng(0).integers(0, 1000, 64).astype(np.int32)
    for b, c in itertools.product((0, 1, 3, 8, 17, 31, 33), (0, 31, 5, 0x181F, 0x1807, 0x1C03, 0x1E00, 0x1010)):
        got = each(f"shfl.sync.{mode}.b32 %r0|%p1, %r9, {b}, {c}, {FULL}; @%p1 add.s32 %r0, %r0, 5000;", values=values)
        expected = []
        for t in range(64):
            j, inside = shuffled(mode, t % 32, b, c)
            expected.append(values[t // 32 * 32 + j] + 5000 * inside)
        assert got == expected, (b, c)


def test_shuffle_by_registers():
    body = "xor.b32 %r1, %t, 5; mov.u32 %r2, 31; mov.b32 %r3, -1; shfl.sync.idx.b32 %r0, %r9, %r1, %r2, %r3;"
    body += f"shfl.sync.down.b32 %r0, %r0, 1, 31, {FULL};"
    first = [t ^ 5 for t in range(64)]
    assert each(body) == [first[t + 1] if t % 32 < 31 else first[t] for t in range(64)]


def test_votes():
    for chosen in ([], [3], list(range(32)), [1, 31, 40], list(range(32, 64)), list(range(64))):
        values = np.isin(np.arange(64), chosen).astype(np.int32)
        head = "setp.ne.s32 %p1, %r9, 0;"
        warps = values.reshape(2, 32)
        ballot = (
            np.repeat([sum(int(v) << n for n, v in enumerate(w)) for w in warps], 32).astype(np.uint32).view(np.int32).tolist()
        )
        assert each(f"{head} vote.sync.ballot.b32 %r0, %p1, {FULL};", values=values) == ballot
        for how, function in (("any", np.any), ("all", np.all)):
            got = each(f"{head} vote.sync.{how}.pred %p2, %p1, {FULL}; selp.b32 %r0, 1, 0, %p2;", values=values)
            assert got == [int(function(w)) for w in warps for _ in range(32)]
            got = each(f"{head} vote.sync.{how}.pred %p2, !%p1, {FULL}; selp.b32 %r0, 1, 0, %p2;", values=values)
            assert got == [int(function(1 - w)) for w in warps for _ in range(32)]


@pytest.mark.parametrize("how, kind, function", [
    ("add", "s32", sum), ("add", "u32", sum),
    ("min", "s32", min), ("max", "s32", max), ("min", "u32", min), ("max", "u32", max),
    ("and", "b32", np.bitwise_and.reduce), ("or", "b32", np.bitwise_or.reduce), ("xor", "b32", np.bitwise_xor.reduce),
])  # fmt: skip
def test_redux(how, kind, function):
    values = np.random.default_rng(1).integers(-(2**31), 2**31, 64).astype(np.int32)
    seen = values if kind == "s32" else values.view(np.uint32)
    expected = [int(function(w)) % 2**32 for w in seen.reshape(2, 32).tolist() for _ in range(32)]
    got = each(f"redux.sync.{how}.{kind} %r0, %r9, {FULL};", values=values)
    assert [g % 2**32 for g in got] == expected


@pytest.mark.parametrize("code, expected", [
    ("setp.lt.s32 %p1, %r9, 50; vote.sync.uni.pred %p2, %p1, 0xFFFFFFFF; selp.b32 %r0, 1, 0, %p2;", [1] * 32 + [0] * 32),
    ("shfl.sync.idx.b32 %r0, %r9, 0, 31, 0x0000FFFF;", None),
    ("setp.lt.u32 %p1, %t, 32; activemask.b32 %r0;", [-1] * 64),
    ("and.b32 %r1, %t, 1; match.any.sync.b32 %r0, %r1, 0xFFFFFFFF;", [0x55555555, 0xAAAAAAAA - 2**32] * 32),
    ("mov.u32 %r0, %lanemask_lt; popc.b32 %r0, %r0;", list(range(32)) * 2),
    ("setp.ne.s32 %p1, %t, 63; @%p1 bar.sync 0; mov.u32 %r0, 1;", None),
])  # fmt: skip
def test_right_or_not_known(code, expected):
    """What the machine does not do, it says; ``None``: what must not be done."""
    try:
        got = each(code)
    except PtxError:
        return
    assert got == expected


# ---------------------------------------------------------------- matrices

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4  # groupID, threadID_in_group


def fragments(shape: str, size: int):
    """Rows and columns of each lane's elements of a, b and c, in the words of the manual. ``size``: bytes of one of a and b."""
    k = int(shape.partition("k")[2])
    a, b = [], []
    if k == 16:
        for i in range(8):
            a.append((G if i < 2 or 4 <= i < 6 else G + 8, T * 2 + (i & 1) if i < 4 else T * 2 + (i & 1) + 8))
        for i in range(4):
            b.append((T * 2 + (i & 1) if i < 2 else T * 2 + (i & 1) + 8, G))
    elif size == 2:
        a = [(G if i < 2 else G + 8, T * 2 + (i & 1)) for i in range(4)]
        b = [(T * 2 + i, G) for i in range(2)]
    elif k == 8:
        a = [(G, T), (G + 8, T), (G, T + 4), (G + 8, T + 4)]
        b = [(T, G), (T + 4, G)]
    else:
        a, b = [(G, T), (G + 8, T)], [(T, G)]
    c = [(G if i < 2 else G + 8, T * 2 + (i & 1)) for i in range(4)]
    return a, b, c


def as_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Numbers that need no rounding."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16) if kind == "bf16" else bits


MMA = [
    ("m16n8k16", "f16"),
    ("m16n8k16", "bf16"),
    ("m16n8k8", "f16"),
    ("m16n8k8", "bf16"),
    ("m16n8k8", "tf32"),
    ("m16n8k4", "tf32"),
]


@pytest.mark.parametrize("shape, kind", MMA)
def test_mma(shape, kind):
    """Two warps, each with its own matrices: small whole numbers and halves, so that the sums are exact."""
    random = np.random.default_rng(0)
    k, size = int(shape.partition("k")[2]), 4 if kind == "tf32" else 2
    a, b, c = (random.integers(-30, 31, (2, *s)) / 2 for s in ((16, k), (k, 8), (16, 8)))
    places = fragments(shape, size)
    held = [
        np.concatenate([as_bits(np.stack([m[w][p] for p in at], 1), kind) for w in range(2)])
        for m, at in ((a, places[0]), (b, places[1]))
    ]
    if kind == "tf32":  # what is below its 10 bits is not looked at
        held = [h | random.integers(0, 1 << 13, h.shape).astype(np.uint32) for h in held]
    words = [np.ascontiguousarray(h).view(np.uint32) for h in held]
    sums = np.concatenate([np.stack([c[w][p] for p in places[2]], 1) for w in range(2)]).astype(np.float32)
    count = [w.shape[1] for w in words]
    loads = "".join(f"ld.global.b32 %r{10 * m + i}, [%e{m} + {4 * i}];" for m in range(2) for i in range(count[m]))
    lists = ["{" + ", ".join(f"%r{10 * m + i}" for i in range(count[m])) + "}" for m in range(2)]
    for start, given in (("{%f0, %f1, %f2, %f3}", True), ("{0f00000000, 0f00000000, 0f00000000, 0f00000000}", False)):
        body = f"""{loads} ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%e2];
        mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, {lists[0]}, {lists[1]}, {start};
        st.global.v4.f32 [%e2], {{%f4, %f5, %f6, %f7}};"""
        got = run(body, *words, sums, threads=64)[2]
        for w in range(2):
            expected = a[w] @ b[w] + given * c[w]
            for i, place in enumerate(places[2]):
                assert (got[32 * w : 32 * w + 32, i] == expected[place]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Rows of 16 bytes anywhere in shared memory: those of matrix m where lanes 8 m and on say. Lane l has two of row l / 4."""
    random = np.random.default_rng(count)
    room = random.permutation(1024).astype(np.uint16).reshape(128, 8)
    rows = random.permutation(128)[:64].astype(np.int32)
    names = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}"
    mode = f"sync.aligned.m8n8.x{count}{'.trans' * transposed}.shared.b16"
    prologue = "mov.u32 %r10, room; mad.lo.u32 %r11, %t, 32, %r10; ld.global.b32 %r20, [%e1]; mad.lo.u32 %r20, %r20, 16, %r10;"
    fill = "".join(
        f"ld.global.v4.b32 {{%r12, %r13, %r14, %r15}}, [%e0 + {o}]; st.shared.v4.b32 [%r11 + {o}], {{%r12, %r13, %r14, %r15}};"
        for o in (0, 16)
    )
    empty = "".join(
        f"ld.shared.v4.b32 {{%r12, %r13, %r14, %r15}}, [%r11 + {o}]; st.global.v4.b32 [%e0 + {o}], {{%r12, %r13, %r14, %r15}};"
        for o in (0, 16)
    )
    out = "".join(f"st.global.b32 [%e2 + {4 * i}], %r{i};" for i in range(count))
    pieces = room.reshape(64, 16)  # a row for each thread to copy
    module = ".shared .align 128 .b8 room[2048];"
    # Lanes whose addresses do not count have bad ones.
    given = np.where(np.arange(64) % 32 < 8 * count, rows, -5).astype(np.int32)
    body = f"{prologue} {fill} bar.sync 0; ldmatrix.{mode} {names}, [%r20]; {out}"
    held = (
        run(body, pieces, given, np.zeros((64, count), np.uint32), threads=64, module=module)[2]
        .view(np.uint16)
        .reshape(64, count, 2)
    )
    for t, m, j in itertools.product(range(64), range(count), range(2)):
        warp, lane = t // 32, t % 32
        row, column = (2 * (lane % 4) + j, lane // 4) if transposed else (lane // 4, 2 * (lane % 4) + j)
        assert held[t, m, j] == room[rows[32 * warp + 8 * m + row], column]
    loads = "".join(f"ld.global.b32 %r{i}, [%e2 + {4 * i}];" for i in range(count))
    body = f"{prologue} {fill} bar.sync 0; {loads} stmatrix.{mode} [%r20], {names}; bar.sync 0; {empty}"
    brought = random.integers(0, 65536, (64, count, 2)).astype(np.uint16)
    stored = run(body, pieces, given, brought.view(np.uint32).reshape(64, count), threads=64, module=module)[0].reshape(128, 8)
    expected = room.copy()
    for t, m, j in itertools.product(range(64), range(count), range(2)):
        warp, lane = t // 32, t % 32
        row, column = (2 * (lane % 4) + j, lane // 4) if transposed else (lane // 4, 2 * (lane % 4) + j)
        expected[rows[32 * warp + 8 * m + row], column] = brought[t, m, j]
    assert (stored == expected).all()


def test_ldmatrix_of_bad_rows():
    for place in ("[room + 8]", "[room + 1024]"):
        with pytest.raises(PtxError, match="bytes"):
            each(
                f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, {place};",
                module=".shared .align 16 .b8 room[1024];",
            )
