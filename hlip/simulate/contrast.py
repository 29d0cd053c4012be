"""How tissues and lesions look in each contrast: relative signals, 0 (black) to 1 (white)."""

from __future__ import annotations

import numpy as np

from .anatomy import TISSUES

# grey, white, fluid, skull, scalp
SIGNAL = {
    "T1": (0.52, 0.78, 0.18, 0.10, 0.85),
    "T2": (0.58, 0.42, 1.00, 0.10, 0.60),
    "FLAIR": (0.58, 0.46, 0.12, 0.08, 0.50),
    "DWI": (0.46, 0.38, 0.12, 0.05, 0.15),
    "CT": (0.48, 0.38, 0.10, 1.00, 0.30),  # a brain window, 80 units wide
}

# The signal of each part of a lesion; a part that is not named looks like the tissue it lies in.
LESION_SIGNAL = {
    "hemorrhage": {
        "CT": {"core": 0.90, "oedema": 0.27},
        "T2": {"core": 0.15, "oedema": 0.82},
        "FLAIR": {"core": 0.20, "oedema": 0.85},
    },
    "infarct": {
        "DWI": {"core": 1.00},
        "FLAIR": {"core": 0.88},
        "T2": {"core": 0.80},
    },
    "mass": {
        "T1": {"core": 0.25, "rim": 0.95},
        "T2": {"core": 0.95, "rim": 0.60, "oedema": 0.82},
        "FLAIR": {"core": 0.70, "rim": 0.95, "oedema": 0.85},
        "CT": {"oedema": 0.27},
    },
}
SPOT_SIGNAL = {"T2": 0.85, "FLAIR": 0.90}

# Every protocol shows every finding in at least one contrast, so that the choice of contrasts tells nothing about it.
PROTOCOLS = (
    ("FLAIR", "CT"),
    ("FLAIR", "T1"),
    ("FLAIR", "DWI"),
    ("FLAIR", "T2"),
    ("DWI", "T2"),
)


def visible_in(finding: str) -> tuple[str, ...]:
    """Contrasts in which a finding changes the picture."""
    return tuple(LESION_SIGNAL.get(finding, {}))


def render(contrast: str, tissues: np.ndarray) -> np.ndarray:
    """Tissue shares ``(5, ...)`` to signal ``(...)``."""
    return np.tensordot(np.asarray(SIGNAL[contrast], dtype=np.float32), tissues, axes=1)


assert all(len(signal) == len(TISSUES) for signal in SIGNAL.values())
