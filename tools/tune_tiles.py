"""Times the Triton kernels with the tiles next to those that ``config.py`` ships, on this GPU.

    python tools/tune_tiles.py                                    # bfloat16, head dim 64, three minutes
    python tools/tune_tiles.py --head-dim 80 --kernel attention_forward --lengths 770 --out tiles.csv

One kernel at a time gets other tiles: query rows and key rows halved, as they are or doubled, 4 or 8 warps, one stage less or
more. What is timed is the pass the kernel is part of, forward or backward, over equal segments. Candidates are compiled side by
side first, those that need more shared memory than there is fall away, and the rest is timed in rounds, so that a clock that
drifts is the same for all. Prints the fastest beside the shipped ones; nothing is written into ``config.py``: what wins on one
card may spill with another triton (``python -m hlip_kernels.resources``), and tests hold the table to that.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tuning

import hlip_kernels.backends.triton as backend
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.triton.config import KERNELS, Config

TUNED = tuple(name for name in KERNELS if name != "attention_backward_delta")  # that one has no products


@dataclass(frozen=True)
class Case(tuning.Case):
    def shipped(self) -> Config | None:
        device, dtype = torch.device(self.device), tuning.DTYPES[self.dtype]
        fast = Numerics(deterministic=False)
        if self.kernel == "attention_backward_fused" and not backend.is_fused(device, dtype, self.head_dim, self.length, fast):
            return None
        return backend.config_for(self.kernel, dtype, self.head_dim, backend.tile_family(device))

    def candidates(self) -> list[Config]:
        return neighbours(self.shipped())

    def size_of(self, config: Config) -> str:
        return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"

    def make(self):
        numerics = Numerics(deterministic=self.kernel != "attention_backward_fused")
        qkv, plan = self.batch()
        q, k, v = qkv.unbind(1)
        scale, triton = self.head_dim**-0.5, backend.TritonBackend()
        out, lse = triton.forward(q, k, v, plan, scale, numerics)
        grad = torch.randn_like(out)

        def once(config: Config) -> tuple[torch.Tensor, ...]:
            with tiles(self.kernel, config.on(self.head_dim)):
                if self.kernel == "attention_forward":
                    return triton.forward(q, k, v, plan, scale, numerics)
                return triton.backward(grad, None, q, k, v, out, lse, plan, scale, numerics)

        return once


@contextlib.contextmanager
def tiles(kernel: str, config: Config):
    """While the block runs, ``kernel`` has these tiles."""
    shipped = backend.config_for
    backend.config_for = lambda name, *rest: config if name == kernel else shipped(name, *rest)
    try:
        yield
    finally:
        backend.config_for = shipped


def neighbours(shipped: Config) -> list[Config]:
    """The shipped configuration and those next to it, the least different first."""
    found = [shipped]
    sizes = [[n for n in (size // 2, size, 2 * size) if 16 <= n <= 256] for size in (shipped.block_m, shipped.block_n)]
    stages = [n for n in (shipped.num_stages - 1, shipped.num_stages, shipped.num_stages + 1) if n >= 1]
    for m, n, warps, count in itertools.product(*sizes, (4, 8), stages):
        config = replace(shipped, block_m=m, block_n=n, num_warps=warps, num_stages=count)
        if config != shipped and m * n <= 128 * 128:
            found.append(config)

    def different(config: Config) -> int:
        return sum(value != vars(shipped)[name] for name, value in vars(config).items())

    return sorted(found, key=different)


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = tuning.arguments(__doc__.split("\n\n")[0], lengths=[770, 6000], rows=49152)
    parser.add_argument("--kernel", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--dtype", choices=list(tuning.DTYPES), default="bfloat16" if cuda else "float32")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64])
    args = parser.parse_args(argv)
    cases = [
        Case(kernel, args.dtype, head_dim, args.heads, length, args.rows, "cuda" if cuda else "cpu")
        for head_dim in args.head_dim for length in args.lengths for kernel in args.kernel
    ]  # fmt: skip
    return tuning.tune(cases, args)


if __name__ == "__main__":
    sys.exit(main())
