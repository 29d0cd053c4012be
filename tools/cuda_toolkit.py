"""nvcc and the tools that read what it makes: where they are, and how our CUDA sources are compiled with them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SOURCE = CSRC / "short_attention" / "launch.cu"
# Those of CMakeLists.txt's Release build that reach the device code, so that what is looked at is what is shipped.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")


class ToolError(RuntimeError):
    """Something that is needed is not there, or does not do what is asked of it; says what to do."""


def find_nvcc() -> str:
    """Path of nvcc, found where setup.py finds it."""
    candidates = [shutil.which("nvcc")]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            candidates.append(str(Path(home) / "bin" / "nvcc"))
    found = next((c for c in candidates if c and os.access(c, os.X_OK)), None)
    if found is None:
        raise ToolError("nvcc was not found: install a CUDA toolkit, and put it on PATH or name it in CUDA_HOME")
    return found


@functools.cache
def find_binary(name: str) -> str:
    """Path of one of the CUDA binaries: of the toolkit, else of triton."""
    places = [Path(find_nvcc()).resolve().parent]
    try:
        import triton
    except ImportError:
        pass
    else:
        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    found = next((str(p / name) for p in places if os.access(p / name, os.X_OK)), None) or shutil.which(name)
    if found is None:
        raise ToolError(f"{name} was not found: it comes with a whole CUDA toolkit, and with triton (pip install triton)")
    return found


def run(*command, stdin: str | None = None) -> str:
    """What a command prints; what it says when it fails becomes the error."""
    done = subprocess.run([str(c) for c in command], input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise ToolError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return done.stdout


@functools.cache
def nvcc_version() -> str:
    """major.minor of nvcc."""
    text = run(find_nvcc(), "--version")
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise ToolError(f"{find_nvcc()} --version does not name a release: {text}")
    return found.group(1)


def why_not(arch: str) -> str:
    """Why nvcc cannot compile for an architecture, or ``""``."""
    if arch in run(find_nvcc(), "--list-gpu-code").split():
        return ""
    return f"nvcc {nvcc_version()} does not know {arch}: it takes a newer one"


def cubin_arguments(arch: str) -> list[str]:
    """How a source is compiled to machine code of one architecture."""
    number = arch.removeprefix("sm_")
    return [*FLAGS, "-cubin", "-gencode", f"arch=compute_{number},code={arch}"]


def compile_cubin(source: Path, arch: str, output: Path, *flags: str) -> Path:
    """Compiles one source to machine code of one architecture."""
    run(find_nvcc(), *cubin_arguments(arch), *flags, "-I", CSRC, "-o", output, source)
    return output


@functools.cache
def source_digest(arch: str, *readers) -> str:
    """Of all that figures of csrc/ on an architecture follow from: its text, its arguments, the compiler, and what reads them.

    Args:
        readers: functions and modules that make figures of the machine code.

    Returns:
        16 hexadecimal digits.
    """
    parts = [run(find_nvcc(), "--version"), *cubin_arguments(arch)]
    parts += [os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")]
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")):
        parts += [path.relative_to(CSRC).as_posix(), path.read_text(encoding="utf-8")]
    parts += map(inspect.getsource, readers)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
