"""Metrics of zero-shot classification, by scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Results of one evaluation; a value that is not defined (a class seen never or always) is NaN.

    Attributes:
        classes: names, in order.
        auc: area under the ROC curve of each class against the rest.
        balanced_accuracy: ``multiclass``: the recall of each class at the argmax, so that the macro value is scikit-learn's
            ``balanced_accuracy_score``. ``multilabel``: at each class's best threshold on these very data, an upper bound.
        positives: studies with each class. num_studies: all.
    """

    classes: tuple[str, ...]
    auc: tuple[float, ...]
    balanced_accuracy: tuple[float, ...]
    positives: tuple[int, ...]
    num_studies: int
    kind: str = "multilabel"

    @property
    def macro_auc(self) -> float:
        """Mean AUC over the classes that have one."""
        return _mean(self.auc)

    @property
    def macro_balanced_accuracy(self) -> float:
        return _mean(self.balanced_accuracy)

    def table(self) -> str:
        """A text table, one class a line."""
        width = max([len(c) for c in self.classes] + [len("macro mean")])
        accuracy = "recall" if self.kind == "multiclass" else "balanced acc. (best threshold)"
        lines = [f"{'class':{width}}  positives     AUC  {accuracy}"]
        for name, auc, acc, n in zip(self.classes, self.auc, self.balanced_accuracy, self.positives, strict=True):
            lines.append(f"{name:{width}}  {n:4d}/{self.num_studies:<4d}  {_text(auc)}  {_text(acc):>{len(accuracy)}}")
        macro = f"{_text(self.macro_auc)}  {_text(self.macro_balanced_accuracy):>{len(accuracy)}}"
        lines.append(f"{'macro mean':{width}}             {macro}")
        return "\n".join(lines)


def classification_metrics(scores: np.ndarray, labels: np.ndarray, classes: list[str], kind: str = "multilabel") -> Metrics:
    """AUC and balanced accuracy per class.

    Args:
        scores: ``(N, C)``, higher means more likely.
        labels: ``(N, C)`` of 0 and 1; NaN where not known (left out). For ``multiclass`` one 1 in every row.
        classes: ``C`` names.
        kind: ``"multilabel"`` or ``"multiclass"``.

    Raises:
        ValueError: shapes that differ, labels that are not 0 or 1, or scores that are not finite.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if scores.shape != labels.shape or scores.ndim != 2 or scores.shape[1] != len(classes):
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must both be (studies, {len(classes)} classes)")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores of {int((~np.isfinite(scores)).any(axis=1).sum())} studies are not finite")
    known = ~np.isnan(labels)
    if not np.isin(labels[known], (0, 1)).all():
        raise ValueError("labels must be 0 or 1 (or NaN where not known)")
    if kind == "multiclass" and not ((labels.sum(axis=1) == 1) & known.all(axis=1)).all():
        raise ValueError("multiclass labels need exactly one 1 for every study")
    winner = scores.argmax(axis=1)
    auc, accuracy, positives = [], [], []
    for c in range(len(classes)):
        y, s = labels[known[:, c], c], scores[known[:, c], c]
        positives.append(int(y.sum()))
        if 0 < y.sum() < len(y):
            auc.append(float(roc_auc_score(y, s)))
            if kind == "multilabel":
                fpr, tpr, _ = roc_curve(y, s)
                accuracy.append(float(((tpr + 1 - fpr) / 2).max()))
        else:
            auc.append(math.nan)
            if kind == "multilabel":
                accuracy.append(math.nan)
        if kind == "multiclass":
            accuracy.append(float((winner[labels[:, c] == 1] == c).mean()) if y.sum() else math.nan)
    return Metrics(tuple(classes), tuple(auc), tuple(accuracy), tuple(positives), len(scores), kind)


def _mean(values: tuple[float, ...]) -> float:
    defined = [v for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else math.nan


def _text(value: float) -> str:
    return "    -" if math.isnan(value) else f"{value:.3f}"
