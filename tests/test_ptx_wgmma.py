"""The machine that runs PTX: products of warpgroups. Matrices are laid into shared memory by the manual's canonical layouts."""

import dataclasses
import itertools

import numpy as np
import pytest
from ptx.snippets import PtxError, run
from test_ptx_hopper import BARS, COPY, init, moved, run_maps, wait

MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # of a descriptor, by the bytes of a row of the swizzle pattern


def walk(index, shape, stride):
    """Where a coordinate of a CuTe mode leads: its first part goes fastest, its last has no end."""
    at = np.zeros_like(index)
    for size, step in zip(shape, stride, strict=True):
        at = at + index % size * step
        index = index // size
    return at


@dataclasses.dataclass(frozen=True)
class Layout:
    """Of an operand in shared memory: ``start`` and the two offsets in bytes."""

    swizzle: int
    major: str  # "K" or "MN"
    leading: int = 0
    stride: int = 0
    start: int = 0

    def places(self, mn: int, k: int, size: int) -> np.ndarray:
        """Offsets of the bytes at which elements of ``size`` bytes begin: (mn, k)."""
        t, far = 16 // size, 1 << 20
        s = max(self.swizzle // 16, 1)
        lbo, sbo = self.leading // size, self.stride // size
        if self.major == "K":
            of_mn, of_k = ((8, far), (s * t, sbo)), ((t, far), (1, t if self.swizzle else lbo))
        elif self.swizzle:
            of_mn, of_k = ((t, s, far), (1, t, lbo)), ((8, far), (s * t, sbo))
        else:
            of_mn, of_k = ((t, 1, far), (1, t, sbo)), ((8, far), (t, lbo))
        at = self.start + size * (walk(np.arange(mn), *of_mn)[:, None] + walk(np.arange(k), *of_k))
        bits = {0: 0, 32: 1, 64: 2, 128: 3}[self.swizzle]  # Swizzle<bits, 4, 3>
        return at ^ ((at & (((1 << bits) - 1) << 7)) >> 3)

    def step(self, k: int, size: int) -> int:
        """Bytes from the start of one product's part to that of the next, ``k`` elements on."""
        if self.major == "K":
            return k * size if self.swizzle else k * size // 16 * self.leading
        return k // 8 * (self.stride if self.swizzle else self.leading)

    def descriptor(self, name: str, offset=0) -> str:
        """Code that puts it into a register; ``room`` is a multiple of 1024."""
        fixed = (self.leading >> 4) << 16 | (self.stride >> 4) << 32 | MODES[self.swizzle] << 62
        return f"""{{ .reg .b32 x; .reg .b64 y; mov.b32 x, room; add.u32 x, x, {self.start + offset}; shr.u32 x, x, 4;
        cvt.u64.u32 y, x; and.b64 y, y, 0x3FFF; or.b64 {name}, y, {fixed}; }}"""


def compact(swizzle: int, major: str, mn: int, k: int, size: int, start: int = 0, gap: int = 0) -> Layout:
    """With no more room than a gap behind every piece."""
    atom = 8 * swizzle + gap
    if not swizzle:
        inner, outer = 128 + gap, (128 + gap) * (k * size // 16 if major == "K" else k // 8)
        return Layout(swizzle, major, inner, outer, start)
    return Layout(swizzle, major, 16 if major == "K" else atom * (k // 8), atom, start)


def bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Of numbers that need no rounding."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    single = x.astype(np.float32).view(np.uint32)
    return (single >> 16).astype(np.uint16) if kind == "bf16" else single | 0x1ABC  # TF32 has no such bits: not looked at


def image(size: int, *matrices) -> np.ndarray:
    """Shared memory with matrices in it: (bits, (mn, k); layout). All else is NaN."""
    room = np.full(size, 0xFF, np.uint8)
    for held, layout in matrices:
        view = room.view(held.dtype)
        where = layout.places(*held.shape, held.itemsize) // held.itemsize
        assert (view[where] == view.dtype.type(-1 % (1 << 8 * held.itemsize))).all(), "matrices lie over each other"
        view[where] = held
    return room


def names(count: int, prefix="d") -> str:
    return "{" + ", ".join(f"{prefix}{i}" for i in range(count)) + "}"


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """What the 128 threads hold of (64, n), in the words of the manual's figure."""
    n = matrix.shape[1]
    held = np.empty((128, n // 2), np.float32)
    for warp, group, member, i in itertools.product(range(4), range(8), range(4), range(n // 2)):
        row = 16 * warp + group + (8 if i % 4 >= 2 else 0)
        held[32 * warp + 4 * group + member, i] = matrix[row, i // 4 * 8 + 2 * member + i % 2]
    return held


def fragments(a: np.ndarray) -> np.ndarray:
    """What the 128 threads hold of the bits of a, (64, k): four registers each."""
    held = np.empty((128, 16 // a.itemsize), a.dtype)
    for warp, group, member, i in itertools.product(range(4), range(8), range(4), range(held.shape[1])):
        if a.itemsize == 2:
            row, column = group + (8 if i in (2, 3, 6, 7) else 0), 2 * member + i % 2 + (8 if i >= 4 else 0)
        else:
            row, column = group + (8 if i in (1, 3) else 0), member + (4 if i >= 2 else 0)
        held[32 * warp + 4 * group + member, i] = a[16 * warp + row, column]
    return held.view(np.uint32)


def wgmma(n: int, kind: str, a: str, b: str, keep="1", ways=(), d="d") -> str:
    """One product. ``ways``: "K" or "MN" of each operand in shared memory."""
    transposed = "".join(f", {int(way == 'MN')}" for way in ways) if kind != "tf32" else ""
    shape = f"m64n{n}k{8 if kind == 'tf32' else 16}"
    return f"wgmma.mma_async.sync.aligned.{shape}.f32.{kind}.{kind} {names(n // 2, d)}, {a}, {b}, {keep}, 1, 1{transposed};"


COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"


def execute(body, room, sums, *arrays, threads=128) -> np.ndarray:
    """Runs ``body`` with ``room`` in shared memory and rows of ``sums`` in the threads' registers ``d0``, ...: what is in these
    afterwards. More arrays are at ``%a2``, ..., their rows at ``%e2``, ... ."""
    count = sums.shape[1]
    loads, stores = "", ""
    for i in range(0, count, 4):
        four = f"{{d{i}, d{i + 1}, d{i + 2}, d{i + 3}}}"
        loads += f"ld.global.v4.f32 {four}, [%e1 + {4 * i}];"
        stores += f"st.global.v4.f32 [%e1 + {4 * i}], {four};"
    text = f""".reg .f32 d<{count}>; .reg .b32 a<4>; .reg .b64 first, second;
    {moved(room.size, threads, "%a0", to_global=False)} {loads} fence.proxy.async; bar.sync 0; wgmma.fence.sync.aligned;
    {body} {stores}"""
    module = f".shared .align 1024 .b8 room[{room.size}];\n{BARS}"
    return run(text, room, sums, *arrays, threads=threads, module=module)[1]


def draw(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).integers(-8, 9, shape) / 2


def check(kind, n, k, a_at, b_at, products=None, keep="1"):
    """(64, k) times (k, n) added to sums, by as many products as it takes. ``a_at`` None: from registers."""
    size, one = (4, 8) if kind == "tf32" else (2, 16)
    a, b, c = draw(64, k), draw(n, k), draw(64, n)
    matrices = [(bits(b, kind), b_at)] + ([(bits(a, kind), a_at)] if a_at else [])
    ways = (a_at.major, b_at.major) if a_at else (b_at.major,)
    body, held = "", []
    for i in range(k // one):
        left = "{a0, a1, a2, a3}"
        if a_at:
            left = "first"
            body += a_at.descriptor("first", i * a_at.step(one, size))
        else:
            body += f"ld.global.v4.b32 {left}, [%e{2 + i}];"
            held.append(fragments(bits(a[:, one * i : one * i + one], kind)))
        body += b_at.descriptor("second", i * b_at.step(one, size)) + wgmma(n, kind, left, "second", keep, ways)
        if not a_at:
            body += COMMIT + WAIT  # before the registers are used again
    got = execute(body + COMMIT + WAIT, image(1 << 16, *matrices), accumulators(c), *held)
    assert (got == accumulators(c + a @ b.T)).all()


SWIZZLES = [0, 32, 64, 128]


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("ways", [("K", "K"), ("MN", "K"), ("K", "MN"), ("MN", "MN")])
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_operands_in_shared_memory(kind, ways, swizzle):
    """In every mode, a and b in different ones, with gaps between pieces."""
    other = SWIZZLES[SWIZZLES.index(swizzle) - 1]
    a_at = compact(swizzle, ways[0], 64, 16, 2, gap=8 * swizzle or 16)
    b_at = compact(other, ways[1], 64, 16, 2, start=1 << 15, gap=8 * other or 48)
    check(kind, 64, 16, a_at, b_at)


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_tf32(swizzle):
    check("tf32", 32, 8, compact(swizzle, "K", 64, 8, 4), compact(swizzle, "K", 32, 8, 4, start=1 << 15))
    check("tf32", 16, 8, None, compact(swizzle, "K", 16, 8, 4))


@pytest.mark.parametrize("n", [8, 16, 24, 64, 128, 256])
@pytest.mark.parametrize("from_registers", [False, True])
def test_widths(n, from_registers):
    b_at = compact(128, "K", n, 16, 2, start=1 << 14)
    check("bf16", n, 16, None if from_registers else compact(64, "K", 64, 16, 2), b_at)
    check("f16", n, 16, None, compact(0, "MN", n, 16, 2, start=1 << 14))
    if n % 64 == 0:
        check("f16", n, 16, None, compact(128, "MN", n, 16, 2, start=1 << 14))


@pytest.mark.parametrize("kind, ways, swizzle", [
    *(("bf16", ways, s) for ways in (("K", "K"), ("MN", "MN"), ("K", "MN")) for s in SWIZZLES),
    *(("tf32", ("K", "K"), s) for s in SWIZZLES),
])  # fmt: skip
def test_several_products_in_a_group(kind, ways, swizzle):
    """All on the same accumulators. Along k of rows of a swizzle pattern, or from atom to atom."""
    size = 4 if kind == "tf32" else 2
    in_row = (swizzle or 128) // size  # the k that a row of the pattern holds, where k is major
    k = in_row if "K" in ways else 64
    a_at, b_at = compact(swizzle, ways[0], 64, k, size), compact(swizzle, ways[1], 64, k, size, start=1 << 15)
    check(kind, 64, k, a_at, b_at)
    if swizzle:
        check(kind, 64, k, None, b_at)


A_AT, B_AT = compact(128, "K", 64, 64, 2), compact(128, "K", 16, 64, 2, start=8192)
A, B, C = draw(64, 64, seed=1), draw(16, 64, seed=2), draw(64, 16, seed=3)
ROOM = image(16384, (bits(A, "bf16"), A_AT), (bits(B, "bf16"), B_AT))
LEFT, RIGHT = A_AT.descriptor("first"), B_AT.descriptor("second")


@pytest.mark.parametrize("keep, kept", [
    ("1", True), ("0", False), ("%p1", True), ("%p2", False), ("!%p1", False), ("!%p2", True),
])  # fmt: skip
def test_whether_sums_are_kept(keep, kept):
    """Without them, even NaN in the accumulators does not count."""
    start = C if kept else np.full_like(C, np.nan)
    body = "setp.ge.u32 %p1, %t, 0; setp.lt.u32 %p2, %t, 0;" + LEFT + RIGHT + wgmma(16, "bf16", "first", "second", keep, "KK")
    got = execute(body + COMMIT + WAIT, ROOM, accumulators(start))
    assert (got == accumulators(kept * C + A[:, :16] @ B[:, :16].T)).all()


def test_two_warpgroups():
    """Each with its own a and sums, both with one b. They come to the product at different times."""
    a2_at = dataclasses.replace(A_AT, start=16384)
    a2, c2 = draw(64, 64, seed=4), draw(64, 16, seed=5)
    room = image(32768, (bits(A, "bf16"), A_AT), (bits(B, "bf16"), B_AT), (bits(a2, "bf16"), a2_at))
    one = wgmma(16, "bf16", "first", "second", "1", "KK") + COMMIT + WAIT
    sums = np.concatenate([accumulators(C), accumulators(c2)])
    for code in (
        f"{LEFT} setp.ge.u32 %p1, %t, 128; @%p1 add.s64 first, first, 1024; {one}",
        f"{LEFT} setp.ge.u32 %p1, %t, 128; @%p1 bra OTHER; {one} bra OUT; OTHER: {a2_at.descriptor('first')} {one} OUT:",
    ):
        got = execute(RIGHT + code, room, sums, threads=256)
        assert (got[:128] == accumulators(C + A[:, :16] @ B[:, :16].T)).all()
        assert (got[128:] == accumulators(c2 + a2[:, :16] @ B[:, :16].T)).all()


ONE = LEFT + RIGHT + wgmma(16, "bf16", "first", "second", "1", "KK")


def overwrite(at: int) -> str:
    return f"setp.eq.u32 %p1, %t, 0; mov.u32 %r1, 12345; @%p1 st.shared.b32 [room + {at}], %r1;"


def groups(*behind) -> str:
    """Three groups of a product, the next 16 of k each, and code behind each."""
    code = ""
    for i, then in enumerate(behind):
        code += A_AT.descriptor("first", 32 * i) + B_AT.descriptor("second", 32 * i)
        code += wgmma(16, "bf16", "first", "second", "1", "KK") + COMMIT + then
    return code


# Of row 0 of a and of b: the first bytes of the first, the second and the third 16 of k.
FIRST, SECOND, THIRD = (int(A_AT.places(1, 64, 2)[0, 16 * i]) for i in range(3))
TO_1, TO_2 = ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;")


@pytest.mark.parametrize("code, fine", [
    (ONE + COMMIT + WAIT + overwrite(FIRST), True),
    (ONE + COMMIT + overwrite(FIRST) + WAIT, False),
    (ONE + overwrite(FIRST) + COMMIT + WAIT, False),
    (ONE + COMMIT + overwrite(8192 + FIRST) + WAIT, False),
    (ONE + COMMIT + overwrite(SECOND) + WAIT, True),  # the product does not look there
    (ONE + WAIT + overwrite(FIRST) + COMMIT + WAIT, False),  # waited for before it was in a group
    (groups("", "", TO_1 + overwrite(FIRST) + overwrite(SECOND) + WAIT), True),
    (groups("", "", TO_1 + overwrite(THIRD) + WAIT), False),
    (groups("", "", TO_2 + overwrite(FIRST) + WAIT), True),
    (groups("", "", TO_2 + overwrite(SECOND) + WAIT), False),
    (groups("", TO_1 + overwrite(FIRST), TO_1 + overwrite(SECOND) + WAIT), True),
    (groups("", TO_1 + overwrite(SECOND), WAIT), False),
])  # fmt: skip
def test_operands_overwritten_before_the_wait(code, fine):
    if fine:
        count = 16 * code.count("mma_async")
        got = execute(code, ROOM, accumulators(C))
        assert (got == accumulators(C + A[:, :count] @ B[:, :count].T)).all()
    else:
        with pytest.raises(PtxError, match="overwritten"):
            execute(code, ROOM, accumulators(C))


def test_accumulators_are_not_there_before_the_wait():
    assert np.isnan(execute(ONE + COMMIT, ROOM, accumulators(C))).all()
    assert np.isnan(execute(ONE + WAIT, ROOM, accumulators(C))).all()
    assert np.isnan(execute(groups("", "", TO_1), ROOM, accumulators(C))).all()  # the third is to come
    two = LEFT + RIGHT + "".join(f"mov.f32 e{i}, d{i};" for i in range(8))
    two += "".join(wgmma(16, "bf16", "first", "second", "1", "KK", d) + COMMIT for d in "de") + TO_1
    got = execute(f".reg .f32 e<8>; {two}", ROOM, accumulators(C))
    assert (got == accumulators(C + A[:, :16] @ B[:, :16].T)).all()
    moves = "".join(f"mov.f32 d{i}, e{i};" for i in range(8))
    assert np.isnan(execute(f".reg .f32 e<8>; {two} {moves}", ROOM, accumulators(C))).all()
    assert (execute(f".reg .f32 e<8>; {two} {WAIT} {moves}", ROOM, accumulators(C)) == got).all()


@pytest.mark.parametrize("code", [COMMIT + "mov.f32 d3, 0f00000000;", "mov.f32 d3, 0f00000000;" + ONE + COMMIT])
def test_accumulators_written_before_the_wait(code):
    with pytest.raises(PtxError, match="accumulator.*written before"):
        execute(ONE + code + WAIT, ROOM, accumulators(C))


def test_fragments_overwritten_before_the_wait():
    a = fragments(bits(A[:, :16], "bf16"))
    body = (
        "ld.global.v4.b32 {a0, a1, a2, a3}, [%e2];" + RIGHT + wgmma(16, "bf16", "{a0, a1, a2, a3}", "second", "1", "K") + COMMIT
    )
    got = execute(body + WAIT + "mov.b32 a1, 0;", ROOM, accumulators(C), a)
    assert (got == accumulators(C + A[:, :16] @ B[:, :16].T)).all()
    with pytest.raises(PtxError, match="overwritten"):
        execute(body + "mov.b32 a1, 0;" + WAIT, ROOM, accumulators(C), a)


def test_a_tile_over_an_operand_before_the_wait():
    """TMA overwrites too; and a warpgroup's wait is not another's."""
    box = (0, {"box": (64, 64), "swizzle": 128})
    copy = "@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 8192;"
    copy += f"@%p7 {COPY.format(2)} [room], [%m0, {{0, 0}}], [bars];"
    head = f".reg .f32 d<8>; .reg .b64 first, second; {init(1)} {copy} {wait('bars', 0)} {LEFT} {RIGHT.replace('8192', '0')}"
    one = wgmma(16, "bf16", "first", "second", "0", "KK") + COMMIT
    other = "setp.ge.u32 %p1, %t, 128; bar.sync 0; @%p1 bra OTHER; {} bar.sync 1; bra OUT; OTHER: {} bar.sync 1; OUT:"
    run_maps(head + one + WAIT + copy + wait("bars", 1), [box], bits(A, "bf16"))
    for code in (one + copy + WAIT + wait("bars", 1), one + other.format("", WAIT) + copy + WAIT + wait("bars", 1)):
        with pytest.raises(PtxError, match="overwritten"):
            run_maps(head + code, [box], bits(A, "bf16"), threads=256)


def changed(which: str, **fields) -> str:
    layout = dataclasses.replace({"first": A_AT, "second": B_AT}[which], **fields)
    return LEFT + RIGHT + layout.descriptor(which) + wgmma(16, "bf16", "first", "second", "1", ("K", "K"))


@pytest.mark.parametrize("code, said", [
    ("setp.lt.u32 %p1, %t, 64; @%p1 bra OUT;" + ONE + "OUT:", "divided"),
    (LEFT + RIGHT + "setp.ge.u32 %p1, %t, 32; @%p1 " + wgmma(16, "bf16", "first", "second", "1", "KK"), "divided"),
    (LEFT + RIGHT + "setp.ge.u32 %p1, %t, 16; @%p1 " + wgmma(16, "bf16", "first", "second", "1", "KK"), "divided"),
    (ONE.replace("wgmma", "cvt.u64.u32 first, %t; wgmma", 1), "not say the same"),
    ("setp.lt.u32 %p1, %t, 64;" + ONE.replace(", 1, 1, 1,", ", %p1, 1, 1,"), "not say the same"),
    (changed("first", start=16384), "shared memory"),
    (changed("first", start=16384 - 1024), "shared memory"),
    (changed("second", start=16384 - 1024), "shared memory"),
    (changed("second", stride=8192), "shared memory"),
    (changed("second", swizzle=0, stride=128, leading=8192), "shared memory"),
    (changed("first", start=112), "beyond the rows"),
    (changed("first", swizzle=32, start=16), "beyond the rows"),
    (ONE.replace("wgmma", "or.b64 first, first, 562949953421312; wgmma", 1), "base offset"),
    (ONE.replace("1, 1, 0, 0", "-1, 1, 0, 0"), "not known"), (ONE.replace("1, 1, 0, 0", "1, -1, 0, 0"), "not known"),
    (ONE.replace(".bf16.bf16", ".e4m3.e4m3").replace("k16", "k32"), "not known"),
    (ONE.replace(".bf16.bf16", ".tf32.tf32"), "not known"), (ONE.replace("f32.bf16.bf16", "f16.f16.f16"), "not known"),
])  # fmt: skip
def test_products_that_cannot_be(code, said):
    with pytest.raises(PtxError, match=said):
        execute(code + COMMIT + WAIT, ROOM, accumulators(C))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("major", ["K", "MN"])
def test_tiles_that_are_multiplied(major, swizzle):
    """b comes by TMA, as (n, k) or as (k, n), and goes into products as it lies there; a half of it is beyond the tensor."""
    n = span = swizzle // 2
    a, b = draw(64, span), draw(n, span)
    b[n // 2 :] = 0
    given = bits(b[: n // 2] if major == "K" else np.ascontiguousarray(b[: n // 2].T), "bf16")
    b_at = Layout(swizzle, major, 0, 8 * swizzle)
    body = f""".reg .f32 d<{n // 2}>; .reg .b32 a<4>; .reg .b64 second; {init(1)}
    @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], {n * span * 2};
    @%p7 {COPY.format(2)} [room], [%m0, {{0, 0}}], [bars]; {wait("bars", 0)} mad.wide.u32 %rd1, %t, 16, %a1;"""
    held = [fragments(bits(a[:, i : i + 16], "bf16")) for i in range(0, span, 16)]
    for i in range(len(held)):
        body += f"ld.global.v4.b32 {{a0, a1, a2, a3}}, [%rd1 + {2048 * i}]; {b_at.descriptor('second', i * b_at.step(16, 2))}"
        body += wgmma(n, "bf16", "{a0, a1, a2, a3}", "second", str(int(i > 0)), (major,)) + COMMIT + WAIT
    body += f"mad.wide.u32 %rd2, %t, {2 * n}, %a2;"
    body += "".join(f"st.global.f32 [%rd2 + {4 * i}], d{i};" for i in range(n // 2))
    box = {"box": (span, n) if major == "K" else (n, span), "swizzle": swizzle}
    got = run_maps(body, [(0, box)], given, np.stack(held), np.zeros((128, n // 2), np.float32), room=n * span * 2)[2]
    assert (got == accumulators(a @ b.T)).all()
