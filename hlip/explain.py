"""Which patches speak for a sentence: relevance maps over a study's scans.

Two ways, both linear in memory, unlike attention roll-out, which needs a dense matrix over all tokens:

* :func:`relevance`: gradient times activation (Grad-CAM's idea, arXiv 1610.02391) at the input of one block: the share each
  patch token has, to first order, in the cosine between the study and the sentence. One forward and one backward pass.
* :func:`occlusion`: how much the cosine falls when a patch is left out (arXiv 1311.2901). Nothing has to be painted over: the
  token is dropped from the packed rows. The effect itself rather than its first order, at one forward pass per patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hlip_kernels import Layout, switch_level

from .model import HLIP, StudyBatch


@torch.inference_mode(False)  # the caller's, if any, would leave nothing to differentiate
def relevance(model: HLIP, scans: Sequence[Tensor], text_feature: Tensor, *, block: int = -1, **batch) -> list[Tensor]:
    """Relevance of every voxel of one study for a text.

    Args:
        model: in evaluation mode.
        scans: the prepared scans ``(D, H, W)`` of one study.
        text_feature: ``(D_embed,)``, e.g. one row of :attr:`hlip.evaluate.Classifier.weights`, or the difference of two.
        block: at whose input patches are judged; negative counts from the last.
        batch: options of :meth:`hlip.model.StudyBatch.pack`.

    Returns:
        For each scan float32 ``(D, H, W)`` on the CPU, at least 0, 1 at the study's most relevant place. All zeros if no
        patch speaks for the text.

    May be called inside ``torch.no_grad()`` and ``torch.inference_mode()``.

    Raises:
        ValueError: the model itself was made in inference mode.
    """
    trunk = model.visual.trunk
    if trunk.spatial_posemb.is_inference():
        raise ValueError("no gradient passes through a model made inside torch.inference_mode(): make it outside")
    images = StudyBatch.pack([list(scans)], **batch).to(trunk.spatial_posemb.device)
    levels = [*trunk.config.levels, "study"]
    block %= len(trunk.blocks)
    with torch.no_grad():
        x, layout, rope = trunk.embed(images)
        for i in range(block):
            x = switch_level(trunk.blocks[i](x, layout, rope), layout, levels[i], levels[i + 1])
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        y = start
        for i in range(block, len(trunk.blocks)):
            y = switch_level(trunk.blocks[i](y, layout, rope), layout, levels[i], levels[i + 1])
        features = model.visual.head(trunk.pool(trunk.norm(y), layout))[0, 0]
        # A copy: one made in inference mode cannot be kept for the backward pass.
        score = F.cosine_similarity(features, text_feature.detach().to(features, copy=True), dim=0)
        (gradient,) = torch.autograd.grad(score, start)
    share = (start.detach() * gradient).sum(dim=1)[: layout.num_tokens].float().clamp(min=0).cpu()
    return _to_maps(share, scans, layout, trunk.config.patch_size)


@torch.no_grad()
def occlusion(
    model: HLIP, scans: Sequence[Tensor], text_feature: Tensor, *, batch_size: int = 32, **batch
) -> list[Tensor]:  # fmt: skip
    """As :func:`relevance`, by leaving out one patch at a time: exact, and as many forward passes as there are patches.

    Args:
        batch_size: studies, each lacking another patch, that run at once.
    """
    trunk = model.visual.trunk
    images = StudyBatch.pack([list(scans)], **batch).to(trunk.spatial_posemb.device)
    x, whole, rope = trunk.embed(images)
    tokens, count = x[: whole.num_tokens], whole.num_tokens

    def score(kept: Tensor) -> Tensor:
        """Cosines ``(N,)`` of N copies of the study, copy ``i`` with the patches ``kept[i]`` (bool ``(N, T)``)."""
        copies = Layout.from_grids(list(whole.grids) * len(kept), num_prefix=whole.num_prefix, row_multiple=whole.row_multiple)
        layout = copies.drop(kept.flatten()).to(tokens.device)
        chosen = kept.flatten().to(tokens.device)
        rows = tokens.repeat(len(kept), 1)[chosen]
        turns = None if rope is None else rope.repeat(len(kept), 1)[chosen]
        y = trunk.norm(trunk.run_blocks(torch.cat([rows, trunk.prefix(layout)]), layout, turns))
        features = model.visual.head(trunk.pool(y, layout))[:, 0]
        return F.cosine_similarity(features, text_feature.to(features)[None], dim=1).float().cpu()

    everything = score(torch.ones(1, count, dtype=torch.bool))
    without = ~torch.eye(count, dtype=torch.bool)
    falls = [everything - score(part) for part in without.split(batch_size)]
    share = torch.cat(falls) if falls else torch.zeros(0)
    return _to_maps(share.clamp(min=0), scans, whole, trunk.config.patch_size)


def _to_maps(share: Tensor, scans: Sequence[Tensor], layout: Layout, patch: tuple[int, int, int]) -> list[Tensor]:
    """One value per patch token ``(T,)`` -> a map per scan, the highest value 1."""
    maps, first = [], 0
    for scan, (d, h, w) in zip(scans, layout.grids[0], strict=True):
        grid = share[first : first + d * h * w].view(1, 1, d, h, w)
        first += d * h * w
        maps.append(_to_voxels(grid, tuple(scan.shape), patch))
    highest = max((float(m.max()) for m in maps if m.numel()), default=0.0)
    return [m / highest for m in maps] if highest > 0 else maps


def _to_voxels(grid: Tensor, shape: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """``(1, 1, d, h, w)`` -> ``(D, H, W)``: every patch's value spread smoothly over its voxels; the padding cut off."""
    if grid.numel() == 0:
        return torch.zeros(shape)
    size = [n * p for n, p in zip(grid.shape[2:], patch, strict=True)]
    return F.interpolate(grid, size=size, mode="trilinear", align_corners=False)[0, 0, : shape[0], : shape[1], : shape[2]]
