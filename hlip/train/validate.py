"""Zero-shot evaluation during training, and of a finished run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..evaluate import Benchmark, Metrics, classification_metrics, zero_shot_classifier
from ..model import HLIP, Tokenizer
from .config import TrainConfig
from .examples import Collate, SimulatedExamples


@dataclass
class Validation:
    """Studies with labels, and the prompts they are scored with.

    Attributes:
        dataset: of :class:`hlip.train.examples.Example`. labels: 0/1 (or NaN) per class, by the example's name.
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

    def run(self, model: HLIP, tokenizer: Tokenizer, device: torch.device | str) -> Metrics:
        """Scores every study that can be read and has a label.

        Raises:
            ValueError: there is none.
        """
        names, features = embed_studies(model, self.dataset, device, batch_size=self.batch_size, workers=self.workers)
        known = [i for i, name in enumerate(names) if name in self.labels]
        if not known:
            raise ValueError(f"none of the {len(names)} readable studies has a label: check the 'study' column of the labels")
        classifier = zero_shot_classifier(model, tokenizer, self.benchmark)
        scores = classifier.scores(features[known].to(device)).float().cpu().numpy()
        labels = np.array([self.labels[names[i]] for i in known])
        return classification_metrics(scores, labels, self.benchmark.classes, self.benchmark.kind)


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
