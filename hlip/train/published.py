"""Published weights where a trained run is expected: the variant by name, its tokenizer, and how its authors prepare scans."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model import Tokenizer, Variant, create_model, load_checkpoint, variant
from ..model.text_files import TOKENIZER_FILES
from ..model.variants import canonical_name
from ..storage import reason
from .config import DataConfig, ModelConfig, TrainConfig
from .run import Run, check_vocabulary, load_run

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass
class PublishedModel(Run):
    """A published model, ready for use. Its config names the variant and no studies.

    Attributes:
        preset: see :func:`hlip.train.prepared.prepare_study`.
    """

    preset: str | Mapping[str, str]


def open_model(source: str | Path, *, model: str = "", device: torch.device | str = "cpu") -> Run:
    """A run's folder, or published weights.

    Args:
        source: a run's folder, or a ``.safetensors`` file in it; or what :func:`hlip.load_checkpoint` takes: a file, a
            snapshot's folder, a Hugging Face id.
        model: the published variant the weights are of; empty: told from ``source``, if its name is that of one.

    Raises:
        FileNotFoundError: neither. ValueError: weights whose variant cannot be told, or that do not fit it.
    """
    folder = Path(source).expanduser()
    if (folder / "config.yaml").is_file() or (folder.suffix == ".safetensors" and (folder.parent / "config.yaml").is_file()):
        if model:
            raise ValueError(f"{source} is a run, whose config says what model it is: leave out --model {model}")
        return load_run(folder, device=device)
    name = canonical_name(model) if model else name_in(source)
    if name:
        return load_published(source, name, device=device)
    if folder.suffix in _WEIGHTS or (folder.is_dir() and any(p.suffix in _WEIGHTS for p in folder.iterdir())):
        raise ValueError(
            f"{source}: no run (config.yaml is missing), and its name does not say which published model it holds; weights "
            "alone do not tell: name it with --model (docs/checkpoints.md lists them)"
        )
    return load_run(folder, device=device)  # says what is missing


def name_in(source: str | Path) -> str:
    """The variant that a path or Hugging Face id is named after, also inside the hub's local cache; or nothing."""
    path = Path(source).expanduser()
    cached = [part.rsplit("--", 1)[-1] for part in path.parts if part.startswith("models--")]
    for name in (path.name, path.stem, *cached, path.parent.name):
        try:
            return canonical_name(name)
        except ValueError:
            continue
    return ""


def load_published(source: str | Path, name: str, *, device: torch.device | str = "cpu") -> PublishedModel:
    """A published model in evaluation mode, with its tokenizer.

    Args:
        source: see :func:`hlip.load_checkpoint`. name: of the variant.

    Raises:
        FileNotFoundError: no weights there. ValueError: they are of another variant, or there is no tokenizer.
    """
    config = variant(name)
    model = create_model(config)
    report = load_checkpoint(model, source)
    if report.missing:
        raise ValueError(
            f"{report.path} lacks {len(report.missing)} of the weights of {name}, e.g. {report.missing[0]}: "
            "is it another model?"
        )
    tokenizer = _tokenizer(source, config)
    check_vocabulary(tokenizer, model)
    described = TrainConfig(run="", data=DataConfig(train=""), model=ModelConfig(name=name))
    return PublishedModel(model.to(device).eval(), tokenizer, described, published_preset(name))


def published_preset(name: str) -> str | dict[str, str]:
    """How scans are prepared for a published model: of one kind, or by what a study is guessed to be.

    Head models have seen 48 slices in training, and those of 2025 were tested with 144 of MRI.
    """
    encoder = variant(name).encoder
    if encoder.image_size == (112, 336, 336):
        return "chest-ct"
    first = "multiscan" in name and encoder.max_scans and encoder.pool == "cls" and not variant(name).token_axis
    ct = "head-ct-published-48"
    return {"mri": "mri-published-144" if first else "mri-published-48", "head-ct": ct, "chest-ct-ragged": ct}


def _tokenizer(source: str | Path, config: Variant) -> Tokenizer:
    """The one beside the weights, or else the text model's own."""
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    if path.exists():
        beside = [str(folder)] if any((folder / name).is_file() for name in TOKENIZER_FILES) else []
    else:
        beside = [str(source)]
    problem = ""
    for place in (*beside, config.text_model):
        try:
            return Tokenizer(place, config.context_length)
        except Exception as error:  # transformers raises many kinds for what is absent, offline or broken
            said = reason(error).removeprefix(f"{place}: ")
            problem = problem or f"{place}: {said}"
            if path.exists() and place in beside:
                log.warning("%s: its tokenizer is not used, but that of %s (%s)", place, config.text_model, said)
    where = f"the weights in {folder}" if path.exists() else "a local copy of the weights"
    raise ValueError(f"no tokenizer: put tokenizer.json or vocab.txt of {config.text_model} beside {where} ({problem})")
