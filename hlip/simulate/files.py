"""Writes simulated studies as files, so that the path for real ones can be tried on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .study import PLANES, SimulatedStudy

# (right, anterior, superior) in SimpleITK's axes (left, posterior, superior).
_TO_LPS = np.array([-1.0, -1.0, 1.0])


def write_study(study: SimulatedStudy, folder: str | Path) -> Path:
    """One NIfTI file per scan, with spacing and orientation, and ``report.txt``.

    Args:
        folder: made if need be; named scans are numbered in order: ``1-axial-FLAIR.nii.gz``.

    Returns:
        The folder.
    """
    import SimpleITK as sitk

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (scan, name, spacing) in enumerate(zip(study.scans, study.names, study.spacings, strict=True), start=1):
        image = sitk.GetImageFromArray(scan.numpy())
        image.SetSpacing([float(mm) for mm in reversed(spacing)])
        direction = np.zeros((3, 3))
        for column, (axis, sense) in enumerate(reversed(PLANES[name.split()[0]])):  # columns, rows, slices
            direction[axis, column] = sense * _TO_LPS[axis]
        image.SetDirection(direction.ravel().tolist())
        centre = direction @ (np.array(image.GetSpacing()) * (np.array(image.GetSize()) - 1) / 2)
        image.SetOrigin((-centre).tolist())
        sitk.WriteImage(image, str(folder / f"{number}-{name.replace(' ', '-')}.nii.gz"), useCompression=True)
    (folder / "report.txt").write_text("\n".join(study.sentences) + "\n")
    return folder
