"""The kernel that moves rows for the flash backend: compiled for every NVIDIA architecture, without a GPU; and its host side.

In a process of its own: the interpreter that other tests use must be off.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from hlip_kernels.backends.triton import interpreted

# (tensors moved, with lse): gather and scatter of the forward pass, gather of the backward pass; its scatter is as the first.
LAUNCHES = [(3, False), (1, True), (5, True)]

COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hlip_kernels.backends.flash_rows import BLOCK_COLUMNS, BLOCK_ROWS, NUM_WARPS, move_rows
from hlip_kernels.resources import ARCHITECTURES, _read_cubin

arch, dtype = sys.argv[1], sys.argv[2]
found = []
for head_dim in (8, 64, 80, 256):
    for count, has_stats in json.loads(sys.argv[3]):
        constants = {"COUNT": count, "HAS_STATS": has_stats, "HEAD_DIM": head_dim, "UNIT": 8, "BLOCK_ROWS": BLOCK_ROWS,
                     "BLOCK_COLUMNS": BLOCK_COLUMNS}
        signature, attributes = {}, {}
        for i, name in enumerate(move_rows.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name in ("stats", "to_stats"):
                signature[name] = "*fp32" if has_stats else "*i32"
            elif name == "index":
                signature[name] = "*i32"
            elif len(name) == 1 or name in ("to_a", "to_b", "to_c", "to_d", "to_e"):
                signature[name] = "*" + dtype
            else:
                signature[name] = "i32"
            if signature[name].startswith("*"):  # as at launch: addresses are multiples of 16; of strides nothing is known
                attributes[i,] = [["tt.divisibility", 16]]
        compiled = triton.compile(ASTSource(move_rows, signature, constants, attributes),
                                  target=GPUTarget("cuda", ARCHITECTURES[arch].arch, 32), options={"num_warps": NUM_WARPS})
        registers, spills, code = _read_cubin(compiled.asm["cubin"])
        wide = re.findall(r"\\b(LDG\\.E\\.\\S*128|STG\\.E\\.\\S*128)", code)
        wide = {kind: sum(w.startswith(kind) for w in wide) for kind in ("LDG", "STG")}
        found.append([head_dim, count, registers, spills, compiled.metadata.shared, wide])
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_without_spills_and_moves_16_bytes_at_a_time(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # bfloat16 is moved as float16 is.
    command = [sys.executable, "-c", COMPILE, arch, "fp16", json.dumps(LAUNCHES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 4 * len(LAUNCHES)
    for head_dim, count, registers, spills, shared, wide in rows:
        what = f"head dim {head_dim}, {count} tensors: {registers} registers, {wide}"
        assert spills == 0 and shared == 0, what
        assert registers <= 64, what  # so that 1024 threads fit a multiprocessor, and enough bytes are under way
        # 16 rows of 256 columns are 512 pieces of 16 bytes, four for each of 128 threads.
        assert wide == {"LDG": 4 * count, "STG": 4 * count}, what


@pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET=1 is not set")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_every_number_of_tensors(count):
    from hlip_kernels.backends.flash_rows import move

    sources = [torch.randn(21, 3 + n, 40)[:, :3] for n in range(count)]
    index = torch.tensor([20, -1, 0, 7, 7, -1] * 6, dtype=torch.int32)
    targets = torch.full((36, count, 3, 40), float("nan")).unbind(1)
    stats, to_stats = torch.randn(21, 3).T, torch.full((3, 36), float("nan"))
    move(sources, targets, index, stats, to_stats)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, torch.where((index >= 0)[:, None, None], source[index.long()], 0.0))
    assert torch.equal(to_stats, torch.where(index >= 0, stats[:, index.long()], 0.0))
    move(sources, again := torch.full((36, count, 3, 40), float("nan")).unbind(1), index)
    assert all(torch.equal(a, b) for a, b in zip(again, targets, strict=True))
