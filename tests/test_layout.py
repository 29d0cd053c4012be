"""The layout: what its constructors accept and refuse, and that its tables say what the nested lengths say."""

import copy
import pickle

import numpy as np
import pytest
import torch
from attention_truth import LEVELS, PREFIXES, RAGGED, make, ragged_lengths, segments
from hypothesis import given
from hypothesis import strategies as st

from hlip_kernels import Layout, attention, segment_mean, switch_level
from hlip_kernels.pattern import Plan


@given(lengths=ragged_lengths(), num_prefix=st.sampled_from(PREFIXES), row_multiple=st.sampled_from((1, 8, 64)))
def test_offsets_and_counts(lengths, num_prefix, row_multiple):
    layout = make(lengths, num_prefix, row_multiple)
    most = 0
    for level in LEVELS:
        ranges = [r for r, _ in segments(lengths, level)]
        expected = [0, *(stop for _, stop in ranges)]
        assert layout.host_offsets(level).tolist() == expected == layout.offsets(level).tolist()
        assert layout.lengths(level).tolist() == [stop - start for start, stop in ranges]
        assert layout.lengths(level).dtype == torch.int32
        assert layout.num_segments(level) == len(ranges)
        assert layout.max_len(level) == max((b - a for a, b in ranges), default=0)
        assert isinstance(layout.max_len(level), int)
        live = layout.prefix_rows(level)
        assert (live.start, live.stop) == (layout.num_tokens, layout.num_tokens + len(ranges) * num_prefix)
        most = max(most, len(ranges))
    assert layout.num_tokens == sum(n for study in lengths for scan in study for n in scan)
    assert layout.num_rows % row_multiple == 0
    assert 0 <= layout.num_rows - layout.num_tokens - most * num_prefix < row_multiple


@given(lengths=ragged_lengths())
def test_parents_and_children(lengths):
    layout = make(lengths, 1)
    slices, scans = segments(lengths, "slice"), segments(lengths, "scan")
    assert layout.parents("slice", "scan").tolist() == [p["scan"] for _, p in slices]
    assert layout.parents("slice", "study").tolist() == [p["study"] for _, p in slices]
    assert layout.parents("scan", "study").tolist() == [p["study"] for _, p in scans]
    for child, parent in (("slice", "scan"), ("slice", "study"), ("scan", "study")):
        children, parents = layout.children(child, parent).tolist(), layout.parents(child, parent).tolist()
        for s in range(layout.num_segments(parent)):
            assert all(parents[c] == s for c in range(children[s], children[s + 1]))
        assert children[-1] == layout.num_segments(child)


@given(lengths=ragged_lengths())
def test_chunks_cover_every_segment_once(lengths):
    layout = make(lengths, 0)
    for level in LEVELS:
        chunks, chunk_offsets = layout.chunks(level)
        for s, (start, stop) in enumerate(r for r, _ in segments(lengths, level)):
            mine = chunks[chunk_offsets[s] : chunk_offsets[s + 1]].tolist()
            assert all(c[0] == s and 0 < c[2] - c[1] <= 64 for c in mine)
            rows = [row for c in mine for row in range(c[1], c[2])]
            assert rows == list(range(start, stop))


@given(lengths=ragged_lengths(), num_prefix=st.sampled_from(PREFIXES), data=st.data())
def test_drop(lengths, num_prefix, data):
    layout = make(lengths, num_prefix, 8)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=layout.num_tokens, max_size=layout.num_tokens)), dtype=bool)
    dropped = layout.drop(keep)
    kept, row = [], 0
    for study in lengths:
        kept.append([])
        for scan in study:
            kept[-1].append([])
            for n in scan:
                kept[-1][-1].append(int(keep[row : row + n].sum()))
                row += n
    expected = make(kept, num_prefix, 8)
    for level in LEVELS:
        assert dropped.host_offsets(level).tolist() == expected.host_offsets(level).tolist()
    for child, parent in (("slice", "scan"), ("scan", "study")):
        assert torch.equal(dropped.parents(child, parent), layout.parents(child, parent))
    assert dropped.num_rows == expected.num_rows and dropped.grids is None
    assert layout.drop(torch.from_numpy(keep)).num_rows == dropped.num_rows


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [16, 64])
@given(
    lengths=ragged_lengths(),
    num_prefix=st.sampled_from((1, 2)),
    pattern=st.sampled_from([{}, {"neighbours": 1}, {"summary": "study"}]),
)
def test_tiles_cover_every_row_once_and_longest_first(block, transposed, lengths, num_prefix, pattern):
    layout = make(lengths, num_prefix, 32)
    plan = Plan.of(layout.pattern("slice", **pattern))
    tiles, records = plan.tiles(block, torch.device("cpu"), transposed=transposed)
    seen = np.zeros(layout.num_rows, dtype=int)
    work = []
    for record, start in tiles.tolist():
        q, nq, p, n_p, _, nk, _, nkp = records[record].tolist()
        own = [*range(q, q + nq), *range(p, p + n_p)][start : start + block]
        assert own, "a tile without rows"
        seen[own] += 1
        work.append(nk + nkp)
    assert (seen == 1).all()
    assert work == sorted(work, reverse=True)


def test_the_three_constructors_agree():
    grids = [[(2, 3, 4), (1, 5, 5)], [], [(0, 2, 2), (3, 1, 1)]]
    lengths = [[[12, 12], [25]], [], [[], [1, 1, 1]]]
    offsets = {"slice": [0, 12, 24, 49, 50, 51, 52], "scan": [0, 24, 49, 49, 52], "study": [0, 49, 49, 52]}
    layouts = [
        Layout.from_grids(grids, num_prefix=2),
        Layout.from_lengths(lengths, num_prefix=2),
        Layout.from_offsets(offsets, num_prefix=2),
    ]
    assert layouts[0].grids == tuple(tuple(study) for study in grids)
    for layout in layouts:
        assert layout.levels == LEVELS and layout.num_rows == 52 + 6 * 2
        for level in LEVELS:
            assert layout.host_offsets(level).tolist() == offsets[level]


def test_arrays_and_tensors_are_lists():
    flat, nested = Layout.from_lengths([3, 4]), Layout.from_lengths([[3, 4], [5]])
    for lengths in (torch.tensor([3, 4]), np.array([3, 4]), torch.tensor([3, 4], dtype=torch.uint8)):
        assert Layout.from_lengths(lengths).host_offsets("segment").tolist() == flat.host_offsets("segment").tolist()
    for lengths in ([torch.tensor([3, 4]), [5]], (np.array([3, 4]), torch.tensor([5]))):
        got = Layout.from_lengths(lengths)
        assert got.levels == nested.levels and got.parents("scan", "study").tolist() == [0, 0, 1]
    assert Layout.from_lengths(torch.ones(2, 3, 4, dtype=torch.int64)).num_segments("scan") == 6
    assert Layout.from_grids([torch.tensor([[2, 3, 4]])]).grids == (((2, 3, 4),),)


def test_a_scan_without_depth_may_be_of_any_other_size():
    assert Layout.from_grids([[(0, 10**20, 10**20), (2, 1, 1)]]).host_offsets("scan").tolist() == [0, 0, 2]


def test_as_many_neighbours_as_there_are():
    layout = make(RAGGED, 1)
    every = layout.dense_mask("slice", neighbours=layout.num_segments("slice"))
    assert torch.equal(layout.dense_mask("slice", neighbours=2**63), every)


def test_any_named_levels():
    layout = Layout.from_offsets(
        {"word": [0, 2, 3, 7], "page": torch.tensor([0, 3, 7]), "book": np.array([0, 7])}, num_prefix=1
    )
    assert layout.levels == ("word", "page", "book")
    assert layout.parents("word", "book").tolist() == [0, 0, 0]
    assert Layout.from_lengths([3, 4]).levels == ("segment",)
    assert Layout.from_lengths([[3], [4]]).levels == ("scan", "study")
    assert Layout.from_lengths([[[[3]]]], levels=("a", "b", "c", "d")).num_segments("d") == 1


@pytest.mark.parametrize(
    "make_it, words",
    [
        (lambda: Layout.from_grids([[(2, 3)]]), ["study 0, scan 0", "(d, h, w)"]),
        (lambda: Layout.from_grids([[(1, 2, 3)], [(1, 2, 3), (1, -2, 3)]]), ["study 1, scan 1", "-2"]),
        (lambda: Layout.from_grids([[(1, 2.5, 3)]]), ["study 0, scan 0", "2.5"]),
        (lambda: Layout.from_grids([(1, 2, 3)]), ["grids[0][0]"]),
        (lambda: Layout.from_grids(5), ["grids", "5"]),
        (lambda: Layout.from_lengths([[3, -1]]), ["lengths[0][1]", "-1"]),
        (lambda: Layout.from_lengths([[3, [4]]]), ["lengths[0]", "nested"]),
        (lambda: Layout.from_lengths([[3, 2.0]]), ["lengths[0][1]", "2.0"]),
        (lambda: Layout.from_lengths([[3, True]]), ["lengths[0][1]", "True"]),
        (lambda: Layout.from_lengths([[[[3]]]]), ["4 deep", "levels"]),
        (lambda: Layout.from_lengths([[3]], levels=("a", "b", "c")), ["lengths[0][0]"]),
        (lambda: Layout.from_lengths([3], levels=("a", "a")), ["differ"]),
        (lambda: Layout.from_lengths([3], levels=()), ["at least one"]),
        (lambda: Layout.from_offsets({"scan": [0, 3], "study": [0, 2]}), ["study", "2", "3"]),
        (lambda: Layout.from_offsets({"scan": [0, 3, 5], "study": [0, 4, 5]}), ["segment 0 of 'study'", "4", "'scan'"]),
        (lambda: Layout.from_offsets({"study": [0, 5], "scan": [0, 3, 5]}), ["do not nest", "finer"]),
        (lambda: Layout.from_offsets({"scan": [0, 3, 2]}), ["segment 1", "3", "2"]),
        (lambda: Layout.from_offsets({"scan": [1, 3]}), ["start at 0", "1"]),
        (lambda: Layout.from_offsets({"scan": []}), ["scan", "S + 1"]),
        (lambda: Layout.from_offsets({"scan": [[0, 3]]}), ["one-dimensional"]),
        (lambda: Layout.from_offsets({"scan": [0.0, 3.0]}), ["integers", "float64"]),
        (lambda: Layout.from_offsets({"scan": torch.empty(2, device="meta")}), ["meta", "CPU"]),
        (lambda: Layout.from_offsets([0, 3]), ["map"]),
        (lambda: Layout.from_offsets({"scan": [0, 0], "study": [0]}), ["no segment"]),
        (lambda: Layout.from_lengths([3], num_prefix=-1), ["num_prefix", "-1"]),
        (lambda: Layout.from_lengths([3], num_prefix=True), ["num_prefix"]),
        (lambda: Layout.from_lengths([3], row_multiple=0), ["row_multiple"]),
        (lambda: Layout.from_lengths([3], num_prefix=10**30), ["num_prefix", str(10**30)]),
        (lambda: Layout.from_lengths([], num_prefix=10**30), ["num_prefix", str(10**30)]),
        (lambda: Layout.from_lengths([], row_multiple=10**30), ["row_multiple", str(10**30)]),
        (lambda: Layout.from_lengths([2**31]), [str(2**31), "int32"]),
        (lambda: Layout.from_lengths([2**62] * 3), [str(3 * 2**62), "int32"]),
        (lambda: Layout.from_lengths([[10**30, 1]]), [str(10**30 + 1), "int32"]),
        (lambda: Layout.from_lengths(torch.tensor(3)), ["lengths", "sequence", "3"]),
        (lambda: Layout.from_lengths([torch.tensor(3)]), ["lengths[0]", "tensor(3)"]),
        (lambda: Layout.from_lengths(torch.tensor([3.0])), ["lengths[0]", "3.0"]),
        (lambda: Layout.from_lengths(torch.empty(2, device="meta")), ["lengths", "meta", "CPU"]),
        (lambda: Layout.from_lengths([torch.empty(2, device="meta")]), ["lengths[0]", "meta", "CPU"]),
        (lambda: Layout.from_offsets({"scan": [0, 2**63 - 1, -(2**63)]}), ["segment 1", str(2**63 - 1)]),
        (lambda: Layout.from_grids([[(10**30, 1, 1)]]), [str(10**30), "int32"]),
        (lambda: Layout.from_grids([[(30_000_000, 0, 5)]]), ["30000000 slices"]),
    ],
)
def test_bad_input_names_the_place(make_it, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        make_it()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("keep, words", [
    (torch.ones(3, dtype=torch.int32), ["bool", "int32"]),
    (torch.ones(3, dtype=torch.bool), ["(7,)", "(3,)"]),
    (torch.ones(7, dtype=torch.bool, device="meta"), ["meta", "CPU"]),
])  # fmt: skip
def test_bad_masks_are_refused(keep, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        Layout.from_lengths([3, 4]).drop(keep)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_frozen_readable_and_pickles():
    layout = make(RAGGED, 2, 8)
    with pytest.raises(AttributeError, match="frozen"):
        layout.num_rows = 3
    text = repr(layout)
    for part in ("4 study", "6 scan", "10 slice", f"{layout.num_tokens} patch rows", f"{layout.num_rows} rows"):
        assert part in text, text
    again = pickle.loads(pickle.dumps(layout))
    assert again.num_rows == layout.num_rows and torch.equal(again.offsets("scan"), layout.offsets("scan"))
    assert again.pattern("scan").tolist() == layout.pattern("scan").tolist()


def test_copies_keep_the_patterns_and_the_device():
    layout = make(RAGGED, 1).to("meta")
    layout.pattern("slice", neighbours=1)
    layout.pattern("scan", summary="study")
    for same in (copy.copy(layout), copy.deepcopy([layout])[0]):
        assert same is layout  # frozen, arrays included
    for array in (layout.host_offsets("slice"), layout.host_offsets("study"), layout.host_children("slice", "scan")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    again = pickle.loads(pickle.dumps(layout))
    assert again.device.type == "cpu"
    dropped = layout.drop(np.arange(layout.num_tokens) % 2 == 0)
    for other in (again, dropped):
        assert list(other._patterns) == list(layout._patterns)
    assert torch.equal(again.pattern("slice", neighbours=1), layout.pattern("slice", neighbours=1))
    torch._dynamo.reset()
    q = torch.randn(layout.num_rows, 1, 8)
    run = lambda layout: attention(q, q, q, layout, "slice", neighbours=1)  # noqa: E731
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(again), run(again))


def test_moving_copies_one_buffer_and_shares_the_plans():
    layout = make(RAGGED, 1)
    table = layout.pattern("slice", neighbours=1)
    moved = layout.to("meta")
    assert {t.device.type for t in (moved, moved.offsets("scan"), moved.lengths("scan"))} == {"meta"}
    assert moved.pattern("slice", neighbours=1) is table
    assert layout.to("cpu") is layout


def trains(layout):
    """Every op's tables are saved for a backward pass: torch refuses those that only inference may use."""
    qkv = torch.randn(layout.num_rows, 3, 2, 8, device=layout.device, requires_grad=True)
    out = attention(*qkv.unbind(1), layout, "slice", neighbours=1).flatten(1)
    out = switch_level(out + segment_mean(out, layout, "study").sum(), layout, "slice", "scan")
    if layout.device.type != "meta":
        out.sum().backward()


def test_tables_made_in_inference_mode_serve_training():
    layout = make(RAGGED, 1)
    with torch.inference_mode():
        layout.pattern("slice", neighbours=1)
        moved, built = layout.to("meta"), make(RAGGED, 1)
        dropped = built.drop(np.ones(built.num_tokens, dtype=bool))
        tiles = Plan.of(built.pattern("scan")).tiles(64, torch.device("cpu"))
    assert not any(t.is_inference() for t in (*tiles, moved.offsets("scan"), moved.chunks("scan")[0]))
    for each in (layout, moved, built, dropped):
        trains(each)


def test_a_plan_is_made_once():
    layout = make(RAGGED, 1)
    plan = Plan.of(layout.pattern("scan"))
    assert plan is Plan.of(layout.pattern("scan"))
    assert plan.tiles(64, torch.device("cpu"))[0] is plan.tiles(64, torch.device("cpu"))[0]
    copy = Plan.of(layout.pattern("scan").clone())
    assert copy is not plan and (copy.forward == plan.forward).all()
    with pytest.raises(ValueError, match="pattern"):
        Plan.of(torch.zeros(3, 7, dtype=torch.int32))
    broken = layout.pattern("scan").clone()
    broken[0, 0] += 1
    with pytest.raises(ValueError, match="broken"):
        Plan.of(broken)
    for row, column, value in ((1, 4, -1), (2, 5, layout.num_rows), (0, 2, layout.num_rows - 1)):
        broken = layout.pattern("scan").clone()
        broken[row, column] = value
        with pytest.raises(ValueError, match="beyond"):
            Plan.of(broken)


def test_unknown_levels_are_named():
    layout = make(RAGGED, 1)
    for call in (layout.offsets, layout.lengths, layout.max_len, layout.prefix_rows, layout.pattern, layout.dense_mask):
        with pytest.raises(ValueError, match="'voxel'"):
            call("voxel")
    with pytest.raises(ValueError, match="finer"):
        layout.children("study", "scan")
