"""Runs the Triton kernels in triton's interpreter where there is no GPU, and makes memory that nobody writes visible."""

import functools
import os
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import pytest
from frames import with_room
from interpreter import patch_once_a_launch, work_less

pytest_plugins = ["settled"]
INTERPRETER = "patched once a launch"
if os.environ.get("TRITON_INTERPRET") == "1" and not (patch_once_a_launch() and work_less()):
    INTERPRETER = "as it is, slow: tests/interpreter.py does not know this version"

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the GPU gate's Python may lack it; its tests do not use it
    pass
else:
    settings.register_profile(
        "ci", deadline=None, max_examples=20, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
    )
    settings.register_profile("search", settings.get_profile("ci"), derandomize=False, max_examples=500)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header():
    return f"triton's interpreter: {INTERPRETER}"


def pytest_itemcollected(item):
    item.runtest = functools.partial(with_room, item.runtest)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Everything torch allocates without filling it starts as NaN (largest value for integers)."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def poisoned_memory():
    """Fills the GPU allocator's free memory with NaN, so that rows nobody writes are seen."""
    torch.full((2**26,), float("nan"), device="cuda")


@pytest.fixture
def needs_memory():
    """For tests that fill most of a GPU: ``needs_memory(bytes)`` skips where less is free.

    They run one at a time, whatever processes pytest-xdist deals them to: each waits for the one before, which gives its memory
    back.
    """
    import fcntl  # not on Windows, where there are no such tests

    def check(nbytes):
        free, total = torch.cuda.mem_get_info()
        if free < nbytes:
            pytest.skip(f"needs {nbytes / 2**30:.0f} GiB, of {total / 2**30:.0f} GiB {free / 2**30:.0f} are free")

    with open(Path(tempfile.gettempdir(), f"hlip-gpu-memory-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield check
        torch.cuda.empty_cache()
