"""torch's counter of floating-point operations knows attention."""

import pytest
import torch
from attention_truth import LEVELS, RAGGED, make
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import hlip_kernels.flops  # noqa: F401
from hlip_kernels import attention

OPTIONS = [(level, {}) for level in LEVELS] + [("slice", {"neighbours": 1}), ("slice", {"summary": "study"})]


@pytest.mark.parametrize("level, options", OPTIONS, ids=str)
def test_flops_are_those_of_the_logits(level, options):
    layout = make(RAGGED, 2, 8)
    heads, head_dim = 3, 16
    qkv = torch.randn(layout.num_rows, 3, heads, head_dim, requires_grad=True)
    logits = int(layout.dense_mask(level, **options).sum())
    with FlopCounterMode(display=False) as counter:
        out = attention(*qkv.unbind(1), layout, level, **options)
    assert counter.get_total_flops() == 2 * 2 * logits * heads * head_dim
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * logits * heads * head_dim


def test_one_segment_counts_as_torch_counts_dense_attention():
    layout, shape = make([[[24]]], 0), (1, 2, 24, 16)
    qkv = torch.randn(24, 3, 2, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        attention(*qkv.unbind(1), layout, "study").sum().backward()
    expected = sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)
    assert counter.get_total_flops() == expected
