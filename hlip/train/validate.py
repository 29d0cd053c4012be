"""Zero-shot evaluation during training, and of a finished run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ..evaluate import Benchmark, Metrics, classification_metrics, zero_shot_classifier
from ..model import HLIP, Tokenizer
from .config import TrainConfig
from .examples import Collate, SimulatedExamples

log = logging.getLogger(__name__)


@dataclass
class Validation:
    """Studies with labels, and the prompts they are scored with.

    Attributes:
        dataset: of :class:`hlip.train.examples.Example`, with their ``names``; see :class:`FolderStudies`.
        labels: 0/1 (or NaN) per class, by the example's name. Examples without are not read.
    """

    dataset: Dataset
    benchmark: Benchmark
    labels: dict[str, list[float]]
    batch_size: int = 16
    workers: int = 0

    @classmethod
    def make(cls, studies, prompts, config: TrainConfig) -> Validation | None:
        """From what :func:`hlip.train.loop.make_datasets` gives; ``None`` when there is nothing to evaluate on.

        Raises:
            ValueError: no study has labels; or classes compete, and a study does not have exactly one of them.
        """
        if studies is None or prompts is None:
            return None
        chosen, labels = prompts
        if labels is None:  # simulated: each study knows its finding, without being rendered
            labels = {f"simulated-{i}": [float(c == studies.finding(i)) for c in chosen.classes] for i in range(len(studies))}
            return cls(SimulatedExamples(studies), chosen, labels)
        return cls(studies, chosen, labels, workers=config.data.workers)

    def __post_init__(self) -> None:
        names = self.dataset.names
        self.labelled = [i for i, name in enumerate(names) if name in self.labels]
        if not self.labelled:
            check_labels(names, self.labels)
        if self.benchmark.kind == "multiclass":
            one = [0.0] * (len(self.benchmark.classes) - 1) + [1.0]
            wrong = [names[i] for i in self.labelled if sorted(self.labels[names[i]]) != one]
            if wrong:
                raise ValueError(
                    f"{len(wrong)} of {len(self.labelled)} studies do not have exactly one class, e.g. {wrong[0]!r}, but the "
                    "kind of the prompts is multiclass: label one class 1 and the others 0, or say 'kind: multilabel'"
                )

    def run(self, model: HLIP, tokenizer: Tokenizer, device: torch.device | str) -> Metrics:
        """Scores every study that has a label and can be read; says how many cannot.

        Raises:
            ValueError: there is none.
        """
        names, features = embed_studies(
            model, Subset(self.dataset, self.labelled), device, batch_size=self.batch_size, workers=self.workers
        )
        if not names:
            raise ValueError(f"none of the {len(self.labelled)} studies with labels can be read; see the lines above")
        if len(names) < len(self.labelled):
            log.warning(
                "%d of the %d studies with labels cannot be read (see the lines above): the result is of the other %d",
                len(self.labelled) - len(names), len(self.labelled), len(names),
            )  # fmt: skip
        classifier = zero_shot_classifier(model, tokenizer, self.benchmark)
        scores = classifier.scores(features.to(device)).float().cpu().numpy()
        labels = np.array([self.labels[name] for name in names])
        return classification_metrics(scores, labels, self.benchmark.classes, self.benchmark.kind)


def check_labels(
    names: Sequence[str], labels: Mapping[str, Sequence[float]], *, folder: str | Path = "", source: str | Path = "the labels"
) -> None:
    """Warns of studies without labels, and of labels whose study is not there, with an example of each.

    Args:
        names: of the studies. labels: by study. folder, source: where both come from, for the messages.

    Raises:
        ValueError: no study has labels.
    """
    without = [name for name in names if name not in labels]
    there = set(names)
    absent = [name for name in labels if name not in there]
    where = f" in {folder}" if folder else ""
    if len(without) == len(names):
        raise ValueError(
            f"{source}: no labels for any of the {len(names)} studies{where}: the column 'study' must hold their names, "
            f"such as {names[0]!r}; " + (f"it holds {absent[0]!r}" if absent else "it is empty")
        )
    if absent:
        log.warning(
            "%s: %d of %d labelled studies are not%s, e.g. %s", source, len(absent), len(labels), where or " there", absent[0]
        )
    if without:
        log.warning(
            "%s: %d of %d studies%s have no labels and are not evaluated on, e.g. %s",
            source, len(without), len(names), where, without[0],
        )  # fmt: skip


@torch.no_grad()
def embed_studies(
    model: HLIP, dataset: Dataset, device: torch.device | str, *, batch_size: int = 16, workers: int = 0
) -> tuple[list[str], torch.Tensor]:
    """Names and normalised image features ``(N, [P,] D)``, float32 on the CPU, of every study that can be read."""
    was_training = model.training
    model.eval()
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=Collate(None, (), ""))
    names, features = [], []
    try:
        for batch in loader:
            if batch is not None:
                batch = batch.to(device)
                names += batch.names
                features.append(model.encode_image(batch.images, normalize=True).float().cpu())
    finally:
        model.train(was_training)
    return names, torch.cat(features) if features else torch.empty(0)
