"""The stress tool on the CPU: sound backends pass, broken ones are caught and reported, and nothing stops the run."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_truth import LEVELS, make

from hlip_kernels import attention
from hlip_kernels.backends import BACKENDS, Support

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))
import stress  # noqa: E402

SMALL = ["--device", "cpu", "--most-rows", "40", "--seed", "3"]


def test_sound_backends_pass(capsys):
    assert stress.main([*SMALL, "--cases", "25", "--backends", "reference", "sdpa"]) == 0
    said = capsys.readouterr().out
    assert "25 cases from 0 on, 49 runs of backends, 0 failed (seed 3)" in said and "FAILED" not in said


@pytest.mark.skipif(not BACKENDS["triton"].supports(stress.Query("cpu", None, torch.float32, 64)), reason="no interpreter")
def test_interpreted_triton_passes(capsys):
    assert stress.main([*SMALL, "--cases", "6", "--backends", "triton"]) == 0
    assert re.search("6 cases from 0 on, [3-6] runs of backends, 0 failed", capsys.readouterr().out)


def test_the_command_runs_for_as_long_as_it_is_told():
    command = [sys.executable, str(TOOLS / "stress.py"), *SMALL, "--minutes", "0.02", "--backends", "reference", "sdpa"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"^(\d+) cases from 0 on", done.stdout, re.MULTILINE).group(1)) > 0


class Broken:
    """The sdpa backend with one fault, kept or broken each time anew."""

    def __init__(self, fault):
        self.fault, self.calls = fault, 0

    def supports(self, query):
        return Support.yes()

    def forward(self, q, k, v, plan, scale, numerics):
        self.calls += 1
        if self.fault == "raises":
            raise RuntimeError("out of paper")
        out, lse = BACKENDS["sdpa"].forward(q, k, v, plan, scale, numerics)
        if self.fault == "imprecise":
            out = out + 3 * torch.finfo(out.dtype).eps * out.float().pow(2).mean().sqrt().to(out.dtype) * (out != 0)
        if self.fault == "half a row":
            out[:1, :, ::2] = 0
        if self.fault == "reads dead rows":
            out[:1] += 0 * q[-1:]
        if self.fault == "nan":
            out[:1, 0, 0] = float("nan")
        if self.fault == "unrepeatable":
            out[:1, :, :1] *= 1 + (self.calls % 2) * torch.finfo(out.dtype).eps
        if self.fault == "dead rows":
            out[-1:, 0] = 1e-30
        if self.fault == "lse":
            lse = lse + 1e-3 * (lse != 0)
        return out, lse

    def backward(self, grad_out, grad_lse, *rest):
        if self.fault == "no gradient of lse":
            grad_lse = None
        if self.fault.startswith("refuses") and grad_lse is not None:
            raise NotImplementedError("not today")
        dq, dk, dv = BACKENDS["sdpa"].backward(grad_out, grad_lse, *rest)
        if self.fault == "dv without its last head":
            dv[:, -1] = 0
        if self.fault == "dk of dead rows":
            dk[-1:] = 1
        return dq, dk, dv


@pytest.mark.parametrize(
    "fault, words",
    [
        ("imprecise", "out: error"),
        ("half a row", "out: error"),
        ("nan", "out holds 1 values that are not finite"),
        ("reads dead rows", "out holds"),
        ("unrepeatable", "out has other bits when repeated"),
        ("dead rows", "out is not 0 in dead rows"),
        ("lse", "lse: error"),
        ("no gradient of lse", "dq: error"),
        ("dv without its last head", "dv: error"),
        ("dk of dead rows", "dk is not 0 in dead rows"),
        ("refuses for no reason", "raised NotImplementedError: not today"),
        ("raises", "raised RuntimeError: out of paper"),
    ],
)
def test_a_broken_backend_is_caught_and_can_be_repeated(monkeypatch, capsys, fault, words):
    monkeypatch.setitem(BACKENDS, "broken", Broken(fault))
    assert stress.main([*SMALL, "--cases", "12", "--backends", "sdpa", "broken"]) == 1
    said = capsys.readouterr().out
    failed = int(re.search(r"12 cases from 0 on, 24 runs of backends, (\d+) failed \(seed 3\)", said).group(1))  # it went on
    assert 0 < failed == said.count("FAILED: case") and f"  broken: {words}" in said.replace("broken raised", "broken: raised")
    assert "  sdpa" not in said
    # The command of the first failure finds it again, the same; that of a case that passed finds nothing.
    again = re.search(r"again: python tools/stress.py (.*--case (\d+))", said)
    assert stress.main([*again.group(1).split(), "--backends", "broken"]) == 1
    assert f"FAILED: case {again.group(2)} of seed 3:" in capsys.readouterr().out
    passed = next(n for n in range(12) if f"FAILED: case {n} " not in said) if failed < 12 else None
    if passed is not None:
        assert stress.main([*SMALL, "--case", str(passed), "--backends", "broken"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits, lse_gradient", [(1.0, False), (300.0, True)])
def test_the_bound_is_sharp(dtype, logits, lse_gradient):
    case = dataclasses.replace(stress.draw(3, 0), lengths=[[[20, 30]]], num_prefix=1, level="slice", options={}, dtype=dtype,
                               heads=2, head_dim=16, logits=logits, lse_gradient=lse_gradient)  # fmt: skip
    trial = stress.Trial(case, 3, 0, torch.device("cpu"))
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for name, truth in trial.truth.items():
        if name == "lse":
            bound = 2e-6 if dtype == torch.float32 else 1e-5
        else:
            by_logits = (4 if lse_gradient and name in ("dq", "dk") else 0.5) * eps32 * logits
            bound = 2 * float((trial.torchs[name].double() - truth).norm() / truth.norm()) + 0.25 * eps + by_logits
        direction = torch.randn_like(truth) * (truth != 0)
        for share in (0.99, 1.01):
            got = {**trial.truth, name: truth + direction * (share * bound * truth.norm() / direction.norm())}
            assert [c.split(":")[0] for c in trial.complaints(got)] == ([name] if share > 1 else [])
    alone = stress.Trial(dataclasses.replace(case, lengths=[[[1, 1]]], num_prefix=0), 3, 0, torch.device("cpu"))
    if not lse_gradient:  # each row sees itself alone, so its logits have no gradient
        assert not alone.truth["dq"].any()
        assert alone.bound("dq") == pytest.approx(4 * eps * float(alone.truth["dv"].norm()))


@pytest.mark.parametrize("fact, wanted", [("deterministic", True), ("lse_gradient", False)])
def test_a_backend_is_asked_for_what_the_case_allows(monkeypatch, capsys, fact, wanted):
    class Choosy(Broken):
        def supports(self, query):
            facts = {"deterministic": query.numerics.deterministic, "lse_gradient": query.lse_gradient}
            return Support.yes() if facts[fact] == wanted else Support.no("that is all it does")

    monkeypatch.setitem(BACKENDS, "broken", Choosy(""))
    assert stress.main([*SMALL, "--cases", "12", "--backends", "broken"]) == 0
    runs = sum(getattr(stress.draw(3, n, 40), fact) == wanted for n in range(12))
    assert 0 < runs < 12 and f"12 cases from 0 on, {runs} runs of backends, 0 failed" in capsys.readouterr().out


def test_memory_that_nobody_wrote_is_seen(monkeypatch, capsys):
    class Forgetful(Broken):
        def backward(self, grad_out, grad_lse, q, k, *rest):
            dq, _, dv = super().backward(grad_out, grad_lse, q, k, *rest)
            return dq, torch.empty_like(k), dv

    monkeypatch.setitem(BACKENDS, "broken", Forgetful(""))
    assert stress.main([*SMALL, "--cases", "12", "--backends", "broken"]) == 1
    assert "values that are not finite" in capsys.readouterr().out
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    with stress.poisoned(True):
        assert torch.empty(1000).isnan().all()
    assert (
        torch.are_deterministic_algorithms_enabled() is False and torch.utils.deterministic.fill_uninitialized_memory is False
    )
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    assert not before[0]


def test_other_bits_are_let_through_where_the_case_allows_them(monkeypatch):
    monkeypatch.setitem(BACKENDS, "broken", Broken("unrepeatable"))
    numbers = [n for n in range(60) if n % 20 != 19]
    deterministic = {n for n in numbers if stress.draw(3, n, 40).deterministic and any_rows(stress.draw(3, n, 40))}
    complained = {n for n in numbers if stress.one(3, n, torch.device("cpu"), ["broken"], 40)[1]}
    assert 20 < len(complained) <= len(deterministic) < len(numbers) and complained <= deterministic


def any_rows(case):
    return make(case.lengths, case.num_prefix).num_rows > 0


def test_a_call_that_should_be_refused_is_a_failure_when_it_is_not(monkeypatch, capsys):
    assert all(stress.one(3, n, torch.device("cpu"), [], 40) == (1, [], None) for n in range(19, 1000, 20))
    for outcome, words in ((None, "went through"), (ZeroDivisionError("oh"), "raised ZeroDivisionError: oh")):

        def fake(*args, outcome=outcome, **options):
            if outcome:
                raise outcome

        monkeypatch.setattr(stress, "attention", fake)
        assert stress.main([*SMALL, "--first", "19", "--cases", "1"]) == 1
        said = capsys.readouterr().out
        assert words in said and "a call that must be refused" in said and "--case 19" in said


def test_a_line_every_hundred_cases(monkeypatch, capsys):
    monkeypatch.setattr(stress, "one", lambda *_: (2, [], None))
    assert stress.main([*SMALL, "--cases", "250"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["100 cases", "200 cases", "250 cases from 0 on"]
    assert "400 runs" in lines[2] and "500 runs" in lines[3]


def test_a_lost_gpu_means_a_new_process(monkeypatch, capsys):
    started = []

    def execv(program, command):
        started.append(command)
        raise SystemExit(1)  # a real one never returns

    monkeypatch.setattr(stress.os, "execv", execv)
    monkeypatch.setattr(
        stress, "one", lambda seed, n, *_: (1, ["x raised AcceleratorError: CUDA error: misaligned"] * (n == 7), None)
    )
    with pytest.raises(SystemExit):
        stress.main([*SMALL, "--cases", "30", "--backends", "sdpa"])
    assert "FAILED: case 7 of seed 3" in capsys.readouterr().out
    monkeypatch.setattr(stress, "one", lambda *_: (1, [], None))
    assert stress.main(started[0][2:]) == 1  # what failed before still counts
    assert "22 cases from 8 on, 22 runs of backends, 1 failed (seed 3)" in capsys.readouterr().out


def test_the_gate_and_make_call_it(tmp_path, monkeypatch):
    import gpu_gate

    steps = {name: command for name, command, _ in gpu_gate.steps(tmp_path)}
    monkeypatch.setattr(stress, "stress", lambda args: (args.minutes, args.device) != (0.6, "cuda"))
    assert stress.main(steps["stress"][2:]) == 0
    command = ["make", "--no-print-directory", "-n", "stress", "MINUTES=3", "PYTHON=py"]
    # Not as a part of the make that runs the tests: what that was told does not count here.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    made = subprocess.run(command, cwd=gpu_gate.ROOT, env=environment, capture_output=True, text=True)
    assert made.stdout.strip() == "py tools/stress.py --minutes 3"


def test_draws_repeat_and_reach_everything():
    drawn = [stress.draw(1, n, 200) for n in range(600)]
    assert drawn == [stress.draw(1, n, 200) for n in range(600)] and drawn != [stress.draw(2, n, 200) for n in range(600)]
    assert {c.level for c in drawn} == set(LEVELS) and {c.num_prefix for c in drawn} == {0, 1, 2, 3}
    assert {c.head_dim for c in drawn} == set(stress.HEAD_DIMS) and {c.dtype for c in drawn} == set(stress.DTYPES)
    assert {(c.strides, c.grad_strides) for c in drawn} == {
        (a, b) for a in ("packed", "contiguous", "heads first", "padded") for b in ("contiguous", "heads last", "expanded")
    }
    assert {(c.level, *c.options) for c in drawn if c.options} >= {("slice", "neighbours", "summary"), ("scan", "summary")}
    assert {(c.lse_gradient, c.dead_nan, c.deterministic) for c in drawn} == {
        (a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)
    }
    rows = [make(c.lengths, 0).num_rows for c in drawn]
    assert 0 in rows and 200 < max(rows) <= 800 and sum(n > 200 for n in rows) > 10
    assert {c.logits for c in drawn} >= {1.0, 300.0} and {c.heads for c in drawn} >= {1, 2, 3, 64}


@pytest.mark.parametrize("strides", ["packed", "contiguous", "heads first", "padded"])
def test_strides_change_no_value(strides):
    t = torch.randn(5, 3, 2, 16)
    laid = stress.laid_out(t, strides)
    assert torch.equal(laid, t) and all(part.stride(-1) == 1 for part in laid.unbind(1))
    expected = {"packed": (96, 16), "contiguous": (32, 16), "heads first": (16, 80), "padded": (144, 24)}[strides]
    assert laid[:, 1].stride()[:2] == expected


def test_gradient_strides():
    t = torch.randn(5, 2, 16)
    assert stress.gradient_laid_out(t, "expanded").stride(-1) == 0
    assert stress.gradient_laid_out(t, "heads last").stride(1) == 1 and torch.equal(
        stress.gradient_laid_out(t, "heads last"), t
    )


def test_reference_differentiates_the_lse_of_nothing():
    """Found by the stress run: with no live row the log-sum-exp was cut from the graph."""
    q = torch.randn(16, 2, 8, requires_grad=True)
    lse = attention(q, q, q, make([[]], 1, 16), "slice", backend="reference", return_lse=True)[1]
    assert not torch.autograd.grad(lse.sum(), q)[0].any()
