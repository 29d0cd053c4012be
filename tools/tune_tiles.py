"""Times the Triton kernels with the tiles next to those that ``config.py`` ships, on this GPU.

    python tools/tune_tiles.py                                    # bfloat16, head dim 64, three minutes
    python tools/tune_tiles.py --head-dim 80 --kernel attention_forward --lengths 770 --out tiles.csv

One kernel at a time gets other tiles: query rows and key rows halved, as they are or doubled, 4 or 8 warps, one stage less or
more. What is timed is the pass the kernel is part of, forward or backward, over equal segments. Candidates are compiled side by
side first, those that need more shared memory than there is fall away, and the rest is timed in rounds, so that a clock that
drifts is the same for all. Prints the fastest beside the shipped ones; nothing is written into ``config.py``: what wins on one
card may spill with another triton (``python -m hlip_kernels.resources``), and tests hold the table to that.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hlip_kernels.backends.triton as backend
from hlip_kernels import Layout
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.triton.config import KERNELS, Config
from hlip_kernels.pattern import Plan
from hlip_kernels.timing import host_seconds, timed

TUNED = tuple(name for name in KERNELS if name != "attention_backward_delta")  # that one has no products
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One pass over one batch of equal segments."""

    kernel: str
    dtype: str
    head_dim: int
    heads: int
    length: int
    rows: int
    device: str

    def shipped(self) -> Config | None:
        """The kernel's own tiles; ``None`` where another kernel runs instead."""
        device, dtype = torch.device(self.device), DTYPES[self.dtype]
        fast = Numerics(deterministic=False)
        if self.kernel == "attention_backward_fused" and not backend.is_fused(device, dtype, self.head_dim, self.length, fast):
            return None
        return backend.config_for(self.kernel, dtype, self.head_dim, backend.tile_family(device))

    def make(self):
        """A function of a configuration that runs the pass once."""
        numerics = Numerics(deterministic=self.kernel != "attention_backward_fused")
        layout = Layout.from_lengths([self.length] * max(1, self.rows // self.length), levels=("segment",)).to(self.device)
        plan = Plan.of(layout.pattern("segment"))
        shape = (layout.num_rows, 3, self.heads, self.head_dim)
        q, k, v = torch.randn(shape, dtype=DTYPES[self.dtype], device=self.device).unbind(1)
        scale, triton = self.head_dim**-0.5, backend.TritonBackend()
        out, lse = triton.forward(q, k, v, plan, scale, numerics)
        grad = torch.randn_like(out)

        def once(config: Config) -> None:
            with tiles(self.kernel, config.on(self.head_dim)):
                if self.kernel == "attention_forward":
                    triton.forward(q, k, v, plan, scale, numerics)
                else:
                    triton.backward(grad, None, q, k, v, out, lse, plan, scale, numerics)

        return once


@contextlib.contextmanager
def tiles(kernel: str, config: Config):
    """While the block runs, ``kernel`` has these tiles."""
    shipped = backend.config_for
    backend.config_for = lambda name, *rest: config if name == kernel else shipped(name, *rest)
    try:
        yield
    finally:
        backend.config_for = shipped


def neighbours(shipped: Config) -> list[Config]:
    """The shipped configuration and those next to it, the least different first."""
    found = [shipped]
    sizes = [[n for n in (size // 2, size, 2 * size) if 16 <= n <= 256] for size in (shipped.block_m, shipped.block_n)]
    stages = [n for n in (shipped.num_stages - 1, shipped.num_stages, shipped.num_stages + 1) if n >= 1]
    for m, n, warps, count in itertools.product(*sizes, (4, 8), stages):
        config = replace(shipped, block_m=m, block_n=n, num_warps=warps, num_stages=count)
        if config != shipped and m * n <= 128 * 128:
            found.append(config)

    def different(config: Config) -> int:
        return sum(value != vars(shipped)[name] for name, value in vars(config).items())

    return sorted(found, key=different)


def try_once(case: Case, config: Config) -> str | None:
    """Runs one candidate; what was wrong with it, if anything."""
    try:
        replace(case, rows=case.length, heads=1 if case.device == "cpu" else case.heads).make()(config)
        if case.device != "cpu":
            torch.cuda.synchronize()
    except Exception as error:  # no candidate ends the run, whatever the compiler says of it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def compile_all(cases: list[Case], until: float, processes: int) -> dict[Case, list[Config]]:
    """The candidates of each case that run. What is next to the shipped tiles is tried first, of every case in turn."""
    wanted = [(case, neighbours(case.shipped())) for case in cases]
    turns = itertools.zip_longest(*([(case, config) for config in found] for case, found in wanted))
    jobs = [job for turn in turns for job in turn if job is not None]
    answers = []
    if processes < 2:
        for job in jobs:
            if time.monotonic() > until:
                break
            answers.append(try_once(*job))
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for answer in [pool.apply_async(try_once, job) for job in jobs]:
                try:
                    answers.append(answer.get(max(0.01, until - time.monotonic())))
                except multiprocessing.TimeoutError:
                    answers.append("no time")
    answers += ["no time"] * (len(jobs) - len(answers))
    if "no time" in answers:
        print(f"no time for {answers.count('no time')} of {len(jobs)} candidates", file=sys.stderr)
    for (case, config), wrong in zip(jobs, answers, strict=True):
        if wrong not in (None, "no time") and config == case.shipped():
            print(f"{case.kernel}: the shipped tiles do not run here: {wrong}", file=sys.stderr)
    return {case: [c for (of, c), wrong in zip(jobs, answers, strict=True) if of == case and wrong is None] for case in cases}


def time_all(case: Case, runs: list[Config], until: float, rounds: int) -> list[tuple[Config, float]]:
    """``(configuration, median seconds)``, the fastest first."""
    if not runs or time.monotonic() > until:
        return []
    once, device = case.make(), torch.device(case.device)
    times: dict[Config, list[float]] = {config: [] for config in runs}
    for config in runs:
        once(config)
    host = host_seconds(lambda: once(runs[0]), device)
    for done in range(rounds):
        if done and time.monotonic() > until:
            break
        for config in runs:
            times[config].append(timed(lambda config=config: once(config), device, host))
    return sorted(((config, statistics.median(seconds)) for config, seconds in times.items()), key=lambda pair: pair[1])


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernel", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if cuda else "float32")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--lengths", nargs="+", type=int, default=[770, 6000], help="rows of a segment (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=49152, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="for everything (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=min(8, (os.cpu_count() or 2) // 2) if cuda else 1)
    parser.add_argument("--show", type=int, default=5, help="how many of the fastest to print (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="every time, as CSV")
    args = parser.parse_args(argv)
    device = "cuda" if cuda else "cpu"
    cases = [
        Case(kernel, args.dtype, head_dim, args.heads, length, args.rows, device)
        for head_dim in args.head_dim for length in args.lengths for kernel in args.kernel
    ]  # fmt: skip
    cases = [case for case in cases if case.shipped() is not None]  # None: the kernel is not used there
    begin, rows = time.monotonic(), []
    # Kernels do not know lengths: compiled for the longest, they are there for all.
    compiled = compile_all(
        [case for case in cases if case.length == max(args.lengths)], begin + 0.6 * 60 * args.minutes, args.processes
    )
    for i, case in enumerate(cases):
        left = args.minutes * 60 - (time.monotonic() - begin)
        runs = compiled[replace(case, length=max(args.lengths))]
        timings = time_all(case, runs, time.monotonic() + left / (len(cases) - i), args.rounds)
        shipped = case.shipped()
        print(f"\n{case.kernel}, {case.dtype}, head dim {case.head_dim}, segments of {case.length} rows: {len(timings)} timed")
        base = dict(timings).get(shipped)
        for place, (config, seconds) in enumerate(timings):
            ratio = seconds / base if base else float("nan")
            rows.append((*vars(case).values(), *list(vars(config).values())[:4], 1e3 * seconds, ratio, config == shipped))
            if place < args.show or config == shipped:
                size = f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"
                print(f"  {1e3 * seconds:9.4f} ms  {ratio:5.2f}  {size}{'  shipped' if config == shipped else ''}", flush=True)
    if args.out and rows:
        with args.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            names = ["block_m", "block_n", "num_warps", "num_stages", "milliseconds", "over_shipped", "shipped"]
            writer.writerow([*vars(cases[0]), *names])
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
