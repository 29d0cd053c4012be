"""The code of "Coming from elsewhere" in docs/layout.md, run as it stands, against torch's attention on the padded batch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hlip_kernels import HierarchicalAttention

PAGE = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Coming from elsewhere\n")[1].split("\n## ")[0]
IMPORTS, PADDED, PREFIXED, VARLEN, NESTED = [
    code
    for block in SECTION.split("```python\n")[1:]
    for code in block.split("```")[0].split("\n\n")  # the first block is the imports and the code
]
LENGTHS = [5, 9, 1, 2]
MASKS = {
    "right": torch.arange(9) < torch.tensor(LENGTHS)[:, None],
    "left": torch.arange(9) >= 9 - torch.tensor(LENGTHS)[:, None],
    "holes": torch.arange(4 * 9).view(4, 9) % 5 != 1,
    "an empty sequence": torch.arange(9) < torch.tensor([5, 0, 9, 0])[:, None],
}


def run(code, **names):
    exec(compile(IMPORTS, "docs/layout.md", "exec"), names)
    exec(compile(code, "docs/layout.md", "exec"), names)
    return names


def padded_attention(layer, x, mask):
    """What the layer does, written with torch's attention on the padded batch."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    return layer.proj(out.transpose(1, 2).flatten(2))


def assert_same(got, expected, x, mask):
    """Results of the rows that are there, and gradients through them."""
    weights = torch.linspace(1, 2, expected[mask].numel()).view(-1, expected.shape[-1])
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad((out[mask].sin() * weights).sum(), x, retain_graph=True)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.fixture
def layer():
    return HierarchicalAttention(32, 2, qkv_bias=True)


@pytest.fixture
def x():
    return torch.randn(4, 9, 32, requires_grad=True)


@pytest.mark.parametrize("name", MASKS)
def test_a_padded_batch(layer, x, name):
    mask = MASKS[name]
    padded = run(PADDED, x=x, mask=mask, layer=layer)["padded"]
    assert not padded[~mask].any()
    assert_same(padded, padded_attention(layer, x, mask), x, mask)


@pytest.mark.parametrize("name", ["right", "with holes"])
def test_a_padded_batch_with_a_class_token(layer, x, name):
    mask = MASKS["right"] if name == "right" else MASKS["holes"] | (torch.arange(9) == 0)
    names = run(PREFIXED, x=x, mask=mask, layer=layer)
    assert names["rows"].shape == (mask.sum(), 32)
    assert not names["padded"][~mask].any()
    assert_same(names["padded"], padded_attention(layer, x, mask), x, mask)
    # The code before it, where the class token is a token like any other, gives the same.
    assert_same(run(PADDED, x=x, mask=mask, layer=layer)["padded"], names["padded"], x, mask)


@pytest.mark.parametrize("name", MASKS)
def test_variable_lengths_of_flash_attention(x, name):
    mask = MASKS[name]
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)  # as unpad_input makes them
    q, k, v = x.view(4, 9, 2, 16), x.view(4, 9, 2, 16) * 2, x.view(4, 9, 2, 16).cos()
    out = run(VARLEN, q=q[mask], k=k[mask], v=v[mask], cu_seqlens=cu_seqlens)["out"]
    dense = [t.transpose(1, 2) for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*dense, attn_mask=mask[:, None, None, :]).transpose(1, 2)
    torch.testing.assert_close(out, expected[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layer, x):
    nested = torch.nested.nested_tensor_from_jagged(x[MASKS["right"]], F.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)))
    result = run(NESTED, nested=nested, layer=layer)["nested"]
    expected = padded_attention(layer, x, MASKS["right"])
    assert_same(result.to_padded_tensor(0.0)[:, :9], expected, x, MASKS["right"])
    (nested + result).values()  # they are of one raggedness: torch adds them
    hollow = torch.nested.narrow(x, 1, torch.zeros(4, dtype=torch.int64), torch.tensor(LENGTHS), layout=torch.jagged)
    result = run(NESTED, nested=hollow.contiguous(), layer=layer)["nested"]
    torch.testing.assert_close(result.values(), expected[MASKS["right"]], rtol=1e-5, atol=1e-6)
