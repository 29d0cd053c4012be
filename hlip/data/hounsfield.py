"""Whether the values of a CT in a volume file look as if they were no Hounsfield units, which else goes wrong unseen."""

from __future__ import annotations

import SimpleITK as sitk

from .preprocess import Preset
from .study import Scan

_WAY = "--metadata; data.metadata in a config; a parameter in Python"
# What it is, its values, and the least share of it. Of a chest that was shifted twice, tissue is where air should be.
_IN_A_CHEST = (("air, -1000", -1200, -800, 0.001), ("soft tissue, 0", -200, 200, 0.005))


def hounsfield_hint(scan: Scan, preset: Preset) -> str:
    """Why the values of a volume file cannot be the Hounsfield units that a preset of CT takes them for; else empty.

    Air is near -1000 and soft tissue near 0, and every chest holds some of both. A head may have been cut out of the air, and
    is only told of where nothing is below 0, and something as high as bone, or as tissue that was never shifted.
    """
    if scan.slices_known or not preset.windows:  # DICOM has its own slope and intercept
        return ""
    values = sitk.GetArrayViewFromImage(scan.image)
    low, high = float(values.min()), float(values.max())
    why = ""
    if any(window.low < -1000 for window in preset.windows):
        some = values[::2, ::4, ::4]
        lacking = [what for what, least, most, share in _IN_A_CHEST if ((least < some) & (some < most)).mean() < share]
        why = f"hardly any near {' or '.join(lacking)}" if lacking else ""
    elif low >= 0 and high > 1000:
        why = "none below 0"
    if not why:
        return ""
    return (  # the second advice: for a corrected release of the files, beside the table of the first one
        f"{scan.name}: values from {low:g} to {high:g}, {why}, are no Hounsfield units, for which the preset {preset.name!r} "
        "takes them: if slope and intercept are in a table beside the files, name it "
        f"({_WAY}); if it gives them to files that hold Hounsfield units already, leave them out of it"
    )
