"""Position tables: sine-cosine, resizing, and the inflation of a 2-D MAE table (arXiv 2505.21862, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]


def sincos(positions: Tensor, dim: int) -> Tensor:
    """One-dimensional table: ``(N,)`` positions -> ``(N, dim)``, sines then cosines of ``position / 10000^(2i/dim)``."""
    if dim % 2:
        raise ValueError(f"a sine-cosine table needs an even width, got {dim}")
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_1d(length: int, dim: int) -> Tensor:
    """``(length, dim)``."""
    return sincos(torch.arange(length), dim)


def sincos_2d(height: int, width: int, dim: int) -> Tensor:
    """``(height, width, dim)``: half of the channels for the column, half for the row."""
    rows, columns = sincos_1d(height, dim // 2), sincos_1d(width, dim // 2)
    return torch.cat([columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=2)


def sincos_3d(grid: Grid, dim: int) -> Tensor:
    """``(d, h, w, dim)``: a third of the channels each for column, row and depth, in this order."""
    if dim % 6:
        raise ValueError(f"a three-dimensional sine-cosine table needs a width that is a multiple of 6, got {dim}")
    tables = [sincos_1d(n, dim // 3) for n in grid]
    d, h, w = (t.view(*(n if i == a else 1 for i, n in enumerate(grid)), -1).expand(*grid, -1) for a, t in enumerate(tables))
    return torch.cat([w, h, d], dim=3)


def rotary_3d(grid: Grid, head_dim: int) -> Tensor:
    """Rotary positions ``(d * h * w, 2 * head_dim)`` of a scan's patches, as the attention layer takes them.

    As in V-JEPA 2 (arXiv 2506.09985): a third of a head's channels, or just less to make them even, for each of depth, row and
    column; a pair of them turns by ``position / 10000^(2i/channels)``. The channels that are left do not turn.
    """
    channels = 2 * (head_dim // 3 // 2)
    axes = [sincos_1d(n, channels).repeat_interleave(2, dim=1) for n in grid]  # of pairs: the sines, then the cosines
    left = head_dim - 3 * channels
    halves = []
    for half, still in ((slice(0, channels), 0.0), (slice(channels, None), 1.0)):
        d, h, w = (axis[:, half] for axis in axes)
        parts = [d[:, None, None], h[None, :, None], w[None, None], torch.full((1, 1, 1, left), still)]
        halves.append(torch.cat([part.expand(*grid, -1) for part in parts], dim=3))
    return torch.cat(halves, dim=3).flatten(0, 2)


def spatial_table(grid: Grid, dim: int, kind: str) -> Tensor:
    """A fresh table ``(1, d, h, w, dim)`` of the kind a variant names: ``"3d"`` or ``"1d+2d"``."""
    if kind == "3d":
        return sincos_3d(grid, dim)[None]
    if kind == "1d+2d":
        return (sincos_1d(grid[0], dim)[:, None, None] + sincos_2d(grid[1], grid[2], dim)[None])[None]
    raise ValueError(f"positions must be '3d' or '1d+2d', got {kind!r}")


def inflate_table(table_2d: Tensor, grid: Grid) -> Tensor:
    """A 2-D table of a pretrained ViT ``(1, side * side, C)`` -> ``(1, d, h, w, C)``: resized, plus sines over depth."""
    from timm.layers import resample_abs_pos_embed

    table = resample_abs_pos_embed(table_2d, new_size=[grid[1], grid[2]], num_prefix_tokens=0)
    table = table.reshape(1, 1, grid[1], grid[2], -1)
    return table + sincos_1d(grid[0], table.shape[-1])[None, :, None, None]


def resize_spatial(table: Tensor, grid: Grid) -> Tensor:
    """``(1, d, h, w, C)`` -> rows ``(d' * h' * w', C)`` for another grid, trilinear, in float32."""
    table = table.float()
    if tuple(table.shape[1:4]) != tuple(grid):
        table = F.interpolate(table.permute(0, 4, 1, 2, 3), size=tuple(grid), mode="trilinear").permute(0, 2, 3, 4, 1)
    return table.reshape(-1, table.shape[-1])


def resize_scans(table: Tensor, num_scans: int) -> Tensor:
    """``(1, max, C)`` -> ``(num_scans, C)``: the first entries, or all of them interpolated when there are too few."""
    table = table.float()
    if num_scans > table.shape[1]:
        table = F.interpolate(table.permute(0, 2, 1), size=num_scans, mode="linear").permute(0, 2, 1)
    return table[0, :num_scans]
