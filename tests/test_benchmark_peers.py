"""The peers of the benchmarks: that they compute the same, without slow detours, and that a GPU could run the list of cases."""

import sys
import time
import tracemalloc
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from _pytest.outcomes import Skipped

from benchmarks import peers as peers_module
from benchmarks import workloads
from benchmarks.order import Order, equal_lengths, segment_rows
from benchmarks.peers import flex_mask, padded_flops, peers, too_much
from hlip_kernels import Layout, attention
from hlip_kernels.pattern import Plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def workload(lengths, num_prefix=1, row_multiple=1, heads=2, head_dim=64):
    layout = Layout.from_lengths(lengths, num_prefix=num_prefix, row_multiple=row_multiple, levels=("slice",))
    return workloads.Workload("w", layout, ("slice",), heads, head_dim)


RAGGED = [
    workload([5, 130, 1, 0, 300, 64, 257, 2], num_prefix=2, row_multiple=64),
    workload([128, 256, 128, 7], num_prefix=0),
    workload([3, 1, 4, 1, 5, 9, 2, 6] * 8, num_prefix=3, row_multiple=128),
    workload([700], num_prefix=1, row_multiple=256),
    workload([196] * 6, num_prefix=2, row_multiple=16),
    workload([128] * 3, num_prefix=128),
    workload([20, 3], num_prefix=4),
]


def inputs(w, grad=False):
    shape = w.layout.num_rows, w.heads, w.head_dim
    return [torch.randn(shape, requires_grad=grad) for _ in range(3)]


def truth(w, q, k, v):
    return attention(q, k, v, w.layout, w.levels[0], backend="reference")


def attend_each(q, k, v, offsets, longest):
    """Varlen attention, one segment after the other."""
    parts = [t.split(offsets.diff().tolist()) for t in (q, k, v)]
    whole = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in qkv)).transpose(0, 1) for qkv in zip(*parts, strict=True)
    ]
    assert longest == max(map(len, whole))
    return torch.cat(whole)


# ---------------------------------------------------------------------- the others compute the same


def check_against_truth(w, run):
    q, k, v = inputs(w, grad=True)
    live = w.layout.prefix_rows("slice").stop
    out, exact = run(q, k, v), truth(w, q, k, v)
    torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
    assert (out[live:] == 0).all() and len(out) == w.layout.num_rows
    g = torch.randn_like(out)
    g[live:] = 0
    for got, right in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(exact, (q, k, v), g), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(q, k, v), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("w", RAGGED)
def test_padded_and_varlen_are_attention(w):
    check_against_truth(w, peers_module._padded(w, "slice", CPU, torch.float32).run)
    check_against_truth(w, peers_module._varlen("any", w, "slice", CPU, attend_each).run)


@pytest.mark.parametrize("w", [w for w in RAGGED if equal_lengths(w, "slice")])
def test_published_and_cudnn_are_attention_where_segments_are_equal(w, monkeypatch):
    check_against_truth(w, peers_module._published(w, "slice", CPU).run)

    def cudnn(q, k, v, mask, lse):
        assert mask is None and lse == (torch.is_grad_enabled() and q.requires_grad)
        n, heads, length, dim = q.shape
        for t in (q, k, v):  # the layout cuDNN takes as it is
            assert t.stride() == (length * heads * dim, dim, heads * dim, 1)
        return F.scaled_dot_product_attention(q, k, v), None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    check_against_truth(w, peers_module._cudnn(w, "slice", CPU).run)


def test_the_published_path_repeats_tokens_of_the_same_segment():
    w = RAGGED[0]
    order = Order.of(w, "slice", CPU, "repeated")
    dense = order.index.view(len(order.lengths), order.longest)
    for own, got in zip(segment_rows(w, "slice"), dense.tolist(), strict=True):
        assert set(got[-2:]) == set(own[-2:].tolist())
        assert set(got[:-2]) == set(own[:-2].tolist()) or len(own) == 2
    out = peers_module._published(w, "slice", CPU).run(*inputs(w, grad=True))
    assert out.isfinite().all()
    x = torch.randn(w.layout.num_rows, 3, requires_grad=True)
    there = order.gather(x)
    torch.testing.assert_close(order.scatter(there)[: order.live], x[: order.live])
    (back,) = torch.autograd.grad(there, x, torch.ones_like(there))
    assert (back[: order.live] == 1).all() and (back[order.live :] == 0).all()  # copies are tokens of others


def test_the_added_mask_needs_no_copy_in_sdpa():
    order = Order.of(RAGGED[0], "slice", CPU, "padding")
    mask = order.mask(torch.bfloat16)
    assert mask.shape == (8, 1, 1, 302) and mask.stride(0) % 16 == 0 and mask.stride(-1) == 1
    assert (mask[:, 0, 0] == 0).sum(1).tolist() == order.lengths.tolist()
    assert Order.of(RAGGED[4], "slice", CPU, "padding").mask(torch.bfloat16) is None


# ---------------------------------------------------------------------- FlexAttention


def listed(counts, indices):
    return [set(row[:n].tolist()) for n, row in zip(counts[0, 0].tolist(), indices[0, 0], strict=True)]


@pytest.mark.parametrize("w", RAGGED)
def test_the_block_mask_is_what_create_block_mask_finds(w):
    from torch.nn.attention.flex_attention import create_block_mask

    rows = w.layout.num_rows
    ours = flex_mask(w, "slice", CPU)
    theirs = create_block_mask(ours.mask_mod, None, None, rows, rows, device="cpu")
    i = torch.arange(rows)
    assert torch.equal(ours.mask_mod(0, 0, i[:, None], i[None, :]), Plan.of(w.layout.pattern("slice")).dense_mask())
    assert ours.seq_lengths == theirs.seq_lengths == (rows, rows) and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        a, b = (getattr(m, f"{kind}_num_blocks") for m in (ours, theirs))
        assert torch.equal(a, b) and a.dtype == b.dtype, kind
        c, d = (getattr(m, f"{kind}_indices") for m in (ours, theirs))
        assert listed(a, c) == listed(b, d) and c.shape == d.shape and c.dtype == d.dtype, kind


def test_the_block_mask_of_a_large_batch_is_quick_and_small():
    w = workloads.make("uncurated_ct", full=True)  # 394218 rows; R * R entries would be 145 GiB
    tracemalloc.start()
    begin = time.perf_counter()
    mask = flex_mask(w, "slice", CPU)
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**30 and seconds < 60
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == 17202


def test_one_graph_of_flex_attention_serves_all_layouts(monkeypatch):
    """The unfused function would make all scores; it warns once per process, so here its warning is an error."""
    import torch._dynamo.utils
    import torch.nn.attention.flex_attention as flex

    def unfused(*args, **kwargs):
        raise AssertionError(f"not compiled: {args} {kwargs}")

    monkeypatch.setattr(flex, "_warn_once", unfused)
    torch._dynamo.reset()
    peers_module._compiled_flex.cache_clear()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generator = torch.Generator().manual_seed(0)
    made = [w for w in RAGGED if w.layout.num_rows > 128]
    for i in range(8):
        lengths = torch.randint(1, 300, (int(torch.randint(2, 30, (), generator=generator)),), generator=generator).tolist()
        made.append(workload(lengths, num_prefix=i % 3, row_multiple=1 + 13 * i))
    try:
        for w in made:
            run = peers_module._flex(w, "slice", CPU).run
            q, k, v = inputs(w)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*materializes the full scores.*")
                out = run(q, k, v)  # with and without gradients enabled: the same graph
                with torch.no_grad():
                    torch.testing.assert_close(run(q, k, v), out)
            torch.testing.assert_close(out, truth(w, q, k, v), rtol=1e-4, atol=1e-5)
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("no C++ compiler")
    assert len(made) >= 12 and torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    # Measuring a backward pass again and again keeps its graph.
    assert not torch._functorch.config.donated_buffer


# ---------------------------------------------------------------------- what would run on a GPU


@pytest.fixture
def gpu(monkeypatch):
    """As much of an H100 as making the list of cases asks for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")


def test_cases_on_a_gpu(gpu, monkeypatch):
    real = peers_module._installed
    monkeypatch.setattr(peers_module, "_installed", lambda m: m == "flash_attn" or real(m))
    for name in workloads.NAMES:
        w = workloads.make(name, full=True)
        for level in w.levels:
            made = peers(w, level, CUDA, torch.bfloat16)
            equal = len({len(rows) for rows in segment_rows(w, level)}) == 1
            assert {"published path", "padded SDPA", "FlexAttention", "torch varlen", "flash-attn varlen"} <= set(made)
            assert ("cuDNN SDPA" in made) == equal and "flash-attn 3 varlen" not in made
            assert not {"torch varlen", "cuDNN SDPA"} & set(peers(w, level, CUDA, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not {"torch varlen", "cuDNN SDPA"} & set(peers(w, level, CUDA, torch.float16))


def test_peers_that_mostly_pad_are_left_out_on_a_gpu_alone(gpu):
    w = workloads.make("long_tail", full=True)
    made = peers(w, "study", CUDA, torch.bfloat16)
    for name in ("published path", "padded SDPA"):
        with pytest.raises(Skipped, match="padded to 387 TFLOP a forward call for 12.3 of work; measured up to 60"):
            made[name]()
    full = {name: workloads.make(name, full=True) for name in workloads.NAMES}
    left_out = {
        (name, level)
        for name, w in full.items()
        for level in w.levels
        if too_much(padded_flops(w, level), w.attention_flops(level), CUDA)
    }
    assert left_out == {("long_tail", "study"), ("uncurated_mri", "study")}
    assert not too_much(1e15, 1e13, CPU) and not too_much(1e14, 1e14, CUDA) and too_much(1e14, 5e13, CUDA)


@pytest.mark.parametrize("gives_lse", [False, True])
def test_flash_attn_is_called_by_the_names_it_knows(gives_lse, monkeypatch):
    w = RAGGED[0]
    module = types.ModuleType("flash_attn_stand_in")

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_k=None, causal=False):
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k) and not causal
        out = attend_each(q, k, v, cu_seqlens_q, max_seqlen_k)
        return (out, None) if gives_lse else out

    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, module.__name__, module)
    check_against_truth(w, peers_module._varlen("f", w, "slice", CPU, peers_module._flash_attn(module.__name__)).run)


def test_torch_varlen_takes_what_it_is_given():
    """Its own shape function, on tensors that say they are on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("torch.nn.attention.varlen")
    with FakeTensorMode():
        q, k, v = (torch.empty(50, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        offsets = torch.zeros(4, dtype=torch.int32, device="cuda")
        assert peers_module.torch_varlen(q, k, v, offsets, 30).shape == q.shape


def test_a_folder_without_code_is_no_module(tmp_path, monkeypatch):
    (tmp_path / "some_namespace_only").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not peers_module._installed("some_namespace_only") and not peers_module._installed("nowhere.at.all")
    assert peers_module._installed("torch.nn.attention.varlen") or torch.__version__ < "2.10"
