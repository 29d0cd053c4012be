"""The workloads every benchmark uses, with fixed draws, at full size and scaled down for a CPU.

Scaling down keeps the segment lengths, which is what kernels feel, and takes fewer studies, scans and heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hlip_kernels import Layout

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Workload:
    """One ragged batch.

    Attributes:
        layout: its shape, on the CPU.
        levels: the levels benchmarks attend at.
        heads, head_dim: of the attention; the width of a layer is their product.
        full: at the size the design gives, or scaled down.
    """

    name: str
    layout: Layout
    levels: tuple[str, ...]
    heads: int
    head_dim: int = 64
    full: bool = True

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def attention_flops(self, level: str) -> float:
        """Forward floating-point operations, ``4 * L^2 * D * H`` summed over segments (prefix rows included)."""
        lengths = np.diff(self.layout.host_offsets(level)).astype(np.float64) + self.layout.num_prefix
        return float(4 * (lengths**2).sum() * self.head_dim * self.heads)

    def attention_bytes(self, dtype: torch.dtype) -> float:
        """Bytes of q, k, v and out, each once."""
        return 4.0 * self.layout.num_rows * self.dim * dtype.itemsize


def _grids(studies: int, scans: int, grid: Grid) -> list[list[Grid]]:
    return [[grid] * scans for _ in range(studies)]


def _drawn(studies: list[int], low: int, high: int, seed: int) -> list[list[Grid]]:
    """Scans with depths drawn evenly from [low, high] and 14 x 14 patches a slice."""
    depths = np.random.default_rng(seed)
    return [[(int(depths.integers(low, high + 1)), 14, 14) for _ in range(scans)] for scans in studies]


def _ct_scans(studies: int, seed: int) -> list[int]:
    """1 to 14 scans a study, mean near 6."""
    return np.clip(np.random.default_rng(seed).binomial(14, 0.43, studies), 1, 14).tolist()


def make(name: str, *, full: bool) -> Workload:
    """A workload by name.

    Raises:
        ValueError: unknown name.
    """
    medical = ("slice", "scan", "study")
    heads = 12 if full else 2
    if name == "chest_ct":
        grids, prefix, levels = _grids(16 if full else 1, 1, (14, 14, 14)), 1, ("slice", "study")
    elif name == "brain_mri_h2":
        grids, prefix, levels = _grids(8, 10, (6, 14, 14)) if full else _grids(2, 3, (6, 14, 14)), 1, ("scan", "study")
    elif name in ("brain_mri_h3", "dropout_50"):
        grids, prefix, levels = _grids(8, 8, (8, 14, 14)) if full else _grids(2, 2, (8, 14, 14)), 2, medical
    elif name == "uncurated_mri":
        scans = [4, 7, 9, 12, 14, 17, 21, 30] if full else [1, 2, 4]
        grids, prefix, levels = _drawn(scans, 4, 30, seed=1), 2, medical
    elif name == "uncurated_ct":
        scans = _ct_scans(16, seed=2) if full else [1, 2]
        grids, prefix, levels = _drawn(scans, 5, 40, seed=3), 2, medical
    elif name == "long_tail":
        grids = [[(8, 14, 14)] * (40 if full else 4)] + _grids(31 if full else 6, 1, (8, 14, 14))
        prefix, levels = 2, ("scan", "study")
    elif name == "many_short":
        lengths = np.random.default_rng(4).integers(1, 65, 8192 if full else 512).tolist()
        return Workload(name, Layout.from_lengths(lengths, num_prefix=1, levels=("slice",)), ("slice",), heads, full=full)
    else:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(NAMES)}")
    layout = Layout.from_grids(grids, num_prefix=prefix)
    if name == "dropout_50":
        layout = layout.drop(_half_of_each_study(layout))
    return Workload(name, layout, levels, heads, full=full)


def _half_of_each_study(layout: Layout) -> np.ndarray:
    rng, keep = np.random.default_rng(5), np.zeros(layout.num_tokens, dtype=bool)
    offsets = layout.host_offsets("study")
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        keep[start + rng.permutation(stop - start)[: (stop - start) // 2]] = True
    return keep


NAMES = (
    "chest_ct",
    "brain_mri_h2",
    "brain_mri_h3",
    "uncurated_mri",
    "uncurated_ct",
    "dropout_50",
    "long_tail",
    "many_short",
)
