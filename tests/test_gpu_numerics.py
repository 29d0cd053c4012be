"""What only a GPU can tell of TF32 products and of the fast backward pass. Skipped without one; part of the GPU gate.

Errors are held to twice those of torch's own attention with the same products: for TF32 its "math" backend with
``torch.backends.cuda.matmul.allow_tf32``, whose operands cuBLAS rounds to TF32 as our kernels do.
"""

import contextlib

import pytest
import torch
from attention_truth import relative, sdpa_by_segment
from torch.nn.attention import SDPBackend, sdpa_kernel

from hlip_kernels import Layout, attention, warmup
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.triton import config, is_fused

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRIDS = [[(2, 5, 7), (3, 9, 9), (8, 14, 14)], [], [(0, 2, 2), (1, 1, 1), (3, 8, 16)]]
HEAD_DIMS = [16, 32, 64, 72, 80, 96, 128, 192, 256]
# (dtype, allow_tf32)
KINDS = [(torch.float16, False), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True)]
KIND_IDS = ["float16", "bfloat16", "float32", "tfloat32"]
PATTERNS = [{}, {"neighbours": 1}, {"summary": "study"}, {"neighbours": 2, "summary": "scan"}]


@pytest.fixture
def layout():
    return Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")


@pytest.fixture(autouse=True)
def prepared(monkeypatch, poisoned_memory):
    """The fast pass however few keys a row sees."""
    monkeypatch.setattr(config, "FUSED_FROM", 0)


@contextlib.contextmanager
def tf32_in_torch(allowed):
    before = torch.backends.cuda.matmul.allow_tf32  # not by monkeypatch, which would try to delete it
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def torchs_own(leaf, layout, level, tf32):
    with sdpa_kernel(SDPBackend.MATH) if tf32 else contextlib.nullcontext():
        return sdpa_by_segment(*leaf.unbind(1), layout.dense_mask(level))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype, allow_tf32", KINDS, ids=KIND_IDS)
def test_error_is_at_most_twice_torchs_own(layout, dtype, allow_tf32, head_dim, deterministic):
    numerics = Numerics(deterministic, allow_tf32)
    if not allow_tf32 and not is_fused(torch.device("cuda", 0), dtype, head_dim, 1, numerics):
        pytest.skip("the kernels of tests/test_gpu.py")
    for level in layout.levels:
        qkv = torch.randn(layout.num_rows, 3, 2, head_dim, device="cuda").to(dtype)
        g = torch.randn(layout.num_rows, 2, head_dim, device="cuda").to(dtype)
        live = slice(layout.prefix_rows(level).stop)
        g[live.stop :] = 0
        exact = qkv.double().requires_grad_()
        true_out = attention(*exact.unbind(1), layout, level, backend="reference")
        (true_grad,) = torch.autograd.grad(true_out, exact, g.double())
        leaf = qkv.clone().requires_grad_()
        out = attention(*leaf.unbind(1), layout, level, backend="triton", deterministic=deterministic, allow_tf32=allow_tf32)
        (grad,) = torch.autograd.grad(out, leaf, g)
        with tf32_in_torch(allow_tf32):
            torchs = torchs_own(leaf, layout, level, allow_tf32)
            (torchs_grad,) = torch.autograd.grad(torchs, leaf, g)
        floor = 0.25 * (2.0**-10 if allow_tf32 else torch.finfo(dtype).eps)
        assert relative(out, true_out) <= 2 * relative(torchs, true_out) + floor, level
        for i in range(3):
            bound = 2 * relative(torchs_grad[:, i], true_grad[:, i]) + floor
            assert relative(grad[:, i], true_grad[:, i]) <= bound, (level, "qkv"[i])
        assert not grad[live.stop :].any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tf32_operands_are_rounded_to_nearest_by_us_and_taken_as_they_are(head_dim):
    """With one row a segment the output is v rounded once: the products themselves lose nothing more."""
    layout = Layout.from_lengths([1] * 200, num_prefix=0, levels=("slice",)).to("cuda")
    q, k, v = (torch.randn(200, 1, head_dim, device="cuda") for _ in range(3))
    out = attention(q, k, v, layout, "slice", backend="triton", allow_tf32=True)
    assert torch.equal(out, ((v.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32))


def test_tf32_is_used_when_allowed_and_only_then(layout):
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda")
    exact = attention(*qkv.double().unbind(1), layout, "study", backend="reference")
    plain, allowed = (attention(*qkv.unbind(1), layout, "study", backend="triton", allow_tf32=a) for a in (False, True))
    assert relative(plain, exact) < 1e-6 < 1e-4 < relative(allowed, exact) < 1e-3


@pytest.mark.parametrize("options", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype, allow_tf32", [k for k in KINDS if k != (torch.float32, False)],
                         ids=[i for i in KIND_IDS if i != "float32"])  # fmt: skip
def test_the_fast_pass_of_every_pattern_equals_the_deterministic_one(layout, dtype, allow_tf32, options):
    """dK and dV to the last bits of their statistics, dQ up to the order of its sums; with a gradient through lse."""
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda").to(dtype)
    weights = torch.randn(2, layout.num_rows, device="cuda")
    grads = []
    for deterministic in (True, False):
        leaf = qkv.clone().requires_grad_()
        out, lse = attention(*leaf.unbind(1), layout, "slice", backend="triton", return_lse=True, allow_tf32=allow_tf32,
                             deterministic=deterministic, **options)  # fmt: skip
        grads.append(torch.autograd.grad(out.float().square().sum() + (lse * weights).sum(), leaf)[0])
    eps = 2.0**-10 if allow_tf32 else torch.finfo(dtype).eps
    for i in range(3):
        assert relative(grads[1][:, i], grads[0][:, i].double()) < eps, "qkv"[i]


def test_repeats_of_the_fast_pass_differ_by_roundings_at_most():
    layout = Layout.from_lengths([3000, 5000], num_prefix=2, levels=("study",)).to("cuda")
    qkv = torch.randn(layout.num_rows, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(layout.num_rows, 4, 64, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(20):
        out = attention(*qkv.unbind(1), layout, "study", backend="triton", deterministic=False)
        (grad,) = torch.autograd.grad(out, qkv, g)
        first = grad if first is None else first
        assert torch.equal(grad[:, 1:], first[:, 1:])  # dK and dV are summed in one program, in order
        assert relative(grad[:, 0], first[:, 0].double()) < 2e-3


def test_nan_stays_in_its_study_in_the_fast_pass(layout):
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    g = torch.randn(layout.num_rows, 2, 64, device="cuda", dtype=torch.bfloat16)
    rows = slice(0, int(layout.host_offsets("study")[1]))
    others = torch.ones(layout.num_rows, dtype=torch.bool, device="cuda")
    others[rows] = False
    others[layout.num_tokens : layout.num_tokens + 2] = False
    grads = []
    for poison in (False, True):
        leaf = qkv.clone()
        if poison:
            leaf[rows] = float("nan")
        leaf.requires_grad_()
        out = attention(*leaf.unbind(1), layout, "study", backend="triton", deterministic=False)
        grads.append(torch.autograd.grad(out, leaf, g)[0])
    assert grads[1][rows].isnan().all() and grads[1][others].isfinite().all()
    assert torch.equal(grads[1][others][:, 1:], grads[0][others][:, 1:])
    assert relative(grads[1][others][:, 0], grads[0][others][:, 0].double()) < 2e-3


def test_rows_beyond_2_to_31_elements_in_the_fast_pass(needs_memory):
    """The last segments lie where an element offset no longer fits 32 bits, in dQ too."""
    heads, head_dim, length = 16, 64, 1000
    count = 2**31 // (heads * head_dim * length) + 20
    needs_memory(22 * count * length * heads * head_dim)
    layout = Layout.from_lengths([length] * count, levels=("study",)).to("cuda")
    q = torch.randn(layout.num_rows, heads, head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert q.numel() > 2**31
    out = attention(q, q, q, layout, "study", backend="triton", deterministic=False)
    (grad,) = torch.autograd.grad(out, q, out.detach())
    alone = Layout.from_lengths([length], levels=("study",)).to("cuda")
    last = q[-length:].detach().requires_grad_()
    expected = attention(last, last, last, alone, "study", backend="triton", deterministic=False)
    assert torch.equal(out[-length:], expected)
    assert relative(grad[-length:], torch.autograd.grad(expected, last, expected.detach())[0].double()) < 4e-3


def test_new_lengths_never_compile_the_fast_pass_again(monkeypatch):
    from triton import knobs

    options = {"backend": "triton", "deterministic": False}
    warmup([Layout.from_grids(GRIDS, num_prefix=2).to("cuda")], heads=2, head_dim=64, dtype=torch.bfloat16, **options)
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **what: compiled.append(what["repr"]))
    for depth in (1, 2, 5, 16):
        layout = Layout.from_grids([[(depth, 3, 5), (1, 7, 7)]] * depth, num_prefix=2).to("cuda")
        for level in layout.levels:
            qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            attention(*qkv.unbind(1), layout, level, **options).sum().backward()
    assert not compiled


def test_cuda_graph_of_the_fast_pass(layout):
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(layout.num_rows, 2, 64, device="cuda", dtype=torch.bfloat16)

    def backward():
        out = attention(*qkv.unbind(1), layout, "study", backend="triton", deterministic=False)
        return torch.autograd.grad(out, qkv, g)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward()
    for _ in range(3):  # zeros are written anew in every replay
        graph.replay()
    assert relative(captured, backward().double()) < 4e-3
