"""Simulated ragged studies: brains of several contrasts, planes and slice counts, with a finding and a report.

Made from the MNI152 maps that nilearn packages, so they need no network and no patient.
"""

from .files import write_study
from .report import CLASSES, simulated_benchmark
from .study import SimulatedStudies, SimulatedStudy

__all__ = ["CLASSES", "SimulatedStudies", "SimulatedStudy", "simulated_benchmark", "write_study"]
