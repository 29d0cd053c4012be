"""Times calls: on a GPU by its own clock, with the host's work out of the way."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CYCLES = 2_000_000_000  # a second of a GPU's clock, at most
MOST = 0.05  # seconds that a GPU is kept busy while a call is queued


def host_seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long the host is at work in one call: on a GPU what :func:`timed` wants to know, elsewhere 0."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize(device)
    return seconds


def timed(call: Callable[[], object], device: torch.device, host: float = 0.0) -> float:
    """Seconds of one call: by events on a GPU, by the wall clock elsewhere.

    Args:
        host: seconds that the host takes to queue the call (:func:`host_seconds`). So long, and half as long again, the GPU
            is kept busy first: else a short call takes what Python takes to launch it.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if host:
        torch.cuda._sleep(int(min(MOST, 1.5 * host + 1e-4) * CYCLES))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3
