"""``hlip info``: what is in a study, and what the model would see of it."""

from __future__ import annotations

import sys

from hlip_kernels import patch_grids

from ..data import PRESETS, StudyError, auto_preset, prepare, read_study
from ..model import variant
from .paths import studies_at


def info(args) -> int:
    """Prints scans, what was left out and why, the preset, and tokens; goes on after a study that cannot be read."""
    if args.presets:
        print_presets()
        return 0
    if not args.paths:
        raise ValueError("name at least one study: a folder with DICOM or NIfTI files, or a file (or --presets)")
    config = variant(args.model).encoder
    paths, failed = studies_at(args.paths)
    for path in paths:
        try:
            study = read_study(path)
        except StudyError as error:
            print(f"{error}\n", file=sys.stderr)
            failed += 1
            continue
        print(study)
        name, reason = (args.preset, "as asked") if args.preset != "auto" else auto_preset(study)
        print(f"  prepared as {name!r}: {reason}")
        tokens = 0
        for scan in study.scans:
            for prepared in prepare(scan, name):
                shape = tuple(prepared.voxels.shape)
                (grid,) = patch_grids([shape], config.patch_size)
                count = grid[0] * grid[1] * grid[2]
                tokens += count
                size, patches = " x ".join(map(str, shape)), " x ".join(map(str, grid))
                spacing = " x ".join(f"{mm:.3g}" for mm in prepared.spacing)
                print(f"    {prepared.name}: {prepared.plane}, {size} voxels of {spacing} mm -> {patches} = {count} tokens")
        patch = " x ".join(map(str, config.patch_size))
        print(f"  {tokens} tokens in all, patches of {patch} voxels ({args.model})\n")
    return 1 if failed else 0


def print_presets() -> None:
    """One line or two for each preset."""
    for preset in PRESETS.values():
        slices = "every slice kept" if preset.num_slices is None else f"{preset.num_slices} slices"
        print(f"{preset.name:22} {slices}, {preset.crop} x {preset.crop} in the plane, {str(preset.dtype).split('.')[1]}")
        print(f"{'':22} {preset.source}")
