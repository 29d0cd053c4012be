"""The varlen flash attentions the ``flash`` backend can delegate to: whether each is here, what it can do, how it is called.

Nothing here is imported until a query for a GPU asks: importing ``hlip_kernels`` never imports ``flash_attn``. Looking is
cheap (``find_spec`` and the version of the installed package) and kept; what is found is then imported, since a binary made
for another torch fails only there, and the functions are checked to take the arguments that are passed.

Shapes: q, k, v, out and gradients ``(total, H, D)``, lse float32 ``(H, total)``, natural logarithm; ``cu_seqlens`` int32
``(segments + 1,)``, the same for queries and keys.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
from functools import cached_property

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from .determinism import deterministic_algorithms

MAX_HEAD_DIM = 256


class Implementation(abc.ABC):
    """One varlen flash attention.

    Attributes:
        name: what people call it.
        reads_beyond: how many rows after the end of a segment its kernels may read. Copies by the tensor memory accelerator
            take whole tiles, hence rows of the next segment; these are then weighed by 0, but ``0 * NaN`` is NaN. So that
            no NaN reaches another study, such segments are kept apart by so many rows of zeros.
    """

    name: str
    reads_beyond = 0

    @abc.abstractmethod
    def version(self) -> str:
        """The version found; empty if there is none."""

    @abc.abstractmethod
    def why_not(self, capability: tuple[int, int], head_dim: int, deterministic: bool) -> str:
        """Why it cannot be used, forward and backward; empty if it can."""

    @abc.abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse."""

    @abc.abstractmethod
    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        cu_seqlens: Tensor, max_seqlen: int, scale: float, deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv."""


class Package(Implementation):
    """One that is installed as a package of its own.

    Attributes:
        distribution: what pip calls it. top: the package or module to look for, without importing it. module: to import.
        minimum: the first version whose functions are called as below. below: the first that is somebody else's.
        functions: of the module, forward and backward. arguments: that each must take, by name.
    """

    distribution: str
    top: str
    module: str
    minimum: str
    below: str
    functions: tuple[str, str]
    arguments: tuple[tuple[str, ...], tuple[str, ...]]

    @cached_property
    def _version(self) -> str:
        try:
            found = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""
        return found if importlib.util.find_spec(self.top) is not None else ""

    def version(self) -> str:
        return self._version

    @cached_property
    def _loaded(self) -> tuple[tuple, str]:
        """The functions, or why there are none."""
        version = self.version()
        if not version:
            return (), "not installed"
        if not self.minimum <= TorchVersion(version) < self.below:
            return (), f"{version} is installed, versions from {self.minimum} and below {self.below} can be called"
        try:
            functions = tuple(self._functions(importlib.import_module(self.module)))
        except Exception as error:  # made for another torch or CUDA, say: what kind of error is anybody's guess
            first = (str(error).splitlines() or [""])[0]
            return (), f"{version} is installed, but cannot be imported: {type(error).__name__}: {first}"
        for function, name, arguments in zip(functions, self.functions, self.arguments, strict=True):
            missing = [a for a in arguments if a not in _arguments(function)]
            if missing:
                return (), f"{version} is installed, but its {name} does not take {', '.join(missing)}"
        return functions, ""

    def _functions(self, module) -> list:
        return [getattr(module, name) for name in self.functions]

    def why_not(self, capability, head_dim, deterministic):
        # What is known without importing anything comes first.
        return self._cannot(capability, head_dim, deterministic) or self._loaded[1]

    @abc.abstractmethod
    def _cannot(self, capability: tuple[int, int], head_dim: int, deterministic: bool) -> str:
        """What this version cannot do on such a GPU; empty if it is not even installed."""


def _arguments(function) -> set[str]:
    """The names of the arguments of a Python function or of a torch op."""
    if hasattr(function, "overloads"):
        return {argument.name for argument in function.default._schema.arguments}
    return set(inspect.signature(function).parameters)


class FlashAttn4(Package):
    """flash-attn 4, in the CuTe language (``flash_attn.cute``): Hopper and Blackwell.

    From 4.0.0b13 on, when the last fixes of its deterministic backward pass were made. On sm_12x only the pass with
    floating-point atomics; on sm_8x no backward pass at all.
    """

    name = "flash-attn 4"
    reads_beyond = 256  # two thread blocks of a cluster take 128 rows of keys each; no tile is larger
    distribution, top, module = "flash-attn-4", "flash_attn", "flash_attn.cute.interface"
    minimum, below = "4.0.0b13", "5"
    functions = "_flash_attn_fwd", "_flash_attn_bwd"
    _shared = "q", "k", "v", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    arguments = (*_shared, "return_lse"), (*_shared, "out", "dout", "lse", "deterministic")

    def _cannot(self, capability, head_dim, deterministic):
        major = capability[0]
        if major not in (9, 10, 11, 12):
            return f"has no backward pass for sm_{capability[0]}{capability[1]}"
        if major == 12 and deterministic:
            return f"its backward pass is not deterministic on sm_{capability[0]}{capability[1]}"
        limit = 256 if major == 9 else 128
        return f"takes head dims up to {limit} there" if head_dim > limit else ""

    def forward(self, q, k, v, cu_seqlens, max_seqlen, scale):
        out, lse, *_ = self._loaded[0][0](
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, softmax_scale=scale, return_lse=True,
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, deterministic):
        dq, dk, dv, *_ = self._loaded[0][1](
            q=q, k=k, v=v, out=out, dout=grad_out, lse=lse, softmax_scale=scale,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            deterministic=deterministic,
        )  # fmt: skip
        return dq, dk, dv


class FlashAttn3(Package):
    """flash-attn 3 (``flash_attn_interface``): Hopper only.

    Its ops are called directly, by name: they have kept their arguments where the Python functions around them have not.
    3.0.0b1 takes ``deterministic=True`` and ignores it (flash-attention #1596, #1766); 3.0.0 does not, up to head dim 192.
    """

    name = "flash-attn 3"
    reads_beyond = 256  # tiles of up to 192 rows of keys
    distribution, top, module = "flash-attn-3", "flash_attn_interface", "flash_attn_interface"
    minimum, below = "3.0.0b1", "4"
    functions = "fwd", "bwd"
    _shared = "q", "k", "v", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"
    arguments = (*_shared, "num_splits"), (*_shared, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")

    def _functions(self, module):
        return [getattr(torch.ops.flash_attn_3, name) for name in self.functions]

    def _cannot(self, capability, head_dim, deterministic):
        if capability != (9, 0):
            return "made for sm_90"
        if deterministic and head_dim > 192:
            return "its backward pass is not deterministic beyond head dim 192"
        if deterministic and self.version() and TorchVersion(self.version()) < "3.0.0":
            return f"the backward pass of {self.version()} is not deterministic, that of 3.0.0 is"
        return ""

    def forward(self, q, k, v, cu_seqlens, max_seqlen, scale):
        out, lse, *_ = self._loaded[0][0](
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, softmax_scale=scale, num_splits=1,
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, deterministic):
        grads = _like(q), _like(k), _like(v)
        self._loaded[0][1](
            dout=grad_out, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=grads[0], dk=grads[1], dv=grads[2],
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            softmax_scale=scale, deterministic=deterministic,
        )  # fmt: skip
        return grads


class FlashAttn2(Package):
    """flash-attn 2 (``flash_attn``), called below its autograd function; its arguments are the same from 2.7.0 to 2.8.4."""

    name = "flash-attn 2"
    distribution, top, module = "flash-attn", "flash_attn", "flash_attn.flash_attn_interface"
    minimum, below = "2.7.0", "3"
    functions = "_wrapped_flash_attn_varlen_forward", "_wrapped_flash_attn_varlen_backward"
    _shared = (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale", "causal",
        "window_size_left", "window_size_right", "softcap", "alibi_slopes",
    )  # fmt: skip
    arguments = (*_shared, "return_softmax"), (*_shared, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
    _plain = {
        "dropout_p": 0.0, "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "alibi_slopes": None,
    }  # fmt: skip

    def _cannot(self, capability, head_dim, deterministic):
        return ""

    def forward(self, q, k, v, cu_seqlens, max_seqlen, scale):
        out, lse, *_ = self._loaded[0][0](
            q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, softmax_scale=scale, return_softmax=False, **self._plain,
        )  # fmt: skip
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, deterministic):
        grads = _like(q), _like(k), _like(v)
        self._loaded[0][1](
            dout=grad_out, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=grads[0], dk=grads[1], dv=grads[2],
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
            softmax_scale=scale, deterministic=deterministic, **self._plain,
        )  # fmt: skip
        return grads


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class TorchFlash(Implementation):
    """torch's own, the ops under ``torch.nn.attention.varlen``: the kernels of flash-attn 2.

    Called by position and without the newest options: with what the schemas of torch 2.11, 2.13 and 2.14 have in common.
    """

    name = "torch"

    def version(self) -> str:
        return torch.__version__

    def why_not(self, capability, head_dim, deterministic):
        if not torch.backends.cuda.is_flash_attention_available():
            return "this torch is built without flash attention"
        replaced = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
        # Somebody else's kernels under torch's name: unknown how far they read, and whether they are deterministic.
        return f"activate_flash_attention_impl has replaced it by {replaced}" if replaced else ""

    def forward(self, q, k, v, cu_seqlens, max_seqlen, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, False, scale=scale
        )
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, deterministic):
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that is not there
        with deterministic_algorithms() if deterministic else contextlib.nullcontext():
            return torch.ops.aten._flash_attention_backward.default(
                grad_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, False, state, state,
                scale=scale,
            )  # fmt: skip


def best_first() -> tuple[Implementation, ...]:
    """Those to try, the best first."""
    return FlashAttn4(), FlashAttn3(), FlashAttn2(), TorchFlash()
