"""What was found, built and chosen here, and why: ``python -m hlip_kernels.info``."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, native
from .backends import BACKENDS, Query, choose

_PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "timm", "transformers", "accelerate", "SimpleITK", "pydicom")


def report() -> str:
    """The report, as text."""
    lines = [f"hlip-kernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    lines.append("packages: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))

    lines += ["", "devices:"]
    lines.append(f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            kind = p.gcnArchName if torch.version.hip else f"sm_{p.major}{p.minor}"
            lines.append(
                f"  cuda:{i}: {p.name}, {kind}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors"
            )
    else:
        lines.append("  cuda: none found" + ("" if torch.backends.cuda.is_built() else " (this torch is built without CUDA)"))

    lines += ["", "CUDA extension (segment_mean, switch_level, patchify):"]
    why = native.why_missing()
    if why:
        lines.append(f"  not built: {why}")
        lines.append("  the same functions run in plain torch")
    else:
        archs = ", ".join(f"sm_{a}" for a in native.architectures())
        lines.append(f"  built for {archs} with nvcc {native.nvcc_version()}; not yet run on a GPU")

    lines += ["", "attention backends:"]
    for query in _queries():
        lines.append(f"  {query}: auto = {choose(query, 'auto').name}")
        for name, backend in BACKENDS.items():
            lines.append(f"    {name:10} {backend.supports(query)}")
    if "triton" in BACKENDS:
        lines.append(
            "  the triton kernels are tested in triton's interpreter and compiled for sm_80, sm_90, sm_100 and gfx942;"
        )
        lines.append("  not yet run on a GPU")
    return "\n".join(lines)


def _queries() -> list[Query]:
    """One typical question for each device at hand."""
    queries = [Query("cpu", None, torch.float32, 64)]
    if torch.cuda.is_available():
        queries.append(Query("cuda", torch.cuda.get_device_capability(), torch.bfloat16, 64, longest=198))
    else:
        queries.append(Query("cuda", (9, 0), torch.bfloat16, 64, longest=198))
    return queries


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    print(report())
    sys.exit(0)
