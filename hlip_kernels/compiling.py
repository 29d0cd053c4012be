"""What ``torch.compile`` may not look into, and what it may not tie its code to. Nothing here loads it: it takes seconds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(reason: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates host code that ``torch.compile`` runs between its graphs; ``reason`` is the error with ``fullgraph=True``."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        disabled = None

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            nonlocal disabled
            if disabled is None and "torch._dynamo" in sys.modules:
                if torch.compiler.is_compiling():  # dynamo met this call first: it may not trace the next line either
                    torch._dynamo.graph_break(msg=reason)
                disabled = torch.compiler.disable(function, reason=reason)
            return (disabled or function)(*args, **kwargs)

        return call

    return decorate


def any_length(table: Tensor, *, at_least: int = 0) -> Tensor:
    """Tells dynamo that the length of an index table means nothing to the graph, and returns the table.

    Without it, dynamo assumes that two tables (or a table and the rows) which happen to be equally long always are
    ("duck sizing"), and compiles again for the first batch in which they are not.

    ``at_least`` is what dynamo may rely on all the same: ``diff()`` asks whether there is an entry to begin with. Versions of
    torch that do not know the mark pass over it.
    """
    decorators = sys.modules.get("torch._dynamo.decorators")
    if hasattr(decorators, "mark_unbacked"):
        decorators.mark_unbacked(table, 0)
    else:  # the marks that mark_unbacked leaves, for when this table meets a compiled function later
        table._dynamo_unbacked_indices = {0}
        table._dynamo_hint_overrides = {}
        table._specialize_on = {0: []}
        table._has_dynamo_dim_marking = True
    if at_least:
        table._dynamo_unbacked_bounds = {0: (at_least, None)}
    return table
