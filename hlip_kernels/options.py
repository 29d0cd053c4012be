"""Which levels can have which option of attention, said before any layout is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def options_by_level(
    used: Iterable[str], levels: Sequence[str], *, neighbours: int = 0, summary: str | None = None
) -> dict[str, dict]:
    """For each level that is attended at: ``neighbours`` and ``summary`` as given where it can have them, else 0 and ``None``.

    ``neighbours`` needs a coarser level, whose segments the neighbours share; ``summary`` has to be a coarser level.

    Args:
        used: the levels attended at. levels: all of the hierarchy, finest first.
        neighbours, summary: as in :func:`hlip_kernels.attention`.

    Raises:
        ValueError: an unknown level, or an option that none of the levels attended at can have.
    """
    used, levels = tuple(dict.fromkeys(used)), tuple(levels)
    for name in (*used, *([] if summary is None else [summary])):
        if name not in levels:
            raise ValueError(f"unknown level {name!r}: there are {', '.join(map(repr, levels))} (finest first)")
    below = 0 if summary is None else levels.index(summary)  # the levels that can have the summary
    neighboured, summarised = (tuple(name for name in used if name in fine) for fine in (levels[:-1], levels[:below]))
    told = f"attention is at {', '.join(map(repr, used))} (levels, finest first: {', '.join(map(repr, levels))})"
    if neighbours and not neighboured:
        raise ValueError(f"neighbours={neighbours} needs attention at a level below {levels[-1]!r}, but {told}")
    if summary is not None and not summarised:
        raise ValueError(f"summary={summary!r} needs attention at a level below {summary!r}, but {told}")
    return {
        name: {"neighbours": neighbours if name in neighboured else 0, "summary": summary if name in summarised else None}
        for name in used
    }
