"""The implementations of attention, and the choice among them.

Nothing outside this package knows which one runs. Each backend answers ``supports(query)`` with a reason when it cannot;
the same answer serves ``auto``, the error of an explicit choice, the tests' shapes and ``python -m hlip_kernels.info``.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import cuda, reference, sdpa, triton
from .base import Backend, Query, Support

BACKENDS: dict[str, Backend] = {
    "reference": reference.ReferenceBackend(),
    "sdpa": sdpa.SdpaBackend(),
    "triton": triton.TritonBackend(),
    "cuda": cuda.CudaBackend(),
}


@dataclass(frozen=True)
class Choice:
    """A line of the table of ``auto``.

    Attributes:
        device_type: where it applies. backend: what it proposes. longest: only for segments of up to so many rows.
        evidence: what it rests on.
    """

    device_type: str
    backend: str
    longest: int | None
    evidence: str


# `auto` takes the first line that applies and whose backend can run the query.
AUTO = (
    Choice("cuda", "cuda", 128, "predicted (docs/short_segments.md): not yet run on a GPU"),
    Choice("cuda", "triton", None, "predicted (docs/performance.md): not yet run on a GPU"),
    Choice("cuda", "sdpa", None, "what torch has where triton is not"),
    Choice("cpu", "sdpa", None, "measured (docs/benchmarks.md)"),
)


def choose(query: Query, name: str) -> Backend:
    """The backend for a query: the one named, or with ``"auto"`` the first preferred one that supports it.

    Raises:
        ValueError: unknown name. NotImplementedError: the named backend does not support the query; the message lists
            every backend with its reason. An explicit choice never falls back.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")
        if BACKENDS[name].supports(query):
            return BACKENDS[name]
        raise NotImplementedError(f"backend {name!r} cannot run {query}:\n{explain(query)}")
    for choice in AUTO:
        if _applies(choice, query) and BACKENDS[choice.backend].supports(query):
            return BACKENDS[choice.backend]
    if BACKENDS["reference"].supports(query):
        return BACKENDS["reference"]
    raise NotImplementedError(f"no backend can run {query}:\n{explain(query)}")


def _applies(choice: Choice, query: Query) -> bool:
    if choice.device_type != query.device_type:
        return False
    return choice.longest is None or (query.longest is not None and query.longest <= choice.longest)


def why(query: Query) -> str:
    """The evidence of what ``auto`` chooses for a query."""
    chosen = choose(query, "auto").name
    found = [c.evidence for c in AUTO if _applies(c, query) and c.backend == chosen]
    return found[0] if found else "nothing else can run it"


def explain(query: Query) -> str:
    """One line per backend: whether it can run the query, and if not, why."""
    return "\n".join(f"  {name}: {backend.supports(query)}" for name, backend in BACKENDS.items())


__all__ = ["AUTO", "BACKENDS", "Backend", "Choice", "Query", "Support", "choose", "explain", "why"]
