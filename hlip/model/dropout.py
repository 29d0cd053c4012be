"""Patch dropout for ragged batches (Li, FLIP, arXiv 2212.00794)."""

from __future__ import annotations

import numpy as np
import torch

from hlip_kernels import Layout


def draw_kept(layout: Layout, level: str, rate: float) -> np.ndarray:
    """Which patch rows stay: in each segment of ``level`` a uniformly random subset of ``max(1, int(n * (1 - rate)))``.

    Random numbers come from torch's CPU generator, so ``torch.manual_seed`` makes the draw repeatable.

    Returns:
        bool ``(T,)`` on the host.
    """
    offsets = layout.host_offsets(level)
    lengths = np.diff(offsets)
    numbers = torch.rand(layout.num_tokens, dtype=torch.float64).numpy()
    segment = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((numbers, segment))  # a random order inside each segment
    rank = np.arange(layout.num_tokens) - np.repeat(offsets[:-1], lengths)
    count = np.minimum(lengths, np.maximum(1, (lengths * (1.0 - rate)).astype(np.int64)))
    kept = np.zeros(layout.num_tokens, dtype=bool)
    kept[order[rank < np.repeat(count, lengths)]] = True
    return kept
