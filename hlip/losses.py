"""Contrastive losses between studies and reports: CLIP and SigLIP (open_clip's), and HLIP's dual loss."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

KINDS = ("clip", "siglip", "dual")


class ContrastiveLoss(nn.Module):
    """One scalar from the features of a batch.

    Args:
        kind: ``"clip"`` (Radford, arXiv 2103.00020), ``"siglip"`` (Zhai, arXiv 2303.15343), or ``"dual"``: half a CLIP loss
            between the first prefix token and a sentence, half between the second and the whole report, each with its
            own scale.
        rank, world_size: of this process; features are gathered from all processes, with gradients.

    Raises:
        ValueError: unknown kind.
    """

    def __init__(self, kind: str, *, rank: int = 0, world_size: int = 1):
        super().__init__()
        from open_clip.loss import ClipLoss, SigLipLoss

        if kind not in KINDS:
            raise ValueError(f"loss must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        # torch says it at every epoch and on every process; which function gathers is open_clip's affair.
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning, "open_clip")
        if kind == "siglip":
            self.loss = SigLipLoss(rank=rank, world_size=world_size)
        else:
            self.loss = ClipLoss(local_loss=world_size > 1, gather_with_grad=True, rank=rank, world_size=world_size)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """The loss of one batch.

        Args:
            features: what :meth:`hlip.model.HLIP.forward` returns: ``image_features`` ``(B, D)`` or ``(B, P, D)``,
                ``text_features`` ``(B, D)``, for the dual loss ``(2 * B, D)``: sentences, then reports; ``logit_scale``,
                and for the dual loss ``report_logit_scale``, for SigLIP ``logit_bias``.

        Raises:
            ValueError: features that do not fit the kind of loss.
        """
        image, text, scale = features["image_features"], features["text_features"], features["logit_scale"]
        if self.kind == "dual":
            if image.ndim != 3 or image.shape[1] < 2 or "report_logit_scale" not in features:
                raise ValueError("the dual loss needs a dual model: two prefix tokens (cls and reg) and two scales")
            if len(text) != 2 * len(image):
                raise ValueError(
                    f"the dual loss needs a sentence and a report for each study: {len(image)} studies, {len(text)} texts"
                )
            sentence, report = text.chunk(2)
            return 0.5 * self.loss(image[:, 0], sentence, scale) + 0.5 * self.loss(
                image[:, 1], report, features["report_logit_scale"]
            )
        if image.ndim == 3:
            image = image[:, 0]
        if len(text) != len(image):
            raise ValueError(f"one text for each study is needed: {len(image)} studies, {len(text)} texts")
        if self.kind == "siglip":
            if "logit_bias" not in features:
                raise ValueError(
                    "the SigLIP loss needs a logit bias: create_model(..., init_logit_bias=-10); in a dual model it is a scale"
                )
            return self.loss(image, text, scale, features["logit_bias"])
        return self.loss(image, text, scale)
