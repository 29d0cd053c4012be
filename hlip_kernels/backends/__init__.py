"""The implementations of attention, and the choice among them.

Nothing outside this package knows which one runs. Each backend answers ``supports(query)`` with a reason when it cannot;
the same answer serves ``auto``, the error of an explicit choice, the tests' shapes and ``python -m hlip_kernels.info``.
"""

from __future__ import annotations

from . import cuda, reference, sdpa, triton
from .base import Backend, Query, Support

BACKENDS: dict[str, Backend] = {
    "reference": reference.ReferenceBackend(),
    "sdpa": sdpa.SdpaBackend(),
    "triton": triton.TritonBackend(),
    "cuda": cuda.CudaBackend(),
}

# What `auto` tries, in order, by device type. Predicted, not measured: no GPU has run these kernels yet.
_AUTO = {"cuda": ("cuda", "triton", "sdpa", "reference"), "cpu": ("sdpa", "reference")}
_AUTO_ELSEWHERE = ("reference",)


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
    for candidate in _AUTO.get(query.device_type, _AUTO_ELSEWHERE):
        if BACKENDS[candidate].supports(query):
            return BACKENDS[candidate]
    raise NotImplementedError(f"no backend can run {query}:\n{explain(query)}")


def explain(query: Query) -> str:
    """One line per backend: whether it can run the query, and if not, why."""
    return "\n".join(f"  {name}: {backend.supports(query)}" for name, backend in BACKENDS.items())


__all__ = ["BACKENDS", "Backend", "Query", "Support", "choose", "explain"]
