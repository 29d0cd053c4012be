"""The GPU gate: build, GPU tests, compute-sanitizer, benchmarks, a short stress run, in one call and under ten minutes.

    python tools/gpu_gate.py --out FOLDER

Runs in a Python that already has torch >= 2.11 and needs no network. Every step has a time limit and a log of its own; a
failing step does not stop the others. FOLDER gets summary.txt, one log per step, the benchmarks' JSON, rows.csv, roofline.svg,
auto.json and tiles.csv. ``make stress`` is the long stress run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
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


def steps(out: Path) -> list[tuple[str, list[str], int]]:
    """(name, command, seconds it may take)."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    case = [PYTHON, "tools/sanitizer_case.py"]
    pytest = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    apart = ("test_gpu_limits.py", "test_gpu_hopper.py")
    tests = sorted(f"tests/{path.name}" for path in ROOT.glob("tests/test_gpu*.py") if path.name not in apart)
    return [
        ("build", [PYTHON, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--editable", "."], 120),
        ("info", [PYTHON, "-m", "hlip_kernels.info"], 30),
        ("tests", [*pytest, *several_processes(), *tests], 180),
        # Kernels that wait for one another may hang.
        ("hopper", [*pytest, *several_processes(), "tests/test_gpu_hopper.py"], 60),
        ("memcheck", [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *case], 60),
        ("racecheck", [sanitizer, "--tool", "racecheck", "--error-exitcode", "1", *case], 60),
        ("initcheck", [sanitizer, "--tool", "initcheck", "--error-exitcode", "1", *case], 60),
        # What matters most first: a run cut short still says something.
        ("benchmarks-attention", [*pytest, "benchmarks/test_attention.py", "--benchmark-quiet",
                                  f"--benchmark-json={out / 'attention.json'}"], 240),
        # Which backend is fastest for which length of segments: what the shipped table of auto should say.
        ("auto", [PYTHON, "-m", "hlip_kernels.measure_auto", "--out", str(out / "auto.json")], 75),
        ("benchmarks-ops", [*pytest, "benchmarks/test_ops.py", "--benchmark-quiet",
                            f"--benchmark-json={out / 'ops.json'}"], 40),
        # Random layouts against float64, then the far ends: what the tests above leave to chance.
        ("stress", [PYTHON, "tools/stress.py", "--minutes", "0.6", "--device", "cuda"], 50),
        ("limits", [*pytest, "tests/test_gpu_limits.py"], 90),
        ("benchmarks-model", [*pytest, "benchmarks/test_model.py", "--benchmark-quiet",
                              f"--benchmark-json={out / 'model.json'}"], 150),
        # Are the shipped tiles the fastest? Their neighbours, timed beside them.
        ("tiles", [PYTHON, "tools/tune_tiles.py", "--minutes", "1", "--out", str(out / "tiles.csv")], 75),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run only these steps")
    parser.add_argument("--minutes", type=float, default=9.5, help="stop starting steps after this long (default: 9.5)")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    import torch

    if not torch.cuda.is_available():
        print("gpu gate: torch sees no GPU here; run this on a machine with one", file=sys.stderr)
        return 2
    environment = {**os.environ, "HLIP_BUILD_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    started, results = time.monotonic(), []
    for name, command, limit in steps(out):
        left = args.minutes * 60 - (time.monotonic() - started)
        if args.only and name not in args.only:
            continue
        if left < 10:
            results.append((name, "not started: no time left", 0.0))
            continue
        results.append(run_step(name, command, min(limit, left), out, environment))
        print("{:22} {:28} {:6.1f} s".format(*results[-1]), flush=True)
        if name == "hopper" and results[-1][1] != "passed":  # the steps after it go on without
            environment["HLIP_KERNELS_WITHOUT"] = "hopper hopper_ordered"
    rows = [str(p) for p in (out / "attention.json", out / "ops.json", out / "model.json") if p.exists() and p.stat().st_size]
    if rows:
        subprocess.run([PYTHON, "-m", "benchmarks.report", *rows, "--rows", str(out / "rows.csv")], cwd=ROOT, check=False)
        subprocess.run([PYTHON, "-m", "benchmarks.report", str(out / "rows.csv")], cwd=ROOT, check=False)
        drawn = [PYTHON, "-m", "benchmarks.roofline", str(out / "rows.csv"), "--out", str(out / "roofline.svg")]
        subprocess.run(drawn, cwd=ROOT, check=False)
    summary = "\n".join("{:22} {:28} {:6.1f} s".format(*r) for r in results)
    (out / "summary.txt").write_text(summary + "\n")
    (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{summary}\n\nlogs and results: {out}")
    left_over = [name for name, status, _ in results if status.startswith("not started")]
    if left_over:
        print(f"for the rest: python tools/gpu_gate.py --out {args.out} --only {' '.join(left_over)}")
    return 0 if all(status == "passed" for _, status, _ in results) else 1


def run_step(name: str, command: list[str], limit: float, out: Path, environment: dict) -> tuple[str, str, float]:
    """Runs one step with its output in its own log; returns (name, what became of it, seconds)."""
    begin = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        log.write("$ " + " ".join(command) + "\n")
        log.flush()
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
            status = "passed" if code == 0 else f"FAILED (exit status {code})"
        except subprocess.TimeoutExpired:
            status = f"STOPPED after {limit:.0f} s"
        except OSError as error:
            status = f"could not start: {error.strerror}"
    return name, status, time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
