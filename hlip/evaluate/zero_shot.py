"""A classifier made of sentences: each class is the mean of its prompts' text features (arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import HLIP, Tokenizer
from .prompts import Benchmark


@dataclass(frozen=True)
class Classifier:
    """Class vectors of a benchmark in a model's shared space.

    Attributes:
        weights: ``(num_classes, D)``, unit length.
        scale: the model's logit scale.
        against: likewise of the sentences that deny each class; ``None``: the benchmark has none.
    """

    benchmark: Benchmark
    weights: Tensor
    scale: float
    against: Tensor | None = None

    def cosine(self, image_features: Tensor) -> Tensor:
        """Cosine similarity ``(N, num_classes)``. Of features with a token axis the first token, the sentence head, counts."""
        return self._unit(image_features) @ self.weights.T

    def scores(self, image_features: Tensor) -> Tensor:
        """What metrics take, ``(N, num_classes)``, on the CPU.

        Softmax probabilities: over the classes if they compete, of each class and its denial if there are any. Those are
        float64, because in float32 all above 1 - 6e-8 are 1, and not ranked any more. Otherwise cosine similarities.
        """
        cosine = self.cosine(image_features)
        if self.against is not None:
            return torch.sigmoid(self.scale * (cosine - self._unit(image_features) @ self.against.T).cpu().double())
        cosine = cosine.cpu()
        return torch.softmax(self.scale * cosine.double(), dim=-1) if self.benchmark.kind == "multiclass" else cosine

    def _unit(self, image_features: Tensor) -> Tensor:
        if image_features.ndim == 3:
            image_features = image_features[:, 0]
        return F.normalize(image_features.to(self.weights), dim=-1)


@torch.no_grad()
def zero_shot_classifier(model: HLIP, tokenizer: Tokenizer, benchmark: Benchmark, *, batch_size: int = 64) -> Classifier:
    """Encodes the prompts of a benchmark.

    Args:
        model: with a text tower; its mode is restored afterwards.
        tokenizer: the one the model was trained with.
    """
    was_training = model.training
    model.eval()
    try:
        device = model.logit_scale.device

        def means(prompts: dict[str, tuple[str, ...]]) -> Tensor:
            sentences = [prompt for of_class in prompts.values() for prompt in of_class]
            features = torch.cat(
                [
                    model.encode_text(tokenizer(sentences[i : i + batch_size]).to(device), normalize=True).float()
                    for i in range(0, len(sentences), batch_size)
                ]
            )
            parts = features.split([len(of_class) for of_class in prompts.values()])
            return F.normalize(torch.stack([part.mean(0) for part in parts]), dim=-1)

        against = means(benchmark.against) if benchmark.against else None
        return Classifier(benchmark, means(benchmark.prompts), float(model.logit_scale.exp()), against)
    finally:
        model.train(was_training)
