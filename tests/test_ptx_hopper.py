"""The machine that runs PTX: Hopper's mbarriers, and tiles that TMA copies. Products of warpgroups: test_ptx_wgmma.py."""

import itertools
import struct

import numpy as np
import pytest
from ptx.snippets import HEADER, PtxError, launch, parse, place, run
from ptx.tensor_map import TensorMap, encode

COPY = "cp.async.bulk.tensor.{}d.shared::cta.global.mbarrier::complete_tx::bytes"
BARS = ".shared .align 8 .b8 bars[64];\n"
REGISTERS = ".reg .pred %p<8>; .reg .b32 %r<32>, %t; .reg .f32 %f<8>; .reg .b64 %rd<16>;"


def wait(barrier, parity, how="try_wait") -> str:
    """Until the phase of that parity is over."""
    code = f"mbarrier.{how}.parity.shared::cta.b64 done, [{barrier}], {parity}"
    return f"{{ .reg .pred done; AGAIN: {code}; @!done bra AGAIN; }}"


def init(*counts) -> str:
    """An mbarrier for each of these numbers of arrivals, 8 bytes apart, made by thread 0."""
    made = "".join(f"@%p7 mbarrier.init.shared::cta.b64 [bars + {8 * n}], {count};" for n, count in enumerate(counts))
    return f"setp.eq.u32 %p7, %t, 0; {made} fence.mbarrier_init.release.cluster; bar.sync 0;"


def run_maps(body, maps, *arrays, threads=128, room=8192) -> list[np.ndarray]:
    """Runs ``body`` with tensor maps: a pair of what map ``n`` is about, an array, and the box and swizzle.

    It finds their generic addresses in ``%m0``, ..., its thread in ``%t``, the arrays in ``%a0``, ..., and what was in
    ``room`` when it ended is the last array given back."""
    memory, copies = place([*arrays, np.zeros(room, np.uint8)])
    blobs = [
        encode(TensorMap(**{
            "address": copies[n].ctypes.data, "element_bytes": copies[n].itemsize, "shape": copies[n].shape[::-1],
            "strides": copies[n].strides[-2::-1], **options,
        }))
        for n, options in maps
    ]  # fmt: skip
    count = len(copies)
    declared = [f".param .align 64 .b8 map_{n}[128]" for n in range(len(maps))]
    declared += [f".param .u64 array_{n}" for n in range(count)]
    setup = "".join(f"mov.b64 %m{n}, map_{n}; cvta.param.u64 %m{n}, %m{n};" for n in range(len(maps)))
    setup += "".join(f"ld.param.u64 %a{n}, [array_{n}];" for n in range(count))
    text = f"""{HEADER}.shared .align 1024 .b8 room[{room}];\n{BARS}
    .visible .entry kernel({", ".join(declared)})
    {{
        {REGISTERS} .reg .b64 %m<{len(maps) + 1}>, %a<{count + 1}>;
        mov.u32 %t, %tid.x; {setup} {body}
        bar.sync 0; {moved(room, threads, f"%a{count - 1}", to_global=True)} ret;
    }}"""
    parameters = b"".join(blobs) + struct.pack(f"<{count}Q", *(c.ctypes.data for c in copies))
    launch(parse(text)["kernel"], (1, 1, 1), (threads, 1, 1), 0, parameters, memory)
    return copies


def moved(size: int, threads: int, address: str, to_global: bool) -> str:
    """All threads move ``size`` bytes between ``room`` and an address in global memory."""
    code = f"mov.b32 x, room; mad.lo.u32 x, %t, 16, x; mad.wide.u32 y, %t, 16, {address};"
    for at in range(0, size, 16 * threads):
        code += f"setp.lt.u32 p, %t, {(size - at) // 16};"
        source, target = (f"shared.v4.b32 {{}}[x + {at}]", f"global.v4.b32 {{}}[y + {at}]")[:: 1 if to_global else -1]
        code += f"@p ld.{source.format('{a, b, c, d}, ')}; @p st.{target.format('')}, {{a, b, c, d}};"
    return f"{{ .reg .pred p; .reg .b32 x, a, b, c, d; .reg .b64 y; {code} }}"


# ---------------------------------------------------------------- mbarriers


def test_parities_of_a_fresh_barrier():
    """The phase before the first counts as over, and is odd."""
    body = f"{init(1)} mbarrier.try_wait.parity.shared::cta.b64 %p1, [bars], 1; selp.b32 %r0, 1, 0, %p1;"
    assert run(f"{body} st.global.b32 [%a0], %r0;", np.zeros(1, np.int32), module=BARS)[0][0] == 1
    with pytest.raises(PtxError, match="nobody can go on.*waiting for an mbarrier.*"):
        run(f"{init(1)} {wait('bars', 0)}", np.zeros(1, np.int32), module=BARS)


@pytest.mark.parametrize("how, hint", [("try_wait", ""), ("try_wait", ", 1000"), ("test_wait", "")])
def test_phases(how, hint):
    """Warps 1 and 2 give what they have, warp 0 waits for 32 + 2 arrivals of each phase."""
    body = f"""
    {init(34)} shr.u32 %r1, %t, 5; mov.u32 %r2, 0; mov.u32 %r8, 0; mov.u32 %r9, room;
    setp.ne.u32 %p1, %r1, 0; @%p1 bra GIVE;
    TAKE: and.b32 %r3, %r2, 1; {wait("bars", "%r3" + hint, how)}
    ld.shared.b32 %r4, [%r9]; mad.lo.s32 %r8, %r8, 10, %r4; bar.sync 1, 96;
    add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 4; @%p2 bra TAKE; bra OUT;
    GIVE: add.u32 %r5, %r2, 3; setp.eq.u32 %p3, %r1, 1; setp.eq.u32 %p4, %t, 64; @%p4 st.shared.b32 [%r9], %r5;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [bars]; @%p4 mbarrier.arrive.shared::cta.b64 _, [bars], 2;
    bar.sync 1, 96; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 4; @%p2 bra GIVE;
    OUT: st.global.b32 [%e0], %r8;"""
    got = run(body, np.zeros(96, np.int32), threads=96, module=BARS + ".shared .b32 room;")[0]
    assert got.tolist() == [3456] * 32 + [0] * 64


RING = """
rem.u32 %r3, %r2, {stages}; div.u32 %r4, %r2, {stages}; and.b32 %r4, %r4, 1; xor.b32 %r5, %r4, 1;
mov.u32 %r6, bars; mad.lo.u32 %r6, %r3, 8, %r6;
mov.u32 %r7, room; mad.lo.u32 %r7, %r3, 128, %r7; and.b32 %r10, %t, 31; mad.lo.u32 %r7, %r10, 4, %r7;
"""
AGAIN = "add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, {rounds}; @%p2 bra {label};"


@pytest.mark.parametrize("first", ["producer", "consumer"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_ring(stages, first):
    """Warp 0 fills places of a ring, warps 1 and 2 empty them, each waiting for the other. ``first``: in the text."""
    rounds = 11
    produce = f"""
    PRODUCE: {RING.format(stages=stages)} {wait(f"%r6 + {8 * stages}", "%r5")}
    mad.lo.s32 %r11, %r2, 100, %r10; st.shared.b32 [%r7], %r11; mbarrier.arrive.shared::cta.b64 _, [%r6];
    {AGAIN.format(rounds=rounds, label="PRODUCE")} bra OUT;"""
    consume = f"""
    CONSUME: {RING.format(stages=stages)} {wait("%r6", "%r4")}
    ld.shared.b32 %r11, [%r7]; mad.lo.s32 %r8, %r8, 3, %r11; setp.eq.u32 %p3, %r10, 5; bar.warp.sync 0xFFFFFFFF;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [%r6 + {8 * stages}];
    {AGAIN.format(rounds=rounds, label="CONSUME")} bra OUT;"""
    parts = {"producer": produce, "consumer": consume}
    second = next(name for name in parts if name != first)
    body = f"""
    {init(*[32] * stages, *[2] * stages)} mov.u32 %r2, 0; mov.u32 %r8, 0;
    setp.lt.u32 %p1, %t, 32; {"@%p1" if second == "producer" else "@!%p1"} bra SECOND; {parts[first]} SECOND: {parts[second]}
    OUT: st.global.b32 [%e0], %r8;"""
    got = run(body, np.zeros(96, np.int32), threads=96, module=BARS + f".shared .b8 room[{128 * stages}];")[0]
    sums = [sum((100 * i + lane) * 3 ** (rounds - 1 - i) for i in range(rounds)) for lane in range(32)]
    assert got.tolist() == [0] * 32 + sums * 2


ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [bars]"


@pytest.mark.parametrize("code, said", [
    (f"{init(3)} {ARRIVE}, 2;", "more arrivals"),
    (f"{init(40)} {ARRIVE}, 41;", "more arrivals"),
    (f"{init(33)} {ARRIVE}; {wait('bars', 0)}", "nobody can go on.*32 threads waiting for an mbarrier"),
    (f"{init(1)} @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 16; {wait('bars', 0)}", "nobody can go on"),
    (f"{init(1)} @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 16; @%p7 {ARRIVE};", "more arrivals"),
    (f"{init(1)} @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 1048576;", "bytes"),
    (f"{init(1)} {wait('bars + 8', 1)}", "no mbarrier"),
    (f"{init(1)} mbarrier.arrive.shared::cta.b64 _, [bars + 8];", "no mbarrier"),
    (wait("bars", 1), "no mbarrier"),
    (f"{init(1)} @%p7 mbarrier.inval.shared::cta.b64 [bars]; {wait('bars', 1)}", "no mbarrier"),
    (f"{init(1)} st.shared.b32 [bars + 4], %t; {wait('bars', 1)}", "overwritten"),
    (f"{init(1)} {init(1)}", "made again"),
    (init(0), "for 0 arrivals"), (init(1 << 20), "arrivals"),
    ("mbarrier.init.shared::cta.b64 [bars + 4], 1;", "multiple"),
    ("mbarrier.init.shared::cta.b64 [bars + 64], 1;", "shared memory"),
])  # fmt: skip
def test_mbarriers_that_cannot_be(code, said):
    with pytest.raises(PtxError, match=said):
        run(code, np.zeros(8, np.int32), module=BARS)


def test_an_mbarrier_is_made_again_where_one_was():
    again = "bar.sync 0; @%p7 mbarrier.inval.shared::cta.b64 [bars]; bar.sync 0;"
    run(f"{init(1)} @%p7 {ARRIVE}; {wait('bars', 0)} {again} {init(32)} {ARRIVE}; {wait('bars', 0)}", np.zeros(1), module=BARS)


# ---------------------------------------------------------------- tiles


def tile(tensor: np.ndarray, box, corner, swizzle: int) -> np.ndarray:
    """The bytes in shared memory of a box: zeros outside of the tensor, pieces of 16 bytes permuted. ``box`` and ``corner`` in
    the order of numpy."""
    made = np.zeros(box, tensor.dtype)
    for index in np.ndindex(*box):
        there = tuple(c + i for c, i in zip(corner, index, strict=True))
        if all(0 <= i < n for i, n in zip(there, tensor.shape, strict=True)):
            made[index] = tensor[there]
    if not swizzle:
        return made.reshape(-1).view(np.uint8)
    rows = made.reshape(-1).view(np.uint8).reshape(-1, swizzle // 16, 16)
    permuted = np.empty_like(rows)
    for row, piece in np.ndindex(*rows.shape[:2]):
        by = {32: row // 4 % 2, 64: row // 2 % 4, 128: row % 8}[swizzle]
        permuted[row, piece ^ by] = rows[row, piece]
    return permuted.reshape(-1)


def copies(corners, size, rank, barriers=(0,)) -> str:
    """Thread 0 has boxes copied one behind the other, told to the barriers in turn, which expect the bytes they get."""
    code = ""
    for n, barrier in enumerate(barriers):
        expected = size * len(corners[n :: len(barriers)])
        code += f"@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars + {8 * barrier}], {expected};"
    for n, corner in enumerate(corners):
        at = ", ".join(str(c) for c in reversed(corner))
        to = -(-size // 1024) * 1024 * n
        code += f"mov.u32 %r1, room; add.u32 %r1, %r1, {to};"
        code += f"@%p7 {COPY.format(rank)} [%r1], [%m0, {{{at}}}], [bars + {8 * barriers[n % len(barriers)]}];"
    return code


SHAPE = (21, 72)  # rows and columns of the tensors of two dimensions
INSIDE, RIGHT, BELOW, BEFORE, ABOVE, BEYOND = (3, 8), (0, 60), (18, 4), (2, -5), (-3, 0), (30, 100)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, np.uint64])
def test_tiles(kind, swizzle):
    """Six boxes in flight at once, on one mbarrier."""
    random = np.random.default_rng(swizzle)
    size = np.dtype(kind).itemsize
    box = (10, (swizzle or 48) // size)
    tensor = random.integers(1, 200, (SHAPE[0], 80)).astype(kind)
    corners = [INSIDE, RIGHT, BELOW, BEFORE, ABOVE, BEYOND]
    body = init(1) + copies(corners, box[0] * box[1] * size, 2) + wait("bars", 0)
    maps = [(0, {"box": box[::-1], "swizzle": swizzle})]
    room = run_maps(body, maps, tensor, room=1024 * 12)[-1]
    step = -(-box[0] * box[1] * size // 1024) * 1024
    expected = np.full(1024 * 12, 0xFF, np.uint8)
    for n, corner in enumerate(corners):
        made = tile(tensor, box, corner, swizzle)
        expected[step * n : step * n + made.size] = made
    assert (room == expected).all()


@pytest.mark.parametrize("shape, box, corner", [
    ((70,), (16,), (60,)), ((5, 7, 16), (2, 3, 8), (4, -1, 8)), ((2, 3, 4, 24), (2, 1, 5, 16), (-1, 2, 1, 16)),
    ((2, 2, 3, 3, 16), (2, 2, 2, 2, 16), (0, 1, -1, 2, 8)),
])  # fmt: skip
def test_tiles_of_other_ranks(shape, box, corner):
    tensor = np.random.default_rng(0).integers(1, 60000, shape).astype(np.uint16)
    size = 2 * int(np.prod(box))
    body = init(1) + copies([corner], size, len(shape)) + wait("bars", 0)
    room = run_maps(body, [(0, {"box": box[::-1], "swizzle": 0})], tensor)[-1]
    assert (room[:size] == tile(tensor, box, corner, 0)).all() and (room[size:] == 0xFF).all()


def test_a_tile_in_the_middle_of_a_swizzle_pattern():
    """The permutation goes by addresses, wherever the box begins."""
    tensor = np.arange(16 * 64, dtype=np.uint16).reshape(16, 64)
    body = f"{init(1)} @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 512;"
    body += f"@%p7 {COPY.format(2)} [room + 384], [%m0, {{0, 5}}], [bars]; {wait('bars', 0)}"
    room = run_maps(body, [(0, {"box": (64, 4), "swizzle": 128})], tensor)[-1]
    around = np.concatenate([np.zeros((3, 64), np.uint16), tensor[5:9]])  # rows 3 to 6 of the pattern
    assert (room[384:896] == tile(around, (7, 64), (0, 0), 128)[384:]).all()


BOX = {"box": (16, 8), "swizzle": 32}  # 256 bytes
TENSOR = np.arange(1, 24 * 16 + 1, dtype=np.uint16).reshape(24, 16)


def test_a_tile_is_not_there_before_it_is_waited_for():
    look = "ld.shared.b32 %r2, [room]; st.global.b32 [%a1 + {}], %r2;"
    body = init(1) + copies([(0, 0)], 256, 2) + "bar.sync 0;" + look.format(0) + wait("bars", 0) + look.format(4)
    out = run_maps(body, [(0, BOX)], TENSOR, np.zeros(2, np.uint32))[1]
    assert out.tolist() == [0xFFFFFFFF, 0x00020001]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_tiles_on_barriers_of_their_own(order):
    """Waited for in any order; only what was waited for is looked at."""
    body = init(1, 1, 1) + copies([(0, 0), (8, 0), (16, 0)], 256, 2, barriers=(0, 1, 2))
    for n in order:
        body += f"{wait(f'bars + {8 * n}', 0)} ld.shared.u16 %r2, [room + {1024 * n}]; st.global.b32 [%a1 + {4 * n}], %r2;"
    assert run_maps(body, [(0, BOX)], TENSOR, np.zeros(3, np.uint32))[1].tolist() == [1, 129, 257]


def test_bytes_may_be_told_after_the_copy():
    """What arrives before it is expected counts; two maps on one mbarrier."""
    body = f"""{init(1)}
    @%p7 {COPY.format(2)} [room], [%m0, {{0, 0}}], [bars]; @%p7 {COPY.format(2)} [room + 1024], [%m1, {{0, 8}}], [bars];
    @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 384; {wait("bars", 0)}"""
    room = run_maps(body, [(0, BOX), (0, BOX | {"box": (16, 4)})], TENSOR)[-1]
    assert (room[:256] == tile(TENSOR, (8, 16), (0, 0), 32)).all()
    assert (room[1024:1152] == tile(TENSOR, (4, 16), (8, 0), 32)).all()


@pytest.mark.parametrize("stages", [2, 3])
def test_ring_of_tiles(stages):
    """Lane 0 of warp 0 has tiles copied; the other warps add them up, each its row, and give places back."""
    rounds, box = 7, {"box": (32, 3), "swizzle": 128}
    tensor = np.random.default_rng(0).integers(0, 1000, (3 * rounds, 32)).astype(np.uint32)
    head = RING.format(stages=stages).replace("%r3, 128,", "%r3, 1024,")
    body = f"""
    {init(*[1] * stages, *[3] * stages)} mov.u32 %r2, 0; mov.u32 %r8, 0; shr.u32 %r12, %t, 5;
    setp.lt.u32 %p1, %t, 32; @!%p1 bra CONSUME;
    PRODUCE: {head} {wait(f"%r6 + {8 * stages}", "%r5")}
    mul.lo.u32 %r13, %r2, 3; elect.sync _|%p3, 0xFFFFFFFF; @%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 384;
    @%p3 {COPY.format(2)} [%r7], [%m0, {{0, %r13}}], [%r6];
    {AGAIN.format(rounds=rounds, label="PRODUCE")} bra OUT;
    CONSUME: {head} {wait("%r6", "%r4")}
    add.u32 %r14, %r12, -1; mul.lo.u32 %r14, %r14, 132; xor.b32 %r15, %r12, 1;
    mov.u32 %r16, room; mad.lo.u32 %r16, %r3, 1024, %r16; add.u32 %r17, %r12, -1; shl.b32 %r18, %r17, 7;
    shl.b32 %r19, %r10, 2; shl.b32 %r17, %r17, 4; xor.b32 %r19, %r19, %r17; add.u32 %r16, %r16, %r18; add.u32 %r16, %r16, %r19;
    ld.shared.b32 %r11, [%r16]; mad.lo.s32 %r8, %r8, 3, %r11; setp.eq.u32 %p3, %r10, 0; bar.warp.sync 0xFFFFFFFF;
    @%p3 mbarrier.arrive.shared::cta.b64 _, [%r6 + {8 * stages}];
    {AGAIN.format(rounds=rounds, label="CONSUME")}
    OUT: mad.wide.u32 %rd1, %t, 4, %a1; st.global.b32 [%rd1], %r8;"""
    out = run_maps(body, [(0, box)], tensor, np.zeros(128, np.int32))[1].reshape(4, 32)
    sums = sum(tensor.reshape(rounds, 3, 32)[i].astype(np.int64) * 3 ** (rounds - 1 - i) for i in range(rounds))
    assert (out[0] == 0).all() and (out[1:] == sums).all()


ONE = init(1) + copies([(0, 0)], 256, 2) + wait("bars", 0)


@pytest.mark.parametrize("body, said", [
    (ONE.replace("], 256;", "], 240;"), "nobody can go on"),
    (ONE.replace("], 256;", "], 272;"), "nobody can go on"),
    (ONE.replace(wait("bars", 0), ""), "nobody waited for"),
    (ONE.replace("[%r1]", "[%r1 + 64]"), "128 bytes"),
    (ONE.replace("[%r1]", "[%r1 + 8448]"), "shared memory"),
    (ONE.replace("%r1, %r1, 0", "%r1, %r1, 8064"), "shared memory"),
    (ONE.replace("[%m0", "[%a0"), "parameters"),
    ("add.u64 %m0, %m0, 8;" + ONE, "multiple of 64"),
    ("add.u64 %m0, %m0, 64;" + ONE, "no tensor map"),
    (ONE.replace("[bars + 0]", "[bars + 8]"), "no mbarrier"),
    (ONE.replace("{0, 0}", "{0, 0, 0}"), "coordinates"),
    (ONE.replace("2d", "3d"), "coordinates"),
    (ONE.replace("2d", "3d").replace("{0, 0}", "{0, 0, 0}"), "coordinates"),
    (ONE.replace("global.mbarrier", "global.im2col.mbarrier"), "not known"),
    (ONE.replace("complete_tx::bytes", "complete_tx::bytes.multicast::cluster"), "not known"),
])  # fmt: skip
def test_tiles_that_cannot_be(body, said):
    with pytest.raises(PtxError, match=said):
        run_maps(body, [(0, BOX), (0, BOX)], TENSOR)


@pytest.mark.parametrize("options, said", [
    ({"shape": (16, 25)}, "not its own"), ({"strides": (48,)}, "not its own"), ({"swizzle": 64}, "not known"),
    ({"fills_nan": True}, "not known"),
])  # fmt: skip
def test_tensor_maps_that_cannot_be(options, said):
    """They say more of memory than there is, or what is not done here."""
    with pytest.raises(PtxError, match=said):
        run_maps(ONE.replace("{0, 0}", "{0, 18}"), [(0, BOX | options)], TENSOR)


# ---------------------------------------------------------------- what else there is


def test_elect():
    """One lane of each warp, and every lane is told which."""
    body = "elect.sync %r1|%p1, 0xFFFFFFFF; selp.b32 %r2, 1, 0, %p1; st.global.v2.b32 [%e0], {%r1, %r2};"
    out = run(body, np.zeros((96, 2), np.int32), threads=96)[0].reshape(3, 32, 2)
    for told, chosen in out.transpose(0, 2, 1):
        assert chosen.sum() == 1 and (told == chosen.argmax()).all()
    body = "setp.lt.u32 %p2, %t, 32; @%p2 bra OUT; elect.sync _|%p1, -1; @%p1 st.global.b32 [%a0], %t; OUT:"
    assert run(body, np.zeros(1, np.int32), threads=64)[0][0] >= 32
    with pytest.raises(PtxError, match="divided"):
        run("setp.lt.u32 %p2, %t, 20; @%p2 elect.sync _|%p1, -1;", np.zeros(1, np.int32))


def test_what_changes_no_result():
    body = """
    setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 24; fence.proxy.async; fence.proxy.async.shared::cta;
    fence.proxy.async.global; fence.mbarrier_init.release.cluster; fence.acq_rel.cta; fence.sc.gpu; fence.acq_rel.gpu;
    wgmma.fence.sync.aligned; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; st.global.b32 [%e0], %t;"""
    assert run(body, np.zeros(128, np.int32), threads=128)[0].tolist() == list(range(128))


def test_branches_by_a_table():
    """Lanes of a warp go four ways; labels may be in the table twice."""
    body = """
    and.b32 %r1, %t, 3; mov.u32 %r2, 0;
    TABLE: .branchtargets ONE, TWO, ONE, THREE;
    brx.idx %r1, TABLE;
    TWO: add.u32 %r2, %r2, 20; bra OUT; ONE: add.u32 %r2, %r2, 1; THREE: add.u32 %r2, %r2, 300;
    OUT: st.global.b32 [%e0], %r2;"""
    assert run(body, np.zeros(64, np.int32), threads=64)[0].tolist() == [301, 20, 301, 300] * 16
    with pytest.raises(PtxError, match="table of 4"):
        run(body.replace("and.b32 %r1, %t, 3;", "shr.u32 %r1, %t, 3;"), np.zeros(64, np.int32), threads=64)
