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


def best_so_far(folder: Path) -> float:
    """The macro AUC that a run's best weights had; minus infinity if there are none."""
    try:
        with safe_open(folder / BEST, framework="pt") as file:
            return float((file.metadata() or {})["macro_auc"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return -math.inf


def keep_best(folder: Path, weights: Mapping[str, Tensor], macro_auc: float, step: int) -> bool:
    """Writes the weights if no earlier ones were as good; whether they are the best, and could be written."""
    if not macro_auc > best_so_far(folder):
        return False
    try:
        write_tensors(weights, folder / BEST, {"macro_auc": repr(macro_auc), "step": str(step)})
    except (OSError, SafetensorError) as error:
        log.warning("%s: the best weights so far could not be written (%s)", folder / BEST, reason(error))
        return False
    return True
