"""The ragged shape of a batch at every level of its hierarchy.

A :class:`Layout` says where each segment of each level lies inside one packed buffer of ``R`` rows:

    rows [0, T)                 patch tokens, ordered study -> scan -> slice -> patch
    rows [T, T + S*P)           prefix rows of the level in use: segment ``s`` owns ``[T + s*P, T + (s+1)*P)``
    rows [T + S*P, R)           dead rows (a coarser level has fewer segments; ``R`` may be rounded up)

Patch rows are the same at every level, so a change of level rewrites the tail only. The layout is built and checked on
the host from Python ints and numpy arrays, never changes afterwards, and never synchronises with a device.

Shape letters: ``T`` patch tokens, ``P`` prefix rows of a segment, ``S`` segments of a level, ``R`` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from .compiling import any_length, outside_graphs
from .layout_input import (
    check_count,
    check_names,
    check_rows_fit,
    children_from_grids,
    children_from_lengths,
    children_from_offsets,
)
from .layout_tables import host_tables
from .pattern import Plan, pattern_table

MEDICAL_LEVELS = ("slice", "scan", "study")

_building = outside_graphs("a Layout is built on the host: build it, drop rows and move it before the compiled call")
_UNBUILT = (
    "this attention pattern is not built yet and cannot be built inside torch.compile: call "
    "layout.pattern(level, neighbours=..., summary=...) once before the compiled call"
)


class Layout:
    """Ragged, nested segments over one packed buffer. Frozen; build it with one of the ``from_*`` constructors.

    Attributes:
        levels: level names, finest first, e.g. ``("slice", "scan", "study")``.
        num_tokens: ``T``, the number of patch rows.
        num_prefix: ``P``, the number of prefix rows every segment of the active level owns.
        num_rows: ``R``, the number of rows of a packed buffer, the same at every level.
        grids: per study, per scan ``(d, h, w)`` when built by :meth:`from_grids` and nothing was dropped, else ``None``.
        device: where the index tensors that the kernels read live.
    """

    def __init__(
        self,
        levels: Sequence[str],
        token_offsets: np.ndarray,
        child_offsets: Sequence[np.ndarray],
        *,
        num_prefix: int = 0,
        row_multiple: int = 1,
        grids: Sequence[Sequence[tuple[int, int, int]]] | None = None,
        patterns: Iterable[tuple[str, int, str | None]] = (),
    ):
        """Not meant to be called by users: the ``from_*`` constructors check their input and call this.

        Args:
            levels: level names, finest first.
            token_offsets: int64 ``(S_finest + 1,)``, cumulative token counts of the finest level.
            child_offsets: for each coarser level, int64 ``(S_level + 1,)``: cumulative counts of the segments of the
                level just below.
            num_prefix: prefix rows per segment.
            row_multiple: round ``num_rows`` up to a multiple of this.
            grids: token grids, kept for position embeddings.
            patterns: ``(level, neighbours, summary)`` of patterns to build besides those of the levels.
        """
        self.levels = check_names(levels)
        self.num_prefix = check_count(num_prefix, "num_prefix", 0)
        self.row_multiple = check_count(row_multiple, "row_multiple", 1)
        self.grids = None if grids is None else tuple(tuple(tuple(g) for g in study) for study in grids)

        self._token_offsets = np.ascontiguousarray(token_offsets, dtype=np.int64)
        self._child_offsets = tuple(np.ascontiguousarray(c, dtype=np.int64) for c in child_offsets)
        host = [self._token_offsets]
        for children in self._child_offsets:
            host.append(host[-1][children])
        self._host_offsets = tuple(host)
        for array in (*self._host_offsets, *self._child_offsets):
            array.flags.writeable = False

        self.num_tokens = int(self._token_offsets[-1])
        self._num_segments = tuple(len(offsets) - 1 for offsets in host)
        self._max_len = tuple(int(np.diff(o).max(initial=0)) for o in host)
        rows = self.num_tokens + self.num_prefix * max(self._num_segments)
        self.num_rows = -(-rows // self.row_multiple) * self.row_multiple
        check_rows_fit(self.num_rows)

        self._patterns = {}
        for key in (*((level, 0, None) for level in self.levels), *patterns):
            self._patterns[key] = Plan(pattern_table(self, *key))
        self._set_device_tables(*host_tables(self))
        self._frozen = True

    # ------------------------------------------------------------------ constructors

    @classmethod
    @_building
    def from_grids(
        cls,
        grids: Sequence[Sequence[tuple[int, int, int]]],
        *,
        num_prefix: int = 0,
        row_multiple: int = 1,
        levels: Sequence[str] = MEDICAL_LEVELS,
    ) -> Layout:
        """From the token grid of every scan.

        Args:
            grids: one list per study holding one ``(d, h, w)`` per scan: ``d`` slices of ``h * w`` patches each. Scans
                may differ in every dimension; a study without scans and a scan with ``d == 0`` are allowed.
            num_prefix: prefix rows ``P`` of each segment.
            row_multiple: round the number of rows up to a multiple of this.
            levels: the three names, finest first.

        Raises:
            ValueError: a grid that is not three ints >= 0; the message names its study and scan.
        """
        grids, token_offsets, child_offsets = children_from_grids(grids)
        return cls(levels, token_offsets, child_offsets, num_prefix=num_prefix, row_multiple=row_multiple, grids=grids)

    @classmethod
    @_building
    def from_lengths(
        cls,
        lengths: Sequence,
        *,
        num_prefix: int = 0,
        row_multiple: int = 1,
        levels: Sequence[str] | None = None,
    ) -> Layout:
        """From nested lists of token counts, coarsest level outermost.

        ``[[[196, 180], [196]], [[64]]]`` is two studies: one of two scans (two slices and one), one of a single slice.

        Args:
            lengths: nested lists, every leaf (an int >= 0) at the same depth. Arrays and CPU tensors are lists too.
            num_prefix: prefix rows ``P`` of each segment.
            row_multiple: round the number of rows up to a multiple of this.
            levels: names, finest first; as many as the lists are deep. Default: ``("segment",)``,
                ``("scan", "study")`` or ``("slice", "scan", "study")`` for one, two or three.

        Raises:
            ValueError: uneven nesting, a negative or non-integer length, a wrong number of names; the message gives
                the path of the offending entry.
        """
        depth = None if levels is None else len(check_names(levels))
        token_offsets, child_offsets = children_from_lengths(lengths, depth)
        if levels is None:
            names = {1: ("segment",), 2: ("scan", "study"), 3: MEDICAL_LEVELS}
            if len(child_offsets) + 1 not in names:
                raise ValueError(
                    f"lengths are nested {len(child_offsets) + 1} deep: pass levels=(...) to name them, finest first"
                )
            levels = names[len(child_offsets) + 1]
        return cls(levels, token_offsets, child_offsets, num_prefix=num_prefix, row_multiple=row_multiple)

    @classmethod
    @_building
    def from_offsets(
        cls,
        offsets: Mapping[str, Sequence[int] | np.ndarray | torch.Tensor],
        *,
        num_prefix: int = 0,
        row_multiple: int = 1,
    ) -> Layout:
        """From cumulative token counts (``cu_seqlens``) of any named, nested levels.

        Args:
            offsets: level name -> ``(S + 1,)`` integers starting at 0, never decreasing, all ending at the same total.
                Finest level first. Every boundary of a level must be a boundary of the level before it. Where an
                empty segment lies exactly on a coarser boundary it is counted to the later parent. Tensors must be on
                the CPU: reading one from a device would make the host wait for it.
            num_prefix: prefix rows ``P`` of each segment.
            row_multiple: round the number of rows up to a multiple of this.

        Raises:
            TypeError: not integers. ValueError: any other broken rule, naming the level and the segment.
        """
        levels, token_offsets, child_offsets = children_from_offsets(offsets)
        return cls(levels, token_offsets, child_offsets, num_prefix=num_prefix, row_multiple=row_multiple)

    # ------------------------------------------------------------------ what it says

    def index(self, level: str) -> int:
        """Position of ``level`` in :attr:`levels` (0 = finest). Raises ValueError for an unknown name."""
        if level not in self.levels:
            raise ValueError(f"unknown level {level!r}: this layout has {', '.join(map(repr, self.levels))} (finest first)")
        return self.levels.index(level)

    def num_segments(self, level: str) -> int:
        """``S``, the number of segments of a level, empty ones included."""
        return self._num_segments[self.index(level)]

    def max_len(self, level: str) -> int:
        """The largest number of patch rows in one segment of a level (prefix rows not counted), a Python int."""
        return self._max_len[self.index(level)]

    def host_offsets(self, level: str) -> np.ndarray:
        """int64 ``(S + 1,)`` cumulative patch rows of a level, on the host."""
        return self._host_offsets[self.index(level)]

    def offsets(self, level: str) -> torch.Tensor:
        """int32 ``(S + 1,)`` cumulative patch rows of a level (``cu_seqlens``), on :attr:`device`."""
        return self._tables["offsets", self.index(level)]

    def lengths(self, level: str) -> torch.Tensor:
        """int32 ``(S,)`` patch rows of every segment of a level (prefix rows not counted), on :attr:`device`.

        On the host they are ``np.diff(layout.host_offsets(level))``.
        """
        offsets, segments = self.offsets(level), self.num_segments(level)
        # Not diff(): a graph of torch.compile would not know that these are as many as segment_mean returns.
        return offsets.narrow(0, 1, segments) - offsets.narrow(0, 0, segments)

    def host_children(self, child: str, parent: str) -> np.ndarray:
        """int64 ``(S_parent + 1,)``: segments ``[c[s], c[s+1])`` of level ``child`` make up segment ``s`` of ``parent``."""
        low, high = self._pair(child, parent)
        children = self._child_offsets[high - 1]
        for below in range(high - 2, low - 1, -1):
            children = self._child_offsets[below][children]
        return children

    def chunks(self, level: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Every segment's patch rows cut into pieces of at most 64 rows, so that long segments are reduced in parallel.

        Returns:
            chunks int32 ``(num_chunks, 3)``: segment, first row, one past the last row; and int32 ``(S + 1,)``: the
            chunks of segment ``s`` are ``[o[s], o[s+1])``. Both on :attr:`device`.
        """
        i = self.index(level)
        return self._tables["chunks", i], self._tables["chunk_offsets", i]

    def children(self, child: str, parent: str) -> torch.Tensor:
        """int32 ``(S_parent + 1,)`` on :attr:`device`; see :meth:`host_children`."""
        return self._tables[("children", *self._pair(child, parent))]

    def parents(self, child: str, parent: str) -> torch.Tensor:
        """int32 ``(S_child,)`` on :attr:`device`: the segment of level ``parent`` that holds each segment of ``child``."""
        return self._tables[("parents", *self._pair(child, parent))]

    def prefix_rows(self, level: str) -> slice:
        """The live tail rows when ``level`` is active: ``x[layout.prefix_rows(level)]`` is ``(S*P, C)``, segment-major."""
        return slice(self.num_tokens, self.num_tokens + self.num_segments(level) * self.num_prefix)

    def pattern(self, level: str, *, neighbours: int = 0, summary: str | None = None) -> torch.Tensor:
        """The row ranges each segment may attend to, as the int32 CPU table the ``hlip::attention`` op takes.

        Level patterns are there from the start; others are made on first use and kept, by copies and what :meth:`drop`
        leaves too. See :mod:`hlip_kernels.pattern` for the format and :func:`hlip_kernels.attention` for what the options
        mean.
        """
        self.index(level)
        if summary is not None:
            self.index(summary)
        plan = self._patterns.get((level, neighbours, summary))
        if plan is None:
            plan = self._build(level, neighbours, summary)
        return plan.table

    def dense_mask(self, level: str, *, neighbours: int = 0, summary: str | None = None) -> torch.Tensor:
        """Boolean ``(R, R)`` on :attr:`device`: row ``i`` may attend to row ``j``. For tests and teaching: memory is R*R."""
        table = self.pattern(level, neighbours=neighbours, summary=summary)
        return Plan.of(table).dense_mask().to(self.device)

    # ------------------------------------------------------------------ what it becomes

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Layout:
        """The same layout with its index tensors on ``device``: one copy of one buffer, without synchronising."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        return self._with_tables(lambda blob: blob.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        """For ``torch.utils.data.DataLoader(pin_memory=True)``: page-locks the index buffer so that ``to`` is asynchronous."""
        return self._with_tables(lambda blob: blob.cpu().pin_memory())

    @_building
    def drop(self, keep: torch.Tensor | np.ndarray) -> Layout:
        """The layout that remains when only the patch rows with ``keep[i]`` stay, e.g. after patch dropout.

        Pack the rows with ``x[:T][keep]``. Segments keep their place even when nothing is left in them, so prefix rows
        and parents are unchanged.

        Args:
            keep: bool ``(T,)`` on the CPU.

        Raises:
            TypeError: not bool. ValueError: wrong shape, or on a device (reading it would make the host wait).
        """
        if isinstance(keep, torch.Tensor):
            if keep.device.type != "cpu":
                raise ValueError(
                    f"keep is on {keep.device}: draw the mask on the CPU, reading it back would make the host wait"
                )
            keep = keep.numpy()
        keep = np.asarray(keep)
        if keep.dtype != np.bool_:
            raise TypeError(f"keep must be bool, got {keep.dtype}")
        if keep.shape != (self.num_tokens,):
            raise ValueError(f"keep must have shape ({self.num_tokens},), one entry per patch row, got {keep.shape}")
        kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        layout = Layout(
            self.levels,
            kept[self._token_offsets],
            self._child_offsets,
            num_prefix=self.num_prefix,
            row_multiple=self.row_multiple,
            patterns=self._built(),
        )
        return layout.to(self.device)

    # ------------------------------------------------------------------ internals

    def _pair(self, child: str, parent: str) -> tuple[int, int]:
        low, high = self.index(child), self.index(parent)
        if low >= high:
            raise ValueError(f"{child!r} is not finer than {parent!r} (levels, finest first: {self.levels})")
        return low, high

    @outside_graphs(_UNBUILT)
    def _build(self, *pattern) -> Plan:
        if torch.compiler.is_compiling():  # torch.export, which runs this itself, on tensors without numbers
            raise RuntimeError(_UNBUILT)
        plan = self._patterns[pattern] = Plan(pattern_table(self, *pattern))
        return plan

    @property
    def device(self) -> torch.device:
        return self._blob.device

    @_building
    def _with_tables(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> Layout:
        """The same layout, patterns included, with its index buffer moved."""
        other = object.__new__(Layout)
        other.__dict__.update(self.__dict__)
        other.__dict__["_frozen"] = False
        with torch.inference_mode(False):  # training may follow with the same layout, and saves its tables
            other._set_device_tables(moved(self._blob), self._spans)
        other._frozen = True
        return other

    def _set_device_tables(self, blob: torch.Tensor, spans: dict) -> None:
        self._blob, self._spans = blob, spans
        self._tables = {key: self._blob[a:b] for key, (a, b) in self._spans.items()}
        for i in range(len(self.levels)):
            self._tables["chunks", i] = self._tables["chunks", i].view(-1, 3)
        for key, table in self._tables.items():  # what is cumulative begins with a 0, always
            any_length(table, at_least=1 if key[0] in ("offsets", "chunk_offsets", "children") else 0)

    def __setattr__(self, name: str, value) -> None:
        if self.__dict__.get("_frozen", False):
            raise AttributeError(f"a Layout is frozen: build a new one instead of setting {name!r}")
        self.__dict__[name] = value

    def _built(self) -> tuple[tuple[str, int, str | None], ...]:
        """The patterns that were asked for, besides those of the levels."""
        return tuple(key for key in self._patterns if key[1:] != (0, None))

    def __copy__(self) -> Layout:
        return self  # nothing in it ever changes

    def __deepcopy__(self, memo) -> Layout:
        return self

    def __reduce__(self):
        """Pickles come back on the CPU, wherever the layout was: another process may not have that device."""
        shape = self.levels, self._token_offsets, self._child_offsets, self.num_prefix, self.row_multiple, self.grids
        return _rebuild, (*shape, self._built())

    def __repr__(self) -> str:
        segments = ", ".join(
            f"{self.num_segments(level)} {level} (longest {self.max_len(level)})" for level in reversed(self.levels)
        )
        return (
            f"Layout({segments}; {self.num_tokens} patch rows, {self.num_prefix} prefix rows a segment, "
            f"{self.num_rows} rows in all; on {self.device})"
        )


def _rebuild(levels, token_offsets, child_offsets, num_prefix, row_multiple, grids, patterns=()) -> Layout:
    options = {"num_prefix": num_prefix, "row_multiple": row_multiple, "grids": grids, "patterns": patterns}
    return Layout(levels, token_offsets, child_offsets, **options)
