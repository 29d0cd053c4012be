"""The CUDA extension as nvcc makes it, on CPU tensors: its host code runs, and each kernel it launches is executed here.

The library is built with nvcc from csrc as it stands, with runtime.cpp in place of the CUDA runtime and with PTX alone in it.
What is executed is the code the library itself registers with the runtime.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hlip_kernels import native
from hlip_kernels.backends.cuda import HEAD_DIMS, CudaBackend, max_rows, shared_memory
from hlip_kernels.packs import PACK_ROWS, packs_of

from .machine import launch as run_grid
from .memory import Memory
from .program import Kernel, parse

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
RUNTIME = Path(__file__).with_name("runtime.cpp")
sys.path.insert(0, str(ROOT / "tools"))

import cuda_resources  # noqa: E402

# Those of CMakeLists.txt's Release build.
RELEASE = ("-std=c++17", "-O3", "-DNDEBUG")
DEVICE_ONLY = ("--expt-extended-lambda",)  # of the sources that are compiled with the module itself
# Symbolic: the names of the runtime are this library's own, whatever else has been loaded (torch brings the real one).
LINK = ("-shared", "-Wl,-Bsymbolic")
JOBS = 2


# ---------------------------------------------------------------- building


def nvcc() -> str:
    """Path of nvcc; skips where there is none."""
    try:
        return cuda_resources.find_nvcc()
    except cuda_resources.ToolError as error:
        pytest.skip(str(error))


def _includes() -> list[str]:
    """Flags for Python's headers and pybind11's, of its package or of torch, which brings them; skips without."""
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").exists():
        pytest.skip(f"{python} has no Python.h: install the headers of this Python")
    folders = [Path(torch.__file__).parent / "include"]
    if importlib.util.find_spec("pybind11"):
        import pybind11

        folders.insert(0, Path(pybind11.get_include()))
    found = next((f for f in folders if (f / "pybind11" / "pybind11.h").exists()), None)
    if found is None:
        pytest.skip("the extension needs pybind11, or the headers of it that torch brings")
    return ["-I", python, "-isystem", str(found)]


def _host_compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("the extension needs g++ (or CXX)")
    return found


def ptx(source: Path, arch: str, *flags: str) -> dict[str, str]:
    """What nvcc makes of the device code of a source: a module for each entry, by its mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.ptx")
        _run([nvcc(), *RELEASE, *flags, f"-arch=compute_{arch}", "-ptx", str(source), "-o", str(made)])
        return _entries(re.sub(r"//[^\n]*", "", made.read_text()))


@functools.cache
def built(arch: str) -> Path:
    """The library, compiled once for all processes: the file stays in the temporary folder, named by all it was made of."""
    folder = Path(tempfile.gettempdir(), f"hlip-compiled-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's code must not be loaded
        folder = Path(tempfile.mkdtemp(prefix="hlip-compiled-"))
    while True:
        digest = _made_of(arch)
        kept = folder / f"{digest}.so"
        with open(folder / f"{digest}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, others wait for what it makes
            if kept.exists():
                return kept
            for old in folder.iterdir():  # of other sources; a process that still has it loaded keeps it
                if time.time() - old.stat().st_mtime > 24 * 3600:
                    old.unlink(missing_ok=True)
            with tempfile.TemporaryDirectory() as own:
                made = _build(arch, Path(own))
                if _made_of(arch) == digest:  # else somebody is editing
                    shutil.move(made, kept.with_suffix(".part"))
                    os.replace(kept.with_suffix(".part"), kept)


def _made_of(arch: str) -> str:
    """A digest of everything that decides what is compiled."""
    compilers = [nvcc(), _host_compiler()]
    facts = [sys.version, torch.__version__, *(str(Path(c).resolve().stat().st_mtime_ns) for c in compilers)]
    digest = hashlib.sha256("\0".join([*facts, repr(_commands(arch)), repr(LINK)]).encode())
    for path in [RUNTIME, *sorted(p for p in CSRC.rglob("*") if p.is_file())]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _commands(arch: str) -> list[list[str]]:
    """What compiles each source, the slowest first."""
    cuda = [nvcc(), *RELEASE, f"-gencode=arch=compute_{arch},code=compute_{arch}", "-no-compress", "-cudart=none",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wno-unknown-pragmas"]  # fmt: skip
    host = [_host_compiler(), "-std=c++17", "-O1", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
    # pybind11 keeps one list of types for all modules that agree in this name: two builds must not meet there.
    own = f'-DPYBIND11_COMPILER_TYPE="_hlip_compiled_{arch}"'
    named = [f'-DHLIP_ARCHITECTURES="{arch}"', f'-DHLIP_NVCC_VERSION="{cuda_resources.nvcc_version()}"']
    launch = str(CSRC / "short_attention" / "launch.cu")
    return [
        [*host, *_includes(), own, *named, str(CSRC / "bindings.cpp")],
        *([*cuda, f"-DHLIP_HEAD_DIM={head_dim}", launch] for head_dim in HEAD_DIMS[::-1]),
        *([*cuda, *DEVICE_ONLY, str(CSRC / name)] for name in ("patchify.cu", "segment.cu")),
        [*host, "-isystem", str(_cuda_include()), str(RUNTIME)],
    ]


def _build(arch: str, folder: Path) -> Path:
    """Compiles the sources side by side, and links them."""
    commands = _commands(arch)
    objects = [str(folder / f"{i}.o") for i in range(len(commands))]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(_run, ([*c, "-c", "-o", o] for c, o in zip(commands, objects, strict=True))))
    made = folder / "_C.so"
    _run([_host_compiler(), *LINK, *objects, "-o", str(made)])
    return made


@functools.cache
def _cuda_include() -> Path:
    """CUDA's headers, of the toolkit that nvcc belongs to."""
    said = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    folders = [Path(f) for f in re.findall(r'-I"?([^"\s]+)"?', said)]
    found = next((f for f in folders if (f / "cuda_runtime_api.h").exists()), None)
    assert found, f"nvcc names no folder with CUDA's headers:\n{said[-2000:]}"
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-6000:]}"


# ---------------------------------------------------------------- code in the library


def _texts(image: int) -> Iterator[str]:
    """The PTX in a fat binary at an address: a header, then pieces with a header each."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(image, 16))
    assert magic == 0xBA55ED50, f"not a fat binary: {magic:#x}"
    at, end = image + header, image + header + size
    while at < end:
        kind, _, header, size, compressed = struct.unpack("<HHIQI", ctypes.string_at(at, 20))
        assert kind == 1 and compressed == 0, f"something other than plain PTX (kind {kind}, {compressed} bytes compressed)"
        yield ctypes.string_at(at + header, size).rstrip(b"\0").decode()
        at += header + size


def _entries(text: str) -> dict[str, str]:
    """A module for each entry of one, with what is declared outside of entries: so only what runs need be parsed."""
    entry = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)")
    brace = re.compile(r"[{}]")
    outside, found, at = "", {}, 0
    while start := entry.search(text, at):
        outside += text[at : start.start()]
        depth, at = 0, start.end()
        while True:
            one = brace.search(text, at)
            depth += 1 if one.group() == "{" else -1
            at = one.end()
            if depth == 0:
                break
        found[start.group(1)] = text[start.start() : at]
    return {name: f"{outside}\n{body}\n" for name, body in found.items()}


# ---------------------------------------------------------------- running


def readable(name: str) -> str:
    """What a mangled name is an instantiation of, e.g. ``SumChunk<float, 4>``: of kernels that take one, the functor."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = demangle(name.encode(), None, None, ctypes.byref(status))
    assert found, f"not a mangled name: {name}"
    words = ctypes.string_at(found).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    return re.search(r"\w+<[^<>]*>", words).group()


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
            for text in _texts(image):
                self.texts |= _entries(text)
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
