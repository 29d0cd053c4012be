"""``HierarchicalAttention``: multi-head attention over packed rows, a drop-in for timm's ``Attention``."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .layout import Layout
from .ops import attention


class HierarchicalAttention(nn.Module):
    """Multi-head self-attention inside the segments of one level.

    Parameter names and shapes are those of timm's ``Attention`` (``qkv``, ``q_norm``, ``k_norm``, ``proj``), so its state
    dict loads as it is. On a plain dense ``(B, N, C)`` tensor it computes what timm computes; on packed rows ``(R, C)``
    with a layout, attention stays inside each segment of the named level.

    Args:
        dim: ``C``, the width of the rows.
        num_heads: ``H``; must divide ``dim``.
        qkv_bias: a bias in the query, key and value projection.
        qk_norm: normalise queries and keys per head with ``norm_layer``.
        proj_bias: a bias in the output projection.
        proj_drop: dropout after the output projection.
        norm_layer: made as ``norm_layer(head_dim)`` when ``qk_norm``.
        neighbours, summary, backend, deterministic, allow_tf32: as in :func:`hlip_kernels.attention`, for packed rows. (Dense
            input takes torch's ``scaled_dot_product_attention``, which listens to torch's own switches.)
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        *,
        neighbours: int = 0,
        summary: str | None = None,
        backend: str = "auto",
        deterministic: bool = True,
        allow_tf32: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim ({dim}) must be divisible by num_heads ({num_heads})")
        made = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.neighbours, self.summary, self.backend = neighbours, summary, backend
        self.deterministic, self.allow_tf32 = deterministic, allow_tf32
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.q_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, layout: Layout | None = None, level: str | None = None) -> Tensor:
        """Attends and projects.

        Args:
            x: packed rows ``(R, C)`` with ``layout`` and ``level``, or dense ``(B, N, C)`` without.
            layout: the ragged shape, on the device of ``x``.
            level: the level whose segments attend.

        Returns:
            The same shape as ``x``.

        Raises:
            ValueError: a layout without a level or the reverse, or a shape that does not fit.
        """
        if (layout is None) != (level is None):
            raise ValueError("packed rows need both layout and level; dense (B, N, C) input takes neither")
        if x.ndim != (3 if layout is None else 2):
            expected = "dense (B, N, C)" if layout is None else "packed rows (R, C)"
            raise ValueError(f"expected {expected}, got a tensor of {x.ndim} dimensions")
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(-3)  # views of the projection: (..., H, D)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if layout is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2)
        else:
            out = attention(
                q, k, v, layout, level,
                scale=self.scale, neighbours=self.neighbours, summary=self.summary, backend=self.backend,
                deterministic=self.deterministic, allow_tf32=self.allow_tf32,
            )  # fmt: skip
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        options = [f"heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.neighbours:
            options.append(f"neighbours={self.neighbours}")
        if self.summary is not None:
            options.append(f"summary={self.summary!r}")
        return ", ".join([*options, f"backend={self.backend!r}"])
