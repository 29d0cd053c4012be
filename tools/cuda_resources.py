"""What nvcc makes of the short-segment attention kernels: registers, spills, shared memory, occupancy, instructions.

    python tools/cuda_resources.py                              # every head dim and architecture
    python tools/cuda_resources.py --arch sm_90 --head-dim 64
    python tools/cuda_resources.py --csv tests/codegen/short_attention.csv    # what the tests compare with
    python tools/cuda_resources.py --known tests/codegen/short_attention.csv  # compiles nothing if no source has changed since

Needs csrc/, nvcc and a compiler for C++, but no GPU. Figures are read out of the machine code with cuobjdump and nvdisasm, of
the CUDA toolkit or of triton, which ships them. ``hlip_kernels.resources`` does the same for the Triton kernels.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import cuda_machine_code
from cuda_machine_code import RESERVED_SHARED_MEMORY, parse_name, read_cubin
from cuda_toolkit import CSRC, SOURCE, ToolError, compile_cubin, find_nvcc, nvcc_version, run, source_digest, why_not

from hlip_kernels import machine_code
from hlip_kernels.backends import cuda_whole
from hlip_kernels.backends.cuda import HEAD_DIMS, SHARED_MEMORY, max_rows
from hlip_kernels.packs import PACK_ROWS

SLICE_ROWS = 14 * 14 + 2  # patches and prefix rows of a slice of the published models


@dataclass(frozen=True)
class Architecture:
    """What one multiprocessor has (CUDA programming guide, "Technical Specifications").

    Attributes:
        capability: as in ``SHARED_MEMORY``, which knows what one block may use.
        shared_memory: bytes, all blocks together, of which the system keeps 1 KB a block.
        warps: that may be resident. blocks: likewise.
    """

    capability: tuple[int, int]
    shared_memory: int
    warps: int
    blocks: int

    @property
    def block_shared_memory(self) -> int:
        return SHARED_MEMORY[self.capability]


ARCHITECTURES = {
    "sm_80": Architecture((8, 0), 164 << 10, 64, 32),
    "sm_86": Architecture((8, 6), 100 << 10, 48, 16),
    "sm_90": Architecture((9, 0), 228 << 10, 64, 32),
    "sm_100": Architecture((10, 0), 228 << 10, 64, 32),
    "sm_120": Architecture((12, 0), 100 << 10, 48, 24),
}
MOST_REGISTERS = 255  # of one thread


@dataclass(frozen=True)
class Resources:
    """Figures of one kernel on one architecture.

    Attributes:
        nvcc: the compiler, as major.minor.
        keys: the most rows of a segment that a backward kernel for whole ones keeps; step: queries between two of its barriers;
            0: another kernel.
        threads: of a block.
        stack: bytes of local memory a thread has for anything, spilled registers among it.
        local_loads, local_stores: instructions that touch it.
        static_shared: bytes of shared memory, what the system keeps not counted.
        products: tensor-core instructions (HMMA). matrix_loads: LDSM. exponentials: MUFU.EX2.
        issued: products/instructions of a turn of the innermost loops with products, by address, without what only some turns
            do, such as masking. copying: copies/instructions of the loop that copies most (16 bytes a thread each).
        rows, shared, blocks, warps: the largest pack it may be launched with here, the bytes of shared memory that takes, and
            how many blocks and warps of it fit a multiprocessor. 0: it never runs here, as segments that long do not fit.
        slice_shared, slice_blocks, slice_warps: the same for a published slice; 0: such a slice does not come to this kernel.
        source: the digest of what these follow from (:func:`cuda_toolkit.source_digest`); rows with the same figures are equal
            all the same.
    """

    nvcc: str
    kernel: str
    dtype: str
    head_dim: int
    keys: int
    step: int
    arch: str
    threads: int
    registers: int
    stack: int
    local_loads: int
    local_stores: int
    static_shared: int
    products: int
    matrix_loads: int
    exponentials: int
    issued: str
    copying: str
    rows: int
    shared: int
    blocks: int
    warps: int
    slice_shared: int
    slice_blocks: int
    slice_warps: int
    source: str = field(compare=False)


# ---------------------------------------------------------------- what a launch needs


@functools.cache
def shared_bytes() -> dict[tuple[str, int, int], int]:
    """(forward, backward or whole_forward, head dim, rows) -> bytes of dynamic shared memory, asked of csrc/short_attention.

    Also ``("whole 64 2", ...)`` and so on, of whole_backward.cuh with 64 queries a step and room for the keys of two segments,
    and ``("warps where there are 227 KB", ...)``, likewise step, keys and blocks: how it is launched there.
    """
    source = """
        #include <cstdio>
        #include <initializer_list>
        #include "short_attention/arguments.h"
        int main() {
          for (int d : hlip::kShortHeadDims) {
            for (int rows = 1; rows <= 1024; ++rows) {
              std::printf("forward, %d %d %lld\\n", d, rows, static_cast<long long>(hlip::short_forward_bytes(rows, d)));
              std::printf("backward, %d %d %lld\\n", d, rows, static_cast<long long>(hlip::short_backward_bytes(rows, d)));
              std::printf("whole_forward, %d %d %lld\\n", d, rows, static_cast<long long>(hlip::whole_forward_bytes(rows, d)));
              for (int step : {32, 64}) {
                for (int n : {1, 2}) {
                  const long long bytes = hlip::whole_backward_bytes(rows, d, step, n);
                  std::printf("whole %d %d, %d %d %lld\\n", step, n, d, rows, bytes);
                }
              }
              for (int kb : {99, 163, 227}) {
                const hlip::WholeLaunch w = hlip::whole_launch(rows, d, kb * 1024);
                std::printf("warps where there are %d KB, %d %d %d\\n", kb, d, rows, w.warps);
                std::printf("step where there are %d KB, %d %d %d\\n", kb, d, rows, w.step);
                std::printf("keys where there are %d KB, %d %d %d\\n", kb, d, rows, w.keys);
                std::printf("blocks where there are %d KB, %d %d %d\\n", kb, d, rows, w.blocks);
              }
            }
          }
        }"""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bytes"
        (program.with_suffix(".cpp")).write_text(source)
        # By nvcc, because it always knows a C++ compiler that works.
        run(find_nvcc(), "-std=c++17", "-cudart=none", "-I", CSRC, program.with_suffix(".cpp"), "-o", program)
        lines = run(program).splitlines()
    table = {}
    for line in lines:
        way, numbers = line.split(", ")
        head_dim, rows, size = numbers.split()
        table[way, int(head_dim), int(rows)] = int(size)
    return table


def resident(arch: str, threads: int, registers: int, shared: int) -> tuple[int, int]:
    """Blocks and warps that fit one multiprocessor, as the CUDA occupancy calculator counts.

    Args:
        arch: a key of :data:`ARCHITECTURES`. threads: of a block. registers: of a thread. shared: bytes of a block, static
            and dynamic, without what the system keeps.
    """
    has = ARCHITECTURES[arch]
    if shared > has.block_shared_memory:
        return 0, 0
    warps = -(-threads // 32)
    # Each quarter of a multiprocessor has 16384 registers, handed to its warps in units of 256.
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = 16384 // of_a_warp * 4 // warps
    of_a_block = -(-(shared + RESERVED_SHARED_MEMORY) // 128) * 128
    blocks = min(by_registers, has.shared_memory // of_a_block, has.warps // warps, has.blocks)
    return blocks, blocks * warps


def launches(kernel: str, keys: int, step: int, head_dim: int, arch: str) -> tuple[int, bool]:
    """The largest pack a kernel may be launched with on an architecture (0: it never is), and if a published slice comes to it.

    Args:
        keys, step: as in :class:`Resources`.
    """
    longest = max_rows(head_dim, ARCHITECTURES[arch].capability)
    if kernel.endswith("whole_backward"):
        shared = ARCHITECTURES[arch].block_shared_memory
        # Shorter ones share packs, or are those of the kernel with blocks of 4 warps.
        least = (min(PACK_ROWS, longest) // 2 if keys == cuda_whole.ROWS[0] else cuda_whole.ROWS[0]) + 1
        lengths = range(least, min(keys, longest) + 1)
        found = {rows: cuda_whole.whole_launch(rows, head_dim, shared) for rows in lengths}
        fits = [rows for rows, launch in found.items() if launch and launch.step == step]
        return max(fits, default=0), SLICE_ROWS in fits
    if kernel.endswith("attention_forward"):
        return min(PACK_ROWS, longest), False  # a slice has a pack of its own
    return longest, longest >= SLICE_ROWS


def with_launches(row: dict) -> Resources:
    """The figures read out of the machine code, and what follows from them and from the sizes of packs."""
    rows, takes_slices = launches(row["kernel"], row["keys"], row["step"], row["head_dim"], row["arch"])
    figures = {}
    for prefix, count in (("", rows), ("slice_", SLICE_ROWS if takes_slices else 0)):
        shared = _shared(row, count) if count else 0
        blocks, warps = (0, 0)
        if count:
            blocks, warps = resident(row["arch"], row["threads"], row["registers"], row["static_shared"] + shared)
        figures |= {f"{prefix}shared": shared, f"{prefix}blocks": blocks, f"{prefix}warps": warps}
    known = {f.name for f in fields(Resources)} - figures.keys() - {"rows"}
    return Resources(**{name: row[name] for name in known}, rows=rows, **figures)


def _shared(row: dict, rows: int) -> int:
    """Bytes of dynamic shared memory of a block."""
    way = row["kernel"].removeprefix("short_attention_")
    if way == "whole_backward":
        launch = cuda_whole.whole_launch(rows, row["head_dim"], ARCHITECTURES[row["arch"]].block_shared_memory)
        way = f"whole {launch.step} {launch.keys}"
    return shared_bytes()[way, row["head_dim"], rows]


def compile_kernels(head_dim: int, arch: str) -> list[Resources]:
    """Compiles all kernels of one head dim for one architecture and reads their figures."""
    reason = why_not(arch)
    if reason:
        raise ToolError(reason)
    with tempfile.TemporaryDirectory() as folder:
        code = read_cubin(compile_cubin(SOURCE, arch, Path(folder) / "kernels.cubin", f"-DHLIP_HEAD_DIM={head_dim}"), arch)
    rows = []
    for mangled, figures in code.items():
        kernel, dtype, of_name, keys, step = parse_name(mangled)
        assert of_name == head_dim, mangled
        named = {"nvcc": nvcc_version(), "kernel": kernel, "dtype": dtype, "head_dim": head_dim, "keys": keys, "step": step}
        rows.append(named | {"arch": arch, "source": digest_on(arch)} | figures)
    return sorted(map(with_launches, rows), key=lambda r: (r.dtype, r.kernel, r.keys, r.step))


def digest_on(arch: str) -> str:
    """What :attr:`Resources.source` is for kernels compiled now."""
    return source_digest(arch, cuda_machine_code, machine_code)


def compile_all(
    archs: Iterable[str], head_dims: Iterable[int], jobs: int, known: Iterable[Resources] = (), anew: Iterable[int] = ()
) -> Iterator[Resources]:
    """Yields the :class:`Resources` of every combination.

    Args:
        known: rows from before, which stand if they were made of the same source with the same compiler. anew: head dims that
            are compiled all the same.
    """
    shared_bytes()  # once, before threads ask for it
    pairs = [(head_dim, arch) for arch in archs for head_dim in head_dims]
    stand = {(d, a): [r for r in known if (r.head_dim, r.arch, r.source) == (d, a, digest_on(a))] for d, a in pairs}
    for (head_dim, arch), rows in stand.items():
        every = {(r.kernel, r.dtype, r.keys, r.step) for r in known if r.head_dim == head_dim}
        whole = {(r.kernel, r.dtype, r.keys, r.step) for r in rows} == every  # else one was lost from the file
        stand[head_dim, arch] = [with_launches(asdict(r)) for r in rows] if whole else []
    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(lambda pair: (pair[0] not in anew and stand[pair]) or compile_kernels(*pair), pairs):
            yield from rows


# ---------------------------------------------------------------- record


def write_rows(rows: Iterable[Resources], path: Path) -> None:
    """Rows as CSV, a line each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Resources)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path) -> list[Resources]:
    """What :func:`write_rows` wrote."""
    with path.open(newline="") as file:
        return [
            Resources(**{f.name: row[f.name] if f.type == "str" else int(row[f.name]) for f in fields(Resources)})
            for row in csv.DictReader(file)
        ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tools/cuda_resources.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers to run at once")
    parser.add_argument("--csv", type=Path, help="also write the rows here, in place of what is there")
    parser.add_argument("--known", type=Path, help="rows of this file stand if no source has changed since")
    parser.add_argument("--anew", nargs="+", type=int, default=[], help="head dims that are compiled all the same")
    args = parser.parse_args(argv)
    known = read_rows(args.known) if args.known else []
    print(
        "spills: bytes of local memory, loads, stores. largest: rows and shared bytes of the largest pack, and the blocks and"
    )
    print(
        f"warps of it that fit a multiprocessor; slice: the same of slices of {SLICE_ROWS} rows; -: none comes to this kernel."
    )
    print(
        f"{'kernel':30} {'keys':>4} {'step':>4} {'dtype':8} {'D':>3} {'arch':6} {'thr':>4} {'regs':>4} {'spills':>10} "
        f"{'static':>6} {'HMMA':>5} {'LDSM':>5} {'EX2':>4}  {'largest':22} slice"
    )
    rows = []
    try:
        for r in compile_all(args.arch, args.head_dim, args.jobs, known, args.anew):
            rows.append(r)
            print(_line(r), flush=True)
    except ToolError as error:
        print(f"cuda_resources: {error}", file=sys.stderr)
        return 1
    if args.csv:
        write_rows(rows, args.csv)
    return 0


def _line(r: Resources) -> str:
    largest = f"{r.rows:>3} {r.shared:>6} {r.blocks:>2} x {r.threads // 32} = {r.warps:>2}" if r.rows else "-"
    a_slice = f"{r.slice_shared:>6} {r.slice_blocks:>2} x {r.threads // 32} = {r.slice_warps:>2}" if r.slice_shared else "-"
    spills = f"{r.stack}/{r.local_loads}/{r.local_stores}"
    sizes = f"{r.threads:>4} {r.registers:>4} {spills:>10} {r.static_shared:>6}"
    return (
        f"{r.kernel:30} {r.keys or '-':>4} {r.step or '-':>4} {r.dtype:8} {r.head_dim:>3} {r.arch:6} {sizes} "
        f"{r.products:>5} {r.matrix_loads:>5} {r.exponentials:>4}  {largest:22} {a_slice}"
    )


if __name__ == "__main__":
    sys.exit(main())
