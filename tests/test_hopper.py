"""The Hopper kernels against a naive float64 truth, run from their own source by an emulator that also looks for races."""

import pytest
import torch
from attention_truth import naive_attention, relative
from emulated_hopper import WAYS, WRITTEN, Case, EmulatedHopperBackend
from hypothesis import given, settings
from hypothesis import strategies as st

from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, Query, hopper
from hlip_kernels.backends.base import strides_of
from hlip_kernels.backends.hopper import HopperBackend
from hlip_kernels.backends.hopper.config import (
    BACKWARD_FUSED,
    FORWARD,
    FUSED,
    HEAD_DIMS,
    KERNELS,
    SPLIT,
    WHOLE,
    backward_kernels,
    forward_kernel,
)

DTYPES = (torch.float16, torch.bfloat16)
# Around the edges of tiles (64 keys, 128 and 192 rows), empty and single.
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 260)
PATTERNS = [
    ("slice", {}), ("scan", {}), ("study", {}), ("slice", {"neighbours": 1}), ("slice", {"summary": "study"}),
    ("scan", {"neighbours": 1, "summary": "study"}),
]  # fmt: skip
BY_KIND = pytest.mark.parametrize("head_dim", HEAD_DIMS), pytest.mark.parametrize("dtype", DTYPES, ids=str)


def each_kind(function):
    for mark in BY_KIND:
        function = mark(function)
    return function


def examples(share: float):
    """A share of as many examples as the profile asks for: each is some hundred tiles, emulated."""
    return settings(max_examples=max(1, int(settings.default.max_examples * share)))


@st.composite
def layouts(draw):
    """Nested lengths, prefix rows, level and options, of at most 500 rows."""
    scans = st.lists(st.sampled_from(LENGTHS), max_size=3)
    lengths = draw(st.lists(st.lists(scans, max_size=2), max_size=3).filter(lambda s: sum(map(sum, sum(s, []))) <= 450))
    level, options = draw(st.sampled_from(PATTERNS))
    prefixes = (1, 2, 3) if "summary" in options else (0, 1, 2, 3)
    return dict(lengths=lengths, num_prefix=draw(st.sampled_from(prefixes)), level=level, options=options)


def written_once(backend, *arguments):
    """Asserts that the backend's last launches wrote every element of these once."""
    assert arguments
    for kernel, argument in arguments:
        assert (backend.written[kernel][argument] == 1).all(), (kernel, argument)


def check_forward(case, whole, **options):
    backend = EmulatedHopperBackend(whole=whole, **options)
    case.check(case.forward(backend))
    if case.layout.num_rows:
        expected = forward_kernel(case.plan, case.head_dim, whole)
        assert list(backend.written) == [expected]
        written_once(backend, (expected, "out"), (expected, "lse"))
    return backend


def check_backward(case, way, **options):
    kind, deterministic = WAYS[way]
    backend = EmulatedHopperBackend(**kind, **options)
    case.check(case.backward(backend, deterministic))
    if case.layout.num_rows:
        expected = backward_kernels(case.plan, case.head_dim, way in ("ordered", "any order"), way == "whole")
        assert tuple(backend.written) == expected
        written_once(backend, *((kernel, argument) for kernel in expected for argument in WRITTEN[kernel]))
    return backend


@each_kind
@examples(0.4)
@given(drawn=layouts(), seed=st.integers(0, 1000), whole=st.booleans())
def test_forward_on_ragged_layouts(dtype, head_dim, drawn, seed, whole):
    check_forward(Case(**drawn, dtype=dtype, head_dim=head_dim), whole, seed=seed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(0.2)
@given(drawn=layouts(), seed=st.integers(0, 1000))
def test_backward_on_ragged_layouts(dtype, way, drawn, seed):
    for head_dim in HEAD_DIMS:
        check_backward(Case(**drawn, dtype=dtype, head_dim=head_dim), way, seed=seed)


EDGES = {
    "whole tiles alone": Case([[[64]], [[128]], [[192]]], 0, "slice"),
    "a row more than whole tiles": Case([[[65, 193]]], 0, "slice"),
    "prefix rows that start a tile": Case([[[64, 192]]], 1, "slice"),
    "prefix rows in two tiles": Case([[[62]]], 3, "slice"),
    "prefix rows alone": Case([[[0, 0]], [[]]], 2, "study"),
    "one row": Case([[[1]]], 0, "slice"),
    "several tiles of prefix rows": Case([[[3] * 24]], 3, "slice", heads=1, options={"summary": "study"}),
    "several tiles of keys and of prefix rows": Case(
        [[[70] + [2] * 21]], 3, "slice", heads=1, options={"neighbours": 1, "summary": "study"}
    ),
    "a study of several blocks of rows": Case([[[200, 250]]], 2, "study"),
    "logits of hundreds": Case([[[130, 65]]], 1, "study", logits=(5.0, 0.0)),
    "logits of more than a hundred, several tiles": Case([[[130, 65]]], 1, "study", logits=(10.0, 0.0)),
    "logits far below 0": Case([[[130, 65]]], 1, "scan", logits=(1.0, 4.0)),
    "a negative scale": Case([[[130, 65]]], 1, "study", scale=-0.2),
    "a scale of 0": Case([[[130, 65]]], 1, "study", scale=0.0),
    "heads first": Case([[[130, 65]]], 1, "study", strides="heads first"),
    "different strides": Case([[[130, 65]]], 1, "study", strides="mixed"),
}  # fmt: skip


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by tiles"])
@pytest.mark.parametrize("name", EDGES)
def test_forward_at_the_edges(name, whole):
    case = EDGES[name]
    short = whole and not case.options and case.plan.longest <= 256
    assert list(check_forward(case, whole).written) == ["attention_forward_whole" if short else "attention_forward"]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rest", [1, 15, 16, 17, 48, 63, 64, 65, 80, 127])
def test_every_size_of_a_first_tile_forward(rest, head_dim):
    """Beyond 128 keys: products of 16, 64 and 128; patch rows by TMA where 64 of them are left, prefix rows by address."""
    case = Case([[[128 + rest]], [[256 + rest - min(rest, 2)]]], min(rest, 2), "slice", head_dim=head_dim, heads=1)
    assert forward_kernel(case.plan, head_dim) == "attention_forward"
    check_forward(case, True, seed=rest)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in EDGES if not EDGES[name].options])
def test_backward_at_the_edges(name, way):
    case = EDGES[name]
    short = way == "whole" and case.plan.longest <= 256
    expected = WHOLE if short else FUSED if way in ("ordered", "any order") else SPLIT
    assert tuple(check_backward(case, way).written) == expected


@pytest.mark.parametrize("way", ["ordered", "whole"])
@pytest.mark.parametrize("name", [name for name in EDGES if EDGES[name].options])
def test_backward_in_one_kernel_is_for_level_patterns(name, way):
    assert tuple(check_backward(EDGES[name], way).written) == SPLIT


@pytest.mark.parametrize(
    "length",
    [1, 16, 17, 31, 32, 33, 63, 64, 65, 80, 81, 127, 128, 129, 144, 145, 191, 192, 193, 198, 208, 209, 224, 225, 255, 256],
)
def test_whole_segments_of_every_kind_of_length(length):
    """Around tiles of 16, 32 and 64 rows and pairs of those; the first segment is followed by longer and shorter ones."""
    prefix, dtype = min(length - 1, 2), DTYPES[length % 2]
    case = Case([[[length - prefix, 256 - prefix, 70, length - prefix]]], prefix, "slice", dtype, heads=1)
    assert list(check_forward(case, True, programs=2, seed=length).written) == ["attention_forward_whole"]
    check_forward(case, False, programs=2, seed=length)
    assert tuple(check_backward(case, "whole", programs=2, seed=length).written) == WHOLE


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by tiles"])
@pytest.mark.parametrize("length, hidden", [(65, 64), (80, 64), (100, 64), (200, 0)])
def test_a_tile_of_which_every_logit_is_minus_infinity(length, hidden, whole):
    """Those rows count for nothing: the last tile, which comes first, or the one after it."""
    case = Case([[[length]]], 0, "slice", torch.bfloat16)
    q, k, _ = case.qkv
    q[..., 0] = 1.0
    k[hidden : hidden + 64, :, 0] = float("-inf")
    found = case.forward(EmulatedHopperBackend(whole=whole))
    out, lse = naive_attention(*(t.double() for t in case.qkv), case.mask, case.exact_scale)
    assert relative(found["out"], out) < 0.01 and relative(found["lse"], lse) < 1e-6


def test_more_rows_outside_every_segment_than_a_place_holds():
    case = Case([[[3] * 5] * 35], 2, "scan", heads=1)
    assert case.layout.num_rows - case.layout.prefix_rows("scan").stop > 256
    check_forward(case, True)
    assert tuple(check_backward(case, "whole").written) == WHOLE


def test_what_is_too_long_is_not_held_whole():
    for length, expected in ((256, WHOLE), (257, SPLIT)):
        plan = Case([[[3, length]]], 0, "slice").plan
        assert backward_kernels(plan, 64, False) == expected
        assert (forward_kernel(plan, 64) == "attention_forward_whole") == (expected == WHOLE)
    plan = Case([[[100]]], 0, "slice").plan
    assert backward_kernels(plan, 128, False) == SPLIT and forward_kernel(plan, 128) == "attention_forward"


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_lse(way):
    case = Case([[[130, 65], [3]]], 1, "scan", with_grad_lse=True)
    check_backward(case, way)
    assert not torch.allclose(case.truth["dq"], Case([[[130, 65], [3]]], 1, "scan").truth["dq"], atol=1e-3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_beyond_32_bit_addresses(head_dim):
    case = Case([[[130, 65], [3]]], 1, "scan", head_dim=head_dim)
    for whole in (True, False):
        check_forward(case, whole, far=True)
    for way in WAYS:
        check_backward(case, way, far=True)


def test_the_same_bits_in_every_order_and_with_any_number_of_programs():
    case = Case([[[193, 30], [1, 0]]], 2, "scan")
    for run in (case.forward, lambda backend: case.backward(backend)):
        for way in ("split", "ordered", "whole"):
            first = run(EmulatedHopperBackend(**WAYS[way][0]))
            for programs in (1, 7):
                again = run(EmulatedHopperBackend(programs=programs, seed=100 * programs, **WAYS[way][0]))
                assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("strides", ["mixed", "heads first"])
def test_strides_change_no_bits(strides):
    cases = [Case([[[130, 65]]], 1, "study", strides=s) for s in ("packed", strides)]
    for run in (
        lambda case: case.forward(EmulatedHopperBackend()),
        lambda case: case.forward(EmulatedHopperBackend(whole=False)),
        lambda case: case.backward(EmulatedHopperBackend()),
        lambda case: case.backward(EmulatedHopperBackend(whole=False)),
    ):
        first, other = map(run, cases)
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.fixture(params=[True, False], ids=["whole", "by tiles"])
def emulated(monkeypatch, request):
    backend = EmulatedHopperBackend(whole=request.param)
    monkeypatch.setitem(BACKENDS, "hopper", backend)
    return backend


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_nan_stays_in_its_study_and_what_nobody_wrote_is_not_read(emulated, poisoned, deterministic, head_dim):
    lengths, level = [[[65, 70]], [[100]], [[3]]], "study"
    layout = Case(lengths, 2, level).layout
    mask = Case(lengths, 2, level).mask
    qkv = torch.randn(layout.num_rows, 3, 1, head_dim).half()
    weight = torch.randn(layout.num_rows, 1, head_dim).half()
    results = []
    second = 135  # its first row, right behind those of the first study
    dead = layout.prefix_rows(level).stop  # outside every segment, right behind the prefix rows
    assert sum(map(sum, lengths[0])) == second and dead < layout.num_rows
    for bad in (None, second, layout.prefix_rows(level).start, dead, slice(dead, None)):
        leaf = qkv.clone()
        if bad is not None:
            leaf[bad] = float("nan")
        leaf.requires_grad_()
        out, lse = attention(*leaf.unbind(1), layout, level, backend="hopper", return_lse=True, deterministic=deterministic)
        (grad,) = torch.autograd.grad([out, lse], leaf, [weight, torch.ones_like(lse)])
        results.append((out.detach(), lse.detach().T, grad))
    clean, *poisoned_studies = results[:3]
    for row, found in zip((second, layout.prefix_rows(level).start), poisoned_studies, strict=True):
        apart = ~mask[row]
        assert 0 < apart.sum() < layout.num_rows
        for a, b in zip(clean, found, strict=True):
            assert a.isfinite().all() and torch.equal(a[apart], b[apart]) and b[~apart].isnan().any()
    for found in results[3:]:
        assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))


@pytest.mark.parametrize("lengths, num_prefix", [([], 0), ([[]], 1), ([[[0, 0]]], 0), ([[[0]]], 3)], ids=str)
def test_emptiness(emulated, poisoned, lengths, num_prefix):
    layout = Case(lengths, num_prefix).layout
    qkv = torch.randn(layout.num_rows, 3, 2, 64).half().requires_grad_()
    out, lse = attention(*qkv.unbind(1), layout, "slice", backend="hopper", return_lse=True)
    (grad,) = torch.autograd.grad(out.float().sum() + lse.sum(), qkv)
    assert out.isfinite().all() and lse.isfinite().all() and grad.isfinite().all()
    if layout.num_rows == 0:
        assert not emulated.written


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_one_kernel_for_all_gradients_where_there_is_one(head_dim):
    backend = check_backward(Case([[[65]]], 1, "study", head_dim=head_dim), "ordered")
    assert ("attention_backward_fused" in backend.written) == (head_dim in BACKWARD_FUSED)


def test_a_launch_takes_every_tile_of_every_head_once():
    """Persistent programs share out the items, whatever their number."""
    case = Case([[[200, 193, 64]]], 0, heads=3)
    tiles, _ = case.plan.tiles(FORWARD[64].rows, torch.device("cpu"))
    for programs in (1, 4, 3 * len(tiles)):
        backend = EmulatedHopperBackend(programs=programs, whole=False)
        case.forward(backend)
        written_once(backend, ("attention_forward", "out"), ("attention_forward", "lse"))


def test_what_the_backend_takes():
    query = Query("cuda", (9, 0), torch.float16, 64)
    assert HopperBackend().takes(query)
    for head_dim, dtype, reason in ((80, torch.float16, "head dims 64, 128"), (64, torch.float32, "got float32")):
        answer = HopperBackend().takes(Query("cuda", (9, 0), dtype, head_dim))
        assert not answer and reason in answer.reason
    for device, capability, reason in (("cpu", None, "needs an NVIDIA GPU"), ("cuda", (10, 0), "this GPU has 10.0")):
        answer = HopperBackend().supports(Query(device, capability, torch.float16, 64))
        assert not answer and reason in answer.reason


def test_registers_add_up():
    for table in KERNELS.values():
        for config in table.values():
            groups = config.consumers + 1 + (config.reducer_registers > 0)
            given = config.consumers * config.consumer_registers + config.producer_registers + config.reducer_registers
            assert given <= groups * config.max_registers and 128 * groups * config.max_registers <= 65536, config
            parts = (config.consumer_registers, config.producer_registers, config.reducer_registers)
            assert all(n % 8 == 0 for n in parts) and config.block % config.part == 0


@pytest.mark.parametrize("strides", ["packed", "contiguous", "heads first", "odd address", "odd rows", "expanded"])
def test_rows_that_tma_cannot_address_are_copied(strides):
    """It wants 16-byte addresses and strides, and rows that do not overlap; a contiguous tensor may yet begin at an odd one."""
    x = torch.randn(10, 3, 2, 64).half()
    t = {
        "packed": lambda: x[:, 1],
        "contiguous": lambda: x[:, 1].contiguous(),
        "heads first": lambda: x[:, 1].transpose(0, 1).contiguous().transpose(0, 1),
        "odd address": lambda: torch.randn(10 * 2 * 64 + 1).half()[1:].view(10, 2, 64),
        "odd rows": lambda: torch.randn(10, 2 * 64 + 3).half()[:, : 2 * 64].unflatten(1, (2, 64)),
        "expanded": lambda: x[:1, 1].expand(10, 2, 64),
    }[strides]()
    ready = hopper._loadable(t)
    assert torch.equal(ready, t) and (ready is t) == (strides in ("packed", "contiguous"))
    assert ready.data_ptr() % 16 == 0 and all(stride * 2 % 16 == 0 for stride in ready.stride()[:2])
    assert ready.stride(0) >= hopper.extent(ready)[1]


@pytest.mark.parametrize("head_stride", [0, 64, 2**33])
def test_the_stride_of_a_lone_head_means_nothing(head_stride):
    """Torch lets it be anything, also what no 32-bit column of TMA can be."""
    t = torch.randn(10, 64).half().as_strided((10, 1, 64), (64, head_stride, 1))
    assert hopper._loadable(t) is t and hopper.extent(t) == (10, 64) and strides_of(t) == [64, 64]
