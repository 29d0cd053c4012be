"""The Triton and Gluon kernels as they are compiled for sm_80 and sm_90: their PTX, executed without a GPU (tests/ptx), against
float64 truth.

The interpreter and the emulator that other tests use show what the source means. This shows what the compiler makes of it:
products by mma.sync and wgmma with their layouts in registers and shared memory, loads in flight by cp.async and TMA, bfloat16,
vectorised and masked memory accesses, atomics; and that kernels touch no memory but that of the tensors they are given.
Programs run in an order drawn from a seed.
"""

from contextlib import contextmanager

import pytest
import torch
from attention_truth import make, naive_attention, naive_mask, relative, sdpa_by_segment
from ptx.own_process import compiled

from hlip_kernels import attention
from hlip_kernels.backends.triton import config

pytest.importorskip("triton")

import triton
import triton.language as tl

# dtype, allow_tf32
KINDS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tfloat32": (torch.float32, True),
}
# Around the edges of tiles; whole tiles of keys and a rest; empty slices, scans and studies.
SHORT = [[[5, 0, 17], [64, 1]], [], [[100], [], [33, 29]], [[0]]]
FEW = [[[40, 3], [0, 9]]]  # for float32 without TF32, whose products are many instructions
# Whole tiles enough to fill every stage of the loads in flight.
LONG = {"bfloat16": [[[150, 129], [32]], [[7]]], "tfloat32": [[[70, 85]], [[7]]]}

# Backend, deterministic, and the kernels of the backward pass: dQ, then dK and dV, or all at once with dQ summed in memory.
SPLIT, FUSED, WHOLE = ["dq", "dkdv"], ["delta", "fused"], ["whole"]
TRITON = {"split": ("triton", True, SPLIT), "fast": ("triton", False, FUSED)}
HOPPER = {"hopper": ("hopper", True, SPLIT), "hopper any order": ("hopper", False, FUSED),
          "hopper ordered": ("hopper_ordered", True, FUSED), "hopper 128 any order": ("hopper", False, SPLIT),
          "hopper whole": ("hopper", True, WHOLE)}  # fmt: skip
WAYS = TRITON | HOPPER


@contextmanager
def fused_from(rows):
    """The fast backward pass of the Triton backend from that many keys a row on."""
    before, config.FUSED_FROM = config.FUSED_FROM, rows
    try:
        yield
    finally:
        config.FUSED_FROM = before


def run(kind, layout, level, qkv, weight, lse_weight=None, way="split", capability=(8, 0), seed=0, **options):
    """Output, log-sum-exp and the gradient of the packed ``(R, 3, H, D)`` leaf, or of three; and the card they ran on."""
    from ptx.triton_driver import on_card

    dtype, allow_tf32 = KINDS[kind]
    leaves = [qkv] if torch.is_tensor(qkv) else list(qkv)
    leaves = [t.detach().requires_grad_() for t in leaves]
    q, k, v = leaves[0].unbind(1) if torch.is_tensor(qkv) else leaves
    backend, deterministic, backward = WAYS[way]
    with fused_from(0), on_card(capability, seed=seed, whole=backward is WHOLE) as card:
        out, lse = attention(q, k, v, layout, level, backend=backend, deterministic=deterministic,
                             allow_tf32=allow_tf32, return_lse=True, **options)  # fmt: skip
        outs, weights = [out], [weight]
        if lse_weight is not None:
            outs, weights = [out, lse], [weight, lse_weight]
        grads = torch.autograd.grad(outs, leaves, weights)
    return out.detach(), lse.detach(), *grads, card


def to_strides(packed, strides):
    """q, k and v, or all three packed, in memory as asked for; the values stay."""
    if strides == "packed":
        return packed
    plain = [t.contiguous() for t in packed.unbind(1)]
    if strides == "heads first":
        return [t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain]
    if strides == "odd":  # rows and heads start at any element
        return [torch.nn.functional.pad(t, (0, n))[..., : t.shape[-1]] for t, n in zip(plain, (1, 2, 3), strict=True)]
    return [plain[0], *packed.unbind(1)[1:]]  # "mixed"


def yardstick(kind):
    """What torch computes in the same dtype, or would with products in TF32."""
    from test_fast_backward import tf32_attention

    return tf32_attention if kind == "tfloat32" else sdpa_by_segment


def check(kind, lengths, num_prefix, level, heads, head_dim, *, way="split", strides="packed", with_grad_lse=False,
          scale_of_logits=1.0, capability=(8, 0), **options):  # fmt: skip
    """Error of output and gradients at most twice that of torch's attention with the same products; NaN in dead rows, 0 out."""
    dtype, allow_tf32 = KINDS[kind]
    layout = make(lengths, num_prefix, row_multiple=32)
    rows, dead = layout.num_rows, slice(layout.prefix_rows(level).stop, None)
    mask = naive_mask(lengths, num_prefix, rows, level, **options)
    packed = torch.randn(rows, 3, heads, head_dim)
    packed[:, 0] *= scale_of_logits
    packed = packed.to(dtype)
    weight = torch.randn(rows, heads, head_dim).to(dtype)
    lse_weight = torch.randn(heads, rows) if with_grad_lse else None
    packed[dead], weight[dead] = 0, 0

    def gradients(attend, in_dtype, of_lse):
        leaf = packed.to(in_dtype, copy=True).requires_grad_()
        out, lse = attend(*leaf.unbind(1))
        outs, weights = ([out, lse], [weight, lse_weight]) if of_lse else ([out], [weight])
        (grad,) = torch.autograd.grad(outs, leaf, [t.to(in_dtype) for t in weights])
        return [t.detach() for t in (out, *grad.unbind(1))], lse

    truth, true_lse = gradients(lambda *x: naive_attention(*x, mask), torch.float64, with_grad_lse)
    plain = gradients(lambda *x: naive_attention(*x, mask), torch.float64, False)[0]
    torchs = gradients(lambda *x: (yardstick(kind)(*x, mask), None), dtype, False)[0]
    bounds = [2 * relative(a, b) for a, b in zip(torchs, plain, strict=True)]  # torch has no gradient of lse

    packed[dead], weight[dead] = float("nan"), float("nan")
    inputs = to_strides(packed, strides)
    out, lse, *grads, card = run(kind, layout, level, inputs, weight, lse_weight, way, capability, **options)
    found = [out, *(grads[0].unbind(1) if len(grads) == 1 else grads)]
    rounding = 2.0**-10 if allow_tf32 else torch.finfo(dtype).eps
    for name, right, got, bound in zip(("out", "dq", "dk", "dv"), truth, found, bounds, strict=True):
        # Rows that see one key alone: the gradients of logits cancel to 0, up to a rounding of what cancels (of dv's size).
        bound += 0.25 * rounding if right.any() else 4 * rounding * float(truth[3].norm())
        error = relative(got, right)
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
        assert not got[dead].any(), f"{name} is not 0 in dead rows"
    error, bound = relative(lse, true_lse), rounding if allow_tf32 else 1e-6
    assert error <= bound, f"lse: error {error:.2e}, allowed {bound:.2e}"
    assert not lse[:, dead].any(), "lse is not 0 in dead rows"
    launched = [launch.kernel for launch in card.launched]
    assert launched == ["attention_forward", *(f"attention_backward_{name}" for name in WAYS[way][2])], launched
    if way.startswith("hopper"):  # a producer and two to four consumers; four for segments that are held whole
        consumers = 4 if WAYS[way][2] is WHOLE else 3 if head_dim == 64 else 2
        assert card.launched[0].threads == 128 * (consumers + 1)


# 80 columns are two blocks, 64 and 16. The tests after the first have cases of other dtypes and head dims.
CASES = [
    ("bfloat16", 32, "scan"), ("bfloat16", 80, "slice"), ("bfloat16", 128, "study"), ("float16", 64, "study"),
    ("float32", 80, "slice"), ("tfloat32", 80, "scan"),
]  # fmt: skip


def has_way(kind, head_dim, way):
    dtype, allow_tf32 = KINDS[kind]
    return way != "fast" or config.config_for("attention_backward_fused", dtype, head_dim, "ampere", allow_tf32) is not None


@pytest.mark.parametrize("kind, head_dim, level, way", [(*c, way) for c in CASES for way in TRITON if has_way(*c[:2], way)])
@compiled
def test_error(kind, head_dim, level, way):
    check(kind, FEW if kind == "float32" else SHORT, 2, level, 1, head_dim, way=way)


@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("kind, head_dim", [("bfloat16", 64), ("tfloat32", 64)])
@compiled
def test_error_of_loops_long_enough_for_every_stage(kind, head_dim, way):
    check(kind, LONG[kind], 1, "study", 1, head_dim, way=way)


@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("level, options", [
    ("slice", {"neighbours": 1}), ("scan", {"summary": "study"}), ("slice", {"neighbours": 2, "summary": "scan"}),
], ids=str)  # fmt: skip
@compiled
def test_error_of_every_pattern(level, options, way):
    check("bfloat16", SHORT, 3, level, 1, 32, way=way, **options)


@pytest.mark.parametrize("kind, way", [("bfloat16", "split"), ("bfloat16", "fast"), ("float32", "split")])
@compiled
def test_error_with_a_gradient_of_lse(kind, way):
    check(kind, SHORT, 2, "scan", 2, 32, way=way, with_grad_lse=True)


@pytest.mark.parametrize("strides, way", [
    ("heads first", "split"), ("mixed", "fast"), ("odd", "split"), ("odd", "fast"),
])  # fmt: skip
@compiled
def test_error_of_strided_views(strides, way):
    check("bfloat16", SHORT, 1, "scan", 2, 32, way=way, strides=strides)


@compiled
def test_error_with_logits_of_hundreds():
    check("float32", SHORT, 1, "scan", 2, 32, scale_of_logits=150.0)


@pytest.mark.parametrize("kind, head_dim, way", [
    ("bfloat16", 64, "split"), ("float16", 80, "fast"), ("tfloat32", 64, "split"),
])  # fmt: skip
@compiled
def test_error_on_hopper(kind, head_dim, way):
    check(kind, SHORT, 2, "scan", 1, head_dim, way=way, capability=(9, 0))


@pytest.mark.parametrize("kind, head_dim, way, options", [
    ("bfloat16", 64, "hopper", {"with_grad_lse": True}),
    ("bfloat16", 64, "hopper", {"neighbours": 1, "summary": "scan"}),
    ("bfloat16", 64, "hopper any order", {}),
    ("bfloat16", 64, "hopper ordered", {}),
    ("bfloat16", 64, "hopper whole", {"with_grad_lse": True}),
    ("float16", 64, "hopper whole", {"strides": "mixed", "scale_of_logits": 20.0}),
    ("float16", 64, "hopper", {"strides": "mixed", "scale_of_logits": 20.0}),
    ("float16", 128, "hopper", {"with_grad_lse": True}),
    ("bfloat16", 128, "hopper 128 any order", {}),
], ids=str)  # fmt: skip
@compiled
def test_error_of_the_hopper_backends(kind, head_dim, way, options):
    check(kind, SHORT, 2, "slice" if "summary" in options else "study", 2, head_dim, way=way, capability=(9, 0), **options)


@pytest.mark.parametrize("head_dim, whole, lengths", [
    (64, False, (142, 143, 200)), (128, False, (142, 143, 200)), (64, True, (70, 78, 79)),
], ids=str)  # fmt: skip
@compiled
def test_every_size_of_a_first_tile_on_hopper(head_dim, whole, lengths):
    """Forward, with 2 prefix rows. Beyond 128 keys: 16 more, which are a product of 16, 17, of 64, and 74, of which 64 come by
    TMA and 10 by address. Where segments are held whole, beyond 64: 8 and 16, products of 16, and 17, of 64."""
    from ptx.triton_driver import on_card

    layout, qkv, _ = drawn("bfloat16", [[list(lengths)]], 2, head_dim=head_dim)
    with on_card((9, 0), whole=whole) as card, torch.no_grad():
        out, lse = attention(*qkv.unbind(1), layout, "slice", backend="hopper", return_lse=True)
    assert card.launched[0].threads == 128 * (5 if whole else 4 if head_dim == 64 else 3)
    mask = naive_mask([[list(lengths)]], 2, layout.num_rows, "slice")
    truth, true_lse = naive_attention(*qkv.double().unbind(1), mask)
    assert relative(out, truth) <= 2 * relative(sdpa_by_segment(*qkv.unbind(1), mask), truth)
    assert relative(lse, true_lse) <= 1e-6


@pytest.mark.parametrize("backend, head_dim", [("hopper", 64), ("triton", 64), ("triton", 80)])
@compiled
def test_log_sum_exp_does_not_drift_from_tile_to_tile(backend, head_dim):
    """What is scaled anew at every tile is rounded at every tile: an error of 2.5e-7 at 1,024 keys, which grows with them."""
    from ptx.triton_driver import on_card

    layout, qkv, _ = drawn("float16", [[[1024]]], 0, head_dim=head_dim)
    qkv[:, 0] *= 8
    with on_card((9, 0)), torch.no_grad():
        _, lse = attention(*qkv.unbind(1), layout, "slice", backend=backend, return_lse=True)
    _, true_lse = naive_attention(*qkv.double().unbind(1), naive_mask([[[1024]]], 0, layout.num_rows, "slice"))
    assert relative(lse, true_lse) <= 1e-7


def drawn(kind, lengths, num_prefix, heads=1, head_dim=32, row_multiple=1):
    layout = make(lengths, num_prefix, row_multiple)
    dtype, rows = KINDS[kind][0], layout.num_rows
    return layout, torch.randn(rows, 3, heads, head_dim).to(dtype), torch.randn(rows, heads, head_dim).to(dtype)


@compiled
def test_the_same_bits_in_whatever_order_programs_run():
    layout, qkv, weight = drawn("bfloat16", SHORT, 2)
    first, second = (run("bfloat16", layout, "scan", qkv, weight, seed=seed)[:-1] for seed in (0, 7))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the order of the programs shows"


@pytest.mark.parametrize("bad, way", [(float("nan"), "split"), (float("inf"), "fast")], ids=str)
@compiled
def test_nan_and_inf_stay_in_their_segment(bad, way):
    layout, qkv, weight = drawn("bfloat16", SHORT, 2)
    mask = naive_mask(SHORT, 2, layout.num_rows, "scan")
    spoilt = qkv.clone()
    spoilt[100] = bad
    clean, dirty = (run("bfloat16", layout, "scan", t, weight, way=way) for t in (qkv, spoilt))
    apart = ~mask[100]
    assert 0 < apart.sum() < layout.num_rows, "nothing to look at"
    for name, a, b in (("out", clean[0], dirty[0]), ("lse", clean[1].T, dirty[1].T), ("gradient", clean[2], dirty[2])):
        assert torch.equal(a[apart], b[apart]), f"{name} of other segments changes"
        assert not torch.equal(a[~apart], b[~apart]), f"{name} of the segment itself does not"


@pytest.mark.parametrize(
    "lengths, num_prefix, row_multiple, launches",
    [([], 0, 1, 0), ([[[0, 0], [0]], []], 0, 16, 0), ([[[0]]], 3, 4, 3), ([[[1]]], 0, 1, 3)],
    ids=str,
)
@compiled
def test_emptiness(lengths, num_prefix, row_multiple, launches):
    layout, qkv, weight = drawn("bfloat16", lengths, num_prefix, row_multiple=row_multiple)
    for way in TRITON:
        out, lse, grad, card = run("bfloat16", layout, "slice", qkv, weight, torch.ones(1, layout.num_rows), way)
        assert len(card.launched) == launches, card.launched
        dead = slice(layout.prefix_rows("slice").stop, None)
        assert out.isfinite().all() and lse.isfinite().all() and grad.isfinite().all(), "not finite"
        assert not out[dead].any() and not lse[:, dead].any() and not grad[dead].any(), "dead rows are not 0"


@pytest.mark.parametrize("way", ["split", "fast", "hopper", "hopper any order", "hopper whole"])
@compiled
def test_no_kernel_is_compiled_again_as_lengths_change(way):
    from ptx.triton_driver import on_card

    backend, deterministic, backward = WAYS[way]
    head_dim, capability = (64, (9, 0)) if way in HOPPER else (32, (8, 0))
    with fused_from(0), on_card(capability, whole=backward is WHOLE) as card:
        for n, lengths in enumerate([[[[1]]], [[[16], [16]]], [[[17, 3]], [[60]]], [[[100, 128]]], [[[]], [[1, 1, 1]]]], 1):
            layout, qkv, weight = drawn("bfloat16", lengths, 1, heads=2, head_dim=head_dim)
            leaf = qkv.requires_grad_()
            out, lse = attention(*leaf.unbind(1), layout, "scan", backend=backend, deterministic=deterministic,
                                 return_lse=True)  # fmt: skip
            torch.autograd.grad((out, lse), leaf, (weight, torch.randn_like(lse)))
            kernels = 1 + len(backward)
            assert len(card.compiled) == kernels and len(card.launched) == kernels * n, (lengths, card.compiled)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("head_dim", [40, 36])  # rows that can be moved 16 bytes at a time, and others
@compiled
def test_rows_are_moved(count, head_dim):
    from ptx.triton_driver import on_card

    from hlip_kernels.backends.flash_rows import move

    sources = [torch.randn(21, 3 + n, head_dim).to(torch.bfloat16)[:, :3] for n in range(count)]
    index = torch.tensor([20, -1, 0, 7, 7, -1] * 6, dtype=torch.int32)
    targets = torch.full((36, count, 3, head_dim), float("nan")).to(torch.bfloat16).unbind(1)
    stats, to_stats = torch.randn(21, 3).T, torch.full((3, 36), float("nan"))
    with on_card():
        move(sources, targets, index, stats, to_stats)
        move(sources, again := torch.full((36, count, 3, head_dim), float("nan")).to(torch.bfloat16).unbind(1), index)
    for source, target, other in zip(sources, targets, again, strict=True):
        moved = torch.where((index >= 0)[:, None, None], source[index.long()], 0.0)
        assert torch.equal(target, moved) and torch.equal(other, moved), "rows are not where they belong"
    assert torch.equal(to_stats, torch.where(index >= 0, stats[:, index.long()], 0.0)), "stats are not where they belong"


# --- what the tests stand on


@triton.jit
def _give_back(to, pair, number, wide, real, nothing, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(pair[0] + i) + pair[1] + number + real
    if nothing is None:
        x += tl.where(wide > 2**40, 0.5, 0.0)
    tl.store(to + i, x)


@compiled
def test_arguments_of_every_kind_arrive():
    from ptx.triton_driver import on_card

    x, to = torch.randn(64), torch.full((64,), float("nan"))
    with on_card() as card:
        for number in (3, 1, 16, 5):  # 1 becomes a constant, 16 is known to be a multiple of 16
            _give_back[(1,)](to, (x, 7), number, 2**41, 0.25, None, SIZE=64)
            assert torch.equal(to, x + 7 + number + 0.25 + 0.5), f"with {number}"
    assert len(card.compiled) == 3 and len(card.launched) == 4, card.compiled


@compiled
def test_memory_of_others_is_out_of_reach():
    from ptx.program import PtxError
    from ptx.triton_driver import on_card

    x, to = torch.randn(63), torch.empty(64)
    with on_card(), pytest.raises(PtxError, match="reads"):
        _give_back[(1,)](to, (x, 7), 3, 2**41, 0.0, None, SIZE=64)


def test_a_tensor_map_comes_back_and_bad_ones_are_refused():
    from ptx.tensor_map import TensorMap, decode, encode

    good = dict(address=4096, element_bytes=2, shape=(128, 10), strides=(256,), box=(64, 64), swizzle=128)
    first, second = TensorMap(**good), TensorMap(**good | {"address": 8192})
    assert decode(encode(first)) == first and decode(encode(second)) == second and encode(first) != encode(second)
    with pytest.raises(ValueError, match="no tensor map"):
        decode(bytes(128))
    for wrong in ({"address": 4098}, {"strides": (130,)}, {"box": (128, 64)}, {"box": (64, 512)}, {"shape": (128, 0)}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "box" not in wrong else "box|swizzle"):
            TensorMap(**good | wrong)
