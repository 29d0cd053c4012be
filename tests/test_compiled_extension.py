"""The CUDA extension as nvcc compiles it, executed on the CPU: its host code, its launches, and the PTX of every kernel.

tests/ptx has what executes it. The same kernels' source runs in tests/test_short_attention.py and tests/test_ops.py, for many
more layouts, but there csrc/device/cuda.cuh, and what nvcc makes of the rest, are not seen.
"""

import contextlib

import pytest
import test_short_attention as short
import test_whole_backward as whole
import torch
from attention_truth import RAGGED, make, naive_attention, naive_mask, relative, sdpa_by_segment
from emulated_attention import plan_of
from ptx.block_memory import BlockMemory
from ptx.extension import STREAM, WRITTEN, CompiledCudaBackend, extension
from ptx.extension_build import readable
from ptx.program import PtxError
from test_short_attention import DTYPES, tensors

from hlip_kernels import attention, native, patch_grids
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Numerics, Query
from hlip_kernels.backends.cuda import HEAD_DIMS, max_rows
from hlip_kernels.ops.patchify import _scan_table, torch_patchify, torch_patchify_backward
from hlip_kernels.pattern import Plan

pytestmark = pytest.mark.usefixtures("poisoned")  # what a kernel leaves unwritten is NaN

IN_C = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.uint8: "unsigned char",
        torch.int16: "short"}  # fmt: skip
FLOATS = native.FLOAT_TYPES
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in IN_C}
CAPABILITIES = {227 << 10: (9, 0), 163 << 10: (8, 0), 99 << 10: (8, 6)}  # by the shared memory that blocks may have
kernels_of = pytest.mark.parametrize(
    "dtype, head_dim", [pytest.param(t, d, id=f"{NAMES[t]}-{d}") for t in DTYPES for d in HEAD_DIMS]
)


@pytest.fixture
def compiled():
    """The extension, with no launches and no errors yet."""
    made = extension()
    made.start_anew()
    return made


def launched(compiled):
    """Instantiations, in the order of their launches, each once. All went to the stream that was given."""
    assert {launch.stream for launch in compiled.launches} == {STREAM}
    return list(dict.fromkeys(launch.what for launch in compiled.launches))


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ------------------------------------------------------------------ attention


@pytest.mark.parametrize("rows", [80, 145, 208])
@kernels_of
def test_forward(compiled, dtype, head_dim, rows):
    """A segment with a pack of its own, and some that share one; q, k and v are views of one tensor."""
    lengths = [rows - 2, 5, 0, 1, 33]
    layout = make([[lengths]], 2, 8)
    plan = Plan.of(layout.pattern("slice"))
    mask = naive_mask([[lengths]], 2, plan.num_rows, "slice")
    q, k, v, _ = whole.KINDS["packed"](plan.num_rows, dtype, head_dim, heads=2)
    out, lse = CompiledCudaBackend(capability=(9, 0)).forward(q, k, v, plan, head_dim**-0.5, Numerics())
    whole_forward, forward = launched(compiled)
    assert whole_forward.startswith(f"short_attention_whole_forward<{IN_C[dtype]}, {head_dim}, ")
    assert forward.startswith(f"short_attention_forward<{IN_C[dtype]}, {head_dim}, ")
    right, true_lse = naive_attention(q, k, v, mask)
    error, bound = relative(out, right), relative(sdpa_by_segment(q, k, v, mask), right)
    assert error <= 2 * bound + 0.25 * torch.finfo(dtype).eps, f"{error:.2e} against {bound:.2e} of torch"
    assert float((lse - true_lse).abs().max()) < 1e-5 * (1 + float(true_lse.abs().max()))
    assert not out[~mask.any(1)].any() and not lse[:, ~mask.any(1)].any()


@kernels_of
def test_backward(compiled, dtype, head_dim):
    """Packs of tiny segments, one that spans tiles, prefix rows, and rows that no segment holds."""
    backend = CompiledCudaBackend(halves=True)
    short.check(backend, [3, 1, 0, 8, 20, 66, 2], 1, dtype, head_dim, row_multiple=32)
    _, forward, backward = launched(compiled)
    assert forward.startswith(f"short_attention_forward<{IN_C[dtype]}, {head_dim}, ")
    assert backward.startswith(f"short_attention_backward<{IN_C[dtype]}, {head_dim}, ")


@whole.dtypes
@whole.ways
def test_whole_backward(compiled, way, dtype):
    """One multiprocessor: blocks take several segments, of which there are longer and shorter ones."""
    backend = CompiledCudaBackend(capability=CAPABILITIES[way.card], multiprocessors=1)
    lengths = [way.lengths[1], max(way.lengths), way.lengths[3]]
    assert whole.whole_launch(max(lengths), way.head_dim, way.card) == way.launch
    whole.check(backend, [n - 1 for n in lengths], 1, dtype, way.head_dim, heads=1)
    (found,) = (launch for launch in compiled.launches if "whole_backward" in launch.what)
    assert found.what.startswith(
        f"short_attention_whole_backward<{IN_C[dtype]}, {way.head_dim}, {way.launch.warps}, {way.launch.step}, "
    )
    assert found.grid == (min(3, way.launch.blocks), 1, 1) and found.block == (32 * way.launch.warps, 1, 1)
    assert found.shared == whole.whole_bytes(max(lengths), way.head_dim, way.launch.step, way.launch.keys)


@pytest.mark.parametrize(
    "dtype, head_dim, halves",
    [(torch.float16, 64, False), (torch.bfloat16, 32, False), (torch.bfloat16, 64, True), (torch.float16, 80, False)],
    ids=["float16-64-whole", "bfloat16-32-whole", "bfloat16-64-halves", "float16-80-halves"],
)
def test_gradient_of_the_log_sum_exp(compiled, dtype, head_dim, halves):
    short.test_gradient_of_the_log_sum_exp(CompiledCudaBackend(halves), dtype, head_dim)
    assert any("whole_backward" in what for what in launched(compiled)) == (not halves and head_dim < 80)


def spread(x):
    """The same values with gaps between heads and rows, on 16 bytes."""
    return torch.nn.functional.pad(x, (0, 8, 0, 1))[:, :-1, :-8]


@pytest.mark.parametrize("view", [spread, short.head_first, short.odd_row_stride])
@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 64), (torch.float16, 96)], ids=["bfloat16-64", "float16-96"])
def test_where_rows_lie_does_not_matter(compiled, dtype, head_dim, view):
    """Bit for bit, of inputs and the gradient of the output: read where they are, or copied if not on 16 bytes."""
    plan = plan_of([3, 0, 20, 70, 2], 1)
    inputs = tensors(plan.num_rows, dtype, head_dim)
    views = [view(t) for t in inputs]
    assert not any(t.is_contiguous() for t in views)
    results = [short.both(CompiledCudaBackend(), *given, plan) for given in (inputs, views)]
    assert all(map(same_bits, *results)) and len(launched(compiled)) == (4 if head_dim == 64 else 3)


@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
def test_a_nan_leaves_its_pack_alone(compiled, where):
    """The blocks that go over their segments one by one."""
    dtype = DTYPES[where in "kv"]
    short.leaves_its_pack_alone(CompiledCudaBackend(), dtype, 32, where, float("nan"), (6,))


def test_the_order_of_blocks_does_not_matter(compiled):
    plan = plan_of([4, 0, 7, 1, 100, 2, 2, 60, 3], 1, row_multiple=32)
    inputs, first = tensors(plan.num_rows, torch.float16, 64), None
    for compiled.seed, multiprocessors in ((1, 1), (17, 3), (2**40, 100)):
        got = short.both(CompiledCudaBackend(multiprocessors=multiprocessors), *inputs, plan)
        first = first or got
        assert all(map(same_bits, first, got))


def test_through_the_op(compiled, monkeypatch):
    """Chosen by name, with gradients of the inputs and of the log-sum-exp."""
    monkeypatch.setitem(BACKENDS, "cuda", CompiledCudaBackend(capability=(8, 6)))
    layout = make(RAGGED[:1], 1, 8)
    projected = torch.randn(layout.num_rows, 3, 2, 32).half().requires_grad_()
    grads = []
    for backend in ("cuda", "reference"):
        x = projected if backend == "cuda" else projected.double()
        out, lse = attention(*x.unbind(1), layout, level="slice", backend=backend, return_lse=True)
        grads.append(torch.autograd.grad(out.double().square().sum() + lse.double().sin().sum(), projected)[0])
    assert len(compiled.launches) >= 2 and relative(*grads) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_longest_segment_fits_the_card(compiled, monkeypatch, head_dim, capability):
    """What the backend says it holds can be launched, forward and backward. No kernel runs here."""
    monkeypatch.setattr(compiled, "execute", lambda *given, **named: None)
    rows = max_rows(head_dim, capability)
    plan, (q, k, v, grad) = plan_of([rows]), tensors(rows, torch.float16, head_dim, heads=1)
    backend = CompiledCudaBackend(capability=capability)
    assert backend.supports(Query.of(q, plan)) and not backend.supports(Query.of(q, plan_of([rows + 1])))
    short.both(backend, q, k, v, grad, plan)
    assert len(compiled.launches) == 2


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 132])
def test_blocks_that_take_one_segment_after_the_other(compiled, monkeypatch, multiprocessors):
    """As many as are resident at once, and no more than there are segments times heads."""
    monkeypatch.setattr(compiled, "execute", lambda *given, **named: None)
    backend = CompiledCudaBackend(capability=(9, 0), multiprocessors=multiprocessors)
    plan = plan_of([200, 200, 128, 112, 80, 66, 4])
    short.both(backend, *tensors(plan.num_rows, torch.float16, 64, heads=3), plan)
    whole_forward, forward, large, small, others = compiled.launches
    assert (whole_forward.grid[0], forward.grid[0], others.grid[0]) == (6 * 3, 3, 3)
    assert "<__half, 64, 8, " in large.what and large.grid[0] == min(2 * 3, multiprocessors)
    assert "<__half, 64, 4, " in small.what and small.grid[0] == min(4 * 3, 2 * multiprocessors)


# ------------------------------------------------------------------ ops bound by memory: the bits of their loop on the host


@pytest.mark.parametrize("channels", [24, 7], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_segment_ops(compiled, dtype, channels):
    width = 16 // dtype.itemsize if channels == 24 else 1

    def run():
        for num_prefix in (1, 5):
            layout = make(RAGGED, num_prefix, 16)
            torch.manual_seed(num_prefix)
            x = torch.randn(layout.num_rows, channels).to(dtype)
            for level in ("slice", "study"):
                offsets, (chunks, chunk_offsets) = layout.offsets(level), layout.chunks(level)
                yield native.segment_mean(x, offsets, chunks, chunk_offsets)
                grad = torch.randn(layout.num_segments(level), channels).to(dtype)
                yield native.segment_mean_backward(grad, offsets, chunks, layout.num_tokens, layout.num_rows)
            tables = layout.children("slice", "scan"), layout.parents("slice", "scan")
            for up, divide in ((True, True), (True, False), (False, True), (False, False)):
                yield native.switch_tail(x[layout.num_tokens :], *tables, num_prefix, up, divide)

    with compiled.in_use():
        got = list(run())
    with compiled.on_host():
        expected = list(run())
    assert all(map(same_bits, got, expected)) and all(t.isfinite().all() for t in got)
    of = f"<{IN_C[dtype]}, {width}>"
    assert set(launched(compiled)) == {name + of for name in SEGMENT_KERNELS}


SEGMENT_KERNELS = ("SumChunk", "FinishMean", "SpreadMean", "Zero", "SwitchTail")
PATCHES = {"wide": (2, 2, 8), "narrow": (2, 3, 5)}


@pytest.mark.parametrize("width", PATCHES)
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("stored", native.VOXEL_TYPES, ids=NAMES.get)
def test_patchify(compiled, stored, dtype, width):
    """Ragged volumes, some with lines that do not begin on a vector; all patches, and those of a table."""
    shapes, patch = [(3, 5, 16), (1, 1, 3), (2, 4, 19)], PATCHES[width]
    voxels = torch.randint(0, 200, (sum(d * h * w for d, h, w in shapes),)).to(stored)
    scans = _scan_table(shapes, patch_grids(shapes, patch))
    count = int(scans[:, 4:7].prod(1).sum())
    keep = torch.randperm(count)[: count // 2].int()
    upstream = torch.randn(count, patch[0] * patch[1] * patch[2]).to(dtype)

    def run():
        for kept, rows in ((None, count), (keep, len(keep))):
            # A power of two: then it does not matter that the device multiplies and adds in one step.
            yield native.patchify(voxels, scans, kept, rows, patch, 2.0**-6, -1.375, dtype)
            if stored.is_floating_point:
                yield native.patchify_backward(upstream[:rows], scans, kept, len(voxels), patch, 2.0**-6, stored)

    with compiled.in_use():
        got = list(run())
        odd = native.patchify(voxels, scans, keep, len(keep), patch, 0.02, -1.5, dtype)
    with compiled.on_host():
        expected = list(run())
    assert all(map(same_bits, got, expected)) and all(t.isfinite().all() for t in got)
    kernels = ["Patchify"] + ["Unpatchify"] * stored.is_floating_point
    of = f"<{IN_C[stored]}, {IN_C[dtype]}, {16 // dtype.itemsize if width == 'wide' else 1}>"
    assert launched(compiled) == [name + of for name in kernels]
    expected = torch_patchify(voxels, scans, keep, patch, 0.02, -1.5, dtype)
    torch.testing.assert_close(odd, expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    if stored.is_floating_point:
        right = torch_patchify_backward(upstream, scans, None, len(voxels), patch, 2.0**-6, stored)
        torch.testing.assert_close(got[1], right, rtol=2 * torch.finfo(stored).eps, atol=0)


def test_every_kernel_of_the_library_is_executed_here(compiled):
    """By the tests above, which say what they launch."""
    widths = {dtype: (1, 16 // dtype.itemsize) for dtype in FLOATS}
    named = [f"{name}<{IN_C[t]}, {n}>" for name in SEGMENT_KERNELS for t in FLOATS for n in widths[t]]
    for name, stored in (("Patchify", native.VOXEL_TYPES), ("Unpatchify", FLOATS)):
        named += [f"{name}<{IN_C[v]}, {IN_C[t]}, {n}>" for v in stored for t in FLOATS for n in widths[t]]
    names = ("forward", "whole_forward", "backward")
    begins = [f"short_attention_{name}<{IN_C[t]}, {d}, " for name in names for t in DTYPES for d in HEAD_DIMS]
    kinds = {(way.head_dim, way.launch.warps, way.launch.step) for way in whole.WAYS}
    begins += [f"short_attention_whole_backward<{IN_C[t]}, {d}, {w}, {n}, " for t in DTYPES for d, w, n in kinds]
    found = sorted(map(readable, compiled.texts))
    assert len(found) == len(set(found)) == len(named) + len(begins)
    assert set(named) < set(found) and all(sum(what.startswith(b) for what in found) == 1 for b in begins)


# ------------------------------------------------------------------ what a kernel may touch, and launches that fail


def a_mean(compiled, last=6):
    """Checks, or fails to make, the mean of the first rows of six."""
    x, tables = torch.randn(6, 8), ([0, last], [[0, 0, last]], [0, 1])
    with compiled.in_use():
        mean = native.segment_mean(x, *(torch.tensor(t, dtype=torch.int32) for t in tables))
    torch.testing.assert_close(mean[0], x.mean(0))


def test_memory_that_is_not_its_own(compiled):
    """The kernel's own error reaches the caller, with what the host's code made of it as its cause."""
    a_mean(compiled)
    with pytest.raises(PtxError, match="reads 16 bytes of memory that is not its own") as caught:
        a_mean(compiled, last=7)
    failed = caught.value.__cause__
    assert isinstance(failed, RuntimeError) and "segment_mean (sum of chunks) failed: unspecified launch failure" in str(failed)
    assert "(2 items, 1 blocks of 256 threads)" in str(failed)
    a_mean(compiled)


def test_memory_that_is_not_to_be_written(compiled, monkeypatch):
    """Rows beside the result, and everything that is an input."""
    rows, table = torch.zeros(6, 8), torch.tensor([0, 6], dtype=torch.int32)
    source = torch.randn(6, 8)

    def switch():
        with compiled.in_use():
            return native.switch_tail(source, table, table, 1, True, False)

    torch.testing.assert_close(switch()[0], source.sum(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda x: rows[:-1])
        with pytest.raises(PtxError, match="writes 16 bytes of memory"):
            switch()
    assert not rows[-1].any()
    monkeypatch.setitem(WRITTEN, "switch_tail", ())
    with pytest.raises(PtxError, match="may not write"):
        switch()


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
def test_copies_of_nothing_name_memory_of_their_own(compiled, monkeypatch, halves):
    """The hardware looks at no address it need not read; compute-sanitizer might. Rows of zeros follow the last one here."""
    copy, seen = BlockMemory.copy_async, []

    def checked(self, to, source, size, count, guard):
        active = self._active(guard)
        seen.append(int((count[active] == 0).sum()))
        self.memory.check(source[active], size, write=False)
        copy(self, to, source, size, count, guard)

    monkeypatch.setattr(BlockMemory, "copy_async", checked)
    for lengths, num_prefix in (([70], 0), ([3, 69], 1)):
        plan = plan_of(lengths, num_prefix)
        short.both(CompiledCudaBackend(halves), *tensors(plan.num_rows, torch.float16, 32), plan)
    assert sum(seen) and sum("whole_backward" in launch.what for launch in compiled.launches) == (0 if halves else 2)


@pytest.mark.parametrize("kernel", ["whole_forward", "backward", "whole_backward"])
def test_too_much_shared_memory(compiled, kernel):
    """On a card with 99 KB a block. The error names kernel and configuration, and the next launch knows nothing of it."""
    rows, head_dim = (250, 64) if kernel == "whole_backward" else (200, 128)
    q, k, v, grad = tensors(rows, torch.float16, head_dim)
    packs = short.packs_for(plan_of([rows]), head_dim)
    taken = whole.whole(packs, head_dim, 227 << 10)  # as if it had more
    threads, size = {
        "whole_forward": (128, 128 + 208 * 4 * 128),
        "backward": (224, 208 * (16 + 8 * 128)),
        "whole_backward": (256, whole.whole_bytes(250, 64, 32, 1)),
    }[kernel]
    with compiled.in_use(capability=(8, 6)), pytest.raises(RuntimeError) as caught:
        if kernel == "whole_forward":
            native.short_attention_forward(q, k, v, packs, 0.1)
        else:
            native.short_attention_backward(grad, None, q, k, v, v, torch.zeros(2, rows), packs, 0.1, taken)
    assert str(caught.value) == (
        f"hlip: CUDA kernel short_attention_{kernel} failed: invalid argument (head dim {head_dim}, 2 heads, 1 packs of at "
        f"most {rows} rows, 1 of them of one segment; blocks of {threads} threads with {size} bytes of shared "
        "memory)"
    )
    assert not compiled.launches
    a_mean(compiled)


def test_no_launch_takes_shared_memory_from_another(compiled, monkeypatch):
    """What a kernel may have is one for all threads, and another may launch it with more just after: it is never lowered."""
    monkeypatch.setattr(compiled, "execute", lambda *given, **named: None)
    backend = CompiledCudaBackend(capability=(9, 0))
    sizes = []
    with compiled.in_use(capability=(9, 0)):
        monkeypatch.setattr(compiled, "in_use", lambda *given: contextlib.nullcontext())  # else all that is forgotten
        for rows in (250, 70, 2, 250):
            short.both(backend, *tensors(rows, torch.float16, 64), plan_of([rows]))
            sizes.append([launch.shared for launch in compiled.launches])
            compiled.launches.clear()
    forward, backward = zip(*sizes, strict=True)
    assert forward[0] > 48 << 10 > forward[1] > forward[2] and backward[0] > backward[1] > backward[2]
    assert not compiled.lowered()


def test_a_launch_that_fails(compiled, monkeypatch):
    plan = plan_of([70, 3])
    inputs = tensors(plan.num_rows, torch.bfloat16, 32)
    for name, error, words in (("forward", 719, "unspecified launch failure"), ("backward", 701, "too many resources")):
        monkeypatch.setattr(compiled, "fail", lambda launch, name=name, error=error: error if name in launch.what else 0)
        with pytest.raises(RuntimeError, match=f"short_attention_(whole_)?{name} failed: {words}.* 2 packs of at most 70 rows"):
            short.both(CompiledCudaBackend(), *inputs, plan)
    monkeypatch.undo()
    a_mean(compiled)


def test_nothing_to_do_launches_nothing(compiled):
    layout = make([[[]]], 0)
    plan = Plan.of(layout.pattern("slice"))
    short.both(CompiledCudaBackend(), *tensors(0, torch.float16, 64), plan)
    short.both(CompiledCudaBackend(), *tensors(8, torch.float16, 64, heads=0), plan_of([8]))
    with compiled.in_use():
        native.segment_mean(torch.zeros(0, 8), layout.offsets("slice"), *layout.chunks("slice"))
        native.patchify(torch.zeros(0), _scan_table([], []), None, 0, (1, 2, 8), 1.0, 0.0, torch.float32)
    assert not compiled.launches


def test_what_there_is_no_kernel_for(compiled):
    packs = short.packs_for(plan_of([20]), 32)
    with compiled.in_use():
        with pytest.raises(RuntimeError, match="there is none for this"):
            native.short_attention_forward(*tensors(20, torch.float32, 32)[:3], packs, 1.0)
        with pytest.raises(RuntimeError, match="no kernel for head dim 48"):
            native.short_attention_forward(*tensors(20, torch.float16, 48)[:3], packs, 1.0)
        where, nothing = native._C.Target(False, STREAM), native._C.View(0, 0, 0)
        with pytest.raises(RuntimeError, match="too many blocks for one launch"):
            native._C.short_attention_forward(
                where, native._C.Type.float16, 32, nothing, nothing, nothing, 0, 0, native._C.Tables(0, 0, 0),
                native._C.Extent(1 << 20, 0, 16), 1 << 11, 20, 1.0,
            )  # fmt: skip
        with pytest.raises(RuntimeError, match="too many items for one launch"):
            native._C.segment_mean(where, native._C.Type.float32, 0, 0, 0, 0, 0, 0, 1 << 40, 0, 4)
    assert not compiled.launches
