"""The Hopper backend on the CPU: its kernels' own source, run by the emulator of gluon_emulation.py; and cases to try it on."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from attention_truth import make, naive_attention, naive_mask, relative, sdpa_by_segment
from gluon_emulation import DescriptorArgument, launch, load_kernels

from hlip_kernels.backends import hopper
from hlip_kernels.backends.base import Numerics, Support
from hlip_kernels.pattern import Plan

FOLDER = Path(hopper.__file__).parent
FILES = ("ring", "own", "forward", "backward_dq", "backward_keys", "backward_whole")
FAR = {"row": 2**25, "head": 2**12}  # strides that put every row but the first 64 beyond 32-bit addresses


def sources() -> dict[str, str]:
    return {name: (FOLDER / f"{name}.py").read_text() for name in FILES}


@functools.cache
def kernels():
    return load_kernels(sources())


class EmulatedHopperBackend(hopper.HopperBackend):
    """Takes what the hopper backend takes, on CPU tensors.

    Args:
        found: other kernels than the project's. programs: of a launch; ``None`` draws 1 to 5.
        far: tell the kernels strides so large that addresses need 64 bits. options: of the backend.
    Attributes:
        seed: of the order in which things happen; each launch takes the next.
        written: by kernel, how often its last launch wrote each element of its tensor arguments.
    """

    def __init__(self, found=None, programs: int | None = None, far: bool = False, seed: int = 0, **options):
        super().__init__(**options)
        self.kernels = found or kernels()
        self.programs, self.far, self.seed = programs, far, seed
        self.written = {}

    def supports(self, query):
        return self.takes(query) if query.device_type == "cpu" else Support.no("emulated: on the CPU only")

    def launch(self, name, config, items, loaded, *args, **constants):
        self.seed += 1
        kernel = getattr(self.kernels, hopper.function_of(name))
        head_dim = loaded[0].shape[-1]
        shapes = [hopper.extent(t) for t in loaded]
        far = {}
        if self.far:
            args, far = _far_away(kernel.arg_names, len(loaded), args)
            shapes = [(t.shape[0], (t.shape[1] - 1) * FAR["head"] + t.shape[2]) for t in loaded]
        described = [DescriptorArgument(t, shape, (config.box, head_dim)) for t, shape in zip(loaded, shapes, strict=True)]
        programs = min(self.programs or random.Random(self.seed).randint(1, 5), items)
        constants |= hopper.constants_of(config, head_dim)
        ordered = ["dq_sum"] if constants.get("ORDERED") else []
        buffers = launch(kernel, programs, *described, *args, seed=self.seed, far=far, ordered=ordered, **constants)
        self.written[name] = {key: b.times_stored() for key, b in buffers.items()}


def _far_away(names, num_loaded: int, args) -> tuple[list, dict]:
    """The arguments with the strides of FAR in the place of those of ``(R, H, D)`` tensors, and which tensors those are."""
    tensors = [n for n, a in zip(names[num_loaded:], args, strict=False) if isinstance(a, torch.Tensor) and a.ndim == 3]
    far = {n: (FAR["row"], FAR["head"]) for n in [*names[:num_loaded], *tensors]}
    strided = {{"grad_out": "do", "dq_sum": "sum"}.get(n, n) for n in tensors}
    given = []
    for name, x in zip(names[num_loaded:], args, strict=False):
        tensor, _, kind = name.rpartition("_")
        given.append(FAR[kind] if kind in FAR and tensor in strided else x)
    return given, far


# How gradients are made: the backend's arguments, and whether the caller asks for the same bits.
WAYS = {
    "split": ({"whole": False}, True),
    "ordered": ({"whole": False, "ordered": True}, True),
    "any order": ({"whole": False}, False),
    "whole": ({}, True),
}
WRITTEN = {  # by kernel, what it writes every element of
    "attention_forward": ("out", "lse"),
    "attention_forward_whole": ("out", "lse"),
    "attention_backward_dq": ("dq", "delta"),
    "attention_backward_dkdv": ("dk", "dv"),
    "attention_backward_fused": ("dk", "dv"),
    "attention_backward_whole": ("dq", "dk", "dv"),
}


@dataclass(eq=False)
class Case:
    """Attention on one layout, with its float64 truth and how far torch itself is from that.

    Attributes:
        logits: what q and k are multiplied by, and how much is added to and taken from them, so that logits are far below 0.
        strides: of q, k and v: ``"packed"`` views of one projection, ``"heads first"``, or each its own (``"mixed"``).
    """

    lengths: list
    num_prefix: int = 0
    level: str = "slice"
    dtype: torch.dtype = torch.float16
    head_dim: int = 64
    heads: int = 2
    scale: float | None = None
    logits: tuple[float, float] = (1.0, 0.0)
    strides: str = "packed"
    with_grad_lse: bool = False
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        draw = torch.Generator().manual_seed(len(str(self.lengths)))
        self.layout = make(self.lengths, self.num_prefix, 64)
        rows = self.layout.num_rows
        self.plan = Plan.of(self.layout.pattern(self.level, **self.options))
        self.mask = naive_mask(self.lengths, self.num_prefix, rows, self.level, **self.options)
        self.exact_scale = self.head_dim**-0.5 if self.scale is None else self.scale
        x = torch.randn(rows, 3, self.heads, self.head_dim, generator=draw)
        x[:, :2] *= self.logits[0]
        x[:, 0] += self.logits[1]
        x[:, 1] -= self.logits[1]
        self.qkv = [_strided(t, self.strides, i) for i, t in enumerate(x.to(self.dtype).unbind(1))]
        self.grad_out = torch.randn(rows, self.heads, self.head_dim, generator=draw).to(self.dtype)
        self.grad_lse = torch.randn(self.heads, rows, generator=draw) if self.with_grad_lse else None

    @functools.cached_property
    def truth(self) -> dict:
        return self._evaluate(torch.float64, lambda *qkv: naive_attention(*qkv, self.mask, self.exact_scale))

    @functools.cached_property
    def torchs_errors(self) -> dict:
        """Errors of torch's own attention in the same dtype; of gradients without that of lse, which it does not give."""
        found = self._evaluate(self.dtype, lambda *qkv: (sdpa_by_segment(*qkv, self.mask, self.exact_scale), None))
        truth = self.truth
        if self.with_grad_lse:
            plain = Case(**{n: getattr(self, n) for n in self.__dataclass_fields__} | {"with_grad_lse": False})
            return plain.torchs_errors
        return {name: relative(found[name], truth[name]) for name in ("out", "dq", "dk", "dv")}

    def _evaluate(self, dtype, attend) -> dict:
        leaves = [t.to(dtype).requires_grad_() for t in self.qkv]
        out, lse = attend(*leaves)
        outs, grads = [out], [self.grad_out.to(dtype)]
        if lse is not None and self.with_grad_lse:
            outs, grads = [out, lse], [*grads, self.grad_lse.to(dtype)]
        dq, dk, dv = torch.autograd.grad(outs, leaves, grads)
        found = {"out": out.detach(), "lse": None if lse is None else lse.detach(), "dq": dq, "dk": dk, "dv": dv}
        return found

    def forward(self, backend) -> dict:
        out, lse = backend.forward(*self.qkv, self.plan, self.exact_scale, Numerics())
        return {"out": out, "lse": lse}

    def backward(self, backend, deterministic: bool = True) -> dict:
        """From the true out and lse, so that it can be tried alone."""
        out, lse = self.truth["out"].to(self.dtype), self.truth["lse"].float()
        numerics = Numerics(deterministic=deterministic)
        grads = backend.backward(
            self.grad_out, self.grad_lse, *self.qkv, out, lse, self.plan, self.exact_scale, numerics
        )  # fmt: skip
        return dict(zip(("dq", "dk", "dv"), grads, strict=True))

    def check(self, found: dict) -> None:
        """Twice torch's own error; where torch happens to be exact, the error of rounding the result once."""
        eps = torch.finfo(self.dtype).eps
        for name, got in found.items():
            right = self.truth[name]
            error = relative(got, right)
            if name == "lse":
                bound = 1e-6
            elif not right.any():  # the gradients of logits cancel to 0, up to a rounding of what cancels (of dv's size)
                bound = 2 * self.torchs_errors[name] + 4 * eps * float(self.truth["dv"].norm())
            else:
                bound = 2 * self.torchs_errors[name] + 0.25 * eps
            assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
        dead = slice(self.layout.prefix_rows(self.level).stop, None)
        assert not any(t[:, dead].any() if name == "lse" else t[dead].any() for name, t in found.items())


def _strided(t: torch.Tensor, strides: str, number: int) -> torch.Tensor:
    if strides == "mixed":
        strides = ("packed", "contiguous", "heads apart")[number]
    if strides == "heads first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "heads apart":
        return torch.nn.functional.pad(t, (0, 8))[..., : t.shape[-1]]
    return t.contiguous() if strides == "contiguous" else t
