"""The far ends on a GPU: long rows, tensors beyond 2^31 elements, a thousand repeats, captured and compiled training steps.

Skipped without one. Part of the GPU gate; what is not at an end is in tests/test_gpu.py.
"""

import pytest
import torch
import torch.nn.functional as F
from attention_truth import relative

from hlip_kernels import HierarchicalAttention, Layout, attention, segment_mean, switch_level
from hlip_kernels.backends import BACKENDS, Query

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GRIDS = [[(2, 5, 7), (3, 9, 9), (8, 14, 14)], [], [(0, 2, 2), (1, 1, 1), (3, 8, 16)]]


@pytest.fixture
def layout():
    return Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")


@pytest.fixture(autouse=True)
def give_back(poisoned_memory):
    yield
    torch.cuda.empty_cache()


def needs(backend, head_dim=64, longest=200, dtype=torch.bfloat16):
    """Skips, with the backend's reason, where it cannot run."""
    capability = torch.cuda.get_device_capability() if torch.version.hip is None else None
    support = BACKENDS[backend].supports(Query("cuda", capability, dtype, head_dim, longest))
    if not support:
        pytest.skip(f"{backend} {support.reason}")


class LongRow:
    """Attention of one segment of ``(R, H, D)`` rows in float64, some rows of outputs and gradients, a chunk at a time."""

    def __init__(self, q, k, v, g, chunk=1024):
        self.q, self.k, self.v, self.g = (t.double().transpose(0, 1) for t in (q, k, v, g))
        self.scale, self.chunk = q.shape[-1] ** -0.5, chunk

    def of_queries(self, rows):
        """out and dq of these rows."""
        p = torch.softmax(self.q[:, rows] @ self.k.transpose(1, 2) * self.scale, -1)
        out = p @ self.v
        dp = self.g[:, rows] @ self.v.transpose(1, 2)
        ds = p * (dp - (self.g[:, rows] * out).sum(-1, keepdim=True))
        return out.transpose(0, 1), (ds @ self.k * self.scale).transpose(0, 1)

    def of_keys(self, rows):
        """dk and dv of these rows: every query has a part in them."""
        dk, dv = torch.zeros_like(self.k[:, rows]), torch.zeros_like(self.v[:, rows])
        for first in range(0, self.q.shape[1], self.chunk):
            some = slice(first, first + self.chunk)
            p = torch.softmax(self.q[:, some] @ self.k.transpose(1, 2) * self.scale, -1)
            delta = (self.g[:, some] * (p @ self.v)).sum(-1, keepdim=True)
            p = p[:, :, rows]
            ds = p * (self.g[:, some] @ self.v[:, rows].transpose(1, 2) - delta)
            dk += ds.transpose(1, 2) @ self.q[:, some] * self.scale
            dv += p.transpose(1, 2) @ self.g[:, some]
        return dk.transpose(0, 1), dv.transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_segment_of_seventy_thousand_rows(dtype):
    """Its first, last and some rows between against float64, and against the error of torch's own attention on them."""
    length, heads, head_dim = 70_000, 2, 64
    layout = Layout.from_lengths([length - 3], num_prefix=3, levels=("study",)).to("cuda")
    q, k, v, g = (torch.randn(length, heads, head_dim, device="cuda", dtype=dtype) for _ in range(4))
    rows = torch.cat([torch.arange(64), torch.randint(64, length - 70, (100,)), torch.arange(length - 70, length)]).cuda()
    exact = LongRow(q, k, v, g)
    truth = (*exact.of_queries(rows), *exact.of_keys(rows))
    errors = []
    for mine in (True, False):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        if mine:
            out = attention(*leaves, layout, "study", backend="triton")
        else:
            out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in leaves))[0].transpose(0, 1)
        results = [out, *torch.autograd.grad(out, leaves, g)]
        assert all(t.isfinite().all() for t in results)
        errors.append([relative(t[rows], right) for t, right in zip(results, truth, strict=True)])
    for name, error, bound in zip(("out", "dq", "dk", "dv"), *errors, strict=True):
        assert error <= 2 * bound + 0.25 * torch.finfo(dtype).eps, f"{name}: {error:.2e} against {bound:.2e} of torch"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_tensor_beyond_2_to_31_elements(needs_memory, backend):
    """Not only the packed projection: q itself, so every row offset of outputs and gradients at the far end needs 64 bits.

    The last segments come out as they do alone, and so does one in the middle.
    """
    needs(backend)
    heads, head_dim, length = 12, 64, 196
    count = 2**31 // (heads * head_dim * length) + 50
    elements = count * length * heads * head_dim
    needs_memory(9 * 2 * elements + 4 * 3 * elements // head_dim + 2**30)  # q, k, v, out, its gradient and theirs, one spare
    layout = Layout.from_lengths([length] * count, levels=("slice",)).to("cuda")
    q, k, v = (
        torch.randn(layout.num_rows, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    assert q.numel() > 2**31
    out = attention(q, k, v, layout, "slice", backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), out.detach())
    small = Layout.from_lengths([length] * 3, levels=("slice",)).to("cuda")
    middle = count // 2 * length
    for at in (0, middle, (count - 3) * length):  # the last of these ends where the tensor does
        rows = slice(at, at + 3 * length)
        leaves = [t[rows].detach().requires_grad_() for t in (q, k, v)]
        expected = attention(*leaves, small, "slice", backend=backend)
        assert torch.equal(out[rows], expected) and expected.float().std() > 0.01
        for got, right in zip(grads, torch.autograd.grad(expected, leaves, expected.detach()), strict=True):
            assert torch.equal(got[rows], right)
    for t in (out, *grads):  # nothing was left unwritten in between
        assert not any(chunk.isnan().any() for chunk in t.detach().split(2**17))


@pytest.mark.parametrize("lse_gradient", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_thousand_repeats_are_the_same_bits(backend, lse_gradient):
    needs(backend)
    lengths = [n % 130 for n in range(300)] + [196] * 40 + [0, 1, 197]
    layout = Layout.from_lengths(lengths, num_prefix=2, levels=("slice",), row_multiple=64).to("cuda")
    qkv = torch.randn(layout.num_rows, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(layout.num_rows, 4, 64, device="cuda", dtype=torch.bfloat16)
    lse_g = torch.randn(4, layout.num_rows, device="cuda")
    first, differ = None, torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out, lse = attention(*qkv.unbind(1), layout, "slice", backend=backend, return_lse=True)
        outputs, grads = ((out, lse), (g, lse_g)) if lse_gradient else ((out,), (g,))
        results = out.detach(), lse.detach(), torch.autograd.grad(outputs, qkv, grads)[0]
        first = first or [t.clone() for t in results]
        for t, expected in zip(results, first, strict=True):
            differ += (t != expected).sum()  # NaN counts as different; summed there, so that the host need not wait
    assert int(differ) == 0


def test_no_synchronisation_with_short_segments(layout):
    """As tests/test_gpu.py has it for the Triton kernels: here with new layouts at a level that the cuda backend takes."""
    needs("cuda")
    layer = HierarchicalAttention(128, 2, qkv_bias=True, backend="cuda", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(layout.num_rows, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x, layout, "slice").sum().backward()
    expected, x.grad = x.grad, None
    layer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fresh = Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")
        layer(x, fresh, "slice").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x.grad, expected)


class Block(torch.nn.Module):
    """Two levels and the change between them, as a model has it."""

    def __init__(self, backend="auto", dtype=torch.bfloat16):
        super().__init__()
        kind = {"qkv_bias": True, "device": "cuda", "dtype": dtype}
        self.a = HierarchicalAttention(128, 2, backend=backend, **kind)
        self.b = HierarchicalAttention(128, 2, **kind)

    def forward(self, x, layout):
        x = x + self.a(x, layout, "slice")
        x = switch_level(x, layout, "slice", "study")
        x = x + self.b(x, layout, "study")
        return segment_mean(x, layout, "study")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_of_a_training_step(layout, backend):
    """Forward and backward pass of whole layers in one graph, replayed on other inputs."""
    needs(backend)
    block = Block(backend)
    x = torch.randn(layout.num_rows, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *block.parameters()]

    def step():
        loss = block(x, layout).float().square().mean()
        return (loss.detach(), *torch.autograd.grad(loss, wanted))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled and tabled before the capture, on another stream as torch asks
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            # Not the same bits: cuBLAS may take another kernel for the products of the layers in a graph.
            assert expected.isfinite().all() and relative(got, expected.double()) < 0.01


def test_compiled_training_steps_of_new_lengths_compile_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    block = Block(dtype=torch.float32)
    counter, once = CompileCounterWithBackend("inductor"), None
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for i, grids in enumerate(
        (GRIDS, [[(2, 6, 6)], [(3, 7, 7)] * 2], [[(8, 14, 14)] * 3] * 2, [[(1, 3, 3)], [], [(5, 9, 9)] * 9])
    ):
        layout = Layout.from_grids(grids, num_prefix=2, row_multiple=64).to("cuda")
        x = torch.randn(layout.num_rows, 128, device="cuda", requires_grad=True)
        results = []
        for model in (block, compiled):
            y = model(x, layout)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        once = once or counter.frame_count
        assert counter.frame_count == once, f"compiled again for batch {i}"
