"""``attention`` under ``torch.autocast``: what ``scaled_dot_product_attention`` does there, compiled or not."""

import pytest
import torch
import torch.nn.functional as F
from attention_truth import RAGGED, make
from torch._dynamo.testing import CompileCounterWithBackend

from hlip_kernels import HierarchicalAttention, Layout, attention

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]


def rows(layout, *dtypes, device="cpu"):
    return [torch.randn(layout.num_rows, 2, 16, device=device).to(dtype).requires_grad_() for dtype in dtypes]


def gradients(out, lse, qkv):
    return torch.autograd.grad(out.float().sin().sum() + lse.cos().sum(), qkv)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("given", [[torch.float32] * 3, FLOATS, FLOATS[::-1]], ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_inputs_are_cast_and_gradients_are_not(half, given, backend):
    layout = make(RAGGED, 1)
    qkv = rows(layout, *given)
    with torch.autocast("cpu", half):
        got = attention(*qkv, layout, "scan", backend=backend, return_lse=True)
    assert got[0].dtype == half and got[1].dtype == torch.float32
    cast = [t.detach().to(half).requires_grad_() for t in qkv]
    expected = attention(*cast, layout, "scan", backend=backend, return_lse=True)
    grads = gradients(*got, qkv)
    assert [grad.dtype for grad in grads] == given
    # The same bits: what a backend computes in float32 inside is not cast again.
    for a, b in zip((*got, *grads), (*expected, *gradients(*expected, cast)), strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_a_backward_pass_under_autocast_is_the_same():
    layout = make(RAGGED, 1)
    qkv = rows(layout, *[torch.bfloat16] * 3)
    out, lse = attention(*qkv, layout, "scan", backend="sdpa", return_lse=True)
    loss = out.float().sin().sum() + lse.cos().sum()
    expected = torch.autograd.grad(loss, qkv, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, qkv)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    layout = make(RAGGED, 1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    f = torch.compile(lambda q, k, v, layout: attention(q, k, v, layout, "scan"), backend=counter, fullgraph=True, dynamic=True)
    for shape, count in ((layout, 1), (make([[[3, 4]], [[5], [60]]], 2), 1)):
        qkv = rows(shape, torch.float32, torch.float32, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = f(*qkv, shape), attention(*qkv, shape, "scan")
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
        grads = [torch.autograd.grad(each.sum(), qkv) for each in (out, expected)]
        for a, b in zip(*grads, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert counter.frame_count == count
    qkv = rows(layout, *[torch.float32] * 3)
    assert f(*qkv, layout).dtype == torch.float32  # the graph of autocast is not taken without


@pytest.mark.parametrize("given", [[torch.float32] * 3, FLOATS, [torch.float64] * 3], ids=str)
def test_it_casts_what_torchs_own_attention_casts(given):
    layout = Layout.from_lengths([7, 7])
    qkv = rows(layout, *given)
    dense = [t.view(2, 7, 2, 16).transpose(1, 2) for t in qkv]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*qkv, layout, "segment")
        expected = F.scaled_dot_product_attention(*dense)
        with pytest.raises(ValueError, match="q, k and v must share dtype"):
            attention(qkv[0].double(), *rows(layout, *FLOATS[:2]), layout, "segment")
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(0, 1), rtol=0.02, atol=0.02)


def test_nothing_is_cast_where_autocast_is_off():
    layout = make(RAGGED, 1)
    mixed, plain = rows(layout, *FLOATS), rows(layout, *[torch.float32] * 3)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert attention(*plain, layout, "scan").dtype == torch.float32
        with pytest.raises(ValueError, match="share dtype"):
            attention(*mixed, layout, "scan")
    with pytest.raises(ValueError, match="share dtype"):
        attention(*mixed, layout, "scan")
    with torch.autocast("cpu", torch.bfloat16):  # not the autocast of this device, which knows none
        out = attention(*rows(layout, *[torch.float32] * 3, device="meta"), layout.to("meta"), "scan")
    assert out.dtype == torch.float32


class Wide(torch.nn.Linear):
    """A projection that autocast does not reach: a quantized one, say."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize("projection", [torch.nn.Linear, Wide])
def test_the_layer_does_the_same_packed_and_dense(projection):
    layer, layout = HierarchicalAttention(32, 2, qk_norm=True), Layout.from_lengths([7, 7])
    layer.qkv, layer.proj = projection(32, 96), torch.nn.Identity()
    x = torch.randn(2, 7, 32)
    with torch.autocast("cpu", torch.bfloat16):
        dense, packed = layer(x), layer(x.flatten(0, 1), layout, "segment")
    assert dense.dtype == packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed, dense.flatten(0, 1), rtol=0.02, atol=0.02)
