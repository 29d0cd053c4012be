"""Options, order and fixtures of the benchmarks.

--rows FILE     adds each row to a CSV file as soon as it is measured: what ends early has lost nothing.
--seconds N     starts no measurement after so long.
"""

import datetime
import time
from pathlib import Path

import pytest
import torch

from benchmarks import report, workloads
from benchmarks.measure import full_size

# What the goals are about comes first, and on a GPU, where time is short, all of it before anything else.
FIRST = (
    ("brain_mri_h3", "study"), ("brain_mri_h3", "slice"), ("brain_mri_h3", "scan"), ("many_short", "slice"),
    ("dropout_50", "study"), ("dropout_50", "scan"), ("dropout_50", "slice"), ("long_tail", "study"),
    ("uncurated_mri", "study"), ("long_tail", "scan"), ("uncurated_mri", "scan"), ("uncurated_mri", "slice"),
)  # fmt: skip
_started = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--rows", type=Path, help="add each row to this CSV file as soon as it is measured")
    parser.addoption("--seconds", type=float, help="start no measurement after so many seconds")


def pytest_collection_modifyitems(items):
    modules = list(dict.fromkeys(item.path for item in items))
    items.sort(key=lambda item: (modules.index(item.path), *order(getattr(item, "callspec", None))))


def order(callspec) -> tuple:
    """Where a case comes among those of its file: by workload and level, forward and backward together, ours first."""
    given = callspec.params if callspec else {}
    if "name" not in given:
        return (-1,)
    case = given["name"], given.get("level")
    place = FIRST.index(case) if case in FIRST else len(FIRST)
    return place, workloads.NAMES.index(given["name"]), str(case[1]), not is_ours(callspec)


def is_ours(callspec) -> bool:
    """Whether a case measures this project, not a peer."""
    return callspec is None or str(callspec.params.get("implementation", "hlip")).startswith("hlip")


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - _started > seconds:
        pytest.skip(f"no time: --seconds {seconds:g}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A peer that needs more memory than there is has no row; ours may not."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        if is_ours(getattr(pyfuncitem, "callspec", None)):
            raise
        torch.cuda.empty_cache()
        pytest.skip(f"needs more memory than there is: {str(error).splitlines()[0]}")


@pytest.fixture
def benchmark(benchmark, request):
    """pytest-benchmark's, with ``--rows``."""
    yield benchmark
    path = request.config.getoption("--rows")
    if path and "seconds" in benchmark.extra_info:
        report.write(report.rows_of(benchmark.extra_info, datetime.date.today().isoformat()), path, append=True)


@pytest.fixture(scope="session")
def workload():
    """Makes a workload by name, once per session."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = workloads.make(name, full=full_size())
        return made[name]

    return make
