"""``HierarchicalAttention``: timm's weights and results, packed rows, compilation without breaks or recompilation."""

import inspect
from functools import partial
from pathlib import Path

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


def rope_of(grids, head_dim):
    """Rotary positions of patches as timm makes them, one grid after the other: ``(T, 2 * head_dim)``."""
    layers = pytest.importorskip("timm.layers")
    made = layers.RotaryEmbeddingCat(head_dim, in_pixels=False)
    return torch.cat([made.get_embed(list(grid)) for grid in grids])


def rotary_in_timm(**options):
    """timm's layer with rotary positions, for two tokens in front that do not turn, and ours with its weights."""
    layers = pytest.importorskip("timm.layers")
    theirs = layers.AttentionRope(48, num_heads=3, num_prefix_tokens=2, **options)
    ours = HierarchicalAttention(48, num_heads=3, qkv_bias=True, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "norm_layer": torch.nn.LayerNorm}], ids=str)
def test_rotary_positions_are_timms(options):
    theirs, ours = rotary_in_timm(**options)
    layout = Layout.from_lengths([12, 12, 12], num_prefix=2)
    rope = torch.randn(12, 2 * 16).requires_grad_()  # any table: sines of one angle need not be those of its neighbour
    x = torch.randn(3, 14, 48, requires_grad=True)
    expected, got = theirs(x, rope), ours(x, rope=rope)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(expected, theirs, got, ours, x)
    a, b = (torch.autograd.grad(y.square().sum(), rope)[0] for y in (theirs(x, rope), ours(x, rope=rope)))
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    assert relative(expected, theirs(x)) > 0.01
    # The same as packed rows: patches first, the tokens that were in front in the tail.
    rows = torch.cat([x[:, 2:].flatten(0, 1), x[:, :2].flatten(0, 1)])
    packed = ours(rows, layout, "segment", rope=rope.repeat(3, 1))
    torch.testing.assert_close(packed[:36].view(3, 12, 48), expected[:, 2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[36:42].view(3, 2, 48), expected[:, :2], rtol=1e-5, atol=1e-6)


def test_rotary_positions_made_by_timm_for_ragged_grids():
    """Every segment has its own grid."""
    grids = [(3, 4), (2, 2), (5, 1)]
    rope = rope_of(grids, 16)
    theirs, ours = rotary_in_timm()
    layout = Layout.from_lengths([h * w for h, w in grids], num_prefix=2)
    x = torch.randn(layout.num_rows, 48)
    out, first = ours(x, layout, "segment", rope=rope), 0
    for i, (h, w) in enumerate(grids):
        prefix = x[layout.num_tokens + 2 * i :][:2]
        dense = torch.cat([prefix, x[first : first + h * w]])[None]
        expected = theirs(dense, rope[first : first + h * w])[0, 2:]
        torch.testing.assert_close(out[first : first + h * w], expected, rtol=1e-5, atol=1e-6)
        first += h * w
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(x, layout, "segment", rope=rope)
    assert half.dtype == torch.bfloat16 and relative(half, out) < 0.02


def test_the_documented_lines_run():
    pytest.importorskip("timm.layers")
    page = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "RotaryEmbeddingCat" in block]
    names = {}
    exec(compile(code, "layout.md", "exec"), names)
    layout, rope, x = names["layout"], names["rope"], names["x"]
    assert rope.shape == (layout.num_tokens, 128) and x.shape == (layout.num_rows, 768)
    first, last = rope[: 14 * 14], rope[7 * 14 * 14 :][: 14 * 14]
    assert torch.equal(first, last)  # of one scan, slice by slice
    assert not torch.equal(names["layer"](x, layout, "slice", rope=rope), names["layer"](x, layout, "slice"))


class Wide(torch.nn.LayerNorm):
    """Answers in float32, as under autocast on a GPU."""

    def forward(self, x):
        return super().forward(x.float())


def test_what_norms_give_is_turned_before_it_is_rounded():
    options = {"qk_norm": True, "norm_layer": partial(Wide, dtype=torch.float32)}
    theirs, ours = rotary_in_timm(**options)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    for layer in (theirs, ours):
        layer.q_norm.float(), layer.k_norm.float()
    x, rope = torch.randn(3, 14, 48, dtype=torch.bfloat16), rope_of([(3, 4)], 16)
    assert torch.equal(ours(x, rope=rope), theirs(x, rope))


@pytest.mark.parametrize(
    "rope, message",
    [
        (torch.zeros(10, 16), "a row of 16 .* for each patch .there are 12., got torch.float32 of shape .10, 16."),
        (torch.zeros(12, 8), "a row of 16 floating-point numbers"),
        (torch.zeros(12, 16, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(12, 16, device="meta"), "rope is on meta, the rows are on cpu"),
    ],
)  # fmt: skip
def test_bad_rotary_positions_are_named(rope, message):
    layer, layout = HierarchicalAttention(16, 2), Layout.from_lengths([7, 5], num_prefix=1)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(layout.num_rows, 16), layout, "segment", rope=rope)
    with pytest.raises(ValueError, match="each token, or for the last ones .there are 9."):
        layer(torch.randn(2, 9, 16), rope=torch.zeros(10, 16))
    with pytest.raises(ValueError, match="even head dim"):
        HierarchicalAttention(15, 5)(torch.randn(2, 9, 15), rope=torch.zeros(9, 6))


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
    with pytest.raises(TypeError, match="pass a mask or rotary positions by keyword"):
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
    for name, value in (("neighbours", 1.5), ("neighbours", "1"), ("backend", "fastest"), ("summary", 2)):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be .* got {value!r}"):
            HierarchicalAttention(16, 2, **{name: value})
    for shape in ({"dim": 0}, {"dim": 16, "attn_head_dim": 0}):
        with pytest.raises(ValueError, match="head dim must be 1 or more"):
            HierarchicalAttention(num_heads=2, **shape)
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

    def forward(self, x, layout, rope):
        x = x + self.a(x, layout, "slice", rope=rope)
        x = switch_level(x, layout, "slice", "study")
        x = x + self.b(x, layout, "study", rope=rope)
        return x, segment_mean(x, layout, "study")


BATCHES = [
    [[[5, 3], [17]], [[2, 9, 4]]],
    [[[7, 3], [16]], [[2, 8, 4], [3]]],
    RAGGED,
    [[[64] * 3] * 2] * 5,
    [[[12, 5]], [[3], [4], [200]], [[6], [7]]],
]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("options", [{}, {"neighbours": 1, "summary": "study"}], ids=str)
def test_compiles_whole_and_only_once(options, rotary):
    torch._dynamo.reset()
    model = Two(**options)
    counter, once = CompileCounterWithBackend("aot_eager"), None
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for i, lengths in enumerate(BATCHES):
        layout = make(lengths, 2, 16)
        layout.pattern("slice", **options)
        x = torch.randn(layout.num_rows, 32, requires_grad=True)
        rope = torch.randn(layout.num_tokens, 32) if rotary else None
        expected, got = model(x * 1, layout, rope), compiled(x * 1, layout, rope)
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
