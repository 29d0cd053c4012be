"""What ``backend="auto"`` chooses: a shipped table, and before it one measured on the user's own machine, if there is one.

``python -m hlip_kernels.measure_auto`` measures and writes the user's table. Both are lists of lines; the first that applies
and whose backend can run the query is taken.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from .base import Query


@dataclass(frozen=True)
class Choice:
    """A line of a table.

    Attributes:
        device_type: ``"cpu"``, ``"cuda"``. backend: what the line proposes. evidence: what it rests on.
        capability: only on GPUs of this compute capability. dtype: only for it (``"bfloat16"``). head_dim: only for it.
        longest: only for patterns whose longest segment has at most so many rows.
    """

    device_type: str
    backend: str
    evidence: str
    capability: tuple[int, int] | None = None
    dtype: str | None = None
    head_dim: int | None = None
    longest: int | None = None

    def applies(self, query: Query) -> bool:
        return (
            self.device_type == query.device_type
            and self.capability in (None, query.capability)
            and self.dtype in (None, str(query.dtype).removeprefix("torch."))
            and self.head_dim in (None, query.head_dim)
            and (self.longest is None or (query.longest is not None and query.longest <= self.longest))
        )

    def __str__(self) -> str:
        where = self.device_type if self.capability is None else "sm_" + "".join(map(str, self.capability))
        what = ", ".join(filter(None, [self.dtype, self.head_dim and f"head dim {self.head_dim}"])) or "any dtype and head dim"
        rows = "any length" if self.longest is None else f"up to {self.longest} rows"
        return f"{where}, {what}, {rows}: {self.backend} ({self.evidence})"


SHIPPED = (
    Choice("cuda", "cuda", "predicted, docs/short_segments.md; not yet run on a GPU", longest=128),
    Choice("cuda", "triton", "predicted, docs/performance.md; not yet run on a GPU"),
    Choice("cuda", "sdpa", "what torch has where triton is not"),
    Choice("cpu", "sdpa", "measured, docs/benchmarks.md"),
)


def user_path() -> Path:
    """Where the user's table is: ``HLIP_KERNELS_AUTO``, or ``hlip_kernels/auto.json`` in the user's configuration folder."""
    named = os.environ.get("HLIP_KERNELS_AUTO")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hlip_kernels" / "auto.json"


def write(lines: list[Choice], path: Path) -> None:
    """Keeps a table, in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(json.dumps({"version": 1, "lines": [asdict(line) for line in lines]}, indent=1) + "\n")
    beside.replace(path)
    table.cache_clear()


def read(path: Path) -> tuple[Choice, ...]:
    """A table that :func:`write` wrote.

    Raises:
        ValueError: the file is something else, saying what was found.
    """
    try:
        content = json.loads(path.read_text())
        if content["version"] != 1:
            raise ValueError(f"version {content['version']}, expected 1")
        lines = []
        for line in content["lines"]:
            capability = line.pop("capability")
            lines.append(Choice(**line, capability=None if capability is None else tuple(capability)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of hlip_kernels.measure_auto: {type(error).__name__}: {error}") from error
    return tuple(lines)


@cache
def table() -> tuple[Choice, ...]:
    """The user's lines, if there are any, and then the shipped ones. A broken file is ignored with a warning."""
    path = user_path()
    try:
        own = read(path) if path.exists() else ()
    except (OSError, ValueError) as error:
        warnings.warn(f"ignored: {error}. Remove it, or measure again: python -m hlip_kernels.measure_auto", stacklevel=2)
        own = ()
    return own + SHIPPED
