"""A run's folder: what training writes and everything else reads.

run/
  config.yaml          the whole config, written when training begins
  model.safetensors    the weights
  best.safetensors     those of the best evaluation, where there was one
  tokenizer/           the tokenizer, when it was learnt or copied for this run
  state.pt             optimiser, step, random states: what resuming needs (tensors and plain containers only)
  tensorboard/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hlip_kernels.backends import BACKENDS

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
        heads=config.heads, prefix=config.prefix, pool=config.pool, rotary=config.rotary, drop_path=config.drop_path,
    )  # fmt: skip
    return Variant(encoder, config.embed_dim, token_axis=True, dual=len(config.prefix) > 1 and config.loss in ("", "dual"))


def loss_kind(config: ModelConfig) -> str:
    """The loss a config means; see :class:`ModelConfig`."""
    return config.loss or ("dual" if model_variant(config).dual else "clip")


def check_model(config: ModelConfig) -> None:
    """Raises ValueError for a model that could not be trained, before anything is built or read."""
    chosen, kind = model_variant(config), loss_kind(config)
    if kind == "dual" and not chosen.dual:
        raise ValueError("model.loss: dual needs a dual model: prefix [cls, reg], or a published one of that kind")
    if kind == "siglip" and chosen.dual:
        raise ValueError(f"model.loss: siglip needs a logit bias, which {config.name} does not have: choose dual or clip")
    if config.backend not in ("auto", *BACKENDS):
        raise ValueError(f"model.backend: no backend {config.backend!r}; choose auto or one of {', '.join(BACKENDS)}")
    if config.text == "tiny" and config.text_pretrained:
        raise ValueError("model.text_pretrained: the tiny text model has no weights of its own; choose another model.text")


def build_model(config: ModelConfig, *, vocab_size: int | None = None) -> HLIP:
    """The model of a config with fresh weights (or its pretrained parts). ``vocab_size`` is the tiny text tower's.

    Raises:
        ValueError: a text model that cannot be loaded.
    """
    text: Any = config.text
    if config.text == "tiny":
        text = {**TINY_BERT, "vocab_size": vocab_size or TINY_BERT["vocab_size"]}
    with from_the_hub("model.text", text_source(config)):
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


def text_source(config: ModelConfig) -> str:
    """The folder or Hugging Face id of the text model."""
    return model_variant(config).text_model if config.text == "published" else config.text


def context_length(config: ModelConfig) -> int:
    """The most tokens of a text."""
    if config.context_length:
        return config.context_length
    return TINY_BERT["max_position_embeddings"] if config.text == "tiny" else model_variant(config).context_length


def check_text_length(config: ModelConfig, model: HLIP) -> None:
    """Raises ValueError if texts may be longer than the text model takes; it would fail at the first that is."""
    length, most = context_length(config), getattr(model.text.config, "max_position_embeddings", None)
    if most and length > most:
        raise ValueError(f"model.context_length: {length} tokens are more than the text model ({config.text}) takes, {most}")


def check_vocabulary(tokenizer: Tokenizer, model: HLIP) -> None:
    """Raises ValueError if the tokenizer knows more words than the text tower."""
    rows = model.text.transformer.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"{tokenizer.source}: a tokenizer of {tokenizer.vocab_size} words, but the text tower has {rows}: "
            "is it another model's?"
        )


@contextmanager
def from_the_hub(field: str, source: str) -> Iterator[None]:
    """Says in one line what could not be loaded while the block runs: ``field`` of the config names ``source``.

    Raises:
        ValueError: instead of what transformers and the hub raise: OSError when a file is missing or there is no network.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{field}: {source!r} can be loaded neither from a folder nor from the Hugging Face hub or its cache "
            f"({reason(error)})"
        ) from error


def open_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer that was saved in a run's folder.

    Raises:
        ValueError: it is not there, or damaged; the message names its folder.
    """
    place = folder / "tokenizer"
    try:
        return Tokenizer(place, context_length(config))
    except (OSError, ValueError) as error:
        raise ValueError(f"{place}: the run's tokenizer is missing or damaged ({reason(error)})") from error


def load_run(folder: str | Path, *, device: torch.device | str = "cpu") -> Run:
    """Loads a run for use: the model in evaluation mode, its tokenizer, its config.

    Args:
        folder: the run's, whose last weights are loaded; or a file of weights in it, ``best.safetensors``.

    Raises:
        FileNotFoundError: not a run's folder; the message says what is missing.
        ValueError: something in it is damaged, or does not fit the rest.
    """
    folder, weights = Path(folder), "model.safetensors"
    if folder.suffix == ".safetensors":
        folder, weights = folder.parent, folder.name
    for needed in ("config.yaml", weights):
        if not (folder / needed).is_file():
            hint = "train one with `hlip train`; for published weights see docs/checkpoints.md"
            raise FileNotFoundError(f"{folder} is not a finished run: {needed} is missing ({hint})")
    config = load_config(folder / "config.yaml")
    if (folder / "tokenizer").is_dir():
        tokenizer = open_tokenizer(folder, config.model)
    else:
        source = config.model.tokenizer or config.model.text
        with from_the_hub("tokenizer", source):
            tokenizer = Tokenizer(source, context_length(config.model))
    # Everything comes from the checkpoint: nothing else is loaded, or downloaded.
    config.model.text_pretrained = False
    model = build_model(config.model, vocab_size=tokenizer.vocab_size)
    load_checkpoint(model, folder / weights, strict=True)
    return Run(model.to(device).eval(), tokenizer, config)


def load_state(path: Path) -> dict:
    """Reads a training state without running code from it.

    Raises:
        ValueError: it is damaged, or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise many kinds for a broken or hostile file
        raise ValueError(f"{path}: cannot be read as a training state: {reason(error)}") from error
    needed = {"step", "total_steps", "model", "optimizer"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise ValueError(f"{path}: not a training state, it lacks {', '.join(sorted(needed - set(state)))}")
    return state
