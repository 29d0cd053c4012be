"""How a call is timed: the same way for every implementation, with what a row needs to be believed."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor


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
    try:
        root = Path(__file__).resolve().parent
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "-"


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
    times = []
    for _ in range(3):
        call()
    for _ in range(repeats):
        times.append(timed(call))
    return sorted(times)[len(times) // 2]


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call: device time by events on a GPU, wall time on a CPU."""
    if device().type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device=device())


def run(
    benchmark, call: Callable[[], object], *, flops: float = 0.0, nbytes: float = 0.0, rounds: int = 0,
    beside: dict[str, Callable[[], object]] | None = None, **row,
) -> None:  # fmt: skip
    """Measures ``call`` with pytest-benchmark, cold cache on a GPU, and notes what the report needs.

    Args:
        benchmark: pytest-benchmark's fixture. call: takes nothing.
        flops, nbytes: the work of one call, for the floor.
        rounds: default 30 on a GPU; on a CPU as many as take a second, 5 to 30.
        beside: other implementations by name, to measure in turn with ``call``, round by round. A machine that changes its
            speed between two tests does so for all of them alike. Each gets a row of its own.
        row: labels of the row: workload, level, pass, implementation.
    """
    beside = beside or {}
    d = device()
    cuda = d.type == "cuda"
    for _ in range(3):  # compile, allocate, warm up
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        if not cuda and seconds > 0.5:  # nothing left to warm
            break
    for other in beside.values():
        for _ in range(1 if not cuda and seconds > 0.5 else 3):
            other()
    if not cuda:
        rounds = rounds or min(30, max(5, round(1 / seconds)))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    device_times: list[float] = []
    other_times: dict[str, list[float]] = {name: [] for name in beside}

    def once():
        device_times.append(timed(call))
        for name, other in beside.items():
            other_times[name].append(timed(other))

    benchmark.pedantic(once, setup=(lambda: _flush_buffer().zero_()) if cuda else None, rounds=rounds or 30)
    rate, bandwidth = ceilings()
    benchmark.extra_info.update(machine())
    benchmark.extra_info.update(
        row, dtype=str(dtype()).removeprefix("torch."), flops=flops, bytes=nbytes, seconds=sorted(device_times),
        beside={name: sorted(times) for name, times in other_times.items()}, matmul_flops=rate, copy_bandwidth=bandwidth,
    )  # fmt: skip


def predicted(workload, level: str, implementation: str, *, backward: bool) -> dict[str, float]:
    """What the performance model expects here, both bounds, at this card's own measured rates.

    Empty for other implementations than ours, and on a device or head dim the model knows nothing of.
    """
    from hlip_kernels.backends.hopper.config import BACKWARD_DQ
    from hlip_kernels.performance import RATES, predict
    from hlip_kernels.performance_hopper import predict_hopper
    from hlip_kernels.performance_short import predict_short

    in_one = partial(predict_hopper, fused=True)
    model = {
        "hlip triton": predict, "hlip triton fast": partial(predict, deterministic=False), "hlip cuda": predict_short,
        "hlip cuda_halves": partial(predict_short, halves=True),
        "hlip hopper": predict_hopper, "hlip hopper fast": in_one, "hlip hopper_ordered": in_one,
    }.get(implementation)  # fmt: skip
    if implementation.startswith("hlip hopper") and workload.head_dim not in BACKWARD_DQ:
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
