"""Every shipped Triton kernel compiled for every architecture, its machine code held to the architecture's limits.

Runs without a GPU, in processes of its own: the interpreter that other tests use must be off.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from hlip_kernels.backends.triton.config import KERNELS
from hlip_kernels.resources import ARCHITECTURES, HEAD_DIMS, SMALLEST_SHARED_MEMORY


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_shared_memory_spills_and_matrix_instructions(arch, dtype, tmp_path):
    # float16 differs from bfloat16 in the element type alone: two head dims stand for all.
    head_dims = [64, 128] if dtype == "float16" else HEAD_DIMS
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hlip_kernels.resources", "--arch", arch, "--dtype", dtype]
    command += ["--head-dim", *map(str, head_dims), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(KERNELS) * len(head_dims)
    limits = ARCHITECTURES[arch]
    for row in rows:
        where = f"{row['kernel']} {dtype} D={row['head_dim']} on {arch}: {row}"
        assert 0 < row["registers"] <= limits.registers, where
        assert row["spill_bytes"] == 0, where
        assert 0 < row["shared_memory"] <= limits.shared_memory, where
        if limits.backend == "cuda":
            # One table serves all NVIDIA chips, so the smallest of them must take it.
            assert row["shared_memory"] <= SMALLEST_SHARED_MEMORY, where
        if dtype != "float32":  # float32 products are true float32: no tensor cores on NVIDIA
            assert row["matrix_instructions"] > 0, where


def test_an_unknown_architecture_is_refused():
    done = subprocess.run([sys.executable, "-m", "hlip_kernels.resources", "--arch", "sm_1"], capture_output=True, text=True)
    assert done.returncode == 2 and "sm_90" in done.stderr
