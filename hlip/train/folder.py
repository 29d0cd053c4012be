"""A run's folder while it is trained: what may be overwritten, and in which order things are written.

Whatever fails before training starts leaves an earlier run in the folder as it was.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from ..model import Tokenizer
from ..model.variants import canonical_name
from ..storage import reason, remove_partial, write_atomically, write_tensors
from .best import BEST, OTHERS_BEST
from .config import ModelConfig, TrainConfig, load_config
from .run import loss_kind

log = logging.getLogger(__name__)

WEIGHTS, STATE, CONFIG, TOKENIZER = "model.safetensors", "state.pt", "config.yaml", "tokenizer"
EVENTS = "tensorboard"
# What may change when a run is resumed: it says how to train, or how training began, not what the weights are.
_MAY_CHANGE = {
    "text_pretrained", "checkpoint", "mae", "context_length", "patch_dropout", "drop_path", "grad_checkpointing", "backend"
}  # fmt: skip
# Not used beside a name.
_SHAPE = {"image_size", "patch_size", "width", "heads", "levels", "prefix", "pool", "rotary", "embed_dim"}


def check_folder(config: TrainConfig, *, resume: bool, overwrite: bool) -> bool:
    """Whether the run's folder holds a state to go on from. Writes nothing.

    Args:
        resume: go on from that state, if there is one; says so if there is none.
        overwrite: a trained run in the folder may be replaced.

    Raises:
        ValueError: it is not a folder, or cannot be written in; the state in it is of another model; or it holds a trained
            run that is neither to be resumed nor to be overwritten.
    """
    folder = Path(config.run)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"run: {there} is a file, expected a folder to write or the name of a new one")
    if not os.access(there, os.W_OK):
        raise ValueError(f"run: no permission to write in {there}")
    if resume and (folder / STATE).is_file():
        check_same_model(config, folder)
        return True
    found = [name for name in (WEIGHTS, BEST, STATE) if (folder / name).exists()]
    if found and not overwrite:
        ways = "weights alone cannot be resumed (model.checkpoint starts from them)" if resume else "go on with it (--resume)"
        raise ValueError(
            f"{folder} already holds a trained run ({', '.join(found)}): {ways}, "
            "choose another folder (run), or replace what is there (--overwrite)"
        )
    if resume:
        log.warning("no state in %s to go on from: starting anew", folder)
    return False


def check_same_model(config: TrainConfig, folder: Path) -> None:
    """Raises ValueError, saying what differs, if the run in ``folder`` is of another model than ``config``."""
    if not (folder / CONFIG).is_file():
        return
    before, now = load_config(folder / CONFIG).model, config.model
    shape = not (before.name or now.name)
    theirs, ours = _identity(before, shape), _identity(now, shape)
    differing = [f"model.{name} is {theirs[name]!r} there, {ours[name]!r} here" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise ValueError(
            f"{folder} was trained with another model and cannot be resumed with this one: {'; '.join(differing)}. "
            "Set them back, or choose another folder (run)"
        )


def _identity(model: ModelConfig, shape: bool) -> dict:
    """What makes a model this one and no other; of a published one, the name says the shape."""
    fields = {**vars(model), "loss": loss_kind(model), "name": canonical_name(model.name) if model.name else ""}
    left_out = _MAY_CHANGE if shape else _MAY_CHANGE | _SHAPE
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items() if name not in left_out}


def start_folder(config: TrainConfig, tokenizer: Tokenizer | None) -> None:
    """Writes what a run has before its first weights. Called once everything else has been found good.

    Args:
        tokenizer: of a run that starts anew, in whose place there may be an older run: its weights go first, so that they
            are never seen with another config. ``None`` for a run that goes on.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, BEST, STATE, CONFIG, TOKENIZER):
        remove_partial(folder / name)
    if tokenizer is not None:
        for name in (WEIGHTS, BEST, STATE):
            (folder / name).unlink(missing_ok=True)
        for weights in folder.glob(OTHERS_BEST.format("*")):
            weights.unlink()
        for curves in (folder / EVENTS).glob("events.out.tfevents.*"):  # would be drawn into those of this run
            curves.unlink()
        _write_folder(folder / TOKENIZER, tokenizer.save)
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(folder / CONFIG, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def save_state(folder: Path, state: Mapping, weights: Mapping[str, Tensor]) -> None:
    """Writes the state and the weights; each is either whole or what it was before.

    Raises:
        OSError: they cannot be written, e.g. because the disk is full.
    """
    try:
        write_atomically(folder / STATE, lambda partial: _save(state, partial))
        write_tensors(weights, folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{folder}: saving failed ({reason(error)}). What was saved before is as it was: make room and go on with --resume"
        ) from error


def _save(state: Mapping, path: str) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own, on top of what the file said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a folder beside ``path``, then puts it there; an interruption leaves none that is half full."""
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        write(partial)
        partial.chmod(path.parent.stat().st_mode & 0o777)  # temporary folders are private, this one is not
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
