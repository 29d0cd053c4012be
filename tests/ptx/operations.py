"""What PTX instructions do, as lines of numpy (see instructions.py): arithmetic, bits, comparisons and conversions.

The PTX ISA manual, 9.7, is the source.
"""

from __future__ import annotations

from .instructions import COMPARE, UNORDERED, Emitter, handles, kind_of
from .numbers import DTYPES
from .program import SIZES, Immediate, Instruction, PtxError, Register, Special

# ---------------------------------------------------------------- arithmetic


def _binary(symbol: str, numeric: str = ""):
    """``a symbol b``, with unsigned numbers where the result is the same; ``numeric``: a function instead, for floats."""

    def handler(e: Emitter, i: Instruction) -> None:
        kind = kind_of(i)
        d, a, b = i.operands
        if kind in ("f16x2", "bf16x2", "f32x2", "bf16"):
            return _packed(e, i, lambda x, y: f"({x} {symbol} {y})")
        raw = f"b{8 * SIZES[kind]}" if kind[0] in "us" else kind
        text = f"({_first(e, a, b, raw)} {symbol} {e.read(b, raw)})"
        if ".ftz" in "." + ".".join(i.parts):
            text = f"nb.flush({text})"
        e.write(d, text, raw)

    return handler


def _first(e: Emitter, a, b, kind: str) -> str:
    """``a``, as an array if ``b`` is none."""
    return e.read(a, kind) if isinstance(b, (Register, Special)) else e.array(a, kind)


def _packed(e: Emitter, i: Instruction, operation) -> None:
    """Arithmetic of 16-bit floats, one or two a register, in float32, rounded once."""
    kind = kind_of(i)
    base = kind.removesuffix("x2")
    if base not in ("bf16", "f16"):
        raise PtxError(f"packed {kind} is not known here")
    count = 2 if kind.endswith("x2") else 1
    values = []
    for n, operand in enumerate(i.operands[1:]):
        e.lines.append(f"p{n} = {e.array(operand, f'b{16 * count}')}")
        values.append(f"p{n}")
    made = []
    for half in range(count):
        pieces = [f"({v} >> {16 * half}).astype(_b16)" if count == 2 else v for v in values]
        floats = [f"nb.bf16_to_f32({p})" if base == "bf16" else f"{p}.view(_f16).astype(_f32)" for p in pieces]
        result = operation(*floats)
        made.append(f"nb.f32_to_bf16({result})" if base == "bf16" else f"({result}).astype(_f16).view(_b16)")
    e.keep(i.operands[0], f"nb.pair({made[0]}, {made[1]})" if count == 2 else made[0])


handles("add")(_binary("+"))
handles("sub")(_binary("-"))
handles("and")(_binary("&"))
handles("or")(_binary("|"))
handles("xor")(_binary("^"))


@handles("mul", "mad")
def _multiply(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, b, *c = i.operands
    if kind[0] in "fb":
        return _binary("*")(e, i) if not c else _fused(e, i)
    if "wide" in i.parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        text = f"({e.array(a, kind)}.astype(_{wide}) * {e.array(b, kind)}.astype(_{wide}))"
        kind = wide
    elif "hi" in i.parts:
        text = f"nb.high_product({e.array(a, kind)}, {e.array(b, kind)})"
    else:
        kind = f"b{8 * SIZES[kind]}"
        text = f"({_first(e, a, b, kind)} * {e.read(b, kind)})"
    if c:
        text = f"({text} + {e.read(c[0], kind)})"
    e.write(d, text, kind)


@handles("mul24", "mad24")
def _multiply_24(e: Emitter, i: Instruction) -> None:
    raise PtxError(f"{i.text}: not known here")


@handles("fma")
def _fused(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, b, c = i.operands
    if kind == "f32":
        text = f"nb.fma({e.array(a, kind)}, {e.read(b, kind)}, {e.read(c, kind)})"
        e.write(d, f"nb.flush({text})" if "ftz" in i.parts else text, kind)
    elif kind == "f64":
        e.write(d, f"({e.array(a, kind)} * {e.read(b, kind)} + {e.read(c, kind)})", kind)
    else:
        _packed(e, i, lambda x, y, z: f"nb.fma_to_odd({x}, {y}, {z})")


@handles("div")
def _divide(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, b = i.operands
    if kind[0] == "f":
        text = f"({e.array(a, kind)} / {e.read(b, kind)})"
        e.write(d, f"nb.flush({text})" if "ftz" in i.parts else text, kind)
    else:
        e.write(d, f"nb.divide({e.array(a, kind)}, {e.array(b, kind)})", kind)


@handles("rem")
def _remainder(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, b = i.operands
    e.write(d, f"nb.remainder({e.array(a, kind)}, {e.array(b, kind)})", kind)


def _unary(text: str):
    def handler(e: Emitter, i: Instruction) -> None:
        kind = kind_of(i)
        d, a = i.operands
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            return _packed(e, i, lambda x: text.format(x))
        made = text.format(e.array(a, kind))
        e.write(d, f"nb.flush({made})" if "ftz" in i.parts and kind == "f32" else made, kind)

    return handler


handles("neg")(_unary("(-{})"))
handles("abs")(_unary("np.abs({})"))
handles("rcp")(_unary("(_f32(1) / {})"))
handles("sqrt")(_unary("np.sqrt({})"))
handles("rsqrt")(_unary("(_f32(1) / np.sqrt({}))"))
handles("ex2")(_unary("np.exp2({})"))
handles("lg2")(_unary("np.log2({})"))
handles("not")(_unary("(~{})"))
handles("popc")(_unary("nb.ones({})"))
handles("clz")(_unary("nb.leading_zeros({})"))


@handles("min", "max")
def _extreme(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    name = {"min": "np.minimum", "max": "np.maximum"}[i.name]
    if kind[0] in "fb":
        name = {"min": "nb.smallest", "max": "nb.largest"}[i.name] + ("_or_nan" if "NaN" in i.parts else "")
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return _packed(e, i, lambda x, y: f"{name}({x}, {y})")
    d, a, *rest = i.operands
    text = e.array(a, kind)
    for b in rest:
        text = f"{name}({text}, {e.read(b, kind)})"
    e.write(d, text, kind)


# ---------------------------------------------------------------- bits


@handles("shl", "shr")
def _shift(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, b = i.operands
    if isinstance(b, Immediate) and 0 <= b.value < 8 * SIZES[kind]:
        by = e.constant(DTYPES[kind](b.value))
        return e.write(d, f"({e.array(a, kind)} {'<<' if i.name == 'shl' else '>>'} {by})", kind)
    e.write(d, f"nb.shift_{'left' if i.name == 'shl' else 'right'}({e.array(a, kind)}, {e.read(b, 'b32')})", kind)


@handles("shf")
def _funnel(e: Emitter, i: Instruction) -> None:
    d, a, b, c = i.operands
    low, high, by = (e.array(x, "b32") for x in (a, b, c))
    e.write(d, f"nb.funnel({low}, {high}, {by}, {'l' in i.parts}, {'wrap' in i.parts})", "b32")


@handles("bfe")
def _extract(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, start, length = i.operands
    e.write(d, f"nb.field({e.array(a, kind)}, {e.read(start, 'b32')}, {e.read(length, 'b32')})", kind)


@handles("bfi")
def _insert(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a, b, start, length = i.operands
    e.write(d, f"nb.insert({e.array(a, kind)}, {e.array(b, kind)}, {e.read(start, 'b32')}, {e.read(length, 'b32')})", kind)


@handles("prmt")
def _permute(e: Emitter, i: Instruction) -> None:
    if i.parts != ("prmt", "b32"):
        raise PtxError(f"{i.text}: modes of prmt are not known here")
    d, a, b, selector = i.operands
    e.write(d, f"nb.permute({', '.join(e.array(x, 'b32') for x in (a, b, selector))})", "b32")


@handles("lop3")
def _logic(e: Emitter, i: Instruction) -> None:
    d, a, b, c, table = i.operands
    e.write(d, f"nb.logic({', '.join(e.array(x, 'b32') for x in (a, b, c))}, {table.value})", "b32")


# ---------------------------------------------------------------- moves, comparisons, conversions


@handles("mov")
def _move(e: Emitter, i: Instruction) -> None:
    kind = kind_of(i)
    d, a = i.operands
    if type(a) is tuple:  # a register made of parts, the lowest first
        each = 8 * SIZES[kind] // len(a)
        parts = [f"({e.array(x, f'b{each}')}.astype(_b{8 * SIZES[kind]}) << {n * each})" for n, x in enumerate(a)]
        e.write(d, " | ".join(parts), f"b{8 * SIZES[kind]}")
    elif type(d) is tuple:
        each = 8 * SIZES[kind] // len(d)
        e.lines.append(f"whole = {e.array(a, f'b{8 * SIZES[kind]}')}")
        for n, register in enumerate(d):
            e.write(register, f"(whole >> {n * each}).astype(_b{each})", f"b{each}")
    else:
        if kind == "pred":
            e.write(d, e.array(a, kind), kind)
        else:
            raw = f"b{8 * SIZES[kind]}"
            e.write(d, e.array(a, raw), raw)


@handles("cvta")
def _to_space(e: Emitter, i: Instruction) -> None:
    if "shared" in i.parts and "to" not in i.parts:
        raise PtxError(f"{i.text}: generic addresses of shared memory are not known here")
    d, a = i.operands
    e.write(d, e.array(a, kind_of(i)), kind_of(i))


@handles("setp")
def _compare(e: Emitter, i: Instruction) -> None:
    kind, how = kind_of(i), i.parts[1]
    d, a, b, *also = i.operands
    x, y = e.array(a, kind), e.read(b, kind)
    if kind in ("f16", "bf16"):
        raise PtxError(f"{i.text}: comparisons of {kind} are not known here")
    if how in UNORDERED:
        text = f"(np.isnan({x}) | np.isnan({y}) | ({x} {UNORDERED[how]} {y}))"
    elif how in ("num", "nan"):
        text = f"(np.isnan({x}) | np.isnan({y}))"
        text = f"(~{text})" if how == "num" else text
    elif how == "ne" and kind[0] == "f":
        text = f"(({x} != {y}) & ~np.isnan({x}) & ~np.isnan({y}))"
    else:
        text = f"({x} {COMPARE[how]} {y})"
    e.lines.append(f"holds = {text}")
    symbol = {"and": "&", "or": "|", "xor": "^"}.get(i.parts[2])
    other = f" {symbol} {e.array(also[0], 'pred')}" if symbol else ""
    e.lines.append(f"other = (~holds){other}" if i.pair else "other = None")
    e.keep(d, f"holds{other}")
    e.keep(i.pair, "other")


@handles("selp")
def _select(e: Emitter, i: Instruction) -> None:
    d, a, b, p = i.operands
    raw = f"b{8 * SIZES[kind_of(i)]}"
    e.write(d, f"np.where({e.array(p, 'pred')}, {e.read(a, raw)}, {e.read(b, raw)})", raw)


@handles("cvt")
def _convert(e: Emitter, i: Instruction) -> None:
    to, source = i.parts[-2:]
    d, *a = i.operands
    if to in ("f16x2", "bf16x2"):
        high, low = (e.array(x, "f32") for x in a)
        made = [f"nb.f32_to_bf16({x})" if to == "bf16x2" else f"({x}).astype(_f16).view(_b16)" for x in (low, high)]
        return e.write(d, f"nb.pair({made[0]}, {made[1]})", "b32")
    if "sat" in i.parts or "relu" in i.parts:
        raise PtxError(f"{i.text}: not known here")
    if to == "tf32":
        if "rna" not in i.parts:
            raise PtxError(f"{i.text}: not known here")
        return e.write(d, f"nb.f32_to_tf32({e.array(a[0], 'f32')})", "b32")
    if source == "bf16":
        x, source = f"nb.bf16_to_f32({e.array(a[0], 'b16')})", "f32"
    else:
        x = e.array(a[0], source)
    if to == "bf16":
        x = x if source == "f32" else f"{x}.astype(_f32)"
        return e.write(d, f"nb.f32_to_bf16({x})", "b16")
    if source[0] == "f" and to[0] in "us":
        return e.write(d, f"nb.to_integer({x}, {to!r}, {i.parts[1]!r})", to)
    if source[0] == "f" and source == to and i.parts[1] in ("rni", "rzi", "rmi", "rpi"):
        name = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}[i.parts[1]]
        return e.write(d, f"{name}({x})", to)
    if to[0] == "f" and any(r in i.parts for r in ("rz", "rm", "rp")):
        raise PtxError(f"{i.text}: this rounding is not known here")
    made = f"{x}.astype(_{to})"
    e.write(d, f"nb.flush({made})" if "ftz" in i.parts and to == "f32" else made, to)
