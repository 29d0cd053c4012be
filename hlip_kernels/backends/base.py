"""What a backend is asked, what it answers, and what it must implement."""

from __future__ import annotations

import abc
import contextlib
import math
from dataclasses import dataclass

import torch

from ..pattern import Plan

LOG2_E = math.log2(math.e)
# In place of a scale of 0, which makes NaN of the -inf of hidden logits. Any other logit times this is 0 to an exponential.
LEAST_SCALE = 1e-37


@dataclass(frozen=True)
class Numerics:
    """What the caller allows beyond the promise of docs/numerics.md.

    Attributes:
        deterministic: same inputs, same bits, every run; ``False`` lets the backward pass add floats in any order.
        allow_tf32: float32 inputs may be multiplied in TF32 (10 bits of mantissa) by tensor or matrix cores.
    """

    deterministic: bool = True
    allow_tf32: bool = False


@dataclass(frozen=True)
class Query:
    """The facts a backend decides on.

    Attributes:
        device_type: ``"cpu"``, ``"cuda"``, ...
        capability: CUDA compute capability as ``(major, minor)``; ``None`` elsewhere.
        dtype: dtype of q, k and v.
        head_dim: ``D``.
        longest: the most rows one segment sees, prefix rows counted; ``None`` when not known.
        sees_itself: every segment sees itself alone (no neighbours, no summary).
        numerics: what the caller allows.
        segments: how many there are; ``None`` when not known.
        lse_gradient: it is for a backward pass with a gradient of the log-sum-exp.
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    longest: int | None = None
    sees_itself: bool = True
    numerics: Numerics = Numerics()
    segments: int | None = None
    lse_gradient: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, plan: Plan, numerics: Numerics = Numerics(), lse_gradient: bool = False) -> Query:
        """The query for a ``(R, H, D)`` tensor and a pattern."""
        capability = None
        if q.device.type == "cuda" and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(q.device)
        return cls(
            q.device.type,
            capability,
            q.dtype,
            q.shape[-1],
            plan.longest,
            plan.sees_itself,
            numerics,
            len(plan.forward),
            lse_gradient,
        )

    def __str__(self) -> str:
        where = (
            self.device_type if self.capability is None else f"{self.device_type} sm_{self.capability[0]}{self.capability[1]}"
        )
        text = f"attention on {where}, {str(self.dtype).removeprefix('torch.')}, head dim {self.head_dim}"
        if self.longest is not None:
            text += f", segments of up to {self.longest} rows"
        text = text if self.sees_itself else text + " that see others"
        return text + ", with a gradient of lse" if self.lse_gradient else text


@dataclass(frozen=True)
class Support:
    """Whether a backend can run a query; falsy with a reason when it cannot."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "available" if self.ok else f"no: {self.reason}"

    @classmethod
    def yes(cls) -> Support:
        return cls(True)

    @classmethod
    def no(cls, reason: str) -> Support:
        return cls(False, reason)


class Backend(abc.ABC):
    """One implementation of attention over a :class:`~hlip_kernels.pattern.Plan`.

    Shapes: q, k, v, out and their gradients ``(R, H, D)``, last dimension contiguous; lse ``(H, R)`` in the statistics
    dtype (float32, float64 for float64 input). Rows outside every record of the plan must come back 0.
    """

    name: str

    @abc.abstractmethod
    def supports(self, query: Query) -> Support:
        """Whether this backend can run the query here and now, and why not."""

    @abc.abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float, numerics: Numerics
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``softmax(scale * q k^T) v`` over the rows each record sees, and the log-sum-exp of its logits."""

    @abc.abstractmethod
    def backward(
        self,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        plan: Plan,
        scale: float,
        numerics: Numerics,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v. ``grad_lse`` is ``None`` when nothing used the log-sum-exp."""


def aligned(x: torch.Tensor) -> torch.Tensor:
    """An ``(R, H, D)`` tensor itself if its rows lie on 16 bytes, as views of a projection do; else a copy. Others likewise."""
    fits = x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
    return x if fits else copied(x)


def copied(x: torch.Tensor) -> torch.Tensor:
    """A copy with rows and heads one after the other: unlike ``contiguous()``, always in memory of its own."""
    return x.clone(memory_format=torch.contiguous_format)


def strides_of(*tensors: torch.Tensor) -> list[int]:
    """Row and head stride of each ``(R, H, D)`` tensor, in elements; a lone head's may be anything, and is its width here."""
    return [stride for t in tensors for stride in (t.stride(0), t.stride(1) if t.shape[1] > 1 else t.shape[2])]


def on(device: torch.device):
    """With that device current, as a launch by triton or by another package needs it; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics and accumulation for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
