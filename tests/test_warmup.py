"""After a warm-up nothing is left to build."""

import pytest
import torch

from hlip_kernels import Layout, attention, warmup
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.options import options_by_level
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
    for layout in layouts:
        for level in ("slice", "scan", "study"):
            has = {} if level == "study" else options
            before = _built(layout, level, **has)
            assert any(before)
            qkv = torch.randn(layout.num_rows, 3, 2, 16, requires_grad=True)
            attention(*qkv.unbind(1), layout, level, backend=backend, **has).sum().backward()
            assert _built(layout, level, **has) == before


def test_levels_can_be_chosen_and_the_backward_pass_left_out():
    layout = Layout.from_grids(GRIDS, num_prefix=1)
    warmup([layout], heads=1, head_dim=16, levels=["scan"], backward=False, backend="sdpa")
    assert any(_built(layout, "scan")) and not any(_built(layout, "study"))
    with pytest.raises(ValueError, match="nowhere"):
        warmup([layout], heads=1, head_dim=16, levels=["nowhere"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_around_it(mode):
    layout = Layout.from_grids(GRIDS, num_prefix=1)
    with mode():
        warmup(layout, heads=2, head_dim=16, backend="sdpa")  # one is as good as a list of one
    qkv = torch.randn(layout.num_rows, 3, 2, 16, requires_grad=True)
    attention(*qkv.unbind(1), layout, "scan", backend="sdpa").sum().backward()
    assert qkv.grad.isfinite().all()


def test_each_level_has_the_options_it_can_have():
    levels = ("slice", "scan", "study")
    both = {"neighbours": 2, "summary": "scan"}
    assert options_by_level(levels, levels, **both) == {
        "slice": both, "scan": {"neighbours": 2, "summary": None}, "study": {"neighbours": 0, "summary": None},
    }  # fmt: skip
    assert options_by_level(["scan"], levels) == {"scan": {"neighbours": 0, "summary": None}}


@pytest.mark.parametrize(
    "used, options, message",
    [
        (["study"], {"neighbours": 1}, "neighbours=1 needs attention at a level below 'study'"),
        (["scan", "study"], {"summary": "scan"}, "summary='scan' needs attention at a level below 'scan'"),
        (["slice"], {"summary": "slice"}, "summary='slice' needs"),
        (["slice"], {"summary": "series"}, "unknown level 'series'"),
        (["series"], {}, "unknown level 'series'"),
    ],
)
def test_options_that_no_level_can_have_are_refused(used, options, message):
    with pytest.raises(ValueError, match=message):
        options_by_level(used, ("slice", "scan", "study"), **options)


def test_a_warm_up_for_an_option_that_no_level_can_have_says_so():
    with pytest.raises(ValueError, match="neighbours=1"):
        warmup([Layout.from_lengths([3, 5])], heads=1, head_dim=16, neighbours=1)
