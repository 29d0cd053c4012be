"""Runs Gluon kernels for Hopper on the CPU, from their own source, and reports what they do wrong.

Gluon has no interpreter. This one is stricter than the GPU: it raises :class:`KernelError` for a missing wait or fence, a
race, a deadlock, a product read too early, an access outside a tensor, a second write of an element, a 32-bit overflow.
The parts: what kernels compute with (:mod:`gluon_emulation_values`), global memory (:mod:`gluon_emulation_memory`), and a
program with its partitions, barriers and shared memory (:mod:`gluon_emulation_machine`). Here are the language's names, and
what loads and launches a kernel.

It does not see: what the compiler makes of the source (``tests/test_hopper_compile.py`` looks at that), the order of the
threads inside a partition, registers, timing, and how tiles lie in shared memory.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import operator
import re
import sys
import types
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import gluon_emulation_memory as memory
import gluon_emulation_values as values
import torch
from gluon_emulation_machine import Barrier, Load, Machine, Stage, check, fail, machine, running
from gluon_emulation_values import DotOperandLayout, KernelError, Layout, NVMMADistributedLayout, Scalar, Tile, frame_of_kernel

__all__ = ["DescriptorArgument", "KernelError", "launch", "load_kernels"]


# --- shared memory and barriers as kernels see them


class SharedTile:
    """Rows of a matrix in shared memory, perhaps transposed, or of a vector."""

    def __init__(self, stage: Stage, rows: range, transposed: bool, dtype, layout: Layout):
        self.stage, self.rows, self.transposed, self.dtype, self.layout = stage, rows, transposed, dtype, layout

    @property
    def shape(self):
        shape = [len(self.rows), *self.stage.data.shape[1:]]
        return shape[::-1] if self.transposed else shape

    @property
    def data(self) -> torch.Tensor:
        part = self.stage.data[self.rows.start : self.rows.stop]
        return part.T if self.transposed else part

    def permute(self, order) -> SharedTile:
        check(tuple(order) in ((0, 1), (1, 0)), f"permutes two dimensions by {order}")
        return SharedTile(self.stage, self.rows, self.transposed ^ (tuple(order) == (1, 0)), self.dtype, self.layout)

    def slice(self, start: int, length: int, dim: int = 0) -> SharedTile:
        check(dim == 0 and not self.transposed, "slices columns, which is not emulated")
        check(
            0 <= start and length > 0 and start + length <= len(self.rows),
            f"slices rows {start} to {start + length} of {self.shape}",
        )
        return SharedTile(self.stage, self.rows[start : start + length], False, self.dtype, self.layout)

    def load(self, layout: Layout) -> Tile:
        machine().point()
        self.stage.read(self.rows, running().tick(), True, "loads from")
        return Tile(self.data.clone(), self.dtype, layout)

    def store(self, value: Tile) -> None:
        machine().point()
        check(
            value.shape == self.shape and value.dtype is self.dtype,
            f"stores {value.dtype} {value.shape} into {self.dtype} {self.shape}",
        )
        self.stage.write(self.rows, running().tick(), True, "stores into")
        self.data.copy_(value.data)


class SharedMemory:
    """An allocation of several tiles, or barriers."""

    def __init__(self, shape, parts: list, dtype, layout: Layout):
        self.shape, self.parts, self.dtype, self.layout = shape, parts, dtype, layout

    def index(self, i) -> SharedTile | Barrier:
        i = operator.index(i)
        check(0 <= i < len(self.parts), f"takes number {i} of {len(self.parts)} in shared memory")
        return self.parts[i]


def allocate_shared_memory(dtype, shape, layout):
    shape = [operator.index(n) for n in shape]
    frame = frame_of_kernel()
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    name = (re.match(r"\s*(\w+)\s*=", line) or re.match(r"()", line)).group(1) or "shared memory"
    if isinstance(layout, values.MBarrierLayout):
        check(dtype is values.int64 and shape[-1] == 1, f"allocates barriers of {dtype} {shape}")
        return SharedMemory(shape, [Barrier(f"{name}[{i}]") for i in range(shape[0])], dtype, layout)
    dims = len(layout.order) if isinstance(layout, values.SwizzledSharedLayout) else 2  # of a tile
    several = len(shape) == dims + 1
    check(several or len(shape) == dims, f"allocates shared memory of {shape} in tiles of {dims} dimensions")
    parts = []
    for i in range(shape[0] if several else 1):
        stage = Stage(f"{name}[{i}]" if several else name, torch.full(shape[-dims:], float("nan")).to(dtype.torch))
        parts.append(SharedTile(stage, range(shape[-dims]), False, dtype, layout))
    return SharedMemory(shape, parts, dtype, layout) if several else parts[0]


def barrier() -> None:
    machine().point()
    running().together = True


def fence_async_shared() -> None:
    machine().point()
    me = running()
    me.fences.append(me.tick()[1])


def _arrive(barrier, *, count=1, pred=True):
    if pred:
        barrier.arrive(operator.index(count))


def _expect(barrier, byte_count, pred=True):
    if pred:
        barrier.arrive(1, operator.index(byte_count))


def _wait(barrier, phase, pred=True, deps=()):
    if pred:
        barrier.wait(operator.index(phase))


def _async_load(descriptor, coordinates, barrier, tile, pred=True):
    if not pred:
        return
    machine().point()
    for c in coordinates:
        check(values.dtype_of(c) is values.int32, f"loads by TMA at a coordinate of {values.dtype_of(c)}")
    fits = tile.shape == descriptor.block_shape and tile.layout == descriptor.layout and not tile.transposed
    check(fits, f"loads {descriptor.block_shape} by TMA into {tile.shape}")
    check(tile.rows.start % 8 == 0, f"loads by TMA from row {tile.rows.start} of a tile on: its rows are swizzled by eights")
    Load(descriptor, *map(operator.index, coordinates), barrier, tile)


# --- products


class Product:
    """The result of a warpgroup MMA that has begun: nothing but another product and a wait may take it."""

    def __init__(self, a, b, accumulator, use_accumulator: bool):
        me = running()
        self.parts = a, b, accumulator, use_accumulator
        self.begun, self.result = values.where(), None
        me.tick()
        me.issued, me.last_product = me.issued + 1, self.begun
        self.owner, self.number = me, me.issued
        for operand in (a, b):
            if isinstance(operand, SharedTile):
                operand.stage.read(operand.rows, (me.products_source, self.number), False, "multiplies")
        me.products.append(self)

    def compute(self) -> None:
        a, b, accumulator, use_accumulator = self.parts
        product = a.data.float() @ b.data.float()
        before = accumulator.result if isinstance(accumulator, Product) else accumulator
        self.result = Tile(before.data + product if use_accumulator else product, values.float32, before.layout)

    def refuse(self, *_):
        fail(f"reads the product begun at {self.begun}, which no warpgroup_mma_wait has returned")

    def __getattr__(self, name):
        if name.startswith("__") or name in ("owner", "number", "parts", "result", "begun"):
            raise AttributeError(name)
        self.refuse()

    __getitem__ = __bool__ = refuse


for _name in ("add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "radd", "rsub", "rmul", "rtruediv", "neg"):
    setattr(Product, f"__{_name}__", Product.refuse)


def warpgroup_mma(a, b, acc, *, use_acc=True, precision=None, is_async=False):
    machine().point()
    layout, shape = (acc.parts[2] if isinstance(acc, Product) else acc), None
    while isinstance(layout, Product):
        layout = layout.parts[2]
    shape, dtype, layout = layout.shape, layout.dtype, layout.layout
    check(dtype is values.float32, f"accumulates in {dtype}")
    check(isinstance(layout, NVMMADistributedLayout) and layout.version == (3, 0), f"accumulates in {layout}")
    check(isinstance(b, SharedTile), "multiplies by what is not in shared memory")
    check(a.dtype is b.dtype and a.dtype.primitive_bitwidth == 16, f"multiplies {a.dtype} by {b.dtype}")
    check(a.shape[1] == b.shape[0] and [a.shape[0], b.shape[1]] == shape, f"multiplies {a.shape} by {b.shape} into {shape}")
    fits = shape[0] % 64 == 0 and shape[1] % layout.instr_shape[1] == 0 and layout.instr_shape[::2] == (16, 16)
    check(fits and layout.warps_per_cta == (4, 1), f"multiplies into {shape} of {layout}")
    if isinstance(a, Tile):
        check(a.layout == DotOperandLayout(0, layout, 2), f"has its left operand in {a.layout}, accumulating in {layout}")
    product = Product(a, b, acc, bool(use_acc))
    return product if is_async else warpgroup_mma_wait(0, (product,))


def warpgroup_mma_wait(num_outstanding=0, deps=None):
    machine().point()
    me = running()
    check(deps is not None and isinstance(deps, (tuple, list)), "waits for products without deps")
    covered = me.issued - operator.index(num_outstanding)
    while me.products and me.products[0].number <= covered:
        me.products.pop(0).compute()
    me.clock.join({me.products_source: covered})
    me.tick()
    results = []
    for dep in deps:
        if isinstance(dep, Product):
            check(dep.owner is me, "waits for a product of another partition")
            check(dep.number <= covered, f"takes from a wait the product begun at {dep.begun}, which that wait does not cover")
            dep = dep.result
        check(isinstance(dep, Tile), f"waits with a {type(dep).__name__} in deps")
        results.append(dep)
    return results[0] if len(results) == 1 else tuple(results)


# --- the rest of the language


def warp_specialize(functions_and_args, worker_num_warps, worker_num_regs=None):
    workers = len(functions_and_args) - 1
    check(list(worker_num_warps) == [4] * workers, f"gives {worker_num_warps} warps to {workers} partitions")
    if worker_num_regs is not None:
        check(len(worker_num_regs) == workers, f"gives registers {worker_num_regs} to {workers} partitions")
        check(all(r % 8 == 0 and 24 <= r <= 256 for r in worker_num_regs), f"gives registers {worker_num_regs}")
    return running().program.specialize(functions_and_args)


def static_assert(condition, message=""):
    check(condition, f"fails a static assertion: {message}")


class constexpr:
    """``gl.constexpr(x)`` is ``x`` here; a parameter that is one must not be given what is known only at run time."""

    def __new__(cls, value):
        return value


class Function:
    """What ``gluon.jit`` returns."""

    def __init__(self, function):
        self.function, self.__name__, self.__doc__ = function, function.__name__, function.__doc__
        parameters = inspect.signature(function).parameters
        self.arg_names = list(parameters)
        self.static = [(i, n) for i, (n, p) in enumerate(parameters.items()) if p.annotation is constexpr]

    def __call__(self, *args, **kwargs):
        for i, name in self.static:
            given = args[i] if i < len(args) else kwargs.get(name)
            check(not isinstance(given, (Scalar, Tile)), f"gives {self.__name__} a {name} known only at run time")
        return self.function(*args, **kwargs)


def jit(function=None, **_):
    return jit if function is None else Function(function)


class _Module(types.ModuleType):
    def __init__(self, name: str, **names):
        super().__init__(name)
        self.__path__ = []
        self.__dict__.update(names)

    def __getattr__(self, name):
        raise AttributeError(f"the emulator has no {self.__name__}.{name}")


_VALUES = (
    "int1 int32 int64 float16 bfloat16 float32 BlockedLayout SliceLayout NVMMADistributedLayout DotOperandLayout "
    "NVMMASharedLayout SwizzledSharedLayout expand_dims convert_layout full zeros zeros_like arange maximum minimum exp2 "
    "log2 exp log sqrt rsqrt inline_asm_elementwise cdiv"
).split()
mbarrier = _Module(
    "mbarrier",
    MBarrierLayout=values.MBarrierLayout, init=lambda barrier, count: barrier.init(operator.index(count)),
    arrive=_arrive, expect=_expect, wait=_wait,
)  # fmt: skip
tma = _Module("tma", async_load=_async_load)
hopper = _Module(
    "hopper",
    fence_async_shared=fence_async_shared, mbarrier=mbarrier, tma=tma,
    warpgroup_mma=warpgroup_mma, warpgroup_mma_wait=warpgroup_mma_wait,
)  # fmt: skip
language = _Module(
    "gl",
    **{name: getattr(values, name) for name in _VALUES}, where=values.where_, sum=values.sum_, max=values.max_, abs=values.abs_,
    load=memory.load, store=memory.store, atomic_add=memory.atomic_add, barrier=barrier,
    constexpr=constexpr, static_range=range, static_assert=static_assert, static_print=lambda *_: None,
    allocate_shared_memory=allocate_shared_memory, warp_specialize=warp_specialize,
    program_id=lambda axis: Scalar(running().program.index if axis == 0 else 0, values.int32),
    num_programs=lambda axis: Scalar(running().program.grid if axis == 0 else 1, values.int32),
)  # fmt: skip
gluon = _Module("gluon", jit=jit, language=language)
_STAND_INS = {
    "triton": _Module("triton"),
    "triton.experimental": _Module("triton.experimental", gluon=gluon),
    "triton.experimental.gluon": gluon,
    "triton.experimental.gluon.language": language,
    "triton.experimental.gluon.language.nvidia": _Module("nvidia", hopper=hopper),
    "triton.experimental.gluon.language.nvidia.hopper": hopper,
}


# --- loading and launching

_loaded = itertools.count()


@contextmanager
def _modules(added: dict):
    """Puts modules in ``sys.modules`` for a while: those of triton that were there come back."""
    hidden = {name: m for name, m in sys.modules.items() if name in added or name.partition(".")[0] == "triton"}
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)


def load_kernels(sources: dict[str, str]) -> types.SimpleNamespace:
    """Runs the source text of modules of one package, which import one another by relative imports, in the order given.

    Returns:
        A namespace of all their functions.
    """
    package = f"emulated_{next(_loaded)}"
    modules = {name: types.ModuleType(f"{package}.{name}") for name in sources}
    whole = _Module(package)
    added = _STAND_INS | {package: whole} | {m.__name__: m for m in modules.values()}
    with _modules(added):
        for name, text in sources.items():
            module, file = modules[name], f"<{package}>/{name}.py"
            linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
            module.__dict__.update(__gluon_kernel__=True, __package__=package, __file__=file, range=values.range_)
            exec(compile(text, file, "exec", dont_inherit=True), module.__dict__)
    found = types.SimpleNamespace()
    for module in modules.values():
        found.__dict__.update({n: v for n, v in vars(module).items() if isinstance(v, Function)})
    return found


@dataclass
class DescriptorArgument:
    """Asks for a TMA descriptor of a tensor: ``shape`` rows and columns of it as a matrix, tiles of ``block_shape``."""

    tensor: torch.Tensor
    shape: tuple[int, int]
    block_shape: tuple[int, int]


def launch(
    kernel: Function, grid: int, *arguments, seed: int, far: dict | None = None, ordered: Iterable[str] = (), **constants
) -> dict[str, memory.Buffer]:
    """Runs every program of the grid, all at once, in an order drawn from the seed.

    Args:
        arguments: tensors, :class:`DescriptorArgument`, numbers. far: by the name of an argument, see ``Buffer``.
        ordered: names of arguments to which numbers must be added in one order, whatever the seed.
    Returns:
        The tensor arguments by name: what was written how often.
    Raises:
        KernelError: the kernel does something wrong.
    """
    far = far or {}
    storages, buffers, given = {}, {}, []

    def buffer(name, tensor):
        key = tensor.untyped_storage().data_ptr()
        if key not in storages:
            storages[key] = memory.Storage(tensor)
        return memory.Buffer(name, tensor, storages[key], far.get(name), name in ordered)

    for name, x in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(x, DescriptorArgument):
            dtype = values.DTYPES[x.tensor.dtype]
            layout = values.NVMMASharedLayout.get_default_for(x.block_shape, dtype)
            given.append(memory.Descriptor(buffer(name, x.tensor), x.shape, x.block_shape, layout))
        elif isinstance(x, torch.Tensor):
            buffers[name] = buffer(name, x)
            given.append(memory.Pointer(buffers[name], Scalar(0, values.int64)))
        elif isinstance(x, float):
            given.append(Scalar(torch.tensor(x, dtype=torch.float32).item(), values.float32))
        else:
            given.append(Scalar(x, values.dtype_of(x)))
    Machine(seed).run(lambda: kernel(*given, **constants), grid)
    return buffers
