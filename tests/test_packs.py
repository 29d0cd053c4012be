"""What the cuda backend deals out and takes: packs of rows, limits, refusals."""

import re
import sys
import time

import numpy as np
import pytest
import torch
from attention_truth import make
from emulated_attention import EDGES, TINY, EmulatedCudaBackend, plan_of
from emulation import CSRC, compiler, cuda_include
from hypothesis import given, settings
from hypothesis import strategies as st

from hlip_kernels import attention
from hlip_kernels.backends import Query, cuda_whole
from hlip_kernels.backends import cuda as cuda_backend
from hlip_kernels.backends.cuda import HEAD_DIMS, CudaBackend, max_rows
from hlip_kernels.packs import DEAD_ROWS, PACK_ROWS, packs_of

CPU = torch.device("cpu")
EXAMPLES = max(6, settings.default.max_examples // 4)


@pytest.fixture(scope="module")
def backend():
    compiler()  # skips here, with the reason, where there is none
    cuda_include()
    return EmulatedCudaBackend()


# ------------------------------------------------------------------ packs


@settings(max_examples=20 * EXAMPLES)
@given(
    lengths=st.lists(st.sampled_from((*TINY, *TINY, *EDGES, 200, 270)), max_size=60),
    num_prefix=st.sampled_from((0, 0, 1, 3)),
    row_multiple=st.sampled_from((1, 16, 700)),
    pack_rows=st.sampled_from((16, 48, 96, 128, 208)),
)
def test_packs(lengths, num_prefix, row_multiple, pack_rows):
    plan = plan_of(lengths, num_prefix, row_multiple)
    packs = packs_of(plan, CPU, pack_rows)
    assert packs_of(plan, CPU, pack_rows) is packs
    records, starts = plan.forward.tolist(), packs.starts.tolist()
    assert packs.records.tolist() == records
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (packs.packs, packs.starts, packs.records))
    times = np.zeros(plan.num_rows, dtype=int)  # that a row is in a pack
    live_rows, most_rows, kinds = 0, 0, []
    for first, count, offset, rows in packs.packs.tolist():
        members = records[first : first + count]
        assert count >= 1 and rows >= 1
        if members[0][5] + members[0][7] == 0:  # sees nothing
            kinds.append((2, -rows))
            assert count == 1 and rows <= DEAD_ROWS
            times[members[0][0] + offset : members[0][0] + offset + rows] += 1
            assert offset + rows <= members[0][1] and members[0][3] == 0
            continue
        assert offset == 0
        spans = []  # of each row of the sequence
        for number, (patch, patches, prefix, prefixes, *_) in enumerate(members, first):
            assert starts[number] == len(spans), "where the record starts"
            times[patch : patch + patches] += 1
            times[prefix : prefix + prefixes] += 1
            own = patches + prefixes
            assert own > 0, "an empty record"
            assert count == 1 or own <= pack_rows // 2
            spans += [(len(spans), len(spans) + own)] * own
        assert len(spans) == rows
        assert count == 1 or rows <= pack_rows
        most_rows, live_rows = max(most_rows, rows), live_rows + rows
        kinds.append((0 if count == 1 and rows > pack_rows // 2 else 1, -rows))
    assert (times == 1).all(), "every row, dead ones too, in exactly one pack"
    assert live_rows == sum(lengths) + num_prefix * len(lengths)
    assert kinds == sorted(kinds), "segments alone, then shared packs, then dead rows, and of each kind the largest first"
    alone = packs.packs[: len(packs.alone)].tolist()
    long = [r[1] + r[3] for r in records if r[5] + r[7] > 0 and r[1] + r[3] > pack_rows // 2]
    assert packs.alone.tolist() == sorted(long, reverse=True) == [-rows for kind, rows in kinds if kind == 0]
    assert packs.alone.tolist() == [p[3] for p in alone]
    assert all(p[1] == 1 and p[2] == 0 and p[3] == records[p[0]][1] + records[p[0]][3] for p in alone), "one segment, whole"
    for head_dim in HEAD_DIMS:
        for shared in (0, 99 << 10, 163 << 10, 227 << 10):
            taken = cuda_whole.whole(packs, head_dim, shared)
            assert taken.shared == shared
            for i, rows in enumerate(packs.alone.tolist()):  # by the blocks that can hold it, if there is a launch for it
                first, last, longest = taken.large if rows > 128 else taken.small
                assert (first <= i < last) == bool(cuda_whole.whole_launch(rows, head_dim, shared))
                assert i != first or rows == longest
            edges = [0, *taken.large[:2], *taken.small[:2]]
            assert edges == sorted(edges) and edges[2] == sum(n > 128 for n in long) and edges[4] == len(long)
    assert packs.rows == most_rows


def test_tiny_segments_share_packs_and_fill_them():
    plan = plan_of([4] * 640)
    packs = packs_of(plan, CPU)
    assert packs.packs[:, 3].tolist() == [PACK_ROWS] * 20


def test_packs_of_a_large_batch_take_no_time():
    lengths = np.random.default_rng(0).integers(0, 200, 1000).tolist()
    took = []
    for _ in range(3):
        plan = plan_of(lengths, 1)
        start = time.perf_counter()
        packs_of(plan, CPU)
        took.append(time.perf_counter() - start)
    print(f"packs of 1,000 segments: {min(took) * 1e3:.2f} ms")
    assert min(took) < 0.020


# ------------------------------------------------------------------ limits


class AnyGpu(CudaBackend):
    """As if the extension were built for whatever GPU is asked about."""

    def _why_not_here(self, query):
        return ""


LIMITS = {
    (8, 0): (608, 304, 240, 208, 160),
    (8, 6): (368, 192, 144, 128, 96),
    (9, 0): (848, 432, 352, 288, 208),
    (6, 6): (368, 192, 144, 128, 96),  # one that is not known gets what every one has
}


@pytest.mark.parametrize("capability", LIMITS, ids=str)
def test_limits(capability):
    assert tuple(max_rows(d, capability) for d in HEAD_DIMS) == LIMITS[capability]
    for head_dim, limit in zip(HEAD_DIMS, LIMITS[capability], strict=True):
        shared = cuda_backend.SHARED_MEMORY.get(capability, 99 << 10)
        # As in csrc/short_attention/arguments.h: a map and statistics, and four rows of 2-byte elements.
        assert limit * (16 + 4 * 2 * head_dim) <= shared
        assert (limit + 16) * (16 + 4 * 2 * head_dim) > shared
        assert AnyGpu().supports(Query("cuda", capability, torch.float16, head_dim, limit))
        answer = AnyGpu().supports(Query("cuda", capability, torch.float16, head_dim, limit + 1))
        assert not answer
        assert f"up to {limit} rows" in answer.reason and f"head dim {head_dim}" in answer.reason
        assert f"the longest has {limit + 1}" in answer.reason
        assert AnyGpu().supports(Query("cuda", capability, torch.float16, head_dim))  # a length not known yet


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": torch.float32}, ["float16 and bfloat16", "float32"]),
        ({"dtype": torch.float64}, ["float16 and bfloat16", "float64"]),
        ({"head_dim": 48}, ["32, 64, 80, 96, 128", "48"]),
        ({"head_dim": 256}, ["32, 64, 80, 96, 128", "256"]),
        ({"sees_itself": False}, ["no neighbours, no summary"]),
    ],
    ids=str,
)
def test_refusals_name_what_is_wrong(change, words):
    facts = {"device_type": "cuda", "capability": (9, 0), "dtype": torch.float16, "head_dim": 64, "longest": 100} | change
    answer = AnyGpu().supports(Query(**facts))
    assert not answer and all(word in answer.reason for word in words), answer.reason


def test_the_real_backend_needs_a_gpu():
    for device in ("cpu", "mps"):
        assert "NVIDIA GPU" in CudaBackend().supports(Query(device, None, torch.float16, 64)).reason


@pytest.mark.parametrize(
    "lengths, options, words",
    [
        ([[[900]]], {}, ["up to 848 rows", "the longest has 900"]),
        ([[[5, 7], [3]]], {"neighbours": 1}, ["no neighbours"]),
        ([[[5, 7], [3]]], {"summary": "study"}, ["no summary"]),
    ],
    ids=str,
)
def test_the_op_refuses_with_the_same_words(backend, monkeypatch, lengths, options, words):
    monkeypatch.setitem(sys.modules["hlip_kernels.backends"].BACKENDS, "cuda", backend)
    layout = make(lengths, 0 if "summary" not in options else 1)
    q = torch.randn(layout.num_rows, 1, 32).half()
    with pytest.raises(NotImplementedError) as caught:
        attention(q, q, q, layout, "slice", backend="cuda", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_numbers_are_those_of_the_sources():
    header = (CSRC / "short_attention" / "arguments.h").read_text()

    def numbers(pattern, text):
        (found,) = re.findall(pattern, text)
        return tuple(int(n) for n in re.findall(r"\d+", found))

    assert HEAD_DIMS == numbers(r"kShortHeadDims\[\] = \{(.*?)\}", header)
    assert (PACK_ROWS,) == numbers(r"kPackRows = (.*?);", header)
    assert cuda_whole.HEAD_DIMS == numbers(r"kWholeHeadDims\[\] = \{(.*?)\}", header)
    assert cuda_whole.ROWS == numbers(r"kWholeRows\[\] = \{(.*?)\}", header)
    assert HEAD_DIMS == numbers(r"foreach\(HEAD_DIM ([\d ]+)\)", (CSRC.parent / "CMakeLists.txt").read_text())
