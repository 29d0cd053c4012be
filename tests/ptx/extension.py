"""The CUDA extension as nvcc makes it, on CPU tensors: its host code runs, and each kernel it launches is executed here.

The library is built with nvcc from csrc as it stands, with runtime.cpp in place of the CUDA runtime and with PTX alone in it.
What is executed is the code the library itself registers with the runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.machinery
import importlib.util
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from hlip_kernels import native
from hlip_kernels.backends.cuda import CudaBackend, max_rows, shared_memory
from hlip_kernels.packs import PACK_ROWS, packs_of

from .extension_build import built, entries, readable, texts
from .machine import launch as run_grid
from .memory import Memory
from .program import Kernel, parse


class Launch(NamedTuple):
    """One launch: the kernel's mangled name, and how it was launched."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int | None

    @property
    def what(self) -> str:
        """The instantiation."""
        return readable(self.kernel)


# Which arguments of the module's functions are addresses of what is written.
WRITTEN = {
    "segment_mean": (3, 4), "segment_mean_backward": (3,), "switch_tail": (3,), "patchify": (4,), "patchify_backward": (4,),
    "short_attention_forward": (6, 7), "short_attention_backward": (12, 13, 14),
}  # fmt: skip
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
OUT_OF_RESOURCES, LAUNCH_FAILURE = 701, 719  # of cudaError_t
STREAM = 0x5EED  # a handle that every launch must be given


class Extension:
    """The extension compiled for one architecture.

    Attributes:
        module: hlip_kernels._C.
        launches: all since start_anew().
        seed: of the order in which warps run; a launch takes it and adds 1.
        replaced: kernels to run in place of the library's own, by name.
        execute: runs a grid; ptx.machine.launch.
        fail: the cudaError_t that a launch, of which it is told, shall have; 0: it runs.
    """

    def __init__(self, arch: str):
        path = str(built(arch))
        loader = importlib.machinery.ExtensionFileLoader("_C", path)
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("_C", path, loader=loader))
        loader.exec_module(self.module)
        self._library = ctypes.CDLL(path)
        self._library.hlip_runtime_image.restype = ctypes.c_void_p
        self._library.hlip_runtime_start.argtypes = [_LAUNCH, ctypes.c_int, ctypes.c_size_t]
        self._callback = _LAUNCH(self._launch)
        self.texts: dict[str, str] = {}
        for index in itertools.count():
            image = self._library.hlip_runtime_image(ctypes.c_size_t(index))
            if image is None:
                break
            for text in texts(image):
                self.texts |= entries(text)
        self.launches: list[Launch] = []
        self.seed = 0
        self.replaced: dict[str, Kernel] = {}
        self.execute = run_grid
        self.fail = lambda launch: 0
        self._kernels: dict[str, Kernel] = {}
        self._memory = Memory()
        self._error: BaseException | None = None
        self._handed: dict[int, int] = {}  # bytes from each address that native.py asked a tensor for
        self._named: set[int] = set()  # addresses in views and tables made since the last call

    def start_anew(self) -> None:
        """No launches, no error of an earlier one, and the first seed."""
        self._library.hlip_runtime_forget()
        self.launches.clear()
        self.seed = 0

    def lowered(self) -> int:
        """How often, since in_use() was entered, a kernel was allowed less shared memory than before."""
        return self._library.hlip_runtime_lowered()

    def kernel(self, name: str) -> Kernel:
        """An entry of the library, or what replaces it."""
        if name in self.replaced:
            return self.replaced[name]
        if name not in self._kernels:
            self._kernels |= parse(self.texts[name])
        return self._kernels[name]

    @contextlib.contextmanager
    def in_use(self, capability: tuple[int, int] = (8, 0), multiprocessors: int = 3) -> Iterator[Extension]:
        """hlip_kernels.native takes CPU tensors to be on a card of this kind, and runs this extension."""
        self._library.hlip_runtime_start(self._callback, multiprocessors, shared_memory(capability))
        asked = torch.Tensor.data_ptr

        def data_ptr(x):
            address = asked(x)
            if x.device.type == "cpu" and x.numel():
                last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                self._handed[address] = max(self._handed.get(address, 0), (last + 1) * x.itemsize)
            return address

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_C", _Module(self))
            patch.setattr(native, "_target", lambda x: contextlib.nullcontext(self.module.Target(False, STREAM)))
            patch.setattr(torch.Tensor, "data_ptr", data_ptr)
            yield self

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """hlip_kernels.native runs the host loops of this extension."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "_C", self.module)
            yield

    def call(self, name: str, arguments: tuple):
        """Calls a function of the module. Its kernels may use the tensors whose addresses it was given, and nothing else."""
        named = self._named.union(a for a in arguments if type(a) is int)
        written = {arguments[i] for i in WRITTEN[name]}
        self._memory, self._error = Memory(), None
        for address, size in self._handed.items():
            if address in named:
                self._memory.allow(address, size, writable=address in written)
        self._handed, self._named = {}, set()
        try:
            result = getattr(self.module, name)(*arguments)
        except RuntimeError as failed:
            if self._error is None:
                raise
            raise self._error from failed
        if self._error is not None:
            raise self._error
        return result

    def _launch(self, name, grid, block, shared, stream, arguments) -> int:
        """What the runtime calls for a launch. Whatever goes wrong here is a failed launch there, and raised by call()."""
        try:
            launch = Launch(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, stream)
            status = self.fail(launch)
            if status:
                return status
            kernel = self.kernel(launch.kernel)
            if kernel.threads and math.prod(launch.block) > math.prod(kernel.threads):
                return OUT_OF_RESOURCES
            parameters = bytearray(kernel.parameter_bytes)
            for i, (_, offset, size) in enumerate(kernel.parameters):
                parameters[offset : offset + size] = ctypes.string_at(arguments[i], size)
            self.launches.append(launch)
            self.seed += 1
            self.execute(
                kernel, grid=launch.grid, block=launch.block, shared_bytes=shared, parameters=bytes(parameters),
                memory=self._memory, seed=self.seed,
            )  # fmt: skip
        except BaseException as error:
            self._error = error
            return LAUNCH_FAILURE
        return 0


class _Module:
    """Stands in for hlip_kernels._C: goes through Extension.call(), and notes the addresses in views and tables."""

    def __init__(self, extension: Extension):
        self._extension = extension

    def __getattr__(self, name: str):
        real = getattr(self._extension.module, name)
        if name in WRITTEN:
            return lambda *arguments: self._extension.call(name, arguments)
        if name in ("View", "Tables"):
            return functools.partial(self._noted, real)
        return real

    def _noted(self, real, *arguments):
        self._extension._named.update(arguments if real is self._extension.module.Tables else arguments[:1])
        return real(*arguments)


def extension(arch: str = "80") -> Extension:
    """The extension compiled for ``compute_80`` and so on, one a process; skips where it cannot be built."""
    return _loaded(arch)


_loaded = functools.cache(Extension)


class CompiledCudaBackend(CudaBackend):
    """The cuda backend as it is on a card of some capability and number of multiprocessors, but on CPU tensors."""

    def __init__(self, halves: bool = False, capability: tuple[int, int] = (9, 0), multiprocessors: int = 3, arch: str = "80"):
        super().__init__(halves)
        self.capability, self.multiprocessors, self.arch = capability, multiprocessors, arch

    def supports(self, query):
        return super().supports(dataclasses.replace(query, capability=self.capability))

    def forward(self, *given):
        with extension(self.arch).in_use(self.capability, self.multiprocessors):
            return super().forward(*given)

    def backward(self, *given):
        with extension(self.arch).in_use(self.capability, self.multiprocessors):
            return super().backward(*given)

    def _why_not_here(self, query):
        return "" if query.device_type == "cpu" else "compiled and executed: on the CPU only"

    def _capability(self, q):
        return self.capability

    def _packs(self, q, plan):
        return packs_of(plan, q.device, min(PACK_ROWS, max_rows(q.shape[-1], self.capability)))
