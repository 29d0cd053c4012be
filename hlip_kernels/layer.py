"""``HierarchicalAttention``: multi-head attention over packed rows, a drop-in for timm's ``Attention``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import BACKENDS
from .layout import Layout
from .layout_input import is_int
from .ops import attention


class HierarchicalAttention(nn.Module):
    """Multi-head self-attention inside the segments of one level.

    Options, parameter names and shapes are those of timm's ``Attention`` (1.0.15 to 1.0.31), so its state dict loads as it
    is and a timm block can hold it. On a plain dense ``(B, N, C)`` tensor it computes what timm computes; on packed rows
    ``(R, C)`` with a layout, attention stays inside each segment of the named level.

    Args:
        dim: ``C``, the width of the rows.
        num_heads: ``H``; must divide ``dim`` unless ``attn_head_dim`` is given.
        attn_head_dim: ``D``, the width of a head; default ``dim // num_heads``.
        dim_out: the width of the result; default ``dim``.
        qkv_bias: a bias in the query, key and value projection (and in the gate's).
        qk_norm: normalise queries and keys per head with ``norm_layer``.
        scale_norm: normalise what attention gives, all heads together, before the output projection.
        proj_bias: a bias in the output projection.
        gated: multiply what attention gives by a sigmoid of a projection of the input, element by element.
        attn_drop: dropout of attention weights, for dense input only: in training, packed rows refuse a rate above 0.
        proj_drop: dropout after the output projection.
        norm_layer: made as ``norm_layer(width)`` for ``qk_norm`` and ``scale_norm``.
        neighbours, summary, backend, deterministic, allow_tf32: as in :func:`hlip_kernels.attention`, for packed rows. (Dense
            input takes torch's ``scaled_dot_product_attention``, which listens to torch's own switches.)
        device, dtype: of the parameters.

    All options go by keyword: timm's order differs from version to version.

    Raises:
        ValueError: ``num_heads`` that does not divide ``dim``, no ``norm_layer`` where one is needed, a head dim below 1,
            ``neighbours`` that is no int >= 0, an unknown ``backend``. TypeError: ``summary`` that is no name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = nn.LayerNorm,
        neighbours: int = 0,
        summary: str | None = None,
        backend: str = "auto",
        deterministic: bool = True,
        allow_tf32: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if num_heads < 1 or (attn_head_dim is None and dim % num_heads):
            raise ValueError(f"dim ({dim}) must be divisible by num_heads ({num_heads})")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer, e.g. torch.nn.LayerNorm; got None")
        head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        if head_dim < 1:
            raise ValueError(f"the head dim must be 1 or more, got {head_dim} (dim={dim}, attn_head_dim={attn_head_dim})")
        if not is_int(neighbours) or neighbours < 0:
            raise ValueError(f"neighbours must be an int >= 0, got {neighbours!r}")
        if summary is not None and not isinstance(summary, str):
            raise TypeError(f"summary must be the name of a level or None, got {summary!r}")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        # Only what is given: not every norm layer takes these.
        made = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.neighbours, self.summary, self.backend = neighbours, summary, backend
        self.deterministic, self.allow_tf32 = deterministic, allow_tf32
        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **made)
        self.q_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **made) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **made) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **made) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **made)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        level: str | None = None,
        *,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attends and projects.

        Args:
            x: packed rows ``(R, C)`` with ``layout`` and ``level``, or dense ``(B, N, C)`` without.
            layout: the ragged shape, on the device of ``x``.
            level: the level whose segments attend.
            rope: rotary positions (Su et al., arXiv 2104.09864) as timm's ``RotaryEmbeddingCat`` makes them: ``(T, 2 * D)``,
                for each patch row the sines of its ``D`` channels, then the cosines; channels ``2i`` and ``2i + 1`` turn
                together (tables for timm's ``rotate_half`` look the same and do not fit). Prefix rows do not turn. For dense
                input ``(n, 2 * D)``, of the last ``n`` tokens. Queries and keys are turned in the wider of their dtype and
                the table's.
            attn_mask: for dense input, broadcastable to ``(B, H, N, N)``: bool, true where a query sees a key, or floating
                point, added to the logits. By keyword: timm takes it where the layout stands here.
            is_causal: for dense input: a token sees none after it. Not together with ``attn_mask``.

        Returns:
            The shape of ``x``, the last dimension ``dim_out``.

        Raises:
            TypeError: a tensor in the place of the layout. ValueError: a layout without a level or the reverse, a shape that
                does not fit, both masks, or, with packed rows, a mask or (in training) dropout of attention weights.
        """
        self._check(x, layout, level, attn_mask, is_causal)
        if rope is not None:
            self._check_rope(rope, x, layout)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(-3)  # views of the projection: (..., H, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            first = 0 if layout is not None else x.shape[1] - rope.shape[0]
            q, k = _turn(q, rope, first), _turn(k, rope, first)
        q, k = q.to(v.dtype), k.to(v.dtype)  # where a norm answers in float32
        if layout is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal, scale=self.scale).transpose(1, 2)
        else:
            out = attention(
                q, k, v, layout, level,
                scale=self.scale, neighbours=self.neighbours, summary=self.summary, backend=self.backend,
                deterministic=self.deterministic, allow_tf32=self.allow_tf32,
            )  # fmt: skip
        out = self.norm(out.flatten(-2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _check(self, x: Tensor, layout: Layout | None, level: str | None, attn_mask: Tensor | None, is_causal: bool) -> None:
        if isinstance(layout, Tensor):
            raise TypeError(
                "the second argument is a layout, got a tensor: pass a mask or rotary positions by keyword, as attn_mask=... "
                "or rope=..."
            )
        if (layout is None) != (level is None):
            raise ValueError("packed rows need both layout and level; dense (B, N, C) input takes neither")
        if x.ndim != (3 if layout is None else 2):
            expected = "dense (B, N, C)" if layout is None else "packed rows (R, C)"
            raise ValueError(f"expected {expected}, got a tensor of {x.ndim} dimensions")
        if attn_mask is not None and is_causal:
            raise ValueError("attn_mask and is_causal exclude each other: put the causal part into the mask")
        if layout is None:
            return
        if attn_mask is not None or is_causal:
            name = "is_causal" if is_causal else "attn_mask"
            raise ValueError(
                f"{name} is for dense (B, N, C) input: with packed rows, who sees whom follows from the level, neighbours "
                "and summary"
            )
        if self.training and self.attn_drop.p > 0:
            raise ValueError(
                f"attn_drop={self.attn_drop.p} is for dense (B, N, C) input: packed rows have no dropout of attention "
                "weights. Make the layer with attn_drop=0 (proj_drop works)"
            )

    def _check_rope(self, rope: Tensor, x: Tensor, layout: Layout | None) -> None:
        if self.head_dim % 2:
            raise ValueError(f"rope turns pairs of channels: it needs an even head dim, not {self.head_dim}")
        width, fits = 2 * self.head_dim, rope.ndim == 2
        if fits:
            fits = rope.shape[0] <= x.shape[1] if layout is None else rope.shape[0] == layout.num_tokens
        if not fits or rope.shape[1] != width or not rope.is_floating_point():
            whom, found = "token, or for the last ones" if layout is None else "patch", ""
            if not torch.compiler.is_compiling():  # a size in the message would become a guard, each new one a compilation
                count = x.shape[1] if layout is None else layout.num_tokens
                found = f" (there are {count}), got {rope.dtype} of shape {tuple(rope.shape)}"
            raise ValueError(
                f"rope: expected a row of {width} floating-point numbers, sines, then cosines, for each {whom}{found}"
            )
        if rope.device != x.device:
            raise ValueError(f"rope is on {rope.device}, the rows are on {x.device}")

    def extra_repr(self) -> str:
        options = [f"heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.neighbours:
            options.append(f"neighbours={self.neighbours}")
        if self.summary is not None:
            options.append(f"summary={self.summary!r}")
        return ", ".join([*options, f"backend={self.backend!r}"])


def _turn(x: Tensor, rope: Tensor, first: int) -> Tensor:
    """Queries or keys ``(..., N, H, D)`` in their dtype, ``n`` rows from ``first`` on turned by ``rope`` ``(n, 2 * D)``."""
    last = first + rope.shape[0]
    rows = x[..., first:last, :, :]
    sines, cosines = rope[:, None].chunk(2, dim=-1)
    left, right = rows.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (rows * cosines + torch.stack([-right, left], dim=-1).flatten(-2) * sines).to(x.dtype)
    return torch.cat([x[..., :first, :, :], turned, x[..., last:, :, :]], dim=-3)
