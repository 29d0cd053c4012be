"""Compiles kernels for the emulator of csrc/device/emulated.h: g++ with AddressSanitizer and UBSan, no GPU and no nvcc."""

import functools
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@functools.cache
def compiler() -> str:
    """The path of g++ (or of CXX), once it has been seen to link with the sanitizers' libraries."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("the emulator needs g++ (or CXX)")
    command = [found, "-x", "c++", "-std=c++17", *SANITIZERS, "-", "-o", os.devnull]
    done = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{found} cannot build with AddressSanitizer and UBSan: {done.stderr[-300:]}")
    return found


@functools.cache
def cuda_include() -> Path:
    """The folder of CUDA's headers: of a toolkit, or of one of NVIDIA's Python packages."""
    folders = [Path(os.environ[name], "include") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders.append(Path("/usr/local/cuda/include"))
    for packages in dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(), *sys.path]):
        folders += sorted(Path(packages).glob("nvidia/*/include"))
    for folder in folders:
        if (folder / "cuda_fp16.h").exists() and (folder / "cuda_runtime.h").exists():
            return folder
    pytest.skip("the emulator needs CUDA's headers: a toolkit (CUDA_HOME), or the nvidia-cuda-runtime package")


def build(source: Path, output: Path, *defines: str, shared: bool = False, sanitized: bool = True) -> Path:
    """Compiles one source file to the program (or the shared library) `output`, which it returns.

    Skips the test where that cannot be done here. A library with the sanitizers must be loaded into a process in which
    theirs is preloaded (see preload()).
    """
    command = [compiler(), "-std=c++17", *(["-O1", "-g", *SANITIZERS] if sanitized else ["-O2"]), "-DHLIP_EMULATED"]
    command += [*(f"-D{d}" for d in defines), "-I", str(CSRC), "-isystem", str(cuda_include())]
    command += ["-fPIC", "-shared"] if shared else []
    done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr[-6000:]}"
    return output


def preload() -> str:
    """What LD_PRELOAD must name in a process that loads a sanitized library."""
    # The C++ library too: the sanitizer looks for what it intercepts (throwing) when it starts, before torch brings that.
    return " ".join(
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program of build(), and fails with what it said if it did not exit with 0."""
    # Without the search for leaks: it cannot run where tracing is not allowed (containers), and kernels allocate nothing.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (
        f"{program.name} {' '.join(arguments)} exited with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    )
    return done
