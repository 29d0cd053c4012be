"""Data: reading studies from disk and preparing their scans for the model."""

from .find import find_studies
from .guess import Guess, auto_preset, scan_presets
from .hounsfield import hounsfield_hint
from .metadata import FileMetadata, Metadata, read_metadata
from .preprocess import PRESETS, Prepared, Preset, Window, prepare
from .read import iter_study, read_study
from .study import Limits, Scan, Skipped, Study, StudyError

__all__ = [
    "PRESETS",
    "FileMetadata",
    "Guess",
    "Limits",
    "Metadata",
    "Prepared",
    "Preset",
    "Scan",
    "Skipped",
    "Study",
    "StudyError",
    "Window",
    "auto_preset",
    "find_studies",
    "hounsfield_hint",
    "iter_study",
    "prepare",
    "read_metadata",
    "read_study",
    "scan_presets",
]
