"""Other public implementations of the same function, measured in the same process.

Each takes packed q, k, v ``(R, H, D)`` and gives packed out, doing everything it needs on the way: padding, gathering,
concatenating. What its users could prepare once per batch (index tensors, masks) is prepared outside the measured call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.triton import is_fused
from hlip_kernels.pattern import Plan

from .workloads import Workload


@dataclass(frozen=True)
class Peer:
    """``run(q, k, v) -> out``; ``backward`` says whether gradients flow through it here, ``forward`` whether its forward pass
    is worth a row: not where it is another's."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: bool = True
    forward: bool = True


def peers(workload: Workload, level: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Peer]]:
    """Name -> a function that prepares the implementation, for those that can run here."""
    made: dict[str, Callable[[], Peer]] = {}
    plan = Plan.of(workload.layout.pattern(level))
    query = Query(device.type, _capability(device), dtype, workload.head_dim, plan.longest, plan.sees_itself)
    for name, backend in BACKENDS.items():
        # The interpreter is for tests, the reference for truth: neither is worth a row.
        if name != "reference" and backend.supports(query) and not (name == "triton" and device.type == "cpu"):
            made[f"hlip {name}"] = lambda name=name: _ours(workload, level, device, name)
    fast = Numerics(deterministic=False)
    if "hlip triton" in made and is_fused(device, dtype, workload.head_dim, plan.longest, fast):
        made["hlip triton fast"] = lambda: _ours(workload, level, device, "triton", fast=True)
    if "hlip hopper" in made:
        made["hlip hopper fast"] = lambda: _ours(workload, level, device, "hopper", fast=True)
    made["published path"] = lambda: _published(workload, level, device)
    made["padded SDPA"] = lambda: _padded(workload, level, device)
    made["FlexAttention"] = lambda: _flex(workload, level, device)
    if device.type == "cuda":
        if importlib.util.find_spec("torch.nn.attention.varlen") and dtype != torch.float32:
            made["torch varlen"] = lambda: _torch_varlen(workload, level, device)
        if importlib.util.find_spec("flash_attn") and dtype != torch.float32:
            made["flash-attn varlen"] = lambda: _flash_attn(workload, level, device)
        if dtype != torch.float32 and _equal_lengths(workload, level):
            made["cuDNN SDPA"] = lambda: _cudnn(workload, level, device)
    return made


def _capability(device: torch.device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else None


def segment_rows(workload: Workload, level: str) -> list[np.ndarray]:
    """The rows of each segment: patch rows, then prefix rows."""
    layout, offsets = workload.layout, workload.layout.host_offsets(level)
    tail, P = layout.num_tokens, layout.num_prefix
    return [
        np.concatenate([np.arange(offsets[s], offsets[s + 1]), np.arange(tail + s * P, tail + (s + 1) * P)])
        for s in range(len(offsets) - 1)
    ]


def _equal_lengths(workload: Workload, level: str) -> bool:
    return len(set(np.diff(workload.layout.host_offsets(level)).tolist())) == 1


def _ours(workload: Workload, level: str, device: torch.device, backend: str, fast: bool = False) -> Peer:
    """One of our backends; ``fast`` with ``deterministic=False``, which changes the backward pass alone, as do
    the halves of ``cuda_halves``."""
    layout = workload.layout.to(device)
    options = {"backend": backend, "deterministic": not fast}
    name = f"hlip {backend} fast" if fast else f"hlip {backend}"
    forward = not fast and backend != "cuda_halves"
    return Peer(name, lambda q, k, v: attention(q, k, v, layout, level, **options), forward=forward)


def _published(workload: Workload, level: str, device: torch.device) -> Peer:
    """The published data path: rectangular batches only, so ragged ones are repeated or cut to the longest segment.

    Patches are partitioned and concatenated with their prefix tokens for every layer, as the public code does; segments
    shorter than the longest are filled by repeating their own tokens, which costs what repeating scans costs there. On
    ragged batches the result therefore differs from the others and is not compared.
    """
    rows = segment_rows(workload, level)
    longest, P = max(map(len, rows)), workload.layout.num_prefix
    patches = np.stack([np.resize(r[: len(r) - P], longest - P) if len(r) > P else np.zeros(longest - P, int) for r in rows])
    prefix = np.stack([r[len(r) - P :] for r in rows])
    n = len(rows)
    patch_index, prefix_index = _selection(patches.ravel(), device), _selection(prefix.ravel(), device)
    own = _selection(np.concatenate([s * (longest - P) + np.arange(len(r) - P) for s, r in enumerate(rows)]), device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = []
        for t in (q, k, v):
            both = torch.cat([t[patch_index].unflatten(0, (n, longest - P)), t[prefix_index].unflatten(0, (n, P))], dim=1)
            parts.append(both.transpose(1, 2))
        out = F.scaled_dot_product_attention(*parts).transpose(1, 2)
        body, tail = out[:, : longest - P].flatten(0, 1)[own], out[:, longest - P :].flatten(0, 1)
        dead = q.shape[0] - len(body) - len(tail)
        return torch.cat([body, tail, tail.new_zeros((dead, *tail.shape[1:]))])

    return Peer("published path", run)


def _selection(rows: np.ndarray, device: torch.device) -> Tensor | slice:
    """What to index with to get these rows: a slice, hence a view, if they follow one another."""
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)


def _padded(workload: Workload, level: str, device: torch.device) -> Peer:
    """SDPA over segments padded to the longest, with a key mask; no mask when all are equally long."""
    rows = segment_rows(workload, level)
    longest = max(map(len, rows))
    index = torch.from_numpy(np.stack([np.pad(r, (0, longest - len(r))) for r in rows])).to(device)
    lengths = torch.tensor([len(r) for r in rows], device=device)
    mask = (torch.arange(longest, device=device) < lengths[:, None])[:, None, None, :]
    mask = None if _equal_lengths(workload, level) else mask
    back = torch.from_numpy(np.concatenate([s * longest + np.arange(len(r)) for s, r in enumerate(rows)])).to(device)
    where = torch.from_numpy(np.concatenate(rows)).to(device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [t[index].transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2).flatten(0, 1)
        return torch.zeros_like(q).index_copy(0, where, out[back])

    return Peer("padded SDPA", run)


def _flex(workload: Workload, level: str, device: torch.device) -> Peer:
    """FlexAttention over the packed rows themselves, with a document mask (compiled)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.full((workload.layout.num_rows,), -1, dtype=torch.int32)
    for s, r in enumerate(segment_rows(workload, level)):
        document[torch.from_numpy(r)] = s
    document = document.to(device)

    def same(b, h, i, j):
        return (document[i] == document[j]) & (document[i] >= 0)

    size = workload.layout.num_rows
    block_mask = create_block_mask(same, None, None, size, size, device=device.type)
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask)[0].transpose(0, 1)

    return Peer("FlexAttention", run, backward=device.type == "cuda")


def _gathered(workload: Workload, level: str, device: torch.device, varlen: Callable) -> Callable:
    """Rows gathered into one run per segment (prefix rows beside their patches), attended, scattered back."""
    rows = segment_rows(workload, level)
    order = torch.from_numpy(np.concatenate(rows)).to(device)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int32)).to(device)
    longest = max(map(len, rows))
    needs_order = workload.layout.num_prefix > 0

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not needs_order:
            return varlen(q, k, v, offsets, longest)
        out = varlen(q[order], k[order], v[order], offsets, longest)
        return torch.zeros_like(q).index_copy(0, order, out)

    return run


def _torch_varlen(workload: Workload, level: str, device: torch.device) -> Peer:
    from torch.nn.attention.varlen import varlen_attn

    return Peer("torch varlen", _gathered(workload, level, device, lambda q, k, v, o, n: varlen_attn(q, k, v, o, o, n, n)))


def _flash_attn(workload: Workload, level: str, device: torch.device) -> Peer:
    from flash_attn import flash_attn_varlen_func

    return Peer(
        "flash-attn varlen",
        _gathered(workload, level, device, lambda q, k, v, o, n: flash_attn_varlen_func(q, k, v, o, o, n, n)),
    )


def _cudnn(workload: Workload, level: str, device: torch.device) -> Peer:
    """cuDNN through SDPA, on batches of equally long segments, gathered first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = np.stack(segment_rows(workload, level))
    index = torch.from_numpy(rows).to(device)
    where = index.flatten()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*(t[index].transpose(1, 2) for t in (q, k, v)))
        return torch.zeros_like(q).index_copy(0, where, out.transpose(1, 2).flatten(0, 1))

    return Peer("cuDNN SDPA", run)
