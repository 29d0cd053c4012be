"""What only a GPU can tell: kernels against float64, streams, graphs, synchronisation. Skipped without one.

Part of the GPU gate (``make gpu``). Inputs are drawn anew for every case; memory is poisoned before every call.
"""

import pytest
import torch
from attention_truth import relative, sdpa_by_segment

from hlip_kernels import HierarchicalAttention, Layout, attention, native, patchify, segment_mean, switch_level, warmup
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends.cuda import max_rows
from hlip_kernels.pattern import Plan

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

GRIDS = [[(2, 5, 7), (3, 9, 9), (8, 14, 14)], [], [(0, 2, 2), (1, 1, 1), (3, 8, 16)]]
SEGMENTS = 500  # of short ones, so that every multiprocessor has several
LONGEST = 1 << 20  # no limit but the backend's
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def layout():
    return Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")


def query(layout, level, dtype, head_dim, **pattern):
    plan = Plan.of(layout.pattern(level, **pattern))
    return Query("cuda", torch.cuda.get_device_capability(), dtype, head_dim, plan.longest, plan.sees_itself)


def sdpa_error(layout, level, qkv, dtype, truth):
    """The error of torch's own attention in the same dtype, segment by segment: output, then the gradient of qkv."""
    leaf = qkv.to(dtype).requires_grad_()
    out = sdpa_by_segment(*leaf.unbind(1), layout.dense_mask(level))
    (grad,) = torch.autograd.grad(out, leaf, truth[2].to(dtype))
    return relative(out, truth[0]), relative(grad, truth[1])


@pytest.mark.parametrize("head_dim", [16, 32, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda", "sdpa"])
def test_attention_error_is_at_most_twice_torchs_own(layout, backend, dtype, head_dim):
    support = BACKENDS[backend].supports(query(layout, "slice", dtype, head_dim))
    if not support:
        pytest.skip(support.reason)
    for level in layout.levels:
        if not BACKENDS[backend].supports(query(layout, level, dtype, head_dim)):
            continue  # longer segments than the cuda backend holds
        qkv = torch.randn(layout.num_rows, 3, 2, head_dim, dtype=torch.float64, device="cuda")
        g = torch.randn(layout.num_rows, 2, head_dim, dtype=torch.float64, device="cuda")
        g[layout.prefix_rows(level).stop :] = 0
        exact = qkv.to(dtype).double().requires_grad_()
        out = attention(*exact.unbind(1), layout, level, backend="reference")
        truth = out.detach(), torch.autograd.grad(out, exact, g.to(dtype).double())[0], g
        leaf = qkv.to(dtype).requires_grad_()
        got = attention(*leaf.unbind(1), layout, level, backend=backend)
        (grad,) = torch.autograd.grad(got, leaf, g.to(dtype))
        bound_out, bound_grad = sdpa_error(layout, level, qkv, dtype, truth)
        floor = 0.25 * torch.finfo(dtype).eps  # where torch is exact: the error of rounding the result once
        assert relative(got, truth[0]) <= 2 * bound_out + floor, level
        assert relative(grad, truth[1]) <= 2 * bound_grad + floor, level
        assert torch.equal(got[layout.prefix_rows(level).stop :], torch.zeros_like(got[layout.prefix_rows(level).stop :]))


@pytest.mark.parametrize("options", [{"neighbours": 1}, {"summary": "study"}, {"neighbours": 2, "summary": "scan"}], ids=str)
def test_patterns_and_lse_gradient(layout, options):
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda")
    weights = torch.randn(2, layout.num_rows, device="cuda")
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32), ("sdpa", torch.float32)):
        leaf = qkv.to(dtype).requires_grad_()
        out, lse = attention(*leaf.unbind(1), layout, "slice", backend=backend, return_lse=True, **options)
        loss = out.square().sum() + (lse * weights.to(dtype)).sum()
        results.append((out, lse, torch.autograd.grad(loss, leaf)[0]))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert relative(a, b.double()) < 1e-5


def test_repeats_are_the_same_bits(layout):
    qkv = torch.randn(layout.num_rows, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first = None
    for _ in range(50):
        out = attention(*qkv.unbind(1), layout, "study", backend="triton")
        (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
        if first is None:
            first = out.detach(), grad
        assert torch.equal(out, first[0]) and torch.equal(grad, first[1])


def test_nan_stays_in_its_study(layout):
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    rows = slice(0, int(layout.host_offsets("study")[1]))
    other = slice(rows.stop, layout.num_tokens)
    clean = attention(*qkv.unbind(1), layout, "study", backend="triton")
    qkv[rows] = float("nan")
    dirty = attention(*qkv.unbind(1), layout, "study", backend="triton")
    assert dirty[rows].isnan().all() and torch.equal(dirty[other], clean[other])


def test_rows_beyond_2_to_31_elements(needs_memory):
    """The last segments lie where an element offset no longer fits 32 bits."""
    heads, head_dim, length = 16, 64, 1000
    count = 2**31 // (3 * heads * head_dim * length) + 100
    needs_memory(8 * count * length * 3 * heads * head_dim)  # qkv, out, three gradients, and those joined
    layout = Layout.from_lengths([length] * count, levels=("study",)).to("cuda")
    qkv = torch.randn(layout.num_rows, 3, heads, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert qkv.numel() > 2**31
    out = attention(*qkv.unbind(1), layout, "study", backend="triton")
    (grad,) = torch.autograd.grad(out, qkv, out.detach())
    alone = Layout.from_lengths([length], levels=("study",)).to("cuda")
    last = qkv[-length:].detach().requires_grad_()
    expected = attention(*last.unbind(1), alone, "study", backend="triton")
    assert torch.equal(out[-length:], expected)
    assert torch.equal(grad[-length:], torch.autograd.grad(expected, last, expected.detach())[0])


def test_no_synchronisation_and_streams(layout):
    x = torch.randn(layout.num_rows, 128, device="cuda", dtype=torch.bfloat16)
    layer = HierarchicalAttention(128, 2, qkv_bias=True, device="cuda", dtype=torch.bfloat16)
    expected = layer(x, layout, "scan")
    switch_level(x.clone(), layout, "slice", "scan")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fresh = Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = layer(x, fresh, "scan")
            y = switch_level(out * 1, fresh, "scan", "study")
            segment_mean(y, fresh, "study").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert expected.isfinite().all() and relative(out, expected.double()) < 0.01  # cuBLAS promises bits on one stream alone


@pytest.mark.parametrize("backend", ["triton", "cuda", "sdpa", "flash"])
def test_tables_made_on_one_stream_are_read_on_another(layout, backend):
    """Their copies are held up on the first; and they are freed there while the second, held up too, has yet to read them."""
    support = BACKENDS[backend].supports(query(layout, "slice", torch.bfloat16, 64))
    if not support:
        pytest.skip(support.reason)
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(layout.num_rows, 2, 64, device="cuda", dtype=torch.bfloat16)

    def run(layout):
        out = attention(*qkv.unbind(1), layout, "slice", backend=backend)
        return out.detach(), torch.autograd.grad(out, qkv, g)[0]

    def zeros():  # what tables of too early or too late hold: such indices are wrong, yet inside of every tensor
        for kibibytes in (1, 4, 16, 64, 256) * 8:
            yield torch.zeros(kibibytes * 256, dtype=torch.int32, device="cuda")

    expected = run(layout)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    fresh = Layout.from_grids(GRIDS, num_prefix=2, row_multiple=64).to("cuda")
    with torch.cuda.stream(first):
        run(layout)
        list(zeros())
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(10**8)  # some 50 ms
        run(fresh)
    with torch.cuda.stream(second):
        results = [run(fresh)]
        torch.cuda._sleep(10**8)
        results.append(run(fresh))
    del fresh
    with torch.cuda.stream(first):
        overwritten = list(zeros())
    torch.cuda.synchronize()
    assert overwritten and all(torch.equal(a, b) for got in results for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_of_a_layer(layout, backend):
    x = torch.randn(layout.num_rows, 128, device="cuda", dtype=torch.bfloat16)
    layer = HierarchicalAttention(128, 2, qkv_bias=True, backend=backend, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x, layout, "slice")  # compiled and tabled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x, layout, "slice")
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = layer(x, layout, "slice")
        # Not the same bits: cuBLAS may take another kernel for the products of the layer in a graph.
        assert expected.isfinite().all() and relative(out, expected.double()) < 0.01


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph_of_attention_is_the_same_bits(layout, backend):
    qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        attention(*qkv.unbind(1), layout, "slice", backend=backend)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(*qkv.unbind(1), layout, "slice", backend=backend)
        qkv.copy_(torch.randn_like(qkv))
        graph.replay()
        assert torch.equal(out, attention(*qkv.unbind(1), layout, "slice", backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_tiny_segments_in_packs(head_dim, dtype):
    """Every length up to the longest the cuda backend holds, a NaN in one of them, gradients, and the same bits again."""
    limit = min(max_rows(head_dim, torch.cuda.get_device_capability()), LONGEST)
    lengths = [n % 65 for n in range(SEGMENTS)] + [limit - 2, 100, 143, 144, limit - 17]
    layout = Layout.from_lengths(lengths, num_prefix=2, levels=("slice",), row_multiple=64).to("cuda")
    qkv = torch.randn(layout.num_rows, 3, 3, head_dim, device="cuda", dtype=dtype, requires_grad=True)
    g = torch.randn(layout.num_rows, 3, head_dim, device="cuda", dtype=dtype)
    results = {}
    for backend in ("reference", "cuda", "triton", "cuda again"):
        leaf = qkv.detach().clone().requires_grad_()
        out, lse = attention(*leaf.unbind(1), layout, "slice", backend=backend.split()[0], return_lse=True)
        (grad,) = torch.autograd.grad((out, lse), leaf, (g, torch.ones_like(lse)))
        results[backend] = out, lse, grad
    for got, again, triton, truth in zip(*(results[b] for b in ("cuda", "cuda again", "triton", "reference")), strict=True):
        assert torch.equal(got, again)
        assert relative(got, truth.double()) <= 1.5 * relative(triton, truth.double()) + 0.25 * torch.finfo(dtype).eps
    offsets = layout.host_offsets("slice")
    bad = qkv.detach().clone()
    bad[offsets[33]] = float("nan")  # a segment of 33 rows, in a pack with others
    leaf = bad.requires_grad_()
    out = attention(*leaf.unbind(1), layout, "slice", backend="cuda")
    (grad,) = torch.autograd.grad(out, leaf, g)
    clean = attention(*qkv.unbind(1), layout, "slice", backend="cuda")
    (clean_grad,) = torch.autograd.grad(clean, qkv, g)
    others = torch.ones(layout.num_rows, dtype=torch.bool)
    others[offsets[33] : offsets[34]] = False
    others[layout.num_tokens + 66 : layout.num_tokens + 68] = False
    others = others.cuda()
    assert out[~others].isnan().any() and torch.equal(out[others], clean[others])
    assert grad[~others].isnan().any() and torch.equal(grad[others], clean_grad[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("longest", [128, 256])
def test_whole_segments_one_after_another(longest, head_dim, dtype):
    """Several for each block that stays on the card, long after short and the reverse: rows of the next come early."""
    longest = min(longest, max_rows(head_dim, torch.cuda.get_device_capability()))
    lengths = [63 + 37 * n % (longest - 64) for n in range(SEGMENTS)]  # and two prefix rows: 65 to longest
    layout = Layout.from_lengths(lengths, num_prefix=2, levels=("slice",), row_multiple=64).to("cuda")
    qkv = torch.randn(layout.num_rows, 3, 3, head_dim, device="cuda", dtype=dtype)
    g = torch.randn(layout.num_rows, 3, head_dim, device="cuda", dtype=dtype)
    results = {}
    for backend in ("reference", "triton", "cuda", "cuda again", "cuda without lse"):
        leaf = qkv.clone().requires_grad_()
        out, lse = attention(*leaf.unbind(1), layout, "slice", backend=backend.split()[0], return_lse=True)
        wanted = ((out,), (g,)) if "without" in backend else ((out, lse), (g, torch.ones_like(lse)))
        results[backend] = torch.autograd.grad(wanted[0], leaf, wanted[1])[0]
    assert torch.equal(results["cuda"], results["cuda again"])
    bound = 1.5 * relative(results["triton"], results["reference"].double()) + 0.25 * torch.finfo(dtype).eps
    assert relative(results["cuda"], results["reference"].double()) <= bound
    halves = BACKENDS.get("cuda_halves")
    if halves and halves.supports(query(layout, "slice", dtype, head_dim)):
        leaf = qkv.clone().requires_grad_()
        (other,) = torch.autograd.grad(attention(*leaf.unbind(1), layout, "slice", backend="cuda_halves"), leaf, g)
        assert relative(results["cuda without lse"], other.double()) < torch.finfo(dtype).eps
    poisoned = qkv.clone()
    bad = slice(*layout.host_offsets("slice")[7:9])
    poisoned[bad.start] = float("nan")
    leaf = poisoned.requires_grad_()
    (dirty,) = torch.autograd.grad(attention(*leaf.unbind(1), layout, "slice", backend="cuda"), leaf, g)
    others = torch.ones(layout.num_rows, dtype=torch.bool, device="cuda")
    others[bad] = others[layout.num_tokens + 14 : layout.num_tokens + 16] = False
    assert dirty[~others].isnan().any() and torch.equal(dirty[others], results["cuda without lse"][others])


def test_new_lengths_never_compile_a_kernel_again(monkeypatch):
    from triton import knobs

    warmup([Layout.from_grids(GRIDS, num_prefix=2).to("cuda")], heads=2, head_dim=64, dtype=torch.bfloat16, backend="triton")
    compiled = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **what: compiled.append(what["repr"]))
    for depth in (1, 2, 5, 16):
        layout = Layout.from_grids([[(depth, 3, 5), (1, 7, 7)]] * depth, num_prefix=2).to("cuda")
        for level in layout.levels:
            qkv = torch.randn(layout.num_rows, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            attention(*qkv.unbind(1), layout, level, backend="triton").sum().backward()
    assert not compiled


def test_compiled_layer_equals_eager(layout):
    layer = HierarchicalAttention(128, 2, qkv_bias=True, device="cuda")
    x = torch.randn(layout.num_rows, 128, device="cuda", requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for level in ("slice", "study"):
        a, b = layer(x, layout, level), compiled(x, layout, level)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (a, b)), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(bool(native.why_missing()), reason="the CUDA extension is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 40, 5])
def test_native_ops_equal_torch(layout, dtype, channels):
    from hlip_kernels.ops.segment_mean import torch_segment_mean, torch_segment_mean_backward
    from hlip_kernels.ops.switch_level import torch_switch_tail

    x = torch.randn(layout.num_rows, channels, device="cuda", dtype=dtype)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for level in layout.levels:
        chunks, chunk_offsets = layout.chunks(level)
        offsets = layout.offsets(level)
        got = native.segment_mean(x, offsets, chunks, chunk_offsets)
        torch.testing.assert_close(got, torch_segment_mean(x, offsets, layout.num_tokens), **tolerance)
        sizes = layout.num_tokens, layout.num_rows
        grad = native.segment_mean_backward(got, offsets, chunks, *sizes)
        torch.testing.assert_close(grad, torch_segment_mean_backward(got, offsets, *sizes), **tolerance)
    tail = x[layout.num_tokens :]
    for child, parent in (("slice", "scan"), ("slice", "study"), ("scan", "study")):
        tables = layout.children(child, parent), layout.parents(child, parent)
        for up in (True, False):
            for divide in (True, False):
                got, expected = (f(tail, *tables, 2, up, divide) for f in (native.switch_tail, torch_switch_tail))
                torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("edge", ["pad", "crop"])
def test_patchify_equals_the_cpu(stored, edge):
    volumes = [torch.randint(0, 200, shape).to(stored) for shape in ((5, 17, 33), (0, 16, 16), (9, 8, 16), (16, 48, 48))]
    for patch in ((2, 8, 8), (3, 5, 7)):
        options = {"mean": 0.449, "std": 0.226, "max_value": 255, "edge": edge}
        expected = patchify(volumes, patch, **options)
        got = patchify([v.cuda() for v in volumes], patch, **options)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
        keep = torch.randperm(len(expected))[: len(expected) // 2]
        got = patchify([v.cuda() for v in volumes], patch, keep=keep.cuda(), **options)
        torch.testing.assert_close(got.cpu(), expected[keep], rtol=1e-5, atol=1e-5)


def small_encoder(name):
    """An encoder in evaluation mode and a batch, on the CPU."""
    from dataclasses import replace

    from hlip.model import VARIANTS, HLIPEncoder, StudyBatch

    encoder = HLIPEncoder(replace(VARIANTS[name].encoder, width=128, heads=2)).eval()
    batch = StudyBatch.pack(
        [[torch.randint(0, 255, (d, 64, 64), dtype=torch.uint8) for d in (7, 12)], [torch.zeros(20, 64, 64).byte()]]
    )
    return encoder, batch


ENCODERS = ["vit_base_slice_scan_study_dualdinotxt1568", "ablate_rope_vit_base_multiscan_h2_dinotxt1568"]


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_on_the_gpu_equals_the_cpu(name):
    encoder, batch = small_encoder(name)
    with torch.no_grad():
        expected = encoder(batch)
        got = encoder.cuda()(batch.to("cuda"))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_does_not_synchronise(name):
    encoder, batch = small_encoder(name)
    encoder, batch = encoder.cuda(), batch.to("cuda")
    with torch.no_grad():
        expected = encoder(batch)  # what the first call builds may wait for the card
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = encoder(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
