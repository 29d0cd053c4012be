"""Every shipped Triton kernel compiled for every architecture: its machine code held to the architecture's limits, and to what
it was when last looked at (``tests/codegen``, one file for each version of triton).

Runs without a GPU, in processes of its own: the interpreter that other tests use must be off.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hlip_kernels.backends.triton.config import KERNELS, Config, config_for
from hlip_kernels.resources import ARCHITECTURES, HEAD_DIMS, read_rows

VERSION = ".".join(version("triton").split(".")[:2])
RECORD = Path(__file__).parent / "codegen" / f"triton-{VERSION}.csv"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_shared_memory_spills_and_matrix_instructions(arch, dtype, tmp_path):
    # float16 differs from bfloat16 in the element type alone: two head dims stand for all.
    head_dims = [64, 128] if dtype == "float16" else HEAD_DIMS
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hlip_kernels.resources", "--arch", arch, "--dtype", dtype]
    command += ["--head-dim", *map(str, head_dims), "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "rows.csv")
    assert len(rows) == len(KERNELS) * len(head_dims)
    limits = ARCHITECTURES[arch]
    for row in rows:
        assert 0 < row.registers <= limits.registers, row
        assert row.spill_bytes == 0, row
        assert 0 < row.shared_memory <= limits.shared_memory, row
        if dtype != "float32":  # float32 products are true float32: no tensor cores on NVIDIA
            assert row.matrix_instructions > 0, row
        if arch == "sm_90" and dtype != "float32" and row.head_dim <= 128:
            # Beyond, dK and dV of 64 rows leave no registers: tiles of 32 rows, and the products of single warps.
            assert row.matrix_kind == "HGMMA", row
    if not RECORD.exists():
        pytest.skip(f"within limits, but there is no {RECORD.name} to compare with: make one (see hlip_kernels.resources)")
    known = set(read_rows(RECORD))
    changed = [row for row in rows if row not in known]
    assert not changed, (
        f"the code triton {VERSION} makes is not what {RECORD.name} says it was: {changed}. If that is an improvement or "
        f"was meant: python -m hlip_kernels.resources --csv tests/codegen/{RECORD.name}, and say why in the commit"
    )


def test_every_shipped_configuration_is_on_record():
    records = sorted(RECORD.parent.glob("triton-*.csv"))
    assert records
    for record in records:
        rows = {(r.kernel, r.dtype, r.head_dim, r.arch) for r in read_rows(record)}
        dtypes = ("float16", "bfloat16", "float32")
        assert rows == {(k, t, d, a) for k in KERNELS for t in dtypes for d in HEAD_DIMS for a in ARCHITECTURES}, record
        for r in read_rows(record):
            shipped = config_for(r.kernel, getattr(torch, r.dtype), r.head_dim, ARCHITECTURES[r.arch].family)
            assert Config(r.block_m, r.block_n, r.num_warps, r.num_stages) == shipped, f"{record.name} is out of date: {r}"


def test_an_unknown_architecture_is_refused():
    done = subprocess.run([sys.executable, "-m", "hlip_kernels.resources", "--arch", "sm_1"], capture_output=True, text=True)
    assert done.returncode == 2 and "sm_90" in done.stderr
