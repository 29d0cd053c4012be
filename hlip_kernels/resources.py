"""What the compiler makes of every shipped Triton kernel: registers, shared memory, spills, instructions.

    python -m hlip_kernels.resources                     # every kernel, dtype, head dim, architecture
    python -m hlip_kernels.resources --arch sm_90 --head-dim 64
    python -m hlip_kernels.resources --csv tests/codegen/triton-3.9.csv    # what the tests compare with
    python -m hlip_kernels.resources --known tests/codegen/triton-3.9.csv  # compiles what is not, or no longer, in there

Needs no GPU: kernels are compiled for a named target, and the figures are read out of the machine code with the tools
that triton ships. The same compiler makes the same of the same, so a row also says what it was made of (``source``).
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from . import machine_code
from .backends.triton.config import KERNELS, Config, config_for
from .compilation import Compilation, find_row
from .machine_code import innermost_loops, parse

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
# One for each width of a tile that has more columns than the head; not multiples of 16, so that strides are not either.
PARTLY = (24, 40, 72, 88, 120, 136, 248)
# What the inputs are and whether TF32 products are allowed, by the name it has here and in the record.
KINDS = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tfloat32": (torch.float32, True),
}


@dataclass(frozen=True)
class Architecture:
    """A compile target and its limits.

    Attributes:
        family: whose tile sizes it takes (see ``config.FAMILIES``).
        shared_memory: bytes of shared memory (LDS) one block may use.
        registers: registers one thread may use.
        matrix: regular expression of its matrix instructions in the disassembly, their name a group.
    """

    family: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    registers: int
    matrix: str


ARCHITECTURES = {
    # 99 KB is the least of sm_86, sm_89 and sm_120, which take the same tiles; sm_80 itself has 163 KB.
    "sm_80": Architecture("ampere", "cuda", 80, 32, 101376, 255, r"\b(HMMA)\."),
    "sm_90": Architecture("hopper", "cuda", 90, 32, 232448, 255, r"\b(HGMMA|HMMA)\."),
    "sm_100": Architecture("hopper", "cuda", 100, 32, 232448, 255, r"\b(UTC\w*MMA|HMMA)\b"),
    "gfx942": Architecture("amd", "hip", "gfx942", 64, 65536, 512, r"\b(v_mfma)_"),
}


@dataclass(frozen=True)
class Resources:
    """Figures of one compiled kernel.

    Attributes:
        columns: of a tile, one block or two. spill_bytes: local memory (stack) a thread.
        matrix_instructions, matrix_kind: how many there are, and which; ``HGMMA`` is Hopper's warpgroup MMA, ``HMMA`` that
            of one warp.
        instructions, exponentials: of a thread, in the loop over whole tiles of patch rows.
        source: the digest of what these follow from (:meth:`hlip_kernels.compilation.Compilation.digest`); rows with the same
            figures are equal all the same.
    """

    kernel: str
    dtype: str
    head_dim: int
    arch: str
    block_m: int
    block_n: int
    columns: str
    num_warps: int
    num_stages: int
    registers: int
    shared_memory: int
    spill_bytes: int
    matrix_instructions: int
    matrix_kind: str
    instructions: int
    exponentials: int
    source: str = field(compare=False)

    def a_logit(self, count: int) -> float:
        """``count`` instructions of a thread and step, as instructions for each logit of a tile; 0 where there are none.

        Of ``exponentials`` about 1: where it is more, several threads compute the same logit.
        """
        threads = self.num_warps * ARCHITECTURES[self.arch].warp_size
        return count * threads / max(self.block_m * self.block_n, 1)


def compilation(kernel: str, kind: str, head_dim: int, arch: str, config: Config | None = None) -> tuple[Config, Compilation]:
    """How one kernel is compiled for one of :data:`KINDS` and :data:`ARCHITECTURES`, and with which tiles.

    Raises:
        ValueError: the kernel is not used there (the table has no tiles for it), and no ``config`` was given.
        RuntimeError: triton's interpreter is on.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .backends.triton import fused_backward, interpreted, kernels

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process, unset it")
    target = ARCHITECTURES[arch]
    dtype, tf32 = KINDS[kind]
    config = config or config_for(kernel, dtype, head_dim, target.family, tf32)
    if config is None:
        raise ValueError(f"{kernel} has no tiles for {kind} and head dim {head_dim} on {arch}")
    config = config.on(head_dim)
    function = getattr(kernels, kernel, None) or getattr(fused_backward, kernel)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": config.columns[0],
        "BLOCK_E": config.columns[1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "tf32" if tf32 else "ieee",
        "MULTIPLE": 16 if head_dim % 16 == 0 else 8,
        "HAS_GRAD_LSE": False,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else argument_type(name, dtype)
        # As at launch: addresses are multiples of 16, and strides if the head dim is. (Else those of rows still are where the
        # number of heads is even. That was tried with triton 3.8: the figures are the same.)
        stride = name.endswith(("_row", "_head")) and not name.startswith("dlse") and head_dim % 16 == 0
        if signature[name].startswith("*") or stride:
            attributes[i,] = [["tt.divisibility", 16]]
    return config, Compilation(
        ASTSource(function, signature, constants, attributes),
        GPUTarget(target.backend, target.arch, target.warp_size),
        {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    )


def compile_kernel(
    kernel: str, kind: str, head_dim: int, arch: str, config: Config | None = None, known: Iterable[Resources] = ()
) -> Resources:
    """Compiles one kernel and reads its figures; arguments and errors are those of :func:`compilation`.

    Args:
        known: rows from before. If one of them was made of the same source, with the same compiler, it is the result.
    """
    digest = digest_of(kernel, kind, head_dim, arch, config)
    config, made = compilation(kernel, kind, head_dim, arch, config)
    if row := find_row(known, digest, kernel=kernel, dtype=kind, head_dim=head_dim, arch=arch):
        return row
    compiled, target = made.run(), ARCHITECTURES[arch]
    read = _reader(arch)
    registers, spills, code = read(compiled.asm["cubin" if target.backend == "cuda" else "amdgcn"])
    return Resources(
        kernel, kind, head_dim, arch,
        config.block_m, config.block_n, "+".join(str(c) for c in config.columns if c), config.num_warps, config.num_stages,
        registers, compiled.metadata.shared, spills, *_figures(code, target.matrix), source=digest,
    )  # fmt: skip


def digest_of(kernel: str, kind: str, head_dim: int, arch: str, config: Config | None = None) -> str:
    """What :attr:`Resources.source` is for a kernel compiled now."""
    made = compilation(kernel, kind, head_dim, arch, config)[1]
    return made.digest(machine_code, _figures, ARCHITECTURES[arch].matrix, _reader(arch), usage_of, run_tool)


def _reader(arch: str) -> Callable[[bytes | str], tuple[int, int, str]]:
    return _read_cubin if ARCHITECTURES[arch].backend == "cuda" else _read_amdgcn


def _figures(code: str, matrix: str) -> tuple[int, str, int, int]:
    """(matrix instructions, their kinds, instructions and exponentials of the loop over whole tiles) of a disassembly."""
    found = re.findall(matrix, code)
    # Two loops have exponentials: this one and that over the last rows of a segment, which has masks besides.
    loop = min(innermost_loops(parse(code), "exp2"), key=len, default=[])
    return len(found), "+".join(sorted(set(found))), len(loop), sum(i.kind == "exp2" for i in loop)


def argument_type(name: str, dtype: torch.dtype) -> str:
    """The type of a kernel's argument, by the name it has in all of them."""
    element = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    if name in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"):
        return f"*{element}"
    if name in ("lse", "grad_lse", "delta", "dq_sum"):
        return "*fp32"
    if name in ("tiles", "records", "turns"):
        return "*i32"
    return "fp32" if name in ("scale", "scale_log2", "sign") else "i32"


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, local memory bytes, disassembly) of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return *usage_of(path), run_tool("nvdisasm", "-c", path).stdout


def usage_of(cubin: Path) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    said = run_tool("cuobjdump", "--dump-resource-usage", cubin).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", said).group(1)) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def run_tool(tool: str, *arguments) -> subprocess.CompletedProcess:
    """Runs one of the CUDA binaries in triton's own folder; the ptxas that triton itself takes for sm_90."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    path = get_ptxas(90).path if tool == "ptxas" else path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True)


def _read_amdgcn(assembly: str) -> tuple[int, int, str]:
    """(vector registers, private memory bytes, the assembly itself) of AMD assembly."""
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1))
    private = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly).group(1))
    return registers, private, assembly


def shipped(archs=ARCHITECTURES, kinds=KINDS, head_dims=None, kernels=KERNELS):
    """Yields ``(kernel, kind, head_dim, arch)`` of every combination that there are tiles for.

    Head dims, if none are given: :data:`HEAD_DIMS`, and for bfloat16, which stands for all in this, :data:`PARTLY`.
    """
    for arch in archs:
        for kind in kinds:
            for head_dim in head_dims or (HEAD_DIMS + PARTLY * (kind == "bfloat16")):
                for kernel in kernels:
                    dtype, tf32 = KINDS[kind]
                    if config_for(kernel, dtype, head_dim, ARCHITECTURES[arch].family, tf32) is not None:
                        yield kernel, kind, head_dim, arch


def write_rows(rows: Sequence, path: Path) -> None:
    """Rows (dataclasses of one kind) as CSV, a line each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path, kind: type = Resources) -> list:
    """What :func:`write_rows` wrote, as rows of that kind; their fields are text or integers."""
    with path.open(newline="") as file:
        return [
            kind(**{f.name: row[f.name] if f.type == "str" else int(row[f.name]) for f in fields(kind)})
            for row in csv.DictReader(file)
        ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hlip_kernels.resources", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--head-dim", nargs="+", type=int)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--known", type=Path, help="rows of this file stand where what they were made of is the same")
    parser.add_argument("--anew", nargs="+", type=int, default=[], help="head dims that are compiled all the same")
    args = parser.parse_args(argv)
    rows, known = [], read_rows(args.known) if args.known else []
    print("kernel                   dtype    D    arch    tile     columns warps stages  regs  shared  spill  a logit  matrix")
    for combination in shipped(args.arch, args.dtype, args.head_dim, args.kernel):
        r = compile_kernel(*combination, known=[] if combination[2] in args.anew else known)
        rows.append(r)
        print(
            f"{r.kernel:24} {r.dtype:8} {r.head_dim:<4} {r.arch:7} {r.block_m:>3}x{r.block_n:<4} {r.columns:>7} "
            f"{r.num_warps:>5} {r.num_stages:>6} {r.registers:>5} {r.shared_memory:>7} {r.spill_bytes:>6} "
            f"{r.a_logit(r.instructions):>8.1f} {r.matrix_instructions:>7} {r.matrix_kind}",
            flush=True,
        )
    if args.csv:
        write_rows(rows, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
