"""``HierarchicalAttention``: timm's weights and results, packed rows, compilation without breaks or recompilation."""

import inspect

import pytest
import torch
from attention_truth import LEVELS, RAGGED, make, naive_mask, relative
from torch._dynamo.testing import CompileCounterWithBackend

from hlip_kernels import HierarchicalAttention, Layout, segment_mean, switch_level

OPTIONS = [
    {},
    {"qkv_bias": True},
    {"qk_norm": True, "norm_layer": torch.nn.LayerNorm},
    {"qkv_bias": True, "proj_bias": False},
    {"scale_norm": True, "norm_layer": torch.nn.LayerNorm, "attn_drop": 0.0, "proj_drop": 0.0},
    {"attn_head_dim": 16, "dim_out": 32},
    {"gated": True, "qkv_bias": True},
]


def in_timm(options, **both):
    """timm's layer and ours with its weights; skips what the installed timm does not have."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    if missing := options.keys() - inspect.signature(timm.Attention).parameters.keys():
        pytest.skip(f"this timm has no {', '.join(missing)}")
    theirs = timm.Attention(48, num_heads=4, **options, **both)
    ours = HierarchicalAttention(48, num_heads=4, **options, **both)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same_gradients(expected, theirs, got, ours, x):
    a, b = (torch.autograd.grad(y.square().sum(), [x, *m.parameters()]) for y, m in ((expected, theirs), (got, ours)))
    # Not relative: the gradient of a bias of the keys is zero, and what is left is rounding.
    assert all(torch.allclose(q, p, rtol=1e-4, atol=1e-4) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loads_timm_and_computes_the_same(options):
    theirs, ours = in_timm(options)
    x = torch.randn(3, 11, 48, requires_grad=True)
    expected, got = theirs(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(expected, theirs, got, ours, x)
    # The same dense batch as packed rows: every element a segment.
    layout = Layout.from_lengths([11, 11, 11])
    packed = ours(x.flatten(0, 1), layout, "segment").view(expected.shape)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-6)


CAUSAL = torch.ones(11, 11, dtype=torch.bool).tril()
MASKS = {
    "of all": {"attn_mask": CAUSAL},
    "of each": {"attn_mask": torch.eye(11, dtype=torch.bool) | (torch.arange(33 * 11).view(3, 1, 11, 11) % 3 > 0)},
    "added": {"attn_mask": torch.linspace(-3, 3, 4 * 11 * 11).view(1, 4, 11, 11)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_dense_input_do_what_timms_do(mask):
    theirs, ours = in_timm({"qkv_bias": True}, attn_drop=0.5)
    if missing := MASKS[mask].keys() - inspect.signature(theirs.forward).parameters.keys():
        pytest.skip(f"this timm has no {', '.join(missing)}")
    theirs, ours = theirs.eval(), ours.eval()
    x = torch.randn(3, 11, 48, requires_grad=True)
    expected, got = theirs(x, **MASKS[mask]), ours(x, **MASKS[mask])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert relative(got, ours(x)) > 0.01
    assert_same_gradients(expected, theirs, got, ours, x)


def test_dropout_of_attention_weights_of_dense_input_is_timms():
    theirs, ours = in_timm({}, attn_drop=0.5)
    x = torch.randn(3, 11, 48)
    outs = []
    for layer in (theirs, ours):
        torch.manual_seed(1)
        outs.append(layer(x))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    assert relative(outs[1], ours.eval()(x)) > 0.01


def vit(**options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 2, "num_classes": 5, "embed_dim": 48, **options}
    return timm.create_model("vit_tiny_patch16_224", **options)


def test_it_takes_its_place_in_a_vit_of_timm():
    plain, ours, x = vit(), vit(), torch.randn(2, 3, 32, 32, requires_grad=True)
    for block in ours.blocks:
        layer = HierarchicalAttention(48, block.attn.num_heads, qkv_bias=True)
        layer.load_state_dict(block.attn.state_dict())
        block.attn = layer
    expected, got = plain(x), ours(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(expected, plain, got, ours, x)
    if "attn_mask" in inspect.signature(plain.forward).parameters:
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        assert relative(ours(x, attn_mask=mask), plain(x, attn_mask=mask)) < 1e-5
        assert relative(ours(x, attn_mask=mask), got) > 1e-4


def test_timm_can_make_it_itself():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import Block

    if "attn_layer" not in inspect.signature(Block).parameters:
        pytest.skip("this timm does not take a layer for attention")
    plain, ours = vit(qk_norm=True), vit(qk_norm=True, attn_layer=HierarchicalAttention)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)


class OldNorm(torch.nn.LayerNorm):
    """As in older timm: no device, no dtype."""

    def __init__(self, channels, eps=1e-6):
        super().__init__(channels, eps)


def test_norm_layers_need_not_know_devices():
    assert HierarchicalAttention(16, 2, qk_norm=True, norm_layer=OldNorm).q_norm.eps == 1e-6
    with pytest.raises(ValueError, match="norm_layer"):
        HierarchicalAttention(16, 2, qk_norm=True, norm_layer=None)


def test_packed_rows_refuse_what_they_cannot_honour():
    layout = make(RAGGED, 1)
    x = torch.randn(layout.num_rows, 16)
    layer = HierarchicalAttention(16, 2, attn_drop=0.1)
    with pytest.raises(ValueError, match="attn_drop=0.1 is for dense"):
        layer(x, layout, "scan")
    layer.eval()
    assert layer(x, layout, "scan", attn_mask=None, is_causal=False).shape == x.shape
    with pytest.raises(ValueError, match="attn_mask is for dense"):
        layer(x, layout, "scan", attn_mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="is_causal is for dense"):
        layer(x, layout, "scan", is_causal=True)
    with pytest.raises(TypeError, match="pass a mask by keyword"):
        layer(torch.randn(2, 3, 16), torch.ones(3, 3))
    with pytest.raises(ValueError, match="exclude each other"):
        layer(torch.randn(2, 3, 16), attn_mask=torch.ones(3, 3), is_causal=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pattern", [{}, {"neighbours": 1}, {"summary": "study"}], ids=str)
def test_packed_rows_equal_dense_masked_attention(level, pattern):
    if level == "study" and pattern:
        pytest.skip("the coarsest level has no siblings")
    layout = make(RAGGED, 2, 16)
    layer = HierarchicalAttention(32, 2, qkv_bias=True, **pattern)
    x = torch.randn(layout.num_rows, 32)
    mask = naive_mask(RAGGED, 2, layout.num_rows, level, **pattern)
    live = mask.any(1)
    q, k, v = layer.qkv(x).view(-1, 3, 2, 16).permute(1, 2, 0, 3)
    dense = torch.nn.functional.scaled_dot_product_attention(q[:, live], k[:, live], v[:, live], mask[live][:, live])
    expected = layer.proj(dense.transpose(0, 1).flatten(1))
    torch.testing.assert_close(layer(x, layout, level)[live], expected, rtol=1e-5, atol=1e-5)


def test_dropout_only_in_training():
    layout = make(RAGGED, 1)
    layer = HierarchicalAttention(16, 2, proj_drop=0.5)
    x = torch.randn(layout.num_rows, 16)
    assert not torch.equal(layer(x, layout, "scan"), layer(x, layout, "scan"))
    layer.eval()
    assert torch.equal(layer(x, layout, "scan"), layer(x, layout, "scan"))


def test_bad_arguments_are_named():
    layout = make(RAGGED, 1)
    layer = HierarchicalAttention(16, 2)
    with pytest.raises(ValueError, match="divisible"):
        HierarchicalAttention(16, 3)
    with pytest.raises(ValueError, match="neighbours must be an int >= 0"):
        HierarchicalAttention(16, 2, neighbours=-1)
    with pytest.raises(ValueError, match="both layout and level"):
        layer(torch.randn(layout.num_rows, 16), layout)
    with pytest.raises(ValueError, match="both layout and level"):
        layer(torch.randn(2, 3, 16), level="scan")
    with pytest.raises(ValueError, match="packed rows"):
        layer(torch.randn(2, 3, 16), layout, "scan")
    with pytest.raises(ValueError, match="dense"):
        layer(torch.randn(3, 16))
    assert "heads=2" in repr(layer) and "backend='auto'" in repr(layer)


def test_autocast_runs_attention_in_half():
    layout = make(RAGGED, 1)
    layer = HierarchicalAttention(32, 2, qk_norm=True)
    x = torch.randn(layout.num_rows, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, layout, "scan")
    assert out.dtype == torch.bfloat16
    assert relative(out, layer(x, layout, "scan")) < 0.02


class Two(torch.nn.Module):
    """Two levels, a change between them, and a pooled result: what a model compiles."""

    def __init__(self, **options):
        super().__init__()
        self.a = HierarchicalAttention(32, 2, qkv_bias=True, **options)
        self.b = HierarchicalAttention(32, 2, qkv_bias=True)

    def forward(self, x, layout):
        x = x + self.a(x, layout, "slice")
        x = switch_level(x, layout, "slice", "study")
        x = x + self.b(x, layout, "study")
        return x, segment_mean(x, layout, "study")


BATCHES = [
    [[[5, 3], [17]], [[2, 9, 4]]],
    [[[7, 3], [16]], [[2, 8, 4], [3]]],
    RAGGED,
    [[[64] * 3] * 2] * 5,
    [[[12, 5]], [[3], [4], [200]], [[6], [7]]],
]


@pytest.mark.parametrize("options", [{}, {"neighbours": 1, "summary": "study"}], ids=str)
def test_compiles_whole_and_only_once(options):
    torch._dynamo.reset()
    model = Two(**options)
    counter, once = CompileCounterWithBackend("aot_eager"), None
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for i, lengths in enumerate(BATCHES):
        layout = make(lengths, 2, 16)
        layout.pattern("slice", **options)
        x = torch.randn(layout.num_rows, 32, requires_grad=True)
        expected, got = model(x * 1, layout), compiled(x * 1, layout)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        a, b = (torch.autograd.grad(sum(t.square().sum() for t in out), x)[0] for out in (expected, got))
        assert relative(b, a) < 1e-5
        once = once or counter.frame_count
        assert counter.frame_count == once, f"compiled again for batch {i}"


def test_an_unbuilt_pattern_says_so_under_compile():
    torch._dynamo.reset()
    layer = HierarchicalAttention(32, 2, neighbours=2)
    layout = make(RAGGED, 1)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="layout.pattern"):
        compiled(torch.randn(layout.num_rows, 32), layout, "slice")
    layout.pattern("slice", neighbours=2)
    torch._dynamo.reset()
    compiled(torch.randn(layout.num_rows, 32), layout, "slice")
