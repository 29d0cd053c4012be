"""A run's folder: what training writes and everything else reads.

run/
  config.yaml          the whole config
  model.safetensors    the weights
  tokenizer/           the tokenizer, when it was learnt or copied for this run
  state.pt             optimiser, step, random states: what resuming needs (tensors and plain containers only)
  tensorboard/
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..model import HLIP, Encoder, Tokenizer, Variant, create_model, load_checkpoint, variant
from ..model.text import TINY_BERT
from ..storage import reason
from .config import ModelConfig, TrainConfig, load_config


@dataclass
class Run:
    """A trained model with what it was trained on."""

    model: HLIP
    tokenizer: Tokenizer
    config: TrainConfig


def model_variant(config: ModelConfig) -> Variant:
    """The variant a config means: a published one by name, or its own shape."""
    if config.name:
        return variant(config.name)
    encoder = Encoder(
        image_size=config.image_size, patch_size=config.patch_size, levels=config.levels, width=config.width,
        heads=config.heads, prefix=config.prefix, pool=config.pool, drop_path=config.drop_path,
    )  # fmt: skip
    return Variant(encoder, config.embed_dim, token_axis=True, dual=len(config.prefix) > 1 and config.loss in ("", "dual"))


def loss_kind(config: ModelConfig) -> str:
    """The loss a config means; see :class:`ModelConfig`."""
    return config.loss or ("dual" if model_variant(config).dual else "clip")


def build_model(config: ModelConfig, *, vocab_size: int | None = None) -> HLIP:
    """The model of a config with fresh weights (or its pretrained parts). ``vocab_size`` is the tiny text tower's."""
    text: Any = config.text
    if config.text == "tiny":
        text = {**TINY_BERT, "vocab_size": vocab_size or TINY_BERT["vocab_size"]}
    model = create_model(
        model_variant(config),
        text=text,
        text_pretrained=config.text_pretrained,
        patch_dropout=config.patch_dropout,
        init_logit_bias=-10.0 if loss_kind(config) == "siglip" else None,
        init_logit_scale=2.302585 if loss_kind(config) == "siglip" else 2.659260,
        backend=config.backend,
    )
    if config.lock_text:
        model.lock_text_tower()
    model.set_grad_checkpointing(config.grad_checkpointing)
    return model


def context_length(config: ModelConfig) -> int:
    if config.context_length:
        return config.context_length
    return TINY_BERT["max_position_embeddings"] if config.text == "tiny" else model_variant(config).context_length


def load_run(folder: str | Path, *, device: torch.device | str = "cpu") -> Run:
    """Loads a run for use: the model in evaluation mode, its tokenizer, its config.

    Raises:
        FileNotFoundError: not a run's folder; the message says what is missing.
    """
    folder = Path(folder)
    for needed in ("config.yaml", "model.safetensors"):
        if not (folder / needed).is_file():
            raise FileNotFoundError(f"{folder} is not a finished run: {needed} is missing (train one with `hlip train`)")
    config = load_config(folder / "config.yaml")
    source = folder / "tokenizer" if (folder / "tokenizer").is_dir() else config.model.tokenizer or config.model.text
    tokenizer = Tokenizer(source, context_length(config.model))
    # Everything comes from the checkpoint: nothing else is loaded, or downloaded.
    config.model.text_pretrained = False
    model = build_model(config.model, vocab_size=tokenizer.vocab_size)
    load_checkpoint(model, folder / "model.safetensors", strict=True)
    return Run(model.to(device).eval(), tokenizer, config)


def load_state(path: Path) -> dict:
    """Reads a training state without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a training state: {reason(error)}") from error
