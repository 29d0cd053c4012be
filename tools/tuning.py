"""What the two tools that tune kernels share: trying candidates, timing them in rounds, and the report."""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hlip_kernels import Layout
from hlip_kernels.pattern import Plan
from hlip_kernels.timing import host_seconds, timed

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
CLOSE = 0.02  # of what the shipped configuration computes: another rounding is closer, a mistake is not


@dataclass(frozen=True)
class Case:
    """One pass of one kernel over one batch of equal segments. A configuration is a frozen dataclass, as the kernel has it."""

    kernel: str
    dtype: str
    head_dim: int
    heads: int
    length: int
    rows: int
    device: str

    def shipped(self):
        """The kernel's own configuration; ``None`` where another kernel runs instead."""
        raise NotImplementedError

    def candidates(self) -> list:
        """The shipped configuration and those next to it, the least different first."""
        raise NotImplementedError

    def size_of(self, config) -> str:
        """What to call a configuration."""
        raise NotImplementedError

    def make(self) -> Callable[[object], tuple[torch.Tensor, ...]]:
        """A function of a configuration that runs the pass once, and returns its results."""
        raise NotImplementedError

    def plan(self) -> Plan:
        """How its segments attend."""
        layout = Layout.from_lengths([self.length] * max(1, self.rows // self.length), levels=("segment",))
        return Plan.of(layout.to(self.device).pattern("segment"))

    def batch(self) -> tuple[torch.Tensor, Plan]:
        """``(R, 3, H, D)`` of q, k and v, and how segments attend."""
        plan = self.plan()
        shape = (plan.num_rows, 3, self.heads, self.head_dim)
        return torch.randn(shape, dtype=DTYPES[self.dtype], device=self.device), plan


def try_once(case: Case, config) -> str | None:
    """Runs one candidate on one segment, beside the shipped configuration; what was wrong with it, if anything."""
    try:
        once = replace(case, rows=case.length, heads=1 if case.device == "cpu" else case.heads).make()
        for found, right in zip(once(config), once(case.shipped()), strict=True):
            error = float((found.double() - right.double()).norm() / right.double().norm())
            if not error <= CLOSE:
                return f"wrong: {error:.2g} from the shipped one's results"
    except Exception as error:  # no candidate ends the run, whatever the compiler says of it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def compile_all(cases: list[Case], until: float, processes: int) -> dict[Case, list]:
    """The candidates of each case that run. What is next to the shipped one is tried first, of every case in turn."""
    wanted = [(case, case.candidates()) for case in cases]
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
            print(f"{case.kernel}: the shipped configuration does not run here: {wrong}", file=sys.stderr)
        elif wrong and wrong.startswith("wrong"):
            print(f"{case.kernel}, {case.size_of(config)}: {wrong}", file=sys.stderr)
    return {case: [c for (of, c), wrong in zip(jobs, answers, strict=True) if of == case and wrong is None] for case in cases}


def time_all(case: Case, runs: list, until: float, rounds: int) -> list[tuple[object, float]]:
    """``(configuration, median seconds)``, the fastest first."""
    if not runs or time.monotonic() > until:
        return []
    once, device = case.make(), torch.device(case.device)
    times: dict[object, list[float]] = {config: [] for config in runs}
    for config in runs:
        once(config)
    host = host_seconds(lambda: once(runs[0]), device)
    for done in range(rounds):
        if done and time.monotonic() > until:
            break
        for config in runs:
            times[config].append(timed(lambda config=config: once(config), device, host))
    return sorted(((config, statistics.median(seconds)) for config, seconds in times.items()), key=lambda pair: pair[1])


def arguments(description: str, lengths: list[int], rows: int) -> argparse.ArgumentParser:
    """A parser with the options of both tools."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--lengths", nargs="+", type=int, default=lengths, help="rows of a segment (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=rows, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="for everything (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=min(8, (os.cpu_count() or 2) // 2) if cuda else 1)
    parser.add_argument("--show", type=int, default=5, help="how many of the fastest to print (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="every time, as CSV")
    return parser


def tune(cases: list[Case], args: argparse.Namespace) -> int:
    """Times the candidates of every case, prints the fastest beside the shipped ones, and writes all of them."""
    cases = [case for case in cases if case.shipped() is not None]  # None: the kernel is not used there
    begin, rows = time.monotonic(), []
    # Kernels do not know lengths: compiled for the longest of a kernel, they are there for all.
    longest = {case.kernel: max(c.length for c in cases if c.kernel == case.kernel) for case in cases}
    compiled = compile_all(
        [case for case in cases if case.length == longest[case.kernel]], begin + 0.6 * 60 * args.minutes, args.processes
    )
    for i, case in enumerate(cases):
        left = args.minutes * 60 - (time.monotonic() - begin)
        runs = compiled[replace(case, length=longest[case.kernel])]
        timings = time_all(case, runs, time.monotonic() + left / (len(cases) - i), args.rounds)
        shipped = case.shipped()
        print(f"\n{case.kernel}, {case.dtype}, head dim {case.head_dim}, segments of {case.length} rows: {len(timings)} timed")
        base = dict(timings).get(shipped)
        for place, (config, seconds) in enumerate(timings):
            ratio = seconds / base if base else float("nan")
            rows.append({**asdict(case), **asdict(config), "milliseconds": 1e3 * seconds, "over_shipped": ratio,
                         "shipped": config == shipped})  # fmt: skip
            if place < args.show or config == shipped:
                mark = "  shipped" if config == shipped else ""
                print(f"  {1e3 * seconds:9.4f} ms  {ratio:5.2f}  {case.size_of(config)}{mark}", flush=True)
    if args.out and rows:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0
