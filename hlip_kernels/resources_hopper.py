"""What the compiler makes of every Hopper kernel: registers, shared memory, spills, products, and whether things overlap.

    python -m hlip_kernels.resources_hopper
    python -m hlip_kernels.resources_hopper --csv tests/codegen/hopper-3.8.csv    # what the tests compare with
    python -m hlip_kernels.resources_hopper --known tests/codegen/hopper-3.8.csv  # compiles what is not, or no longer, in there

Needs no GPU: kernels are compiled for sm_90a and read as machine code, with the tools that triton ships. ptxas decides
the order of instructions, and what was written to go on at once may not; so each loop that multiplies is followed through:
how many products are in flight when its exponentials are computed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from . import machine_code
from .backends.hopper import constants_of
from .backends.hopper.config import HEAD_DIMS, KERNELS, WHOLE, Config
from .compilation import Compilation, find_row
from .machine_code import Instruction, innermost_loops, parse
from .resources import argument_type, read_rows, run_tool, usage_of, write_rows

SHARED_MEMORY = 232448  # bytes that one program may use
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Compile-time constants that no table holds, by the kernel's name: all that are worth telling apart.
VARIANTS = {
    "attention_backward_dq": ({"HAS_GRAD_LSE": False}, {"HAS_GRAD_LSE": True}),
    "attention_backward_fused": ({"ORDERED": True}, {"ORDERED": False}),
    "attention_backward_whole": ({"HAS_GRAD_LSE": False}, {"HAS_GRAD_LSE": True}),
}


@dataclass(frozen=True)
class HopperResources:
    """Figures of one compiled kernel.

    Attributes:
        variant: compile-time constants beside those of the table.
        registers: that ptxas counts at the start. spill_bytes: local memory of a thread.
        loop_spills: instructions that load or store local memory, in loops with products and exponentials. reducer_spills: in
            loops with products alone, those of the group that adds up dQ.
        instructions, reducer_instructions: in the longest such loop of either kind, the repeated tries of its waits included.
        products, tma_loads: instructions (HGMMA, UTMALDG). serialized: ptxas says that it made products wait for one another.
        exponentials: instructions in those loops. overlapped: those with a product in flight.
        unsynchronised: arrivals at a barrier, and products, that a warp may reach before the others' loads, stores and waits.
        order: of the first such loop that has exponentials.
        source: the digest of what these follow from (:meth:`hlip_kernels.compilation.Compilation.digest`); rows with the same
            figures are equal all the same.
    """

    kernel: str
    variant: str
    dtype: str
    head_dim: int
    consumers: int
    block: int
    stages: int
    registers: int
    shared_memory: int
    spill_bytes: int
    loop_spills: int
    reducer_spills: int
    instructions: int
    reducer_instructions: int
    products: int
    tma_loads: int
    serialized: int
    exponentials: int
    overlapped: int
    unsynchronised: int
    order: str
    source: str = field(compare=False)


def compilation(
    kernel: str, dtype: str, head_dim: int, variant: dict | None = None, config: Config | None = None
) -> Compilation:
    """How one kernel is compiled for sm_90a; :meth:`Compilation.run` gives its PTX and its cubin.

    Raises:
        RuntimeError: triton's interpreter is on.
    """
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from .backends.hopper import kernel_named, tile_layout
    from .backends.triton import interpreted

    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process, unset it")
    variant = variant or {}
    config = config or KERNELS[kernel][head_dim]
    function = kernel_named(kernel)
    constants = constants_of(config, head_dim) | variant
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    layout = tile_layout(gl, DTYPES[dtype], config.box, head_dim)
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            element = argument_type("q", DTYPES[dtype]).removeprefix("*")
            signature[name] = f"tensordesc<{element}[{config.box}, {head_dim}],{layout!r}>"
        else:
            signature[name] = argument_type(name, DTYPES[dtype])
        # As at launch: addresses and strides of real tensors are multiples of 16.
        stride = name.endswith(("_row", "_head")) and not name.startswith("dlse")
        if signature[name].startswith("*") or stride:
            attributes[i,] = [["tt.divisibility", 16]]
    options = {"num_warps": 4, "maxnreg": config.max_registers, "enable_fp_fusion": True}
    options["launch_cooperative_grid"] = bool(variant.get("ORDERED"))
    source = GluonASTSource(function, signature, constants, attributes)
    return Compilation(source, GPUTarget("cuda", 90, 32), options)


def read_resources(
    kernel: str, dtype: str, head_dim: int, variant: dict | None = None, known: Iterable[HopperResources] = ()
) -> HopperResources:
    """Compiles one kernel and reads its figures.

    Args:
        known: rows from before. If one of them was made of the same source, with the same compiler, it is the result.
    """
    config, name = KERNELS[kernel][head_dim], " ".join(f"{k}={v}" for k, v in (variant or {}).items())
    digest = digest_of(kernel, dtype, head_dim, variant)
    if row := find_row(known, digest, kernel=kernel, dtype=dtype, head_dim=head_dim, variant=name):
        return row
    return HopperResources(
        kernel, name, dtype, head_dim, config.consumers, config.block, config.stages,
        **_read(compilation(kernel, dtype, head_dim, variant).run(), kernel), source=digest,
    )  # fmt: skip


def digest_of(kernel: str, dtype: str, head_dim: int, variant: dict | None = None) -> str:
    """What :attr:`HopperResources.source` is for a kernel compiled now."""
    readers = machine_code, _read, str(WHOLE), in_flight, _spills, order_of, unsynchronised, usage_of, run_tool
    return compilation(kernel, dtype, head_dim, variant).digest(*readers)


def _read(compiled, kernel: str) -> dict[str, int | str]:
    """The figures of a compiled kernel, by their names in :class:`HopperResources`."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        registers, spilled = usage_of(cubin)
        blocks = parse(run_tool("nvdisasm", "-c", cubin).stdout)
        said = run_tool("ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "again.cubin"))
    code = [i for block in blocks for i in block.instructions]
    loops = innermost_loops(blocks, "product")
    found = [in_flight(loop) for loop in loops]
    with_exponentials = [loop for loop, (exponentials, _) in zip(loops, found, strict=True) if exponentials]
    without = [loop for loop, (exponentials, _) in zip(loops, found, strict=True) if not exponentials]
    return dict(
        registers=registers,
        shared_memory=compiled.metadata.shared,
        spill_bytes=spilled,
        loop_spills=sum(map(_spills, with_exponentials)),
        reducer_spills=sum(map(_spills, without)),
        instructions=max(map(len, with_exponentials), default=0),
        reducer_instructions=max(map(len, without), default=0),
        products=sum(i.kind == "product" for i in code),
        tma_loads=sum(i.name.startswith("UTMALDG") for i in code),
        serialized=int("serializ" in (said.stdout + said.stderr).lower()),
        exponentials=sum(exponentials for exponentials, _ in found),
        overlapped=sum(overlapped for _, overlapped in found),
        unsynchronised=unsynchronised(code, kernel not in WHOLE),
        order=order_of(with_exponentials[0]) if with_exponentials else "",
    )


def in_flight(loop: list[Instruction]) -> tuple[int, int]:
    """The exponentials of a loop, and how many of them are computed with a product in flight."""
    flying = exponentials = overlapped = 0
    for again in (False, True):  # the second time begins with what the first has left in flight
        for i in loop:
            if i.kind == "product":
                flying += "gsb0" in i.operands  # the last of a batch, which one wait covers
            elif i.kind.startswith("wait"):
                flying = min(flying, int(i.kind.split()[1]))
            elif i.kind == "exp2" and again:
                exponentials += 1
                overlapped += flying > 0
    return exponentials, overlapped


def _spills(loop: list[Instruction]) -> int:
    return sum(i.kind == "spill" for i in loop)


def order_of(loop: list[Instruction]) -> str:
    """``"4 product, 34 exp2, 4 product, wait 0"``."""
    kinds = [i.kind for i in loop if i.kind and i.kind != "barrier"]
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    return ", ".join(kind if kind.startswith("wait") else f"{count} {kind}" for kind, count in runs)


def unsynchronised(code: list[Instruction], own_operands: bool = True) -> int:
    """Arrivals right after a load, a store or a wait, and products right after a store, with no barrier of the warps between.

    One warp arrives for all four, and a product reads what all four stored; not in a kernel without ``own_operands``, where
    groups multiply only what others have stored. Source order is that of the addresses here:
    ptxas puts nothing but the repeated tries of a wait elsewhere.
    """
    count, loaded, stored, waited = 0, False, False, False
    for i in code:
        if i.name.startswith("BAR.SYNC"):
            loaded = stored = waited = False
        elif i.name.startswith("LDS"):
            loaded = True
        elif i.name.startswith(("STS", "FENCE.VIEW.ASYNC")):
            stored = True
        elif i.kind.startswith("wait"):
            waited = True
        elif i.name.startswith("SYNCS.ARRIVE"):
            count += loaded or stored or waited
        elif i.kind == "product":
            count += stored and own_operands
    return count


def shipped(dtypes=DTYPES, head_dims=HEAD_DIMS) -> Iterator[tuple[str, str, int, dict]]:
    """``(kernel, dtype, head_dim, variant)`` of every configuration there is."""
    for kernel, table in KERNELS.items():
        for head_dim in table:
            for dtype in dtypes:
                for variant in VARIANTS.get(kernel, ({},)):
                    if head_dim in head_dims:
                        yield kernel, dtype, head_dim, variant


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hlip_kernels.resources_hopper", description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--known", type=Path, help="rows of this file stand where what they were made of is the same")
    parser.add_argument("--anew", nargs="+", type=int, default=[], help="head dims that are compiled all the same")
    args = parser.parse_args(argv)
    rows, known = [], read_rows(args.known, HopperResources) if args.known else []
    for combination in shipped(args.dtype, args.head_dim):
        r = read_resources(*combination, known=[] if combination[2] in args.anew else known)
        rows.append(r)
        print(
            f"{r.kernel} {r.variant} {r.dtype} D={r.head_dim}: {r.consumers} consumers, {r.stages} tiles of {r.block}\n"
            f"  {r.registers} registers, {r.shared_memory} bytes shared, {r.spill_bytes} bytes spilled, "
            f"{r.loop_spills} spills in loops, {r.reducer_spills} in the reducer's\n"
            f"  {r.instructions} instructions in a loop, {r.reducer_instructions} in the reducer's\n"
            f"  {r.products} products, {r.tma_loads} TMA loads, {'serialized, ' * r.serialized}"
            f"{r.overlapped} of {r.exponentials} exponentials with a product in flight, {r.unsynchronised} unsynchronised\n"
            f"  {r.order}",
            flush=True,
        )
    if args.csv:
        write_rows(rows, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
