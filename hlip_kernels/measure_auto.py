"""Measures every backend on this machine and writes the table that ``backend="auto"`` goes by here.

    python -m hlip_kernels.measure_auto                       # bfloat16 (CPU: float32), head dim 64
    python -m hlip_kernels.measure_auto --dtype float16 bfloat16 --head-dim 64 128

For each band of segment lengths a batch of segments of the band's longest is attended forward and backward by all backends that
can, in turn, and the fastest is noted. Other dtypes and head dims keep the shipped table. ``--out`` and HLIP_KERNELS_AUTO name
another file than the user's own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from .backends import BACKENDS, Query, auto
from .layout import Layout
from .ops import attention
from .pattern import Plan
from .timing import host_seconds, timed

BANDS = (32, 64, 128, 208, 256, 432, 512, 1024, 2048, 4096, 16384)


def measure_band(length: int, dtype: torch.dtype, head_dim: int, *, rows: int, heads: int, rounds: int,
                 device: torch.device) -> dict[str, float]:  # fmt: skip
    """Backend -> median seconds of one forward and backward pass over segments of ``length`` rows, ``rows`` in all."""
    layout = Layout.from_lengths([length] * max(1, rows // length), levels=("segment",)).to(device)
    query = Query.of(torch.empty((0, heads, head_dim), dtype=dtype, device=device), Plan.of(layout.pattern("segment")))
    names = [name for name, backend in BACKENDS.items() if name != "reference" and backend.supports(query)]
    shape = (layout.num_rows, 3, heads, head_dim)
    qkv = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn((layout.num_rows, heads, head_dim), dtype=dtype, device=device)

    def once(name: str) -> None:
        out = attention(*qkv.unbind(1), layout, "segment", backend=name)
        torch.autograd.grad(out, qkv, grad)

    hosts: dict[str, float] = {}
    for name in names:
        try:
            for _ in range(2):  # compile, lay out tiles
                once(name)
            hosts[name] = host_seconds(lambda name=name: once(name), device)
        except Exception as error:  # one that does not run here is no reason to measure none
            print(f"{name} at {length} rows left out: {type(error).__name__}: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {name: [] for name in hosts}
    for _ in range(rounds):
        for name, host in hosts.items():
            times[name].append(timed(lambda name=name: once(name), device, host))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def lines_of(
    measured: dict[int, dict[str, float]], device: torch.device, dtype: torch.dtype, head_dim: int
) -> list[auto.Choice]:
    """A line for each run of bands with one winner; the last holds for whatever is longer."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None
    lines: list[auto.Choice] = []
    for length, seconds in measured.items():
        best = min(seconds, key=seconds.__getitem__)
        figures = ", ".join(f"{backend} {1e3 * s:.3g} ms" for backend, s in sorted(seconds.items(), key=lambda item: item[1]))
        evidence = f"measured on {name}, torch {torch.__version__}: {figures} at {length} rows"
        line = auto.Choice(device.type, best, evidence, capability, str(dtype).removeprefix("torch."), head_dim, length)
        if lines and lines[-1].backend == best:
            lines.pop()
        lines.append(line)
    if lines:
        last = lines.pop()
        lines.append(auto.Choice(**{**vars(last), "longest": None}))
    return lines


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m hlip_kernels.measure_auto", description=__doc__.split("\n\n")[0])
    dtypes = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32)}
    parser.add_argument("--dtype", nargs="+", choices=list(dtypes), default=["bfloat16" if cuda else "float32"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64])
    parser.add_argument("--heads", type=int, default=12 if cuda else 2)
    parser.add_argument("--rows", type=int, default=65536 if cuda else 4096, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--bands", nargs="+", type=int, default=[n for n in BANDS if cuda or n <= 4096])
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=auto.user_path(), help="default: %(default)s")
    args = parser.parse_args(argv)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    lines: list[auto.Choice] = []
    for dtype in args.dtype:
        for head_dim in args.head_dim:
            measured = {}
            for length in sorted(args.bands):
                seconds = measure_band(
                    length, dtypes[dtype], head_dim, rows=args.rows, heads=args.heads, rounds=args.rounds, device=device
                )
                if seconds:
                    measured[length] = seconds
                figures = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items()) or "no backend can"
                print(f"{dtype}, head dim {head_dim}, segments of {length} rows: {figures}", flush=True)
            lines += lines_of(measured, device, dtypes[dtype], head_dim)
    auto.write(lines, args.out)
    print(f"\nwritten to {args.out}:")
    for line in lines:
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
