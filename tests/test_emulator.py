"""The emulator that runs CUDA kernels on the host: right results from good kernels, and the right complaint about bad ones."""

import os
import re
from pathlib import Path

import emulation
import pytest

filelock = pytest.importorskip("filelock")  # torch needs it too

SOURCE = Path(__file__).parent / "emulator" / "self_test.cpp"
# The entries of its table: CASE(name) or {"name", ...}.
CASES = [a or b for a, b in re.findall(r'^ {4}(?:CASE\((\w+)\)|\{"(\w+)", .*\}),$', SOURCE.read_text(), re.MULTILINE)]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """Compiled once for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    made = folder / "emulator-self-test"
    with filelock.FileLock(folder / "emulator.lock"):
        return made if made.exists() else emulation.build(SOURCE, made)


@pytest.mark.parametrize("case", CASES)
def test_case(program, case):
    emulation.run(program, case)


def test_every_case_is_run(program):
    listed = emulation.subprocess.run([str(program)], capture_output=True, text=True)
    assert listed.returncode == 2 and sorted(listed.stdout.split()) == sorted(CASES)


def test_threads_switch_without_assembly_too(tmp_path):
    """The way of machines other than x86-64: swapcontext."""
    program = emulation.build(SOURCE, tmp_path / "self_test", "HLIP_EMULATED_UCONTEXT")
    for case in ("transposition", "shuffle", "lane_exits_before_collective", "exception_of_a_kernel"):
        emulation.run(program, case)
