"""The GPU gate: build, GPU tests, compute-sanitizer, benchmarks, a short stress run, in one call and under ten minutes.

    python tools/gpu_gate.py --out FOLDER

Runs in a Python that already has torch >= 2.11 and needs no network. Every step has a time limit; a failing step does not
stop the others. FOLDER gets seven files, each as soon as there is something for it: summary.txt, log.txt, rows.csv (every
benchmark), auto.json, hopper.csv (on Hopper), tiles.csv, and at the end roofline.svg. ``make stress`` is the long stress run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


def several_processes() -> list[str]:
    """Options of pytest that run tests side by side, where pytest-xdist is there.

    Compiling takes most of the time of tests that run every kernel for every dtype and head dim: for one process some 200 s,
    counted from what a few kernels take to compile.
    """
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(8, (os.cpu_count() or 2) // 2))), "--dist", "worksteal"]


def steps(out: Path, hopper: bool = True) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds it may take). ``hopper``: whether the GPU is one."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    apart = ("test_gpu_limits.py", "test_gpu_hopper.py")
    tests = sorted(f"tests/{path.name}" for path in ROOT.glob("tests/test_gpu*.py") if path.name not in apart)

    def sanitize(tool: str, *parts: str) -> list[str]:
        return [sanitizer, "--tool", tool, "--error-exitcode", "1", PYTHON, "tools/sanitizer_case.py", *parts]

    def benchmark(file: str, seconds: int) -> tuple[list[str], int]:
        """It ends by itself; what it had measured is there even if it does not."""
        rows = ["--rows", str(out / "rows.csv"), "--seconds", str(seconds)]
        return [*pytest, f"benchmarks/{file}", "--benchmark-quiet", *rows], seconds + 30

    sizes = [
        # The Hopper kernels with 64 and 128 keys a tile, two consumers and three, other rings.
        ("sizes", [PYTHON, "tools/tune_hopper.py", "--minutes", "1.3", "--out", str(out / "hopper.csv")], 95),
    ]  # fmt: skip
    return [
        ("build", [PYTHON, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--editable", "."], 120),
        ("info", [PYTHON, "-m", "hlip_kernels.info"], 30),
        ("tests", [*pytest, *several_processes(), *tests], 180),
        # Kernels that wait for one another may hang.
        ("hopper", [*pytest, *several_processes(), "tests/test_gpu_hopper.py"], 90),
        ("memcheck", sanitize("memcheck"), 60),
        # What matters most first: a run cut short still says something.
        ("benchmarks-attention", *benchmark("test_attention.py", 210)),
        # Which backend is fastest for which length of segments: what the shipped table of auto should say.
        ("auto", [PYTHON, "-m", "hlip_kernels.measure_auto", "--out", str(out / "auto.json")], 85),
        ("benchmarks-ops", *benchmark("test_ops.py", 30)),
        ("initcheck", sanitize("initcheck"), 60),
        # Apart: what it makes of barriers in shared memory and of TMA is not known here.
        ("racecheck", sanitize("racecheck", "triton", "cuda", "small"), 60),
        ("racecheck-long", sanitize("racecheck", "long"), 60),
        # Random layouts against float64, then the far ends: what the tests above leave to chance.
        ("stress", [PYTHON, "tools/stress.py", "--minutes", "0.6", "--device", "cuda"], 50),
        ("limits", [*pytest, "tests/test_gpu_limits.py"], 90),
        ("benchmarks-model", *benchmark("test_model.py", 120)),
        *(sizes if hopper else []),
        # Are the shipped tiles the fastest? Their neighbours, timed beside them.
        ("tiles", [PYTHON, "tools/tune_tiles.py", "--minutes", "1", "--out", str(out / "tiles.csv")], 75),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run only these steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting steps after this long (default: 9)")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        print("gpu gate: torch sees no GPU here; run this on a machine with one", file=sys.stderr)
        return 2
    environment = {**os.environ, "HLIP_BUILD_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    wanted = steps(out, torch.cuda.get_device_capability() == (9, 0))
    results = run_steps(wanted, out, environment, args.only, time.monotonic() + args.minutes * 60)
    if (out / "rows.csv").exists():
        draw = ["-m", "benchmarks.roofline", str(out / "rows.csv"), "--out", str(out / "roofline.svg")]
        for command in (["-m", "benchmarks.report", str(out / "rows.csv")], draw):
            subprocess.run([PYTHON, *command], cwd=ROOT, check=False)
    print(f"\n{(out / 'summary.txt').read_text()}\nlog and results: {out}")
    left_over = [name for name, status, _ in results if status.startswith("not started")]
    if left_over:
        print(f"for the rest: python tools/gpu_gate.py --out {args.out} --only {' '.join(left_over)}")
    return 0 if all(status == "passed" for _, status, _ in results) else 1


def run_steps(
    wanted: list[tuple[str, list[str], int]], out: Path, environment: dict, only: list[str] | None, until: float
) -> list[tuple[str, str, float]]:
    """Runs the steps in turn until the clock says ``until``: for each (name, what became of it, seconds).

    ``summary.txt`` is written after every step, so that it is there whatever ends the run.
    """
    results = []
    for name, command, limit in wanted:
        if only and name not in only:
            continue
        left = until - time.monotonic()
        if left < 10:
            results.append((name, "not started: no time left", 0.0))
        else:
            results.append(run_step(name, command, min(limit, left), out, environment))
            print("{:22} {:28} {:6.1f} s".format(*results[-1]), flush=True)
            if results[-1][1] != "passed":
                print(textwrap.indent(last_lines(out / "log.txt"), "    "), flush=True)
        if name == "hopper" and results[-1][1].startswith("STOPPED"):  # it hangs: the steps after it go on without
            environment = environment | {"HLIP_KERNELS_WITHOUT": "hopper"}
        (out / "summary.txt").write_text("".join("{:22} {:28} {:6.1f} s\n".format(*result) for result in results))
    return results


def last_lines(log: Path, count: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def run_step(name: str, command: list[str], limit: float, out: Path, environment: dict) -> tuple[str, str, float]:
    """Runs one step, its output at the end of ``log.txt``; returns (name, what became of it, seconds).

    A step that is stopped leaves no process behind: what it started is in a group of its own.
    """
    begin = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"\n===== {name}\n$ {' '.join(command)}\n")
        log.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return name, f"could not start: {error.strerror}", time.monotonic() - begin
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"FAILED (exit status {code})"
        except subprocess.TimeoutExpired:
            status = f"STOPPED after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return name, status, time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
