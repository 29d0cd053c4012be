"""The machine that runs PTX: how its text is read."""

import itertools
import struct

import numpy as np
import pytest
from ptx.snippets import HEADER, PtxError, launch, parse, place, run

# ---------------------------------------------------------------- text

MODULE = """
//
// Written by hand; .entry nobody(.param .u64 x) { ret; }
.version 8.7
.target sm_90a
.address_size 64
/* A comment
   of two lines: bar.sync 0; */
.file	1 "/somewhere/a.cu"
	// .globl	first
.visible .entry first(
	.param .u64 .ptr .global .align 16 first_param_0,   // where to
	.param .u32 first_param_1,
	.param .align 8 .b8 first_param_2[20]
)
.maxntid 64, 1, 1
.minnctapersm 2
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<9>; .reg .b64 %rd<6>;
	.loc	1 7 3, function_name $L__info_string0, inlined_at 1 30 4
	ld.param.u64 	%rd1, [first_param_0]; ld.param.u32 %r1, [first_param_1]; // two
	ld.param.v2.b32 	{%r2, _}, [first_param_2 + 8];
	ld.param.b32	%r3,
		[first_param_2+16];
	cvta.to.global.u64 %rd2, %rd1;
	mov.u32 %r4, 0;
$L__BB0_1:
	.pragma "nounroll";
	add.s32 %r1, %r1, 1; /* once more */ add.s32 %r4, %r4, 1;
	setp.lt.u32 %p1, %r4, 3;
	@%p1 bra 	$L__BB0_1;
	bra.uni $L__done;
	trap;
$L__done: st.global.v4.b32 	[%rd2], {%r1, %r2, %r3, -1};
	ret;
}
	// .globl	second
.entry second(.param .u64 second_param_0)
{
	.reg .b32 %r<2>; .reg .b64 %rd<2>;
	ld.param.u64 %rd1, [second_param_0];
	mov.u32 %r1, 7;
	st.global.b32 [%rd1], %r1;
}
"""


def test_module_of_two_entries():
    kernels = parse(MODULE)
    assert sorted(kernels) == ["first", "second"]
    memory, (out,) = place([np.zeros(4, np.int32)])
    launch(kernels["first"], (1, 1, 1), (1, 1, 1), 0, struct.pack("<QI4x5I4x", out.ctypes.data, 39, 1, 2, 3, 4, 5)[:36], memory)
    assert out.tolist() == [42, 3, 5, -1]
    launch(kernels["second"], (1, 1, 1), (1, 1, 1), 0, struct.pack("<Q", out.ctypes.data), memory)
    assert out.tolist() == [7, 3, 5, -1]
    with pytest.raises(PtxError, match="64"):
        launch(kernels["first"], (1, 1, 1), (65, 1, 1), 0, bytes(36), memory)
    with pytest.raises(PtxError, match="8 bytes"):
        launch(kernels["second"], (1, 1, 1), (1, 1, 1), 0, bytes(16), memory)


def test_parameters_lie_at_multiples_of_their_alignment():
    text = HEADER + ".entry k(.param .u8 a, .param .u16 b, .param .u64 c, .param .align 16 .b8 d[20], .param .f32 e) { ret; }"
    kernel = parse(text)["k"]
    assert [(p.name, p.offset, p.size) for p in kernel.parameters] == [
        ("a", 0, 1),
        ("b", 2, 2),
        ("c", 8, 8),
        ("d", 16, 20),
        ("e", 36, 4),
    ]
    assert kernel.parameter_bytes == 40


def test_inner_scopes_hide_registers():
    body = """
    .reg .b32 x; mov.u32 x, 1;
    {
        .reg .b64 x; mov.u64 x, 2;
        { .reg .b32 x<2>; .reg .b32 x; mov.u32 x, 3; mov.u32 x1, 4; st.global.v2.b32 [%a0], {x, x1}; }
        st.global.b64 [%a0 + 8], x;
    }
    { .reg .b32 y; mov.u32 y, x; st.global.b32 [%a0+16], y; }
    """
    assert run(body, np.zeros(5, np.int32), threads=1)[0].tolist() == [3, 4, 2, 0, 1]


def test_labels_belong_to_their_scope():
    """As in inline assembly that stands in the code more than once."""
    loop = "{ .reg .pred P; WAIT: add.s32 %r1, %r1, 1; setp.ge.s32 P, %r1, LIMIT; @P bra DONE; bra WAIT; DONE: }"
    body = f"mov.u32 %r1, 0; mov.u32 %r2, 0; {loop.replace('LIMIT', '3')} add.s32 %r2, %r2, %r1; {loop.replace('LIMIT', '9')}"
    body += "add.s32 %r2, %r2, %r1; st.global.b32 [%a0], %r2;"
    assert run(body, np.zeros(1, np.int32), threads=1)[0][0] == 3 + 9


@pytest.mark.parametrize(
    "text, bits",
    [("17", 17), ("-17", -17), ("0x1F", 31), ("-0x1F", -31), ("0xFFFFFFFF", -1), ("4294967295", -1), ("5U", 5), ("0b101", 5),
     ("017", 15), ("0f3F800000", 0x3F800000), ("0FBF800000", 0xBF800000), ("0fFFC00000", 0xFFC00000)],
)  # fmt: skip
def test_immediates(text, bits):
    kind = "f32" if text[1] in "fF" else "b32"
    out = run(
        f"mov.{kind} %r1, {text}; st.global.b32 [%a0], %r1; st.global.{kind} [%a0+4], {text};",
        np.zeros(2, np.uint32),
        threads=1,
    )
    assert out[0].tolist() == [bits & 0xFFFFFFFF] * 2


def test_immediates_of_other_sizes():
    body = "mov.f64 %fd1, 0d400921FB54442D18; mov.b64 %rd1, -2; mov.b16 %h1, -3; mov.u16 %h2, 0xFFFF; mov.pred %p1, 1;"
    body += "st.global.f64 [%a0], %fd1; st.global.b64 [%a0+8], %rd1; st.global.v2.b16 [%a0+16], {%h1, %h2};"
    body += "@%p1 st.global.b32 [%a0+20], 0x80000000;"
    out = run(body, np.zeros(3, np.uint64), threads=1)[0].view(np.uint8).tobytes()
    assert struct.unpack("<dqhHI", out) == (np.pi, -2, -3, 0xFFFF, 0x80000000)


def test_guards_sinks_and_second_destinations():
    body = """
    setp.lt.s32 %p1|%p2, %t, 2; setp.lt.s32 %p3|_, %t, 3; setp.lt.s32 _|%p4, %t, 1;
    mov.u32 %r1, 0;
    @%p1 add.s32 %r1, %r1, 1; @!%p1 add.s32 %r1, %r1, 10; @%p2 add.s32 %r1, %r1, 100; @%p3 add.s32 %r1, %r1, 1000;
    @!%p4 add.s32 %r1, %r1, 10000;
    mov.b64 %rd1, {%r1, %t}; mov.b64 {_, %r2}, %rd1; mov.b64 {%r3, _}, %rd1;
    st.global.v2.b32 [%e0], {%r3, %r2};
    """
    got = run(body, np.zeros((4, 2), np.int32), threads=4)[0].tolist()
    # p1: t < 2, p2: t >= 2, p3: t < 3, p4: t >= 1
    assert got == [[(1 if t < 2 else 110) + 1000 * (t < 3) + 10000 * (t < 1), t] for t in range(4)]


def test_shared_variables_do_not_overlap():
    module = ".shared .align 16 .b8 first[20];\n.extern .shared .align 128 .b8 rest[];\n.shared .b64 second;\n"
    names = ["first", "second", "third", "late", "rest"]
    body = ".shared .align 4 .f32 third[3];" + "".join(
        f"mov.u32 %r{n}, {name};" for n, name in enumerate(names) if name != "late"
    )
    body += "{ .shared .align 8 .b8 late[100]; mov.u32 %r3, late; }"
    body += "".join(f"st.global.b32 [%a0 + {4 * n}], %r{n};" for n in range(5))
    at = run(body, np.zeros(5, np.int64).view(np.int32)[:5], threads=1, shared=256, module=module)[0].tolist()
    sizes = [20, 8, 12, 100, 256]
    assert [a % align for a, align in zip(at, (16, 8, 4, 8, 128), strict=True)] == [0] * 5
    assert max(at) == at[4], "dynamic memory is behind all else"
    spans = sorted((a, a + size) for a, size in zip(at, sizes, strict=True))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_special_registers():
    names = [f"{r}.{x}" for r in ("tid", "ntid", "ctaid", "nctaid") for x in "xyz"] + ["laneid", "warpid"]
    body = """
    mov.u32 %r1, %ntid.y; mov.u32 %r2, %tid.z; mul.lo.u32 %r2, %r1, %r2; mov.u32 %r1, %tid.y; add.u32 %r2, %r2, %r1;
    mov.u32 %r3, %ntid.x; mad.lo.u32 %r2, %r2, %r3, %t;
    mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.y; mov.u32 %r6, %ctaid.y; mad.lo.u32 %r4, %r4, %r5, %r6;
    mov.u32 %r5, %nctaid.x; mov.u32 %r6, %ctaid.x; mad.lo.u32 %r4, %r4, %r5, %r6;
    mad.lo.u32 %r2, %r4, 42, %r2; mad.wide.u32 %rd1, %r2, 56, %a0;
    """
    body += "".join(f"mov.u32 %r7, %{name}; st.global.b32 [%rd1 + {4 * n}], %r7;" for n, name in enumerate(names))
    grid, block = (2, 3, 2), (7, 2, 3)
    out = run(body, np.zeros((12 * 42, 14), np.int32), grid=grid, threads=block)[0]
    expected = []
    for z, y, x, c, b, a in itertools.product(*map(range, (2, 3, 2, 3, 2, 7))):
        linear = a + 7 * b + 14 * c
        expected.append([a, b, c, *block, x, y, z, *grid, linear % 32, linear // 32])
    assert out.tolist() == expected


@pytest.mark.parametrize(
    "code",
    [
        "frobnicate.b32 %r1, %r2;",
        "mov.u32 %r1, %frobnicated;",
        "mov.u32 %r99, %r1;",
        "add.s32 %r1, %r99, 1;",
        "@%p99 mov.u32 %r1, 1;",
        "bra NOWHERE;",
        "ld.global.b32 %r1, [nowhere];",
        "atom.global.inc.u32 %r1, [%a0], 5;",
        "ld.frobnicated.b32 %r1, [%a0];",
        ".frobnicate 1;",
        "add.s32 %r1, %r1;",
        "setp.frob.s32 %p1, %r1, %r1;",
        "call foo;",
    ],
)
def test_what_is_not_known_is_an_error(code):
    with pytest.raises(PtxError):
        run(code, np.zeros(8, np.int32))
