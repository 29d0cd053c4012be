"""Keeps ``torch.compile`` from tying compiled code to the lengths of index tables."""

from __future__ import annotations

from torch import Tensor


def any_length(table: Tensor) -> Tensor:
    """Tells dynamo that the length of an index table means nothing to the graph, and returns the table.

    Without it, dynamo assumes that two tables (or a table and the rows) which happen to be equally long always are
    ("duck sizing"), and compiles again for the first batch in which they are not.
    """
    try:
        from torch._dynamo.decorators import mark_unbacked
    except ImportError:
        return table
    mark_unbacked(table, 0)
    return table
