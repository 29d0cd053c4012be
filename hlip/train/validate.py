"""Zero-shot evaluation during training, and of a finished run."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ..evaluate import Benchmark, Metrics, classification_metrics, zero_shot_classifier
from ..model import HLIP, Tokenizer
from ..storage import write_atomically
from .config import TrainConfig
from .examples import Collate, SimulatedExamples
from .processes import ignore_stop_signals

log = logging.getLogger(__name__)


@dataclass
class Validation:
    """Studies with labels, and the prompts they are scored with.

    Attributes:
        dataset: of :class:`hlip.train.examples.Example`, with their ``names``; see :class:`hlip.train.examples.FolderStudies`.
        labels: 0/1 (or NaN) per class, by the example's name. Examples without are not read.
    """

    dataset: Dataset
    benchmark: Benchmark
    labels: dict[str, list[float]]
    batch_size: int = 16
    workers: int = 0

    @classmethod
    def make(cls, studies, prompts, config: TrainConfig) -> Validation | None:
        """From what :func:`hlip.train.loop.make_datasets` gives; ``None`` when there is nothing to evaluate on."""
        if studies is None or prompts is None:
            return None
        chosen, labels = prompts
        if labels is None:  # simulated: each study knows its finding, without being rendered
            labels = {f"simulated-{i}": [float(c == studies.finding(i)) for c in chosen.classes] for i in range(len(studies))}
            return cls(SimulatedExamples(studies), chosen, labels)
        return cls(studies, chosen, labels, workers=config.data.workers)

    @property
    def labelled(self) -> list[int]:
        """Indices of the examples that have labels."""
        return [i for i, name in enumerate(self.dataset.names) if name in self.labels]

    @property
    def fingerprint(self) -> str:
        """Of the studies with labels, their labels and the prompts: results of others cannot be compared with these."""
        studies = [(name, self.labels[name]) for name in sorted(self.dataset.names[i] for i in self.labelled)]
        told = (self.benchmark.kind, self.benchmark.prompts, self.benchmark.against, studies)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def run(self, model: HLIP, tokenizer: Tokenizer, device: torch.device | str) -> Metrics:
        """Metrics of :meth:`score`."""
        return self.score(model, tokenizer, device).metrics()

    def score(self, model: HLIP, tokenizer: Tokenizer, device: torch.device | str) -> Scores:
        """Scores every study that has a label and can be read; says how many cannot.

        Raises:
            ValueError: there is none.
        """
        labelled = self.labelled
        names, features = embed_studies(
            model, Subset(self.dataset, labelled), device, batch_size=self.batch_size, workers=self.workers
        )
        if not names:
            none = f"none of the {len(labelled)} studies with labels can be read; see the lines above"
            raise ValueError(none if labelled else "no study has labels: check the 'study' column of the labels")
        if len(names) < len(labelled):
            log.warning(
                "%d of the %d studies with labels cannot be read (see the lines above): the result is of the other %d",
                len(labelled) - len(names), len(labelled), len(names),
            )  # fmt: skip
        return Scores.of(model, tokenizer, self.benchmark, names, features.to(device), [self.labels[n] for n in names])


@dataclass(frozen=True)
class Scores:
    """What a model says of studies, beside what is known of them.

    Attributes:
        studies: ``N`` names. values: ``(N, C)``, see :meth:`hlip.evaluate.Classifier.scores`.
        labels: ``(N, C)`` of 0, 1 and NaN (not known).
    """

    benchmark: Benchmark
    studies: list[str]
    values: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(
        cls, model: HLIP, tokenizer: Tokenizer, benchmark: Benchmark, studies: list[str], features: torch.Tensor,
        labels: Sequence[Sequence[float]],
    ) -> Scores:  # fmt: skip
        """From image features ``(N, [P,] D)``, on the model's device."""
        classifier = zero_shot_classifier(model, tokenizer, benchmark)
        return cls(benchmark, studies, classifier.scores(features).numpy(), np.array(labels))

    def metrics(self) -> Metrics:
        return classification_metrics(self.values, self.labels, self.benchmark.classes, self.benchmark.kind)

    def write_csv(self, path: Path) -> None:
        """One study a row: its scores, one column a class, then its labels (``label: CLASS``), empty where not known."""
        classes = self.benchmark.classes

        def write(partial: str) -> None:
            with open(partial, "w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["study", *classes, *(f"label: {c}" for c in classes)])
                for study, values, labels in zip(self.studies, self.values, self.labels, strict=True):
                    known = ["" if np.isnan(label) else int(label) for label in labels]
                    rows.writerow([study, *map(str, values), *known])  # as many digits as tell scores apart

        write_atomically(path, write)


def check_labels(
    names: Sequence[str], place: str | Path, labels: Mapping[str, Sequence[float]], chosen: Benchmark, source: str | Path
) -> None:
    """Whether labels belong to these studies and can be scored. Warns of studies without any, and of rows without a study.

    Args:
        names: of the studies. place: the folder or file they are in, for messages.
        labels: of every class, by study. source: the file they come from, for messages.

    Raises:
        ValueError: no study has labels; or classes compete (``multiclass``), and a study does not have exactly one of them.
    """
    there = set(names)
    labelled = [name for name in names if name in labels]
    absent = [name for name in labels if name not in there]
    if not labelled:
        given = f"there is {absent[0]!r}" if absent else "the file names none"
        raise ValueError(
            f"{source} has no labels for any of the {len(names)} studies in {place}: its column 'study' must hold the "
            f"names of the sub-folders, such as {names[0]!r}, or paths of folders or files below it; {given}"
        )
    if len(labelled) < len(names):
        log.warning(
            "%d of %d studies in %s have no labels in %s and are not evaluated on, e.g. %s", len(names) - len(labelled),
            len(names), place, source, next(name for name in names if name not in labels),
        )  # fmt: skip
    if absent:
        log.warning(
            "%d of %d studies that %s has labels for are not in %s, e.g. %s",
            len(absent), len(labels), source, place, absent[0],
        )  # fmt: skip
    if chosen.kind == "multiclass":
        wrong = [name for name in labelled if sorted(labels[name]) != [0.0] * (len(labels[name]) - 1) + [1.0]]
        if wrong:
            given = ", ".join(f"{c}: {value:g}" for c, value in zip(chosen.classes, labels[wrong[0]], strict=True))
            raise ValueError(
                f"{source}: classes of kind multiclass exclude each other, so every study needs one 1 and otherwise 0; "
                f"{len(wrong)} of {len(labelled)} studies have not, e.g. {wrong[0]!r} ({given}). "
                "If several can be true of a study, say 'kind: multilabel' in the prompts"
            )


def embed_studies(
    model: HLIP, dataset: Dataset, device: torch.device | str, *, batch_size: int = 16, workers: int = 0
) -> tuple[list[str], torch.Tensor]:
    """Names and normalised image features ``(N, [P,] D)``, float32 on the CPU, of every study that can be read."""
    names, features = [], []
    for some, theirs in embedded(model, dataset, device, batch_size=batch_size, workers=workers):
        if some:
            names += some
            features.append(theirs)
    return names, torch.cat(features) if features else torch.empty(0)


@torch.no_grad()
def embedded(
    model: HLIP, dataset: Dataset, device: torch.device | str, *, batch_size: int = 16, workers: int = 0
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """As :func:`embed_studies`, batch by batch; of one in which no study can be read, no names."""
    was_training = model.training
    model.eval()
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=workers, collate_fn=Collate(None, (), ""),
        worker_init_fn=ignore_stop_signals,
    )  # fmt: skip
    try:
        for batch in loader:
            if batch is None:
                yield [], torch.empty(0)
            else:
                batch = batch.to(device)
                yield batch.names, model.encode_image(batch.images, normalize=True).float().cpu()
    finally:
        model.train(was_training)
