"""What is special to the backward kernel of segments that have a pack of their own: blocks that take one after the other."""

import ctypes
import dataclasses
import functools
from typing import NamedTuple

import emulated_attention
import pytest
import test_short_attention as short
import torch
from attention_truth import PREFIXES, make, naive_attention, naive_mask, relative
from emulated_attention import TINY, EmulatedCudaBackend, plan_of
from emulation import build, compiler, cuda_include
from hypothesis import given, settings
from hypothesis import strategies as st
from test_short_attention import DTYPES, EXAMPLES, NAMES, both, head_first, packs_for, tensors

from hlip_kernels.backends.cuda import SHARED_MEMORY, aligned, shared_memory
from hlip_kernels.backends.cuda_whole import Launch, whole, whole_bytes, whole_launch
from hlip_kernels.pattern import Plan

# Rows around edges: of blocks of 4 warps, and of 8.
SMALL = (65, 79, 80, 81, 95, 96, 97, 112, 113, 127, 128)
LARGE = (129, 143, 144, 145, 159, 160, 161, 176, 177, 191, 192, 193, 198, 207, 208, 209, 223, 224, 225, 240, 241, 255, 256)
CARDS = (227 << 10, 163 << 10, 99 << 10)  # bytes of shared memory


class Way(NamedTuple):
    """How the kernel may be launched, and rows of segments, and a card, for which it is."""

    head_dim: int
    launch: Launch
    lengths: list[int]
    card: int


WAYS = (
    Way(32, Launch(4, 32, 2, 3), [79, 65, 128, 90], CARDS[0]),
    Way(32, Launch(4, 32, 1, 3), [79, 65, 112, 90], CARDS[1]),
    Way(32, Launch(4, 32, 2, 2), [79, 65, 128, 90], CARDS[1]),
    Way(32, Launch(4, 32, 1, 2), [79, 65, 96, 90], CARDS[2]),
    Way(32, Launch(8, 64, 2, 1), [207, 129, 256, 150], CARDS[0]),
    Way(32, Launch(8, 32, 2, 1), [207, 129, 256, 150], CARDS[1]),
    Way(32, Launch(8, 32, 1, 1), [207, 129, 208, 150], CARDS[2]),
    Way(64, Launch(4, 32, 2, 2), [79, 65, 112, 90], CARDS[0]),
    Way(64, Launch(4, 32, 1, 2), [79, 65, 128, 90], CARDS[0]),
    Way(64, Launch(8, 64, 2, 1), [207, 129, 208, 150], CARDS[0]),
    Way(64, Launch(8, 32, 2, 1), [207, 129, 240, 150], CARDS[0]),
    Way(64, Launch(8, 32, 1, 1), [207, 129, 256, 150], CARDS[0]),
)
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, (way.head_dim, *way.launch))))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])

# In which order blocks take the segments of a kind, which come with the longest first.
ORDERS = {
    "shrinking": lambda n: list(range(n)),
    "growing": lambda n: list(range(n))[::-1],
    "both": lambda n: [i // 2 if i % 2 else n - 1 - i // 2 for i in range(n)],  # shortest, longest, second shortest, ...
}


class Kernels(emulated_attention.Kernels):
    """Lets a test choose the shared memory and the order of segments. ``backward_seed`` % 3: how many blocks, less 1."""

    shared, order, backward_seed = CARDS[0], staticmethod(ORDERS["shrinking"]), None

    def short_attention_backward(self, *given):
        *inputs, packs, scale, _ = given
        taken, order = whole(packs, inputs[2].shape[2], self.shared), list(range(len(packs.packs)))
        for first, last, _ in taken[1:]:
            order[first:last] = [first + i for i in self.order(last - first)]
        packs = dataclasses.replace(packs, packs=packs.packs[order].contiguous())
        if self.backward_seed is not None:
            self.seed = self.backward_seed - 1
        return super().short_attention_backward(*inputs, packs, scale, taken)


@pytest.fixture
def backend():
    compiler()  # skips here, with the reason, where there is none
    cuda_include()
    made = EmulatedCudaBackend()
    made.kernels = Kernels()
    return made


def choose(backend, way, num_prefix=0, order="both"):
    """Patches of a way's segments, with the backend told to let one block take them in this order."""
    assert whole_launch(max(way.lengths), way.head_dim, way.card) == way.launch
    backend.kernels.shared, backend.kernels.backward_seed, backend.kernels.order = way.card, 30, ORDERS[order]
    return [n - num_prefix for n in way.lengths]


KINDS = {  # of q, k, v and the gradient of the output; packed: q, k and v in one tensor, as a projection leaves them
    "heads first": lambda *shape, heads: [head_first(t) for t in tensors(*shape, heads)],
    "packed": lambda *shape, heads: [*torch.stack(tensors(*shape, heads)[:3], 1).unbind(1), tensors(*shape, heads)[3]],
    "positive": lambda *shape, heads: [t.abs() if i < 2 else t for i, t in enumerate(tensors(*shape, heads))],  # q and k
}


def check(*case, heads=1, layout=tensors, **options):
    """As tests/test_short_attention.py does it, for inputs of other kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short, "tensors", functools.partial(layout, heads=heads))
        short.check(*case, **options)


# Up to so many rows, on which card: the launch. The blocks must fit; the system keeps 1 KB of each.
LAUNCHES = {
    (32, CARDS[0]): {128: (4, 32, 2, 3), 256: (8, 64, 2, 1)},
    (32, CARDS[1]): {96: (4, 32, 2, 3), 112: (4, 32, 1, 3), 128: (4, 32, 2, 2), 240: (8, 64, 2, 1), 256: (8, 32, 2, 1)},
    (32, CARDS[2]): {80: (4, 32, 2, 2), 96: (4, 32, 1, 2), 128: None, 144: (8, 64, 2, 1), 176: (8, 32, 2, 1),
                     208: (8, 32, 1, 1), 256: None},
    (64, CARDS[0]): {112: (4, 32, 2, 2), 128: (4, 32, 1, 2), 208: (8, 64, 2, 1), 240: (8, 32, 2, 1), 256: (8, 32, 1, 1)},
    (64, CARDS[1]): {80: (4, 32, 2, 2), 96: (4, 32, 1, 2), 128: None, 160: (8, 64, 2, 1), 176: (8, 32, 2, 1),
                     208: (8, 32, 1, 1), 256: None},
    (64, CARDS[2]): {128: None, 256: None},
}  # fmt: skip


def test_launches(tmp_path):
    source = tmp_path / "numbers.cpp"
    source.write_text("""#include "short_attention/arguments.h"
extern "C" void launch(int64_t rows, int64_t d, int64_t shared, int64_t* out) {
  const hlip::WholeLaunch w = hlip::whole_launch(rows, d, shared);
  out[0] = w.warps, out[1] = w.step, out[2] = w.keys, out[3] = w.blocks, out[4] = w.bytes;
}
""")
    library = ctypes.CDLL(str(build(source, source.with_suffix(".so"), shared=True, sanitized=False)))
    numbers = (ctypes.c_int64 * 5)()

    def asked(*of):
        library.launch(*map(ctypes.c_int64, of), numbers)
        return tuple(numbers)

    for (head_dim, shared), launches in LAUNCHES.items():
        for rows in range(65, 257):
            launch = next(launch for most, launch in launches.items() if rows <= most)
            assert whole_launch(rows, head_dim, shared) == launch
            if launch is None:
                assert asked(rows, head_dim, shared) == (0, 0, 0, 0, 0)
                continue
            _, step, keys, blocks = launch
            # Segments; two of statistics and of dS; queries, output gradients, values, outputs, and keys.
            needs = 128 + -(-rows // 16) * 16 * (2 * 8 + 2 * 2 * step + (4 + keys) * 2 * head_dim)
            assert asked(rows, head_dim, shared) == (*launch, needs) and whole_bytes(rows, head_dim, step, keys) == needs
            assert blocks * (needs + 1024) <= shared + 1024
        for rows, other in ((257, head_dim), (272, head_dim), (65, 48), (128, 80), (129, 96), (256, 128)):
            assert whole_launch(rows, other, shared) is None and asked(rows, other, shared) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("shared", [*CARDS, 0])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_the_kernel_that_runs_is_the_one_meant(backend, head_dim, shared):
    """Told by where a query in a wrong place is noticed."""
    backend.kernels.shared = shared
    for rows in (65, 80, 81, 96, 97, 112, 113, 128, 129, 176, 177, 208, 209, 240, 241, 256, 257):
        q, k, v, grad = tensors(rows + 3, torch.float16, head_dim)
        packs, q = packs_for(plan_of([3, rows]), head_dim), short.odd_offset(q)
        with pytest.raises(RuntimeError, match="misaligned") as caught:
            backend.kernels.short_attention_backward(grad, None, q, k, v, v, torch.zeros(2, rows + 3), packs, 1.0, None)
        assert (" whole_segment.cuh:" if whole_launch(rows, head_dim, shared) else " pack.cuh:") in str(caught.value), rows


@pytest.mark.parametrize(
    "lengths, card, kinds",
    [([200, 70], 227, (1, 1)), ([200, 120, 90], 163, (1, 0, 1)), ([257, 200, 70], 227, (0, 1, 1)), ([210, 70], 99, (0, 0)),
     ([210, 200, 120], 163, (0, 1, 0)), ([210, 90], 163, (0, 1))],
    ids=str,
)  # fmt: skip
def test_each_kind_has_its_kernel(backend, lengths, card, kinds):
    """Segments for 8 warps and for 4 in one call, told by bits: the kernels sum dO * O in other orders."""
    plan, first = plan_of([*lengths, 5]), 0
    q, k, v, grad = tensors(plan.num_rows, torch.float16, 64)
    v, grad, backend.kernels.shared = v + 1000, grad.abs(), card << 10  # of dP - delta little is left
    out, lse, *mixed = both(backend, q, k, v, grad, plan)
    for length, is_whole in zip(lengths, kinds, strict=True):
        part, same = slice(first, first + length), []
        first += length
        packs, own = packs_for(plan_of([length]), 64), (*(t[part] for t in (q, k, v, out)), lse[:, part].contiguous())
        for backend.kernels.shared in (0, CARDS[0]):  # the kernel for all, and the other one
            grads = backend.kernels.short_attention_backward(grad[part], None, *own, packs, 1 / 8, None)
            same.append(all(torch.equal(a[part], b) for a, b in zip(mixed, grads, strict=True)))
        assert same[is_whole] and (length > 256 or not same[1 - is_whole])


@pytest.mark.parametrize("capability", [*SHARED_MEMORY, (7, 7)], ids=str)
def test_the_card_says_how_much_shared_memory_there_is(backend, monkeypatch, capability):
    monkeypatch.setattr(backend, "_capability", lambda q: capability)
    monkeypatch.setattr(backend.kernels, "short_attention_backward", lambda *given: given[-1])
    q, k, v, grad = tensors(70, torch.float16, 32)
    got = backend.backward(grad, None, q, k, v, q, torch.zeros(2, 70), plan_of([70]), 1.0, None)
    assert got.shared == shared_memory(capability) == SHARED_MEMORY.get(capability, 99 << 10)
    assert got.small == (0, 1, 70)


# ------------------------------------------------------------------ results


@st.composite
def mixtures(draw):
    """Patches of segments that have packs of their own, of one kind or of both, among others; how many prefix rows."""
    num_prefix, few = draw(st.sampled_from(PREFIXES)), draw(st.booleans())
    rows = st.integers(65, 128) | st.sampled_from(SMALL) if few else st.integers(65, 256) | st.sampled_from(SMALL + LARGE)
    lengths = [n - num_prefix for n in draw(st.lists(rows, min_size=1, max_size=6 if few else 4))]
    lengths += draw(st.lists(st.sampled_from((*TINY, 31, 59, 64)), max_size=6))
    return draw(st.permutations(lengths)), num_prefix


@dtypes
@pytest.mark.parametrize("head_dim", [32, 64])
@settings(max_examples=2 * EXAMPLES)
@given(data=st.data(), mixture=mixtures(), row_multiple=st.sampled_from((1, 32, 300)), heads=st.integers(1, 3))
def test_error_on_mixtures(backend, dtype, head_dim, data, mixture, row_multiple, heads):
    backend.kernels.shared = data.draw(st.sampled_from(CARDS[: 3 if head_dim == 32 else 2]))
    backend.kernels.seed = data.draw(st.integers(0, 2**32))
    backend.kernels.order = lambda n: data.draw(st.permutations(range(n)))
    torch.manual_seed(backend.kernels.seed)
    layout = data.draw(st.sampled_from((tensors, *KINDS.values())))
    check(backend, *mixture, dtype, head_dim, row_multiple=row_multiple, heads=heads, layout=layout)


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("rows", SMALL + LARGE)
def test_every_edge(backend, rows, head_dim):
    """As the longest, which says where everything lies, after a shorter segment, in one block."""
    backend.kernels.backward_seed, backend.kernels.order = 30, ORDERS["growing"]
    backend.kernels.shared = min(card for card in CARDS if whole_launch(rows, head_dim, card))
    check(backend, [rows - 1, 128 if rows > 128 else 66, 64], 1, DTYPES[rows % 2], head_dim)


@pytest.mark.parametrize(
    "scale, layout", [(None, tensors), (5.0, tensors), (-5.0, KINDS["positive"])], ids=["", "large", "far below 0"]
)
@pytest.mark.parametrize("order", ORDERS)
@ways
def test_segments_grow_and_shrink(backend, way, order, scale, layout):
    """Many in one block: of one that is longer than the one before, the rest of the rows still has to come."""
    lengths, few, launch = choose(backend, way, order=order), way.launch.warps == 4, way.launch
    dtype = DTYPES[(len(order) + launch.keys + few) % 2]
    check(backend, [*lengths, 0, 3], 0, dtype, way.head_dim, scale, row_multiple=16, heads=1 + few, layout=layout)


@ways
def test_who_takes_what_does_not_matter(backend, way):
    """Nor when: bit for bit the same."""
    lengths = choose(backend, way, 1)
    for used in (lengths, lengths[:1]):  # 8 (segment, head), and 2: then a block has one alone
        plan = plan_of(used, 1)
        inputs, grad_lse, first = tensors(plan.num_rows, torch.float16, way.head_dim), torch.randn(2, plan.num_rows), None
        for seed, order in ((30, "both"), (31, "both"), (32, "both"), (2**40, "growing"), (7, "shrinking")):
            backend.kernels.backward_seed, backend.kernels.order = seed, ORDERS[order]
            got = both(backend, *inputs, plan, grad_lse=grad_lse)
            first = first or got
            assert all(torch.equal(a, b) for a, b in zip(first, got, strict=True)), (seed, order)


@pytest.mark.parametrize("strides", ["none", "rows first", "odd", "one for all"])
@ways
def test_gradient_of_the_log_sum_exp(backend, way, strides):
    lengths, dtype = choose(backend, way)[1:], DTYPES[way.launch.keys % 2]
    plan = Plan.of(make([[lengths]], 0, 32).pattern("slice"))
    q, k, v, grad = tensors(plan.num_rows, dtype, way.head_dim)
    n, leaves = plan.num_rows, [t.double().requires_grad_() for t in (q, k, v)]
    odd = torch.randn(7 + 2 * (3 * n + 5))[7:].view(2, -1)[:, : 3 * n : 3]
    grad_lse = {"rows first": torch.randn(n, 2).T, "odd": odd, "one for all": torch.randn(1, 1).expand(2, n)}.get(strides)
    out, lse = naive_attention(*leaves, naive_mask([[lengths]], 0, plan.num_rows, "slice"))
    truth = torch.autograd.grad((out * grad).sum() + (0 if grad_lse is None else (lse * grad_lse).sum()), leaves)
    for mine, right in zip(both(backend, q, k, v, grad, plan, grad_lse=grad_lse)[2:], truth, strict=True):
        assert relative(mine, right) < torch.finfo(dtype).eps


@pytest.mark.parametrize("view", ["heads first", "packed"])
@ways
def test_where_rows_lie_does_not_matter(backend, way, view):
    plan = plan_of(choose(backend, way, 1), 1)
    views = KINDS[view](plan.num_rows, torch.bfloat16, way.head_dim, heads=2)
    assert all(aligned(t) is t for t in views) and not views[0].is_contiguous()
    expected = both(backend, *(t.contiguous() for t in views), plan)
    assert all(torch.equal(a, b) for a, b in zip(expected, both(backend, *views, plan), strict=True))


@dtypes
@ways
def test_seven_products_come_to_the_same(backend, way, dtype):
    """The kernel that all cards have room for takes these segments where there is no room for this one."""
    plan = plan_of([*choose(backend, way, 1), 5, 0], 1, row_multiple=32)
    inputs, grad_lse = tensors(plan.num_rows, dtype, way.head_dim), torch.randn(2, plan.num_rows)
    five = both(backend, *inputs, plan, grad_lse=grad_lse)
    backend.kernels.shared = 0
    for name, a, b in zip(NAMES, five, both(backend, *inputs, plan, grad_lse=grad_lse), strict=True):
        assert relative(a, b) < torch.finfo(dtype).eps, name


# ------------------------------------------------------------------ isolation


@ways
def test_bad_values_stay_in_their_segment(backend, way):
    """And head: bit for bit, also in the segment that comes next to the same places, and beside rows that no segment holds."""
    lengths = choose(backend, way, 1)
    plan = plan_of(lengths, 1, row_multiple=512)
    mask, inputs = naive_mask([[lengths]], 1, plan.num_rows, "slice"), tensors(plan.num_rows, torch.float16, way.head_dim)
    clean, nan, inf = both(backend, *inputs, plan), float("nan"), float("inf")
    for segment in range(len(lengths)):
        own, head, other = mask[sum(lengths) + segment], segment % 2, 1 - segment % 2  # the prefix row sees its own rows
        rows = own.nonzero()[:, 0].tolist()
        for bad, where in ((nan, rows), [(inf, rows), (nan, rows[7:8]), (-inf, rows[-1:]), (inf, rows[-2:-1])][segment]):
            dirty = [t.clone() for t in inputs]
            for t in dirty:
                t[~mask.any(1)] = bad
                t[where, head, :3] = bad
            for name, a, b in zip(NAMES, clean, both(backend, *dirty, plan), strict=True):
                a, b = (t.transpose(0, 1) if name == "lse" else t for t in (a, b))
                assert torch.equal(a[~own], b[~own]) and torch.equal(a[:, other], b[:, other]), f"{name}: {bad} in {segment}"


@dtypes
@ways
def test_no_nan_where_the_truth_has_none(backend, way, dtype):
    """A key with an element of -inf that nobody sees: only that column of dQ is 0 times infinity."""
    lengths, first = choose(backend, way)[:2], 0
    plan = plan_of(lengths)
    q, k, v, grad = tensors(plan.num_rows, dtype, way.head_dim)
    q[:, :, 7] = q[:, :, 7].abs() + 0.25
    k[[3, -1], :, 7] = float("-inf")  # after the last row, in its tile, come rows of zeros
    got = both(backend, q, k, v, grad, plan)[2:]
    for length in lengths:
        part, first = slice(first, first + length), first + length
        leaves = [t[part].double().requires_grad_() for t in (q, k, v)]
        out, _ = naive_attention(*leaves, torch.ones(length, length, dtype=torch.bool))
        for name, mine, right in zip(NAMES[2:], got, torch.autograd.grad(out, leaves, grad[part].double()), strict=True):
            finite = right.isfinite()
            assert finite.sum() == right.numel() - (2 * length if name == "dq" else 0)
            assert relative(mine[part][finite], right[finite]) < torch.finfo(dtype).eps, name
