"""The ``sdpa`` backend against padding every segment to the longest, measured in turn, round by round.

The rows of ``test_attention.py`` come minutes apart; where two implementations are within a few percent of each other, only
this comparison says which is faster.
"""

import pytest
import torch

from benchmarks import workloads
from benchmarks.measure import device, dtype, full_size, relative_error, run, tolerance
from benchmarks.peers import peers

CASES = [(name, level) for name in workloads.NAMES for level in workloads.make(name, full=full_size()).levels]


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("name, level", CASES)
def test_padding_in_turn(benchmark, workload, name, level, part):
    w = workload(name)
    made = peers(w, level, device(), dtype())
    ours, padded = (made[which]().run for which in ("hlip sdpa", "padded SDPA"))
    shape = (w.layout.num_rows, w.heads, w.head_dim)
    leaves = [torch.randn(shape, device=device(), dtype=dtype(), requires_grad=part == "backward") for _ in range(3)]
    outs = [run(*leaves) for run in (ours, padded)]
    live = w.layout.prefix_rows(level).stop
    assert relative_error(outs[0][:live].detach(), outs[1][:live].detach()) < 2 * tolerance()
    if part == "forward":
        calls = [lambda f=f: f(*leaves) for f in (ours, padded)]
    else:
        grad = torch.randn_like(outs[0])
        calls = [lambda out=out: torch.autograd.grad(out, leaves, grad, retain_graph=True) for out in outs]
    benchmark.group = f"padding, {part}, {name} {level}"
    scale = 2.5 if part == "backward" else 1.0
    run(
        benchmark, calls[0], beside={"padded SDPA": calls[1]},
        flops=scale * w.attention_flops(level), nbytes=(2 if part == "backward" else 1) * w.attention_bytes(dtype()),
        what="attention in turn", part=part, workload=name, level=level, implementation="hlip sdpa",
    )  # fmt: skip
