"""Every shipped Triton kernel compiled for every architecture: its machine code held to the architecture's limits, and to what
it was when last looked at (``tests/codegen``, one file for each version of triton).

The same compiler makes the same machine code of the same source, so what has not changed since the record was made is not
compiled again, but for the head dims of :data:`ANEW` in bfloat16: that took a third of all tests' time. Whether it has changed
is asked of each kernel's first intermediate representation; of :data:`ANEW` alone where no file has changed at all.

Runs without a GPU, in processes of its own: the interpreter that other tests use must be off.
"""

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

import hlip_kernels
from hlip_kernels.backends.triton.config import FAMILIES, KERNELS, WIDTHS, Config, config_for
from hlip_kernels.resources import ARCHITECTURES, KINDS, PARTLY, read_rows, shipped, write_rows

VERSION = ".".join(version("triton").split(".")[:2])
RECORD = Path(__file__).parent / "codegen" / f"triton-{VERSION}.csv"
ANEW = [64]


def warpgroup_products(row):
    """Whether Hopper's products of four warps are expected. They need tiles of 64 rows and up."""
    if row.dtype == "tfloat32" and row.kernel != "attention_forward":
        # With head dims beyond 64 such tiles spill, since float32 operands take twice the registers: tiles of 32 rows at most.
        return row.head_dim <= 64
    # Beyond 128 tiles of 64 rows leave no registers to dK and dV, nor in TF32 to the output.
    return row.dtype != "float32" and row.head_dim <= 128


@pytest.mark.settles(
    "hlip_kernels/backends/triton/*.py", "hlip_kernels/compilation.py", "hlip_kernels/machine_code.py",
    "hlip_kernels/resources.py", "tests/codegen/triton-*.csv", packages=["triton"],
)  # fmt: skip
@pytest.mark.parametrize("dtypes", [["bfloat16"], [kind for kind in KINDS if kind != "bfloat16"]], ids="-".join)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_shared_memory_spills_and_matrix_instructions(arch, dtypes, tmp_path, settled):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "hlip_kernels.resources", "--arch", arch, "--dtype", *dtypes]
    command += ["--csv", str(tmp_path / "rows.csv")]
    head_dims = ANEW if settled else None
    if settled:
        command += ["--head-dim", *map(str, ANEW)]
    if RECORD.exists():
        command += ["--known", str(RECORD), *(["--anew", *map(str, ANEW)] if "bfloat16" in dtypes else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "rows.csv")
    assert [(r.kernel, r.dtype, r.head_dim, r.arch) for r in rows] == list(shipped([arch], dtypes, head_dims))
    limits = ARCHITECTURES[arch]
    for row in rows:
        assert 0 < row.registers <= limits.registers, row
        assert row.spill_bytes == 0, row
        assert 0 <= row.shared_memory <= limits.shared_memory, row
        if row.kernel == "attention_backward_delta":  # no products
            continue
        if row.dtype != "float32":  # float32 products are true float32 unless TF32 is allowed: no tensor cores on NVIDIA
            assert row.matrix_instructions > 0, row
        if arch == "sm_90" and warpgroup_products(row):
            # Tiles of fewer than 64 query rows: dQ of the fused kernel alone is left to single warps.
            single = row.kernel == "attention_backward_fused" and row.block_m < 64
            assert row.matrix_kind == ("HGMMA+HMMA" if single else "HGMMA"), row
    if not RECORD.exists():
        pytest.skip(f"within limits, but there is no {RECORD.name} to compare with: make one (see hlip_kernels.resources)")
    known = {row: row.source for row in read_rows(RECORD)}
    changed = [row for row in rows if row not in known]
    assert not changed, (
        f"the code triton {VERSION} makes is not what {RECORD.name} says it was: {changed}. If that is an improvement or "
        f"was meant: python -m hlip_kernels.resources --csv tests/codegen/{RECORD.name}, and say why in the commit"
    )
    if any(row.source != known[row] for row in rows):
        warnings.warn(
            f"{RECORD.name} was made of another source or with another compiler: the same figures, but all is compiled",
            stacklevel=1,
        )


def test_what_is_compiled_anew(tmp_path):
    """Whatever changes the code of a kernel or how it is read, and nothing else: neither comments nor the places of lines."""
    package = Path(hlip_kernels.__file__).parent
    triton, hopper = "backends/triton", "backends/hopper"
    # Where, what becomes what, and whose digests are others then, of the ten below.
    changes = {
        "nothing": ("__init__.py", "", "", []),
        "a comment": (f"{triton}/kernels.py", "@triton.jit\n", "# A comment.\n\n\n@triton.jit\n", []),
        "a constant": (f"{triton}/kernels.py", "tl.constexpr(-3.4028234e38)", "tl.constexpr(-3.4028233e38)", range(7)),
        "the fast pass": (f"{triton}/fused_backward.py", "tl.exp2(", "-tl.exp2(", [8]),
        "Hopper": (f"{hopper}/forward.py", "gl.exp2(", "-gl.exp2(", [9]),
        "a reader": ("machine_code.py", "def parse(", "def  parse(", range(10)),
    }
    code = """if True:
        from hlip_kernels.resources import KINDS, compilation, config_for, digest_of
        from hlip_kernels.resources_hopper import digest_of as digest_of_hopper
        from dataclasses import replace
        what = "attention_forward", "bfloat16", 64, "sm_90"
        tiles = config_for(what[0], KINDS[what[1]][0], what[2], "hopper", False)
        changes = ({"block_n": tiles.block_n // 2}, {"num_warps": 2 * tiles.num_warps}, {"num_stages": 1 + tiles.num_stages})
        print(*(digest_of(*what, replace(tiles, **change)) for change in ({}, *changes)))
        others = [("attention_forward", "float16", 64, "sm_90"), ("attention_forward", "bfloat16", 64, "sm_100"),
                  ("attention_forward", "bfloat16", 56, "sm_90"), ("attention_backward_dq", "bfloat16", 64, "sm_90"),
                  ("attention_backward_fused", "bfloat16", 64, "sm_90")]
        print(*(digest_of(*other) for other in others))
        print(digest_of_hopper("attention_forward", "bfloat16", 64))
    """
    running, environment = {}, {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for name, (file, old, new, _) in changes.items():
        copy = tmp_path / name / "hlip_kernels"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        text = (copy / file).read_text()
        assert old in text
        (copy / file).write_text(text.replace(old, new) if old else text)
        running[name] = subprocess.Popen(
            [sys.executable, "-c", code], cwd=copy.parent, env={**environment, "PYTHONPATH": str(copy.parent)},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    said = {name: process.communicate()[0].split() for name, process in running.items()}
    assert [process.returncode for process in running.values()] == [0] * len(changes)
    assert len(set(said["nothing"])) == 10
    for name, (*_, others) in changes.items():
        found = [i for i, (a, b) in enumerate(zip(said[name], said["nothing"], strict=True)) if a != b]
        assert found == list(others), name


def test_rows_of_before_stand_unless_asked_for_anew(tmp_path):
    first, false, again = (tmp_path / name for name in ("first.csv", "false.csv", "again.csv"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def made(*options, csv):
        command = [sys.executable, "-m", "hlip_kernels.resources", "--arch", "sm_90", "--dtype", "float16", "--head-dim", "64"]
        command += ["--kernel", "attention_backward_dq", *map(str, options), "--csv", str(csv)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        (row,) = read_rows(csv)
        return row

    row = made(csv=first)
    write_rows([replace(row, registers=1)], false)
    assert made("--known", false, csv=again) == replace(row, registers=1)
    assert made("--known", false, "--anew", 64, csv=again) == row
    write_rows([replace(row, registers=1, source="0" * 16)], false)
    assert made("--known", false, csv=again) == row


def test_every_shipped_configuration_is_on_record():
    records = sorted(RECORD.parent.glob("triton-*.csv"))
    assert records
    for record in records:
        assert {(r.kernel, r.dtype, r.head_dim, r.arch) for r in read_rows(record)} == set(shipped()), record
        for r in read_rows(record):
            dtype, tf32 = KINDS[r.dtype]
            own = config_for(r.kernel, dtype, r.head_dim, ARCHITECTURES[r.arch].family, tf32)
            columns = tuple(map(int, r.columns.split("+"))) + ("+" not in r.columns) * (0,)
            assert Config(r.block_m, r.block_n, r.num_warps, r.num_stages, columns) == own, f"{record.name} is out of date: {r}"


def test_logits_are_computed_once():
    """Of 16-bit inputs, but where tiles that do so spill. Two groups of warps with the same rows and columns of a product both
    make it, and all that follows from it: that takes no local memory, so nothing else shows it."""
    for record in sorted(RECORD.parent.glob("triton-*.csv")):
        for r in read_rows(record):
            if "16" not in r.dtype or r.kernel == "attention_backward_delta":
                continue
            twice = (r.kernel == "attention_backward_dkdv" and r.head_dim > 192 and r.arch in ("sm_90", "sm_100")) or (
                r.kernel == "attention_backward_fused" and r.arch == "sm_80"
            )
            assert 1 <= r.a_logit(r.exponentials) <= (2 if twice else 1.25), f"{record.name}: {r}"
            assert r.instructions > r.exponentials > 0, f"{record.name}: {r}"


def test_every_width_is_on_record_with_columns_to_spare():
    widths = {sum(config_for("attention_forward", torch.bfloat16, d, "hopper").columns) for d in PARTLY}
    assert widths == {sum(columns) for columns in WIDTHS} - {16}  # the least head dim
    assert all(head_dim % 16 == 8 for head_dim in PARTLY)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tile_has_the_columns_of_a_head_and_few_more(family):
    forward = {d: config_for("attention_forward", torch.bfloat16, d, family).columns for d in range(8, 257, 8)}
    assert all(forward[d] in WIDTHS and sum(forward[d]) >= d for d in forward)
    expected = {8: (16, 0), 24: (32, 0), 40: (64, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 88: (64, 32), 96: (64, 32),
                104: (128, 0), 128: (128, 0), 136: (128, 64), 192: (128, 64), 200: (256, 0), 256: (256, 0)}  # fmt: skip
    assert {d: forward[d] for d in expected} == expected
    for kernel in KERNELS[1:3]:  # dQ, and dK with dV
        assert config_for(kernel, torch.bfloat16, 80, family).columns == (64, 16)
    with pytest.raises(ValueError, match="257 is larger than 256"):
        config_for("attention_forward", torch.bfloat16, 257, family)


@pytest.mark.parametrize("kernel, dtype, tf32, head_dim, family, columns", [
    ("attention_backward_fused", torch.bfloat16, False, 80, "hopper", (128, 0)),  # two widths on
    ("attention_backward_dkdv", torch.float32, True, 88, "ampere", (128, 0)),
    ("attention_backward_dkdv", torch.bfloat16, False, 88, "ampere", (128, 0)),  # its own WIDER, where Hopper has tiles
    ("attention_backward_dkdv", torch.bfloat16, False, 88, "hopper", (64, 32)),
])  # fmt: skip
def test_where_two_blocks_spill_a_tile_is_wider(kernel, dtype, tf32, head_dim, family, columns):
    assert config_for(kernel, dtype, head_dim, family, tf32).columns == columns


@pytest.mark.parametrize("head_dim, tf32", [(136, False), (72, True)])
def test_wider_does_not_reach_a_kernel_that_is_not_used(head_dim, tf32):
    assert config_for("attention_backward_fused", torch.float32 if tf32 else torch.bfloat16, head_dim, "hopper", tf32) is None


def test_an_unknown_architecture_is_refused():
    done = subprocess.run([sys.executable, "-m", "hlip_kernels.resources", "--arch", "sm_1"], capture_output=True, text=True)
    assert done.returncode == 2 and "sm_90" in done.stderr


def test_a_kernel_without_tiles_is_refused():
    command = [sys.executable, "-c", "from hlip_kernels.resources import compile_kernel as c; "
               "c('attention_backward_fused', 'float32', 64, 'sm_90')"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "ValueError: attention_backward_fused has no tiles for float32 and head dim 64 on sm_90" in done.stderr
