"""Once imported, ``torch.utils.flop_counter.FlopCounterMode`` counts attention: the logits there are, no padding.

    import hlip_kernels.flops

``import hlip_kernels`` leaves it out, because torch's counter loads triton. On the ``reference`` backend attention is plain
torch, which is counted as such.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .pattern import K_PATCHES, K_PREFIXES, Q_PATCHES, Q_PREFIXES, Plan


def _product(q: Tensor, pattern: Tensor) -> int:
    """Multiplications and additions of one matrix product over every logit of every head."""
    records = Plan.of(pattern).forward
    logits = (records[:, Q_PATCHES] + records[:, Q_PREFIXES]) * (records[:, K_PATCHES] + records[:, K_PREFIXES])
    return 2 * int(logits.sum()) * q.shape[1] * q.shape[2]


# The formulas are given the tensors themselves: the pattern is on the CPU, so that reading it waits for no device.
@register_flop_formula(torch.ops.hlip.attention, get_raw=True)
def _forward(q, k, v, pattern, *options, out_val, **more) -> int:
    return 2 * _product(q, pattern)


@register_flop_formula(torch.ops.hlip.attention_backward, get_raw=True)
def _backward(grad_out, grad_lse, q, k, v, out, lse, pattern, *options, out_val, **more) -> int:
    return 5 * _product(q, pattern)  # the logits again and four gradients, as torch counts its own
