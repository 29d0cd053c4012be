"""How a call is timed: the same way for every implementation, with what a row needs to be believed."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from hlip_kernels.timing import host_seconds, timed


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def full_size() -> bool:
    """Full workloads on a GPU, scaled-down ones on a CPU."""
    return device().type == "cuda"


def dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


@cache
def machine() -> dict[str, str]:
    """Where rows are measured: device, versions, commit."""
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "triton": _version("triton"), "commit": _commit(),
            "python": platform.python_version()}  # fmt: skip


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _commit() -> str:
    """Of the checkout, with a plus sign where files differ from it; what HLIP_COMMIT says where there is no checkout."""
    try:
        root = Path(__file__).resolve().parent
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HLIP_COMMIT", "-")


@cache
def ceilings() -> tuple[float, float]:
    """(matmul FLOP/s, copy bytes/s) of this device, measured here and now: the two rates a floor is made of."""
    d, t = device(), dtype()
    n = 8192 if d.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=d, dtype=t) for _ in range(2))
    flops = 2 * n**3 / _best(lambda: a @ b)
    x = torch.randn((2**28 if d.type == "cuda" else 2**25), device=d)
    y = torch.empty_like(x)
    return flops, 2 * x.numel() * 4 / _best(lambda: y.copy_(x))


def _best(call: Callable[[], object], repeats: int = 10) -> float:
    for _ in range(3):
        call()
    host = host_seconds(call, device())
    return statistics.median(timed(call, device(), host) for _ in range(repeats))


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device=device())


def _flush() -> None:
    """Leaves nothing of the last call in a GPU's caches. (pytest-benchmark wants None of a setup.)"""
    _flush_buffer().zero_()


class _Measured:
    """One implementation, warmed up: how long a call takes, and of that the host to queue it."""

    def __init__(self, call: Callable[[], object]):
        self.call, self.times = call, []
        call()  # compile, allocate
        self.seconds = timed(call, device())
        if self.seconds < SLOW[device().type]:
            self.seconds = timed(call, device())
        self.host = host_seconds(call, device()) if self.seconds < SLOW[device().type] else 0.0

    def once(self) -> None:
        self.times.append(timed(self.call, device(), self.host))


SLOW = {"cuda": 0.05, "cpu": 0.5}  # seconds from which on there is nothing left to warm
ENOUGH = {"cuda": 0.5, "cpu": 1.0}  # seconds of rounds


def rounds_of(seconds: float, kind: str) -> int:
    """How often a call of so many seconds is timed on a GPU (``"cuda"``) or a CPU: 30 times if there is time."""
    return min(30, max(3 if kind == "cuda" else 5, round(ENOUGH[kind] / max(seconds, 1e-9))))


def run(
    benchmark, call: Callable[[], object], *, flops: float = 0.0, nbytes: float = 0.0, rounds: int = 0,
    beside: dict[str, Callable[[], object]] | None = None, **row,
) -> None:  # fmt: skip
    """Measures ``call`` with pytest-benchmark, cold cache on a GPU, and notes what the report needs.

    Args:
        benchmark: pytest-benchmark's fixture. call: takes nothing.
        flops, nbytes: the work of one call, for the floor.
        rounds: default as :func:`rounds_of` says.
        beside: other implementations by name, to measure in turn with ``call``, round by round. A machine that changes its
            speed between two tests does so for all of them alike. Each gets a row of its own.
        row: labels of the row: workload, level, pass, implementation.
    """
    cuda = device().type == "cuda"
    main, others = _Measured(call), {name: _Measured(other) for name, other in (beside or {}).items()}
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated()

    def once():
        for measured in (main, *others.values()):
            measured.once()

    benchmark.pedantic(once, setup=_flush if cuda else None, rounds=rounds or rounds_of(main.seconds, device().type))
    rate, bandwidth = ceilings()
    benchmark.extra_info.update(machine())
    benchmark.extra_info.update(
        row, dtype=str(dtype()).removeprefix("torch."), flops=flops, bytes=nbytes, seconds=sorted(main.times),
        beside={name: sorted(other.times) for name, other in others.items()}, matmul_flops=rate, copy_bandwidth=bandwidth,
    )  # fmt: skip


def predicted(workload, level: str, implementation: str, *, backward: bool) -> dict[str, float]:
    """What the performance model expects here, both bounds, at this card's own measured rates.

    Empty for other implementations than ours, and on a device or head dim the model knows nothing of.
    """
    from hlip_kernels.backends.hopper.config import HEAD_DIMS
    from hlip_kernels.performance import RATES, predict
    from hlip_kernels.performance_hopper import predict_hopper
    from hlip_kernels.performance_short import predict_short

    in_one = partial(predict_hopper, fused=True)
    model = {
        "hlip triton": predict, "hlip triton fast": partial(predict, deterministic=False), "hlip cuda": predict_short,
        "hlip cuda_halves": partial(predict_short, halves=True),
        "hlip hopper": predict_hopper, "hlip hopper fast": in_one, "hlip hopper_ordered": in_one,
    }.get(implementation)  # fmt: skip
    if implementation.startswith("hlip hopper") and workload.head_dim not in HEAD_DIMS:
        return {}
    rates = next((r for name, r in RATES.items() if device().type == "cuda" and name in torch.cuda.get_device_name()), None)
    if rates is None or model is None:
        return {}
    p = model(
        workload.layout, level, heads=workload.heads, head_dim=workload.head_dim, dtype=dtype(),
        rates=rates.measured(*ceilings()), backward=backward,
    )  # fmt: skip
    return {"predicted_overlapped_s": p.overlapped, "predicted_serial_s": p.serial}


def relative_error(got: Tensor, truth: Tensor) -> float:
    """``|got - truth| / |truth|`` in float64."""
    truth = truth.double()
    return float((got.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def tolerance() -> float:
    """What relative error the rows' correctness gate lets through: a few roundings of the dtype."""
    return {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype()]
