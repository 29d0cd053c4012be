"""The machine that runs PTX: memory, what may not be done with it, atomics, and copies that land late."""

import struct

import numpy as np
import pytest
from ptx.memory import Memory
from ptx.snippets import HEADER, PtxError, each, launch, parse, run


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("kind", ["b8", "b16", "b32", "b64"])
def test_vectors_of_every_size(kind, space):
    """Through registers of the size (16 bits for bytes); only the bytes meant are written."""
    size, register = int(kind[1:]) // 8, {"b8": "h", "b16": "h", "b32": "r", "b64": "rd"}[kind]
    for count in (c for c in (1, 2, 4) if c * size <= 16):
        source = np.frombuffer(np.random.default_rng(count).bytes(8 * size * count), np.uint8).reshape(8, -1)
        names = [f"%{register}{n + 1}" for n in range(count)]
        vector, v = (f"{{{', '.join(names)}}}", f".v{count}") if count > 1 else (names[0], "")
        body = f"""mov.u32 %r10, room; mad.lo.u32 %r10, %t, {size * count}, %r10;
        ld.global{v}.{kind} {vector}, [%e0];
        {f"st.shared{v}.{kind} [%r10], {vector}; ld.shared{v}.{kind} {vector}, [%r10];" if space == "shared" else ""}
        st.global{v}.{kind} [%e1], {vector};"""
        out = run(body, source, np.full((9, size * count), 77, np.uint8), threads=8, module=".shared .align 16 .b8 room[256];")[
            1
        ]
        assert (out[:8] == source).all() and (out[8] == 77).all()


def test_loads_extend_as_their_type_says():
    body = """
    ld.global.u8 %r1, [%a0]; ld.global.s8 %r2, [%a0]; ld.global.u16 %r3, [%a0]; ld.global.s16 %r4, [%a0];
    ld.global.s32 %rd1, [%a0]; ld.global.u32 %rd2, [%a0];
    st.global.v4.b32 [%a1], {%r1, %r2, %r3, %r4}; st.global.v2.b64 [%a1+16], {%rd1, %rd2};
    """
    data, out = np.array([0x80FE, 0xFFFF], np.uint16), np.zeros(4, np.int64)
    out = run(body, data, out, threads=1)[1]
    assert out[:2].view(np.int32).tolist() == [0xFE, -2, 0x80FE, 0x80FE - 0x10000]
    assert out[2:].tolist() == [0xFFFF80FE - 2**32, 0xFFFF80FE]


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_small_stores_leave_their_neighbours_alone(bits):
    module = ".shared .align 8 .b64 word;"
    body = f"""
    mov.b64 %rd1, 0x1111111111111111; st.global.b64 [%a0], %rd1; st.shared.b64 [word], %rd1;
    mov.u32 %r1, 0xEEEEEEEE; st.global.b{bits} [%a0 + {bits // 8}], %r1; st.shared.b{bits} [word + {bits // 8}], %r1;
    ld.shared.b64 %rd2, [word]; st.global.b64 [%a0 + 8], %rd2;
    """
    out = run(body, np.zeros(2, np.uint64), threads=1, module=module)[0].tolist()
    assert out == [0x1111111111111111 ^ (0xFFFFFFFFFFFFFFFF >> 64 - bits << bits)] * 2


BAD_ACCESSES = {
    "misaligned": "ld.global.b32 %r1, [%a0 + 2];",
    "misaligned vector": "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%a0 + 8];",
    "misaligned store": "st.global.v2.b32 [%a0 + 4], {%r1, %r2};",
    "behind the end": "ld.global.b32 %r1, [%a0 + 64];",
    "before the start": "ld.global.b32 %r1, [%a0 + -4];",
    "partly behind the end": "add.s64 %rd1, %a0, 56; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];",
    "store behind the end": "st.global.b8 [%a0 + 64], %r1;",
    "nothing there": "mov.u64 %rd1, 0; ld.global.b32 %r1, [%rd1];",
    "negative": "mov.u64 %rd1, -16; ld.global.b32 %r1, [%rd1];",
    "one thread of many": "mul.wide.u32 %rd1, %t, 4; add.s64 %rd1, %rd1, %a0; ld.global.b32 %r1, [%rd1];",
    "atomic": "red.global.add.u32 [%a0 + 64], 1;",
    "misaligned atomic": "red.global.add.u32 [%a0 + 2], 1;",
    "shared, behind the end": "ld.shared.b32 %r1, [room + 64];",
    "shared, partly behind": "ld.shared.v2.b32 {%r1, %r2}, [room + 64];",
    "shared, before the start": "ld.shared.b32 %r1, [room + -4];",
    "shared, at 0": "mov.u32 %r2, 0; st.shared.b32 [%r2], %r1;",
    "shared, misaligned": "ld.shared.b32 %r1, [room + 2];",
    "shared, misaligned vector": "st.shared.v4.b32 [room + 8], {%r1, %r2, %r3, %r4};",
    "shared, atomic": "red.shared.add.u32 [room + 64], 1;",
    "parameters": "ld.param.b64 %rd1, [kernel_param_0 + 8];",
    "before the parameters": "ld.param.b64 %rd1, [kernel_param_0 + -8];",
}


@pytest.mark.parametrize("body", BAD_ACCESSES.values(), ids=BAD_ACCESSES.keys())
def test_bad_accesses(body):
    module = ".shared .align 16 .b8 room[64];"
    with pytest.raises(PtxError, match=r"kernel.*bytes"):
        run(body, np.zeros(16, np.int32), threads=17, module=module)
    # Nobody minds where it is not executed.
    run(f"setp.lt.u32 %p1, %t, 99; @%p1 bra OUT; {body} OUT:", np.zeros(16, np.int32), threads=17, module=module)


@pytest.mark.parametrize(
    "code",
    [
        "ld.global.b32 %r1, [%rd1];",
        "st.global.b32 [%rd1], %r1;",
        "red.global.add.u32 [%rd1], %r1;",
        "atom.global.add.u32 %r1, [%rd1], 1;",
        "ld.shared.b32 %r1, [%r2];",
        "st.shared.b32 [%r2], %r1;",
        "red.shared.add.u32 [%r2], 1;",
        "cp.async.ca.shared.global [%r2], [%rd1], 4;",
    ],
)
def test_threads_that_do_not_execute_an_access_may_have_bad_addresses(code):
    """By a predicate, or since they are elsewhere: those beyond 15 of an array of 16."""
    start = "mul.wide.u32 %rd1, %t, 4; add.s64 %rd1, %rd1, %a0; mov.u32 %r2, room; mad.lo.u32 %r2, %t, 4, %r2; mov.u32 %r1, 7;"
    for guarded in (f"setp.lt.u32 %p1, %t, 16; @%p1 {code}", f"setp.ge.u32 %p1, %t, 16; @%p1 bra OUT; {code} OUT:"):
        body = f"{start} {guarded} cp.async.wait_all;"
        run(body, np.zeros(16, np.int32), threads=40, module=".shared .align 4 .b8 room[64];")
    with pytest.raises(PtxError, match="bytes"):
        run(f"{start} {code} cp.async.wait_all;", np.zeros(16, np.int32), threads=40, module=".shared .align 4 .b8 room[64];")


def test_offsets_may_be_negative():
    body = """
    add.s64 %rd1, %a0, 16; ld.global.b32 %r1, [%rd1+-8]; ld.global.b32 %r2, [%rd1 - 4]; st.global.v2.b32 [%rd1+-16], {%r2, %r1};
    mov.u32 %r3, room; add.s32 %r3, %r3, 8; st.shared.b32 [%r3+-8], %r1;
    ld.shared.b32 %r4, [room]; st.global.b32 [%rd1], %r4;
    """
    out = run(body, np.arange(8, dtype=np.int32), threads=1, module=".shared .b64 room[2];")[0]
    assert out.tolist() == [3, 2, 2, 3, 2, 5, 6, 7]


def access(memory: Memory, address: int, code: str) -> None:
    registers = ".reg .b64 %a, %v, %w; .reg .b32 %r;"
    text = f"{HEADER}.entry kernel(.param .u64 x) {{ {registers} ld.param.u64 %a, [x]; mov.u64 %v, 0; mov.u64 %w, 0; {code} }}"
    launch(parse(text)["kernel"], (1, 1, 1), (1, 1, 1), 0, struct.pack("<Q", address), memory)


def test_ranges_that_touch_and_ranges_one_may_not_write():
    room = np.zeros(256, np.uint8)
    at = room.ctypes.data + -room.ctypes.data % 64
    memory = Memory()
    memory.allow(at, 24)
    memory.allow(at + 24, 40, writable=False)
    access(memory, at + 16, "ld.global.b64 %v, [%a]; ld.global.b64 %v, [%a + 8]; st.global.b64 [%a], %v;")
    with pytest.raises(PtxError, match="reads 16 bytes"):
        access(memory, at + 16, "ld.global.v2.b64 {%v, %w}, [%a];")
    for code in ("st.global.b64 [%a + 8], %v;", "red.global.add.u64 [%a + 8], %v;"):
        with pytest.raises(PtxError, match="may not write"):
            access(memory, at + 16, code)
    memory.allow(at + 16, 16)  # overlaps both
    access(memory, at + 16, "ld.global.v2.b64 {%v, %w}, [%a]; st.global.v2.b64 [%a], {%v, %w};")
    with pytest.raises(PtxError, match="may not write"):
        access(memory, at + 16, "st.global.b64 [%a + 16], %v;")


# ---------------------------------------------------------------- atomics

WORDS = {  # type, start, what thread t brings, the end
    "add.f32": ("f32", 0.5, lambda t: t, 0.5 + sum(range(70))),
    "add.u32": ("u32", 2**32 - 3, lambda t: t, (2**32 - 3 + sum(range(70))) % 2**32),
    "add.u64": ("u64", 2**40, lambda t: t, 2**40 + sum(range(70))),
    "min.s32": ("s32", 50, lambda t: t - 40, -40),
    "max.s32": ("s32", -1, lambda t: t - 40, 29),
    "min.u32": ("u32", 50, lambda t: (t - 40) % 2**32, 0),
    "max.u32": ("u32", 50, lambda t: (t - 40) % 2**32, 2**32 - 1),
    "and.b32": ("b32", 2**32 - 1, lambda t: 2**32 - 1 ^ 1 << t % 16, 0xFFFF0000),
    "or.b32": ("b32", 1 << 31, lambda t: 1 << t % 16, 0x8000FFFF),
    "xor.b32": ("b32", 1, lambda t: 3 * t, 1 ^ int(np.bitwise_xor.reduce(3 * np.arange(70)))),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", WORDS)
def test_atomics_of_many_threads(name, space):
    kind, start, brings, end = WORDS[name]
    bits, r, place = int(kind[1:]), "%rd" if kind[1:] == "64" else "%r", "%a1" if space == "global" else "word"
    dtype = np.dtype({"f": "float", "u": "uint", "s": "int", "b": "uint"}[kind[0]] + kind[1:])
    values = np.array([brings(t) for t in range(70)], dtype)
    before = f"ld.global.b{bits} {r}4, [%a1]; st.shared.b{bits} [word], {r}4; bar.sync 0;"
    after = f"bar.sync 0; ld.shared.b{bits} {r}4, [word]; st.global.b{bits} [%a1], {r}4;"
    for atomic in (f"atom.{space}.{name} {r}3, [%rd1], {r}2;", f"red.{space}.{name} [%rd1], {r}2;"):
        body = f"""
        ld.global.b{bits} {r}2, [%e0]; mov.b{bits} {r}3, 0; mov.u64 %rd1, {place};
        {before if space == "shared" else ""} {atomic} {after if space == "shared" else ""}
        st.global.b{bits} [%e2], {r}3;"""
        _, word, old = run(body, values, np.array([start], dtype), np.zeros(70, dtype), threads=70, module=".shared .b64 word;")
        assert word[0] == end
        if name == "add.u64" and atomic.startswith("atom"):  # each saw the sum of those before it
            order = np.argsort(old)
            assert (old[order] == 2**40 + np.cumsum(values[order]) - values[order]).all() and old.min() == 2**40


def test_exchange_and_compare():
    body = """
    add.s32 %r1, %t, 1; atom.global.exch.b32 %r2, [%a0], %r1; st.global.b32 [%e1], %r2;
    ld.global.b32 %r3, [%a0 + 4];
AGAIN: mov.b32 %r4, %r3; shl.b32 %r5, %t, 1; add.s32 %r5, %r4, %r5;
    atom.global.cas.b32 %r3, [%a0 + 4], %r4, %r5; setp.ne.s32 %p1, %r3, %r4; @%p1 bra AGAIN;
    setp.eq.s32 %p2, %t, 0; @%p2 atom.global.cas.b64 %rd1, [%a0 + 8], 5, 6; @%p2 atom.global.cas.b64 %rd1, [%a0 + 8], 5, 7;
    @%p2 st.global.b64 [%a0 + 16], %rd1;
    """
    words, seen = run(body, np.array([0, 9, 5, 0, 0, 0], np.int32), np.zeros(70, np.int32), threads=70)
    assert sorted([*seen.tolist(), int(words[0])]) == list(range(71)), "each value is taken out once"
    assert words[1] == 9 + 70 * 69
    assert words[2:].view(np.int64).tolist() == [6, 6]


def test_vector_atomics_and_blocks_in_another_order():
    body = "mov.u32 %r1, %ctaid.x; cvt.rn.f32.u32 %f1, %r1; red.global.add.v2.f32 [%a0], {%f1, %f1};"
    body += "setp.eq.s32 %p1, %t, 0; @%p1 atom.global.add.u32 %r2, [%a0 + 8], 1;"
    body += "mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %a1; @%p1 st.global.b32 [%rd1], %r2;"
    orders = []
    for seed in (0, 1, 2):
        sums, order = run(body, np.zeros(3, np.float32), np.zeros(6, np.int32), grid=(6, 1, 1), seed=seed)
        assert sums[:2].tolist() == [32 * 15] * 2 and sorted(order.tolist()) == list(range(6))
        orders.append(tuple(order.tolist()))
    assert orders[0] == (0, 1, 2, 3, 4, 5) and len(set(orders)) == 3


# ---------------------------------------------------------------- copies that land late

ROOM = ".shared .align 16 .b8 room[1024];"
NAN = -1  # all bits set


def copied(body: str, width: int = 4, words: int = 64, **options) -> list[list[int]]:
    """One thread, with the numbers 1, 2, 3, ... at ``%a0``: what it puts at ``%a1``. ``WATCH n, at`` in ``body`` puts there, at
    place n, what shared memory holds at byte ``at``."""
    parts = body.split("WATCH ")
    for n, part in enumerate(parts[1:], 1):
        numbers, _, rest = part.partition(";")
        index, at = numbers.split(",")
        parts[n] = f"ld.shared.b32 %r1, [room + {at.strip()}]; st.global.b32 [%a1 + {4 * int(index)}], %r1;{rest}"
    return run(
        "".join(parts), np.arange(1, words + 1, dtype=np.int32), np.zeros(width, np.int32), threads=1, module=ROOM, **options
    )[1].tolist()


@pytest.mark.parametrize("kind, size", [("cg", 16), ("ca", 16), ("ca", 8), ("ca", 4)])
def test_copies_of_every_size(kind, size):
    reads = "".join(f"WATCH {n}, {4 * n};" for n in range(4))
    start = "mov.u32 %r1, 77; st.shared.v4.b32 [room], {%r1, %r1, %r1, %r1};"
    end = f"cp.async.wait_all; {reads}"
    for more in ("", f", {size}", ", %r2"):
        body = f"{start} mov.u32 %r2, {size}; cp.async.{kind}.shared.global [room], [%a0 + 32], {size}{more}; {end}"
        assert copied(body) == [9 + n if 4 * n < size else 77 for n in range(4)]
    body = f"{start} mov.u32 %r2, 0; cp.async.{kind}.shared.global.L2::128B [room], [%a0 + 32], {size}, %r2; {end}"
    assert copied(body) == [0 if 4 * n < size else 77 for n in range(4)]
    nowhere = "mov.u64 %rd1, 0; mov.u32 %r2, 0;"
    nowhere += f"cp.async.{kind}.shared::cta.global [room], [%rd1], {size}, %r2; {end}"
    assert copied(nowhere)[: size // 4] == [0] * (size // 4)


def test_groups_of_copies_land_in_order():
    def copy(n):
        return f"cp.async.ca.shared.global [room + {4 * n}], [%a0 + {4 * n}], 4;"

    body = f"""{copy(0)} {copy(1)} cp.async.commit_group; {copy(2)} cp.async.commit_group;
    cp.async.commit_group; {copy(3)} cp.async.commit_group; {copy(4)}
    WATCH 0, 0; WATCH 1, 8;
    cp.async.wait_group 3; WATCH 2, 0; WATCH 3, 4; WATCH 4, 8;
    cp.async.wait_group 2; WATCH 5, 8; WATCH 6, 12;
    cp.async.wait_group 1; WATCH 7, 12;
    cp.async.wait_group 0; WATCH 8, 12; WATCH 9, 16;
    cp.async.wait_all; WATCH 10, 16;"""
    assert copied(body, 11) == [NAN, NAN, 1, 2, NAN, 3, NAN, NAN, 4, NAN, 5]


def test_copies_of_several_threads():
    """Each waits for its own; what one has not waited for, another does not see."""
    body = """
    shl.b32 %r1, %t, 2; mov.u32 %r2, room; add.u32 %r1, %r1, %r2; cp.async.ca.shared.global [%r1], [%e1], 4;
    cp.async.commit_group; setp.lt.u32 %p1, %t, 40; @%p1 bra WAITS; bra JOIN; WAITS: cp.async.wait_group 0; JOIN: bar.sync 0;
    xor.b32 %r3, %t, 63; mad.lo.u32 %r3, %r3, 4, %r2; ld.shared.b32 %r0, [%r3]; bar.sync 0; cp.async.wait_group 0;
    """
    assert each(body, module=ROOM) == [63 - t if 63 - t < 40 else NAN for t in range(64)]


@pytest.mark.parametrize("body, said", [
    ("cp.async.ca.shared.global [room], [%a0], 4;", "nobody waited"),
    ("cp.async.ca.shared.global [room], [%a0], 4; cp.async.commit_group; cp.async.wait_group 1;", "nobody waited"),
    ("cp.async.ca.shared.global [room], [%a0], 4; cp.async.wait_group 0;", "nobody waited"),
    ("cp.async.cg.shared.global [room + 8], [%a0], 16; cp.async.wait_all;", "multiple"),
    ("cp.async.cg.shared.global [room], [%a0 + 8], 16; cp.async.wait_all;", "multiple"),
    ("cp.async.ca.shared.global [room], [%a0 + 4], 8; cp.async.wait_all;", "multiple"),
    ("cp.async.cg.shared.global [room], [%a0 + 256], 16; cp.async.wait_all;", "not its own"),
    ("cp.async.cg.shared.global [room + 1024], [%a0], 16; cp.async.wait_all;", "shared memory"),
    ("cp.async.ca.shared.global [room], [%a0], 4, 8; cp.async.wait_all;", "8 bytes of 4"),
])  # fmt: skip
def test_copies_that_cannot_be(body, said):
    with pytest.raises(PtxError, match=said):
        copied(body)
