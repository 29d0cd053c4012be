"""One transformer block over packed rows: pre-norm attention and MLP, with a drop path per segment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlip_kernels import HierarchicalAttention, Layout


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))``, with timm's parameter names."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm block attending at one level.

    Args:
        dim, num_heads, mlp_ratio: as in ViT. level: where its attention stays inside.
        drop_path: the rate at which a segment of that level skips a branch during training.
        attention: options of :class:`hlip_kernels.HierarchicalAttention` (``backend``, and ``neighbours`` and ``summary`` where
            the level can have them).

    Raises:
        ValueError: dropout of attention weights, which packed rows do not have.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, level: str, drop_path: float = 0.0, **attention):
        super().__init__()
        self.level = level
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        if attention.get("attn_drop"):
            raise ValueError(
                "attn_drop: packed rows have no dropout of attention weights; there are drop_path and patch_dropout"
            )
        self.attn = HierarchicalAttention(dim, num_heads, qkv_bias=True, **attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        """Packed rows ``(R, C)`` with the tail at this block's level -> the same; ``rope`` as the attention layer takes it."""
        x = x + self._drop(self.attn(self.norm1(x), layout, self.level, rope=rope), layout)
        return x + self._drop(self.mlp(self.norm2(x)), layout)

    def _drop(self, branch: Tensor, layout: Layout) -> Tensor:
        """Stochastic depth (Huang, arXiv 1603.09382), one draw per segment, kept branches scaled up."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        factor = branch.new_empty(layout.num_segments(self.level) + 1).bernoulli_(keep).div_(keep)
        return branch * factor[segment_of_rows(layout, self.level)][:, None]


def segment_of_rows(layout: Layout, level: str) -> Tensor:
    """int64 ``(R,)``: the segment of each row when ``level`` is active; ``S`` for rows outside every segment."""
    offsets, num = layout.offsets(level), layout.num_segments(level)
    lengths = offsets.diff()
    segments = torch.arange(num + 1, device=offsets.device)
    dead = layout.num_rows - layout.num_tokens - num * layout.num_prefix
    patches = torch.repeat_interleave(segments[:-1], lengths, output_size=layout.num_tokens)
    prefixes = segments[:-1].repeat_interleave(layout.num_prefix)
    return torch.cat([patches, prefixes, segments[-1:].expand(dead)])
