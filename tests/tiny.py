"""A CLIP model small enough for tests, and a folder of studies to train it on."""

from dataclasses import replace

import torch

from hlip.model import VARIANTS, Variant, create_model

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "vocab_size": 200,
}  # fmt: skip


def tiny_variant(name="vit_base_slice_scan_study_dualdinotxt1568", depth=3, **changes) -> Variant:
    """A published variant with its first ``depth`` levels, narrow, for scans of 8 x 16 x 16."""
    published = VARIANTS[name]
    shape = {"width": 48, "heads": 2, "image_size": (8, 16, 16), "patch_size": (2, 8, 8), "drop_path": 0.0, **changes}
    return replace(
        published, embed_dim=24, encoder=replace(published.encoder, levels=published.encoder.levels[:depth], **shape)
    )


def tiny_model(name="vit_base_slice_scan_study_dualdinotxt1568", *, text=TEXT, seed=0, variant=None, **options):
    torch.manual_seed(seed)
    return create_model(variant or tiny_variant(name), text=text, **options)


def scans(*depths, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 255, (d, size, size), dtype=torch.uint8, generator=generator) for d in depths]
