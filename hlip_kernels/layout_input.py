"""Turns what users have (grids, nested lengths, cumulative lengths) into checked offset arrays for :class:`Layout`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

INT32_MAX = 2**31 - 1
MAX_SLICES = 2**21  # of token grids; more would take long and fill gigabytes with tables


def check_names(levels: Sequence[str]) -> tuple[str, ...]:
    """Level names as a tuple; at least one, all distinct, non-empty strings."""
    if isinstance(levels, str):
        raise TypeError(f"levels must be a sequence of names, finest first, got the single string {levels!r}")
    levels = tuple(levels)
    if not levels:
        raise ValueError("a layout needs at least one level")
    for name in levels:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"level names must be words, got {name!r}")
    if len(set(levels)) != len(levels):
        raise ValueError(f"level names must differ, got {levels}")
    return levels


def is_int(value) -> bool:
    """An int of Python or numpy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def check_count(value: int, name: str, least: int) -> int:
    """An int in ``[least, 2**31)``, as row counts are."""
    if not is_int(value) or not least <= value <= INT32_MAX:
        raise ValueError(f"{name} must be an int >= {least} (and fit int32), got {value!r}")
    return int(value)


def check_rows_fit(rows: int) -> None:
    if rows > INT32_MAX:
        raise ValueError(f"the layout needs {rows} rows, more than int32 row indices can name ({INT32_MAX}); split the batch")


def children_from_grids(grids) -> tuple[list[list[tuple[int, int, int]]], np.ndarray, list[np.ndarray]]:
    """``[[(d, h, w), ...], ...]`` -> (the same checked, token offsets of slices, child offsets of scans and of studies)."""
    checked, depths, areas = [], [], []
    for i, study in enumerate(_sequence(grids, "grids")):
        checked.append([])
        for j, grid in enumerate(_sequence(study, f"grids[{i}] (a study)")):
            grid = tuple(_sequence(grid, f"grids[{i}][{j}] (a scan)"))
            if len(grid) != 3 or not all(is_int(n) for n in grid) or min(grid) < 0:
                raise ValueError(f"study {i}, scan {j}: a grid is three ints (d, h, w) >= 0, got {grid!r}")
            d, h, w = (int(n) for n in grid)
            checked[-1].append((d, h, w))
            depths.append(d)
            areas.append(h * w if d else 0)
    check_rows_fit(sum(d * area for d, area in zip(depths, areas, strict=True)))
    if sum(depths) > MAX_SLICES:  # slices without patches, say, which no limit on rows stops
        raise ValueError(f"grids hold {sum(depths)} slices in all, more than {MAX_SLICES}; split the batch")
    slices = np.repeat(np.array(areas, dtype=np.int64), depths)
    return checked, _cumulative(slices), [_cumulative(depths), _cumulative([len(study) for study in checked])]


def _cumulative(counts) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))]).astype(np.int64)


def _sequence(value, what: str):
    if type(value) is list or type(value) is tuple:  # the usual cases cost nothing
        return value
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise ValueError(f"{what} is on {value.device}: pass it from the CPU, reading it back would make the host wait")
        value = value.tolist()  # of no dimensions: a number, which is no sequence
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise ValueError(f"{what} must be a sequence, got {value!r}")
    return value


def children_from_lengths(lengths, depth: int | None) -> tuple[np.ndarray, list[np.ndarray]]:
    """Nested token counts -> (token offsets of the finest level, child offsets of each coarser level, finest first).

    Args:
        lengths: nested sequences, coarsest outermost, integer leaves.
        depth: number of levels, or ``None`` to take it from the first leaf.
    """
    if depth is None:
        depth = _depth(_sequence(lengths, "lengths"))
    counts: list[list[int]] = [[] for _ in range(depth)]  # counts[0]: leaves; counts[k]: children of each level-k segment
    # Breadth-first, one nesting depth after the other, so that segments come out in packed order.
    front = [((), lengths)]
    for level in range(depth - 1, 0, -1):
        following = []
        for path, node in front:
            for i, child in enumerate(_sequence(node, f"lengths{_path(path)}")):
                if is_int(child):
                    raise ValueError(
                        f"lengths{_path((*path, i))} is the number {child}, expected a list: leaves must be nested {depth} deep"
                    )
                counts[level].append(len(_sequence(child, f"lengths{_path((*path, i))}")))
                following.append(((*path, i), child))
        front = following
    for path, node in front:
        for i, value in enumerate(_sequence(node, f"lengths{_path(path)}")):
            if not is_int(value):
                raise ValueError(f"lengths{_path((*path, i))} must be an int (a token count), got {value!r}")
            if value < 0:
                raise ValueError(f"lengths{_path((*path, i))} is {value}: a segment cannot hold fewer than 0 tokens")
            counts[0].append(int(value))
    check_rows_fit(sum(counts[0]))
    offsets = [_cumulative(c) for c in counts]
    return offsets[0], offsets[1:]


def _depth(node) -> int:
    """Nesting depth of the deepest branch (empty lists count as one level)."""
    if isinstance(node, torch.Tensor):
        return node.ndim
    below = [0 if is_int(child) or not hasattr(child, "__len__") else _depth(child) for child in node]
    return 1 + max(below, default=0)


def _path(path: tuple[int, ...]) -> str:
    return "".join(f"[{i}]" for i in path)


def children_from_offsets(offsets) -> tuple[tuple[str, ...], np.ndarray, list[np.ndarray]]:
    """``{level: cu_seqlens}``, finest first -> (names, token offsets, child offsets of each coarser level)."""
    if not isinstance(offsets, Mapping):
        raise TypeError(f"offsets must map level names to cumulative lengths, got {type(offsets).__name__}")
    levels = check_names(offsets.keys())
    arrays = [_offset_array(name, offsets[name]) for name in levels]
    total = int(arrays[0][-1])
    child_offsets = []
    for i in range(1, len(levels)):
        fine, coarse = arrays[i - 1], arrays[i]
        if int(coarse[-1]) != total:
            raise ValueError(f"level {levels[i]!r} ends at {int(coarse[-1])} tokens but level {levels[0]!r} ends at {total}")
        stray = ~np.isin(coarse, fine)
        if stray.any():
            s = int(np.argmax(stray))
            raise ValueError(
                f"levels do not nest: segment {max(s - 1, 0)} of {levels[i]!r} ends at token {int(coarse[s])}, "
                f"inside a segment of {levels[i - 1]!r} (if {levels[i]!r} is the finer level, list it first)"
            )
        children = np.searchsorted(fine, coarse, side="left").astype(np.int64)
        children[0], children[-1] = 0, len(fine) - 1  # empty segments at either end belong to the end's parent
        if len(coarse) == 1 and len(fine) > 1:
            raise ValueError(
                f"level {levels[i]!r} has no segment but {levels[i - 1]!r} has {len(fine) - 1}: each needs a parent"
            )
        child_offsets.append(children)
    return levels, arrays[0], child_offsets


def _offset_array(name: str, values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ValueError(
                f"offsets[{name!r}] is on {values.device}: pass it from the CPU, reading it back would make the host wait"
            )
        values = values.numpy()
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"offsets[{name!r}] must be integers, got {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"offsets[{name!r}] must be one-dimensional with S + 1 >= 1 entries, got shape {array.shape}")
    if array.dtype == np.uint64 and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"offsets[{name!r}] holds values beyond int64")
    array = array.astype(np.int64)
    if array[0] != 0:
        raise ValueError(f"offsets[{name!r}] must start at 0, got {int(array[0])}")
    decreasing = array[1:] < array[:-1]
    if decreasing.any():
        s = int(np.argmax(decreasing))
        raise ValueError(f"offsets[{name!r}] decreases at segment {s}: from {int(array[s])} to {int(array[s + 1])}")
    return array
