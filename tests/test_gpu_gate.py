"""The GPU gate without a GPU: what its steps name is there, and what becomes of steps that fail, hang or cannot start."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu_gate  # noqa: E402


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def run(tmp_path):
    def run(*steps, only=None, seconds=60.0):
        results = gpu_gate.run_steps(list(steps), tmp_path, dict(os.environ), only, time.monotonic() + seconds)
        return {name: status for name, status, _ in results}

    return run


def test_what_the_steps_name_is_there(tmp_path):
    steps = {name: command for name, command, _ in gpu_gate.steps(tmp_path)}
    order = list(steps)
    assert order.index("benchmarks-attention") < order.index("stress") and order[-1] == "tiles"  # a second call's, if need be
    for name in ("tests", "hopper"):  # one process would spend the whole limit compiling
        assert ("-n" in steps[name]) == (importlib.util.find_spec("xdist") is not None)
    for command in steps.values():
        assert all((ROOT / part).exists() for part in command if part.endswith(".py"))


def test_a_sanitizer_runs_every_part_of_its_case(tmp_path):
    pytest.importorskip("triton")
    import sanitizer_case

    parts = {"memcheck": set(), "initcheck": set(), "racecheck": set()}
    for name, command, _ in gpu_gate.steps(tmp_path):
        if "--tool" in command:
            tool = command[command.index("--tool") + 1]
            given = command[command.index("tools/sanitizer_case.py") + 1 :]
            assert name.startswith(tool) and set(given) <= set(sanitizer_case.PARTS)
            parts[tool] |= set(given or sanitizer_case.PARTS)
    assert all(found == set(sanitizer_case.PARTS) for found in parts.values())
    with pytest.raises(SystemExit):
        sanitizer_case.main(["moon"])


def test_benchmarks_keep_their_rows_and_end_by_themselves(tmp_path):
    pytest.importorskip("pytest_benchmark")
    for name, command, limit in gpu_gate.steps(tmp_path):
        if name.startswith("benchmarks"):
            options = command[command.index("--rows") :]
            assert options[:2] == ["--rows", str(tmp_path / "rows.csv")] and float(options[3]) < limit
            done = subprocess.run([*command, "--collect-only", "-k", "nothing"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 5 and "error" not in done.stderr, done.stdout + done.stderr  # 5: no test is named so


def test_no_more_files_than_come_back_from_elsewhere(run, tmp_path):
    run(*[(f"step {i}", python("print(1)"), 9) for i in range(3)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "summary.txt"]
    names = {Path(part).name for _, command, _ in gpu_gate.steps(tmp_path) for part in command if str(tmp_path) in part}
    assert len(names | {"log.txt", "summary.txt", "roofline.svg"}) <= 8


def test_steps_that_fail_or_cannot_start_stop_no_other(run, tmp_path, capsys):
    found = run(
        ("bad", python("print('why it is bad'); raise SystemExit(3)"), 9), ("none", ["/no/such/program"], 9),
        ("good", python("print('well')"), 9),
    )  # fmt: skip
    assert found == {"bad": "FAILED (exit status 3)", "none": "could not start: No such file or directory", "good": "passed"}
    assert "why it is bad" in capsys.readouterr().out
    log, summary = (tmp_path / "log.txt").read_text(), (tmp_path / "summary.txt").read_text().splitlines()
    assert log.index("===== bad") < log.index("why it is bad") < log.index("===== good") < log.index("\nwell")
    assert [line.split()[0] for line in summary] == ["bad", "none", "good"]


def test_a_step_that_hangs_leaves_no_process(run, tmp_path):
    child = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run(("hangs", python(code), 3)) == {"hangs": "STOPPED after 3 s"}
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):  # until it is gone, or waits to be collected
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the child of a stopped step still runs")


@pytest.mark.parametrize("code, left_out", [("import time; time.sleep(60)", True), ("raise SystemExit(1)", False)])
def test_only_kernels_that_hang_are_left_out_of_what_follows(run, tmp_path, code, left_out):
    later = "import os; raise SystemExit(int('hopper' in os.environ.get('HLIP_KERNELS_WITHOUT', '')))"
    found = run(("hopper", python(code), 1), ("later", python(later), 9))
    assert found["later"] == ("FAILED (exit status 1)" if left_out else "passed")


def test_a_chosen_step_and_the_end_of_the_time(run):
    steps = [(name, python(""), 9) for name in ("one", "two", "three")]
    assert run(*steps, only=["two"]) == {"two": "passed"}
    assert set(run(*steps, seconds=5).values()) == {"not started: no time left"}
