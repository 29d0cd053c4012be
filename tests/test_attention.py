"""Attention against a naive float64 truth: every backend, level, pattern, head dim and gradient.

The cuda backend is the emulated one here (tests/emulated_attention.py): the kernels' own source, on the CPU.
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
from emulated_attention import EmulatedCudaBackend
from emulation import compiler, cuda_include
from hypothesis import assume, given
from hypothesis import strategies as st

from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends import triton as triton_backend
from hlip_kernels.pattern import Plan

HERE = BACKENDS | {"cuda": EmulatedCudaBackend()}
KINDS = [
    (name, dtype)
    for name in HERE
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if HERE[name].supports(Query("cpu", None, dtype, 64))
]
KIND_IDS = [f"{name}-{str(dtype).removeprefix('torch.')}" for name, dtype in KINDS]
FAST = [kind for kind in KINDS if kind[0] != "triton"]
ANY_PATTERN = [kind for kind in FAST if HERE[kind[0]].supports(Query("cpu", None, kind[1], 16, sees_itself=False))]
needs_interpreter = pytest.mark.skipif(
    not BACKENDS["triton"].supports(Query("cpu", None, torch.float32, 64)), reason="TRITON_INTERPRET=1 is not set"
)
# RAGGED with every study short enough for a backend that holds segments whole.
SHORTER = [[[5, 0, 17], [64, 1]], [], [[100], [], [33, 29, 40]], [[0]]]
# What a backend may say no to; test_nothing_else_is_left_out holds it to this.
PARTIAL = {"cuda": "no neighbours, no summary"}


@pytest.fixture(autouse=True)
def emulated_cuda(request, monkeypatch):
    """Puts the emulated backend in the place of the real one, for the tests that are about it."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("backend") == "cuda":
        compiler()  # skips here, with the reason, where there is none
        cuda_include()
        monkeypatch.setitem(BACKENDS, "cuda", HERE["cuda"])


def support(backend, dtype, lengths, num_prefix, level, head_dim, **options):
    plan = Plan.of(make(lengths, num_prefix).pattern(level, **options))
    return HERE[backend].supports(Query("cpu", None, dtype, head_dim, plan.longest, plan.sees_itself))


def ragged_for(backend, dtype, num_prefix, level, head_dim, **options):
    """RAGGED, or SHORTER for a backend with a limit on segments; skips, with the backend's reason, if it takes neither."""
    for lengths in (RAGGED, SHORTER):
        answer = support(backend, dtype, lengths, num_prefix, level, head_dim, **options)
        if answer:
            return lengths
    pytest.skip(f"{backend} {answer.reason}")


def test_nothing_else_is_left_out():
    """The tests below skip what a backend does not support: that must be no more than this."""
    for backend, dtype in KINDS:
        dims = [32, 64, 80, 96, 128] if backend == "cuda" else HEAD_DIMS
        for level in LEVELS:
            for head_dim in HEAD_DIMS:
                answer = support(backend, dtype, SHORTER, 2, level, head_dim)
                assert bool(answer) == (head_dim in dims), answer
        for level, options in PATTERNS:
            answer = support(backend, dtype, SHORTER, 2, level, 32, **options)
            assert answer or PARTIAL[backend] in answer.reason
    assert {dtype for backend, dtype in KINDS if backend == "cuda"} == {torch.float16, torch.bfloat16}


def errors(backend, dtype, lengths, num_prefix, level, heads, head_dim, scale_of_logits=1.0, scale=None, **options):
    """(output, gradient of q, k, v) errors of a backend, and of torch's SDPA in the same dtype, against float64."""
    layout = make(lengths, num_prefix)
    rows = layout.num_rows
    mask = naive_mask(lengths, num_prefix, rows, level, **options)
    inputs = [torch.randn(rows, heads, head_dim).mul(s).to(dtype) for s in (scale_of_logits, 1, 1)]
    weight = torch.randn(rows, heads, head_dim).to(dtype)
    found = []
    for run in (
        lambda q, k, v: naive_attention(q, k, v, mask, scale)[0],
        lambda q, k, v: attention(q, k, v, layout, level, backend=backend, scale=scale, **options),
        lambda q, k, v: sdpa_by_segment(q, k, v, mask, scale),
    ):
        truth = not found
        leaves = [t.double() if truth else t.clone() for t in inputs]
        leaves = [t.requires_grad_() for t in leaves]
        out = run(*leaves)
        grads = torch.autograd.grad(out, leaves, weight.to(out.dtype)) if rows else leaves
        found.append((out.detach(), *(g.detach() for g in grads)))
    truth, got, torchs = found
    return (
        layout,
        got,
        truth,
        [relative(a, b) for a, b in zip(got, truth, strict=True)],
        [relative(a, b) for a, b in zip(torchs, truth, strict=True)],
    )


def check(backend, dtype, *case, **options):
    layout, got, truth, mine, torchs = errors(backend, dtype, *case, **options)
    # Twice torch's own error; where torch happens to be exact (one key, say) the error of rounding the result once.
    for name, right, error, bound in zip(("out", "dq", "dk", "dv"), truth, mine, torchs, strict=True):
        if not right.any():
            # Rows that see one key alone: the gradients of logits cancel to 0, up to a rounding of what cancels (of dv's size).
            floor = 4 * torch.finfo(dtype).eps * float(truth[3].norm())
        else:
            floor = 0.25 * torch.finfo(dtype).eps
            sums = torch.finfo(torch.float32)  # in which all dtypes here are summed
            if right.abs().max() < sums.smallest_normal:
                # Subnormal (a scale of 1e-40): each of a row's terms, 130 at most, may be off by half of the least float32.
                # Torch itself rounds terms or their sum, by the CPU it runs on.
                floor += 0.5 * sums.smallest_normal * sums.eps * 130**0.5 / float(right.square().mean().sqrt())
        assert error <= 2 * bound + floor, f"{name}: {error:.2e} against {bound:.2e} of torch"
    dead = slice(layout.prefix_rows(case[2]).stop, None)
    assert all(not t[dead].any() for t in got)


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
@given(lengths=ragged_lengths(), num_prefix=st.sampled_from(PREFIXES), level=st.sampled_from(LEVELS),
       small=st.booleans())  # fmt: skip
def test_error_on_ragged_layouts(backend, dtype, lengths, num_prefix, level, small):
    dims = [d for d in HEAD_DIMS if d in (16, 32, 64) and HERE[backend].supports(Query("cpu", None, dtype, d))]
    head_dim = dims[0 if small else 1]
    assume(support(backend, dtype, lengths, num_prefix, level, head_dim))  # the length of segments has a limit
    check(backend, dtype, lengths, num_prefix, level, 2, head_dim)


def with_head_dims(backend):
    """Every head dim with every level; interpreted, which is slow, each with one of them."""
    turn = {d: LEVELS[i % len(LEVELS)] for i, d in enumerate(HEAD_DIMS)}
    return [(level, d) for level in LEVELS for d in HEAD_DIMS if backend != "triton" or turn[d] == level]


@pytest.mark.parametrize("backend, dtype, level, head_dim", [
    pytest.param(*kind, *place, id="-".join(map(str, (kind_id, *place))))
    for kind, kind_id in zip(KINDS, KIND_IDS, strict=True) for place in with_head_dims(kind[0])
])  # fmt: skip
def test_error_for_every_head_dim(backend, dtype, level, head_dim):
    check(backend, dtype, ragged_for(backend, dtype, 2, level, head_dim), 2, level, 1, head_dim)


PATTERNS = [
    ("slice", {"neighbours": 1}),
    ("slice", {"neighbours": 3}),
    ("scan", {"neighbours": 1}),
    ("slice", {"summary": "scan"}),
    ("slice", {"summary": "study"}),
    ("scan", {"summary": "study"}),
    ("slice", {"neighbours": 1, "summary": "study"}),
    ("slice", {"neighbours": 2, "summary": "scan"}),
    ("scan", {"neighbours": 1, "summary": "study"}),
]


@pytest.mark.parametrize("level, options", PATTERNS, ids=str)
@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_error_of_every_pattern(backend, dtype, level, options):
    check(backend, dtype, ragged_for(backend, dtype, 2, level, 32, **options), 2, level, 2, 32, **options)


@pytest.mark.parametrize("backend, dtype", ANY_PATTERN, ids=[KIND_IDS[KINDS.index(k)] for k in ANY_PATTERN])
@given(lengths=ragged_lengths(), num_prefix=st.sampled_from((1, 2, 5)), pattern=st.sampled_from(PATTERNS))
def test_error_of_patterns_on_ragged_layouts(backend, dtype, lengths, num_prefix, pattern):
    level, options = pattern
    check(backend, dtype, lengths, num_prefix, level, 2, 16, **options)


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_error_with_logits_of_hundreds(backend, dtype):
    # q scaled so that logits have a standard deviation of 150: softmax is nearly one-hot.
    check(backend, dtype, RAGGED, 1, "scan", 2, 64, 150.0)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-40, 3.0])
@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_error_at_any_scale(backend, dtype, scale):
    check(backend, dtype, ragged_for(backend, dtype, 1, "slice", 32), 1, "slice", 2, 32, scale=scale)


@given(lengths=ragged_lengths(120), num_prefix=st.sampled_from(PREFIXES), pattern=st.sampled_from(PATTERNS))
def test_dense_mask_is_what_the_words_say(lengths, num_prefix, pattern):
    level, options = pattern
    if num_prefix == 0:
        options = {k: v for k, v in options.items() if k != "summary"}
    layout = make(lengths, num_prefix, row_multiple=16)
    assert torch.equal(layout.dense_mask(level, **options), naive_mask(lengths, num_prefix, layout.num_rows, level, **options))


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("options", [{}, {"neighbours": 1, "summary": "study"}], ids=str)
def test_lse_and_its_gradient(backend, dtype, options):
    if dtype != torch.float32 and HERE[backend].supports(Query("cpu", None, torch.float32, 32)):
        pytest.skip("the statistics are float32 for every dtype")
    lengths = ragged_for(backend, dtype, 2, "slice", 32, **options)
    layout = make(lengths, 2, row_multiple=32)
    mask = naive_mask(lengths, 2, layout.num_rows, "slice", **options)
    qkv = torch.randn(layout.num_rows, 3, 2, 32).to(dtype)
    weight = torch.randn(2, layout.num_rows)
    # A gradient goes through two roundings of the dtype: of the probabilities (or their gradients), and of the result.
    rounding = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    leaf, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    out, lse = attention(*leaf.unbind(1), layout, "slice", backend=backend, return_lse=True, **options)
    true_out, true_lse = naive_attention(*exact.unbind(1), mask)
    assert lse.dtype == torch.float32 and lse.shape == (2, layout.num_rows)
    assert relative(lse, true_lse) < 1e-6 and relative(out, true_out) < rounding / 2
    for loss, true_loss in (
        ((lse * weight).sum(), (true_lse * weight).sum()),
        ((lse * weight).sum() + out.square().sum(), (true_lse * weight).sum() + true_out.square().sum()),
    ):
        (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (true_grad,) = torch.autograd.grad(true_loss, exact, retain_graph=True)
        assert relative(grad, true_grad) < rounding


@pytest.mark.parametrize("options", [{}, {"neighbours": 1}, {"summary": "study"}], ids=str)
def test_reference_gradients_are_right_twice(options):
    layout = make([[[3, 0], [2, 1]], [], [[4]]], 1, row_multiple=8)
    q, k, v = (torch.randn(layout.num_rows, 1, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        return attention(q, k, v, layout, "slice", backend="reference", return_lse=True, **options)

    assert torch.autograd.gradcheck(f, (q, k, v))
    assert torch.autograd.gradgradcheck(f, (q, k, v))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_op_in_float64_passes_gradcheck(backend):
    layout = make([[[3, 0], [2, 1]], [], [[4]]], 2)
    q, k, v = (torch.randn(layout.num_rows, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pattern = layout.pattern("scan", neighbours=1)
    assert torch.autograd.gradcheck(lambda q, k, v: torch.ops.hlip.attention(q, k, v, pattern, 0.3, backend), (q, k, v))


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("bad, row", [(float("nan"), 87), (float("inf"), 87), (float("nan"), 378)], ids=str)
def test_nan_and_inf_stay_in_their_segment(backend, dtype, bad, row):
    """The first row of a scan and the first prefix row: each right behind the last patch row of another segment."""
    layout = make(RAGGED, 2)
    assert 87 == sum(map(sum, RAGGED[0])) and 378 == layout.prefix_rows("scan").start
    mask = naive_mask(RAGGED, 2, layout.num_rows, "scan")
    qkv = torch.randn(layout.num_rows, 3, 2, 32).to(dtype)
    weight = torch.randn(layout.num_rows, 2, 32).to(dtype)
    results = []
    for poison in (False, True):
        leaf = qkv.clone()
        if poison:
            leaf[row] = bad
        leaf.requires_grad_()
        out = attention(*leaf.unbind(1), layout, "scan", backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, weight)))
    apart = ~mask[row]
    assert 0 < apart.sum() < layout.num_rows
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[apart], dirty[apart])
        assert not torch.equal(clean[~apart], dirty[~apart])


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize("hidden", [slice(0, 64), slice(64, 128), slice(128, 200)], ids=["first", "between", "last"])
def test_tiles_of_which_every_logit_is_minus_infinity(backend, dtype, hidden):
    """Those keys count for nothing, as behind a mask of one's own: wherever they lie, they leave no NaN."""
    q, k, v = torch.randn(200, 3, 1, 32).to(dtype).unbind(1)
    q[..., 0] = 1
    k[hidden, :, 0] = float("-inf")
    out, lse = attention(q, k, v, make([[[200]]], 0), "slice", backend=backend, return_lse=True)
    expected, expected_lse = naive_attention(q.double(), k.double(), v.double(), naive_mask([[[200]]], 0, 200, "slice"))
    assert relative(out, expected) < 2 * torch.finfo(dtype).eps + 1e-5 and relative(lse, expected_lse) < 2e-6


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_memory_nobody_wrote_is_never_read(backend, dtype, poisoned):
    for level in LEVELS:
        layout = make(ragged_for(backend, dtype, 2, level, 32), 2, row_multiple=64)
        qkv = torch.randn(layout.num_rows, 3, 2, 32).to(dtype).requires_grad_()
        out, lse = attention(*qkv.unbind(1), layout, level, backend=backend, return_lse=True)
        (grad,) = torch.autograd.grad(out.float().square().sum() + lse.sum(), qkv)
        dead = slice(layout.prefix_rows(level).stop, None)
        assert out.isfinite().all() and lse.isfinite().all() and grad.isfinite().all()
        assert not out[dead].any() and not lse[:, dead].any() and not grad[dead].any()


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_dead_rows_may_hold_nan(backend, dtype):
    layout = make(ragged_for(backend, dtype, 1, "study", 32), 1, row_multiple=64)
    qkv = torch.randn(layout.num_rows, 3, 1, 32).to(dtype)
    qkv[layout.prefix_rows("study").stop :] = float("nan")
    leaf = qkv.requires_grad_()
    out = attention(*leaf.unbind(1), layout, "study", backend=backend)
    weight = torch.ones_like(out)
    weight[layout.prefix_rows("study").stop :] = float("nan")
    (grad,) = torch.autograd.grad(out, leaf, weight)
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
@pytest.mark.parametrize(
    "lengths, num_prefix, row_multiple",
    [([], 0, 1), ([], 2, 1), ([[]], 1, 8), ([[[]], [[0, 0]]], 0, 1), ([[[0, 0], [0]], []], 0, 16), ([[[0]]], 3, 4)],
    ids=str,
)
def test_emptiness(backend, dtype, lengths, num_prefix, row_multiple, poisoned):
    layout = make(lengths, num_prefix, row_multiple)
    for level in LEVELS:
        qkv = torch.randn(layout.num_rows, 3, 2, 32).to(dtype).requires_grad_()
        out, lse = attention(*qkv.unbind(1), layout, level, backend=backend, return_lse=True)
        assert out.shape == (layout.num_rows, 2, 32) and lse.shape == (2, layout.num_rows)
        (grad,) = torch.autograd.grad(out.float().sum() + lse.sum(), qkv)
        dead = slice(layout.prefix_rows(level).stop, None)
        assert out.isfinite().all() and grad.isfinite().all()
        assert not out[dead].any() and not lse[:, dead].any() and not grad[dead].any()


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_repeats_are_the_same_bits(backend, dtype):
    layout = make(ragged_for(backend, dtype, 2, "study", 32), 2)
    qkv = torch.randn(layout.num_rows, 3, 2, 32).to(dtype).requires_grad_()
    first = None
    for _ in range(3):
        out, lse = attention(*qkv.unbind(1), layout, "study", backend=backend, return_lse=True)
        result = (out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), qkv))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_strides_do_not_matter(backend, dtype):
    layout = make(RAGGED, 1)
    rows, heads, dim = layout.num_rows, 2, 32
    packed = torch.randn(rows, 3, heads, dim).to(dtype)
    plain = [t.contiguous() for t in packed.unbind(1)]
    head_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain]
    padded = [torch.nn.functional.pad(t, (0, 8))[..., :dim] for t in plain]
    expected = attention(*plain, layout, "scan", backend=backend)
    for views in (packed.unbind(1), head_first, padded):
        views = [t.requires_grad_() for t in views] if not packed.requires_grad else views
        out = attention(*views, layout, "scan", backend=backend)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend, dtype", KINDS, ids=KIND_IDS)
def test_strided_gradients_come_back_right(backend, dtype):
    """The gradient arrives expanded (from a sum), transposed, or for a part of the heads only."""
    layout = make(RAGGED, 1)
    packed = torch.randn(layout.num_rows, 3, 2, 32).to(dtype).requires_grad_()
    weight = torch.randn(2, 32, layout.num_rows).to(dtype).permute(2, 0, 1)
    out = attention(*packed.unbind(1), layout, "scan", backend=backend)
    (strided,) = torch.autograd.grad(out, packed, weight, retain_graph=True)
    (plain,) = torch.autograd.grad(out, packed, weight.contiguous(), retain_graph=True)
    assert torch.equal(strided, plain)
    (from_sum,) = torch.autograd.grad(out.sum(), packed, retain_graph=True)
    (from_ones,) = torch.autograd.grad(out, packed, torch.ones_like(out), retain_graph=True)
    assert torch.equal(from_sum, from_ones)


def test_more_programs_than_triton_can_launch_are_refused():
    """Its launcher would multiply them as an int, and launch nothing."""
    tiles = torch.empty((2**28, 2), dtype=torch.int32, device="meta")
    config, launched = triton_backend.config_for("attention_forward", torch.float16, 64, "hopper"), []

    class Kernel:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *given, **constants: None

    def launch(heads):
        triton_backend._launch(Kernel(), config, tiles, heads, 64, False, torch.device("cpu"), (), [64], ())

    launch(7)
    with pytest.raises(ValueError, match=r"268435456 blocks of rows times 8 heads .* split the batch"):
        launch(8)
    with pytest.raises(ValueError, match="split the batch"):
        launch(16)  # 2^32: 0 as an int
    assert launched == [(2**28, 7)]


@needs_interpreter
def test_launches_one_forward_two_backward_and_none_for_nothing(monkeypatch):
    from hlip_kernels.backends.triton import kernels

    launched = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append((self.kernel.__name__, grid))
            return self.kernel[grid]

    for name in ("attention_forward", "attention_backward_dq", "attention_backward_dkdv"):
        monkeypatch.setattr(kernels, name, Counting(getattr(kernels, name)))
    layout = make(RAGGED, 2)
    qkv = torch.randn(layout.num_rows, 3, 2, 16, requires_grad=True)
    out = attention(*qkv.unbind(1), layout, "scan", backend="triton")
    assert [name for name, _ in launched] == ["attention_forward"]
    out.sum().backward()
    assert [name for name, _ in launched[1:]] == ["attention_backward_dq", "attention_backward_dkdv"]
    # Real tiles only: 4 segments of 88, 67, 163, 2 (prefix rows alone) and 2 rows, and the dead rows that are zeroed.
    block = triton_backend.config_for("attention_forward", torch.float32, 16, "hopper").block_m
    rows = [5 + 17 + 2, 65 + 2, 130 + 2, 2, 33 + 63 + 65 + 2, 2]
    live = sum(-(-n // block) for n in rows)
    dead = -(-(layout.num_rows - layout.prefix_rows("scan").stop) // block)
    assert launched[0][1] == (live + dead, 2)
    launched.clear()
    empty = make([[[0, 0]]], 0)
    attention(*torch.empty(0, 3, 2, 16, requires_grad=True).unbind(1), empty, "scan", backend="triton").sum().backward()
    assert launched == []
