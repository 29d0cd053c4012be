"""What tests/settled.py leaves out, and when."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

pytestmark = pytest.mark.settles("kernels/*.py", packages=["pytest"])


@pytest.mark.parametrize("n", range(17))
def test_many(n):
    assert n != {fails}


@pytest.mark.parametrize("n", range(3))
def test_asks(n, settled):
    print("settled" if settled else "not settled")
"""


@pytest.fixture
def project(pytester):
    """A project with 17 tests about a kernel, three that look themselves, and one about nothing."""
    root = pytester.path
    for folder in ("tests", "kernels"):
        (root / folder).mkdir()
    (root / "tests/settled.py").write_text(Path(__file__).with_name("settled.py").read_text())
    (root / "tests/conftest.py").write_text('pytest_plugins = ["settled"]\n')
    (root / "tests/test_kernel.py").write_text(TESTS.format(fails="None"))
    (root / "tests/test_other.py").write_text("def test_other():\n    pass\n")
    (root / "kernels/one.py").write_text("ONE = 1\n")
    return pytester


def ran(project, *options) -> dict:
    return project.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist", *options).parseoutcomes()


def test_one_in_eight_is_run_while_nothing_changes(project):
    root = project.path
    assert ran(project, "tests") == {"passed": 21, "warnings": 2}, "nothing is on record"
    assert ran(project, "tests", "--settled", "record") == {"passed": 20, "deselected": 1}
    project.runpytest_subprocess("-s", "tests/").stdout.fnmatch_lines(["*settled, where nothing has changed*"])
    assert ran(project, "tests") == {"passed": 3 + 3 + 1, "deselected": 14}
    assert ran(project, "tests", "--settled", "all") == {"passed": 21}
    assert ran(project, "tests/test_kernel.py") == {"passed": 20}, "they were named"
    for file in ("kernels/one.py", "tests/test_kernel.py"):
        before = (root / file).read_text()
        (root / file).write_text(before + "\n")
        assert ran(project, "tests") == {"passed": 21, "warnings": 2}, f"{file} has changed"
        (root / file).write_text(before)
    (root / "kernels/two.py").touch()
    result = project.runpytest_subprocess("tests", "-p", "no:xdist")
    result.stdout.fnmatch_lines(["*all of test_kernel.py::test_many is run, since what it is about has changed*"])
    assert result.parseoutcomes() == {"passed": 21, "warnings": 2}, "there is one more"


def test_a_test_that_asks_is_told(project):
    ran(project, "tests", "--settled", "record")
    said = project.runpytest_subprocess("-s", "tests").outlines
    assert sum("not settled" in line for line in said) == 0 and sum("settled" in line for line in said) >= 3
    said = project.runpytest_subprocess("-s", "tests", "--settled", "all").outlines
    assert sum("not settled" in line for line in said) == 3


def test_only_what_has_passed_whole_is_recorded(project):
    record = project.path / "tests/settled.json"
    tests = project.path / "tests/test_kernel.py"
    for options in (["-k", "many"], ["--collect-only"], ["tests/test_kernel.py::test_many"]):
        ran(project, "tests", "--settled", "record", *options)
        assert not record.exists(), options
    tests.write_text(TESTS.format(fails="5"))
    assert ran(project, "tests", "--settled", "record") == {"passed": 19, "failed": 1, "deselected": 1}
    assert not record.exists()
    tests.write_text(TESTS.format(fails="None") + "\n\ndef test_skips():\n    pytest.skip('not here')\n")
    assert ran(project, "tests", "--settled", "record") == {"passed": 20, "skipped": 1, "deselected": 1}
    assert not record.exists()
    tests.write_text(TESTS.format(fails="None").replace("kernels/*.py", "kernels/none.py"))
    result = project.runpytest_subprocess("tests")
    result.stderr.fnmatch_lines(["*is about kernels/none.py, of which there is none*"])
