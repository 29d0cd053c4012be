"""The implementations of attention, and the choice among them.

Nothing outside this package knows which one runs. Each backend answers ``supports(query)`` with a reason when it cannot;
the same answer serves ``auto``, the error of an explicit choice, the tests' shapes and ``python -m hlip_kernels.info``.
"""

from __future__ import annotations

import os
import warnings

from . import auto, cuda, flash, hopper, reference, sdpa, triton
from .base import Backend, Query, Support

BACKENDS: dict[str, Backend] = {
    "reference": reference.ReferenceBackend(),
    "sdpa": sdpa.SdpaBackend(),
    "triton": triton.TritonBackend(),
    "cuda": cuda.CudaBackend(),
    "cuda_halves": cuda.CudaBackend(halves=True),
    "hopper": hopper.HopperBackend(),
    "hopper_ordered": hopper.HopperBackend(ordered=True),
    "flash": flash.FlashBackend(),
}
# Should one misbehave: names of backends to do without, and with "hopper" without "hopper_ordered".
_without = os.environ.get("HLIP_KERNELS_WITHOUT", "").split()
if _unknown := [name for name in _without if name not in BACKENDS]:
    warnings.warn(
        f"HLIP_KERNELS_WITHOUT names no backend with {' '.join(_unknown)}; there are {' '.join(BACKENDS)}", stacklevel=2
    )
BACKENDS = {name: backend for name, backend in BACKENDS.items() if not {name, name.partition("_")[0]}.intersection(_without)}


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
    return BACKENDS[decide(query).backend]


def decide(query: Query) -> auto.Choice:
    """The line of the tables that ``"auto"`` goes by: the first that applies and whose backend can run the query.

    Raises:
        NotImplementedError: there is none; the message lists every backend with its reason.
    """
    for line in auto.table():
        if line.applies(query) and line.backend in BACKENDS and BACKENDS[line.backend].supports(query):
            return line
    if "reference" in BACKENDS and BACKENDS["reference"].supports(query):
        return auto.Choice(query.device_type, "reference", "nothing else can run it")
    raise NotImplementedError(f"no backend can run {query}:\n{explain(query)}")


def explain(query: Query) -> str:
    """One line per backend: whether it can run the query, and if not, why."""
    return "\n".join(f"  {name}: {backend.supports(query)}" for name, backend in BACKENDS.items())


__all__ = ["BACKENDS", "Backend", "Query", "Support", "choose", "decide", "explain"]
