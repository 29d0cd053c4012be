"""The CUDA extension's attention: short segments, each held whole by one thread block (``csrc/short_attention``)."""

from __future__ import annotations

import torch

from .. import native
from ..packs import PACK_ROWS, packs_of
from .base import Backend, Query, Support, aligned
from .cuda_whole import whole, whole_rows

HEAD_DIMS = (32, 64, 80, 96, 128)
# Bytes of shared memory a block may use, by compute capability (CUDA programming guide, "Technical Specifications").
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10,
                 (10, 0): 227 << 10, (10, 3): 227 << 10, (11, 0): 227 << 10, (12, 0): 99 << 10, (12, 1): 99 << 10}  # fmt: skip


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes a block may use; of cards not known, what every one has."""
    return SHARED_MEMORY.get(capability, 99 << 10)


def max_rows(head_dim: int, capability: tuple[int, int]) -> int:
    """The longest segment, prefix rows counted, that the kernels of both passes can hold."""
    # Bytes a row, backward, where more is held: its map and statistics, then q, k, v and the output gradient.
    return shared_memory(capability) // (16 + 8 * head_dim) // 16 * 16


class CudaBackend(Backend):
    """``halves``: never the backward kernel for whole segments, but for all of them the one that works in two halves. The same
    results but for rounding; there to be timed beside the other."""

    name = "cuda"
    kernels = native

    def __init__(self, halves: bool = False):
        self.halves = halves
        if halves:
            self.name = "cuda_halves"

    def supports(self, query: Query) -> Support:
        why = self._why_not_here(query)
        if why:
            return Support.no(why)
        if query.dtype not in (torch.float16, torch.bfloat16):
            return Support.no(f"takes float16 and bfloat16, got {str(query.dtype).removeprefix('torch.')}")
        if query.head_dim not in HEAD_DIMS:
            return Support.no(f"has kernels for head dims {', '.join(map(str, HEAD_DIMS))}, not {query.head_dim}")
        if not query.sees_itself:
            return Support.no("made for segments that see themselves alone: no neighbours, no summary")
        limit = max_rows(query.head_dim, query.capability or (9, 0))
        if query.longest is not None and query.longest > limit:
            return Support.no(
                f"holds segments of up to {limit} rows at head dim {query.head_dim}, the longest has {query.longest}"
            )
        if self.halves and not self._has_whole(query):
            return Support.no("is no different from cuda here: no backward kernel for whole segments of these")
        return Support.yes()

    @staticmethod
    def _has_whole(query: Query) -> bool:
        """Whether some segment may have a pack of its own, and go to the backward kernel for those."""
        held = max(whole_rows(query.head_dim, shared_memory(query.capability or (9, 0))))
        return held > PACK_ROWS // 2 and (query.longest is None or query.longest > PACK_ROWS // 2)

    def _why_not_here(self, query: Query) -> str:
        if query.device_type != "cuda" or query.capability is None:
            return "needs an NVIDIA GPU"
        why = native.why_missing()
        if why:
            return f"the CUDA extension is not there: {why}"
        built = [(int(a.rstrip("af")[:-1]), int(a.rstrip("af")[-1])) for a in native.architectures()]
        # Machine code serves its own generation; newer ones compile the PTX that comes with it when they first load it.
        if not any(b <= query.capability for b in built):
            wanted = "".join(map(str, query.capability))
            return (
                f"the CUDA extension was built for {', '.join(native.architectures())}: build it with HLIP_CUDA_ARCHS={wanted}"
            )
        return ""

    def forward(self, q, k, v, plan, scale, numerics):
        return self.kernels.short_attention_forward(*map(aligned, (q, k, v)), self._packs(q, plan), scale)

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, plan, scale, numerics):
        grad_out, q, k, v, out = map(aligned, (grad_out, q, k, v, out))
        packs, shared = self._packs(q, plan), 0 if self.halves else shared_memory(self._capability(q))
        key = ("whole", q.shape[-1], shared)  # once for a plan: this is every layer's backward pass
        if key not in plan.kept:
            plan.kept[key] = whole(packs, q.shape[-1], shared)
        return self.kernels.short_attention_backward(grad_out, grad_lse, q, k, v, out, lse, packs, scale, plan.kept[key])

    @staticmethod
    def _capability(q: torch.Tensor) -> tuple[int, int]:
        return torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)

    @classmethod
    def _packs(cls, q: torch.Tensor, plan):
        return packs_of(plan, q.device, min(PACK_ROWS, max_rows(q.shape[-1], cls._capability(q))))
