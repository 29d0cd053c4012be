"""Fused attention for ragged, hierarchical data: packed rows, one layout, no padding.

    layout = Layout.from_grids([[(8, 14, 14), (5, 14, 14)], [(20, 14, 14)]], num_prefix=1)
    out = attention(q, k, v, layout, level="scan")          # q, k, v: (layout.num_rows, heads, head_dim)

Needs torch; uses triton and the CUDA extension where they are there (``python -m hlip_kernels.info`` says).
"""

from .layer import HierarchicalAttention
from .layout import Layout
from .ops import attention, patch_grids, patchify, segment_mean, switch_level
from .warmup import warmup

__version__ = "0.1.0"
__all__ = ["HierarchicalAttention", "Layout", "attention", "patch_grids", "patchify", "segment_mean", "switch_level", "warmup"]
