"""How the sdpa backend calls torch's memory-efficient kernels on a GPU: around a stand-in that holds it to what those want.

What they want is read from torch's source: sdp_utils.cpp, attention_backward.cu, and check_supported() of the kernels.
"""

import pytest
import torch
from attention_truth import RAGGED, make, naive_attention, naive_mask, relative
from torch._subclasses.fake_tensor import FakeTensorMode

from hlip_kernels import attention
from hlip_kernels.backends import sdpa
from hlip_kernels.backends.base import Numerics
from hlip_kernels.pattern import Plan

DTYPES = [torch.float32, torch.bfloat16]


def on_16_bytes(*tensors):
    for x in tensors:
        assert x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and x.shape[-1] * x.itemsize % 16 == 0
        assert all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])


def rows_of_heads(x):
    """``(n, H, L, D)`` in memory ``(n, L, H, D)``: what the backward kernels take outputs for, without looking."""
    return x.transpose(1, 2).is_contiguous()


def forward(q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale):
    assert bias is None and compute_lse and not dropout and not causal
    on_16_bytes(q, k, v)
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    length = q.shape[2]
    lse = torch.full((*q.shape[:2], -(-length // 32) * 32), float("nan"))  # of rows that are not there: anything
    lse[..., :length] = torch.logsumexp(logits, -1)
    out = (torch.softmax(logits, -1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


class Backward:
    """Notes for each call torch's switch: 2 for deterministic algorithms, 1 for a warning, 0."""

    def __init__(self):
        self.modes = []

    def __call__(self, grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal=False, *, scale):
        self.modes.append(torch.get_deterministic_debug_mode())
        assert bias is None and not dropout and not causal and wanted == [True, True, True, False]
        on_16_bytes(grad, q, k, v, out)
        assert rows_of_heads(out)
        length = q.shape[2]
        assert lse.dtype == torch.float32
        if torch.version.hip is None:
            assert lse.stride(0) % 8 == lse.stride(1) % 8 == 0
            assert lse.shape[2] % 32 == 0 and (lse[..., length:] == float("inf")).all()
        else:
            assert lse.view(-1, length).shape[0] == lse.shape[0] * lse.shape[1]
        a, b, c, g, o = (t.float() for t in (q, k, v, grad, out))
        p = (a @ b.transpose(-1, -2) * scale - lse[..., :length, None]).exp()
        ds = p * (g @ c.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
        grads = ds @ b, ds.transpose(-1, -2) @ a, p.transpose(-1, -2) @ g
        return *(x.to(q.dtype) for x in grads), torch.empty(0)


@pytest.fixture
def efficient(monkeypatch):
    """CPU tensors go to the stand-in, as CUDA's do to torch's kernels. The modes its backward pass is called in."""
    backward, library = Backward(), torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_efficient_attention", forward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention_backward", backward, "CPU")
    monkeypatch.setattr(sdpa, "_fused", lambda q: "efficient")
    yield backward.modes
    library._destroy()


@pytest.mark.parametrize(
    "dtype, head_dim, capability, fused",
    [
        (torch.float16, 64, (7, 5), True),
        (torch.float16, 72, (9, 0), True),
        (torch.float16, 68, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
        (torch.bfloat16, 256, (8, 0), True),
        (torch.float32, 64, (7, 0), True),
        (torch.float32, 68, (9, 0), True),
        (torch.float32, 66, (9, 0), False),
        (torch.float64, 64, (9, 0), False),
    ],
    ids=str,
)
def test_what_the_kernels_take(monkeypatch, dtype, head_dim, capability, fused):
    """On a made up GPU. With a kernel no logits are kept, without one they are."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty((8, 2, head_dim), dtype=dtype, device="cuda")
    assert sdpa._fused(q) == ("efficient" if fused else None)


def test_not_float32_on_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with FakeTensorMode():
        assert sdpa._fused(torch.empty((8, 2, 64), device="cuda")) is None
        assert sdpa._fused(torch.empty((8, 2, 64), dtype=torch.float16, device="cuda")) == "efficient"


PATTERNS = [("scan", {}), ("slice", {"neighbours": 1}), ("slice", {"summary": "study"})]


@pytest.mark.parametrize("hip", [None, "7.0"])
@pytest.mark.parametrize("level, options", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(efficient, monkeypatch, dtype, level, options, hip):
    monkeypatch.setattr(torch.version, "hip", hip)  # where the kernels take their log-sum-exp otherwise
    layout = make(RAGGED, 2, 16)
    mask = naive_mask(RAGGED, 2, layout.num_rows, level, **options)
    qkv = torch.randn(layout.num_rows, 3, 2, 8).to(dtype).requires_grad_()
    weight = torch.randn(layout.num_rows, 2, 8).to(dtype)
    out, lse = attention(*qkv.unbind(1), layout, level, backend="sdpa", return_lse=True, **options)
    true_out, true_lse = naive_attention(*qkv.unbind(1), mask)
    grads = [torch.autograd.grad((o.double() * weight).sum() + s.double().sin().sum(), qkv)[0] for o, s in
             ((out, lse), (true_out, true_lse))]  # fmt: skip
    bound = 4 * torch.finfo(dtype).eps
    assert relative(out, true_out) < bound and relative(lse, true_lse) < 1e-6 and relative(*grads) < bound


@pytest.mark.parametrize("where", ["q", "grad"])
@pytest.mark.parametrize("kind", ["offset", "row stride"])
def test_rows_that_do_not_lie_on_16_bytes_are_copied(efficient, where, kind):
    layout = make([[[64]] * 3], 0)  # rows that are used where they are
    plan = Plan.of(layout.pattern("slice"))
    tensors = [torch.randn(layout.num_rows, 2, 8) for _ in range(4)]

    def run(q, k, v, grad):
        out, lse = sdpa.SdpaBackend().forward(q, k, v, plan, 0.3, Numerics())
        return out, lse, *sdpa.SdpaBackend().backward(grad, None, q, k, v, out, lse, plan, 0.3, Numerics())

    expected, at = run(*tensors), {"q": 0, "grad": 3}[where]
    shape = (layout.num_rows, 2, 8 + (kind == "row stride"))
    odd = torch.empty(1 + layout.num_rows * 2 * shape[2])[kind == "offset" :][: layout.num_rows * 2 * shape[2]]
    odd = odd.view(shape)[..., :8]
    tensors[at] = odd.copy_(tensors[at])
    assert all(torch.equal(a, b) for a, b in zip(run(*tensors), expected, strict=True))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_same_bits_are_asked_of_torch(efficient, deterministic, mode, compiled):
    """For the backward kernels alone, of all groups, and only if somebody wants them; afterwards torch is as it was."""
    layout = make(RAGGED, 2, 16)
    qkv = torch.randn(layout.num_rows, 3, 2, 8, requires_grad=True)

    def run(qkv):
        return attention(*qkv.unbind(1), layout, "slice", backend="sdpa", deterministic=deterministic)

    torch.set_deterministic_debug_mode(mode)
    try:
        if compiled:
            torch._dynamo.reset()
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
        run(qkv).square().sum().backward()
        assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(0)
    assert len(efficient) > 3 and set(efficient) == {2 if deterministic or mode else 0}


def test_an_error_leaves_torch_as_it_was(efficient, monkeypatch):
    def fail(*given):
        assert torch.get_deterministic_debug_mode() == 2
        raise KeyError

    layout = make(RAGGED, 2, 16)
    qkv = torch.randn(layout.num_rows, 3, 2, 8, requires_grad=True)
    out = attention(*qkv.unbind(1), layout, "slice", backend="sdpa")
    monkeypatch.setattr(sdpa, "_backward", fail)
    with pytest.raises(KeyError):
        out.sum().backward()
    assert torch.get_deterministic_debug_mode() == 0


def test_products_that_torch_makes_itself_are_not_under_the_switch(monkeypatch):
    """There it would make cuBLAS raise unless CUBLAS_WORKSPACE_CONFIG is set; what it does is in one order anyhow."""
    modes = []
    monkeypatch.setattr(sdpa, "_fused", lambda q: None)
    dense = sdpa._backward
    monkeypatch.setattr(sdpa, "_backward", lambda *given: modes.append(torch.get_deterministic_debug_mode()) or dense(*given))
    layout = make(RAGGED, 2, 16)
    qkv = torch.randn(layout.num_rows, 3, 2, 8, requires_grad=True)
    attention(*qkv.unbind(1), layout, "slice", backend="sdpa").sum().backward()
    assert set(modes) == {0}
