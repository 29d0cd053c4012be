"""Data: reading studies from disk and preparing their scans for the model."""

from .find import find_studies
from .guess import Guess, auto_preset, scan_presets
from .preprocess import PRESETS, Prepared, Preset, Window, prepare
from .read import iter_study, read_study
from .study import Limits, Scan, Skipped, Study, StudyError

__all__ = [
    "PRESETS",
    "Guess",
    "Limits",
    "Prepared",
    "Preset",
    "Scan",
    "Skipped",
    "Study",
    "StudyError",
    "Window",
    "auto_preset",
    "find_studies",
    "iter_study",
    "prepare",
    "read_study",
    "scan_presets",
]
