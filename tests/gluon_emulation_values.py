"""What a Gluon kernel computes with, on the CPU: dtypes, layouts, scalars and tiles.

Integers have their width: a result that does not fit raises, and so do ``//`` and ``%`` of negative numbers, which Triton
truncates and Python floors. Tiles of different layouts do not mix. See :mod:`gluon_emulation`.
"""

from __future__ import annotations

import linecache
import math
import operator
import sys
from dataclasses import dataclass

import torch


class KernelError(Exception):
    """What the emulated kernel does wrong."""


def frame_of_kernel():
    """The innermost running frame of a kernel's source; ``None`` outside."""
    frame = sys._getframe(1)
    while frame is not None and "__gluon_kernel__" not in frame.f_globals:
        frame = frame.f_back
    return frame


def where() -> str:
    """File, line and function of the kernel that run now."""
    frame = frame_of_kernel()
    if frame is None:
        return "outside the kernel"
    file = frame.f_code.co_filename.rpartition("/")[2]
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name} `{line}`"


def assert_(condition, message: str) -> None:
    if not condition:
        raise KernelError(f"{message}, at {where()}")


@dataclass(frozen=True)
class DType:
    name: str
    torch: torch.dtype
    primitive_bitwidth: int
    kind: int  # 0 boolean, 1 integer, 2 floating

    def __repr__(self):
        return self.name


int1 = DType("int1", torch.bool, 1, 0)
int32 = DType("int32", torch.int32, 32, 1)
int64 = DType("int64", torch.int64, 64, 1)
float16 = DType("float16", torch.float16, 16, 2)
bfloat16 = DType("bfloat16", torch.bfloat16, 16, 2)
float32 = DType("float32", torch.float32, 32, 2)
DTYPES = {d.torch: d for d in (int1, int32, int64, float16, bfloat16, float32)}


class Layout:
    """Where the elements of a tile are. Equal layouts are the same layout."""


@dataclass(frozen=True)
class BlockedLayout(Layout):
    size_per_thread: tuple
    threads_per_warp: tuple
    warps_per_cta: tuple
    order: tuple

    def __init__(self, *args):
        for name, value in zip(self.__dataclass_fields__, args, strict=True):
            object.__setattr__(self, name, tuple(value))
        assert_(math.prod(self.threads_per_warp) == 32, f"{self} has not 32 threads in a warp")
        assert_(math.prod(self.warps_per_cta) == 4, f"{self} is not one of 4 warps")


@dataclass(frozen=True)
class SliceLayout(Layout):
    dim: int
    parent: Layout


@dataclass(frozen=True)
class NVMMADistributedLayout(Layout):
    version: tuple
    warps_per_cta: tuple
    instr_shape: tuple

    def __init__(self, *args):
        for name, value in zip(self.__dataclass_fields__, args, strict=True):
            object.__setattr__(self, name, tuple(value))


@dataclass(frozen=True)
class DotOperandLayout(Layout):
    operand_index: int
    parent: Layout
    k_width: int


@dataclass(frozen=True)
class NVMMASharedLayout(Layout):
    """Of shared memory that TMA writes and warpgroup MMAs read."""

    swizzle_byte_width: int
    element_bitwidth: int

    @staticmethod
    def get_default_for(block_shape, dtype):
        width = block_shape[-1] * dtype.primitive_bitwidth // 8
        return NVMMASharedLayout(next(s for s in (128, 64, 32, 0) if width % max(s, 1) == 0), dtype.primitive_bitwidth)


@dataclass(frozen=True)
class SwizzledSharedLayout(Layout):
    """Of shared memory that threads alone touch."""

    vec: int
    per_phase: int
    max_phase: int
    order: tuple

    def __init__(self, vec, per_phase, max_phase, order):
        for name, value in zip(self.__dataclass_fields__, (vec, per_phase, max_phase, tuple(order)), strict=True):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ReshapedLayout(Layout):
    """Where the elements of a tile of that shape are, in that layout, once it has another shape."""

    shape: tuple
    parent: Layout


class MBarrierLayout(Layout):
    pass


@dataclass(frozen=True)
class _Type:
    layout: Layout
    element_ty: DType


def dtype_of(x) -> DType:
    """The dtype of a scalar, a tile, or a Python number."""
    if isinstance(x, (Scalar, Tile)):
        return x.dtype
    if isinstance(x, bool):
        return int1
    if isinstance(x, int):
        return int32 if -(2**31) <= x < 2**31 else int64
    if isinstance(x, float):
        return float32
    if hasattr(x, "refuse"):
        x.refuse()
    raise KernelError(f"{type(x).__name__} is no operand of arithmetic, at {where()}")


def _common_dtype(a, b, divides: bool) -> DType:
    """Triton's rules: a Python number gives way to a tensor of its kind or a higher one; otherwise the wider dtype."""
    x, y = dtype_of(a), dtype_of(b)
    a_number, b_number = (not isinstance(t, (Scalar, Tile)) for t in (a, b))
    if a_number != b_number:
        number, tensor = (x, y) if a_number else (y, x)
        if number.kind <= tensor.kind:
            return float32 if divides and tensor.kind == 2 else tensor
    if x.kind == y.kind == 2:
        return x if x is y and not divides else float32
    if x.kind == 2 or y.kind == 2:
        return x if x.kind == 2 else y
    return max(x, y, key=lambda d: d.primitive_bitwidth)


_COMPARISONS = {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
_INTEGER_ONLY = {operator.floordiv, operator.mod, operator.and_, operator.or_, operator.xor}


def binary(op, a, b):
    """``op(a, b)`` of scalars, tiles and Python numbers."""
    if not all(isinstance(t, (Scalar, Tile, bool, int, float)) for t in (a, b)):
        return NotImplemented
    dtype = _common_dtype(a, b, op is operator.truediv)
    if op is operator.truediv:
        assert_(dtype.kind == 2, "division of integers by /")
    if op in _INTEGER_ONLY:
        assert_(dtype.kind < 2, f"{op.__name__} of floating-point values")
    layout = common_layout(a, b)
    wide = torch.int64 if dtype.kind == 1 else dtype.torch
    if layout is None and dtype.kind < 2:
        x, y = plain(a), plain(b)
    else:
        x, y = (t.data.to(wide) if isinstance(t, Tile) else torch.tensor(plain(t)).to(wide) for t in (a, b))
    if op in (operator.floordiv, operator.mod):
        assert_(bool((x >= 0) if isinstance(x, int) else (x >= 0).all()), f"{op.__name__} of a negative number")
        assert_(bool((y > 0) if isinstance(y, int) else (y > 0).all()), f"{op.__name__} by what is not positive")
    result = op(x, y)
    return wrapped(result, int1 if op in _COMPARISONS else dtype, layout)


def wrapped(result, dtype: DType, layout):
    """A scalar or a tile of a result, once it is seen to fit its dtype."""
    if dtype.kind == 1:
        low, high = (int(result.min()), int(result.max())) if isinstance(result, torch.Tensor) else (result, result)
        bits = dtype.primitive_bitwidth - 1
        assert_(-(2**bits) <= low and high < 2**bits, f"{dtype} overflows: {low if low < -(2**bits) else high}")
    if layout is not None:
        return Tile(result.to(dtype.torch), dtype, layout)
    return Scalar(result.item() if isinstance(result, torch.Tensor) else result, dtype)


def plain(x):
    """The Python number of a scalar."""
    return x.value if isinstance(x, Scalar) else x


def common_layout(*values):
    """The layout of those that are tiles, which must agree, shapes too; ``None`` if there are none."""
    tiles = [t for t in values if isinstance(t, Tile)]
    for t in tiles[1:]:
        if t.layout is not tiles[0].layout:  # their names are long
            assert_(t.layout == tiles[0].layout, f"layouts differ: {t.layout} and {tiles[0].layout}")
        if t.shape == tiles[0].shape:
            continue
        fits = len(t.shape) == len(tiles[0].shape)
        fits = fits and all(m == n or 1 in (m, n) for m, n in zip(t.shape, tiles[0].shape, strict=True))
        assert_(fits, f"shapes differ: {t.shape} and {tiles[0].shape}")
    return tiles[0].layout if tiles else None


class _Arithmetic:
    __hash__ = None

    def __lt__(self, other):
        return binary(operator.lt, self, other)

    def __le__(self, other):
        return binary(operator.le, self, other)

    def __gt__(self, other):
        return binary(operator.gt, self, other)

    def __ge__(self, other):
        return binary(operator.ge, self, other)

    def __eq__(self, other):
        return binary(operator.eq, self, other)

    def __ne__(self, other):
        return binary(operator.ne, self, other)

    def __neg__(self):
        return binary(operator.sub, 0, self)


def _add_arithmetic():
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "xor"):
        op, stem = getattr(operator, name), name.strip("_")
        setattr(_Arithmetic, f"__{stem}__", lambda self, other, op=op: binary(op, self, other))
        setattr(_Arithmetic, f"__r{stem}__", lambda self, other, op=op: binary(op, other, self))


_add_arithmetic()


class Scalar(_Arithmetic):
    """A number known only when the kernel runs."""

    def __init__(self, value, dtype: DType):
        self.value, self.dtype = value, dtype

    def to(self, dtype: DType):
        value = self.value if dtype.kind < 2 else float(self.value)
        return wrapped(torch.tensor(value).to(dtype.torch) if dtype.kind == 2 else int(value), dtype, None)

    def __bool__(self):
        return bool(self.value)

    def __index__(self):
        assert_(self.dtype.kind == 1, f"a {self.dtype} where an integer is wanted")
        return self.value

    def __repr__(self):
        return f"{self.value} ({self.dtype})"


class Tile(_Arithmetic):
    """A tensor in registers."""

    def __init__(self, data: torch.Tensor, dtype: DType, layout):
        assert_(isinstance(layout, Layout), "a tile needs a layout (the emulator has no AutoLayout)")
        self.data, self.dtype, self.layout = data, dtype, layout

    @property
    def shape(self):
        return list(self.data.shape)

    @property
    def type(self):
        return _Type(self.layout, self.dtype)

    def to(self, dtype: DType):
        if dtype.kind == 1:
            assert_(self.dtype.kind < 2, "rounding to integers is not emulated")
            return wrapped(self.data.to(torch.int64), dtype, self.layout)
        return Tile(self.data.to(dtype.torch), dtype, self.layout)

    def reshape(self, shape):
        sizes = [operator.index(n) for n in shape]
        assert_(math.prod(sizes) == self.data.numel(), f"{self.shape} has not as many elements as {sizes}")
        return Tile(self.data.reshape(sizes), self.dtype, ReshapedLayout(tuple(self.shape), self.layout))

    def __getitem__(self, index):
        assert_(index in ((slice(None), None), (None, slice(None))), f"index {index} is not emulated")
        return expand_dims(self, 1 if index[1] is None else 0)

    def __bool__(self):
        raise KernelError(f"a tile where one truth value is wanted, at {where()}")


def expand_dims(x: Tile, axis: int) -> Tile:
    fits = isinstance(x.layout, SliceLayout) and x.layout.dim == axis
    assert_(fits, f"a new axis {axis} needs SliceLayout({axis}, ...), not {x.layout}")
    return Tile(x.data.unsqueeze(axis), x.dtype, x.layout.parent)


def convert_layout(x: Tile, layout) -> Tile:
    return Tile(x.data, x.dtype, layout)


def _rank_fits(shape, layout):
    if isinstance(layout, SliceLayout):
        rank = 1
    else:
        rank = len(layout.order) if isinstance(layout, BlockedLayout) else 2
    assert_(len(shape) == rank, f"a shape {shape} in {layout}")


def full(shape, value, dtype: DType, layout=None) -> Tile:
    _rank_fits(shape, layout)
    return Tile(torch.full([operator.index(n) for n in shape], plain(value), dtype=dtype.torch), dtype, layout)


def zeros(shape, dtype: DType, layout=None) -> Tile:
    return full(shape, 0, dtype, layout)


def zeros_like(x: Tile) -> Tile:
    return zeros(x.shape, x.dtype, x.layout)


def arange(start: int, end: int, layout=None) -> Tile:
    size = end - start
    assert_(size > 0 and size & (size - 1) == 0, f"arange of {size} elements: not a power of two")
    _rank_fits([size], layout)
    return Tile(torch.arange(start, end, dtype=torch.int32), int32, layout)


def where_(condition, a, b):
    """``gl.where``."""
    dtype = _common_dtype(a, b, False)
    layout = common_layout(condition, a, b)
    assert_(dtype_of(condition) is int1, "a condition that is not boolean")
    if layout is None:
        return wrapped(torch.tensor(plain(a if condition else b)).to(dtype.torch), dtype, None)
    values = [t.data.to(dtype.torch) if isinstance(t, Tile) else torch.tensor(plain(t)).to(dtype.torch) for t in (a, b)]
    return Tile(
        torch.where(condition.data if isinstance(condition, Tile) else torch.tensor(bool(condition)), *values), dtype, layout
    )


def maximum(a, b):
    """Of a NaN and a number, the number: Triton's default."""
    if dtype_of(a).kind == dtype_of(b).kind == 2:
        return binary(torch.fmax, a, b)
    return where_(binary(operator.gt, a, b), a, b)


def minimum(a, b):
    if dtype_of(a).kind == dtype_of(b).kind == 2:
        return binary(torch.fmin, a, b)
    return where_(binary(operator.lt, a, b), a, b)


def _reduced(x: Tile, axis: int, data) -> Tile:
    assert_(x.dtype is float32, f"a reduction of {x.dtype}")
    return Tile(data, x.dtype, SliceLayout(axis, x.layout))


def sum_(x: Tile, axis: int) -> Tile:
    return _reduced(x, axis, x.data.sum(axis))


def max_(x: Tile, axis: int) -> Tile:
    unknown = x.data.isnan()
    largest = x.data.masked_fill(unknown, float("-inf")).amax(axis)
    return _reduced(x, axis, largest.masked_fill(unknown.all(axis), float("nan")))


def _elementwise(function):
    def apply(x):
        assert_(dtype_of(x) is float32, f"{function.__name__} of {dtype_of(x)}")
        result = function(x.data if isinstance(x, Tile) else torch.tensor(plain(x), dtype=torch.float32))
        return wrapped(result, float32, x.layout if isinstance(x, Tile) else None)

    return apply


exp2, log2, exp, log, sqrt, rsqrt, abs_ = map(
    _elementwise, (torch.exp2, torch.log2, torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.abs)
)


_ASSEMBLY = {("lg2.approx.ftz.f32 $0, $1;", "=f,f"): log2}  # one instruction each


def inline_asm_elementwise(asm: str, constraints: str, args: list, dtype: DType, is_pure: bool, pack: int):
    function = _ASSEMBLY.get((asm, constraints))
    assert_(function is not None and dtype is float32 and is_pure and pack == 1, f"`{asm}` is not emulated")
    return function(*args)


def cdiv(a, b):
    return (a + (b - 1)) // b


def range_(*bounds):
    """``range`` as a kernel has it: its numbers are int32, or int64 if a bound is, known only when it runs."""
    dtype = max((dtype_of(b) for b in bounds), key=lambda d: d.primitive_bitwidth)
    assert_(dtype.kind == 1, f"a range over {dtype}")
    for i in range(*map(operator.index, bounds)):
        yield Scalar(i, dtype)
