"""One study in a picture: of every scan a slice, and over it what a map says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .storage import write_atomically

FAINT = 0.15  # of a map: what is not drawn


@dataclass
class Row:
    """One scan.

    Attributes:
        name: of the scan. voxels: ``(D, H, W)``. heat: likewise, in [0, 1].
        outline: likewise, of 0 and 1: drawn beside it; ``None``: no third column.
        aspect: how much higher than wide a pixel is.
    """

    name: str
    voxels: np.ndarray
    heat: np.ndarray
    outline: np.ndarray | None = None
    aspect: float = 1.0


def draw_study(rows: Sequence[Row], title: str, path: Path, *, max_value: float, captions: Sequence[str]) -> None:
    """A row per scan: its most relevant slice (or the middle one), and the map over it.

    Args:
        max_value: the voxel that is white. captions: of the columns after the first.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 1 + len(captions)
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.4 * columns, 2.35 * len(rows) + 0.9), squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        k = int(row.heat.max(axis=(1, 2)).argmax()) if row.heat.max() > FAINT else len(row.heat) // 2
        for ax, caption in zip(places, (f"{row.name}, slice {k + 1} of {len(row.voxels)}", *captions), strict=True):
            ax.imshow(row.voxels[k], cmap="gray", vmin=0, vmax=max_value, aspect=row.aspect)
            ax.set_title(caption, fontsize=8)
            ax.set_axis_off()
        faint = np.ma.masked_less(row.heat[k], FAINT)
        places[1].imshow(faint, cmap="inferno", alpha=0.6, vmin=0, vmax=1, aspect=row.aspect)
        if row.outline is not None and row.outline[k].any():
            places[2].contour(row.outline[k], levels=[0.5], colors="tab:red", linewidths=1)
    figure.suptitle(title, fontsize=8, wrap=True)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.2 / (2.35 * len(rows) + 0.9)))
    try:
        write_atomically(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    finally:
        plt.close(figure)
