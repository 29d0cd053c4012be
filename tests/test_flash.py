"""The flash backend on a CPU: a naive varlen attention stands in for the real ones (tests/flash_stand_in.py), and triton's
interpreter runs the kernels that gather and scatter rows."""

import pytest
import torch
from attention_truth import LEVELS, PREFIXES, RAGGED, make, naive_attention, naive_mask, ragged_lengths, relative
from flash_stand_in import StandIn, StandInBackend
from hypothesis import given
from hypothesis import strategies as st

from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, Query, auto, choose, explain
from hlip_kernels.backends.base import Numerics
from hlip_kernels.backends.flash import segments_of
from hlip_kernels.backends.triton import installed, interpreted
from hlip_kernels.pattern import Plan

pytestmark = pytest.mark.skipif(not (installed() and interpreted()), reason="TRITON_INTERPRET=1 is not set")

TILES = [1, 32]  # kernels that read no row too many, and those that read whole tiles


@pytest.fixture
def flash(monkeypatch):
    """Puts the flash backend with a stand-in of a given tile in the place of the real one; returns it and the launches."""
    from hlip_kernels.backends import flash_rows

    launches = []
    kernel = flash_rows.move_rows

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(flash_rows, "move_rows", Counted())

    def use(stand_in):
        monkeypatch.setitem(BACKENDS, "flash", StandInBackend(stand_in))
        launches.clear()
        return stand_in, launches

    return use


def run(layout, level, qkv, weight, **options):
    """out, lse and the gradient of qkv ``(R, 3, H, D)``."""
    leaf = qkv.detach().requires_grad_()
    out, lse = attention(*leaf.unbind(1), layout, level, backend="flash", return_lse=True, **options)
    (grad,) = torch.autograd.grad(out, leaf, weight)
    return out.detach(), lse.detach(), grad


def compare(lengths, num_prefix, row_multiple, level, dtype, heads=2, head_dim=16, scale=None):
    layout = make(lengths, num_prefix, row_multiple)
    rows = layout.num_rows
    qkv = torch.randn(rows, 3, heads, head_dim).to(dtype)
    weight = torch.randn(rows, heads, head_dim).to(dtype)
    dead = slice(layout.prefix_rows(level).stop, None)
    qkv[dead] = weight[dead] = float("nan")  # what is there must not matter
    got = run(layout, level, qkv, weight, scale=scale)
    exact = qkv.double().nan_to_num().requires_grad_()
    out, lse = naive_attention(*exact.unbind(1), naive_mask(lengths, num_prefix, rows, level), scale)
    (grad,) = torch.autograd.grad(out, exact, weight.double().nan_to_num()) if rows else (exact,)
    tolerance = 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, mine, truth in zip(("out", "lse", "gradient"), got, (out, lse, grad), strict=True):
        assert mine.isfinite().all(), name
        # Where a row sees itself alone dq and dk cancel to 0, up to a rounding of what cancels: hence "atol".
        assert relative(mine, truth) <= tolerance or torch.allclose(mine.double(), truth, atol=tolerance), name
    assert got[1].dtype == torch.float32
    assert not got[0][dead].any() and not got[1][:, dead].any() and not got[2][dead].any()


@pytest.mark.parametrize("tile", TILES)
@given(lengths=ragged_lengths(200), num_prefix=st.sampled_from(PREFIXES), level=st.sampled_from(LEVELS),
       row_multiple=st.sampled_from((1, 16)))  # fmt: skip
def test_ragged_layouts(tile, lengths, num_prefix, level, row_multiple):
    before = BACKENDS["flash"]
    BACKENDS["flash"] = StandInBackend(StandIn(tile))
    try:
        compare(lengths, num_prefix, row_multiple, level, torch.float32)
    finally:
        BACKENDS["flash"] = before


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads, head_dim", [(1, 8), (3, 24), (1, 64), (5, 80), (2, 256)])
def test_heads_and_head_dims(flash, tile, dtype, heads, head_dim):
    flash(StandIn(tile))
    compare([[[5, 0, 17], [20]], [[3]]], 2, 8, "scan", dtype, heads, head_dim, scale=0.2)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("num_prefix, row_multiple", [(0, 1), (0, 64), (2, 1), (2, 64)])
def test_unwritten_memory_is_never_read(flash, poisoned, tile, num_prefix, row_multiple):
    flash(StandIn(tile))
    for level in LEVELS:
        compare(RAGGED, num_prefix, row_multiple, level, torch.float32)


@pytest.mark.parametrize("lengths, num_prefix", [([], 0), ([[]], 1), ([[[]], [[0, 0]]], 0), ([[[0], []], []], 0)], ids=str)
def test_no_tokens_no_launch(flash, poisoned, lengths, num_prefix):
    layout = make(lengths, num_prefix, 16)
    for level in LEVELS:
        stand_in, launches = flash(StandIn(32))
        qkv = torch.randn(layout.num_rows, 3, 2, 8)
        got = run(layout, level, qkv, torch.ones(layout.num_rows, 2, 8))
        dead = slice(layout.prefix_rows(level).stop, None)
        assert not any(t.any() for t in (got[0][dead], got[1][:, dead], got[2][dead]))
        if layout.prefix_rows(level).stop == 0:
            assert not stand_in.calls and not launches


def test_rows_that_lie_right_are_used_where_they_are(flash):
    stand_in, launches = flash(StandIn())
    layout = make([[[5, 0, 17], [64, 1]]], 0)
    qkv = torch.randn(layout.num_rows, 3, 2, 16)
    run(layout, "slice", qkv, torch.randn(layout.num_rows, 2, 16))
    assert stand_in.calls == ["forward", "backward"] and not launches
    for q, k, v in stand_in.inputs:
        assert [t.untyped_storage().data_ptr() for t in (q, k, v)] == [qkv.untyped_storage().data_ptr()] * 3
        assert q.stride() == (96, 16, 1)
    # Heads first, as other code has them: so are the results of the kernels, but not those of the op.
    leaves = [t.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in qkv.unbind(1)]
    out, lse = attention(*leaves, layout, "slice", backend="flash", return_lse=True)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert stand_in.inputs[-1][0].data_ptr() == leaves[0].data_ptr() and not leaves[0].is_contiguous() and not launches
    pattern = layout.pattern("slice")
    raw = torch.ops.hlip.attention_backward(out.detach(), None, *(t.detach() for t in leaves), out.detach(), lse.detach(),
                                            pattern, 0.3, "flash")  # fmt: skip
    assert all(t.is_contiguous() for t in (out, lse, *grads, *raw))


@pytest.mark.parametrize("tile", TILES)
def test_one_segment_with_its_prefixes_needs_no_gather(flash, tile):
    """As when a single study is looked at: its prefix rows come right after its patch rows."""
    stand_in, launches = flash(StandIn(tile))
    layout = make([[[5, 0, 17], [64, 1]]], 2)
    qkv = torch.randn(layout.num_rows, 3, 2, 16)
    expected = naive_attention(*qkv.unbind(1), naive_mask([[[5, 0, 17], [64, 1]]], 2, layout.num_rows, "study"))
    out, lse, _ = run(layout, "study", qkv, torch.randn(layout.num_rows, 2, 16))
    live = layout.prefix_rows("study").stop
    assert stand_in.inputs[0][0].data_ptr() == qkv.data_ptr() and len(stand_in.inputs[0][0]) == live
    assert relative(out, expected[0]) < 1e-6 and relative(lse, expected[1]) < 1e-6
    assert live < layout.num_rows and len(launches) == 2  # out and gradients, back among rows of 0


def test_rows_off_16_bytes_are_copied(flash):
    """The kernels load 16 bytes at a time and do not look: a view that starts elsewhere would crash them."""
    stand_in, _ = flash(StandIn())
    layout = make([[[5, 17]]], 0)
    base = torch.randn(layout.num_rows * 3 * 2 * 16 + 1).half()
    q, k, v = base[1:].view(layout.num_rows, 3, 2, 16).unbind(1)
    assert q.data_ptr() % 16
    out = attention(q, k, v, layout, "scan", backend="flash")
    assert all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for inputs in stand_in.inputs for t in inputs)
    assert torch.equal(out, attention(q.clone(), k.clone(), v.clone(), layout, "scan", backend="flash"))


def test_one_launch_each_way(flash):
    stand_in, launches = flash(StandIn())
    layout = make(RAGGED, 2, 16)
    qkv = torch.randn(layout.num_rows, 3, 2, 16)
    weight = torch.randn(layout.num_rows, 2, 16)
    attention(*qkv.unbind(1), layout, "scan", backend="flash")
    assert stand_in.calls == ["forward"] and len(launches) == 2
    run(layout, "scan", qkv, weight)
    assert stand_in.calls == ["forward", "forward", "backward"] and len(launches) == 6
    # The tables are made once: of one plan and device, for all layers and both passes.
    plan = Plan.of(layout.pattern("scan"))
    assert segments_of(plan, qkv.device, 0) is segments_of(plan, qkv.device, 0)
    assert [key for key in plan.kept if key[0] == "flash"] == [("flash", qkv.device, 0)]


@pytest.mark.parametrize("tile", TILES)
def test_strides_of_any_kind_give_the_same_bits(flash, tile):
    flash(StandIn(tile))
    layout = make(RAGGED, 2, 16)
    rows, heads, dim = layout.num_rows, 3, 24
    qkv = torch.randn(rows, 3, heads, dim)
    weight = torch.randn(rows, heads, dim)
    views = {
        "separate": [t.clone() for t in qkv.unbind(1)],
        "heads first": [t.transpose(0, 1).contiguous().transpose(0, 1) for t in qkv.unbind(1)],
        "odd": [torch.cat([t, t[:, :1, :]], 1)[:, :heads] for t in qkv.unbind(1)],
        "inside wider heads": [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in qkv.unbind(1)],
    }
    views["all unlike"] = [list(views.values())[n][n] for n in range(3)]
    expected = run(layout, "scan", qkv, weight)
    for name, leaves in views.items():
        assert not leaves[0].is_contiguous() or name in ("separate", "all unlike")
        leaves = [t.detach().requires_grad_() for t in leaves]
        out, lse = attention(*leaves, layout, "scan", backend="flash", return_lse=True)
        g = weight.transpose(0, 1).contiguous().transpose(0, 1) if name == "heads first" else weight
        grads = torch.autograd.grad(out, leaves, g)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]), name
        assert torch.equal(torch.stack(grads, 1), expected[2]), name
        assert out.is_contiguous() and lse.is_contiguous() and all(t.is_contiguous() for t in grads)


@pytest.mark.parametrize("layout_options", [(0, 1), (2, 16)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_nan_and_inf_stay_in_their_segment(flash, tile, bad, layout_options):
    flash(StandIn(tile))
    layout = make(RAGGED, *layout_options)
    mask = naive_mask(RAGGED, layout_options[0], layout.num_rows, "scan")
    qkv = torch.randn(layout.num_rows, 3, 2, 16)
    weight = torch.randn(layout.num_rows, 2, 16)
    first = 22 + 65  # of the first scan of the third study: a segment before and segments after
    for row in (first, first + 129):
        dirty = qkv.clone()
        dirty[row] = bad
        apart = ~mask[row]
        for a, b in zip(run(layout, "scan", qkv, weight), run(layout, "scan", dirty, weight), strict=True):
            a, b = (t.T if t.ndim == 2 else t for t in (a, b))
            assert torch.equal(a[apart], b[apart])
            assert not torch.equal(a[~apart], b[~apart])


def test_the_stand_in_would_show_a_leak(flash):
    """What the test above rests on: kernels that read whole tiles do leak, were segments not kept apart."""
    flash(StandIn(32, apart=0))
    layout = make(RAGGED, 0)
    qkv = torch.randn(layout.num_rows, 3, 2, 16)
    qkv[87] = float("nan")
    out, _, grad = run(layout, "scan", qkv, torch.randn(layout.num_rows, 2, 16))
    assert out[:87].isnan().any() and grad[:87].isnan().any()


@pytest.mark.parametrize("lengths", [RAGGED, [[[5, 17]]], [[[5]]]], ids=["many", "two", "one"])
@pytest.mark.parametrize("apart", [0, 31, 256])
def test_segments_are_far_enough_apart(apart, lengths):
    layout = make(lengths, 2, 16)
    plan = Plan.of(layout.pattern("slice"))
    segments = segments_of(plan, torch.device("cpu"), apart)
    bounds, rows, place = segments.cu_seqlens.tolist(), segments.rows, segments.place
    assert bounds[-1] == segments.total == len(rows)
    live = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if rows[a] >= 0]
    wanted = [n + 2 for study in lengths for scan in study for n in scan]  # empty slices have prefix rows
    assert [b - a for a, b in live] == wanted
    for a, b in live:
        between = rows[b : b + apart]
        assert (rows[a:b] >= 0).all() and (between == -1).all() and len(between) in (0 if b == segments.total else apart, apart)
    at = torch.arange(segments.total)[rows >= 0]
    assert torch.equal(place[rows[at].long()].long(), at)
    assert (place >= 0).sum() == len(at) == layout.prefix_rows("slice").stop
    assert segments.longest == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))


def test_the_gradient_through_lse_raises_and_names_others(flash):
    flash(StandIn())
    layout = make([[[5, 17]]], 1)
    qkv = torch.randn(layout.num_rows, 3, 2, 16, requires_grad=True)
    out, lse = attention(*qkv.unbind(1), layout, "scan", backend="flash", return_lse=True)
    with pytest.raises(NotImplementedError, match="takes no gradient of lse") as caught:
        (out.sum() + lse.sum()).backward()
    assert "sdpa: available" in str(caught.value)
    out, lse = attention(*qkv.unbind(1), layout, "scan", backend="flash", return_lse=True)
    out.sum().backward()  # as long as nothing used it


def test_auto_takes_another_backend_for_the_gradient_through_lse(flash, monkeypatch):
    """A table that prefers flash must not make the backward pass of a call fail that another backend can finish."""
    stand_in, _ = flash(StandIn())
    lines = (auto.Choice("cpu", "flash", "measured"), *auto.SHIPPED)
    monkeypatch.setattr(auto, "table", lambda: lines)
    layout = make([[[5, 17]]], 1)
    qkv = torch.randn(layout.num_rows, 3, 2, 16)
    grads = {}
    for backend in ("auto", "reference"):
        leaf = qkv.clone().requires_grad_()
        out, lse = attention(*leaf.unbind(1), layout, "scan", backend=backend, return_lse=True)
        grads[backend] = torch.autograd.grad(out.square().sum() + lse.square().sum(), leaf)[0]
    assert stand_in.calls == ["forward"]
    torch.testing.assert_close(grads["auto"], grads["reference"], rtol=1e-4, atol=1e-5)


def test_determinism_is_passed_on(flash):
    stand_in, _ = flash(StandIn())
    layout = make([[[5, 17]]], 1)
    qkv, weight = torch.randn(layout.num_rows, 3, 2, 16), torch.randn(layout.num_rows, 2, 16)
    run(layout, "scan", qkv, weight)
    run(layout, "scan", qkv, weight, deterministic=False)
    assert [call for call in stand_in.calls if "back" in call] == ["backward", "backward in any order"]
    torch.use_deterministic_algorithms(True)  # torch's own switch asks for it too
    try:
        run(layout, "scan", qkv, weight, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert stand_in.calls[-1] == "backward"


def test_expanded_gradients_and_opcheck(flash):
    flash(StandIn(32))
    layout = make(RAGGED, 2, 16)
    q, k, v = (torch.randn(layout.num_rows, 2, 16, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attention(q, k, v, layout, "scan", backend="flash").sum(), q)
    out = attention(q, k, v, layout, "scan", backend="flash")
    assert torch.equal(grad, torch.autograd.grad(out, q, torch.ones_like(out))[0])
    pattern = layout.pattern("scan")
    tests = ("test_schema", "test_faketensor")
    with torch.no_grad():
        torch.library.opcheck(torch.ops.hlip.attention, (q, k, v, pattern, 0.3, "flash"), test_utils=tests)
        out, lse = torch.ops.hlip.attention(q, k, v, pattern, 0.3, "flash")
        args = (torch.randn_like(out), None, q, k, v, out, lse, pattern, 0.3, "flash")
        torch.library.opcheck(torch.ops.hlip.attention_backward, args, test_utils=tests)


def test_too_many_segments_are_named(flash):
    flash(StandIn())
    layout = make([[[1] * 70000]], 0)
    with pytest.raises(NotImplementedError, match="65535 segments, got 70000"):
        attention(*torch.randn(layout.num_rows, 3, 1, 8).unbind(1), layout, "slice", backend="flash")


HOPPER = Query("cuda", (9, 0), torch.bfloat16, 64, longest=9000)


@pytest.mark.parametrize(
    "query, words",
    [
        (Query("cpu", None, torch.bfloat16, 64), "needs an NVIDIA GPU"),
        (Query("cuda", None, torch.bfloat16, 64), "needs an NVIDIA GPU"),  # AMD
        (Query("cuda", (7, 5), torch.float16, 64), "8.0, this GPU has 7.5"),
        (Query("cuda", (9, 0), torch.float32, 64), "got float32"),
        (Query("cuda", (9, 0), torch.float16, 20), "multiples of 8"),
        (Query("cuda", (9, 0), torch.float16, 264), "up to 256"),
        (Query("cuda", (9, 0), torch.float16, 64, sees_itself=False), "no neighbours, no summary"),
    ],
    ids=str,
)
def test_reasons(query, words):
    answer = BACKENDS["flash"].supports(query)
    assert not answer and words in answer.reason
    with pytest.raises(NotImplementedError) as caught:
        choose(query, "flash")
    assert words in str(caught.value)


def test_every_implementation_is_named_when_none_can():
    class No(StandIn):
        def why_not(self, capability, head_dim, deterministic):
            return f"no {head_dim} {deterministic}"

    backend = StandInBackend(No())
    assert backend.supports(Query("cpu", None, torch.float16, 64)).reason == "stand-in: no 64 True"
    relaxed = Query("cpu", None, torch.float16, 64, numerics=Numerics(deterministic=False))
    assert backend.supports(relaxed).reason == "stand-in: no 64 False"
    assert "flash: " in explain(HOPPER)
