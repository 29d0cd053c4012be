"""The weights of a run's best evaluation so far, kept beside the last ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..storage import reason, write_tensors

log = logging.getLogger(__name__)

BEST = "best.safetensors"
OTHERS_BEST = "best-step-{}.safetensors"  # what was the best by other studies, labels or prompts


def best_so_far(folder: Path) -> float:
    """The macro AUC that a run's best weights had; minus infinity if there are none."""
    return _read(folder)[0]


def _read(folder: Path) -> tuple[float, str, str]:
    """What the file says of its weights: macro AUC, step, and what they were evaluated on (empty: not told)."""
    try:
        with safe_open(folder / BEST, framework="pt") as file:
            told = file.metadata() or {}
        return float(told["macro_auc"]), told.get("step", ""), told.get("evaluated_on", "")
    except (OSError, SafetensorError, KeyError, ValueError):
        return -math.inf, "", ""


def keep_best(folder: Path, weights: Mapping[str, Tensor], macro_auc: float, step: int, evaluated_on: str = "") -> bool:
    """Writes the weights if no earlier ones were as good; whether they are the best, and could be written.

    Args:
        evaluated_on: what tells one set of studies, labels and prompts from another
            (:attr:`hlip.train.validate.Validation.fingerprint`). Weights that another has chosen cannot be compared: they
            are kept under the name of their step, and these are the first of their kind.
    """
    best, chosen_at, chosen_on = _read(folder)
    if math.isnan(macro_auc):
        return False
    others = math.isfinite(best) and chosen_on not in ("", evaluated_on)
    if not others and not macro_auc > best:
        return False
    try:
        if others:
            aside = folder / OTHERS_BEST.format(int(chosen_at))
            (folder / BEST).rename(aside)
            said = "%s was chosen by other studies, labels or prompts than are evaluated on now: kept as %s"
            log.warning(said, folder / BEST, aside.name)
        write_tensors(weights, folder / BEST, {"macro_auc": repr(macro_auc), "step": str(step), "evaluated_on": evaluated_on})
    except (OSError, SafetensorError, ValueError) as error:
        log.warning("%s: the best weights so far could not be written (%s)", folder / BEST, reason(error))
        return False
    return True
