"""Builds the CUDA extension with nvcc from csrc as it stands, with PTX alone in it and runtime.cpp in place of the CUDA
runtime, and finds that PTX again in the library."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
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

import pytest
import torch

from hlip_kernels.backends.cuda import HEAD_DIMS

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
RUNTIME = Path(__file__).with_name("runtime.cpp")
sys.path.insert(0, str(ROOT / "tools"))

import cuda_toolkit  # noqa: E402

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
        return cuda_toolkit.find_nvcc()
    except cuda_toolkit.ToolError as error:
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
        return entries(re.sub(r"//[^\n]*", "", made.read_text()))


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
    named = [f'-DHLIP_ARCHITECTURES="{arch}"', f'-DHLIP_NVCC_VERSION="{cuda_toolkit.nvcc_version()}"']
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


def texts(image: int) -> Iterator[str]:
    """The PTX in a fat binary at an address: a header, then pieces with a header each."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(image, 16))
    assert magic == 0xBA55ED50, f"not a fat binary: {magic:#x}"
    at, end = image + header, image + header + size
    while at < end:
        kind, _, header, size, compressed = struct.unpack("<HHIQI", ctypes.string_at(at, 20))
        assert kind == 1 and compressed == 0, f"something other than plain PTX (kind {kind}, {compressed} bytes compressed)"
        yield ctypes.string_at(at + header, size).rstrip(b"\0").decode()
        at += header + size


def entries(text: str) -> dict[str, str]:
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
