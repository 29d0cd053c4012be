"""The image and text towers together, with open_clip's interface and the published parameter names."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import StudyBatch
from .encoder import HLIPEncoder
from .text import text_tower
from .variants import Variant, variant

INIT_LOGIT_SCALE = math.log(1 / 0.07)


class VisualTower(nn.Module):
    """The encoder (``trunk``) and the projection into the shared space (``head.proj``)."""

    def __init__(self, config: Variant, **encoder):
        super().__init__()
        self.trunk = HLIPEncoder(config.encoder, **encoder)
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(self.trunk.num_features, config.embed_dim, bias=False)))
        self.token_axis = config.token_axis

    def forward(self, batch: StudyBatch | Tensor) -> Tensor:
        """``(B, P, embed_dim)``, or ``(B, embed_dim)`` for models without a token axis."""
        features = self.head(self.trunk(batch))
        return features if self.token_axis else features[:, 0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)


class HLIP(nn.Module):
    """A CLIP model over whole studies: ``visual.trunk.*``, ``visual.head.proj``, ``text.*``, ``logit_scale``, ``logit_bias``.

    Args:
        config: the variant.
        text: the text tower, or ``None`` for images only.
        init_logit_bias: value of ``logit_bias``; ``None`` leaves it out. In dual models this parameter is, as published,
            the log scale of the report head, and it always exists.
        encoder: options of :class:`HLIPEncoder`.
    """

    def __init__(
        self, config: Variant, text: nn.Module | None, *,
        init_logit_scale: float = INIT_LOGIT_SCALE, init_logit_bias: float | None = None, **encoder,
    ):  # fmt: skip
        super().__init__()
        self.config = config
        self.visual = VisualTower(config, **encoder)
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale))
        if init_logit_bias is None and config.dual:
            init_logit_bias = INIT_LOGIT_SCALE
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))

    def encode_image(self, image: StudyBatch | Tensor, normalize: bool = False) -> Tensor:
        """Image features ``(B, P, embed_dim)`` or ``(B, embed_dim)``; see :class:`VisualTower`."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Text features ``(N, embed_dim)`` of token ids ``(N, L)``."""
        if self.text is None:
            raise ValueError("this model was made without a text tower: create_model(..., text=...)")
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: StudyBatch | Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor | None]:
        """Normalised features of whichever is given, and the scales, under open_clip's names.

        Dual models also give ``report_logit_scale``, the scale of the report head.
        """
        out = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.config.dual:
            out["report_logit_scale"] = self.logit_bias.exp()
        elif self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        return out

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keeps the logit scales in [1, 100], after every optimiser step. A SigLIP bias is left alone."""
        self.logit_scale.clamp_(0, math.log(100))
        if self.config.dual:
            self.logit_bias.clamp_(0, math.log(100))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)

    def lock_text_tower(self, freeze_layer_norm: bool = False) -> None:
        """Freezes the text transformer, by default (as published) except its layer norms; its projection still trains."""
        self.text.lock(0, freeze_layer_norm)


def create_model(
    name: str | Variant,
    *,
    text: str | Path | Mapping | None = "published",
    text_pretrained: bool = False,
    checkpoint: str | Path | None = None,
    patch_dropout: float = 0.0,
    init_logit_scale: float = INIT_LOGIT_SCALE,
    init_logit_bias: float | None = None,
    **attention,
) -> HLIP:
    """A published model by name, or one of your own shape, with fresh weights unless a checkpoint is given.

    Args:
        name: any published spelling (``"vit_base_multiscan_h2_token1176"``, ``"clip-vit_base-scan_study-dualdinotxt1568"``,
            with or without the owner), or a :class:`Variant`.
        text: ``"published"`` builds the published BERT's shape without downloading anything; a folder or Hugging Face id
            takes that model; a mapping of ``BertConfig`` fields makes a small one; ``None`` leaves the tower out.
        text_pretrained: load the text model's own pretrained weights (from the folder, the local cache or the hub).
        checkpoint: weights to load; see :func:`hlip.load_checkpoint`.
        patch_dropout: share of patch tokens left out in training.
        init_logit_scale, init_logit_bias: see :class:`HLIP`.
        attention: options of :class:`hlip_kernels.HierarchicalAttention` for every block, e.g. ``backend="sdpa"``;
            ``neighbours`` and ``summary`` go to the blocks whose level can have them.

    Raises:
        ValueError: an unknown name (the message lists all), a checkpoint that does not fit, an option that no block can have.
    """
    config = variant(name) if isinstance(name, str) else name
    tower = None if text is None else text_tower(config, text, pretrained=text_pretrained)
    model = HLIP(
        config,
        tower,
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
        patch_dropout=patch_dropout,
        **attention,
    )
    if checkpoint is not None:
        from .checkpoint import load_checkpoint

        load_checkpoint(model, checkpoint)
    return model
