"""After a warm-up nothing is left to build."""

import pytest
import torch

from hlip_kernels import Layout, attention, warmup
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.pattern import Plan

GRIDS = [[(2, 3, 3), (1, 4, 4)], [(3, 2, 2)]]


def _built(layout, level, **options):
    """The keys of everything a pattern's plan keeps."""
    plan = Plan.of(layout.pattern(level, **options))
    return set(plan.kept), set(plan._tiles)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("options", [{}, {"neighbours": 1}, {"summary": "study"}], ids=str)
def test_later_calls_build_nothing(backend, options):
    support = BACKENDS[backend].supports(Query("cpu", None, torch.float32, 16))
    if not support:
        pytest.skip(str(support))
    layouts = [Layout.from_grids(GRIDS, num_prefix=1), Layout.from_grids(GRIDS[:1], num_prefix=1)]
    warmup(layouts, heads=2, head_dim=16, backend=backend, **options)
    levels = ("slice", "scan", "study") if not options else ("slice", "scan")
    for layout in layouts:
        for level in levels:
            before = _built(layout, level, **options)
            assert any(before)
            qkv = torch.randn(layout.num_rows, 3, 2, 16, requires_grad=True)
            attention(*qkv.unbind(1), layout, level, backend=backend, **options).sum().backward()
            assert _built(layout, level, **options) == before


def test_levels_can_be_chosen_and_the_backward_pass_left_out():
    layout = Layout.from_grids(GRIDS, num_prefix=1)
    warmup([layout], heads=1, head_dim=16, levels=["scan"], backward=False, backend="sdpa")
    assert any(_built(layout, "scan")) and not any(_built(layout, "study"))
    with pytest.raises(ValueError, match="nowhere"):
        warmup([layout], heads=1, head_dim=16, levels=["nowhere"])
