"""segment_mean, switch_level and patchify: against naive loops, under autograd, opcheck and checkpointing, and in C++."""

import pytest
import torch
import torch.nn.functional as F
from attention_truth import LEVELS, PREFIXES, RAGGED, make, ragged_lengths, segments
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hlip_kernels import Layout, attention, native, patch_grids, patchify, segment_mean, switch_level
from hlip_kernels.ops.patchify import _scan_table, torch_patchify, torch_patchify_backward
from hlip_kernels.ops.segment_mean import torch_segment_mean, torch_segment_mean_backward
from hlip_kernels.ops.switch_level import torch_switch_tail

SMALL = [[[3, 0], [2, 1]], [], [[4], []]]
PAIRS = [(a, b) for a in LEVELS for b in LEVELS]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
needs_extension = pytest.mark.skipif(bool(native.why_missing()), reason=native.why_missing() or "-")


def tolerance(dtype):
    return {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}


# ------------------------------------------------------------------ segment_mean


def naive_mean(x, lengths, level):
    rows = [x[a:b].double().mean(0) if b > a else torch.zeros(x.shape[1]).double() for (a, b), _ in segments(lengths, level)]
    return torch.stack(rows) if rows else torch.zeros(0, x.shape[1]).double()


@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64), ids=str)
@given(
    lengths=ragged_lengths(),
    num_prefix=st.sampled_from(PREFIXES),
    level=st.sampled_from(LEVELS),
    channels=st.sampled_from((0, 1, 7, 64)),
)
def test_segment_mean_on_ragged_layouts(dtype, lengths, num_prefix, level, channels):
    layout = make(lengths, num_prefix, 8)
    x = torch.randn(layout.num_rows, channels).to(dtype)
    got = segment_mean(x, layout, level)
    assert got.dtype == dtype and got.shape == (layout.num_segments(level), channels)
    torch.testing.assert_close(got.double(), naive_mean(x, lengths, level), **tolerance(dtype))


def test_segment_mean_gradient_and_what_it_never_reads(poisoned):
    layout = make(SMALL, 2, 8)
    x = torch.randn(layout.num_rows, 3, dtype=torch.float64, requires_grad=True)
    for level in LEVELS:
        assert torch.autograd.gradcheck(lambda x, level=level: segment_mean(x, layout, level), x)
    with torch.no_grad():
        x[layout.num_tokens :] = float("nan")
    assert segment_mean(x, layout, "scan").isfinite().all()
    (grad,) = torch.autograd.grad(segment_mean(x, layout, "scan").sum(), x)
    assert grad.isfinite().all() and not grad[layout.num_tokens :].any()


# ------------------------------------------------------------------ switch_level


def naive_switch(x, lengths, num_prefix, old, new):
    """The HLIP rule, loop by loop: down copies the parent, up averages over all children."""
    x = x.clone()
    tokens = sum(n for study in lengths for scan in study for n in scan)
    tail = x[tokens:].clone()
    found = {level: segments(lengths, level) for level in LEVELS}
    up = LEVELS.index(old) < LEVELS.index(new)
    child, parent = (old, new) if up else (new, old)
    parents = [p.get(parent) for _, p in found[child]]
    x[tokens:] = 0
    P = num_prefix
    for s in range(len(found[new])):
        if up:
            mine = [tail[c * P : (c + 1) * P] for c, p in enumerate(parents) if p == s]
            value = torch.stack(mine).mean(0) if mine else torch.zeros(P, x.shape[1], dtype=x.dtype)
        else:
            value = tail[parents[s] * P : (parents[s] + 1) * P]
        x[tokens + s * P : tokens + (s + 1) * P] = value
    return x


@pytest.mark.parametrize("old, new", PAIRS)
@given(lengths=ragged_lengths(), num_prefix=st.sampled_from(PREFIXES), channels=st.sampled_from((0, 1, 5, 32)))
def test_switch_level_on_ragged_layouts(old, new, lengths, num_prefix, channels):
    layout = make(lengths, num_prefix, 8)
    x = torch.randn(layout.num_rows, channels, dtype=torch.float64)
    x[layout.prefix_rows(old).stop :] = 0
    expected = x.clone() if old == new else naive_switch(x, lengths, num_prefix, old, new)
    kept = x.clone()
    assert torch.allclose(switch_level(x, layout, old, new, inplace=False), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)
    assert switch_level(x, layout, old, new) is x
    assert torch.allclose(x, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x[: layout.num_tokens], kept[: layout.num_tokens])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_switch_level_up_after_down_is_the_identity(dtype):
    layout = make(SMALL, 2, 16)
    x = torch.randn(layout.num_rows, 4).to(dtype)
    x[layout.prefix_rows("scan").stop :] = 0
    again = switch_level(switch_level(x, layout, "scan", "slice", inplace=False), layout, "slice", "scan")
    has_children = torch.tensor([True, True, True, False]).repeat_interleave(2)
    live = slice(layout.num_tokens, layout.num_tokens + 8)
    torch.testing.assert_close(again[live][has_children], x[live][has_children], **tolerance(dtype))
    assert not again[live][~has_children].any()  # a scan without slices has nothing to average


@pytest.mark.parametrize("old, new", [p for p in PAIRS if p[0] != p[1]])
@pytest.mark.parametrize("inplace", [True, False])
def test_switch_level_gradient(old, new, inplace):
    layout = make(SMALL, 2, 8)
    x = torch.randn(layout.num_rows, 3, dtype=torch.float64, requires_grad=True)

    def f(x):  # used before and after, so that a gradient that overwrote its neighbour's would show
        y = x * 2
        return switch_level(y, layout, old, new, inplace=inplace).sin() + x

    assert torch.autograd.gradcheck(f, x)


def test_switch_level_in_place_tells_autograd():
    layout = make(SMALL, 1)
    x = torch.randn(layout.num_rows, 3, requires_grad=True)
    y = x * 2
    z = y.square()  # keeps y for its gradient
    switch_level(y, layout, "slice", "scan")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
    with pytest.raises(RuntimeError, match="leaf"):
        switch_level(x, layout, "slice", "scan")


def test_a_checkpointed_block_sees_the_tail_as_it_was():
    layout = make(RAGGED, 1)
    weight = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(layout.num_rows, 16, requires_grad=True)

    def block(x, level):
        h = (x @ weight).view(-1, 2, 8)
        return x + attention(h, h, h, layout, level).flatten(1)

    def run(how, inplace):
        y = x * 1
        for old, new in (("slice", "scan"), ("scan", "study"), ("study", "slice")):
            y = switch_level(how(block, y, old), layout, old, new, inplace=inplace)
        return torch.autograd.grad(y.square().sum(), (x, weight))

    plain = run(lambda f, *a: f(*a), True)
    for inplace in (True, False):
        again = run(lambda f, *a: checkpoint(f, *a, use_reentrant=False), inplace)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    def whole(x):  # the switch itself inside what is recomputed
        return switch_level(block(x, "slice"), layout, "slice", "scan", inplace=False).square().sum()

    expected = torch.autograd.grad(whole(x), (x, weight))
    got = torch.autograd.grad(checkpoint(whole, x, use_reentrant=False), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


# ------------------------------------------------------------------ patchify

SHAPES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)
PATCHES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def naive_patchify(volumes, patch, edge, mean, std, max_value):
    """One volume, one patch at a time."""
    rows = []
    for volume in volumes:
        volume = (volume.double() / max_value - mean) / std
        outside = -mean / std
        if edge == "pad":
            missing = [(-n) % p for n, p in zip(volume.shape, patch, strict=True)]
            volume = F.pad(volume, (0, missing[2], 0, missing[1], 0, missing[0]), value=outside)
        d, h, w = (n // p for n, p in zip(volume.shape, patch, strict=True))
        for z in range(d):
            for y in range(h):
                for x in range(w):
                    a, b, c = z * patch[0], y * patch[1], x * patch[2]
                    rows.append(volume[a : a + patch[0], b : b + patch[1], c : c + patch[2]].reshape(-1))
    size = patch[0] * patch[1] * patch[2]
    return torch.stack(rows) if rows else torch.zeros(0, size).double()


@pytest.mark.parametrize("edge", ["pad", "crop"])
@pytest.mark.parametrize("stored", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64], ids=str)
@given(shapes=SHAPES, patch=PATCHES, seed=st.integers(0, 5))
def test_patchify_on_ragged_volumes(edge, stored, shapes, patch, seed):
    generator = torch.Generator().manual_seed(seed)
    volumes = [torch.randint(0, 200, shape, generator=generator).to(stored) for shape in shapes]
    options = {"mean": 0.4, "std": 0.2, "max_value": 250.0, "edge": edge}
    expected = naive_patchify(volumes, patch, edge, 0.4, 0.2, 250.0)
    got = patchify(volumes, patch, **options)
    assert got.dtype == torch.float32 and len(got) == sum(d * h * w for d, h, w in patch_grids(shapes, patch, edge=edge))
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    flat = torch.cat([v.reshape(-1) for v in volumes])
    assert torch.equal(patchify(flat, patch, shapes=shapes, **options), got)
    keep = torch.randperm(len(got), generator=generator)[: len(got) // 2]
    assert torch.equal(patchify(volumes, patch, keep=keep, **options), got[keep])


@pytest.mark.parametrize("flat", [False, True])
def test_patchify_compiles_once_for_volumes_of_any_size(flat):
    torch._dynamo.reset()

    def run(volumes):
        if not flat:
            return patchify(volumes, (2, 2, 2), mean=0.4)
        voxels = torch.cat([volume.flatten() for volume in volumes])
        return patchify(voxels, (2, 2, 2), shapes=[volume.shape for volume in volumes], edge="crop")

    counter, once = CompileCounterWithBackend("aot_eager"), None
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for i in range(3, 8):  # from sizes that all differ: torch takes equal ones for one size, until they are not
        volumes = [torch.randn(shape, requires_grad=True) for shape in ((2 * i, 5 + 2 * i, 6 + 2 * i), (4, 2 * i + 3, 7))]
        expected, got = run(volumes), compiled(volumes)
        assert torch.equal(got, expected)
        for a, b in zip(*(torch.autograd.grad(rows.square().sum(), volumes) for rows in (expected, got)), strict=True):
            torch.testing.assert_close(a, b)
        once = once or counter.frame_count
        assert counter.frame_count == once, f"compiled again for i = {i}"


def test_patchify_is_a_strided_convolution():
    conv = torch.nn.Conv3d(1, 6, (2, 3, 4), stride=(2, 3, 4))
    volume = torch.randn(5, 9, 10)
    rows = patchify([volume], (2, 3, 4), edge="crop")
    expected = conv(volume[None, None])[0].flatten(1).T
    torch.testing.assert_close(rows @ conv.weight.flatten(1).T + conv.bias, expected)


@pytest.mark.parametrize("edge", ["pad", "crop"])
@pytest.mark.parametrize("kept", [None, [4, 0, 3, 1], []])
def test_patchify_gradient(edge, kept):
    volumes = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 5), (2, 2, 3))]
    keep = None if kept is None else torch.tensor(kept, dtype=torch.int64)
    f = lambda *v: patchify(list(v), (2, 2, 2), mean=0.1, std=0.5, edge=edge, dtype=torch.float64, keep=keep)  # noqa: E731
    if kept == []:
        grads = torch.autograd.grad(f(*volumes).sum(), volumes)
        assert not any(g.any() for g in grads)
    else:
        assert torch.autograd.gradcheck(f, volumes)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: patchify([], (1, 1, 1)), ["empty"]),
        (lambda: patchify([torch.zeros(2, 2)], (1, 1, 1)), ["volumes[0]", "(D, H, W)"]),
        (lambda: patchify([torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).byte()], (1, 1, 1)), ["volumes[1]", "uint8"]),
        (lambda: patchify([torch.zeros(1, 1, 1).bool()], (1, 1, 1)), ["bool"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 0, 1)), ["patch", "(1, 0, 1)"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), edge="wrap"), ["edge", "wrap"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), std=0), ["std"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), std=float("nan")), ["std", "nan"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), max_value=float("nan")), ["max_value", "nan"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), mean=[0.5]), ["mean", "[0.5]"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], 2), ["patch", "(pd, ph, pw)", "2"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), shapes=[(1, 1, 1)]), ["shapes", "list"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), keep=[0, 1]), ["keep", "list"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), dtype="float32"), ["dtype", "float32"]),
        (lambda: patchify(3, (1, 1, 1)), ["volumes", "int"]),
        (lambda: patchify(torch.zeros(8), (1, 1, 1), shapes=8), ["shapes", "8"]),
        (lambda: patchify(torch.zeros(8), (1, 1, 1), shapes=[8]), ["volume 0", "(D, H, W)", "8"]),
        (lambda: patchify(torch.zeros(0), (1, 1, 1), shapes=[(0, 10**30, 1)]), ["volume 0", str(10**30)]),
        (lambda: patch_grids([(4, 4, 4)], (2.0, 2.0, 2.0)), ["patch", "2.0"]),
        (lambda: patch_grids([(4, 4, 4), (4, 4.0, 4)], (2, 2, 2)), ["volume 1", "4.0"]),
        (lambda: patch_grids([(4, 4, 4)], "222"), ["patch", "222"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), dtype=torch.int8), ["dtype", "int8"]),
        (lambda: patchify(torch.zeros(8), (1, 1, 1)), ["shapes"]),
        (lambda: patchify(torch.zeros(8), (1, 1, 1), shapes=[(2, 2, 3)]), ["12", "8"]),
        (lambda: patchify([torch.zeros(1, 1, 1)], (1, 1, 1), keep=torch.ones(1)), ["keep", "float32"]),
        (lambda: segment_mean([[0.0]], Layout.from_lengths([1]), "segment"), ["x", "tensor", "list"]),
        (lambda: attention(*[torch.zeros(1, 1, 0)] * 3, Layout.from_lengths([1]), "segment"), ["head dim", "0"]),
        (
            lambda: attention(*[torch.zeros(1, 1, 1).numpy()] * 3, Layout.from_lengths([1]), "segment"),
            ["q", "tensor", "ndarray"],
        ),
        (
            lambda: attention(*[torch.zeros(1, 1, 1)] * 2, None, Layout.from_lengths([1]), "segment"),
            ["v", "tensor", "NoneType"],
        ),
        (lambda: segment_mean(torch.zeros(4, 2), Layout.from_lengths([3]), "segment"), ["x", "4", "3"]),
        (lambda: segment_mean(torch.zeros(3), Layout.from_lengths([3]), "segment"), ["x", "(R, C)"]),
        (lambda: segment_mean(torch.zeros(3, 2), Layout.from_lengths([3]), "voxel"), ["voxel"]),
        (lambda: segment_mean(torch.zeros(3, 2, device="meta"), Layout.from_lengths([3]), "segment"), ["meta", "layout.to"]),
        (lambda: switch_level(torch.zeros(2, 3).T, Layout.from_lengths([[3]]), "scan", "study"), ["contiguous"]),
        (lambda: switch_level(torch.zeros(3, 2).int(), Layout.from_lengths([[3]]), "scan", "study"), ["int32"]),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_patches_to_keep_beyond_int32_do_not_wrap():
    for far in (2**32 + 1, -(2**32) + 1):
        with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds"):
            patchify([torch.zeros(2, 2, 2)], (1, 1, 1), keep=torch.tensor([far]))


# ------------------------------------------------------------------ registration


def op_samples():
    layout = make(SMALL, 2, 8)
    R = layout.num_rows
    qkv = torch.randn(R, 3, 2, 4, requires_grad=True)
    x = torch.randn(R, 3, requires_grad=True)
    chunks, chunk_offsets = layout.chunks("scan")
    voxels = torch.randn(40, requires_grad=True)
    return {
        "attention": (*qkv.unbind(1), layout.pattern("scan"), 0.5, "sdpa"),
        "segment_mean": (x, layout.offsets("scan"), chunks, chunk_offsets, layout.num_tokens, layout.num_segments("scan")),
        "switch_tail": (x, layout.children("slice", "scan"), layout.parents("slice", "scan"), 2, True, True),
        "patchify": (voxels, [2, 4, 5], None, 6, [2, 2, 2], "pad", 0.5, 0.1, torch.float32),
    }


@pytest.mark.parametrize("name", ["attention", "segment_mean", "switch_tail", "patchify"])
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.hlip, name).default, op_samples()[name])


# ------------------------------------------------------------------ the CUDA kernels' code, run on the host


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(lengths=ragged_lengths(), num_prefix=st.sampled_from(PREFIXES), channels=st.sampled_from((1, 5, 8, 40)))
def test_native_segment_ops_equal_torch(dtype, lengths, num_prefix, channels):
    layout = make(lengths, num_prefix, 16)
    x = torch.randn(layout.num_rows, channels).to(dtype)
    for level in LEVELS:
        offsets, sizes = layout.offsets(level), (layout.num_tokens, layout.num_rows)
        chunks, chunk_offsets = layout.chunks(level)
        got = native.segment_mean(x, offsets, chunks, chunk_offsets)
        torch.testing.assert_close(got, torch_segment_mean(x, offsets, sizes[0]), **tolerance(dtype))
        grad = native.segment_mean_backward(got, offsets, chunks, *sizes)
        torch.testing.assert_close(grad, torch_segment_mean_backward(got, offsets, *sizes), **tolerance(dtype))
    tail = x[layout.num_tokens :]
    for child, parent in (("slice", "scan"), ("slice", "study"), ("scan", "study")):
        tables = layout.children(child, parent), layout.parents(child, parent)
        for up in (True, False):
            for divide in (True, False):
                got, expected = (f(tail, *tables, num_prefix, up, divide) for f in (native.switch_tail, torch_switch_tail))
                torch.testing.assert_close(got, expected, **tolerance(dtype))


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", native.VOXEL_TYPES, ids=str)
@given(shapes=SHAPES, patch=PATCHES, edge=st.sampled_from(("pad", "crop")), part=st.booleans())
def test_native_patchify_equals_torch(dtype, stored, shapes, patch, edge, part):
    shapes = [s for s in shapes if min(s) > 0] or [(2, 3, 4)]
    voxels = torch.randint(0, 200, (sum(d * h * w for d, h, w in shapes),)).to(stored)
    grids = patch_grids(shapes, patch, edge=edge)
    table = _scan_table(shapes, grids)
    live = table[table[:, 4:7].prod(1) > 0].contiguous()
    count = int(table[:, 4:7].prod(1).sum())
    keep = torch.randperm(count)[: count // 2].int() if part else None
    rows = len(keep) if part else count
    if not rows:
        return
    got = native.patchify(voxels, live, keep, rows, patch, 0.02, -1.5, dtype)
    expected = torch_patchify(voxels, table, keep, patch, 0.02, -1.5, dtype)
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    if stored.is_floating_point:
        got = native.patchify_backward(got, live, keep, len(voxels), patch, 0.02, stored)
        expected = torch_patchify_backward(expected, table, keep, len(voxels), patch, 0.02, stored)
        torch.testing.assert_close(got, expected, **tolerance(stored if stored != torch.float32 else dtype))
