"""The flash backend on a GPU, with every implementation that is installed. Skipped without one; part of ``make gpu``.

Inputs are drawn anew for every case; memory is poisoned before every call.
"""

import pytest
import torch

from hlip_kernels import Layout, attention
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends.flash import FlashBackend
from hlip_kernels.backends.flash_implementations import TorchFlash, best_first
from hlip_kernels.pattern import Plan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

GRIDS = [[(2, 5, 7), (3, 9, 9), (8, 14, 14)], [], [(0, 2, 2), (1, 1, 1), (3, 8, 16)], [(12, 14, 14)]]
DTYPES = [torch.float16, torch.bfloat16]
NAMES = [implementation.name for implementation in best_first()]
LAYOUTS = {"prefixes": {"num_prefix": 2, "row_multiple": 64}, "none": {"num_prefix": 0}, "none, dead rows":
           {"num_prefix": 0, "row_multiple": 64}}  # fmt: skip


@pytest.fixture(params=NAMES)
def use(request, monkeypatch):
    """Puts one implementation in the place of the best; a function that skips where it cannot run a query."""
    (implementation,) = (i for i in best_first() if i.name == request.param)
    backend = FlashBackend(implementation)
    monkeypatch.setitem(BACKENDS, "flash", backend)

    def can(layout, level, dtype, head_dim):
        plan = Plan.of(layout.pattern(level))
        capability = torch.cuda.get_device_capability() if torch.version.hip is None else None
        answer = backend.supports(Query("cuda", capability, dtype, head_dim, plan.longest, plan.sees_itself))
        if not answer:
            pytest.skip(answer.reason)

    return can


def make(kind="prefixes"):
    return Layout.from_grids(GRIDS, **LAYOUTS[kind]).to("cuda")


def run(layout, level, qkv, g, backend="flash"):
    leaf = qkv.detach().requires_grad_()
    out, lse = attention(*leaf.unbind(1), layout, level, backend=backend, return_lse=True)
    (grad,) = torch.autograd.grad(out, leaf, g)
    return out.detach(), lse.detach(), grad


def by_hand(layout, level, qkv, g):
    """torch's own implementation, called on each segment by itself, its rows gathered by indexing."""
    implementation, scale = TorchFlash(), qkv.shape[-1] ** -0.5
    offsets, T, P = layout.host_offsets(level), layout.num_tokens, layout.num_prefix
    out, grad = torch.zeros_like(qkv[:, 0]), torch.zeros_like(qkv)
    lse = torch.zeros(qkv.shape[2], len(qkv), device="cuda")
    for s in range(len(offsets) - 1):
        rows = torch.cat([torch.arange(offsets[s], offsets[s + 1]), torch.arange(T + s * P, T + (s + 1) * P)]).cuda()
        if not len(rows):
            continue
        own = torch.tensor([0, len(rows)], dtype=torch.int32, device="cuda")
        q, k, v = (qkv[rows, n].contiguous() for n in range(3))
        out[rows], lse[:, rows] = implementation.forward(q, k, v, own, len(rows), scale)
        grads = implementation.backward(
            g[rows].contiguous(), q, k, v, out[rows], lse[:, rows].contiguous(), own, len(rows), scale, True
        )
        grad[rows] = torch.stack(grads, 1)
    return out, lse, grad


def inputs(layout, level, dtype, head_dim, heads=3):
    qkv = torch.randn(layout.num_rows, 3, heads, head_dim, device="cuda", dtype=dtype)
    g = torch.randn(layout.num_rows, heads, head_dim, device="cuda", dtype=dtype)
    dead = slice(layout.prefix_rows(level).stop, None)
    qkv[dead] = g[dead] = float("nan")
    return qkv, g, dead


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_as_torchs_own_on_each_segment(use, dtype, head_dim, kind):
    layout = make(kind)
    for level in layout.levels:
        use(layout, level, dtype, head_dim)
        qkv, g, dead = inputs(layout, level, dtype, head_dim)
        exact = qkv.double().nan_to_num()
        truth = run(layout, level, exact, g.double().nan_to_num(), "reference")
        bound = by_hand(layout, level, qkv, g)
        for got, torchs, right in zip(run(layout, level, qkv, g), bound, truth, strict=True):
            error, allowed = ((x.double() - right).norm() / right.norm() for x in (got, torchs))
            assert error <= 1.5 * allowed + 0.25 * torch.finfo(dtype).eps, level
            rows = got[:, dead] if got.ndim == 2 else got[dead]
            assert not rows.any(), level


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_are_the_same_bits(use, dtype):
    layout = make()
    use(layout, "study", dtype, 64)
    qkv, g, _ = inputs(layout, "study", dtype, 64, heads=12)
    first = run(layout, "study", qkv, g)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layout, "study", qkv, g), strict=True))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nan_stays_in_its_segment(use, head_dim, kind):
    layout = make(kind)
    for level in ("scan", "study"):
        use(layout, level, torch.bfloat16, head_dim)
        qkv, g, dead = inputs(layout, level, torch.bfloat16, head_dim)
        qkv[dead] = g[dead] = 0
        clean = run(layout, level, qkv, g)
        offsets = layout.host_offsets(level)
        for s in range(len(offsets) - 1):
            if offsets[s] == offsets[s + 1]:
                continue
            own = torch.zeros(layout.num_rows, dtype=torch.bool, device="cuda")
            own[offsets[s] : offsets[s + 1]] = True
            own[layout.num_tokens + s * layout.num_prefix : layout.num_tokens + (s + 1) * layout.num_prefix] = True
            bad = qkv.clone()
            bad[own] = float("nan")
            for a, b in zip(clean, run(layout, level, bad, g), strict=True):
                a, b = (t.T if t.ndim == 2 else t for t in (a, b))
                assert torch.equal(a[~own], b[~own]) and not torch.equal(a[own], b[own]), (level, s)


def test_no_synchronisation(use):
    layout = make()
    use(layout, "scan", torch.bfloat16, 64)
    qkv, g, _ = inputs(layout, "scan", torch.bfloat16, 64)
    expected = run(layout, "scan", qkv, g)
    torch.cuda.synchronize()
    fresh = make()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(fresh, "scan", qkv, g)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_beyond_2_to_31_elements(needs_memory):
    """The last segments lie where an element offset of the gathered buffer no longer fits 32 bits."""
    heads, head_dim, length = 16, 64, 1000
    count = 2**31 // (3 * heads * head_dim * length) + 100
    needs_memory(7 * count * length * 3 * heads * head_dim)  # qkv, gathered too, and out in both orders
    layout = Layout.from_lengths([length] * count, num_prefix=1, levels=("study",)).to("cuda")
    qkv = torch.randn(layout.num_rows, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    last = torch.cat([torch.arange((count - 1) * length, count * length), torch.tensor([layout.num_rows - 1])]).cuda()
    with torch.no_grad():
        out = attention(*qkv.unbind(1), layout, "study", backend="flash")
        alone = Layout.from_lengths([length], num_prefix=1, levels=("study",)).to("cuda")
        expected = attention(*qkv[last].unbind(1), alone, "study", backend="flash")
    assert torch.equal(out[last], expected)
