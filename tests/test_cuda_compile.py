"""The short-segment attention kernels compiled by nvcc: their machine code held to the architecture's limits, and to what it
was when last looked at (``tests/codegen/short_attention.csv``, of one version of nvcc).

The same compiler makes the same of the same: where no source has changed since, one head dim is compiled again, for two of the
architectures, and the others are not.

Needs nvcc and no GPU.
"""

import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hlip_kernels.backends import cuda_whole
from hlip_kernels.backends.cuda import HEAD_DIMS, SHARED_MEMORY, max_rows

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import cuda_machine_code  # noqa: E402
import cuda_resources  # noqa: E402
import cuda_toolkit  # noqa: E402
from cuda_resources import ARCHITECTURES, MOST_REGISTERS, read_rows  # noqa: E402

RECORD = Path(__file__).parent / "codegen" / "short_attention.csv"
AGAIN = f"python tools/cuda_resources.py --csv {RECORD.relative_to(TOOLS.parent)}"
DTYPES = ("bfloat16", "float16")
ANEW = {"sm_80": ["64"], "sm_90": ["64"]}
# Bytes of registers a thread may spill: none where the kernels were tuned. Elsewhere the same choices may cost a few, for the
# sake of the blocks that then fit a multiprocessor; the record says how many.
MOST_STACK = {("sm_90", 64): 0}
MOST_STACK_ELSEWHERE = 96
# The backward kernel for whole segments fills the registers on purpose: what does not fit are counters of its outer loops; of
# the 230 instructions of the inner one two (on sm_90 one) load such words. Nobody has looked at why newer architectures need
# more.
MOST_STACK_WHOLE = {"sm_80": 24, "sm_86": 24, "sm_90": 16}
MOST_STACK_WHOLE_ELSEWHERE = 112
KERNELS = [(f"short_attention_{name}", 0, 0) for name in ("forward", "whole_forward", "backward")]
WHOLE = [("short_attention_whole_backward", *kind) for kind in ((128, 32), (256, 32), (256, 64))]


@pytest.fixture(scope="module")
def nvcc():
    """major.minor of nvcc; skips where it, or what reads its code, is missing."""
    try:
        for binary in ("cuobjdump", "nvdisasm"):
            cuda_toolkit.find_binary(binary)
        return cuda_toolkit.nvcc_version()
    except cuda_toolkit.ToolError as error:
        pytest.skip(str(error))


def check_limits(row):
    assert 0 < row.registers <= MOST_REGISTERS, row
    if row.rows > 0:  # else it never runs there
        most = MOST_STACK.get((row.arch, row.head_dim), MOST_STACK_ELSEWHERE)
        if row.kernel.endswith("whole_backward"):
            most = MOST_STACK_WHOLE.get(row.arch, MOST_STACK_WHOLE_ELSEWHERE)
        assert row.stack <= most, f"registers are spilled, or an array is in memory: {row}"
    assert row.stack > 0 or row.local_loads == row.local_stores == 0, row
    assert row.shared + row.static_shared <= ARCHITECTURES[row.arch].block_shared_memory, row
    if row.kernel.endswith("whole_backward") and row.rows > 0:
        assert row.warps >= 8, row
    assert row.products > 0 and row.matrix_loads > 0 and row.exponentials > 0, row
    # A launch with too large blocks fails: every pack a kernel may get has to fit.
    assert (row.blocks > 0) == (row.rows > 0) and (row.slice_blocks > 0) == (row.slice_shared > 0), row


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_spills_shared_memory_and_matrix_instructions(nvcc, arch, tmp_path, capsys):
    reason = cuda_toolkit.why_not(arch)
    if reason:
        pytest.skip(reason)
    arguments = ["--arch", arch, "--head-dim", *map(str, HEAD_DIMS), "--csv", str(tmp_path / "rows.csv")]
    if RECORD.exists():
        arguments += ["--known", str(RECORD), *(["--anew", *ANEW[arch]] if arch in ANEW else [])]
    assert cuda_resources.main(arguments) == 0, capsys.readouterr().err
    rows = read_rows(tmp_path / "rows.csv")
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            kernels = [(r.kernel, r.keys, r.step) for r in rows if (r.head_dim, r.dtype) == (head_dim, dtype)]
            assert kernels == sorted(KERNELS + (WHOLE if head_dim in cuda_whole.HEAD_DIMS else []))
    for row in rows:
        assert row.arch == arch
        check_limits(row)
    known = [row for row in read_rows(RECORD) if row.nvcc == nvcc] if RECORD.exists() else []
    if not known:
        pytest.skip(f"within limits, but {RECORD.name} has nothing of nvcc {nvcc} to compare with: {AGAIN}")
    changed = [row for row in rows if row not in known]
    assert not changed, (
        f"the code nvcc {nvcc} makes is not what {RECORD.name} says it was: {changed}. If that is an improvement or was meant: "
        f"{AGAIN}, and say why in the commit"
    )
    if any(row.source != cuda_resources.digest_on(arch) for row in known if row.arch == arch):
        warnings.warn(
            f"{RECORD.name} was made of another source or with another build of nvcc: the same figures, but all is compiled",
            stacklevel=1,
        )


def test_whatever_changes_a_source_changes_the_digest(nvcc, tmp_path, monkeypatch):
    def digests():
        cuda_toolkit.source_digest.cache_clear()
        return [cuda_resources.digest_on(arch) for arch in ARCHITECTURES]

    before = digests()
    assert len(set(before)) == len(ARCHITECTURES)
    copy = tmp_path / "csrc"
    shutil.copytree(cuda_toolkit.CSRC, copy)
    monkeypatch.setattr(cuda_toolkit, "CSRC", copy)
    assert digests() == before
    header = copy / "device" / "cuda.cuh"
    header.write_text(header.read_text().replace("16816", "16816 ", 1) + "\n")
    assert not set(digests()) & set(before)
    monkeypatch.undo()
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DNOTHING")
    assert not set(digests()) & set(before)
    monkeypatch.undo()
    monkeypatch.setattr(cuda_toolkit, "FLAGS", ("-O2",))
    assert not set(digests()) & set(before)
    monkeypatch.undo()
    assert digests() == before


def test_rows_of_before_stand_unless_one_is_lost_or_they_are_asked_for_anew(nvcc, monkeypatch):
    compiled = []
    monkeypatch.setattr(cuda_resources, "compile_kernels", lambda *pair: compiled.append(pair) or [])
    known = [replace(row, source=cuda_resources.digest_on(row.arch), registers=1) for row in read_rows(RECORD)]

    def made(known, anew=()):
        compiled.clear()
        return list(cuda_resources.compile_all(["sm_80", "sm_90"], [32, 64], 1, known, anew))

    expected = [row for row in known if row.arch in ("sm_80", "sm_90") and row.head_dim in (32, 64)]
    assert sorted(map(str, made(known))) == sorted(str(cuda_resources.with_launches(asdict(r))) for r in expected)
    assert compiled == []
    made(known, [64])
    assert compiled == [(64, "sm_80"), (64, "sm_90")]
    made([row for row in known if row is not expected[0]])
    assert compiled == [(expected[0].head_dim, expected[0].arch)]
    made([replace(row, source="0" * 16) if row.arch == "sm_90" else row for row in known])
    assert compiled == [(32, "sm_90"), (64, "sm_90")]


def test_the_record_is_whole_and_within_limits(nvcc):
    assert RECORD.exists(), f"there is none, make one: {AGAIN}"
    rows = read_rows(RECORD)
    assert len({row.nvcc for row in rows}) == 1
    kernels = [(kernel, HEAD_DIMS) for kernel in KERNELS] + [(kernel, cuda_whole.HEAD_DIMS) for kernel in WHOLE]
    expected = {(*kernel, t, d, a) for kernel, dims in kernels for t in DTYPES for d in dims for a in ARCHITECTURES}
    found = [(r.kernel, r.keys, r.step, r.dtype, r.head_dim, r.arch) for r in rows]
    assert set(found) == expected and len(found) == len(expected), AGAIN
    for row in rows:
        check_limits(row)
        # What follows from the sizes of packs may change without the machine code.
        assert cuda_resources.with_launches(asdict(row)) == row, f"{RECORD.name} is out of date: {AGAIN}"


def test_segments_that_python_lets_through_fit_the_kernels(nvcc):
    bytes_of = cuda_resources.shared_bytes()
    assert {head_dim for _, head_dim, _ in bytes_of} == set(HEAD_DIMS)
    for head_dim in HEAD_DIMS:
        for capability, limit in SHARED_MEMORY.items():
            rows = max_rows(head_dim, capability)
            for way in ("forward", "whole_forward", "backward"):
                assert bytes_of[way, head_dim, rows] <= limit, (way, head_dim, capability)
            assert bytes_of["backward", head_dim, rows + 1] > limit, "room for more rows"


def test_python_and_the_sources_agree_on_how_whole_segments_are_launched(nvcc):
    says = cuda_resources.shared_bytes()
    chosen = set()
    for head_dim in HEAD_DIMS:
        for shared in set(SHARED_MEMORY.values()):
            fits = []
            for rows in range(1, cuda_whole.ROWS[1] + 33):
                names = [f"{name} where there are {shared >> 10} KB" for name in cuda_whole.Launch._fields]
                numbers = [says[name, head_dim, rows] for name in names]
                launch = cuda_whole.whole_launch(rows, head_dim, shared)
                assert numbers == list(launch or (0, 0, 0, 0))
                if launch:
                    fits.append(rows)
                    chosen.add((head_dim, *launch))
                    size = says[f"whole {launch.step} {launch.keys}", head_dim, rows]
                    assert size == cuda_whole.whole_bytes(rows, head_dim, launch.step, launch.keys)
                    assert launch.blocks * (size + 1024) <= shared + 1024 and launch.blocks * launch.warps >= 8
                    assert launch.warps * 32 >= rows
            small, large = cuda_whole.whole_rows(head_dim, shared)
            assert fits == [*range(1, small + 1), *range(cuda_whole.ROWS[0] + 1, large + 1)]
    assert {kernel[:3] for kernel in chosen} == {(d, *way) for d in cuda_whole.HEAD_DIMS for way in ((4, 32), (8, 32), (8, 64))}


def test_occupancy_is_counted_as_the_cuda_calculator_counts():
    resident = cuda_resources.resident
    assert resident("sm_90", 128, 168, 54912) == (3, 12)  # registers: 3 warps in each quarter
    assert resident("sm_90", 128, 169, 54912) == (2, 8)  # 176: they come in eights
    assert resident("sm_80", 192, 162, 109824) == (1, 6)  # shared memory
    assert resident("sm_90", 192, 162, 116736 - 1024) == (2, 12)  # two that fill it, with what the system keeps of each
    assert resident("sm_90", 192, 162, 116736 - 1023) == (1, 6)
    assert resident("sm_86", 1024, 32, 0) == (1, 32)  # 48 warps
    assert resident("sm_90", 32, 16, 0) == (32, 32)  # 32 blocks
    assert resident("sm_86", 128, 32, (99 << 10) + 1) == (0, 0)


def test_spills_and_static_memory_are_seen(nvcc, tmp_path):
    # Indexed by what is not known when compiling, an array cannot be in registers.
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(96) spills(float* x, const int* at) {\n"
        "  __shared__ float y[32];\n"
        "  float local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[at[i] & 63] = x[i];\n"
        "  y[threadIdx.x & 31] = local[at[64] & 63];\n"
        "  __syncthreads();\n"
        "  x[threadIdx.x] = y[(threadIdx.x + 1) & 31];\n"
        "}\n"
    )
    for arch in ("sm_80", "sm_90"):
        cubin = cuda_toolkit.compile_cubin(source, arch, tmp_path / "spills.cubin")
        (code,) = cuda_machine_code.read_cubin(cubin, arch).values()
        assert code["threads"] == 96 and code["static_shared"] == 128
        assert code["stack"] >= 256 and code["local_loads"] >= 1 and code["local_stores"] >= 64
        assert code["products"] == 0 and code["issued"] == ""


def test_what_is_not_known_is_refused(nvcc):
    command = [sys.executable, TOOLS / "cuda_resources.py"]
    done = subprocess.run([*command, "--arch", "sm_1"], capture_output=True, text=True)
    assert done.returncode == 2 and "sm_90" in done.stderr
    with pytest.raises(cuda_toolkit.ToolError, match="parse_name has to learn it"):
        cuda_machine_code.parse_name("_ZN4hlip4otherIfEEvv")
