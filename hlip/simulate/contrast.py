"""How tissues and lesions look in each contrast: relative signals, 0 (black) to 1 (white)."""

from __future__ import annotations

import numpy as np

from .anatomy import TISSUES

# grey, white, fluid, skull, scalp
SIGNAL = {
    "T1": (0.36, 0.54, 0.12, 0.08, 0.50),
    "T2": (0.50, 0.40, 0.75, 0.08, 0.45),
    "FLAIR": (0.50, 0.42, 0.10, 0.08, 0.40),
    "DWI": (0.44, 0.38, 0.10, 0.05, 0.15),
    "CT": (0.42, 0.34, 0.10, 1.00, 0.25),  # a brain window, 80 units wide
}

# The signal of each part of a lesion; a part that is not named looks like the tissue it lies in. Schematic: each kind changes
# two or three contrasts, and in none of them like another kind, so that what is to be learnt is where to look, not subtlety.
LESION_SIGNAL = {
    "hemorrhage": {
        "CT": {"core": 0.95, "oedema": 0.25},
        "T2": {"core": 0.04},
        "FLAIR": {"core": 0.04},
    },
    "infarct": {
        "DWI": {"core": 1.00},
        "FLAIR": {"core": 0.90},
    },
    "mass": {  # T1 after contrast agent
        "T1": {"core": 0.15, "rim": 1.00},
        "T2": {"core": 1.00, "rim": 0.20, "oedema": 0.90},
    },
}
SPOT_SIGNAL = {"T2": 0.70, "FLAIR": 0.80}

# Every protocol shows every finding in at least one contrast, so that the choice of contrasts tells nothing about it.
PROTOCOLS = (
    ("T2", "FLAIR"),
    ("T2", "DWI"),
    ("T1", "CT", "FLAIR"),
    ("T1", "CT", "DWI"),
)


def visible_in(finding: str) -> tuple[str, ...]:
    """Contrasts in which a finding changes the picture."""
    return tuple(LESION_SIGNAL.get(finding, {}))


def render(contrast: str, tissues: np.ndarray) -> np.ndarray:
    """Tissue shares ``(5, ...)`` to signal ``(...)``."""
    return np.tensordot(np.asarray(SIGNAL[contrast], dtype=np.float32), tissues, axes=1)


assert all(len(signal) == len(TISSUES) for signal in SIGNAL.values())
