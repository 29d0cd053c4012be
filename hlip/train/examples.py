"""Studies with their reports as training examples, and batches of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..model import StudyBatch
from ..storage import reason
from .places import study_places
from .prepared import PreparedCache, check_preset, prepare_study
from .sentences import split_sentences
from .tables import REPORT, read_labels, read_reports, report_file, study_name

if TYPE_CHECKING:
    from ..data import Metadata

__all__ = [
    "Batch", "Collate", "Example", "FolderStudies", "SimulatedExamples", "make_text", "read_labels", "read_reports",
    "split_sentences",
]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass
class Example:
    """One study.

    Attributes:
        name: what the study is called in tables.
        scans: each ``(D, H, W)``, one dtype.
        sentences: its report.
        max_value: the stored value that means 1.
        seed: of the draw of its texts; ``None``: torch's own numbers.
    """

    name: str
    scans: list[Tensor]
    sentences: list[str] = field(default_factory=list)
    max_value: float = 255.0
    seed: int | None = None


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

    A study that cannot be read is reported in one clear line, and is ``None``; in training another takes its place, see
    :class:`hlip.train.draws.Draws`. One that can be read in part only, or holds files of several patients or studies, is used,
    and also reported in one line.

    Args:
        folder: every sub-folder is a study: DICOM series or volumes of any format, flat or nested; or what tables and reports
            name deeper in it, see :func:`hlip.train.places.study_places`.
        paths: the studies themselves (folders or files) instead of what is in ``folder``.
        named: the names of studies in a table of labels.
        reports: a CSV, see :func:`hlip.train.tables.read_reports`; empty: ``report.txt`` in each folder.
        preset, limits: see :func:`hlip.train.prepared.prepare_study`.
        metadata: see :func:`hlip.data.read_metadata`; files that it does not name are counted in one line.
        cache: folder for prepared scans; empty: none.
        max_scans: a random choice of at most this many scans each time; 0 keeps all.
        need_reports: leave out studies without a report; otherwise reports are not read at all.

    Raises:
        FileNotFoundError: no such folder. ValueError: no such preset or limits; no study, or no report for any.
    """

    def __init__(
        self, folder: str | Path, *, paths: Sequence[Path] | None = None, named: Iterable[str] = (), reports: str | Path = "",
        preset: str | Mapping[str, str] = "auto", cache: str | Path = "", max_scans: int = 0, need_reports: bool = True,
        metadata: Metadata | None = None, **limits,
    ):  # fmt: skip
        from ..data import Limits
        from ..data.metadata import tell_missing

        Limits(**limits)
        check_preset(preset)
        self.folder, self.preset, self.max_scans = Path(folder), preset, max_scans
        self.limits = limits if metadata is None else {**limits, "metadata": metadata}
        self.cache = PreparedCache(Path(cache), self._complain_once) if cache else None
        if paths is None and not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder of studies")
        by_study = read_reports(reports) if need_reports and reports else None
        if paths is None:
            places = study_places(
                self.folder, [*named, *(by_study or ())], follow_links=limits.get("follow_links", False),
                with_reports=need_reports and by_study is None,
            )  # fmt: skip
        else:
            places = {self._name(path): path for path in paths}
        self.names, self.paths = list(places), list(places.values())
        self.reports: list[list[str]] = [[] for _ in self.paths]
        if need_reports:
            self._read_reports(by_study, reports)
        if not self.paths:
            raise ValueError(
                f"{self.folder}: no study {'with a report ' if need_reports else ''}found; expected one sub-folder per study "
                "holding DICOM or NIfTI files"
                + (" and report.txt, or a reports CSV" if need_reports else "")
                + "; or a CSV whose column 'study' has the paths of folders or files below it"
            )
        if metadata is not None:
            tell_missing(metadata, self.paths, limits.get("follow_links", False))
        # What has been said of each study that is left out, of each that is not, and of the cache: shared, so that each
        # loader worker does not repeat it.
        self._said = torch.zeros(2 * len(self.paths) + 1, dtype=torch.bool).share_memory_()

    def _read_reports(self, by_study: Mapping[str, list[str]] | None, source: str | Path) -> None:
        """Keeps the studies that have sentences; the others are counted in one line.

        Args:
            by_study: of a table, which ``source`` names; ``None``: beside the images.
        """
        found, missing, problem = [], [], ""
        for name, path in zip(self.names, self.paths, strict=True):
            try:
                sentences = by_study.get(name) if by_study is not None else report_file(path)
            except (ValueError, OSError) as error:
                sentences, problem = None, problem or reason(error)
            if sentences:
                found.append((name, path, sentences))
            else:
                missing.append(name)
        names = set(self.names)
        absent = [name for name in by_study or () if name not in names]
        if absent:
            log.warning(
                "%d of %d studies that %s has reports for are not in %s, e.g. %s",
                len(absent), len(by_study), source, self.folder, absent[0],
            )  # fmt: skip
        if missing:
            where = f"in {source}" if source else f"({REPORT} in the study's folder)"
            log.warning(
                "%d of %d studies have no report %s and are left out, e.g. %s%s", len(missing), len(self.paths), where,
                missing[0], f"; not readable: {problem}" if problem else "",
            )  # fmt: skip
        self.names, self.paths, self.reports = ([row[i] for row in found] for i in range(3))

    def _name(self, path: Path) -> str:
        """What a path is called: as it is below the folder."""
        below = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        return study_name(below.as_posix())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example | None:
        path, name = self.paths[index], self.names[index]
        try:
            prepare = prepare_study if self.cache is None else self.cache.get
            scans, max_value, warning = prepare(path, self.preset, **self.limits)
        except Exception as error:  # any broken file of a user: the rest goes on
            from ..data import StudyError

            why = error.one_line() if isinstance(error, StudyError) else " ".join(str(error).split())[:300]
            self._say_once(index, f"{name} left out: {why or type(error).__name__}")
            return None
        if warning:
            self._say_once(len(self) + index, f"{name}: {warning}")
        if self.max_scans and len(scans) > self.max_scans:
            chosen = torch.randperm(len(scans))[: self.max_scans].sort().values.tolist()
            scans = [scans[i] for i in chosen]
        return Example(name, scans, self.reports[index], max_value)

    def is_stored(self, index: int) -> bool:
        """Whether the cache has a study, so that its files need not be read."""
        return self.cache is not None and self.cache.has(self.paths[index], self.preset, **self.limits)

    def _complain_once(self, what: str) -> None:
        """Of the cache."""
        self._say_once(-1, what)

    def _say_once(self, place: int, what: str) -> None:
        if not self._said[place]:
            log.warning("%s", what)
            self._said[place] = True


class SimulatedExamples(Dataset):
    """Simulated studies as examples; see :mod:`hlip.simulate`."""

    def __init__(self, studies):
        self.studies = studies

    @property
    def names(self) -> list[str]:
        return [f"simulated-{i}" for i in range(len(self.studies))]

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> Example:
        study = self.studies[index]
        return Example(f"simulated-{index}", list(study.scans), list(study.sentences))


def make_text(sentences: Sequence[str], mode: str, prompt: str, seed: int | None = None) -> str:
    """``"sentence"``: the prompt and one sentence at random; ``"report"``: the prompt and all of them, shuffled."""
    if not sentences:
        return prompt.strip()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sentences), generator=generator).tolist()
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
            tokens = self.tokenizer([self._text(e, place) for place in range(len(self.modes)) for e in good])
        return Batch(images, tokens, [e.name for e in good])

    def _text(self, example: Example, place: int) -> str:
        seed = None if example.seed is None else example.seed + 1 + place  # each text its own, and not that of the scans
        return make_text(example.sentences, self.modes[place], self.prompt, seed)
