"""Tables that are kept, on made up streams: who waits for the copy, and whose work keeps the memory."""

import contextlib

import pytest
import torch
from attention_truth import RAGGED, make

from hlip_kernels.backends.flash import segments_of
from hlip_kernels.backends.sdpa import groups_of
from hlip_kernels.kept import keep
from hlip_kernels.packs import packs_of
from hlip_kernels.pattern import Plan

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class Table(torch.Tensor):
    """A tensor that would be on a GPU: notes the streams whose work keeps its memory."""

    def record_stream(self, stream):
        self.__dict__.setdefault("used_on", []).append(stream)


class Stream:
    """Notes what happens on it, in order."""

    def __init__(self, handle):
        self.cuda_stream, self.said = handle, []

    def record_event(self):
        event = object()
        self.said.append(("record", event))
        return event

    def wait_event(self, event):
        self.said.append(("wait", event))


class Gpu:
    """The streams of a GPU that is not there; ``capturing``: those that make a graph."""

    def __init__(self, monkeypatch):
        self.streams = [Stream(handle) for handle in range(3)]
        self.current, self.capturing, self.copies, self.copy = self.streams[0], [], [], torch.Tensor.to
        monkeypatch.setattr(torch.cuda, "current_stream", self._current_stream)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current in self.capturing)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: self._to(tensor, where, how))

    def _current_stream(self, device):
        assert device == CUDA
        return self.current

    def _to(self, tensor, where, how):
        if where != (CUDA,):
            return self.copy(tensor, *where, **how)
        assert how == {"non_blocking": True} and self.current not in self.capturing
        self.copies.append(tensor.clone().as_subclass(Table))
        self.current.said.append(("copy", self.copies[-1]))
        return self.copies[-1]


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


CACHES = {
    "tiles": lambda plan, device: plan.tiles(64, device),
    "transposed tiles": lambda plan, device: plan.tiles(64, device, transposed=True),
    "packs": packs_of,
    "groups": groups_of,
    "segments": lambda plan, device: segments_of(plan, device, 16),
}


def plan_of(kind):
    options = {"summary": "study"} if kind == "transposed tiles" else {}
    return Plan.of(make(RAGGED, 2, 16).pattern("slice", **options))


@pytest.mark.parametrize("kind", CACHES)
def test_another_stream_waits_for_the_copies_and_keeps_the_memory(gpu, kind):
    plan = plan_of(kind)
    first, second, third = gpu.streams
    made = CACHES[kind](plan, CUDA)
    copies = list(gpu.copies)
    assert len(copies) >= 2 and [table for what, table in first.said if what == "copy"] == copies
    order = [what for what, _ in first.said]
    assert order[-1] == "record"  # after the last copy
    events = [event for what, event in first.said if what == "record"]
    for stream in (second, first, second, third, second):
        gpu.current = stream
        again = CACHES[kind](plan, CUDA)
        assert type(again) is type(made)
    assert gpu.copies == copies and [what for what, _ in first.said] == order  # nothing more for the stream that made them
    for stream in (second, third):
        assert stream.said == [("wait", event) for event in events]  # once is enough
    # The rows that are in no group are a table of their own, left out where there are none.
    assert all(table.used_on == [second, third] for table in copies if table.numel())


@pytest.mark.parametrize("kind", CACHES)
def test_nothing_is_waited_for_while_a_graph_is_captured(gpu, kind):
    """That would be an error; the stream waits when it is no longer capturing."""
    plan = plan_of(kind)
    CACHES[kind](plan, CUDA)
    gpu.current = stream = gpu.streams[1]
    gpu.capturing.append(stream)
    CACHES[kind](plan, CUDA)
    assert not stream.said and not any(hasattr(table, "used_on") for table in gpu.copies)
    gpu.capturing.clear()
    CACHES[kind](plan, CUDA)
    assert stream.said and all(what == "wait" for what, _ in stream.said)


def test_the_stream_that_made_a_table_may_capture(gpu):
    plan = plan_of("tiles")
    plan.tiles(64, CUDA)
    gpu.capturing.append(gpu.current)
    said = list(gpu.current.said)
    plan.tiles(64, CUDA)
    assert gpu.current.said == said


def test_on_a_cpu_there_are_no_streams(monkeypatch):
    def fail(*given):
        raise AssertionError("asked for a stream")

    monkeypatch.setattr(torch.cuda, "current_stream", fail)
    kept = {}
    for _ in range(2):
        assert keep(kept, "key", CPU, lambda: torch.arange(3)) is kept["key"].value
    for kind, of in CACHES.items():
        plan = plan_of(kind)
        of(plan, CPU)
        of(plan, CPU)
