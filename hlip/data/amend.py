"""Images of volume files as a table of metadata has them."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from .metadata import FileMetadata
from .nifti import NiftiHeader


def amended(image: sitk.Image, header: NiftiHeader | None, known: FileMetadata, notes: list[str]) -> sitk.Image:
    """The image with the values and the spacing of a table; says in ``notes`` what was changed.

    A slope or an intercept in the table takes the place of both in the header: of a file that was rescaled on reading, the
    stored values are found again first. Values become float32.

    Args:
        header: of a NIfTI file. ITK rescales no other format.

    Raises:
        ValueError: values that are beyond float32.
    """
    said = []
    if known.slope is not None or known.intercept is not None:
        slope, intercept = known.slope if known.slope is not None else 1.0, known.intercept or 0.0
        values = _stored(sitk.GetArrayViewFromImage(image), header).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            values *= np.float32(slope)
            values += np.float32(intercept)
        if not np.isfinite((values.min(), values.max())).all():
            raise ValueError(f"slope {slope:g} and intercept {intercept:g} of the metadata make values without end of it")
        changed = sitk.GetImageFromArray(values)
        changed.CopyInformation(image)
        image = changed
        instead = f", in place of {header.slope:g} and {header.intercept:g}" if header and header.rescaled else ""
        said.append(f"slope {slope:g} and intercept {intercept:g}{instead}")
    before = image.GetSpacing()
    spacing = [own or old for own, old in zip((known.columns_mm, known.rows_mm, known.slices_mm), before, strict=True)]
    if any((known.columns_mm, known.rows_mm, known.slices_mm)):
        image = sitk.Image(image)
        image.SetSpacing(spacing)
        now, then = (" x ".join(f"{mm:.3g}" for mm in reversed(each)) for each in (spacing, before))
        said.append(f"spacing {now} mm" + f", in place of {then}" * (now != then))
    if said:
        notes.append(f"from the metadata: {'; '.join(said)}")
    return image


def _stored(values: np.ndarray, header: NiftiHeader | None) -> np.ndarray:
    """The values as they are in the file."""
    if header is None or not header.rescaled:
        return values
    values = (values.astype(np.float64) - header.intercept) / header.slope
    return values if header.floats else values.round()
