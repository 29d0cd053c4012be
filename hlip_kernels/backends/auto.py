"""What ``backend="auto"`` chooses: a shipped table, and before it one measured on the user's own machine, if there is one.

``python -m hlip_kernels.measure_auto`` measures and writes the user's table. Both are lists of lines; the first that applies
and whose backend can run the query is taken. What the shipped lines for short segments say comes from the performance models
(``python -m hlip_kernels.predict_auto``) until somebody has measured.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from .base import Query

# The families that lines are about, as major compute capabilities; "amd" is what reports none. They are those of the Triton
# kernels' tile sizes, except that Blackwell with tensor memory stands apart. sm_120 has none: its matrix products and its 99 KB
# of shared memory are those of sm_86 and sm_89.
FAMILIES = {"ampere": (8, 12), "hopper": (9,), "blackwell": (10, 11), "amd": (None,)}
_FAMILY_OF = {major: family for family, majors in FAMILIES.items() for major in majors}


@cache
def _names_of(dtype: torch.dtype) -> tuple[str, ...]:
    """What a line may call a dtype."""
    name = str(dtype).removeprefix("torch.")
    return (name, "16-bit") if name in ("float16", "bfloat16") else (name,)


@dataclass(frozen=True)
class Choice:
    """A line of a table.

    Attributes:
        device_type: ``"cpu"``, ``"cuda"``. backend: what the line proposes. evidence: what it rests on.
        capability: only on GPUs of this compute capability.
        dtype: only for it (``"bfloat16"``); ``"16-bit"`` is float16 and bfloat16. head_dim: only for it.
        longest: only for patterns whose longest segment has at most so many rows.
        family: only on GPUs of this one of :data:`FAMILIES`.
    """

    device_type: str
    backend: str
    evidence: str
    capability: tuple[int, int] | None = None
    dtype: str | None = None
    head_dim: int | None = None
    longest: int | None = None
    family: str | None = None

    def applies(self, query: Query) -> bool:
        # Every call of attention asks line by line: what rules out most of them, and costs least, comes first.
        return (
            self.device_type == query.device_type
            and (self.longest is None or (query.longest is not None and query.longest <= self.longest))
            and self.head_dim in (None, query.head_dim)
            and self.capability in (None, query.capability)
            and self.family in (None, family_of(query))
            and (self.dtype is None or self.dtype in _names_of(query.dtype))
        )

    def __str__(self) -> str:
        where = self.family or self.device_type
        if self.capability is not None:
            where = "sm_" + "".join(map(str, self.capability))
        what = ", ".join(filter(None, [self.dtype, self.head_dim and f"head dim {self.head_dim}"])) or "any dtype and head dim"
        rows = "any length" if self.longest is None else f"up to {self.longest} rows"
        return f"{where}, {what}, {rows}: {self.backend} ({self.evidence})"


def family_of(query: Query) -> str | None:
    """Which of :data:`FAMILIES` the GPU of a query is of; ``None`` on other devices and for capabilities not listed."""
    if query.device_type != "cuda":
        return None
    return _FAMILY_OF.get(query.capability and query.capability[0])


# The cards whose data sheets stand for a family in the performance models.
CARDS = {"ampere": ("A100",), "hopper": ("H100", "H200"), "blackwell": ("B200",)}


def short(family: str, head_dim: int, longest: int, overlapped: float, serial: float, sure: int) -> Choice:
    """A line for the short-segment kernels, and the prediction it rests on.

    Args:
        longest: up to so many rows they are ahead of Triton if everything overlaps. sure: up to so many even if nothing does.
        overlapped, serial: their time over Triton's at ``longest`` rows, forward and backward together, in these two cases.
    """
    evidence = (
        f"predicted for {' and '.join(CARDS[family])}: {overlapped:.2f} of Triton's time at {longest} rows if all overlaps, "
        f"{serial:.2f} if nothing does (ahead in both up to {sure}); not yet run on a GPU"
    )
    return Choice("cuda", "cuda", evidence, dtype="16-bit", head_dim=head_dim, longest=longest, family=family)


SHIPPED = (
    # python -m hlip_kernels.predict_auto prints these lines; tests/test_auto.py compares.
    # family, head dim, up to, overlapped, serial, ahead in both up to
    short("ampere", 32, 128, 0.75, 1.64, 48),
    short("ampere", 64, 128, 0.75, 2.04, 32),
    short("ampere", 80, 128, 0.75, 1.97, 32),
    short("ampere", 96, 128, 0.75, 1.92, 32),
    short("ampere", 128, 128, 0.75, 1.85, 16),
    short("hopper", 32, 128, 0.75, 1.89, 32),
    short("hopper", 64, 128, 0.75, 1.86, 16),
    short("hopper", 80, 128, 0.83, 2.28, 16),
    short("hopper", 96, 128, 0.83, 2.23, 16),
    short("hopper", 128, 128, 0.83, 2.17, 16),
    short("blackwell", 32, 128, 0.77, 1.76, 48),
    short("blackwell", 64, 128, 0.75, 2.05, 32),
    short("blackwell", 80, 112, 0.99, 2.4, 32),
    short("blackwell", 96, 112, 1.0, 2.34, 16),
    short("blackwell", 128, 112, 1.0, 2.26, 16),
    Choice("cuda", "triton", "predicted, benchmarks.predict --gpu A100; not yet run on a GPU", family="ampere"),
    Choice("cuda", "triton", "predicted, docs/performance.md; not yet run on a GPU", family="hopper"),
    Choice("cuda", "triton", "predicted, benchmarks.predict --gpu B200; not yet run on a GPU", family="blackwell"),
    Choice("cuda", "triton", "compiled for gfx942, nothing predicted; not yet run on a GPU", family="amd"),
    Choice("cuda", "triton", "nothing predicted for this GPU, which nobody has listed"),
    Choice("cuda", "sdpa", "what torch has where triton is not, or for float64"),
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
    # Without a family a line is what it was before lines had one, and older versions read it too.
    written = [{name: value for name, value in asdict(line).items() if name != "family" or value} for line in lines]
    beside.write_text(json.dumps({"version": 1, "lines": written}, indent=1) + "\n")
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
