"""The Hopper kernels on a Hopper GPU: against float64, in every pattern, repeated, captured. Skipped elsewhere.

In the GPU gate a step of its own: kernels that wait for one another can hang, and a step that hangs is ended by its time limit.
"""

import pytest
import torch
from attention_truth import relative, sdpa_by_segment

from hlip_kernels import HierarchicalAttention, Layout, attention
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.pattern import Plan

HERE = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.skipif(not HERE, reason="needs a GPU of compute capability 9.0"),
    pytest.mark.usefixtures("poisoned_memory"),
]

GRIDS = [[(2, 5, 7), (3, 9, 9), (12, 14, 14)], [], [(0, 2, 2), (1, 1, 1), (3, 8, 16)]]  # up to 2,600 rows a study
REPEATS = 20
NAMES = ["hopper", "hopper_ordered"]
PATTERNS = [{}, {"neighbours": 1}, {"summary": "study"}, {"neighbours": 2, "summary": "scan"}]


@pytest.fixture
def layout():
    return Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")


def run(backend, qkv, g, weights, layout, level, **options):
    out, lse = attention(*qkv.unbind(1), layout, level, backend=backend, return_lse=True, **options)
    loss = (out * g).sum() + (lse * weights.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, qkv)


def torchs_own(qkv, g, mask, scale=None):
    """Output of torch's own attention in the same dtype, and the gradient of qkv for that of the output."""
    out = sdpa_by_segment(*qkv.unbind(1), mask, scale)
    return out.detach(), torch.autograd.grad(out, qkv, g)[0]


def compare(backend, layout, level, dtype, head_dim, scale=None, deterministic=True, **pattern):
    """Errors at most twice those of torch's own attention in the same dtype; of the log-sum-exp and its gradient, Triton's."""
    options = {"scale": scale, "deterministic": deterministic, **pattern}
    qkv = torch.randn(layout.num_rows, 3, 3, head_dim, dtype=torch.float64, device="cuda").to(dtype)
    g = torch.randn(layout.num_rows, 3, head_dim, device="cuda").to(dtype)
    weights = torch.randn(3, layout.num_rows, device="cuda")
    exact = run("reference", qkv.double().requires_grad_(), g.double(), weights.double(), layout, level, **options)
    bounds = run("triton", qkv.clone().requires_grad_(), g, weights, layout, level, **options)
    got = run(backend, qkv.clone().requires_grad_(), g, weights, layout, level, **options)
    for name, a, truth, bound in zip(("out", "lse", "gradient"), got, exact, bounds, strict=True):
        floor = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        assert relative(a, truth) <= 2 * relative(bound, truth) + floor, (name, level, options)
    # torch's own gives no log-sum-exp: without a gradient of it.
    nothing = torch.zeros_like(weights)
    exact = run("reference", qkv.double().requires_grad_(), g.double(), nothing.double(), layout, level, **options)
    alone = run(backend, qkv.clone().requires_grad_(), g, nothing, layout, level, **options)
    own = torchs_own(qkv.clone().requires_grad_(), g, layout.dense_mask(level, **pattern), scale)
    for name, a, truth, bound in zip(("out", "gradient"), alone[::2], exact[::2], own, strict=True):
        assert relative(a, truth) <= 2 * relative(bound, truth) + torch.finfo(dtype).eps / 4, (name, level, options)
    dead = layout.prefix_rows(level).stop
    assert not got[0][dead:].any() and not got[1][:, dead:].any() and not got[2][dead:].any()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", NAMES)
def test_errors(layout, backend, dtype, head_dim):
    support = BACKENDS[backend].supports(Query("cuda", (9, 0), dtype, head_dim))
    assert support, support.reason
    for level in layout.levels:
        compare(backend, layout, level, dtype, head_dim)
        compare(backend, layout, level, dtype, head_dim, deterministic=False)
        compare(backend, layout, level, dtype, head_dim, scale=-0.2)
    compare(backend, layout, "study", dtype, head_dim, scale=0.0)


@pytest.mark.parametrize("options", PATTERNS, ids=str)
def test_patterns(layout, options):
    compare("hopper", layout, "slice", torch.bfloat16, 64, **options)
    compare("hopper", layout, "slice", torch.bfloat16, 64, deterministic=False, **options)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by tiles"])
def test_short_segments_of_every_length(monkeypatch, whole):
    """And the same bits with several for each place of a multiprocessor, whatever is next beside them."""
    monkeypatch.setattr(BACKENDS["hopper"], "whole", whole, raising=False)
    lengths = [1, 14, 15, 31, 32, 33, 63, 64, 65, 78, 79, 127, 128, 129, 142, 143, 191, 192, 193, 196, 206, 207, 224, 225, 253]
    layouts = [Layout.from_lengths(n * lengths, num_prefix=2, levels=("slice",), row_multiple=64).to("cuda") for n in (1, 4)]
    compare("hopper", layouts[0], "slice", torch.bfloat16, 64)
    layout = layouts[1]
    assert Plan.of(layout.pattern("slice")).longest <= 256 and 4 * len(lengths) * 12 > 4 * 132
    qkv = torch.randn(layout.num_rows, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(layout.num_rows, 12, 64, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(REPEATS):
        out = attention(*qkv.unbind(1), layout, "slice", backend="hopper")
        (grad,) = torch.autograd.grad(out, qkv, g)
        first = first or (out.detach(), grad)
        assert torch.equal(out, first[0]) and torch.equal(grad, first[1])


@pytest.mark.parametrize("backend", NAMES)
def test_more_items_than_multiprocessors_and_the_same_bits(backend):
    """Long segments beside short ones, so that programs go from item to item and wait for each other."""
    lengths = [[[3000, 100]], [[70, 2500, 64, 1]], [[9000]], [[1, 0, 130]]]
    layout = Layout.from_lengths(lengths, num_prefix=2, levels=("slice", "scan", "study")).to("cuda")
    assert len(Plan.of(layout.pattern("scan")).tiles(128, torch.device("cpu"))[0]) * 12 > 1000
    compare(backend, layout, "scan", torch.bfloat16, 64)
    qkv = torch.randn(layout.num_rows, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(layout.num_rows, 12, 64, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(200):
        out = attention(*qkv.unbind(1), layout, "scan", backend=backend)
        (grad,) = torch.autograd.grad(out, qkv, g)
        first = first or (out.detach(), grad)
        assert torch.equal(out, first[0]) and torch.equal(grad, first[1])


@pytest.mark.parametrize("backend", NAMES)
def test_nan_stays_in_its_study(layout, backend):
    rows = slice(0, int(layout.host_offsets("study")[1]))
    other = slice(rows.stop, layout.num_tokens)
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for broken in (False, True):
        leaf = qkv.clone()
        if broken:
            leaf[rows] = float("nan")
        leaf.requires_grad_()
        out = attention(*leaf.unbind(1), layout, "study", backend=backend)
        (grad,) = torch.autograd.grad(out[other].float().sum(), leaf)
        results.append((out[other].detach(), grad[other]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_that_tma_cannot_address(layout):
    flat = torch.randn(layout.num_rows * 3 * 2 * 64 + 1, device="cuda", dtype=torch.bfloat16)[1:]
    odd = flat.view(layout.num_rows, 3, 2, 64)
    got = attention(*odd.unbind(1), layout, "scan", backend="hopper")
    assert torch.equal(got, attention(*odd.clone().unbind(1), layout, "scan", backend="hopper"))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("whole", [False, True], ids=["attention", "layer"])
def test_graph(layout, backend, whole):
    """Attention comes out of a graph with the same bits. A layer need not: cuBLAS may take another kernel for its products."""
    layer = HierarchicalAttention(128, 2, qkv_bias=True, backend=backend, device="cuda", dtype=torch.bfloat16)
    shape = (layout.num_rows, 128) if whole else (layout.num_rows, 3, 2, 64)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(shape if whole else (layout.num_rows, 2, 64), device="cuda", dtype=torch.bfloat16)

    def run():
        out = layer(x, layout, "scan") if whole else attention(*x.unbind(1), layout, "scan", backend=backend)
        return out.detach(), torch.autograd.grad(out, x, g)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, run(), strict=True):
        if whole:
            assert expected.isfinite().all() and relative(got, expected.double()) < 0.01
        else:
            assert torch.equal(got, expected)
