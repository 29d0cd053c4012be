"""The HLIP image encoder on packed rows: a ViT whose blocks attend inside slices, scans or studies (arXiv 2505.21862).

Parameter names are those of the published checkpoints (timm's ViT plus ``spatial_posemb`` and ``sequential_posemb``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hlip_kernels import Layout, patch_grids, patchify, segment_mean, switch_level
from hlip_kernels.layout import MEDICAL_LEVELS
from hlip_kernels.options import options_by_level

from .batch import StudyBatch
from .block import Block
from .dropout import draw_kept
from .position import Grid, resize_scans, resize_spatial, rotary_3d, sincos_1d, spatial_table
from .variants import Encoder

# Rows are rounded up to a multiple of this: whole tiles for the tensor cores.
ROW_MULTIPLE = 64


class PatchEmbedding(nn.Module):
    """Holds the projection as the published Conv3d, and applies it to patch rows as one matrix product."""

    def __init__(self, patch_size: tuple[int, int, int], dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(1, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, rows: Tensor) -> Tensor:
        """``(T, prod(patch))`` -> ``(T, dim)``."""
        return nn.functional.linear(rows, self.proj.weight.flatten(1), self.proj.bias)


class HLIPEncoder(nn.Module):
    """Whole studies in, one vector per study (and prefix token) out.

    Args:
        config: the shape; see :class:`hlip.model.variants.Encoder`.
        patch_dropout: the share of patch tokens left out during training, per segment of the first block's level.
        neighbours, summary: of attention (see :func:`hlip_kernels.attention`), for the blocks whose level can have them: the
            study has no neighbours, and a summary must be coarser than the block's level.
        attention: more options for every block's :class:`hlip_kernels.HierarchicalAttention`.

    Raises:
        ValueError: an unknown level, or an option that no block can have.

    Attributes:
        num_features: width of the pooled output: ``C``, or ``2 * C`` for the dino.txt head.
        grad_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
    """

    def __init__(
        self, config: Encoder, *, patch_dropout: float = 0.0, neighbours: int = 0, summary: str | None = None, **attention
    ):
        super().__init__()
        if not 0.0 <= patch_dropout < 1.0:
            raise ValueError(f"patch_dropout must be in [0, 1), got {patch_dropout}")
        self.config = config
        self.patch_dropout = patch_dropout
        self.grad_checkpointing = False
        self.num_prefix = len(config.prefix)
        dim = config.width
        self.num_features = dim * (2 if config.pool == "dinotxt" else 1)

        self.patch_embed = PatchEmbedding(config.patch_size, dim)
        for name in config.prefix:
            self.register_parameter(f"{name}_token", nn.Parameter(torch.zeros(1, 1, dim)))
        self.spatial_posemb = nn.Parameter(spatial_table(config.grid, dim, config.positions), requires_grad=False)
        self.sequential_posemb = None
        if config.max_scans:
            self.sequential_posemb = nn.Parameter(sincos_1d(config.max_scans, dim)[None], requires_grad=False)
        rates = np.linspace(0.0, config.drop_path, config.depth)
        options = options_by_level(config.levels, MEDICAL_LEVELS, neighbours=neighbours, summary=summary)
        self.blocks = nn.ModuleList(
            Block(dim, config.heads, config.mlp_ratio, level, float(rate), **options[level], **attention)
            for level, rate in zip(config.levels, rates, strict=True)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """timm's initialisation: truncated normal (0.02) for linear layers, 1e-6 normal for the prefix tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in self.config.prefix:
            nn.init.normal_(getattr(self, f"{name}_token"), std=1e-6)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    # ------------------------------------------------------------------ forward

    def layout(self, batch: StudyBatch) -> Layout:
        """The layout of a batch before patch dropout, on the device of its voxels."""
        grids = iter(patch_grids(batch.scan_shapes, self.config.patch_size, edge=batch.edge))
        nested = [[next(grids) for _ in study] for study in batch.shapes]
        layout = Layout.from_grids(nested, num_prefix=self.num_prefix, row_multiple=ROW_MULTIPLE)
        return layout.to(batch.voxels.device)

    def num_tokens(self, batch: StudyBatch) -> int:
        """Patch tokens of a batch before patch dropout."""
        return sum(d * h * w for d, h, w in patch_grids(batch.scan_shapes, self.config.patch_size, edge=batch.edge))

    def embed(self, batch: StudyBatch) -> tuple[Tensor, Layout, Tensor | None]:
        """Patches, positions, patch dropout and prefix tokens.

        Returns:
            Packed rows ``(R, C)`` at the first block's level, their layout, and the rotary positions of its patch rows for all
            blocks: ``(T, 2 * head_dim)`` float32, or None for a model without.
        """
        full = layout = self.layout(batch)
        device, keep = layout.device, None
        if self.training and self.patch_dropout > 0.0:
            kept = draw_kept(full, self.config.levels[0], self.patch_dropout)
            keep = torch.from_numpy(np.flatnonzero(kept)).to(device, non_blocking=True)
            layout = full.drop(kept)
        dtype = self.patch_embed.proj.weight.dtype
        autocast = torch.is_autocast_enabled(device.type)
        rows = patchify(
            batch.voxels,
            self.config.patch_size,
            shapes=batch.scan_shapes,
            mean=batch.mean,
            std=batch.std,
            max_value=batch.max_value,
            edge=batch.edge,
            dtype=torch.get_autocast_dtype(device.type) if autocast else dtype,
            keep=keep,
        )
        for block in self.blocks:  # patterns are made here, because run_blocks may be compiled
            layout.pattern(block.level, neighbours=block.attn.neighbours, summary=block.attn.summary)
        # Under autocast the residual stream stays in the dtype of the weights, as in the published training.
        x = self.patch_embed(rows) + self._positions(full, keep).to(dtype)
        rope = None
        if self.config.rotary:
            rope = self._in_scan(full, keep, lambda grid: rotary_3d(grid, self.config.width // self.config.heads))
        return torch.cat([x, self.prefix(layout)]), layout, rope

    def _positions(self, layout: Layout, keep: Tensor | None) -> Tensor:
        """Position embedding of every (kept) patch row, ``(T, C)`` float32."""
        rows = self._in_scan(layout, keep, lambda grid: resize_spatial(self.spatial_posemb, grid))
        if self.sequential_posemb is not None and layout.num_tokens:
            order, per_scan = self._scan_positions(layout)
            rows = rows + order.index_select(0, self._select(per_scan, keep, rows.device))
        return rows

    def _in_scan(self, layout: Layout, keep: Tensor | None, table_of: Callable[[Grid], Tensor]) -> Tensor:
        """What ``table_of`` a scan's grid (a row for each patch) says of every (kept) patch row.

        Each distinct grid's table is made once; patch rows then look up their place in the joined tables.
        """
        scans = [grid for study in layout.grids for grid in study]
        distinct = sorted({grid for grid in scans if min(grid) > 0})
        if not distinct:
            return table_of((1, 1, 1))[:0].to(layout.device)
        sizes = [int(np.prod(grid)) for grid in distinct]
        first = dict(zip(distinct, np.cumsum([0, *sizes[:-1]]), strict=True))
        table = torch.cat([table_of(grid) for grid in distinct]).to(layout.device, non_blocking=True)
        index = np.concatenate([np.arange(int(np.prod(g))) + first.get(g, 0) for g in scans])
        return table.index_select(0, self._select(index, keep, table.device))

    def _scan_positions(self, layout: Layout) -> tuple[Tensor, np.ndarray]:
        """The table of scan positions ``(N, C)`` of a batch, and each patch row's entry.

        In training, one random permutation of the table serves the whole batch (so that no scan owns a position); in
        evaluation, scans are numbered as they come.
        """
        counts = [len(study) for study in layout.grids]
        longest, available = max(counts), self.sequential_posemb.shape[1]
        table = resize_scans(self.sequential_posemb, max(longest, available) if self.training else longest)
        if self.training and longest <= available:
            table = table[torch.randperm(available, device=table.device)]
        number = np.concatenate([np.arange(n) for n in counts])
        return table, np.repeat(number, np.diff(layout.host_offsets("scan")))

    @staticmethod
    def _select(index: np.ndarray, keep: Tensor | None, device: torch.device) -> Tensor:
        index = torch.from_numpy(index).to(device, non_blocking=True)
        return index if keep is None else index[keep]

    def prefix(self, layout: Layout) -> Tensor:
        """The tail ``(R - T, C)``: every segment of the first level gets the learnt prefix tokens, the rest zeros."""
        tokens = torch.cat([getattr(self, f"{name}_token")[0] for name in self.config.prefix])
        live = layout.num_segments(self.config.levels[0])
        dead = layout.num_rows - layout.num_tokens - live * self.num_prefix
        return torch.cat([tokens.repeat(live, 1), tokens.new_zeros((dead, tokens.shape[1]))])

    def run_blocks(self, x: Tensor, layout: Layout, rope: Tensor | None = None) -> Tensor:
        """All blocks over what :meth:`embed` gave; the tail comes back at study level. This part compiles."""
        levels = [*self.config.levels, "study"]
        for block, following in zip(self.blocks, levels[1:], strict=True):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, layout, rope, use_reentrant=False)
            else:
                x = block(x, layout, rope)
            switch_level(x, layout, block.level, following)
        return x

    def forward_features(self, batch: StudyBatch | Tensor) -> tuple[Tensor, Layout]:
        """Normalised packed rows ``(R, C)`` at study level, and their layout."""
        if isinstance(batch, Tensor):
            batch = StudyBatch.from_dense(batch)
        x, layout, rope = self.embed(batch)
        return self.norm(self.run_blocks(x, layout, rope)), layout

    def pool(self, x: Tensor, layout: Layout) -> Tensor:
        """``(B, P, C)``, or ``(B, P, 2C)`` with the mean of the patch tokens appended (the dino.txt head)."""
        studies = layout.num_segments("study")
        prefix = x[layout.prefix_rows("study")].unflatten(0, (studies, self.num_prefix))
        if self.config.pool == "cls":
            return prefix
        mean = segment_mean(x, layout, "study")[:, None].expand_as(prefix)
        return torch.cat([prefix, mean], dim=-1)

    def forward(self, batch: StudyBatch | Tensor) -> Tensor:
        """Pooled features.

        Args:
            batch: a ragged :class:`StudyBatch`, or the published dense ``(B, N, 1, D, H, W)``, normalised.

        Returns:
            ``(B, P, num_features)``: one row per study and prefix token.
        """
        return self.pool(*self.forward_features(batch))
