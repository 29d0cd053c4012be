"""What is special to the kernels for short segments: packs, bands of keys, isolation inside a pack, limits, sanitizers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_truth import make, naive_attention, naive_mask, relative, sdpa_by_segment
from emulated_attention import EDGES, SANITIZED, TINY, EmulatedCudaBackend, compiled, plan_of
from emulation import compiler, cuda_include, preload
from hypothesis import given, settings
from hypothesis import strategies as st

from hlip_kernels.backends import cuda as cuda_backend
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.cuda import HEAD_DIMS, CudaBackend, max_rows
from hlip_kernels.pattern import Plan

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
kernels_of = pytest.mark.parametrize(
    "dtype, head_dim", [pytest.param(t, d, id=f"{str(t).removeprefix('torch.')}-{d}") for t in DTYPES for d in HEAD_DIMS]
)
EXAMPLES = max(6, settings.default.max_examples // 4)  # there are ten kernels
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(scope="module")
def backend():
    compiler()  # skips here, with the reason, where there is none
    cuda_include()
    return EmulatedCudaBackend()


def packs_for(plan, head_dim):
    """Those the backend itself makes."""
    return CudaBackend._packs(torch.empty(1, 1, head_dim), plan)


def tensors(rows, dtype, head_dim, heads=2):
    """q, k, v and the gradient of the output."""
    return [torch.randn(rows, heads, head_dim).to(dtype) for _ in range(4)]


def both(backend, q, k, v, grad, plan, scale=None, grad_lse=None):
    """Forward and backward, without asking whether the backend would take this."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = backend.forward(q, k, v, plan, scale, Numerics())
    return out, lse, *backend.backward(grad, grad_lse, q, k, v, out, lse, plan, scale, Numerics())


def check(backend, lengths, num_prefix, dtype, head_dim, scale=None, row_multiple=1, given=None):
    """Errors of outputs and gradients against float64: at most twice torch's own and a quarter of a rounding."""
    layout = make([[lengths]], num_prefix, row_multiple)
    plan = Plan.of(layout.pattern("slice"))
    if plan.num_rows == 0:  # the op does not ask the backend then
        return
    mask = naive_mask([[lengths]], num_prefix, plan.num_rows, "slice")
    q, k, v, grad = given or tensors(plan.num_rows, dtype, head_dim)
    out, lse, *grads = both(backend, q, k, v, grad, plan, scale)
    found = []
    for run, to in ((lambda *x: naive_attention(*x)[0], torch.float64), (sdpa_by_segment, dtype)):
        leaves = [t.clone().to(to).requires_grad_() for t in (q, k, v)]
        theirs = run(*leaves, mask, scale)
        found.append((theirs, *torch.autograd.grad(theirs, leaves, grad.to(to))))
    for name, got, right, torchs in zip(("out", "dq", "dk", "dv"), (out, *grads), *found, strict=True):
        error, bound = relative(got, right), relative(torchs, right)
        assert error <= 2 * bound + 0.25 * torch.finfo(dtype).eps, f"{name}: {error:.2e} against {bound:.2e} of torch"
    true_lse = naive_attention(q, k, v, mask, scale)[1]
    assert float((lse - true_lse).abs().max()) < 1e-5 * (1 + float(true_lse.abs().max()))
    nowhere = ~mask.any(1)
    assert not any(t[nowhere].any() for t in (out, *grads)) and not lse[:, nowhere].any()


# ------------------------------------------------------------------ results


LONG = (144, 145, 191, 192, 193, 207, 208, 209, 239, 240, 241, 255, 256, 257, 270)


@st.composite
def many_segments(draw, limit=270):
    """Runs of tiny segments with a longer one now and then."""
    lengths = draw(st.lists(st.sampled_from(TINY), min_size=4, max_size=24))
    longer = draw(st.lists(st.sampled_from([n for n in EDGES if n <= limit]), max_size=4))
    longer += draw(st.lists(st.sampled_from([n for n in LONG if n <= limit]), max_size=1))
    for n in longer:
        lengths.insert(draw(st.integers(0, len(lengths))), n)
    return lengths


@kernels_of
@settings(max_examples=EXAMPLES)
@given(data=st.data(), num_prefix=st.sampled_from((0, 0, 1, 2)), row_multiple=st.sampled_from((1, 32)))
def test_error_on_many_segments(backend, dtype, head_dim, data, num_prefix, row_multiple):
    lengths = data.draw(many_segments(max_rows(head_dim, (9, 0)) - num_prefix))
    check(backend, lengths, num_prefix, dtype, head_dim, row_multiple=row_multiple)


@pytest.mark.parametrize("rows", [65, 80, 97, 128, 198])
@kernels_of
def test_segments_with_a_pack_of_their_own(backend, dtype, head_dim, rows):
    """An odd and an even number of tiles of keys, full at the end and not; beside segments that share a pack."""
    lengths = [5, rows - 2, 1, 0, 3, 33]
    assert len(packs_for(plan_of(lengths, 2), head_dim).alone) == 1
    check(backend, lengths, 2, dtype, head_dim)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_longest_segments(backend, head_dim):
    """That a card with 163 KB can hold, and, at the head dim of 128, that none can: the kernels are there all the same."""
    longest = min(max_rows(head_dim, (8, 0)), 320) if head_dim < 128 else 272
    check(backend, [longest - 1], 1, torch.float16, head_dim)


@pytest.mark.parametrize("step", [-30.0, -8.0, 0.5, 7.9, 8.1, 30.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
def test_logits_that_rise_and_fall_from_key_to_key(backend, dtype, step):
    """By so much a tile of 16 keys, from the last one met to the first: what rows go by has to follow, or need not."""
    rows = 150
    q, k, v, grad = tensors(rows, dtype, 64)
    q[:], k[:, :, 1:] = 1.0, 0.0
    k[:, :, 0] = (-step * torch.arange(rows) / 16).to(dtype)[:, None]
    check(backend, [rows], 0, dtype, 64, scale=1.0, given=(q, k, v, grad))


@pytest.mark.parametrize("scale", [-0.7, -1e-3, 0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
def test_any_scale(backend, dtype, scale):
    check(backend, [3, 1, 0, 8, 20, 90, 2], 1, dtype, 32, scale)


def test_no_scale_means_no_gradient_of_logits(backend):
    out, lse, dq, dk, dv = both(backend, *tensors(12, torch.float16, 64), plan_of([3, 9]), scale=0.0)
    assert not dq.any() and not dk.any() and dv.any()
    torch.testing.assert_close(lse, torch.tensor([3.0] * 3 + [9.0] * 9).log().expand(2, 12))


@kernels_of
def test_the_order_of_threads_does_not_matter(backend, dtype, head_dim):
    plan = plan_of([4, 0, 7, 1, 100, 2, 2, 60, 3], 1, row_multiple=32)
    inputs = tensors(plan.num_rows, dtype, head_dim)
    grad_lse = torch.randn(2, plan.num_rows)
    first = None
    for seed in (0, 1, 17, 2**40):
        backend.kernels.seed = seed
        got = both(backend, *inputs, plan, grad_lse=grad_lse)
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True))


@kernels_of
def test_gradient_of_the_log_sum_exp(backend, dtype, head_dim):
    lengths = [3, 1, 0, 8, 20, 90, 2]
    layout = make([[lengths]], 1, 32)
    plan = Plan.of(layout.pattern("slice"))
    q, k, v, grad = tensors(plan.num_rows, dtype, head_dim)
    grad_lse = 3 * torch.randn(plan.num_rows, 2).T  # with strides of its own
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = naive_attention(*leaves, naive_mask([[lengths]], 1, plan.num_rows, "slice"))
    for upstream in (grad, torch.zeros_like(grad)):
        truth = torch.autograd.grad(
            (out * upstream).sum() + (lse * grad_lse).sum(), leaves, retain_graph=True, materialize_grads=True
        )
        got = both(backend, q, k, v, upstream, plan, grad_lse=grad_lse)[2:]
        for mine, right in zip(got, truth, strict=True):
            assert relative(mine, right) < torch.finfo(dtype).eps


# ------------------------------------------------------------------ isolation


@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
@kernels_of
def test_a_nan_leaves_its_pack_alone(backend, dtype, head_dim, where):
    leaves_its_pack_alone(backend, dtype, head_dim, where, float("nan"), (0, 3, 6, 11))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
def test_an_infinity_leaves_its_pack_alone(backend, dtype, where, bad):
    leaves_its_pack_alone(backend, dtype, 32, where, bad, (0, 6))


def leaves_its_pack_alone(backend, dtype, head_dim, where, bad, chosen):
    """Bit for bit: the block then goes over its segments one at a time, and must come to the same results."""
    lengths = [3, 5, 8, 1, 17, 2, 33, 4, 6, 1, 40, 2]
    plan = plan_of(lengths, 1)
    packs = packs_for(plan, head_dim)
    first_row = np.concatenate([[0], np.cumsum(lengths)])
    inputs = tensors(plan.num_rows, dtype, head_dim)
    grad_lse = torch.randn(2, plan.num_rows)
    clean = both(backend, *inputs, plan, grad_lse=grad_lse)
    assert all(t.isfinite().all() for t in clean)
    for segment in chosen:  # 0: the first of a pack; 3: inside a tile; 6: across tiles; 11: the last
        ((members, rows),) = [(p[1], p[3]) for p in packs.packs.tolist() if p[0] <= segment < p[0] + p[1]]
        assert members > 1 and rows > lengths[segment] + 1
        dirty_inputs = [t.clone() for t in inputs]
        dirty_inputs["q k v grad".split().index(where)][first_row[segment] + lengths[segment] // 2, 1, 5] = bad
        dirty = both(backend, *dirty_inputs, plan, grad_lse=grad_lse)
        own = torch.zeros(plan.num_rows, dtype=torch.bool)
        own[first_row[segment] : first_row[segment + 1]] = True
        own[sum(lengths) + segment] = True  # its prefix row
        for name, a, b in zip(NAMES, clean, dirty, strict=True):
            a, b = (t.transpose(0, 1) if name == "lse" else t for t in (a, b))
            assert torch.equal(a[~own], b[~own]), f"{name} of other segments"
            assert torch.equal(a[:, 0], b[:, 0]), f"{name} of the other head"
        expected = {"q": ("out", "lse", "dq"), "k": ("dq",), "v": ("out", "dq"), "grad": ("dq", "dk", "dv")}[where]
        if bad != bad or where != "k":  # a key of -inf may just not be seen
            assert not all(b.isfinite().all() for name, b in zip(NAMES, dirty, strict=True) if name in expected)


def reads_no_first_row_but_its_own(backend, lengths, dtype, head_dim):
    """Rows that fill up tiles are nothing, not the tensor's first row, whose address they are given."""
    plan = plan_of(lengths)
    inputs = tensors(plan.num_rows, dtype, head_dim)
    clean = both(backend, *inputs, plan)
    for t in inputs:
        t[0] = float("nan")
    for name, a, b in zip(NAMES, clean, both(backend, *inputs, plan), strict=True):
        a, b = (t.transpose(0, 1) if name == "lse" else t for t in (a, b))
        assert torch.equal(a[lengths[0] :], b[lengths[0] :]), name


def test_rows_that_are_not_there_are_not_the_first(backend):
    reads_no_first_row_but_its_own(backend, [3, 88, 2, 66], torch.float16, 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
def test_bad_values_in_every_segment_but_one(backend, dtype):
    lengths = [3, 5, 8, 1, 17, 2]
    plan = plan_of(lengths)
    inputs = tensors(plan.num_rows, dtype, 64)
    clean = both(backend, *inputs, plan)
    for t in inputs:
        t[:8] = float("nan")
        t[16:] = float("inf")
    for name, a, b in zip(NAMES, clean, both(backend, *inputs, plan), strict=True):
        a, b = (t.transpose(0, 1) if name == "lse" else t for t in (a, b))
        assert torch.equal(a[8:16], b[8:16]), name


# ------------------------------------------------------------------ where rows lie


def odd_offset(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def odd_row_stride(x):
    return torch.nn.functional.pad(x.flatten(1), (0, 4))[:, :-4].view(x.shape)


def odd_head_stride(x):
    return torch.nn.functional.pad(x, (0, 2))[..., :-2]


def head_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("view", [odd_offset, odd_row_stride, odd_head_stride, head_first])
@kernels_of
def test_where_rows_lie_does_not_matter(backend, dtype, head_dim, view):
    plan = plan_of([3, 0, 20, 90, 2], 1)
    inputs = tensors(plan.num_rows, dtype, head_dim)
    expected = both(backend, *inputs, plan)
    views = [view(t) for t in inputs]
    assert all(torch.equal(a, b) and (view is odd_offset or not b.is_contiguous()) for a, b in zip(inputs, views, strict=True))
    assert (view is head_first) == all(cuda_backend.aligned(t) is t for t in views)
    for one in range(4 if head_dim == 32 else 0):  # each alone, and then all
        mixed = [views[i] if i == one else inputs[i] for i in range(4)]
        for a, b in zip(expected, both(backend, *mixed, plan), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(expected, both(backend, *views, plan), strict=True):
        assert torch.equal(a, b)


def test_heads_may_share_keys(backend):
    plan = plan_of([3, 20, 2], 1)
    q, k, v, grad = tensors(plan.num_rows, torch.float16, 32)
    k, v = (t[:, :1].expand(-1, 2, -1) for t in (k, v))
    assert k.stride(1) == 0
    for a, b in zip(both(backend, q, k.contiguous(), v.contiguous(), grad, plan), both(backend, q, k, v, grad, plan),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)


# ------------------------------------------------------------------ under the sanitizers


SANITIZED_DIMS = (32, 80)
QUICK = "(own or a_nan or error_on_many or order_of_threads or odd_offset) and (float16-32 or bfloat16-80)"
# The last row of the second segment is one past the end.
OUT_OF_BOUNDS = """
import test_short_attention as t
plan = t.plan_of([20, 30])
t.packs_for(plan, 32).records[1, 0] += 1
t.both(t.EmulatedCudaBackend(), *t.tensors(50, t.torch.float16, 32), plan)
"""


@pytest.mark.skipif(SANITIZED, reason="this is the process with the sanitizers")
def test_under_address_and_undefined_behaviour_sanitizers():
    cuda_include()
    for head_dim in SANITIZED_DIMS:
        compiled(head_dim, sanitized=True)  # here, where g++ itself runs without them
    tests = Path(__file__).parent
    environment = os.environ | {
        "LD_PRELOAD": preload(), "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
        "HLIP_EMULATE_SANITIZED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}",
        "PYTEST_ADDOPTS": "",
    }  # fmt: skip
    for name in [n for n in environment if n.startswith(("PYTEST_XDIST", "PYTEST_CURRENT"))]:
        del environment[name]

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=tests.parent, env=environment, capture_output=True, text=True)

    # First that they are awake: a table that names rows past the end of the tensors.
    caught = run("-c", OUT_OF_BOUNDS)
    assert caught.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in caught.stderr, caught.stderr[-3000:]
    assert "short_attention" in caught.stderr
    done = run("-m", "pytest", "-p", "no:cacheprovider", "-q", str(Path(__file__)), "-k", QUICK)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 28 and "skipped" not in done.stdout, done.stdout[-500:]
