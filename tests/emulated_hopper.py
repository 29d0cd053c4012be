"""The Hopper backend on the CPU: its kernels' own source, run by the emulator of gluon_emulation.py."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import torch
from gluon_emulation import DescriptorArgument, launch, load_kernels

from hlip_kernels.backends import hopper
from hlip_kernels.backends import triton as triton_backend
from hlip_kernels.backends.base import Support

FOLDER = Path(hopper.__file__).parent
FILES = ("ring", "forward", "backward", "fused_backward")


def sources() -> dict[str, str]:
    return {name: (FOLDER / f"{name}.py").read_text() for name in FILES}


@functools.cache
def kernels():
    return load_kernels(sources())


class _Triton(triton_backend.TritonBackend):
    """What the hopper backend leaves to Triton's kernels, without a GPU."""

    def delta(self, out, grad_out, grad_lse, has_grad_lse):
        """``rowsum(dO * O) - dLSE``, and the zeros that dQ is added to."""
        delta = (out.float() * grad_out.float()).sum(-1).T.contiguous()
        return delta - grad_lse if has_grad_lse else delta, torch.zeros(out.shape, dtype=torch.float32)


class EmulatedHopperBackend(hopper.HopperBackend):
    """Takes what the hopper backend takes, on CPU tensors.

    Attributes:
        seed: of the order in which things happen; each launch takes the next. programs: of a launch; ``None`` draws 1 to 5.
        written: by kernel, how often its last launch wrote each element of its tensor arguments.
    """

    triton = _Triton()

    def __init__(self, found=None, programs: int | None = None, ordered: bool = False):
        super().__init__(ordered)
        self.kernels = found or kernels()
        self.seed, self.programs = 0, programs
        self.written = {}

    def supports(self, query):
        return self.takes(query) if query.device_type == "cpu" else Support.no("emulated: on the CPU only")

    def launch(self, name, config, items, loaded, *args, **constants):
        self.seed += 1
        head_dim = loaded[0].shape[-1]
        described = [DescriptorArgument(t, hopper.extent(t), (config.block, head_dim)) for t in loaded]
        programs = self.programs or random.Random(self.seed).randint(1, 5)
        constants |= hopper.constants_of(config, head_dim)
        ordered = ["dq_sum"] if constants.get("ORDERED") else []
        kernel = getattr(self.kernels, name)
        buffers = launch(kernel, min(programs, items), *described, *args, seed=self.seed, ordered=ordered, **constants)
        self.written[name] = {key: b.times_stored() for key, b in buffers.items()}
