"""The machine that runs PTX: integer instructions, comparisons and conversions against Python's integers."""

import itertools

import numpy as np
import pytest
from ptx.snippets import PtxError, calculate


def numbers(kind: str, count: int = 300, seed: int = 0) -> np.ndarray:
    """Numbers of a type, with those at the ends and around powers of two."""
    bits, dtype = int(kind[1:]), np.dtype(f"uint{kind[1:]}")
    edges = [
        0,
        1,
        2,
        3,
        5,
        *(x for n in (7, 8, bits // 2, bits - 1) for x in (2**n - 1, 2**n, 2**n + 1)),
        2**bits - 1,
        2**bits - 2,
    ]
    bytes_ = np.random.default_rng(seed).bytes(count * dtype.itemsize)
    drawn = np.frombuffer(bytes_, dtype) >> np.random.default_rng(seed + 1).integers(0, bits, count).astype(dtype)
    return np.concatenate([np.array(edges, object).astype(dtype), drawn]).view(f"{'int' if kind[0] == 's' else 'uint'}{bits}")


def columns(*kinds: str) -> list[np.ndarray]:
    """Numbers of the types: the odd ones of each with those of the others, and mixed ones."""
    lists = [numbers(kind, 280, seed) for seed, kind in enumerate(kinds)]
    few = [list(x[:19]) for x in lists]
    pairs = list(itertools.product(*few[:2])) if len(few) > 1 else [(x,) for x in few[0]]
    rest = [[x[(n * 7 + n // 19) % 19] for n in range(len(pairs))] for x in few[2:]]
    edges = [np.array([p[n] for p in pairs], lists[n].dtype) for n in range(min(len(kinds), 2))] + [
        np.array(r, x.dtype) for r, x in zip(rest, lists[2:], strict=True)
    ]
    return [np.concatenate([a, b]) for a, b in zip(edges, lists, strict=True)]


def check(code: str, out: str, function, *inputs) -> None:
    """``code`` gives, bit for bit, what ``function`` makes of Python's integers."""
    got = calculate(code, f"uint{out[1:]}", *inputs)
    lists = [x.tolist() for x in inputs]
    expected = [function(*row) & (2 ** int(out[1:]) - 1) for row in zip(*lists, strict=True)]
    wrong = [n for n, (g, x) in enumerate(zip(got.tolist(), expected, strict=True)) if g != x]
    assert not wrong, "; ".join(f"{code} {[x[n] for x in lists]}: {got[n]:#x} not {expected[n]:#x}" for n in wrong[:3])


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}
KINDS = ["u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("kind", KINDS)
def test_integer_arithmetic(kind):
    bits = int(kind[1:])
    a, b, c = columns(kind, kind, kind)
    for name, function in ARITHMETIC.items():
        check(f"{name}.{kind} d, a, b;", kind, function, a, b)
        check(f"{name}.{kind} d, a, 3;", kind, lambda a, f=function: f(a, 3), a)
    check(f"mul.hi.{kind} d, a, b;", kind, lambda a, b: a * b >> bits, a, b)
    check(f"mad.lo.{kind} d, a, b, c;", kind, lambda a, b, c: a * b + c, a, b, c)
    check(f"mad.hi.{kind} d, a, b, c;", kind, lambda a, b, c: (a * b >> bits) + c, a, b, c)
    keep = (b != 0) & ~((b == -1) & (a == np.iinfo(a.dtype).min)) if kind[0] == "s" else b != 0
    check(f"div.{kind} d, a, b;", kind, towards_zero, a[keep], b[keep])
    check(f"rem.{kind} d, a, b;", kind, lambda a, b: a - towards_zero(a, b) * b, a[keep], b[keep])
    if kind[0] == "s":
        check(f"neg.{kind} d, a;", kind, lambda a: -a, a)
        check(f"abs.{kind} d, a;", kind, abs, a)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        check(f"mul.wide.{kind} d, a, b;", wide, lambda a, b: a * b, a, b)
        check(f"mul.wide.{kind} d, a, -5;" if kind[0] == "s" else f"mul.wide.{kind} d, a, 40000;", wide,
              lambda a: a * (-5 if kind[0] == "s" else 40000), a)  # fmt: skip
        long = columns(kind, kind, wide)
        check(f"mad.wide.{kind} d, a, b, c;", wide, lambda a, b, c: a * b + c, *long)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    a, b = columns(f"u{bits}", f"u{bits}")
    check(f"and.b{bits} d, a, b;", f"b{bits}", lambda a, b: a & b, a, b)
    check(f"or.b{bits} d, a, b;", f"b{bits}", lambda a, b: a | b, a, b)
    check(f"xor.b{bits} d, a, b;", f"b{bits}", lambda a, b: a ^ b, a, b)
    check(f"not.b{bits} d, a;", f"b{bits}", lambda a: ~a, a)
    a, by = columns(f"s{bits}", "u32")
    by = np.where(np.arange(len(by)) % 3 == 0, by, by % (bits + 5)).astype(np.uint32)
    unsigned = a.view(f"uint{bits}")
    check(f"shl.b{bits} d, a, b;", f"b{bits}", lambda a, n: a << n if n < bits else 0, unsigned, by)
    check(f"shr.u{bits} d, a, b;", f"u{bits}", lambda a, n: a >> min(n, bits), unsigned, by)
    check(f"shr.b{bits} d, a, b;", f"b{bits}", lambda a, n: a >> min(n, bits), unsigned, by)
    check(f"shr.s{bits} d, a, b;", f"s{bits}", lambda a, n: a >> min(n, bits), a, by)
    check(f"shr.s{bits} d, a, 3;", f"s{bits}", lambda a: a >> 3, a)


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_and_bit_fields(bits):
    (a,) = columns(f"u{bits}")
    check(f"popc.b{bits} d, a;", "u32", lambda a: a.bit_count(), a)
    check(f"clz.b{bits} d, a;", "u32", lambda a: bits - a.bit_length(), a)
    a, b, start, length = columns(f"u{bits}", f"u{bits}", "u32", "u32")
    start, length = (np.where(np.arange(len(x)) % 4 == 0, x & 255, x % (bits + 3)).astype(np.uint32) for x in (start, length))
    mask = 2**bits - 1
    check(f"bfe.u{bits} d, a, b, c;", f"u{bits}", lambda a, p, n: (a >> p) & ((1 << n) - 1), a, start, length)

    def signed_field(a, p, n):
        sign = (a >> min(p + n - 1, bits - 1)) & 1 if n else 0
        return sum(((a >> (p + i)) & 1 if i < n and p + i < bits else sign) << i for i in range(bits))

    check(
        f"bfe.s{bits} d, a, b, c;",
        f"s{bits}",
        lambda a, p, n: signed_field(a & mask, p, n),
        a.view(f"int{bits}"),
        start,
        length,
    )

    def inserted(a, b, p, n):
        for i in range(n):
            if p + i < bits:
                b = b & ~(1 << (p + i)) | ((a >> i) & 1) << (p + i)
        return b

    check(f"bfi.b{bits} d, a, b, c, e;", f"b{bits}", inserted, a, b, start, length)


def test_permute_funnel_and_lookup():
    a, b, c = columns("u32", "u32", "u32")

    def permuted(a, b, selector):
        eight, made = (a | b << 32).to_bytes(8, "little"), []
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = eight[nibble & 7]
            made.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        return int.from_bytes(made, "little")

    check("prmt.b32 d, a, b, c;", "b32", permuted, a, b, c)
    check("prmt.b32 d, a, b, 0x5410;", "b32", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16, a, b)
    for mode, amount in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        n = np.where(np.arange(len(c)) % 3 == 0, c, c % 40).astype(np.uint32)
        check(f"shf.l.{mode}.b32 d, a, b, c;", "b32", lambda a, b, n, f=amount: ((b << 32 | a) << f(n)) >> 32, a, b, n)
        check(f"shf.r.{mode}.b32 d, a, b, c;", "b32", lambda a, b, n, f=amount: (b << 32 | a) >> f(n), a, b, n)
    for table in (0x00, 0xFF, 0xF0, 0xCC, 0xAA, 0xC0, 0x78, 0xEA, 0x96, 0xD8, 0x1B):
        bitwise = sum((table >> i & 1) << i for i in range(8))

        def looked_up(a, b, c, t=bitwise):
            return sum((t >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))

        check(f"lop3.b32 d, a, b, c, {table:#x};", "b32", looked_up, a[::3], b[::3], c[::3])


COMPARISONS = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
               "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}  # fmt: skip
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind", [*KINDS, "b16", "b32", "b64"])
def test_comparisons(kind):
    a, b = columns(*[kind.replace("b", "u")] * 2)
    names = {"b": ["eq", "ne"], "s": list(COMPARISONS), "u": [*COMPARISONS, *UNSIGNED_NAMES]}[kind[0]]
    for name in names:
        function = COMPARISONS[UNSIGNED_NAMES.get(name, name)]
        check(f"setp.{name}.{kind} p, a, b; selp.b32 d, 7, -9, p;", "b32", lambda a, b, f=function: 7 if f(a, b) else -9, a, b)
        check(f"setp.{name}.{kind} p, a, 1; selp.b32 d, 7, -9, p;", "b32", lambda a, f=function: 7 if f(a, 1) else -9, a)


@pytest.mark.parametrize("how", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", [False, True])
def test_comparisons_combined(how, negated):
    """p: the comparison with c, q: its contrary with c."""
    function = {"and": lambda x, y: x and y, "or": lambda x, y: x or y, "xor": lambda x, y: x != y}[how]
    a, b, c = (np.array(x, np.int32) for x in zip(*itertools.product((-1, 2), (-1, 2), (0, 1)), strict=True))
    code = f"setp.ne.s32 s, c, 0; setp.lt.{how}.s32 p|q, a, b, {'!' * negated}s; selp.b32 d, 1, 0, p; @q add.s32 d, d, 2;"
    check(
        code, "b32", lambda a, b, c: function(a < b, (c != 0) != negated) + 2 * function(a >= b, (c != 0) != negated), a, b, c
    )
    code = f"setp.ne.s32 p, a, -1; setp.ne.s32 q, b, -1; {how}.pred s, p, q; {'not.pred s, s;' * negated} selp.b32 d, 1, 0, s;"
    check(code, "b32", lambda a, b: int(function(a != -1, b != -1) != negated), a, b)


INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("to", INTEGERS)
def test_integers_converted(to):
    """What does not fit is cut off; a register beyond its type holds the sign. What a source holds there does not matter."""
    to_bits = int(to[1:])
    for source in INTEGERS:
        bits = int(source[1:])
        (a,) = columns("u64" if bits == 64 else "u32")

        def converted(a, s=source, n=bits):
            value = a % 2**n - (2**n if s[0] == "s" and a >> n - 1 & 1 else 0)
            kept = value % 2**to_bits
            return kept - (2**to_bits if to[0] == "s" and kept >> to_bits - 1 else 0)

        check(f"cvt.{to}.{source} d, a;", "b64" if to_bits == 64 else "b32", converted, a)


def test_registers_packed_and_unpacked():
    a, b = columns("u32", "u32")
    check("mov.b64 d, {a, b};", "b64", lambda a, b: a | b << 32, a, b)
    check(".reg .b32 x, y; mov.b64 {x, y}, a; sub.s32 d, x, y;", "b32", lambda a: a % 2**32 - (a >> 32), *columns("u64"))
    check(".reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 d, {y, x};", "b32", lambda a: a >> 16 | (a & 0xFFFF) << 16, a)
    check(".reg .b16 x<4>; mov.b64 {x0, x1, x2, x3}, a; mov.b64 d, {x3, x2, x1, x0};", "b64",
          lambda a: sum((a >> 16 * i & 0xFFFF) << 48 - 16 * i for i in range(4)), *columns("u64"))  # fmt: skip


@pytest.mark.parametrize("code, expected", [
    ("add.sat.s32 d, a, b;", lambda a, b: min(max(a + b, -(2**31)), 2**31 - 1)),
    ("sub.sat.s32 d, a, b;", lambda a, b: min(max(a - b, -(2**31)), 2**31 - 1)),
    ("cvt.sat.s8.s32 d, a;", lambda a, b: min(max(a, -128), 127)),
    ("mul24.lo.s32 d, a, b;", lambda a, b: (a % 2**24 - (a % 2**24 >> 23 << 24)) * (b % 2**24 - (b % 2**24 >> 23 << 24))),
    (".reg .b32 x; add.cc.u32 x, a, b; addc.u32 d, 0, 0;", lambda a, b: (a % 2**32 + b % 2**32) >> 32),
])  # fmt: skip
def test_right_or_not_known(code, expected):
    """What the machine does not do, it says."""
    try:
        check(code, "b32", expected, *columns("s32", "s32"))
    except PtxError as error:
        assert "not known" in str(error) or "not understood" in str(error)
