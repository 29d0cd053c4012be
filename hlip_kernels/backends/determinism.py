"""The same bits every run, asked of torch's own kernels: they listen to its switch alone."""

from __future__ import annotations

import contextlib
import threading

import torch

from .base import Numerics

_one_at_a_time = threading.Lock()


def wants_same_bits(numerics: Numerics) -> bool:
    """Whether the caller asked for them, here or by ``torch.use_deterministic_algorithms``."""
    return numerics.deterministic or torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def deterministic_algorithms():
    """torch's switch for deterministic algorithms, on, and then as it was; it is the only way to ask torch's kernels for them.

    The switch is one for the whole process. The lock keeps two threads that both set it from putting back each other's
    setting; it is held while kernels are launched, not while they run. ``set_deterministic_debug_mode`` leaves the settings
    of torch.compile alone, unlike ``use_deterministic_algorithms``; filling what is not written yet would be lost time.
    """
    with _one_at_a_time:
        mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
        try:
            torch.set_deterministic_debug_mode("error")
            torch.utils.deterministic.fill_uninitialized_memory = fill and mode > 0
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            torch.utils.deterministic.fill_uninitialized_memory = fill
