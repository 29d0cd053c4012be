"""The attention op, forward and backward, against every peer that runs here.

pytest benchmarks/ --rows rows.csv && python -m benchmarks.report rows.csv
"""

import pytest
import torch

from benchmarks import workloads
from benchmarks.measure import device, dtype, full_size, predicted, relative_error, run, tolerance
from benchmarks.peers import peers
from hlip_kernels import attention


def _cases():
    for name in workloads.NAMES:
        w = workloads.make(name, full=full_size())
        for level in w.levels:
            for peer in peers(w, level, device(), dtype()):
                yield pytest.param(name, level, peer, id=f"{name}-{level}-{peer}")


CASES = list(_cases())
_TRUTH = {}


def _inputs(w, level):
    """q, k, v, an output gradient, and the truth of output and gradients by sdpa, float64 on a CPU and float32 on a GPU."""
    key = w.name, level
    if key not in _TRUTH:
        _TRUTH.clear()  # one workload at a time in memory
        generator = torch.Generator(device=device()).manual_seed(0)
        shape = (w.layout.num_rows, w.heads, w.head_dim)
        q, k, v, g = (torch.randn(shape, device=device(), dtype=dtype(), generator=generator) for _ in range(4))
        layout = w.layout.to(device())
        exact = torch.float64 if device().type == "cpu" else torch.float32
        leaves = [t.to(exact).requires_grad_() for t in (q, k, v)]
        out = attention(*leaves, layout, level, backend="sdpa")
        grads = torch.autograd.grad(out, leaves, g.to(exact))
        _TRUTH[key] = (q, k, v, g), (out.detach(), *grads)
    return _TRUTH[key]


def _comparable(w, level, implementation):
    """The published path repeats tokens to make ragged batches rectangular, so there its numbers are its own."""
    ragged = len(set(w.layout.host_offsets(level)[1:] - w.layout.host_offsets(level)[:-1])) > 1
    return not (implementation == "published path" and ragged)


@pytest.mark.parametrize("name, level, implementation", CASES)
def test_forward(benchmark, workload, name, level, implementation):
    w = workload(name)
    (q, k, v, _), (truth, *_) = _inputs(w, level)
    peer = peers(w, level, device(), dtype())[implementation]()
    if not peer.forward:
        pytest.skip(f"{implementation} differs in its backward pass alone")
    live = w.layout.prefix_rows(level).stop
    if _comparable(w, level, implementation):
        assert relative_error(peer.run(q, k, v)[:live], truth[:live]) < tolerance()
    benchmark.group = f"attention forward, {name} {level}"
    with torch.no_grad():
        run(
            benchmark, lambda: peer.run(q, k, v), flops=w.attention_flops(level), nbytes=w.attention_bytes(dtype()),
            what="attention", part="forward", workload=name, level=level, implementation=implementation,
            **predicted(w, level, implementation, backward=False),
        )  # fmt: skip


@pytest.mark.parametrize("name, level, implementation", CASES)
def test_backward(benchmark, workload, name, level, implementation):
    w = workload(name)
    (q, k, v, g), (_, *truth) = _inputs(w, level)
    peer = peers(w, level, device(), dtype())[implementation]()
    if not peer.backward:
        pytest.skip(f"{implementation} has no backward pass on {device().type}")
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = peer.run(*leaves)
    live = w.layout.prefix_rows(level).stop
    if _comparable(w, level, implementation):
        g = g.clone()
        g[live:] = 0
        for got, exact in zip(torch.autograd.grad(out, leaves, g, retain_graph=True), truth, strict=True):
            assert relative_error(got[:live], exact[:live]) < 2 * tolerance()
    benchmark.group = f"attention backward, {name} {level}"
    run(
        benchmark, lambda: torch.autograd.grad(out, leaves, g, retain_graph=True),
        flops=2.5 * w.attention_flops(level), nbytes=2 * w.attention_bytes(dtype()),
        what="attention", part="backward", workload=name, level=level, implementation=implementation,
        **predicted(w, level, implementation, backward=True),
    )  # fmt: skip
