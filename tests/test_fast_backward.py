"""What a caller may allow the Triton backend: a backward pass that adds in any order, and TF32 products.

In triton's interpreter, which runs programs one after the other: the order of additions is always the same here. TF32 operands
are rounded in the kernels themselves, so the interpreter shows TF32's errors.
"""

import pytest
import torch
from attention_truth import (
    HEAD_DIMS,
    LEVELS,
    PREFIXES,
    RAGGED,
    make,
    naive_attention,
    naive_mask,
    ragged_lengths,
    relative,
    sdpa_by_segment,
)
from hypothesis import given
from hypothesis import strategies as st

from hlip_kernels import HierarchicalAttention, attention, warmup
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends import triton as triton_backend
from hlip_kernels.backends.triton import config
from hlip_kernels.pattern import Plan

pytestmark = pytest.mark.skipif(
    not BACKENDS["triton"].supports(Query("cpu", None, torch.float32, 64)), reason="TRITON_INTERPRET=1 is not set"
)

# (dtype, allow_tf32) that have a fast backward pass.
KINDS = [(torch.float16, False), (torch.float32, True)]
KIND_IDS = ["float16", "tfloat32"]
FEW = [[[40, 0, 65]], [[3]]]  # enough where an error is not measured, but results are compared
DETERMINISTIC = ["attention_backward_dq", "attention_backward_dkdv"]
FAST = ["attention_backward_delta", "attention_backward_fused"]
PATTERNS = [
    ("slice", {"neighbours": 1}),
    ("scan", {"neighbours": 2}),
    ("slice", {"summary": "scan"}),
    ("scan", {"summary": "study"}),
    ("slice", {"neighbours": 2, "summary": "study"}),
]


@pytest.fixture(autouse=True)
def any_length(monkeypatch):
    """The fast backward pass however few keys a row sees."""
    monkeypatch.setattr(config, "FUSED_FROM", 0)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched, in order."""
    from hlip_kernels.backends.triton import fused_backward, kernels

    names = []

    class Noting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            names.append(self.kernel.__name__)
            return self.kernel[grid]

    for module in (kernels, fused_backward):
        for name in config.KERNELS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Noting(getattr(module, name)))
    return names


def fast(q, k, v, layout, level, allow_tf32, **options):
    return attention(q, k, v, layout, level, backend="triton", deterministic=False, allow_tf32=allow_tf32, **options)


def to_tf32(x):
    """``x`` rounded to TF32, to nearest."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


class Tf32Product(torch.autograd.Function):
    """A matrix product in TF32, and the two of its gradient."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(to_tf32(a), to_tf32(b))
        return to_tf32(a) @ to_tf32(b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return to_tf32(grad) @ b.transpose(-1, -2), a.transpose(-1, -2) @ to_tf32(grad)


def tf32_attention(q, k, v, mask):
    """The yardstick of TF32: what torch's own ("math") attention computes where its matrix products are in TF32."""
    scale = q.shape[-1] ** -0.25
    q, k, v = (t.transpose(0, 1) for t in (q * scale, k * scale, v))
    logits = Tf32Product.apply(q, k.transpose(1, 2)).masked_fill(~mask, float("-inf"))
    logits = torch.where(mask.any(1)[:, None], logits, torch.zeros_like(logits))
    return (Tf32Product.apply(torch.softmax(logits, -1), v) * mask.any(1)[:, None]).transpose(0, 1)


def check(kind, lengths, num_prefix, level, heads, head_dim, scale_of_logits=1.0, deterministic=False, **options):
    """Error of output and gradients at most twice that of torch's attention with the same products; 0 in dead rows."""
    dtype, allow_tf32 = kind
    layout = make(lengths, num_prefix)
    mask = naive_mask(lengths, num_prefix, layout.num_rows, level, **options)
    inputs = [torch.randn(layout.num_rows, heads, head_dim).mul(s).to(dtype) for s in (scale_of_logits, 1, 1)]
    weight = torch.randn(layout.num_rows, heads, head_dim).to(dtype)
    found = []
    for run, exact in (
        (lambda *qkv: naive_attention(*qkv, mask)[0], True),
        (lambda *qkv: attention(*qkv, layout, level, backend="triton", deterministic=deterministic, allow_tf32=allow_tf32,
                                **options), False),
        (lambda *qkv: (tf32_attention if allow_tf32 else sdpa_by_segment)(*qkv, mask), False),
    ):  # fmt: skip
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in inputs]
        out = run(*leaves)
        grads = torch.autograd.grad(out, leaves, weight.to(out.dtype)) if layout.num_rows else leaves
        found.append([t.detach() for t in (out, *grads)])
    rounding = 2.0**-10 if allow_tf32 else torch.finfo(dtype).eps
    for name, right, got, torchs in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        # Rows that see one key alone: the gradients of logits cancel to 0, up to a rounding of what cancels (of dv's size).
        floor = 0.25 * rounding if right.any() else 4 * rounding * float(found[0][3].norm())
        assert relative(got, right) <= 2 * relative(torchs, right) + floor, name
    dead = slice(layout.prefix_rows(level).stop, None)
    assert all(not t[dead].any() for t in found[1])


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@given(lengths=ragged_lengths(), num_prefix=st.sampled_from(PREFIXES), level=st.sampled_from(LEVELS),
       head_dim=st.sampled_from((16, 32)))  # fmt: skip
def test_error_on_ragged_layouts(kind, lengths, num_prefix, level, head_dim):
    check(kind, lengths, num_prefix, level, 2, head_dim)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@given(lengths=ragged_lengths(300), num_prefix=st.sampled_from((1, 2, 5)), pattern=st.sampled_from(PATTERNS))
def test_error_of_patterns_on_ragged_layouts(kind, lengths, num_prefix, pattern):
    level, options = pattern
    check(kind, lengths, num_prefix, level, 2, 16, **options)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_error_for_every_head_dim(kind, head_dim):
    check(kind, RAGGED, 2, "scan", 1, head_dim)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_of_tf32_in_the_deterministic_backward_pass(head_dim):
    check((torch.float32, True), RAGGED, 2, "study", 1, head_dim, deterministic=True)


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_error_with_logits_of_hundreds(kind):
    check(kind, RAGGED, 1, "scan", 2, 64, 150.0)


@pytest.mark.parametrize("deterministic", [True, False])
def test_tf32_operands_are_rounded_to_nearest(deterministic):
    """With one row a segment the output is v, and dV the output's gradient, each rounded once."""
    layout = make([[[1] * 40]], 0)
    q, k, v, g = (torch.randn(layout.num_rows, 1, 16) * 10.0 ** torch.randint(-30, 30, (40, 1, 1)) for _ in range(4))
    q, k = q.zero_(), k.zero_()
    v[0, 0, :4] = torch.tensor(
        [1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, 3.4028e38]
    )  # half-way cases, and one that overflows
    v.requires_grad_()
    out = attention(q, k, v, layout, "slice", backend="triton", allow_tf32=True, deterministic=deterministic)
    assert torch.equal(out, to_tf32(v.detach()))
    assert out[0, 0, :4].tolist() == [1 + 2**-10, 1, -1 - 2**-10, float("inf")]
    assert torch.equal(torch.autograd.grad(out, v, g)[0], to_tf32(g))


@pytest.mark.parametrize("deterministic", [True, False])
def test_every_operand_of_every_tf32_product_is_rounded(deterministic):
    """The kernels' formulas, in float64 but for those roundings. Left out, one alone would show as 2e-4; on a GPU it would be a
    truncation, which is worse."""
    layout = make([[[16]]], 0)  # one tile of keys for every kernel: p is relative to the maximum of its row
    q, k, v, g = (torch.randn(16, 1, 32) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, layout, "slice", backend="triton", deterministic=deterministic, allow_tf32=True,
                         return_lse=True)  # fmt: skip
    grads = torch.autograd.grad(out, leaves, g)
    with torch.no_grad():
        delta = (g.double() * out).sum(-1)
        q, k, v, g = (to_tf32(t)[:, 0].double() for t in (q, k, v, g))
        logits = q @ k.T * 32**-0.5
        p = (logits - logits.amax(1, keepdim=True)).exp()
        expected = [(to_tf32(p.float()).double() @ v) / p.sum(1, keepdim=True)]
        p = (logits - lse[0].double()[:, None]).exp()
        ds = to_tf32((p * (g @ v.T - delta)).float()).double()
        expected += [ds @ k * 32**-0.5, ds.T @ q * 32**-0.5, to_tf32(p.float()).double().T @ g]
    for got, right in zip((out, *grads), expected, strict=True):
        assert relative(got[:, 0], right) < 5e-5  # room for a few that round the other way


@pytest.mark.parametrize("bad", [0x7F800000, 0x7FFFFFFF, 0x7FC00000, -1, -0x800000], ids=hex)
def test_nan_and_inf_survive_the_rounding(bad):
    layout = make([[[1] * 8]], 0)
    v = torch.randn(8, 1, 16)
    v[3] = torch.tensor(bad, dtype=torch.int32).view(torch.float32)
    out = attention(torch.zeros(8, 1, 16), torch.zeros(8, 1, 16), v, layout, "slice", backend="triton", allow_tf32=True)
    assert torch.equal(out.isnan(), v.isnan()) and torch.equal(out.isinf(), v.isinf())
    assert torch.equal(out.signbit()[v.isinf()], v.signbit()[v.isinf()])


def results(qkv, layout, level, weight, **options):
    leaf = qkv.clone().requires_grad_()
    out, lse = attention(*leaf.unbind(1), layout, level, backend="triton", return_lse=True, **options)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaf, weight)[0]


def test_tf32_changes_float32_alone():
    layout = make(FEW, 2)
    for dtype in (torch.float16, torch.float32):
        qkv, weight = torch.randn(layout.num_rows, 3, 2, 32).to(dtype), torch.randn(layout.num_rows, 2, 32).to(dtype)
        for deterministic in (True, False):
            options = {"deterministic": deterministic}
            plain, allowed = (results(qkv, layout, "scan", weight, allow_tf32=tf32, **options) for tf32 in (False, True))
            for a, b in zip(plain, allowed, strict=True):
                if dtype == torch.float16:
                    assert torch.equal(a, b)
                elif a is not plain[1]:  # other tiles alone would differ by 1e-7
                    assert 1e-4 < relative(b, a) < 2e-3


@pytest.mark.parametrize("has_tf32", [True, False])
def test_gpus_without_tf32_products_multiply_in_float32(monkeypatch, has_tf32):
    monkeypatch.setattr(triton_backend, "has_tf32", lambda device: has_tf32)
    layout = make(FEW, 2)
    qkv, weight = torch.randn(layout.num_rows, 3, 2, 16), torch.randn(layout.num_rows, 2, 16)
    plain, allowed = (results(qkv, layout, "scan", weight, allow_tf32=tf32) for tf32 in (False, True))
    assert torch.equal(plain[2], allowed[2]) == (not has_tf32)


def test_which_gpus_have_tf32_products(monkeypatch):
    class Properties:
        gcnArchName = "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    has_tf32 = config.has_tf32.__wrapped__
    assert has_tf32(torch.device("cuda", 0)) and has_tf32(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert has_tf32(torch.device("cuda", 0))
    Properties.gcnArchName = "gfx950"
    assert not has_tf32(torch.device("cuda", 0))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("options", [{}, {"neighbours": 1, "summary": "study"}], ids=str)
def test_gradient_through_the_log_sum_exp(kind, options):
    dtype, allow_tf32 = kind
    layout = make(RAGGED, 2, row_multiple=32)
    mask = naive_mask(RAGGED, 2, layout.num_rows, "slice", **options)
    leaf = torch.randn(layout.num_rows, 3, 2, 32).to(dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    weight = torch.randn(layout.num_rows, 2).T  # strided
    out, lse = fast(*leaf.unbind(1), layout, "slice", allow_tf32, return_lse=True, **options)
    true_out, true_lse = naive_attention(*exact.unbind(1), mask)
    for loss, true_loss in (
        ((lse * weight).sum(), (true_lse * weight).sum()),
        ((lse * weight).sum() + out.float().square().sum(), (true_lse * weight).sum() + true_out.square().sum()),
    ):
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (true_grad,) = torch.autograd.grad(true_loss, exact, retain_graph=True)
        # Two roundings of 11 bits: of the probabilities' gradients, and of the result or the operands.
        assert relative(grad, true_grad) < 2.0**-10


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_segment(kind, bad):
    dtype, allow_tf32 = kind
    layout = make(RAGGED, 2)
    mask = naive_mask(RAGGED, 2, layout.num_rows, "scan")
    qkv, weight = torch.randn(layout.num_rows, 3, 2, 32).to(dtype), torch.randn(layout.num_rows, 2, 32).to(dtype)
    options = {"deterministic": False, "allow_tf32": allow_tf32}
    *_, clean = results(qkv, layout, "scan", weight, **options)
    qkv[90] = bad  # inside the first scan of the third study
    weight[95] = bad
    *_, dirty = results(qkv, layout, "scan", weight, **options)
    apart = ~mask[90]
    assert 0 < apart.sum() < layout.num_rows
    assert torch.equal(clean[apart], dirty[apart]) and dirty[~apart].isnan().any()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_nan_stays_in_its_head(kind):
    """The columns that pad a head dim lie in the next head: zeros added there are none where there is a NaN."""
    dtype, allow_tf32 = kind
    layout = make(RAGGED, 2)
    qkv, weight = torch.randn(layout.num_rows, 3, 3, 24).to(dtype), torch.randn(layout.num_rows, 3, 24).to(dtype)
    options = {"deterministic": False, "allow_tf32": allow_tf32}
    *_, clean = results(qkv, layout, "scan", weight, **options)
    qkv[90, :, 1] = float("nan")
    *_, dirty = results(qkv, layout, "scan", weight, **options)
    assert torch.equal(clean[:, :, ::2], dirty[:, :, ::2]) and dirty[:, :, 1].isnan().any()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_large_negative_logits_do_not_overflow_past_the_end_of_a_tile(kind):
    """Keys past the end have logit 0: with all others at -100 their probabilities would be Inf, were they not masked."""
    dtype, allow_tf32 = kind
    lengths = [[[33, 5]]]
    layout = make(lengths, 1)
    q, k, v, weight = (torch.randn(layout.num_rows, 1, 16).to(dtype) for _ in range(4))
    q[..., 0], k[..., 0] = 10, -10
    leaves = [t.requires_grad_() for t in (q * 0.5, k, v)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    mask = naive_mask(lengths, 1, layout.num_rows, "slice")
    grads = torch.autograd.grad(fast(*leaves, layout, "slice", allow_tf32, scale=2.0), leaves, weight)
    true_grads = torch.autograd.grad(naive_attention(*exact, mask, scale=2.0)[0], exact, weight.double())
    # What is left of the 10 after gradients of logits have cancelled is an error of some roundings.
    assert all(relative(a, b) < 1e-2 for a, b in zip(grads, true_grads, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("level, options", [("scan", {}), ("study", {}), ("slice", {"summary": "study"})], ids=str)
def test_memory_nobody_wrote_is_never_read(kind, level, options, monkeypatch):
    # Not the fixture of the other tests: that switches deterministic algorithms on, and with them the fast pass off.
    dtype, allow_tf32 = kind
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    layout = make(RAGGED, 2, row_multiple=64)
    dead = slice(layout.prefix_rows(level).stop, None)
    qkv, weight = torch.randn(layout.num_rows, 3, 2, 24).to(dtype), torch.randn(layout.num_rows, 2, 24).to(dtype)
    qkv[dead], weight[dead] = float("nan"), float("nan")
    out, lse, grad = results(qkv, layout, level, weight, deterministic=False, allow_tf32=allow_tf32, **options)
    assert out.isfinite().all() and lse.isfinite().all() and grad.isfinite().all()
    assert dead.start < layout.num_rows and not out[dead].any() and not lse[:, dead].any() and not grad[dead].any()


@pytest.mark.parametrize("kind", KINDS, ids=KIND_IDS)
def test_strides_do_not_matter(kind):
    dtype, allow_tf32 = kind
    layout = make(FEW, 1)
    plain = [torch.randn(layout.num_rows, 2, 32).to(dtype) for _ in range(3)]
    weight = torch.randn(2, 32, layout.num_rows).to(dtype).permute(2, 0, 1)
    packed = torch.stack(plain, dim=1).unbind(1)
    head_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain]
    padded = [torch.nn.functional.pad(t, (0, 8))[..., :32] for t in plain]
    found = []
    for views in (plain, packed, head_first, padded):
        leaves = [t.detach().requires_grad_() for t in views]
        out = fast(*leaves, layout, "scan", allow_tf32)
        found += [torch.autograd.grad(out, leaves, g, retain_graph=True) for g in (weight, weight.contiguous())]
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))


@pytest.mark.parametrize("dtype, allow_tf32, head_dim, backward", [
    (torch.float16, False, 64, FAST),
    (torch.float16, False, 128, FAST),
    (torch.float16, False, 256, DETERMINISTIC),  # tiles that spill: no entry in the table
    (torch.float32, True, 64, FAST),
    (torch.float32, True, 128, DETERMINISTIC),
    (torch.float32, False, 64, DETERMINISTIC),  # renormalised
])  # fmt: skip
def test_which_kernels_run(launched, dtype, allow_tf32, head_dim, backward):
    layout = make([[[3, 20]]], 1)
    leaf = torch.randn(layout.num_rows, 3, 1, head_dim).to(dtype).requires_grad_()
    out = fast(*leaf.unbind(1), layout, "slice", allow_tf32)
    assert launched == ["attention_forward"]
    grad = torch.autograd.grad(out, leaf, torch.ones_like(out))[0]
    assert launched[1:] == backward
    if backward == DETERMINISTIC:
        out = attention(*leaf.unbind(1), layout, "slice", backend="triton", allow_tf32=allow_tf32)
        assert torch.equal(grad, torch.autograd.grad(out, leaf, torch.ones_like(out))[0])


def backward_of(launched, layout, level, **options):
    launched.clear()
    qkv = torch.randn(layout.num_rows, 3, 1, 16, dtype=torch.float16, requires_grad=True)
    attention(*qkv.unbind(1), layout, level, backend="triton", **options).sum().backward()
    return launched[1:]


def test_the_fast_pass_has_to_be_allowed(launched):
    layout = make(RAGGED, 1)
    assert backward_of(launched, layout, "scan") == DETERMINISTIC
    assert backward_of(launched, layout, "scan", deterministic=False) == FAST
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert backward_of(launched, layout, "scan", deterministic=False) == DETERMINISTIC
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_fast_pass_is_for_rows_that_see_many(launched, monkeypatch):
    monkeypatch.setattr(config, "FUSED_FROM", 164)
    layout = make(RAGGED, 2)
    assert Plan.of(layout.pattern("scan")).longest == 163 and Plan.of(layout.pattern("study")).longest == 293
    assert backward_of(launched, layout, "scan", deterministic=False) == DETERMINISTIC
    assert backward_of(launched, layout, "study", deterministic=False) == FAST


@pytest.mark.parametrize("lengths, num_prefix, row_multiple",
                         [([], 0, 1), ([], 2, 1), ([[]], 1, 8), ([[[]], [[0, 0]]], 0, 1), ([[[0, 0], [0]], []], 0, 16),
                          ([[[0]]], 3, 4)], ids=str)  # fmt: skip
def test_emptiness(launched, lengths, num_prefix, row_multiple):
    layout = make(lengths, num_prefix, row_multiple)
    for level in LEVELS:
        launched.clear()
        qkv = torch.randn(layout.num_rows, 3, 2, 32).half().requires_grad_()
        out = fast(*qkv.unbind(1), layout, level, False)
        (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
        assert grad.isfinite().all() and not grad[layout.prefix_rows(level).stop :].any()
        assert launched == (["attention_forward", *FAST] if layout.num_rows else [])


def test_layer_and_warmup_pass_the_options_on(launched):
    layout = make(RAGGED, 1)
    warmup([layout], heads=2, head_dim=16, levels=["scan"], backend="triton", deterministic=False, allow_tf32=True)
    assert launched == ["attention_forward", *FAST]
    built = set(Plan.of(layout.pattern("scan"))._tiles)
    launched.clear()
    layer = HierarchicalAttention(32, 2, backend="triton", deterministic=False, allow_tf32=True)
    x = torch.randn(layout.num_rows, 32, requires_grad=True)
    layer(x, layout, "scan").sum().backward()
    assert launched == ["attention_forward", *FAST] and set(Plan.of(layout.pattern("scan"))._tiles) == built
