"""What is for GPUs alone, run on a pretended one: GPU tests, benchmarks and tools do not fail for want of having been run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

from benchmarks import report  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["-m", "pytest", "-q", "-p", "pretended_gpu", "-p", "no:cacheprovider", "-p", "no:randomly", "-n", "0"]
SCRIPT = ["-m", "pretended_gpu"]


def run(*command):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST")}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_gpu_tests():
    """In one process: half of the time is what it takes to begin."""
    files = [f"tests/{file}" for file in ("test_gpu.py", "test_gpu_hopper.py", "test_gpu_numerics.py")]
    assert " passed" in run(*PYTEST, *files, "--each", "2")


def test_benchmarks(tmp_path):
    path = tmp_path / "rows.csv"
    # Of longer segments only what short ones do not have: a row of its own for the fast backward kernel on Hopper.
    # Nor many short ones one after the other, which is how torch's varlen attention is pretended.
    cases = "(many_short and not varlen) or (dropout_50 and slice) or (dropout_50 and scan and hopper and fast)"
    cases += " or segment_mean or switch_level"
    run(*PYTEST, "benchmarks/test_attention.py", "benchmarks/test_ops.py", "-k", cases, "--rows", str(path))
    rows = report.read(path)
    found = {(row["part"], row["implementation"]) for row in rows if row["workload"] == "dropout_50"}
    ours = {"hlip triton", "hlip sdpa", "hlip hopper", "hlip hopper fast", "hlip hopper_ordered"}
    assert {name for part, name in found if part == "backward"} >= ours | {"published path", "padded SDPA", "torch varlen"}
    assert all(row["device"] == "NVIDIA H200" for row in rows)
    assert all(row["predicted_serial_s"] for row in rows if row["implementation"] in ours - {"hlip sdpa"})


@pytest.mark.parametrize("command, said", [
    ("tools/sanitizer_case.py triton long small", "long: every kernel ran"),
    ("tools/stress.py --device cuda --cases 30 --seed 1", "0 failed"),
    ("hlip_kernels.measure_auto --rows 512 --bands 32 512 --rounds 1 --heads 2 --out {tmp}", "sm_90, bfloat16, head dim 64"),
], ids=lambda x: x.split()[0])  # fmt: skip
def test_tools(command, said, tmp_path):
    file, *arguments = command.format(tmp=tmp_path / "auto.json").split()
    assert said in run(*SCRIPT, file, *arguments)
