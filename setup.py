"""Builds the CUDA extension with CMake when nvcc is there, and leaves it out, saying so, when it is not.

Environment:
    HLIP_BUILD_CUDA   0: never build it. 1: fail when it cannot be built. Unset: build it if nvcc is found.
    HLIP_CUDA_ARCHS   e.g. "80;90". Default: the architecture of the local GPUs, else 80 and 90.
    CUDA_HOME         where CUDA lives, when nvcc is not on the PATH.
    MAX_JOBS          how many compilers to run at once.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90"


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    candidates = [shutil.which("nvcc")]
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            candidates.append(str(Path(home) / "bin" / "nvcc"))
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def cuda_architectures() -> str:
    """CMake's list of architectures, e.g. "80;90"."""
    asked = os.environ.get("HLIP_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";").replace(".", "").strip(";")
    if asked:
        return asked
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return DEFAULT_ARCHS
    archs = sorted({cap.replace(".", "") for cap in found if cap.replace(".", "").isdigit()})
    return ";".join(archs) or DEFAULT_ARCHS


def say(message: str) -> None:
    print(f"hlip-kernels: {message}", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Runs CMake and ninja instead of setuptools' own compiler calls."""

    def run(self) -> None:
        wanted = os.environ.get("HLIP_BUILD_CUDA", "")
        nvcc = find_nvcc()
        reason = ""
        if wanted == "0":
            reason = "HLIP_BUILD_CUDA=0"
        elif nvcc is None:
            reason = "nvcc was not found (looked on PATH, in CUDA_HOME and /usr/local/cuda)"
        else:
            try:
                self.build(nvcc)
            except (OSError, subprocess.CalledProcessError) as error:
                if wanted == "1":
                    raise
                reason = f"building it failed: {error}"
        if reason and wanted == "1":
            raise RuntimeError(f"HLIP_BUILD_CUDA=1, but the CUDA extension cannot be built: {reason}")
        if reason:
            say(f"the CUDA extension is left out, everything else works: {reason}")
        # pip hides this output, so python -m hlip_kernels.info repeats it from here.
        output = self.output_folder()
        output.mkdir(parents=True, exist_ok=True)
        (output / "_build_note.txt").write_text(reason + "\n" if reason else "built\n")

    def output_folder(self) -> Path:
        if self.editable_mode:
            return ROOT / "hlip_kernels"
        return Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent

    def build(self, nvcc: str) -> None:
        import pybind11

        archs = cuda_architectures()
        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # A cache from another environment (an earlier isolated build) names tools that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        say(f"building the CUDA extension for architectures {archs} with {nvcc}")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={archs}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHLIP_OUTPUT_DIRECTORY={self.output_folder()}",
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)


setup(ext_modules=[Extension("hlip_kernels._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
