"""Zero-shot evaluation: prompts as data, classifiers from text, metrics."""

from .metrics import Metrics, classification_metrics
from .prompts import Benchmark, benchmark, benchmarks
from .zero_shot import Classifier, zero_shot_classifier

__all__ = ["Benchmark", "Classifier", "Metrics", "benchmark", "benchmarks", "classification_metrics", "zero_shot_classifier"]
