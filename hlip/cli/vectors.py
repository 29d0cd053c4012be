"""The file of ``hlip embed``, whole or not there, and beside it what an interrupted call had made so far."""

from __future__ import annotations

import hashlib
import logging
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..model import HLIP
from ..storage import reason, remove_partial, write_atomically

log = logging.getLogger(__name__)

SAVE_SECONDS = 300.0  # of work that may be lost when a process is killed


def fingerprint(model: HLIP) -> str:
    """Another for other weights, and for another variant, whose weights may have the same shapes (other levels)."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Vectors:
    """Features of studies, on their way into a ``.npz`` file of arrays ``studies`` (names) and ``features``.

    Args:
        out: the file. model: see :func:`fingerprint`. options: how scans are prepared.

    Attributes:
        names: of the studies so far. partial: the file they are kept in until all are there. kept_in: where those are that
            have been saved: that file, or the finished one of an earlier call.
    """

    def __init__(self, out: Path, model: str, options: Mapping):
        self.out, self.model, self.options = out, model, repr(sorted(options.items()))
        self.partial = out.with_name(f"{out.name}.partial")
        self.kept_in = self.partial
        self.names: list[str] = []
        self._features: list[Tensor] = []
        self._kept, self._saved = 0, time.monotonic()

    def check_nothing_is_lost(self) -> int:
        """Raises ValueError if an interrupted call has left features; returns how many there are, 0."""
        if self.partial.exists():
            raise ValueError(
                f"{self.partial} is what an interrupted call has made: go on from there (--resume), or remove it to start anew"
            )
        return 0

    def resume(self, wanted: Sequence[str]) -> int:
        """Takes what an interrupted call has left, or the finished file, of the studies that are wanted; how many those are.

        Raises:
            ValueError: it cannot be read, was made with another model or in another way, or has none of the studies; or the
                finished file has others too, which would be lost.
        """
        file = self.partial if self.partial.exists() else self.out
        if not file.exists():
            log.warning("no %s to go on from: starting anew", self.partial)
            return 0
        try:
            names, features, made_with = _read(file, "model", "options")
        except ValueError as error:
            raise ValueError(f"{error}; remove it and start without --resume") from error
        if made_with != [self.model, self.options]:
            raise ValueError(
                f"{file} was made with other weights, another --model, or of scans prepared in another way: go on with "
                "--run and options as they were, or remove it and start without --resume"
            )
        among = set(wanted)
        left_out = [name for name in names if name not in among]
        if left_out and len(left_out) == len(names):
            raise ValueError(
                f"{file} has other studies than those asked for, {names[0]!r} and not {wanted[0]!r}: name them as "
                "before, from the same folder, or remove it and start without --resume"
            )
        if left_out and file == self.out:
            raise ValueError(
                f"{file} is finished, and has {len(left_out)} studies that are not asked for, e.g. {left_out[0]!r}: name them "
                "too, or another --out"
            )
        if left_out:
            log.warning(
                "%d of %d studies in %s are not among those asked for, and are left out, e.g. %s",
                len(left_out), len(names), file, left_out[0],
            )  # fmt: skip
        for name, feature in zip(names, features, strict=True):
            if name in among:
                self.names.append(name)
                self._features.append(feature[None])
        self._kept, self.kept_in = len(self.names), file
        return self._kept

    def add(self, names: Sequence[str], features: Tensor) -> None:
        """``features``: ``(len(names), ...)``, on the CPU. Now and then all so far are saved."""
        self.names += names
        self._features.append(features)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.keep()

    def keep(self) -> bool:
        """Saves the features so far; whether there are any, and it could be done."""
        self._saved = time.monotonic()  # also where it fails: not tried again with each study
        if len(self.names) > self._kept:
            try:
                write_atomically(self.partial, self._write)
            except OSError as error:
                log.warning("%s: what is there so far could not be saved (%s)", self.partial, reason(error))
                return False
            self._kept, self.kept_in = len(self.names), self.partial
        return self._kept > 0

    def finish(self, order: Sequence[str]) -> tuple[list[str], Tensor]:
        """Writes the file, in the given order of studies; returns names and features.

        Raises:
            OSError: it cannot be written.
        """
        place = {name: i for i, name in enumerate(order)}
        indices = sorted(range(len(self.names)), key=lambda i: place[self.names[i]])
        features = torch.cat(self._features)[indices]
        self.names, self._features = [self.names[i] for i in indices], [features]
        try:
            write_atomically(self.out, self._write)
        except OSError:
            self.keep()
            raise
        self.partial.unlink(missing_ok=True)
        for file in (self.out, self.partial):
            remove_partial(file)
        return self.names, features

    def _write(self, path: str) -> None:
        with open(path, "wb") as file:  # by name, numpy would add .npz
            arrays = {"studies": np.array(self.names), "features": torch.cat(self._features).numpy()}
            np.savez(file, **arrays, model=np.array(self.model), options=np.array(self.options))


def read_vectors(path: Path, model: str) -> tuple[list[str], Tensor]:
    """Names and features ``(N, [P,] D)`` in a file of ``hlip embed``.

    Args:
        model: see :func:`fingerprint`.

    Raises:
        ValueError: it is none, or was made with another model.
    """
    names, features, made_with = _read(path, "model")
    if made_with != [model]:
        raise ValueError(
            f"{path} was made with other weights than these, or another --model: texts and studies would not fit each other"
        )
    return names, features


def _read(path: Path, *more: str) -> tuple[list[str], Tensor, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            names, features, texts = stored["studies"], stored["features"], [str(stored[name]) for name in more]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as features of `hlip embed` ({reason(error)})") from error
    texts_and_vectors = names.dtype.kind == "U" and features.dtype == np.float32 and features.ndim in (2, 3)
    if not texts_and_vectors or names.shape != features.shape[:1]:
        raise ValueError(
            f"{path}: {names.size} studies, but features {features.shape} of {features.dtype}: not of `hlip embed`"
        )
    return names.tolist(), torch.from_numpy(features), texts
