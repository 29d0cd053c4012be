"""Studies with their reports as training examples, and batches of them."""

from __future__ import annotations

import csv
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..model import StudyBatch
from ..storage import write_tensors

log = logging.getLogger(__name__)


@dataclass
class Example:
    """One study.

    Attributes:
        name: what the study is called in tables.
        scans: each ``(D, H, W)``, one dtype.
        sentences: its report.
        max_value: the stored value that means 1.
    """

    name: str
    scans: list[Tensor]
    sentences: list[str] = field(default_factory=list)
    max_value: float = 255.0


@dataclass
class Batch:
    """What one training step takes.

    Attributes:
        images: the studies. names: one for each.
        tokens: text ids ``(N, L)``: one text per study, or with the dual loss first all sentences, then all reports.
    """

    images: StudyBatch
    tokens: Tensor | None
    names: list[str]

    def to(self, device: torch.device | str) -> Batch:
        tokens = None if self.tokens is None else self.tokens.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device), tokens=tokens)

    def pin_memory(self) -> Batch:
        tokens = None if self.tokens is None else self.tokens.pin_memory()
        return replace(self, images=self.images.pin_memory(), tokens=tokens)


class FolderStudies(Dataset):
    """Studies on disk, with reports from a CSV or from ``report.txt`` in the study's folder.

    A study that cannot be read is reported in one clear line and the job goes on: with ``substitute`` the next readable
    study takes its place (so that batches stay full, on every process), without it the item is ``None``.

    Args:
        folder: every sub-folder is a study: DICOM series or volumes of any format, flat or nested.
        paths: the studies themselves (folders or files) instead of the sub-folders of ``folder``.
        reports: CSV with columns ``study`` and ``report``; empty: ``report.txt`` in each folder.
        preset: see :func:`hlip.data.prepare`; ``"auto"`` guesses per study.
        cache: folder for prepared scans; empty: none.
        max_scans: a random choice of at most this many scans each time; 0 keeps all.
        need_reports: leave out studies without a report.
        substitute: see above; for training.
        limits: of reading, see :func:`hlip.data.read_study`.

    Raises:
        FileNotFoundError: no such folder. ValueError: no study in it, or no report for any of them.
    """

    def __init__(
        self, folder: str | Path, *, paths: Sequence[Path] | None = None, reports: str | Path = "", preset: str = "auto",
        cache: str | Path = "", max_scans: int = 0, need_reports: bool = True, substitute: bool = False, **limits,
    ):  # fmt: skip
        self.folder, self.preset, self.max_scans, self.substitute = Path(folder), preset, max_scans, substitute
        self.cache = Path(cache) if cache else None
        self.limits = limits
        self._failed: set[Path] = set()
        if paths is None:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"{self.folder}: no such folder of studies")
            paths = sorted(p for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.paths = list(paths)
        by_study = read_reports(reports) if reports else None
        self.reports: dict[Path, list[str]] = {}
        for path in self.paths:
            sentences = by_study.get(self.name(path)) if by_study is not None else _report_file(path)
            if sentences:
                self.reports[path] = sentences
        if need_reports:
            missing = [path for path in self.paths if path not in self.reports]
            if missing:
                where = f"in {reports}" if reports else "(report.txt in the study's folder)"
                log.warning(
                    "%d of %d studies have no report %s and are left out, e.g. %s",
                    len(missing), len(self.paths), where, self.name(missing[0]),
                )  # fmt: skip
            self.paths = [path for path in self.paths if path in self.reports]
        if not self.paths:
            raise ValueError(
                f"{self.folder}: no study {'with a report ' if need_reports else ''}found; expected one sub-folder per study "
                "holding DICOM or NIfTI files" + (" and report.txt, or a reports CSV" if need_reports else "")
            )

    def name(self, path: Path) -> str:
        """A study's name: its path below the folder."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.as_posix()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example | None:
        example = self._read(index)
        if example is None and self.substitute:
            for step in range(1, min(len(self), 20)):
                example = self._read((index + step) % len(self))
                if example is not None:
                    break
            else:
                raise ValueError(f"{self.folder}: {min(len(self), 20)} studies in a row cannot be read; see the lines above")
        return example

    def _read(self, index: int) -> Example | None:
        path = self.paths[index]
        try:
            scans, max_value = self._scans(path)
        except Exception as error:  # any broken file of a user: the rest goes on
            if path not in self._failed:
                from ..data import StudyError

                reason = error.one_line() if isinstance(error, StudyError) else " ".join(str(error).split())[:300]
                log.warning("%s left out: %s", self.name(path), reason or type(error).__name__)
                self._failed.add(path)
            return None
        if self.max_scans and len(scans) > self.max_scans:
            chosen = torch.randperm(len(scans))[: self.max_scans].sort().values.tolist()
            scans = [scans[i] for i in chosen]
        return Example(self.name(path), scans, self.reports.get(path, []), max_value)

    def _scans(self, path: Path) -> tuple[list[Tensor], float]:
        if self.cache is None:
            return prepare_study(path, self.preset, **self.limits)
        from safetensors.torch import load_file

        stamp = "|".join(f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in _files(path))
        limits = "".join(f"{name}={value}|" for name, value in sorted(self.limits.items()))
        key = hashlib.sha256(f"1|{self.preset}|{limits}{path.resolve()}|{stamp}".encode()).hexdigest()[:24]
        stored = self.cache / f"{key}.safetensors"
        if stored.is_file():
            tensors = load_file(str(stored))
            max_value = float(tensors.pop("max_value"))
            return [tensors[name] for name in sorted(tensors)], max_value
        scans, max_value = prepare_study(path, self.preset, **self.limits)
        tensors = {f"scan{i:03d}": scan for i, scan in enumerate(scans)}
        write_tensors({**tensors, "max_value": torch.tensor(max_value)}, stored)
        return scans, max_value


class SimulatedExamples(Dataset):
    """Simulated studies as examples; see :mod:`hlip.simulate`."""

    def __init__(self, studies):
        self.studies = studies

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> Example:
        study = self.studies[index]
        return Example(f"simulated-{index}", list(study.scans), list(study.sentences))


def prepare_study(path: Path, preset: str, **limits) -> tuple[list[Tensor], float]:
    """Reads one study and prepares its scans: tensors ``(D, H, W)`` of one dtype, and the stored value that means 1."""
    from ..data import PRESETS, auto_preset, prepare, read_study

    study = read_study(path, **limits)
    name = auto_preset(study).preset if preset == "auto" else preset
    scans = [prepared.voxels for scan in study.scans for prepared in prepare(scan, name)]
    return scans, float(PRESETS[name].max_value)


def read_reports(path: str | Path) -> dict[str, list[str]]:
    """Sentences by study from a CSV with columns ``study`` and ``report``; several rows of one study are joined.

    Raises:
        FileNotFoundError: no such file. ValueError: a column is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such reports file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"study", "report"} <= set(columns):
            raise ValueError(f"{path}: expected columns 'study' and 'report', found {', '.join(columns) or 'none'}")
        reports: dict[str, list[str]] = {}
        for row in reader:
            reports.setdefault(row["study"].strip(), []).extend(split_sentences(row["report"] or ""))
    return reports


def read_labels(path: str | Path, classes: Sequence[str]) -> dict[str, list[float]]:
    """Labels by study from a CSV with a column ``study`` and one of 0, 1 or nothing for each class.

    Raises:
        FileNotFoundError: no such file. ValueError: a missing column, or a value that is not 0 or 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such labels file")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [c for c in ("study", *classes) if c not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: lacks the column(s) {', '.join(missing)}")
        labels = {}
        for number, row in enumerate(reader, start=2):
            values = [(row[c] or "").strip() for c in classes]
            if any(v not in ("", "0", "1", "0.0", "1.0") for v in values):
                raise ValueError(f"{path}, line {number}: labels are 0, 1 or empty, got {values}")
            labels[row["study"].strip()] = [float(v) if v else float("nan") for v in values]
    return labels


def split_sentences(report: str) -> list[str]:
    """A report as sentences: split at line ends, and at a full stop followed by a space and a capital letter."""
    parts = re.split(r"[\r\n]+|(?<=[.!?])\s+(?=[A-Z])", report)
    return [part.strip() for part in parts if part.strip()]


def make_text(sentences: Sequence[str], mode: str, prompt: str) -> str:
    """``"sentence"``: the prompt and one sentence at random; ``"report"``: the prompt and all of them, shuffled."""
    if not sentences:
        return prompt.strip()
    order = torch.randperm(len(sentences)).tolist()
    if mode == "sentence":
        return prompt + sentences[order[0]]
    return prompt + " ".join(sentences[i] for i in order)


class Collate:
    """Examples to a :class:`Batch`: packs the studies, draws and tokenizes their texts. Examples that failed are left out.

    Args:
        tokenizer: text to ids; ``None`` for images only.
        modes: one text per study for each of these, all studies of the first, then all of the second.
        prompt: starts every text.
    """

    def __init__(self, tokenizer: Callable[[list[str]], Tensor] | None, modes: Sequence[str], prompt: str):
        self.tokenizer, self.modes, self.prompt = tokenizer, tuple(modes), prompt

    def __call__(self, examples: Sequence[Example | None]) -> Batch | None:
        good = [e for e in examples if e is not None and e.scans]
        if not good:
            return None
        kinds = {(e.scans[0].dtype, e.max_value) for e in good}
        if len(kinds) > 1:  # presets of different kinds in one batch: all as float in [0, 1]
            good = [replace(e, scans=[s.float() / e.max_value for s in e.scans], max_value=1.0) for e in good]
        images = StudyBatch.pack([e.scans for e in good], max_value=good[0].max_value)
        tokens = None
        if self.tokenizer is not None:
            tokens = self.tokenizer([make_text(e.sentences, mode, self.prompt) for mode in self.modes for e in good])
        return Batch(images, tokens, [e.name for e in good])


def _report_file(path: Path) -> list[str]:
    file = path / "report.txt"
    return split_sentences(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else []


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def seed_worker(_: int) -> None:
    """Gives numpy a seed of its own in every loader worker (torch has one already)."""
    np.random.seed(torch.initial_seed() % 2**32)
