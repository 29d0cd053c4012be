"""Times the Hopper kernels with other sizes than ``config.py`` ships, on this GPU.

    python tools/tune_hopper.py                                    # bfloat16, head dim 64, every kernel, three minutes
    python tools/tune_hopper.py --kernel attention_forward --lengths 590 12560 --out hopper.csv

One kernel at a time gets more or fewer tiles in its ring; or other numbers of consumers and of keys a tile, and forward queries
from registers instead of shared memory or the other way round, with registers dealt out anew and as many rows in the ring. What
is timed is the pass the kernel is part of, over equal segments. A candidate that does not compute what the shipped sizes do
falls away, as one that does not fit. Prints the fastest beside the shipped ones; nothing is written into ``config.py``:
whether the compiler kept what wins to the order of its source is for ``python -m hlip_kernels.resources_hopper`` to say, and
tests hold the table to that.
"""

import contextlib
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tuning

from hlip_kernels.backends import BACKENDS, Query, hopper
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.hopper.config import KERNELS, REGISTERS, Config, backward_kernels, forward_kernel

MOST_REGISTERS = 240  # of a thread: what a card lets a group of warps ask for
CONSUMERS = {"attention_forward": (2, 3), "attention_backward_dq": (2, 3)}  # of other kernels as they are
BLOCKS = {"attention_forward": (64, 128)}


def neighbours(kernel: str, shipped: Config) -> list[Config]:
    """The shipped configuration and those next to it, the least different first."""
    # Whole segments are as long as the shipped consumers together have rows; the products of two blocks are written out.
    consumers = CONSUMERS.get(kernel, (shipped.consumers,))
    blocks = BLOCKS.get(kernel, (shipped.block,))
    registers = (True, False) if kernel == "attention_forward" else (shipped.own_in_registers,)
    found = [replace(shipped, stages=shipped.stages + more) for more in (0, -2, -1, 1, 2) if shipped.stages + more >= 2]
    for count, block, in_registers in itertools.product(consumers, blocks, registers):
        stages = shipped.stages * shipped.block // block  # as many rows
        config = replace(shipped, consumers=count, block=block, stages=stages, own_in_registers=in_registers)
        if count != shipped.consumers:
            given = shipped.producer_registers + shipped.reducer_registers
            share = (REGISTERS // 128 - given) // count // 8 * 8
            config = replace(config, consumer_registers=min(share, MOST_REGISTERS))
        if config not in found:
            found.append(config)

    def different(config: Config) -> int:
        following = ("consumer_registers", "stages" if config.block != shipped.block else "")
        return sum(value != vars(shipped)[name] for name, value in vars(config).items() if name not in following)

    return sorted(found, key=different)


@dataclass(frozen=True)
class Case(tuning.Case):
    def backend(self) -> hopper.HopperBackend:
        return hopper.HopperBackend(ordered=self.kernel.endswith("_fused"), whole=self.kernel.endswith("_whole"))

    def shipped(self) -> Config | None:
        backend, plan = self.backend(), replace(self, rows=self.length, device="cpu").plan()
        forward = forward_kernel(plan, self.head_dim, backend.whole)
        used = (forward, *backward_kernels(plan, self.head_dim, backend.ordered, backend.whole))
        return KERNELS[self.kernel].get(self.head_dim) if self.kernel in used else None

    def candidates(self) -> list[Config]:
        return neighbours(self.kernel, self.shipped())

    def size_of(self, config: Config) -> str:
        rows = f"{config.consumers} consumers, {config.stages} tiles of {config.block}"
        queries = {True: ", queries in registers", False: ", queries in shared memory", None: ""}[config.own_in_registers]
        return f"{rows}, {config.consumer_registers} registers{queries}"

    def make(self):
        numerics, backend = Numerics(), self.backend()
        qkv, plan = self.batch()
        q, k, v = qkv.unbind(1)
        scale = self.head_dim**-0.5
        out, lse = backend.forward(q, k, v, plan, scale, numerics)
        grad = torch.randn_like(out)

        def once(config: Config) -> tuple[torch.Tensor, ...]:
            with sizes(self.kernel, self.head_dim, config):
                if self.kernel.startswith("attention_forward"):
                    return backend.forward(q, k, v, plan, scale, numerics)
                return backend.backward(grad, None, q, k, v, out, lse, plan, scale, numerics)

        return once


@contextlib.contextmanager
def sizes(kernel: str, head_dim: int, config: Config):
    """While the block runs, ``kernel`` has these sizes at that head dim."""
    table = KERNELS[kernel]
    shipped = table[head_dim]
    table[head_dim] = config
    try:
        yield
    finally:
        table[head_dim] = shipped


def why_not() -> str:
    """Why there is nothing to time; empty if there is."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if "hopper" not in BACKENDS:
        return "HLIP_KERNELS_WITHOUT says to do without them"
    return BACKENDS["hopper"].supports(Query("cuda", torch.cuda.get_device_capability(), torch.bfloat16, 64)).reason


def main(argv: list[str] | None = None) -> int:
    parser = tuning.arguments(__doc__.split("\n\n")[0], lengths=[198, 590, 6000], rows=49152)
    parser.add_argument("--kernel", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--head-dim", nargs="+", type=int, choices=hopper.HEAD_DIMS, default=[64])
    args = parser.parse_args(argv)
    if wrong := why_not():
        print(f"tune_hopper: cannot run the Hopper kernels here: {wrong}", file=sys.stderr)
        return 2
    cases = [
        Case(kernel, args.dtype, head_dim, args.heads, length, args.rows, "cuda")
        for head_dim in args.head_dim for length in args.lengths for kernel in args.kernel
        if kernel.endswith("_whole") == (length <= 256)
    ]  # fmt: skip
    return tuning.tune(cases, args)


if __name__ == "__main__":
    sys.exit(main())
