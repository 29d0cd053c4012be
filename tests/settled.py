"""Tests whose answer is settled while the files they are about stay as they are, and of which a part is run then.

Some break kernels on purpose, and see that other tests notice: that stays so while kernels, emulators and those tests do. Where
nothing has changed since they last passed, one in eight is run; where anything has, all are. A test that asks for the fixture
``settled`` is run in any case, and does less by itself.

``--settled all`` runs everything, as does naming their file on the command line. ``--settled record`` does too, but no other
tests, and then writes down what they ran on, in ``tests/settled.json``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".json")
ONE_IN = 8

# What executed PTX is made of, and what runs it.
_EXECUTED = ("hlip_kernels/backends/base.py", "hlip_kernels/layout*.py", "hlip_kernels/pa*.py", "tests/ptx/*.py",
             "tests/attention_truth.py")  # fmt: skip
CUDA_KERNELS = (*_EXECUTED, "csrc/**/*", "hlip_kernels/backends/cuda*.py", "tests/test_short_attention.py")
TRITON_KERNELS = (*_EXECUTED, "hlip_kernels/backends/triton/*.py", "hlip_kernels/backends/hopper/*.py",
                  "tests/test_compiled_triton.py")  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--settled", choices=("part", "all", "record"), default="part",
        help="of tests whose answer is settled run a part, all, or all and nothing else, and record what they ran on",
    )  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "settles(*paths, packages=()): what a test is about beside its own file; packages: those that make code, or nvcc",
    )


def pytest_report_header(config):
    return {
        "part": "settled, where nothing has changed since: a part is run (--settled all)",
        "all": "settled: all of it is run again",
        "record": "settled: all of it is run again, and recorded; nothing else is run",
    }[config.getoption("settled")]


def digest(file: Path, marker) -> str:
    """Of all the files that a test is about, and of the versions of the packages that make their code."""
    made = hashlib.sha256()
    for pattern in sorted({*marker.args, file.relative_to(ROOT).as_posix()}):
        found = sorted(path for path in ROOT.glob(pattern) if path.is_file())
        if not found:
            raise pytest.UsageError(f"{file.name} is about {pattern}, of which there is none")
        for path in found:
            made.update(f"{path.relative_to(ROOT).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    for package in marker.kwargs.get("packages", ()):
        made.update(f"{package} {_version(package)}".encode())
    return made.hexdigest()[:16]


@functools.cache
def _version(package: str) -> str:
    """major.minor of a package, or of nvcc; empty where there is none."""
    if package == "nvcc":
        sys.path.insert(0, str(ROOT / "tools"))
        from cuda_toolkit import ToolError, nvcc_version

        try:
            return nvcc_version()
        except ToolError:
            return ""
    try:
        return ".".join(version(package).split(".")[:2])
    except PackageNotFoundError:
        return ""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    found = {}  # by file and function: the digest, and the tests
    for item in items:
        if marker := item.get_closest_marker("settles"):
            name = f"{item.path.name}::{item.originalname}"
            if name not in found:
                found[name] = digest(item.path, marker), []
            found[name][1].append(item)
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    how, left_out = config.getoption("settled"), set()
    if how == "part":
        for name, (made, tests) in found.items():
            if known.get(name) != made:
                why = "what it is about has changed" if name in known else "it is not on record"
                warnings.warn(f"all of {name} is run, since {why}; once it passes: pytest tests --settled record", stacklevel=1)
            elif not any(name.split("::")[0] in argument for argument in config.args):
                for n, test in enumerate(tests):
                    test.stash[_SETTLED] = True
                    if n % ONE_IN and "settled" not in test.fixturenames:
                        left_out.add(test)
    elif how == "record":
        if hasattr(config, "workerinput"):
            raise pytest.UsageError("--settled record runs in one process: leave out -n")
        config.stash[_FOUND] = {name: made for name, (made, _) in found.items()}
        left_out = set(items).difference(*(tests for _, tests in found.values()))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def settled(request) -> bool:
    """Whether nothing this test is about has changed since all of it passed."""
    return request.node.stash.get(_SETTLED, False)


def pytest_sessionfinish(session, exitstatus):
    """Writes the record, once all have run and passed."""
    config = session.config
    if config.getoption("settled") != "record" or config.option.collectonly:
        return
    parts = config.getoption("keyword") or config.getoption("markexpr") or any("::" in one for one in config.args)
    skipped = config.pluginmanager.getplugin("terminalreporter").stats.get("skipped")
    if exitstatus or parts or skipped:
        print(f"\n{RECORD.name} stays as it is: not all of these tests ran and passed")
        return
    found = config.stash[_FOUND]
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    RECORD.write_text(json.dumps(dict(sorted((known | found).items())), indent=1) + "\n")
    print(f"\n{RECORD.name}: written for {', '.join(found)}")


_SETTLED, _FOUND = pytest.StashKey(), pytest.StashKey()
