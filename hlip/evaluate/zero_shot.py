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
    """

    benchmark: Benchmark
    weights: Tensor
    scale: float

    def cosine(self, image_features: Tensor) -> Tensor:
        """Cosine similarity ``(N, num_classes)``. Of features with a token axis the first token, the sentence head, counts."""
        if image_features.ndim == 3:
            image_features = image_features[:, 0]
        features = F.normalize(image_features.to(self.weights), dim=-1)
        return features @ self.weights.T

    def scores(self, image_features: Tensor) -> Tensor:
        """What metrics take: softmax probabilities for competing classes, cosine similarities otherwise."""
        cosine = self.cosine(image_features)
        return torch.softmax(self.scale * cosine, dim=-1) if self.benchmark.kind == "multiclass" else cosine


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
        sentences = [prompt for prompts in benchmark.prompts.values() for prompt in prompts]
        features = torch.cat(
            [
                model.encode_text(tokenizer(sentences[i : i + batch_size]).to(device), normalize=True).float()
                for i in range(0, len(sentences), batch_size)
            ]
        )
        counts = [len(prompts) for prompts in benchmark.prompts.values()]
        means = torch.stack([part.mean(0) for part in features.split(counts)])
        return Classifier(benchmark, F.normalize(means, dim=-1), float(model.logit_scale.exp()))
    finally:
        model.train(was_training)
