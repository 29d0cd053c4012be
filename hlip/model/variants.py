"""Every published HLIP model as data, with the names its authors gave it.

Facts: arXiv 2505.21862 and the Zch0414/hlip repository (June 2025 to April 2026).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BIOMEDBERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
CXRBERT = "microsoft/BiomedVLP-CXR-BERT-specialized"


@dataclass(frozen=True)
class Encoder:
    """The shape of the image encoder.

    Attributes:
        image_size, patch_size: voxels ``(depth, height, width)`` of one scan, and of one patch.
        width, heads: of the transformer.
        levels: the level each block attends at, one name per block.
        prefix: names of the prefix tokens: ``("cls",)`` or ``("cls", "reg")``.
        pool: ``"cls"`` (the prefix tokens) or ``"dinotxt"`` (each concatenated with the mean of the study's patch tokens).
        max_scans: entries of the table of scan positions; 0 for none.
        positions: how a fresh table of spatial positions is made: ``"3d"`` (a third of the channels per axis) or
            ``"1d+2d"`` (all channels for depth, plus all channels for the plane).
        rotary: queries and keys are also turned by the patch's place in its scan (:func:`hlip.model.position.rotary_3d`).
        drop_path: rate of the last block; grows linearly from 0.
    """

    image_size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    levels: tuple[str, ...]
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    prefix: tuple[str, ...] = ("cls",)
    pool: str = "cls"
    max_scans: int = 0
    positions: str = "1d+2d"
    rotary: bool = False
    drop_path: float = 0.2

    @property
    def grid(self) -> tuple[int, int, int]:
        return tuple(n // p for n, p in zip(self.image_size, self.patch_size, strict=True))

    @property
    def depth(self) -> int:
        return len(self.levels)


@dataclass(frozen=True)
class Variant:
    """An image encoder with its place in a CLIP model.

    Attributes:
        embed_dim: dimension of the shared space.
        token_axis: image features are ``(B, P, embed_dim)`` instead of ``(B, embed_dim)``.
        dual: two heads, sentence and report, with a log scale each (the second is stored as ``logit_bias``).
        text_model: the published text tower. context_length: its tokens.
    """

    encoder: Encoder
    embed_dim: int
    token_axis: bool = False
    dual: bool = False
    text_model: str = BIOMEDBERT
    context_length: int = 256


_BASE_SCAN_STUDY = ("scan", "scan", "study") * 4
_BASE_SLICE_SCAN = ("slice", "slice", "scan") * 4
_BASE_ALL = ("slice", "scan", "study") * 4
_LARGE_SCAN_STUDY = (("scan",) * 5 + ("study",)) * 4
_LARGE_ALL = (("slice",) * 4 + ("scan", "study")) * 4

_CHEST = Encoder((112, 336, 336), (8, 24, 24), _BASE_SLICE_SCAN, positions="3d")
_V1 = Encoder((48, 224, 224), (8, 16, 16), _BASE_SCAN_STUDY, max_scans=40, positions="3d")
_V2 = Encoder((48, 224, 224), (6, 16, 16), _BASE_SCAN_STUDY, pool="dinotxt")
_ABLATION = replace(_V2, max_scans=40)
_DUAL = replace(_V2, prefix=("cls", "reg"))
_LARGE = {"width": 1024, "heads": 16}

VARIANTS: dict[str, Variant] = {
    # June 2025 and v1.0
    "vit_base_singlescan_h2_token2744": Variant(_CHEST, 512, text_model=CXRBERT, context_length=512),
    "vit_base_multiscan_h2_token588": Variant(replace(_V1, patch_size=(16, 16, 16)), 512),
    "vit_base_multiscan_h2_token1176": Variant(_V1, 512),
    "vit_base_multiscan_h3_token1176": Variant(replace(_V1, levels=_BASE_ALL), 512),
    # ablations, 2025
    "vit_base_multiscan_h2_dinotxt1176": Variant(replace(_ABLATION, patch_size=(8, 16, 16)), 768, token_axis=True),
    "vit_base_multiscan_h2_token1568": Variant(replace(_ABLATION, pool="cls"), 512, token_axis=True),
    "vit_base_multiscan_h2_dinotxt1568": Variant(_ABLATION, 768, token_axis=True),
    "ablate_seqposemb_vit_base_multiscan_h2_dinotxt1568": Variant(_V2, 768, token_axis=True),
    "ablate_rope_vit_base_multiscan_h2_dinotxt1568": Variant(replace(_V2, rotary=True), 768, token_axis=True),
    # 2026
    "vit_base_slice_scan_token2744": Variant(
        replace(_CHEST, positions="1d+2d"), 512, token_axis=True, text_model=CXRBERT, context_length=512
    ),
    "vit_base_scan_study_token1176": Variant(replace(_V1, positions="1d+2d"), 512, token_axis=True),
    "vit_base_scan_study_dualdinotxt1568": Variant(_DUAL, 768, token_axis=True, dual=True),
    "vit_base_slice_scan_study_dualdinotxt1568": Variant(replace(_DUAL, levels=_BASE_ALL), 768, token_axis=True, dual=True),
    "vit_large_scan_study_dualdinotxt1568": Variant(
        replace(_DUAL, levels=_LARGE_SCAN_STUDY, **_LARGE), 768, token_axis=True, dual=True
    ),
    "vit_large_slice_scan_study_dualdinotxt1568": Variant(
        replace(_DUAL, levels=_LARGE_ALL, **_LARGE), 768, token_axis=True, dual=True
    ),
    "vit_base_slice_scan_dualdinotxt2744": Variant(
        replace(_CHEST, positions="1d+2d", prefix=("cls", "reg"), pool="dinotxt"),
        768, token_axis=True, dual=True, text_model=CXRBERT, context_length=512,
    ),
}  # fmt: skip

_ALIASES = {
    "ablate_seqposemb_vit_base_multiscan_h2_dualdinotxt1568": "vit_base_scan_study_dualdinotxt1568",
    "ablate_seqposemb_vit_base_multiscan_h3_dualdinotxt1568": "vit_base_slice_scan_study_dualdinotxt1568",
    "ablate_seqposemb_vit_large_multiscan_h2_dualdinotxt1568": "vit_large_scan_study_dualdinotxt1568",
    "ablate_seqposemb_vit_large_multiscan_h3_dualdinotxt1568": "vit_large_slice_scan_study_dualdinotxt1568",
    "hlip_2025_10_08": "ablate_seqposemb_vit_base_multiscan_h2_dinotxt1568",
}


def canonical_name(name: str) -> str:
    """The key of :data:`VARIANTS` for any published spelling: timm, open_clip or Hugging Face, hyphens or underscores.

    Raises:
        ValueError: no such model; the message lists them.
    """
    short = name.rsplit("/", 1)[-1].replace("-", "_")
    for ablation in ("ablate_seqposemb_", "ablate_rope_"):
        short = short.replace(f"{ablation}clip_", ablation)
    short = short.removeprefix("clip_")
    short = _ALIASES.get(short, short)
    if short not in VARIANTS:
        raise ValueError(f"no model {name!r}; there are:\n  " + "\n  ".join(VARIANTS))
    return short


def variant(name: str) -> Variant:
    """The published model of this name, under any spelling :func:`canonical_name` knows."""
    return VARIANTS[canonical_name(name)]
