"""The published way through the encoder, for comparison: rectangular batches, partition, concatenate, average.

It uses the weights of an :class:`hlip.model.HLIPEncoder`, so that both compute the same function where a batch happens to be
rectangular. Ragged studies are made rectangular as the published loader does: every scan resampled to one depth, scans
repeated up to the longest study.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlip.model import MEAN, STD, HLIPEncoder


def published_batch(studies: list[list[Tensor]], device: torch.device) -> Tensor:
    """``(B, N, 1, D, H, W)`` float32, normalised: N scans of the longest study, the depth of the deepest scan."""
    depth = max(scan.shape[0] for study in studies for scan in study)
    scans = max(len(study) for study in studies)
    rows = []
    for study in studies:
        resized = [
            F.interpolate(scan[None, None].float(), size=(depth, *scan.shape[1:]), mode="nearest-exact")[0] for scan in study
        ]
        rows.append(torch.stack([resized[i % len(resized)] for i in range(scans)]))
    return ((torch.stack(rows) / 255.0 - MEAN) / STD).to(device)


class DenseEncoder(nn.Module):
    """Partition and concatenation between dense blocks, with another encoder's weights."""

    def __init__(self, encoder: HLIPEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, 1, D, H, W)`` -> pooled features ``(B, P, num_features)``."""
        e = self.encoder
        b, n = x.shape[:2]
        x = e.patch_embed.proj(x.flatten(0, 1)).flatten(3).permute(0, 2, 3, 1)  # (B*N, d, h*w, C)
        d = x.shape[1]
        table = e.spatial_posemb
        if table.shape[1] != d:
            table = F.interpolate(table.permute(0, 4, 1, 2, 3), size=(d, *table.shape[2:4]), mode="trilinear")
            table = table.permute(0, 2, 3, 4, 1)
        x = x + table.flatten(2, 3)
        units = {"slice": b * n * d, "scan": b * n, "study": b}
        level = e.config.levels[0]
        tokens = x.reshape(units[level], -1, x.shape[-1])
        prefix = torch.cat([getattr(e, f"{name}_token") for name in e.config.prefix], dim=1).expand(units[level], -1, -1)
        x = torch.cat([prefix, tokens], dim=1)
        for block, following in zip(e.blocks, [*e.config.levels[1:], "study"], strict=True):
            x = x + self._attend(block, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
            x = self._switch(x, units[level], units[following])
            level = following
        x = e.norm(x)
        prefix, mean = x[:, : e.num_prefix], x[:, e.num_prefix :].mean(1, keepdim=True)
        return torch.cat([prefix, mean.expand_as(prefix)], dim=-1) if e.config.pool == "dinotxt" else prefix

    @staticmethod
    def _attend(block: nn.Module, x: Tensor) -> Tensor:
        attn = block.attn
        qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attn.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))

    def _switch(self, x: Tensor, old: int, new: int) -> Tensor:
        if old == new:
            return x
        p = self.encoder.num_prefix
        prefix, tokens = x[:, :p], x[:, p:]
        tokens = tokens.reshape(new, -1, x.shape[-1])
        if new < old:
            prefix = prefix.unflatten(0, (new, old // new)).mean(1)
        else:
            prefix = prefix[:, None].expand(-1, new // old, -1, -1).flatten(0, 1)
        return torch.cat([prefix, tokens], dim=1)
