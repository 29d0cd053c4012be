"""The index tables of a layout that the kernels read, in one buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .kept import from_array

if TYPE_CHECKING:
    from .layout import Layout

Spans = dict[tuple, tuple[int, int]]


def host_tables(layout: Layout) -> tuple[torch.Tensor, Spans]:
    """Every table as a span of one int32 CPU buffer, so that moving all of them is one copy.

    Returns:
        the buffer, and ``key -> (first, one past the last)`` entry of each table: ``("offsets", i)``, ``("chunks", i)``,
        ``("chunk_offsets", i)`` of level ``i``, ``("children", i, j)`` and ``("parents", i, j)`` of level ``i`` in ``j``.
    """
    arrays = {}
    for i, level in enumerate(layout.levels):
        arrays["offsets", i] = offsets = layout.host_offsets(level)
        arrays["chunks", i], arrays["chunk_offsets", i] = _chunks(offsets)
    for high in range(1, len(layout.levels)):
        for low in range(high):
            children = layout.host_children(layout.levels[low], layout.levels[high])
            arrays["children", low, high] = children
            arrays["parents", low, high] = np.repeat(np.arange(len(children) - 1), np.diff(children))
    spans, start = {}, 0
    for key, array in arrays.items():
        spans[key] = (start, start + len(array))
        start += -(-len(array) // 4) * 4  # each array starts on 16 bytes
    blob = np.zeros(start, dtype=np.int32)
    for key, array in arrays.items():
        blob[spans[key][0] : spans[key][1]] = array
    return from_array(blob), spans


def _chunks(offsets: np.ndarray, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """See :meth:`Layout.chunks`; the first array flattened."""
    counts = -(-np.diff(offsets) // rows)
    chunk_offsets = np.concatenate([[0], np.cumsum(counts)])
    segment = np.repeat(np.arange(len(counts)), counts)
    start = offsets[segment] + (np.arange(len(segment)) - chunk_offsets[segment]) * rows
    stop = np.minimum(start + rows, offsets[segment + 1])
    return np.stack([segment, start, stop], axis=1).ravel(), chunk_offsets
