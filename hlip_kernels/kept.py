"""Index tables that are made on first use and kept: copied to a device on one stream, and safe to read on any other.

The copy is not waited for, so another stream may come before it is done. And torch gives memory back in the order of the stream
that it was allocated on, so what another stream still reads may be freed under it. :func:`keep` sees to both, without making
the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


def from_array(array: np.ndarray) -> torch.Tensor:
    """The array as a CPU tensor that autograd may save, also when made under ``torch.inference_mode()``: tables outlive it."""
    with torch.inference_mode(False):
        return torch.from_numpy(array)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of an array, without waiting for it; like :func:`from_array` in any mode."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def keep(kept: dict[Hashable, Any], key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
    """What ``make`` makes, kept under ``key``: its tensors on ``device`` can be read on the device's current stream.

    Tensors are found in tuples, lists and dataclasses.
    """
    found = kept.get(key)
    if found is None:
        found = kept[key] = _Kept(make(), device)
    elif device.type == "cuda":
        found.meet(device)
    return found.value


class _Kept:
    """A value, when it was there, and the streams that may read it."""

    __slots__ = "made", "streams", "value"

    def __init__(self, value, device: torch.device):
        self.value = value
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            self.made, self.streams = stream.record_event(), {stream.cuda_stream}

    def meet(self, device: torch.device) -> None:
        """Makes the current stream one of those: its work waits for the copies, and the memory, once freed, for its work."""
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream in self.streams:
            return
        with torch.cuda.device(device):
            # A graph may not wait for what it does not hold. Nor need it: whoever captures one has warmed up before and waited
            # for that, as torch.cuda.graph() does, and must keep the layout for as long as the graph.
            if torch.cuda.is_current_stream_capturing():
                return
        stream.wait_event(self.made)
        for tensor in _tensors(self.value):
            tensor.record_stream(stream)
        self.streams.add(stream.cuda_stream)


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
