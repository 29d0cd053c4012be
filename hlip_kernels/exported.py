"""Layouts in ``torch.export``: as a dict of plain tensors and numbers, which a program may take as an input.

    class Served(torch.nn.Module):
        def forward(self, x, tables):
            return self.model(x, ExportedLayout(tables))

    program = torch.export.export(Served(model), (x, export_tables(layout)), dynamic_shapes=...)
    program.module()(x, export_tables(another))

A layout itself is no such input. It is not registered with torch's pytree, because FSDP, ``vmap`` and whatever else maps over
the arguments of a module would then take each one apart, and put together one that has lost what it knows on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch

from .layout import MEDICAL_LEVELS, Layout
from .layout_input import check_names

_NUMBERS = ("num_tokens", "num_rows", "num_prefix")


def export_tables(layout: Layout) -> dict[str, torch.Tensor | int]:
    """What a layout tells the ops: its index tables and the patterns built so far, as they are, and its counts.

    Returns:
        name -> int32 tensor or int, the same names for every layout with as many levels and the same patterns: ``num_tokens``,
        ``num_rows``, ``num_prefix``, ``num_segments.i`` and ``offsets.i`` of level ``i`` (0: the finest), and so on; patterns
        are on the CPU, other tables on the device of the layout. Hand them to a program unchanged: its kernels trust them.
    """
    found = {name: getattr(layout, name) for name in _NUMBERS}
    found |= {f"num_segments.{i}": layout.num_segments(level) for i, level in enumerate(layout.levels)}
    found |= {".".join(map(str, key)): table for key, table in layout._tables.items()}
    for (level, neighbours, summary), plan in layout._patterns.items():
        place = (layout.index(level), neighbours, *([] if summary is None else [layout.index(summary)]))
        found[".".join(map(str, ("pattern", *place)))] = plan.table
    return found


class ExportedLayout(Layout):
    """The layout that ``tables`` are of, for the ops and layers inside a module that ``torch.export`` traces.

    It has what :func:`export_tables` gives. What a layout knows on the host (``host_offsets``, ``max_len``, ``grids``) and what
    it becomes (``to``, ``drop``, a pickle) are not there, nor patterns that were not built before.

    Args:
        tables: of :func:`export_tables`.
        levels: the names of the levels, finest first, as in the layout.

    Raises:
        TypeError: ``tables`` that are no mapping. ValueError: not as many names as the tables have levels. AttributeError, of
            what is not there.
    """

    def __init__(self, tables: Mapping[str, torch.Tensor | int], levels: Sequence[str] = MEDICAL_LEVELS):
        if not isinstance(tables, Mapping):
            raise TypeError(f"tables must be what export_tables(layout) returns, got {type(tables).__name__}")
        self.levels = check_names(levels)
        count = sum(name.startswith("num_segments.") for name in tables)
        if count != len(self.levels):
            raise ValueError(f"these are the tables of {count} levels, got the names {', '.join(map(repr, self.levels))}")
        self._num_segments = tuple(tables[f"num_segments.{i}"] for i in range(count))
        self._tables, self._patterns = {}, {}
        for name, value in tables.items():
            kind, *place = name.split(".")
            place = tuple(map(int, place))
            if kind in _NUMBERS:
                setattr(self, kind, value)
            elif kind == "pattern":
                level, neighbours, *summary = place
                key = self.levels[level], neighbours, self.levels[summary[0]] if summary else None
                self._patterns[key] = SimpleNamespace(table=value)
            elif kind != "num_segments":
                self._tables[(kind, *place)] = value
        self._frozen = True

    @property
    def device(self) -> torch.device:
        return self._tables["offsets", 0].device

    def __repr__(self) -> str:
        return f"ExportedLayout(levels={self.levels}, on {self.device})"

    def __getattr__(self, name: str):
        raise AttributeError(
            f"an exported layout has tables only, and no {name.lstrip('_')}: use the layout itself, outside of what is exported"
        )
