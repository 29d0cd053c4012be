"""Getting ready before the clock runs: compile the kernels and lay out their tiles ahead of the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .layout import Layout
from .ops import attention
from .options import options_by_level


def warmup(
    layouts: Iterable[Layout] | Layout,
    *,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    levels: Sequence[str] | None = None,
    backward: bool = True,
    neighbours: int = 0,
    summary: str | None = None,
    backend: str = "auto",
    deterministic: bool = True,
    allow_tf32: bool = False,
) -> None:
    """Runs attention once on zeros for every layout and level, so that no later call compiles or builds anything.

    Compiling depends on dtype and head dim, never on lengths: one small layout is enough for the kernels. (A gradient through
    the log-sum-exp compiles a variant of its own, not made here. With
    ``deterministic=False``, layouts whose rows see fewer than 512 keys compile another backward pass than the rest.)
    The tiles (or, for ``sdpa``, the groups) of a pattern belong to its layout: pass the layouts you will use, of a fixed
    validation set or before capturing a CUDA graph, and their first real call finds them made.

    Args:
        layouts: on the device that attention will run on; several or one.
        heads, head_dim, dtype: of q, k and v, which are made as views of one packed ``(R, 3, heads, head_dim)`` projection.
        levels: default: all of each layout, with ``neighbours`` and ``summary`` only where a level can have them.
        backward: also the backward pass.
        neighbours, summary, backend, deterministic, allow_tf32: as in :func:`hlip_kernels.attention`.

    Raises:
        ValueError, NotImplementedError: as :func:`hlip_kernels.attention` would; ValueError also for an option that no level
            can have.
    """
    same = {"backend": backend, "deterministic": deterministic, "allow_tf32": allow_tf32}
    pattern = {"neighbours": neighbours, "summary": summary}
    for layout in [layouts] if isinstance(layouts, Layout) else layouts:
        shape = (layout.num_rows, 3, heads, head_dim)
        if levels is None:
            chosen = options_by_level(layout.levels, layout.levels, **pattern)
        else:
            chosen = dict.fromkeys(levels, pattern)
        for level, options in chosen.items():
            with torch.inference_mode(False), torch.set_grad_enabled(backward):  # whatever the caller's mode
                qkv = torch.zeros(shape, dtype=dtype, device=layout.device, requires_grad=backward)
                out = attention(*qkv.unbind(1), layout, level, **options, **same)
                if backward:
                    out.backward(torch.zeros_like(out))
