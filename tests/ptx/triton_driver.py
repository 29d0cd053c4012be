"""Triton on a pretended NVIDIA card: its own specialisation and compiler, and in the place of CUDA what executes PTX.

    with on_card((8, 0)) as card:
        kernel[grid](*cpu_tensors, ...)              # any Triton or Gluon kernel
        attention(q, k, v, layout, "scan", backend="triton")
    card.compiled, card.launched                     # the names of the variants compiled, and all launches

Kernels are specialised and compiled as on a GPU, up to PTX: no ptxas, no libcuda. They see the memory of the tensors they are
given and nothing else. Triton's interpreter must be off; see :mod:`.own_process`. For triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends import hopper as hopper_backend
from hlip_kernels.backends import triton as triton_backend

from . import tensor_map
from .machine import launch
from .memory import Memory
from .program import parse

SHARED_MEMORY = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448}  # bytes one block may have
# Before its pull request 9610, Triton left out the fence between cp.async and wgmma (the loops of the Triton kernels on sm_90).
FENCES_COPIES = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8)
MULTIPROCESSORS = 4  # few, so that kernels with a program for each give each several things to do
# How struct packs each type of Triton's. Pointers are "*..."; 16-bit floats come as tensors only.
FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
           "fp32": "f", "fp64": "d"}  # fmt: skip

_numbers = itertools.count()
_read = functools.cache(parse)  # the same PTX is compiled for many a card


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched, by name, and what with. ``threads``: of a block. ``cooperative``: all programs at once."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cooperative: bool


class PtxDriver(DriverBase):
    """What Triton asks of a driver, answered for a card that is not there.

    Args:
        capability: of the card. multiprocessors: that it has.
        seed: of the order in which programs run; each launch takes the next.
    Attributes:
        variants: the names of the kernels compiled, by the hash that Triton gives each variant.
        launched: every launch, in order.
    """

    def __init__(self, capability: tuple[int, int] = (8, 0), multiprocessors: int = MULTIPROCESSORS, seed: int = 0):
        super().__init__()
        self.capability, self.multiprocessors, self.seed = capability, multiprocessors, seed
        self.number = next(_numbers)  # Triton keeps compiled kernels by it: each card begins with none
        self.variants: dict[str, str] = {}
        self.launched: list[Launch] = []
        self.utils = self  # Triton has a second object for some of its questions
        self.launcher_cls = functools.partial(Launcher, self)

    @property
    def compiled(self) -> list[str]:
        return list(self.variants.values())

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED_MEMORY[self.capability], "multiprocessor_count": self.multiprocessors, "warpSize": 32,
            "max_num_regs": 65536, "mem_bus_width": 5120, "mem_clock_rate": 1500000, "sm_clock_rate": 1500000,
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int):
        """``(module, function, registers, spills, threads)``. A function is a kernel as the machine knows it. There is no
        module, so nothing to unload, and Triton asks for it anew before every launch."""
        kernel = _read(binary.decode())[name]
        kernel.fences_copies = FENCES_COPIES
        return None, kernel, 0, 0, 1024

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("no launcher is written in C++ here")

    def get_benchmarker(self):
        raise NotImplementedError("nothing here tells time")


class Launcher:
    """Launches one compiled kernel: lays its arguments out as the PTX declares them, and has the machine run it."""

    def __init__(self, card: PtxDriver, source, metadata):
        self.card, self.metadata = card, metadata
        self.types = tuple(source.signature.values())
        card.variants[metadata.hash] = metadata.name
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError("clusters of blocks")

    def __call__(self, x, y, z, stream, function, kernel_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        memory, maps = Memory(), iter(getattr(self.metadata, "tensordesc_meta", None) or ())
        given = list(_flat(self.types, arguments, maps, memory))
        for size in (self.metadata.global_scratch_size, self.metadata.profile_scratch_size):
            scratch = torch.zeros(x * y * z * size, dtype=torch.int8) if size else None
            given += _value("*i8", scratch, memory)
            arguments += (scratch,)  # alive until the kernel has run
        threads, shared = 32 * self.metadata.num_warps, self.metadata.shared
        self.card.launched.append(
            Launch(function.name, (x, y, z), threads, shared, bool(self.metadata.launch_cooperative_grid))
        )  # fmt: skip
        self.card.seed += 1
        if enter_hook is not None:
            enter_hook(launch_metadata)
        launch(
            function, grid=(x, y, z), block=(threads, 1, 1), shared_bytes=shared,
            parameters=_laid_out(function, given), memory=memory, seed=self.card.seed,
        )  # fmt: skip
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _flat(types, values, maps: Iterator[dict], memory: Memory) -> Iterator[bytes]:
    """The bytes of each argument that the PTX has, in order: tuples one by one, constants left out."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value, maps, memory)
        elif kind.startswith("tensordesc"):
            yield from _described(value, next(maps, None), memory)
        elif kind != "constexpr":
            yield from _value(kind, value, memory)


def _value(kind: str, value, memory: Memory) -> Iterator[bytes]:
    if not kind.startswith("*"):
        yield struct.pack("<" + FORMATS[kind], value)
    elif isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"the machine reaches the memory of this process alone, not that of {value.device}")
        storage = value.untyped_storage()
        memory.allow(storage.data_ptr(), storage.nbytes())
        yield struct.pack("<Q", value.data_ptr())
    else:
        yield struct.pack("<Q", value or 0)


def _described(descriptor, found: dict | None, memory: Memory) -> Iterator[bytes]:
    """A tensor descriptor: a tensor map, then the shape and the strides. ``found``: what the compiler says of it."""
    if found is None or found.get("is_im2col") or found["fp4_padded"]:
        raise NotImplementedError("tensor descriptors that are not for TMA, or not plainly tiled")
    list(_value("*", descriptor.base, memory))
    size = found["elem_size"]
    made = tensor_map.TensorMap(
        address=descriptor.base.data_ptr(),
        element_bytes=size,
        shape=tuple(descriptor.shape)[::-1],
        strides=tuple(size * stride for stride in descriptor.strides[-2::-1]),
        box=tuple(found["block_size"])[::-1],
        swizzle=tensor_map.SWIZZLES[found["swizzle"]],
        fills_nan=descriptor.padding == "nan",
    )
    yield tensor_map.encode(made)
    yield from (struct.pack("<i", n) for n in descriptor.shape)
    yield from (struct.pack("<q", n) for n in descriptor.strides)


def _laid_out(kernel, given: list[bytes]) -> bytes:
    """The parameters of a kernel, each where it belongs."""
    sizes = [parameter.size for parameter in kernel.parameters]
    if sizes != [len(piece) for piece in given]:
        raise ValueError(f"{kernel.name} takes parameters of {sizes} bytes, and was given {[len(piece) for piece in given]}")
    laid_out = bytearray(kernel.parameter_bytes)
    for parameter, piece in zip(kernel.parameters, given, strict=True):
        laid_out[parameter.offset : parameter.offset + parameter.size] = piece
    return bytes(laid_out)


class _OnCpuTensors:
    """Makes a backend for GPUs say to a question about the CPU what it says about the card, tensors being on the CPU here."""

    capability = (8, 0)

    def supports(self, query):
        if query.device_type == "cpu":
            query = replace(query, device_type="cuda", capability=self.capability)
        return super().supports(query)


class CompiledTritonBackend(_OnCpuTensors, triton_backend.TritonBackend):
    """The Triton backend on CPU tensors."""


class CompiledHopperBackend(_OnCpuTensors, hopper_backend.HopperBackend):
    """The Hopper backends on CPU tensors."""

    capability = (9, 0)


@contextlib.contextmanager
def on_card(capability: tuple[int, int] = (8, 0), multiprocessors: int = MULTIPROCESSORS, seed: int = 0, whole: bool = True):
    """Triton and the ``triton``, ``hopper`` and ``hopper_ordered`` backends run CPU tensors on a pretended card: its driver.

    Args:
        whole: let the Hopper backends hold short segments whole.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    if triton_backend.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled in this process")
    card = PtxDriver(capability, multiprocessors, seed)
    backends = {"triton": CompiledTritonBackend(), "hopper": CompiledHopperBackend(whole=whole),
                "hopper_ordered": CompiledHopperBackend(ordered=True, whole=whole)}  # fmt: skip
    for backend in backends.values():
        backend.capability = capability
    family = "hopper" if capability[0] in (9, 10, 11) else "ampere"
    before = triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (triton_backend, "tile_family", lambda device: family),
            (hopper_backend, "_multiprocessors", lambda device: multiprocessors),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(BACKENDS, backends))
        stack.enter_context(knobs.cache.scope())
        knobs.cache.dir = os.path.join(knobs.cache.dir, "ptx")  # where cubins are PTX, nobody else should find them
        stack.callback(triton.runtime.driver.set_active, before)
        triton.runtime.driver.set_active(card)
        yield card
