"""The machine that runs PTX: a fence.proxy.async that is missing, between what threads write to shared memory and products of
warpgroups or TMA. Hand-written PTX first, then the Hopper kernels, with their fences taken out."""

import re

import numpy as np
import pytest
from ptx.own_process import compiled
from ptx.snippets import PtxError, run
from settled import TRITON_KERNELS
from test_compiled_triton import FEW, check
from test_ptx_hopper import ARRIVE, BARS, COPY, init, moved, run_maps, wait
from test_ptx_wgmma import COMMIT, LEFT, RIGHT, ROOM, SECOND, WAIT, A, B, accumulators, bits, compact, draw, image, wgmma

FENCE, BARRIER = "fence.proxy.async;", "bar.sync 0;"
PRODUCT = LEFT + RIGHT + wgmma(16, "bf16", "first", "second", "0", "KK") + COMMIT + WAIT
SUMS = accumulators(A[:, :16] @ B[:, :16].T)


def only(thread: int, code: str) -> str:
    """For instructions that one thread executes."""
    return f"setp.eq.u32 %p1, %t, {thread};" + "".join(f"@%p1 {one};" for one in code.split(";") if one.strip())


def multiply(between: str, product=PRODUCT, room=ROOM, threads=128) -> np.ndarray:
    """All threads store ``room`` to shared memory, then run ``between``, then the product: the sums of the first 128 threads.

    There is an mbarrier for 128 arrivals, and one for 1."""
    body = f""".reg .f32 d<8>; .reg .b64 first, second; {init(128, 1)}
    {moved(room.size, threads, "%a0", to_global=False)} {between} {product}
    st.global.v4.f32 [%e1], {{d0, d1, d2, d3}}; st.global.v4.f32 [%e1 + 16], {{d4, d5, d6, d7}}; OUT:"""
    sums = np.full((threads, 8), np.nan, np.float32)
    module = f".shared .align 1024 .b8 room[{room.size}];\n{BARS}"
    return run(body, room, sums, threads=threads, module=module)[1][:128]


def holds(between: str, said: str | None, threads=128) -> None:
    """``said``: in the error, or ``None`` if there is none; the product is right then."""
    if said is None:
        assert (multiply(between, threads=threads) == SUMS).all()
    else:
        with pytest.raises(PtxError, match=said):
            multiply(between, threads=threads)


FENCELESS = "with no fence.proxy.async between"
UNORDERED = "with no fence.proxy.async or barrier between"
AGAIN = "st.shared.b32 [room], %r2;"


@pytest.mark.parametrize("between, said", [
    (FENCE + BARRIER, None),  # whoever wrote
    (BARRIER + FENCE, None),  # whoever goes on
    (BARRIER + only(5, FENCE) + BARRIER, None),  # one for all
    (BARRIER + only(5, FENCE) + "bar.sync 1, 128;", None),
    ("fence.proxy.async.shared::cta;" + BARRIER, None),
    (BARRIER, FENCELESS),
    (only(5, FENCE) + BARRIER, FENCELESS),  # for itself alone
    (BARRIER + only(5, FENCE), FENCELESS),  # nobody else knows
    (FENCE, UNORDERED),
    ("", UNORDERED),
    ("fence.proxy.async.global;" + BARRIER, FENCELESS),
    ("fence.proxy.alias; fence.acq_rel.cta; membar.cta;" + BARRIER + "wgmma.fence.sync.aligned;", FENCELESS),
    ("fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;", "not known"),
    # Of a warp its first lane, when the others have come.
    ("bar.warp.sync -1; elect.sync _|%p1, -1; @%p1 fence.proxy.async;" + BARRIER, None),
    ("elect.sync _|%p1, -1; @%p1 fence.proxy.async; bar.warp.sync -1;" + BARRIER, FENCELESS),
    # Written once more.
    (f"mov.b32 %r2, 0; {FENCE} {BARRIER} {only(7, AGAIN)} {BARRIER}", FENCELESS),
    (f"mov.b32 %r2, 0; {FENCE} {only(7, AGAIN)} {BARRIER}", "byte 0 of shared memory, which thread 7 wrote, " + FENCELESS),
    (f"ld.shared.b32 %r2, [room]; {FENCE} {only(7, AGAIN)} {FENCE} {BARRIER}", None),
    (f"mov.b32 %r2, 0; {FENCE} {only(7, AGAIN.replace('room', f'room + {SECOND}'))} {BARRIER}", None),  # not looked at
])  # fmt: skip
def test_a_fence_between_stores_and_a_product(between, said):
    holds(between, said)


SPLIT = "setp.lt.u32 %p2, %t, 128; @!%p2 bra WRITER; {} bra READER; WRITER: {} bra OUT; READER:"
ONE_ARRIVES = "setp.eq.u32 %p1, %t, 200; @%p1 mbarrier.arrive.shared::cta.b64 _, [bars + 8];"
OWN = FENCE + "bar.sync 1, 128;"  # what the warpgroup of the product wrote itself


@pytest.mark.parametrize("reader, writer, said", [
    (OWN + wait("bars", 0), FENCE + ARRIVE + ";", None),
    (OWN + wait("bars", 0) + FENCE, ARRIVE + ";", None),
    (wait("bars", 0) + only(3, FENCE) + "bar.sync 1, 128;" + OWN, ARRIVE + ";", None),
    (OWN + wait("bars + 8", 0), FENCE + "bar.sync 2, 128;" + ONE_ARRIVES, None),
    (OWN + "bar.sync 3, 256;", FENCE + "bar.arrive 3, 256;", None),
    (OWN + wait("bars", 0), ARRIVE + ";", FENCELESS),
    (OWN + wait("bars", 0), ARRIVE + ";" + FENCE, FENCELESS),  # too late, if not in this run
    (FENCE + "bar.sync 1, 128;" + wait("bars", 0), f"{ARRIVE}; {FENCE} bar.sync 2, 128;", FENCELESS),
    (OWN + wait("bars + 8", 0), ONE_ARRIVES, UNORDERED),
    (OWN + wait("bars + 8", 0), "bar.sync 2, 128;" + ONE_ARRIVES, FENCELESS),
    (OWN + wait("bars + 8", 0), FENCE + ONE_ARRIVES, UNORDERED),
    (OWN + wait("bars", 1), FENCE + ARRIVE + ";", UNORDERED),  # the phase before
    (OWN + "bar.sync 3, 256;", "bar.arrive 3, 256;" + FENCE, FENCELESS),
    (OWN, FENCE, UNORDERED),
])  # fmt: skip
def test_a_fence_between_warpgroups(reader, writer, said):
    """Both write operands, the first multiplies."""
    holds(SPLIT.format(reader, writer), said, threads=256)


# What writes again, as it is, some of row 0 of a, which begins where room does.
COPIED = only(0, "cp.async.cg.shared.global [room], [%a0], 16; cp.async.commit_group;")
WAYS_TO_WRITE = {
    "b8": "ld.shared.b8 %r2, [room + 1];" + only(9, "st.shared.b8 [room + 1], %r2;"),
    "b16": "ld.shared.b16 %h1, [room + 2];" + only(9, "st.shared.b16 [room + 2], %h1;"),
    "b64": "ld.shared.b64 %rd1, [room + 8];" + only(9, "st.shared.b64 [room + 8], %rd1;"),
    "v4": "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [room];" + only(9, "st.shared.v4.b32 [room], {%r1, %r2, %r3, %r4};"),
    "red": only(9, "red.shared.or.b32 [room + 4], 0;"),
    "atom, one after the other": "atom.shared.add.u32 %r1, [room + 4], 0;",
    "cp.async": COPIED + "cp.async.wait_group 0;",
    "stmatrix": """mov.b32 %r1, room; mad.lo.u32 %r1, %t, 16, %r1; setp.lt.u32 %p3, %t, 32; @!%p3 bra BEYOND;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r1]; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r3};
        BEYOND:""",
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
def test_ways_to_write(way):
    write = WAYS_TO_WRITE[way]
    holds(FENCE + BARRIER + write + FENCE + BARRIER, None)
    holds(FENCE + BARRIER + write + BARRIER + FENCE, None)
    holds(FENCE + BARRIER + write + BARRIER, FENCELESS)


def test_a_copy_has_landed_only_when_it_is_waited_for():
    holds(FENCE + BARRIER + COPIED + FENCE + "cp.async.wait_group 0;" + BARRIER, FENCELESS)


def test_tf32():
    """Elements of four bytes, of which somebody wrote two."""
    a_at, b_at = compact(128, "K", 64, 8, 4), compact(128, "K", 16, 8, 4, start=8192)
    a, b = draw(64, 8), draw(16, 8)
    room = image(16384, (bits(a, "tf32"), a_at), (bits(b, "tf32"), b_at))
    product = a_at.descriptor("first") + b_at.descriptor("second") + wgmma(16, "tf32", "first", "second", "0") + COMMIT + WAIT
    again = "ld.shared.b16 %h1, [room + {}];" + only(3, "st.shared.b16 [room + {}], %h1;")
    assert (multiply(FENCE + BARRIER, product, room) == accumulators(a @ b.T)).all()
    for at in (0, 2):
        with pytest.raises(PtxError, match=f"byte {at} of shared memory, which thread 3 wrote, {FENCELESS}"):
            multiply(FENCE + BARRIER + again.format(at, at) + BARRIER, product, room)


BOX = {"box": (64, 64), "swizzle": 128}
LOAD = f"""@%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bars], 8192;
    @%p7 {COPY.format(2)} [room], [%m0, {{0, 0}}], [bars];"""
TOUCH = f"ld.shared.b32 %r2, [room]; {only(50, 'st.shared.b32 [room], %r2;')}"


@pytest.mark.parametrize("before, behind, said", [
    ("", "", None),  # its own proxy's write, and the mbarrier told
    (TOUCH + FENCE + BARRIER, "", None),
    (TOUCH + BARRIER + FENCE, "", None),
    (TOUCH + BARRIER, "", f"a tile is copied over byte 0 .*thread 50 wrote, {FENCELESS}"),
    (TOUCH + FENCE, "", f"a tile is copied over byte 0 .*thread 50 wrote, {UNORDERED}"),
    ("", TOUCH + BARRIER, f"a product reads byte 0 .*thread 50 wrote, {FENCELESS}"),
    ("", TOUCH + FENCE + BARRIER, None),
])  # fmt: skip
def test_a_fence_around_tiles(before, behind, said):
    product = LEFT + RIGHT.replace("8192", "0") + wgmma(16, "bf16", "first", "second", "0", "KK") + COMMIT + WAIT
    body = f".reg .f32 d<8>; .reg .b64 first, second; {init(1)} {before} {LOAD} {wait('bars', 0)} {behind} {product}"
    if said is None:
        run_maps(body, [(0, BOX)], bits(A, "bf16"))
    else:
        with pytest.raises(PtxError, match=said):
            run_maps(body, [(0, BOX)], bits(A, "bf16"))


# ---------------------------------------------------------------- the kernels

PROXY_FENCE = re.compile(r"fence\.proxy\.async[^;]*;")


def executed(case, options, change=None) -> dict[str, str]:
    """Runs forward and backward on Hopper, with another PTX where ``change``, a pair of texts, says: the PTX of each kernel."""
    import torch
    from ptx import triton_driver
    from ptx.program import parse

    texts, before = {}, triton_driver._read
    replaced = parse(change[1]) if change else None

    def read(text):
        kernels = replaced if change and text == change[0] else before(text)
        texts.update(dict.fromkeys(kernels, text))
        return kernels

    triton_driver._read = read
    try:
        torch.manual_seed(0)
        check(*case, capability=(9, 0), **options)
    finally:
        triton_driver._read = before
    return texts


def notices(case, options, text, wrong) -> bool:
    try:
        executed(case, options, (text, wrong))
    except PtxError as error:
        assert "no fence.proxy.async" in str(error), error
        return True
    return False


# Fences in the source of each: two of the producer, one of each consumer that hands dS over, and of short segments one where it
# has no rows for that.
WRITTEN = {"forward": 2, "backward_dq": 2, "backward_dkdv": 2, "backward_fused": 4, "backward_whole": 6}


@pytest.mark.settles(*TRITON_KERNELS, packages=["triton"])
@pytest.mark.parametrize("way, head_dim, names", [
    ("hopper", 64, ["forward", "backward_dq", "backward_dkdv"]), ("hopper", 128, ["backward_dq", "backward_dkdv"]),
    ("hopper any order", 64, ["backward_fused"]), ("hopper ordered", 64, ["backward_fused"]),
    ("hopper whole", 64, ["forward", "backward_whole"]),
])  # fmt: skip
@compiled
def test_gluon_without_a_fence(way, head_dim, names):
    """Each of those that a kernel has: the compiler adds none that another would make up for."""
    # With all blocks of keys, and with half of them; or more tiles than a ring has stages: the producer cannot run ahead.
    lengths = [[[200]], [[70]]] if "whole" in way else [[[300]]]
    case, options = ("bfloat16", lengths, 1, "study", 1, head_dim), {"way": way}
    texts = executed(case, options)
    for name in names:
        text = texts[f"attention_{name}"]
        fences = list(PROXY_FENCE.finditer(text))
        # Between own rows that are loaded by address and the next such tile by TMA, into another part of the same memory, the
        # compiler puts one more, which has nothing to order.
        fences = [f for f in fences if "cp.async.bulk.tensor" not in text[f.end() : f.end() + 500]]
        assert len(fences) == WRITTEN[name], "not those that are written"
        if name == "forward":  # Queries come first, and keys by address, right behind those, have a fence that would do. Where
            fences = fences[-1:]  # there are none, among neighbours, it would not: test_hopper_mutants.py.
        missed = [n for n, f in enumerate(fences) if not notices(case, options, text, text[: f.start()] + text[f.end() :])]
        assert not missed, f"{name}: fences {missed} of {len(fences)} are not missed"


@pytest.mark.settles(*TRITON_KERNELS, packages=["triton"])
@pytest.mark.parametrize("kind, way, names", [
    ("bfloat16", "split", ["forward", "backward_dq", "backward_dkdv"]), ("float16", "fast", ["backward_fused"]),
    ("tfloat32", "split", ["forward", "backward_dq", "backward_dkdv"]),
])  # fmt: skip
@compiled
def test_triton_without_fences(kind, way, names):
    """All of a kernel's at once: the compiler puts in more than it must. One is before each loop and one in it, behind the
    barrier there, which would do; with TF32 one is before each product, where what they read was fenced before the first."""
    case, options = (kind, FEW, 2, "scan", 1, 64), {"way": way}
    texts = executed(case, options)
    for name in names:
        text = texts[f"attention_{name}"]
        assert PROXY_FENCE.search(text), f"{name} has none"
        assert notices(case, options, text, PROXY_FENCE.sub("", text)), f"{name}: nobody misses the fences"
