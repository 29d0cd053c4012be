"""What was found, built and chosen here, and why: ``python -m hlip_kernels.info``."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, native
from .backends import BACKENDS, Query, auto, decide
from .backends.flash import FlashBackend

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

    lines += ["", "CUDA extension (segment_mean, switch_level, patchify, attention over short segments):"]
    missing = native.why_missing()
    if missing:
        lines.append(f"  not built: {missing}")
        lines.append("  the same functions run in plain torch")
    else:
        archs = ", ".join(f"sm_{a}" for a in native.architectures())
        lines.append(f"  built for {archs} with nvcc {native.nvcc_version()}; not yet run on a GPU")
        lines += [f"  {line}" for line in [*_memory_bound(), *_short_attention()]]

    own = "measured here" if auto.user_path().exists() else "none; python -m hlip_kernels.measure_auto makes one"
    lines += ["", f"table of auto measured on this machine ({auto.user_path()}): {own}", "", "attention backends:"]
    for query in _queries():
        line = decide(query)
        lines.append(f"  {query}:")
        lines.append(f"    auto           {line.backend}: {line.evidence}")
        for name, backend in BACKENDS.items():
            lines.append(f"    {name:14} {backend.supports(query)}")
    if "flash" in BACKENDS:
        gpu = _queries()[-1]
        lines += ["", f"the flash backend delegates to the first of these that can, here for {gpu}:"]
        lines += [f"  {line}" for line in flash_attention(gpu, BACKENDS["flash"])]
    lines += [
        "",
        "not run on a GPU yet:",
        "  the triton kernels: tested in triton's interpreter and compiled for sm_80, sm_90, sm_100 and gfx942",
        "  the cuda kernels: tested in an emulator of a thread block",
        "  the hopper kernels: tested in an emulator of Gluon and compiled for sm_90",
        "  the flash backend: tested around a stand-in",
    ]
    return "\n".join(lines)


def _memory_bound() -> list[str]:
    """The kernels that move rows and voxels: one for every combination of types named here."""
    floats, voxels = (_names(types) for types in (native.FLOAT_TYPES, native.VOXEL_TYPES))
    return [
        f"segment_mean, switch_level, forward and backward: rows of {floats}",
        f"patchify: voxels of {voxels}, each to rows of {floats};",
        f"  backward: voxels of {floats}, each from rows of {floats}",
        "  (each in vectors of 16 bytes where widths and addresses allow, else element by element, for any number of channels",
        "  and any patch below 2^31 - 1 voxels; float64 takes plain torch)",
    ]


def _names(types: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in types)


def _short_attention() -> list[str]:
    """The short-segment kernels there are, and how long a segment each card lets them hold."""
    from .backends.cuda import HEAD_DIMS, SHARED_MEMORY, max_rows
    from .backends.cuda_whole import HEAD_DIMS as WHOLE_HEAD_DIMS
    from .backends.cuda_whole import ROWS, whole_rows
    from .packs import PACK_ROWS

    lines = ["attention over short segments, float16 and bfloat16, at each head dim: forward, for packs of up to"]
    lines.append(
        f"{PACK_ROWS} rows and for segments of more than {PACK_ROWS // 2}, and backward; longest segment (prefix rows counted),"
    )
    lines.append("by the shared memory of a block:")
    for size in sorted(set(SHARED_MEMORY.values())):
        cards = [capability for capability, shared in SHARED_MEMORY.items() if shared == size]
        names = ", ".join(f"sm_{major}{minor}" for major, minor in cards)
        limits = ", ".join(f"{max_rows(d, cards[0])} at {d}" for d in HEAD_DIMS)
        lines.append(f"  {size >> 10} KB ({names}): {limits}")
    lines.append(f"backward of whole segments of more than {PACK_ROWS // 2} rows (blocks of 4 warps, and of 8):")
    for size in sorted(set(SHARED_MEMORY.values())):
        least = (PACK_ROWS // 2, ROWS[0])
        found = [
            f"{d}: {', '.join(f'{a + 1} to {b}' for a, b in zip(least, whole_rows(d, size), strict=True) if b > a) or 'none'}"
            for d in WHOLE_HEAD_DIMS
        ]
        lines.append(f"  {size >> 10} KB: head dim {'; '.join(found)}")
    return lines


def flash_attention(query: Query, backend: FlashBackend) -> list[str]:
    """Each implementation that the flash backend knows, its version, and whether the query would go to it."""
    chosen = backend.implementation(query)
    lines = []
    for implementation, (name, why) in zip(backend.implementations, backend.reasons(query), strict=True):
        found = f"{name} {implementation.version()}".strip()
        lines.append(f"{name}: {why}" if why else f"{found}: {'would' if implementation is chosen else 'could'} be used")
    return lines


def _queries() -> list[Query]:
    """Typical questions: of a CPU, and of the GPU at hand or else of an sm_90, for segments of several lengths."""
    queries = [Query("cpu", None, torch.float32, 64)]
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return queries + [Query("cuda", capability, torch.bfloat16, 64, longest) for longest in (100, 198, 9000)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    print(report())
    sys.exit(0)
