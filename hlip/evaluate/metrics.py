"""Metrics of zero-shot classification, by scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Results of one evaluation; a value that is not defined (a class seen never or always) is NaN.

    ``multilabel``: accuracy, F1, precision and recall are those at a class's threshold, as published for chest CT: where
    the ROC curve is nearest to its corner. Like the best threshold of the balanced accuracy it is chosen on these very
    data, which makes all of them upper bounds. ``multiclass``: of the argmax, each class against the rest.

    Attributes:
        classes: names, in order.
        auc: area under the ROC curve of each class against the rest.
        balanced_accuracy: ``multiclass``: the recall of each class, so that the macro value is scikit-learn's
            ``balanced_accuracy_score``. ``multilabel``: at each class's best threshold.
        positives: studies with each class. num_studies: all.
        threshold: of each class; NaN for ``multiclass``.
        accuracy: share of studies that are told right.
        weighted_f1: the F1 scores of presence and of absence, weighted by how many studies there are of each.
        precision, recall: of presence.
        overall: ``multiclass``: accuracy, and the F1 scores of all classes weighted by their positives.
    """

    classes: tuple[str, ...]
    auc: tuple[float, ...]
    balanced_accuracy: tuple[float, ...]
    positives: tuple[int, ...]
    num_studies: int
    kind: str
    threshold: tuple[float, ...]
    accuracy: tuple[float, ...]
    weighted_f1: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    overall: tuple[float, float] | None = None

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
        columns = {"AUC": self.auc}
        if self.kind == "multiclass":
            columns |= {"recall": self.recall, "precision": self.precision}
        else:
            columns |= {"balanced": self.balanced_accuracy, "accuracy": self.accuracy, "F1": self.weighted_f1,
                        "precision": self.precision, "recall": self.recall}  # fmt: skip
        widths = {name: max(len(name), 5) for name in columns}
        lines = [f"{'class':{width}}  positives   " + "  ".join(f"{name:>{widths[name]}}" for name in columns)]

        def line(name: str, positives: str, values: list[float]) -> str:
            cells = (f"{_text(value):>{w}}" for value, w in zip(values, widths.values(), strict=True))
            return f"{name:{width}}  {positives:9}   " + "  ".join(cells)

        for i, (name, n) in enumerate(zip(self.classes, self.positives, strict=True)):
            lines.append(line(name, f"{n:4d}/{self.num_studies:<4d}", [values[i] for values in columns.values()]))
        lines.append(line("macro mean", "", [_mean(values) for values in columns.values()]))
        if self.overall is not None:
            lines.append(f"accuracy {self.overall[0]:.3f}, weighted F1 {self.overall[1]:.3f}")
        else:
            lines.append(
                "balanced: accuracy at the best threshold; the rest (F1 weighted) at the one nearest the ROC curve's corner: "
                "both chosen on these studies"
            )
        return "\n".join(lines)


def classification_metrics(scores: np.ndarray, labels: np.ndarray, classes: list[str], kind: str = "multilabel") -> Metrics:
    """AUC, balanced accuracy, accuracy, F1, precision and recall of each class.

    Args:
        scores: ``(N, C)``, higher means more likely.
        labels: ``(N, C)`` of 0 and 1; NaN where not known (left out). For ``multiclass`` one 1 in every row.
        classes: ``C`` names.
        kind: ``"multilabel"`` or ``"multiclass"``.

    Raises:
        ValueError: shapes that differ, labels that are not 0 or 1, or scores that are not finite.
    """
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
    rows = []
    for c in range(len(classes)):
        y, s = labels[known[:, c], c].astype(int), scores[known[:, c], c]
        found = _one_against_rest(y, s, winner == c if kind == "multiclass" else None)
        rows.append({**found, "positives": int(y.sum())})
    overall = None
    if kind == "multiclass":
        from sklearn.metrics import f1_score

        truth = labels.argmax(axis=1)
        overall = float((winner == truth).mean()), float(f1_score(truth, winner, average="weighted", zero_division=0))
    columns = {name: tuple(row[name] for row in rows) for name in (*_NOTHING, "positives")}
    return Metrics(tuple(classes), num_studies=len(scores), kind=kind, overall=overall, **columns)


_NOTHING = dict.fromkeys(
    ("auc", "balanced_accuracy", "threshold", "accuracy", "weighted_f1", "precision", "recall"), math.nan
)  # fmt: skip


def _one_against_rest(y: np.ndarray, s: np.ndarray, chosen: np.ndarray | None) -> dict[str, float]:
    """What there is to say of one class, of studies with labels ``y`` and scores ``s``.

    Args:
        chosen: which studies are said to have it; ``None``: those above a threshold.
    """
    from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score, roc_curve

    found, both = dict(_NOTHING), 0 < y.sum() < len(y)
    competing = chosen is not None
    if both:
        found["auc"] = float(roc_auc_score(y, s))
    if not competing:
        if not both:
            return found
        fpr, tpr, thresholds = roc_curve(y, s, drop_intermediate=False)
        found["balanced_accuracy"] = float(((tpr + 1 - fpr) / 2).max())
        distance = fpr**2 + (1 - tpr) ** 2
        found["threshold"] = float(thresholds[np.flatnonzero(distance == distance.min())[-1]])  # the last, as published
        chosen = s >= found["threshold"]
    found["accuracy"] = float(accuracy_score(y, chosen))
    found["weighted_f1"] = float(f1_score(y, chosen, average="weighted", zero_division=0))
    found["precision"] = float(precision_score(y, chosen, zero_division=0))
    if y.any():
        found["recall"] = float(recall_score(y, chosen))
    if competing:
        found["balanced_accuracy"] = found["recall"]
    return found


def _mean(values: tuple[float, ...]) -> float:
    """Over the values that are defined; NaN if none is."""
    defined = [v for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else math.nan


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
