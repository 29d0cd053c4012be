"""``hlip info``: what is in a study, and what the model would see of it."""

from __future__ import annotations

import sys

from hlip_kernels import patch_grids

from ..data import PRESETS, Study, StudyError, auto_preset, hounsfield_hint, prepare, read_metadata, read_study, scan_presets
from ..data.metadata import tell_missing
from ..data.study import clean_text
from ..model import variant
from .paths import studies_at


def info(args) -> int:
    """Prints scans, what was left out and why, the preset, and tokens; goes on after a study that cannot be read."""
    if args.presets:
        print_presets()
        return 0
    if not args.paths:
        raise ValueError("name at least one study: a folder with DICOM or NIfTI files, or a file (or --presets)")
    if args.preset != "auto" and args.preset not in PRESETS:
        raise ValueError(f"no preset named {args.preset!r}: choose one of auto, {', '.join(PRESETS)}")
    patch = variant(args.model).encoder.patch_size
    metadata = read_metadata(args.metadata) if args.metadata else None
    paths, failed = studies_at(args.paths, args.follow_links)
    if metadata is not None:
        tell_missing(metadata, paths, args.follow_links)
    for path in paths:
        try:
            study = read_study(path, follow_links=args.follow_links, metadata=metadata)
            print(study)
            tokens = _print_prepared(study, args.preset, patch)
            print(f"  {tokens} tokens in all, patches of {' x '.join(map(str, patch))} voxels ({args.model})\n")
        except StudyError as error:
            print(f"{error}\n", file=sys.stderr)
            failed += 1
        except BrokenPipeError:  # of what is printed here: nobody reads on
            raise
        except Exception as error:  # whatever is wrong with one study: the others are still shown
            print(f"{clean_text(path, 400)} cannot be prepared: {error or type(error).__name__}\n", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def _print_prepared(study: Study, preset: str, patch: tuple[int, int, int]) -> int:
    """One line for each prepared volume; returns their tokens."""
    name, reason = (preset, "as asked") if preset != "auto" else auto_preset(study)
    print(f"  prepared as {name!r}: {reason}")
    presets = scan_presets(study) if preset == "auto" else [PRESETS[name]] * len(study)
    tokens = 0
    for scan, own in zip(study.scans, presets, strict=True):
        if own.name != name:
            print(f"    {scan.name}: prepared as {own.name!r}: {auto_preset(scan).reason}")
        if hint := hounsfield_hint(scan, own):
            print(f"    note: {hint}")
        try:
            volumes = prepare(scan, own)
        except ValueError as error:
            raise ValueError(f"{scan.name}: {error}") from None
        for prepared in volumes:
            shape = tuple(prepared.voxels.shape)
            (grid,) = patch_grids([shape], patch)
            count = grid[0] * grid[1] * grid[2]
            tokens += count
            size, patches = " x ".join(map(str, shape)), " x ".join(map(str, grid))
            spacing = " x ".join(f"{mm:.3g}" for mm in prepared.spacing)
            print(f"    {prepared.name}: {prepared.plane}, {size} voxels of {spacing} mm -> {patches} = {count} tokens")
    return tokens


def print_presets() -> None:
    """One line or two for each preset."""
    for preset in PRESETS.values():
        slices = "every slice kept" if preset.num_slices is None else f"{preset.num_slices} slices"
        print(f"{preset.name:22} {slices}, {preset.crop} x {preset.crop} in the plane, {str(preset.dtype).split('.')[1]}")
        print(f"{'':22} {preset.source}")
