"""The training config: plain dataclasses, read from YAML, every field with a default and a meaning."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class DataConfig:
    """Where studies come from.

    Attributes:
        train: a folder with one sub-folder per study, or ``simulated``.
        valid: likewise a folder, to evaluate on; empty: none. Simulated studies bring their own.
        reports: a CSV with columns ``study`` and ``report`` (one row per sentence or per report). Without it, each study
            folder holds ``report.txt``.
        metadata: a CSV, or a folder of them, with slope, intercept and spacing of volume files, in place of what their headers
            say; see :func:`hlip.data.read_metadata`.
        labels: a CSV with a column ``study`` and one column of 0 and 1 per class, for zero-shot evaluation on ``valid``.
        preset: how scans are prepared (``hlip info --presets`` lists them), or ``auto``.
        cache: a folder for prepared scans, so that they are read and resampled once.
        max_scans: keep a random choice of at most this many scans of a study in training; 0 keeps all.
        min_slices: no scan has fewer: in a folder, thinner ones are left out (see :class:`hlip.data.Limits`); simulated
            studies have none.
        follow_links: also read what links in a study's folder point to outside of it.
        workers: loader processes. Simulated studies are rendered by as many, once, before training.
        num_train, num_valid, image_size, min_scans, max_scans_simulated, max_slices: of simulated studies.
    """

    train: str = "simulated"
    valid: str = ""
    reports: str = ""
    metadata: str = ""
    labels: str = ""
    preset: str = "auto"
    cache: str = ""
    max_scans: int = 0
    min_slices: int = 3
    follow_links: bool = False
    workers: int = 1
    num_train: int = 2000
    num_valid: int = 200
    image_size: int = 96
    min_scans: int = 2
    max_scans_simulated: int = 5
    max_slices: int = 20

    def _checks(self) -> dict[str, tuple[bool, str]]:
        return {
            "data.train": (bool(self.train), "a folder, or simulated"),
            "data.max_scans": (self.max_scans >= 0, "at least 0 (all)"),
            "data.min_slices": (self.min_slices >= 1, "at least 1"),
            "data.workers": (self.workers >= 0, "at least 0"),
            "data.num_valid": (self.num_valid >= 0, "at least 0 (none)"),
        }


@dataclass
class ModelConfig:
    """What is trained.

    Attributes:
        name: a published model, or empty for a model of the shape below.
        image_size, patch_size, width, heads, levels, prefix, pool, rotary, drop_path, embed_dim: see
            :class:`hlip.model.variants.Encoder`.
        text: ``published``, ``tiny``, a folder, or a Hugging Face id.
        text_pretrained: start from the text model's own weights.
        tokenizer: a folder or Hugging Face id; empty: the one beside ``checkpoint``, or else of ``text``, for
            ``tiny`` learnt from the training reports.
        context_length: most tokens of a text; 0 takes the model's.
        lock_text: freeze the text transformer except its layer norms.
        mae: a 2-D MAE ViT's weights to start the encoder from.
        checkpoint: weights to start from.
        patch_dropout: share of patch tokens left out in training.
        loss: ``clip``, ``siglip`` or ``dual``; empty: ``dual`` for models with two prefix tokens, else ``clip``.
        grad_checkpointing: recompute blocks instead of keeping activations.
        backend: of the attention kernels.
    """

    name: str = ""
    image_size: tuple[int, int, int] = (24, 96, 96)
    patch_size: tuple[int, int, int] = (4, 16, 16)
    width: int = 192
    heads: int = 3
    levels: tuple[str, ...] = ("slice", "scan", "study") * 2
    prefix: tuple[str, ...] = ("cls", "reg")
    pool: str = "dinotxt"
    rotary: bool = False
    drop_path: float = 0.0
    embed_dim: int = 128
    text: str = "tiny"
    text_pretrained: bool = False
    tokenizer: str = ""
    context_length: int = 0
    lock_text: bool = False
    mae: str = ""
    checkpoint: str = ""
    patch_dropout: float = 0.0
    loss: str = ""
    grad_checkpointing: bool = False
    backend: str = "auto"

    def _checks(self) -> dict[str, tuple[bool, str]]:
        sizes = all(1 <= p <= n for p, n in zip(self.patch_size, self.image_size, strict=True))
        levels = ("slice", "scan", "study")
        return {
            "model.patch_size": (sizes, f"at least 1 and at most image_size, {list(self.image_size)}, in each direction"),
            "model.width": (self.width >= 4 and self.width % 4 == 0, "a multiple of 4 (sines and cosines of two directions)"),
            "model.heads": (self.heads >= 1 and self.width % self.heads == 0, f"a divisor of width, {self.width}"),
            "model.levels": (
                bool(self.levels) and set(self.levels) <= set(levels),
                f"one of {', '.join(levels)} for each block",
            ),
            "model.prefix": (self.prefix in (("cls",), ("cls", "reg")), "[cls] or [cls, reg]"),
            "model.pool": (self.pool in ("cls", "dinotxt"), "cls or dinotxt"),
            "model.rotary": (
                not self.rotary or self.width % (2 * self.heads) == 0,
                f"false where a head has an odd number of channels ({self.width} / {self.heads})",
            ),
            "model.drop_path": (0 <= self.drop_path < 1, "at least 0 and below 1"),
            "model.embed_dim": (self.embed_dim >= 1, "at least 1"),
            "model.text": (bool(self.text), "published, tiny, a folder or a Hugging Face id"),
            "model.context_length": (self.context_length == 0 or self.context_length >= 3, "at least 3, or 0 for the model's"),
            "model.patch_dropout": (0 <= self.patch_dropout < 1, "at least 0 and below 1"),
            "model.loss": (self.loss in ("", "clip", "siglip", "dual"), "clip, siglip, dual or empty"),
        }


@dataclass
class TrainConfig:
    """Everything a run needs; ``run`` is the folder it writes.

    Attributes:
        epochs, batch_size: studies per step and process, before ``accumulate``.
        accumulate: micro-batches whose studies form one contrastive batch (exact, at the price of a second forward pass).
        lr, weight_decay, beta1, beta2, eps: of AdamW.
        warmup: steps of linear warm-up (below 1: a share of all); then the rate falls along half a cosine.
        clip_grad: largest gradient norm; 0 for none.
        precision: ``fp32`` or ``bf16``.
        text_mode: what a study is matched with: ``report`` (all sentences, shuffled) or ``sentence`` (one at random). The
            dual loss takes both.
        prompt: starts every text.
        max_minutes: stop in time, after finishing the step, evaluating and saving; 0 for no limit.
        save_minutes: the state is saved after every epoch, and as often as this inside a long one; 0 for after epochs only.
        evaluate_every: epochs between zero-shot evaluations; 0 for only at the end.
        prompts: a benchmark's name or a YAML file; for simulated studies their own.
        seed: of everything.
    """

    run: str = "runs/latest"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: int = 10
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_grad: float = 0.0
    precision: str = "fp32"
    text_mode: str = "report"
    prompt: str = "This study shows: "
    max_minutes: float = 0.0
    save_minutes: float = 15.0
    evaluate_every: int = 1
    prompts: str = ""
    seed: int = 0

    def validate(self, source: str = "config") -> None:
        """Raises ValueError for values that make no sense, naming ``source``, the fields and what was expected."""
        checks = {**self._checks(), **self.data._checks(), **self.model._checks()}
        wrong = [
            f"{name} must be {expected}, got {_get(self, name)!r}" for name, (fine, expected) in checks.items() if not fine
        ]
        if wrong:
            raise ValueError(f"{source}: " + "; ".join(wrong))

    def _checks(self) -> dict[str, tuple[bool, str]]:
        return {
            "run": (bool(self.run.strip()), "a folder to write"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2 (studies are contrasted with each other)"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "warmup": (0 <= self.warmup < math.inf, "at least 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "beta1": (0 <= self.beta1 < 1, "at least 0 and below 1"),
            "beta2": (0 <= self.beta2 < 1, "at least 0 and below 1"),
            "eps": (0 < self.eps < math.inf, "above 0"),
            "clip_grad": (0 <= self.clip_grad < math.inf, "at least 0 (none)"),
            "precision": (self.precision in ("fp32", "bf16"), "fp32 or bf16"),
            "text_mode": (self.text_mode in ("report", "sentence"), "report or sentence"),
            "max_minutes": (0 <= self.max_minutes < math.inf, "at least 0 (no limit)"),
            "save_minutes": (0 <= self.save_minutes < math.inf, "at least 0 (after epochs only)"),
            "evaluate_every": (self.evaluate_every >= 0, "at least 0 (only at the end)"),
            "seed": (0 <= self.seed < 2**31, "from 0 to 2147483647"),
        }

    def to_dict(self) -> dict:
        """Plain data, for YAML."""
        return _plain(dataclasses.asdict(self))


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A config from a YAML file.

    Args:
        path: the file.
        overrides: dotted names to values, e.g. ``{"data.workers": 2}``; they win.

    Raises:
        FileNotFoundError, ValueError: no such file, an empty one, not YAML, a name set twice, an unknown field (the message
            offers the known ones), or a value of the wrong type.
    """
    from ..yaml_file import read_yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    values = read_yaml(path)
    if values is None:
        raise ValueError(f"{path}: nothing is in it; examples/train.yaml explains every field ({{}} takes all defaults)")
    return config_from(values, overrides, source=str(path))


def config_from(values: Mapping, overrides: Mapping[str, Any] | None = None, *, source: str = "config") -> TrainConfig:
    """A config from plain data; see :func:`load_config`."""
    values = _copy(values, source)
    for name, value in (overrides or {}).items():
        *parents, last = name.split(".")
        node = values
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"{name} cannot be set: {parent} is one value, {node!r}, not a group of fields")
        node[last] = value
    config = _build(TrainConfig, values, source)
    config.validate(source)
    return config


def _copy(values: Any, source: str) -> dict:
    if values is None:  # a group of fields all of which are commented out
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: expected names and values, got {type(values).__name__}")
    return {k: _copy(v, f"{source}: {k}") if isinstance(v, Mapping) else v for k, v in values.items()}


def _build(kind: type, values: Mapping, source: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{source}: unknown field(s) {', '.join(sorted(map(str, unknown)))}; known: {', '.join(hints)}")
    return kind(**{name: _convert(hints[name], value, f"{source}: {name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, _copy(value, where), where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        element = typing.get_args(hint)[0]
        length = None if typing.get_args(hint)[-1] is Ellipsis else len(typing.get_args(hint))
        if length is not None and len(value) != length:
            raise ValueError(f"{where} must have {length} entries, got {len(value)}")
        return tuple(_convert(element, v, where) for v in value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as a string
        except ValueError:
            pass
    if hint is str and value is None:
        return ""
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
