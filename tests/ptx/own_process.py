"""A process in which Triton compiles kernels: in the one that tests start in its interpreter is on, and stays on."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from frames import with_room


def compiled(test):
    """Makes a test run in that process: one for all tests, where nothing that torch allocates is zeros by chance.

    Its arguments must be such as can be pickled, and it gets no fixtures. What it raises comes back with its traceback;
    pytest does not take its assertions apart there, so they need messages.
    """

    @functools.wraps(test)
    def run(**arguments):
        _process().submit(_run, test.__module__, test.__name__, arguments).result()

    return run


@functools.cache
def _process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"):
        pool.submit(torch.set_num_threads, 1).result()  # starts the process
    return pool


def _run(module: str, name: str, arguments: dict) -> None:
    torch.manual_seed(0)
    test = getattr(importlib.import_module(module), name).__wrapped__
    with mock.patch.object(torch, "empty", _poisoned), mock.patch.object(torch, "empty_like", _poisoned_like):
        with_room(test, **arguments)


def _filled(made: torch.Tensor) -> torch.Tensor:
    return made.fill_(float("nan") if made.is_floating_point() else 77)


def _poisoned(*args, _empty=torch.empty, **options) -> torch.Tensor:
    return _filled(_empty(*args, **options))


def _poisoned_like(*args, _empty=torch.empty_like, **options) -> torch.Tensor:
    return _filled(_empty(*args, **options))
