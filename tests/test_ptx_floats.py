"""The machine that runs PTX: floating-point instructions against exact fractions, rounded here as IEEE 754 says."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from ptx.snippets import PtxError, calculate

FORMATS = {
    "f16": (11, -24, 5),
    "bf16": (8, -133, 8),
    "f32": (24, -149, 8),
    "f64": (53, -1074, 11),
}  # digits, smallest exponent, bits of it
LOAD = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
HALVES = ("f16", "bf16")


def value(bits: int, kind: str) -> float:
    digits, lowest, width = FORMATS[kind]
    exponent, mantissa = bits >> (digits - 1) & (1 << width) - 1, bits & (1 << (digits - 1)) - 1
    sign = -1.0 if bits >> (digits - 1 + width) else 1.0
    if exponent == (1 << width) - 1:
        return math.nan if mantissa else sign * math.inf
    return sign * math.ldexp(mantissa + (1 << (digits - 1) if exponent else 0), lowest + max(exponent, 1) - 1)


def nearest(x, kind: str) -> int:
    """The bits of the number of a format nearest to a fraction (or an infinity), ties to even."""
    digits, lowest, width = FORMATS[kind]
    infinity = ((1 << width) - 1) << (digits - 1)
    sign = 1 << (digits - 1 + width) if x < 0 else 0
    if abs(x) == math.inf:
        return sign | infinity
    x = abs(Fraction(x))
    if x == 0:
        return 0
    size = x.numerator.bit_length() - x.denominator.bit_length()
    size -= x < Fraction(2) ** size
    unit = max(size - digits + 1, lowest)
    whole = round(x / Fraction(2) ** unit)  # ties to even
    bits = whole + ((unit - lowest) << (digits - 1))  # the leading digit, where there is one, counts the exponent up
    return sign | min(bits, infinity)


def test_the_rounding_of_these_tests():
    for kind, dtype in (("f16", np.float16), ("f32", np.float32)):
        for x in (1.0, 0.1, -2.5e-8, 65504.0, 65519.9, 65520.0, 1e-45, 6e-8, 3.0, -(2.0**-24), 1e300, -math.inf, 0.0):
            with np.errstate(over="ignore"):
                assert nearest(x, kind) == int(np.array(x).astype(dtype).view(LOAD[kind])), (kind, x)
    assert [value(b, "bf16") for b in (0x3F80, 0xC000, 0x0001, 0x7F80)] == [1.0, -2.0, 2.0**-133, math.inf]
    assert [nearest(value(b, "bf16"), "bf16") for b in (0, 1, 0x7F, 0x80, 0x3F81, 0xC123)] == [0, 1, 0x7F, 0x80, 0x3F81, 0xC123]


def draw(kind: str, count: int, seed: int) -> np.ndarray:
    """Bits of finite numbers: a few odd ones, some from all over the range, more of about 1."""
    digits, _, width = FORMATS[kind]
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << min(digits + width, 63), count, dtype=np.uint64)
    exponent = random.integers((1 << width - 1) - 4, (1 << width - 1) + 2, count, dtype=np.uint64)
    near = (
        (bits & np.uint64((1 << digits - 1) - 1))
        | exponent << np.uint64(digits - 1)
        | (bits & np.uint64(1)) << np.uint64(digits + width - 1)
    )
    bits = np.where(np.arange(count) % 4 == 0, bits, near)
    top, one = ((1 << width) - 1) << (digits - 1), nearest(1, kind)
    odd = [0, 1, (1 << digits - 1) - 1, 1 << digits - 1, one, one + 1, one - 1, one | 1 << digits + width - 1, top - 1]
    bits = np.concatenate([np.array(odd, np.uint64), bits])
    return bits[bits >> np.uint64(digits - 1) & np.uint64((1 << width) - 1) != (1 << width) - 1].astype(LOAD[kind])


def agree(got, expected, kind: str, code: str, inputs) -> None:
    """Bit for bit; a zero of any sign is zero, and a NaN any NaN."""
    for n, (g, x) in enumerate(zip(got.tolist(), expected, strict=True)):
        g, x = value(g, kind), value(x, kind) if isinstance(x, int) else x
        assert g == x or (g != g and x != x), f"{code} {[value(int(i[n]), kind) for i in inputs]}: {g!r}, not {x!r}"


EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "add.rn": lambda a, b: a + b,
    "mul.rn": lambda a, b: a * b,
    "fma.rn": lambda a, b, c: a * b + c,
    "div.rn": lambda a, b: a / b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "abs": abs,
}


SKIP = {"div.rn": ("f16", "bf16", "f16x2", "bf16x2"), "fma.rn": ("f64",)}  # there is none; the machine rounds twice
ROUNDED = [(name, kind) for name in EXACT for kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")]


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name, kind in ROUNDED if name not in ("div.rn", "fma.rn") or kind not in SKIP[name]]
)
def test_rounded_once(name, kind):
    base, function = kind.removesuffix("x2"), EXACT[name]
    columns = [draw(base, 600, seed) for seed in range(function.__code__.co_argcount if hasattr(function, "__code__") else 2)]
    columns = columns[:1] if name == "abs" else columns
    columns = [c[: min(map(len, columns)) // 2 * 2] for c in columns]
    columns = [np.roll(c, 5 * n) for n, c in enumerate(columns)]
    if name == "div.rn":
        columns = [c[columns[1] & LOAD[base](LOAD[base](~LOAD[base](0)) >> 1) != 0] for c in columns]
    code = f"{name}.{kind} d, {', '.join('abc'[: len(columns)])};"
    packed = [c.view(np.uint32) for c in columns] if kind.endswith("x2") else columns
    got = calculate(code, packed[0].dtype, *packed).view(LOAD[base])
    expected = [nearest(function(*(Fraction(value(int(x), base)) for x in row)), base) for row in zip(*columns, strict=True)]
    agree(got, expected, base, code, columns)


def test_fma_between_two_numbers():
    """Where a sum in float64, or for 16 bits in float32, falls on the middle that the exact one only comes near."""
    tiny = 2.0**-80
    rows = [(1 + 2.0**-12, 1 + 2.0**-12, s * tiny) for s in (1, -1)] + [(2.0**-100, (1 + 2**-12) * 2.0**-40, -(2.0**-149))]
    rows += [((1 + 2.0**-12) * 2.0**-70, (1 + 2.0**-12) * 2.0**-70, s * 2.0**-126) for s in (1, -1)]
    a, b, c = (np.array(x, np.float32).view(np.uint32) for x in zip(*rows, strict=True))
    expected = [nearest(Fraction(x) * Fraction(y) + Fraction(z), "f32") for x, y, z in rows]
    agree(calculate("fma.rn.f32 d, a, b, c;", np.uint32, a, b, c), expected, "f32", "fma.rn.f32", (a, b, c))
    cases = {"f16": [(1 + 2.0**-10, (1 - 2.0**-10) * 2.0**-11, 1 + 2.0**-10), (3.0, 683 * 2.0**-11, 2.0**-24),
                     (3.0, 683 * 2.0**-11, -(2.0**-24)),
                     (2.0**-14, 2.0**-11, 2.0**-24), (-(2.0**-14), 1.5 * 2.0**-11, 0.0)],
             "bf16": [(1 + 2.0**-4, 1 + 2.0**-4, s * 2.0**-40) for s in (1, -1)]}  # fmt: skip
    for kind, rows in cases.items():
        a, b, c = (np.array([nearest(v, kind) for v in x], np.uint16) for x in zip(*rows, strict=True))
        expected = [nearest(Fraction(x) * Fraction(y) + Fraction(z), kind) for x, y, z in rows]
        agree(calculate(f"fma.rn.{kind} d, a, b, c;", np.uint16, a, b, c), expected, kind, f"fma.rn.{kind}", (a, b, c))


ODD = [0.0, -0.0, 1.0, -2.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38]


def pairs() -> list[np.ndarray]:
    return [np.array(x, np.float32).view(np.uint32) for x in zip(*itertools.product(ODD, ODD), strict=True)]


def test_infinities_and_nan():
    a, b = pairs()
    with np.errstate(all="ignore"):
        x, y = a.view(np.float32), b.view(np.float32)
        for code, expected in (("add.f32", x + y), ("sub.f32", x - y), ("mul.f32", x * y), ("div.rn.f32", x / y)):
            agree(calculate(f"{code} d, a, b;", np.uint32, a, b), expected.tolist(), "f32", code, (a, b))


@pytest.mark.parametrize("name", ["min", "max"])
@pytest.mark.parametrize("kind", ["f32", "f16x2", "bf16x2"])
def test_min_and_max_of_nan_and_of_zeros(name, kind):
    """A number wins over NaN, unless ``.NaN`` is said; +0 is more than -0."""
    base = kind.removesuffix("x2")
    rows = list(itertools.product([0.0, -0.0, 1.0, -math.inf, math.nan], repeat=2))
    bits = [
        np.array([nearest(v, base) if v == v else (1 << 8 * LOAD[base]().itemsize - 1) - 1 for v in x], LOAD[base])
        for x in zip(*rows, strict=True)
    ]
    signs = [np.array([math.copysign(1, v) < 0 for v in x]) for x in zip(*rows, strict=True)]
    bits = [np.where((b == 0) & s, LOAD[base](1 << 8 * b.itemsize - 1), b) for b, s in zip(bits, signs, strict=True)]
    pick = {"min": min, "max": max}[name]
    for mode in ("", ".NaN"):
        source = [(b.astype(np.uint32) * np.uint32(0x10001)) for b in bits] if kind != base else bits
        got = calculate(f"{name}{mode}.{kind} d, a, b;", np.uint32, *source)
        for g, (x, y) in zip(got.tolist(), rows, strict=True):
            for half in [g] if kind == base else [g & 0xFFFF, g >> 16]:
                v = value(half, base)
                if x != x or y != y:
                    want = math.nan if mode else y if x != x else x
                else:
                    want = pick((x, y), key=lambda z: (z, math.copysign(1, z)))
                assert str(v) == str(want), f"{name}{mode}.{kind} {x} {y}: {v}"


def test_three_operands():
    rows = [(1.0, 2.0, 3.0), (3.0, math.nan, 2.0), (-1.0, -5.0, 4.0)]
    a, b, c = (np.array(x, np.float32) for x in zip(*rows, strict=True))
    assert calculate("max.f32 d, a, b, c;", np.float32, a, b, c).tolist() == [3, 3, 4]
    assert calculate("min.f32 d, a, b, c;", np.float32, a, b, c).tolist() == [1, 2, -5]


def test_flush_to_zero():
    """Subnormal numbers count as zeros of their sign, before and after."""
    tiny, small, big = 2.0**-130, 2.0**-100, 2.0**20
    for code, a, b, expected in (
        ("mul.ftz.f32 d, a, b;", small, 2.0**-40, 0.0),
        ("mul.ftz.f32 d, a, b;", -small, 2.0**-40, -0.0),
        ("mul.f32 d, a, b;", small, 2.0**-40, 2.0**-140),
        ("add.ftz.f32 d, a, b;", 2.0**-126, -(2.0**-127) * 1.5, 2.0**-126),
        ("sub.ftz.f32 d, a, b;", 1.5 * 2.0**-126, 2.0**-126, 0.0),
        ("mul.ftz.f32 d, a, b;", tiny, big, 0.0),
        ("mul.f32 d, a, b;", tiny, big, tiny * big),
        ("fma.rn.ftz.f32 d, a, b, 0f00000000;", -tiny, big, -0.0),
        ("add.ftz.f32 d, a, b;", tiny, tiny, 0.0),
        ("max.ftz.f32 d, a, b;", tiny, -1.0, 0.0),
        ("abs.ftz.f32 d, a;", -tiny, 0.0, 0.0),
        ("setp.gt.ftz.f32 p, a, b; selp.f32 d, 0f3F800000, 0f00000000, p;", tiny, 0.0, 0.0),
        ("setp.gt.f32 p, a, b; selp.f32 d, 0f3F800000, 0f00000000, p;", tiny, 0.0, 1.0),
        ("ex2.approx.ftz.f32 d, a;", -130.0, 0.0, 0.0),
        ("ex2.approx.f32 d, a;", -130.0, 0.0, tiny),
        ("rcp.approx.ftz.f32 d, a;", 2.0**-127, 0.0, math.inf),
        ("rcp.approx.ftz.f32 d, a;", 2.0**127, 0.0, 0.0),
        ("lg2.approx.ftz.f32 d, a;", tiny, 0.0, -math.inf),
        ("sqrt.approx.ftz.f32 d, a;", tiny, 0.0, 0.0),
        ("cvt.rpi.ftz.s32.f32 d, a; cvt.rn.f32.s32 d, d;", tiny, 0.0, 0.0),
        ("cvt.ftz.f32.f32 d, a;", tiny, 0.0, 0.0),
    ):  # fmt: skip
        got = calculate(code, np.float32, np.array([a], np.float32), np.array([b], np.float32))[0]
        assert got == np.float32(expected), f"{code} {a} {b}: {got}"


ORDERED = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
           "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons(kind):
    """Ordered ones do not hold where there is a NaN, unordered ones do; the second destination is the contrary of the first."""
    a, b = (x.view(np.float32) for x in pairs())
    nan = np.isnan(a) | np.isnan(b)
    cases = {name: f(a, b) & ~nan for name, f in ORDERED.items()} | {f"{name}u": f(a, b) | nan for name, f in ORDERED.items()}
    cases |= {"num": ~nan, "nan": nan}
    for name, expected in cases.items():
        code = f"setp.{name}.{kind} p|q, a, b; selp.b32 d, 1, 0, p; @q add.s32 d, d, 2;"
        got = calculate(code, np.uint32, a.astype(f"float{kind[1:]}"), b.astype(f"float{kind[1:]}"))
        assert (got == np.where(expected, 1, 2)).all(), name


@pytest.mark.parametrize("code, function, domain", [
    ("ex2.approx.f32", lambda x: 2**x, (-40, 40)),
    ("ex2.approx.ftz.f32", lambda x: 2**x, (-40, 40)),
    ("lg2.approx.f32", np.log2, (2**-20, 2**20)),
    ("rcp.approx.f32", lambda x: 1 / x, (-50, 50)),
    ("rcp.rn.f32", lambda x: 1 / x, (-50, 50)),
    ("sqrt.approx.f32", np.sqrt, (0, 1e6)),
    ("sqrt.rn.f32", np.sqrt, (0, 1e6)),
    ("rsqrt.approx.f32", lambda x: x**-0.5, (2**-20, 1e6)),
    ("sqrt.rn.f64", np.sqrt, (0, 1e6)),
    ("rcp.rn.f64", lambda x: 1 / x, (-50, 50)),
])  # fmt: skip
def test_functions(code, function, domain):
    kind = np.float64 if code.endswith("64") else np.float32
    x = np.random.default_rng(0).uniform(*domain, 500).astype(kind)
    got, expected = calculate(f"{code} d, a;", kind, x), function(x.astype(np.float64))
    assert np.allclose(got, expected, rtol=2e-6 if "32" in code else 1e-14, atol=2e-7)
    if ".rn" in code:
        assert (got == expected.astype(kind)).all()


@pytest.mark.parametrize("kind", ["f16", "f16x2", "bf16", "bf16x2"])
def test_exponential_of_16_bits(kind):
    base = kind.removesuffix("x2")
    x = np.array([nearest(v, base) for v in np.linspace(-9, 9, 60)], np.uint16)
    source = x.view(np.uint32) if kind != base else x
    got = calculate(f"ex2.approx.{'ftz.' * (base == 'bf16')}{kind} d, a;", source.dtype, source).view(np.uint16)
    expected = [2 ** value(b, base) for b in x.tolist()]
    assert np.allclose([value(b, base) for b in got.tolist()], expected, rtol=2.0**-9 if base == "f16" else 2.0**-7)


def test_functions_at_their_limits():
    for code, rows in {
        "ex2.approx.ftz.f32": [(-math.inf, 0), (math.inf, math.inf), (0, 1), (-0.0, 1), (-200, 0), (128, math.inf), (3, 8)],
        "lg2.approx.f32": [(0, -math.inf), (-0.0, -math.inf), (math.inf, math.inf), (1, 0), (-1, math.nan), (8, 3)],
        "rcp.approx.ftz.f32": [(0, math.inf), (-0.0, -math.inf), (math.inf, 0), (-4, -0.25), (math.nan, math.nan)],
        "sqrt.rn.f32": [(0, 0), (math.inf, math.inf), (-1, math.nan), (4, 2)],
        "rsqrt.approx.f32": [(0, math.inf), (math.inf, 0), (-1, math.nan), (4, 0.5)],
    }.items():
        x, expected = (np.array(v, np.float32) for v in zip(*rows, strict=True))
        got = calculate(f"{code} d, a;", np.float32, x)
        assert np.array_equal(got, expected, equal_nan=True), (code, got)
    for code in ("div.full.f32", "div.approx.f32", "div.full.ftz.f32"):
        assert calculate(f"{code} d, a, b;", np.float32, np.float32([6, 1]), np.float32([3, 0])).tolist() == [2, math.inf]


# ---------------------------------------------------------------- conversions


def around(kind: str) -> np.ndarray:
    """float32 at, in the middle between, and next to the middle between neighbours of a 16-bit format, of both signs."""
    all_bits = range(0, nearest(math.inf, kind), 97)
    low = np.array([value(b, kind) for b in all_bits])
    high = np.array(
        [value(b + 1, kind) if value(b + 1, kind) < math.inf else 2 * value(b, kind) - value(b - 1, kind) for b in all_bits]
    )
    with np.errstate(over="ignore"):
        middle = ((low + high) / 2).astype(np.float32)
        points = [low.astype(np.float32), middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    top = value(nearest(math.inf, kind) - 1, kind)
    last = np.nextafter(np.float32(top + math.ulp(top) * 0), np.float32([0, np.inf]))
    points = np.concatenate([*points, last, np.float32([0, 1, 3e38, 1e-45, top])])
    return np.concatenate([points, -points])


@pytest.mark.parametrize("kind", HALVES)
def test_to_16_bits(kind):
    x = around(kind)
    expected = [nearest(Fraction(float(v)) if np.isfinite(v) else float(v), kind) for v in x]
    agree(calculate(f"cvt.rn.{kind}.f32 d, a;", np.uint16, x), expected, kind, f"cvt.rn.{kind}.f32", ())
    special = np.float32([np.inf, -np.inf, np.nan, -0.0])
    got = calculate(f"cvt.rn.{kind}.f32 d, a;", np.uint16, special).tolist()
    assert [value(b, kind) for b in got[:2]] == [math.inf, -math.inf] and math.isnan(value(got[2], kind)) and got[3] == 0x8000
    noisy = np.array([0x7F800001, 0xFFFFFFFF, 0x7FBFFFFF], np.uint32)  # NaNs whose upper bits are an infinity's, or all set
    assert all(math.isnan(value(b, kind)) for b in calculate(f"cvt.rn.{kind}.f32 d, a;", np.uint16, noisy).tolist())
    # Two at once: the first source becomes the upper half.
    y = np.roll(x, 7)
    got = calculate(f"cvt.rn.{kind}x2.f32 d, a, b;", np.uint32, x, y)
    agree(got >> np.uint32(16), expected, kind, f"the upper half of cvt.rn.{kind}x2.f32", ())
    agree(got & np.uint32(0xFFFF), np.roll(expected, 7).tolist(), kind, f"the lower half of cvt.rn.{kind}x2.f32", ())


@pytest.mark.parametrize("kind", HALVES)
def test_from_16_bits(kind):
    bits = np.arange(0, 65536, 7, dtype=np.uint16)
    got = calculate(f"cvt.f32.{kind} d, a;", np.float32, bits)
    assert np.array_equal(got, np.array([value(b, kind) for b in bits.tolist()], np.float32), equal_nan=True)


def test_to_tf32():
    """``.rna``: to 10 digits behind the point, ties away from zero."""
    x = draw("f32", 2000, 3)
    x[::3] = x[::3] & np.uint32(0xFFFFE000) | np.uint32(0x1000)  # ties
    got = calculate("cvt.rna.tf32.f32 d, a;", np.uint32, x)
    expected = [(b & 0x80000000) | (((b & 0x7FFFFFFF) + 0x1000) >> 13 << 13) for b in x.tolist()]
    assert got.tolist() == expected


INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]
ROUNDING = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
def test_to_integers(source):
    """The nearest integer of the type where the number is beyond its range."""
    numbers = [
        s * (2.0**n + d)
        for s in (1, -1)
        for n in (0, 3, 7, 8, 15, 16, 23, 31, 32, 52, 63, 64)
        for d in (-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.5)
    ]
    numbers += [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, math.inf, -math.inf, math.nan]
    with np.errstate(over="ignore"):
        a = np.array(numbers).astype(f"float{source[1:]}")
    for to, (how, function) in itertools.product(INTEGERS, ROUNDING.items()):
        bits = int(to[1:])
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if to[0] == "s" else (0, 2**bits - 1)
        expected = []
        for x in a.tolist():
            if x != x:
                expected.append(
                    None
                    if bits < 32
                    else 0
                    if (bits, source) == (32, "f32") or (bits, source) == (32, "f16")
                    else 1 << bits - 1
                )
            else:
                expected.append(min(max(function(x) if abs(x) < math.inf else x, low), high) % 2 ** max(bits, 32))
        got = calculate(f"cvt.{how}.{to}.{source} d, a;", np.uint64 if bits == 64 else np.uint32, a).tolist()
        wrong = [(x, g, e) for x, g, e in zip(a.tolist(), got, expected, strict=True) if g != e and e is not None]
        assert not wrong, f"cvt.{how}.{to}.{source}: {wrong[:3]}"


@pytest.mark.parametrize("to", ["f16", "f32", "f64"])
@pytest.mark.parametrize("source", INTEGERS)
def test_from_integers(source, to):
    bits = int(source[1:])
    numbers = {
        (s * ((1 << n) + d)) % 2**bits
        for s in (1, -1)
        for n in range(bits)
        for d in (-1, 0, 1, 2, 3, 1 << max(n - 11, 0), 3 << max(n - 25, 0))
    }
    a = np.array(sorted(numbers), np.uint64 if bits == 64 else np.uint32)
    values = [x - (2**bits if source[0] == "s" and x >> bits - 1 else 0) for x in a.tolist()]
    got = calculate(f"cvt.rn.{to}.{source} d, a;", LOAD[to], a)
    agree(got, [nearest(x, to) for x in values], to, f"cvt.rn.{to}.{source}", ())


def test_between_floats():
    x = draw("f64", 500, 1)
    small = np.array([1.0, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 1e-46, 3.5e38, 2.0**-150], np.float64).view(np.uint64)
    x = np.concatenate([x, small])
    for kind in ("f32", "f16"):
        agree(
            calculate(f"cvt.rn.{kind}.f64 d, a;", LOAD[kind], x),
            [nearest(value(b, "f64"), kind) for b in x.tolist()],
            kind,
            f"cvt.rn.{kind}.f64",
            (),
        )
    y = np.float32([1.5, -1e-40, 3e38])
    assert calculate("cvt.f64.f32 d, a;", np.float64, y).tolist() == y.tolist()
    halves = np.float32([0.5, 1.5, -0.5, -2.5, 2.7, -2.7])
    for how, function in ROUNDING.items():
        assert calculate(f"cvt.{how}.f32.f32 d, a;", np.float32, halves).tolist() == [function(v) for v in halves.tolist()]


@pytest.mark.parametrize("code, inputs, expected", [
    ("add.rz.f32 d, a, b;", (1.0, 2.0**-24 * 1.5), 1.0),
    ("add.sat.f32 d, a, b;", (1.0, 1.0), 1.0),
    ("mul.rp.f32 d, a, b;", (1 + 2.0**-23, 1 + 2.0**-23), 1 + 3 * 2.0**-23),
    ("fma.rz.f32 d, a, b, a;", (1.0, 2.0**-24 * 1.5), 1.0),
    ("fma.rn.sat.f32 d, a, b, a;", (2.0, -1.0), 0.0),
    ("div.rz.f32 d, a, b;", (2.0, 3.0), float.fromhex("0x1.555554p-1")),
    ("sqrt.rp.f32 d, a;", (2.0,), float.fromhex("0x1.6a09e8p+0")),
    ("cvt.sat.f32.f32 d, a;", (3.0,), 1.0),
    (".reg .b16 h; cvt.rz.bf16.f32 h, a; cvt.f32.bf16 d, h;", (1 + 2.0**-7 * 0.9,), 1.0),
    (".reg .b16 h; cvt.rz.f16.f32 h, a; cvt.f32.f16 d, h;", (1 + 2.0**-10 * 0.9,), 1.0),
    (".reg .b16 h; cvt.rn.relu.bf16.f32 h, a; cvt.f32.bf16 d, h;", (-1.0,), 0.0),
    ("max.xorsign.abs.f32 d, a, b;", (-3.0, 2.0), -3.0),
    (".reg .b16 h; cvt.rn.relu.f16x2.f32 d, a, a; mov.b32 {h, _}, d; cvt.f32.f16 d, h;", (-1.0,), 0.0),
    (".reg .b16 h; cvt.rz.bf16x2.f32 d, a, a; mov.b32 {h, _}, d; cvt.f32.bf16 d, h;", (1 + 2.0**-7 * 0.9,), 1.0),
    (".reg .b16 h; cvt.rn.f16x2.f32 d, a, a; fma.rn.relu.f16x2 d, d, d, d; mov.b32 {h, _}, d; cvt.f32.f16 d, h;", (-0.5,), 0.0),
    (".reg .b16 h; cvt.rn.bf16x2.f32 d, a, a; max.relu.bf16x2 d, d, d; mov.b32 {h, _}, d; cvt.f32.bf16 d, h;", (-0.5,), 0.0),
    (".reg .b16 h; cvt.rn.f16.f32 h, a; add.ftz.f16 h, h, h; cvt.f32.f16 d, h;", (0.25,), 0.5),
])  # fmt: skip
def test_right_or_not_known(code, inputs, expected):
    """What the machine does not do, it says."""
    try:
        assert calculate(code, np.float32, *(np.array([x], np.float32) for x in inputs))[0] == np.float32(expected)
    except PtxError as error:
        assert "not known" in str(error) or "not understood" in str(error)
