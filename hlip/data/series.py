"""From DICOM slices to stacks: split a series by direction and size, sort by position, tell repeated volumes apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from .dicom import TELLERS, Header, Slice
from .study import Limits, Skipped, count

# Two slices are parallel if no component of their direction vectors differs by more (0.01 is about 0.6 degrees).
_SAME_DIRECTION = 0.01
# Pixel spacings of one stack differ by rounding only: by this share at most.
_SAME_SPACING = 0.01
# A group of a repeated volume must cover this share of all positions to count as a volume of its own.
_WHOLE, _MOST = 0.8, 0.5


@dataclass
class Stack:
    """Parallel slices of one size, sorted by position along their normal: what becomes one scan.

    ``copies``: other files with the same image, to fall back on if the first cannot be decoded.
    """

    header: Header
    slices: list[Slice]
    files: int
    volume: int = 0
    volumes: int = 1
    notes: list[str] = field(default_factory=list)
    copies: dict[Path, list[Path]] = field(default_factory=dict)


def stacks_of(headers: Sequence[Header], limits: Limits) -> tuple[list[Stack], list[Skipped]]:
    """All stacks of a study, in the order series number, name, series UID, and what was left out.

    Of copies of an image the first by path is used.
    """
    stacks: list[Stack] = []
    skipped: list[Skipped] = []
    series: dict[str, list[Header]] = {}
    first: dict[tuple, Header] = {}
    copies: dict[Path, list[Path]] = {}
    repeats: dict[str, list[Path]] = {}
    for header in sorted(headers, key=lambda h: h.path):
        image = _image(header)
        if header.uid and image in first:
            repeats.setdefault(header.series, []).append(header.path)
            copies.setdefault(first[image].path, []).append(header.path)
            continue
        first[image] = header
        series.setdefault(header.series, []).append(header)
    for paths in repeats.values():
        skipped.append(Skipped(paths[0], "a copy of an image already found (same SOPInstanceUID)", len(paths)))
    for members in series.values():  # by content, so that file names do not matter
        members.sort(key=lambda h: (h.number is None, h.number or 0, h.slices[0].instance, h.uid))
    for members in sorted(series.values(), key=lambda m: m[0].sort_key):
        found, left_out = _stacks_of_series(members, limits)
        stacks += found
        skipped += left_out
    for stack in stacks:
        stack.copies = copies
    return stacks, skipped


def _image(header: Header) -> tuple:
    """Equal for copies of one image. Some tools give one SOPInstanceUID to all: what else tells images apart must agree."""
    frames = ((s.position, s.row_direction, s.column_direction, s.instance, s.tellers) for s in header.slices)
    return header.uid, header.series, *frames


def _stacks_of_series(headers: list[Header], limits: Limits) -> tuple[list[Stack], list[Skipped]]:
    skipped: list[Skipped] = []
    groups = _by_geometry([s for h in headers for s in h.slices])
    name = headers[0].name
    if len(groups) > 1 and (reason := _survey(groups, limits)):
        return [], [Skipped(headers[0].path, f"{name}: {reason}", len(headers))]
    stacks: list[Stack] = []
    for group in groups:
        for stack in _volumes(headers[0], group, limits, skipped):
            if len(stack.slices) < limits.min_slices:
                few = f"{name}: only {count(len(stack.slices), 'slice')}, fewer than min_slices={limits.min_slices}"
                skipped.append(Skipped(stack.slices[0].path, few, stack.files))
            else:
                stacks.append(stack)
    if len(groups) > 1:
        for stack in stacks:
            stack.notes.insert(0, f"the series holds {len(groups)} stacks of different direction or size")
    for i, stack in enumerate(stacks):
        stack.volume, stack.volumes = i, len(stacks)
    return stacks, skipped


def _by_geometry(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Groups of equal size, and of pixel spacing and direction as the first slice of the group, the largest first."""
    groups: dict[tuple[int, int], list[list[Slice]]] = {}
    for s in slices:
        alike = groups.setdefault((s.rows, s.columns), [])
        for members in alike:
            if _same_grid(members[0], s):
                members.append(s)
                break
        else:
            alike.append([s])
    found = [members for alike in groups.values() for members in alike]
    return sorted(found, key=lambda g: (-len(g), g[0].rows, g[0].columns, g[0].row_direction, g[0].column_direction))


def _same_grid(a: Slice, b: Slice) -> bool:
    turned = np.subtract(a.row_direction + a.column_direction, b.row_direction + b.column_direction)
    stretched = np.divide(a.pixel_spacing, b.pixel_spacing)
    return np.abs(turned).max() <= _SAME_DIRECTION and np.abs(np.log(stretched)).max() <= _SAME_SPACING


def _survey(groups: list[list[Slice]], limits: Limits) -> str:
    """Why a series of several directions is no scan, or ""."""
    slices, directions = sum(map(len, groups)), len(groups)
    if max(map(len, groups)) < max(limits.min_slices, 2):
        if limits.min_slices == 1:
            return ""
        what = "no two of them parallel" if max(map(len, groups)) == 1 else f"at most {max(map(len, groups))} parallel"
        return f"{slices} slices in {directions} directions, {what}: a localizer or rotating projections"
    normals = [normal_of(g[0]) for g in groups]
    crossing = any(abs(a @ b) < 0.7 for a, b in combinations(normals, 2))
    if crossing and max(map(len, groups)) <= 15:  # localizers whose image type does not say so
        return f"{slices} slices in {directions} crossing directions: a localizer"
    return ""


def normal_of(s: Slice) -> np.ndarray:
    """Unit normal of a slice: row direction x column direction, (3,) float64."""
    normal = np.cross(s.row_direction, s.column_direction)
    return normal / np.linalg.norm(normal)


def heights(slices: Sequence[Slice]) -> np.ndarray:
    """Position of each slice along the normal of the first one, mm, (n,) float64."""
    return np.array([s.position for s in slices]) @ normal_of(slices[0])


def _volumes(header: Header, slices: list[Slice], limits: Limits, skipped: list[Skipped]) -> list[Stack]:
    """One stack, or one for each volume if several were taken at the same positions."""
    height = heights(slices)
    order = sorted(range(len(slices)), key=lambda i: (height[i], slices[i].instance, slices[i].path, slices[i].frame))
    slices = [slices[i] for i in order]
    gaps = np.diff(height[order])
    moved = gaps[gaps > 0.01]
    same = max(0.01, 0.05 * float(np.median(moved))) if len(moved) else 0.01
    places = [0, *np.cumsum(gaps > same).tolist()]
    if len(set(places)) == len(slices):
        return [_stack(header, slices)]
    if len(set(places)) < limits.min_slices:
        few = f"{header.name}: {len(slices)} images at only {count(len(set(places)), 'position')}"
        skipped.append(Skipped(slices[0].path, few, len({s.path for s in slices})))
        return []
    groups, names, how = _tell_apart(slices, places)
    stacks = [_stack(header, group) for group in groups]
    left = len(slices) - sum(map(len, groups))
    if left:
        reason = f"{header.name}: {count(left, 'slice')} at positions already taken"
        skipped.append(Skipped(header.path, reason, left))
        stacks[0].notes.append(f"{count(left, 'slice')} at positions already taken left out")
    if len(stacks) == 1:
        return stacks
    kept = stacks[: limits.max_volumes]
    for i, (stack, name) in enumerate(zip(kept, names, strict=False)):
        stack.notes.append(f"volume {i + 1} of {len(stacks)} at the same positions, told apart by {how}{name}")
        if len(stacks) > len(kept):
            stack.notes.append(f"only the first {len(kept)} of {len(stacks)} volumes are kept (max_volumes)")
    if len(stacks) > len(kept):
        rest = sum(stack.files for stack in stacks[len(kept) :])
        reason = f"{header.name}: volumes beyond the first {len(kept)} of {len(stacks)} (max_volumes)"
        skipped.append(Skipped(stacks[len(kept)].slices[0].path, reason, rest))
    return kept


def _tell_apart(slices: list[Slice], places: list[int]) -> tuple[list[list[Slice]], list[str], str]:
    """Groups without repeated positions, what is special to each, and by which element they were told apart.

    The first element of ``TELLERS``, or else the first pair, that splits the slices into groups without repeats, two
    of them nearly whole, is taken. If there is none, the n-th slice at each position goes to the n-th group, in the
    order of the instance numbers; groups that cover less than half of the positions are dropped as repeats.
    """
    total = len(set(places))
    useful = [k for k in range(len(TELLERS)) if len({s.tellers[k] for s in slices}) > 1]
    for keys in [(k,) for k in useful] + list(combinations(useful, 2)):
        groups: dict[tuple, list[int]] = {}
        for i, s in enumerate(slices):
            groups.setdefault(tuple(s.tellers[k] for k in keys), []).append(i)
        whole = sum(len(group) >= _WHOLE * total for group in groups.values())
        if whole >= 2 and all(len({places[i] for i in group}) == len(group) for group in groups.values()):
            values = sorted(groups, key=lambda v: [(isinstance(x, str), x is not None and x or 0) for x in v])
            names = [" (" + ", ".join(_value(x) for x in v) + ")" for v in values]
            how = " and ".join(TELLERS[k][0] for k in keys)
            return [[slices[i] for i in groups[v]] for v in values], names, how
    nth: list[list[Slice]] = []
    taken: dict[int, int] = {}
    for i in sorted(range(len(slices)), key=lambda i: (slices[i].instance, slices[i].path, slices[i].frame)):
        n = taken.get(places[i], 0)
        taken[places[i]] = n + 1
        if n == len(nth):
            nth.append([])
        nth[n].append(slices[i])
    nth = [group for group in nth if len(group) >= _MOST * total]
    return nth, [""] * len(nth), "the order of their instance numbers"


def _value(value: float | str | None) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else value.replace("\\", " ")[:40]


def _stack(header: Header, slices: list[Slice]) -> Stack:
    height = heights(slices)
    ordered = [slices[i] for i in np.argsort(height, kind="stable")]
    return Stack(header, ordered, files=len({s.path for s in ordered}), notes=_geometry_notes(ordered, header.modality))


def _geometry_notes(slices: list[Slice], modality: str) -> list[str]:
    """Notes on uneven or missing slices and on stacks that do not rise along their normal."""
    if len(slices) < 2:
        return ["a single slice: the spacing between slices is not known, 1 mm is assumed"]
    notes = []
    gaps = np.diff(heights(slices))
    median = float(np.median(gaps))
    steps = gaps / median
    if np.abs(steps - 1).max() > 0.1:
        whole = np.abs(steps - np.round(steps)).max() <= 0.1 and steps.min() > 0.5
        if whole:
            missing = int(np.round(steps).sum()) - len(gaps)
            notes.append(f"{missing} of {missing + len(slices)} slices missing")
        else:
            notes.append(f"slice spacing uneven: {gaps.min():.3g} to {gaps.max():.3g} mm; the median is used")
    way = np.subtract(slices[-1].position, slices[0].position)
    angle = float(np.degrees(np.arccos(np.clip(way @ normal_of(slices[0]) / np.linalg.norm(way), -1, 1))))
    if angle > 0.5:
        word = "gantry tilt" if modality == "CT" else "slices shifted sideways,"
        notes.append(f"{word} {angle:.1f}°: slices kept as they are, not sheared back")
    return notes
