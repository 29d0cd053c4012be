"""Attention on random ragged layouts, for as long as you like, against a naive float64 truth.

    python tools/stress.py --minutes 10                    # on the GPU if there is one
    python tools/stress.py --seed 7 --case 1234            # one case again, as a failure says

A case draws a layout (studies, scans, slices; some of all of them empty), prefix rows, a pattern, dtype, head dim, scale,
strides, dead rows, and which gradients flow. Every backend that supports it computes it forward and backward. Checked are:

- errors of outputs and gradients: at most twice those of torch's own attention in the same dtype (tests/attention_truth.py),
  and, beyond the rule of the tests, what rounding a float32 logit leaves to chance in a layout of few rows, in proportion to
  the size of the logits (``Trial.bound``; without it some cases with logits of hundreds failed by luck);
- finite values, with all memory poisoned that nobody has written; dead rows 0, though their inputs may be NaN;
- the same bits when repeated, unless the case allows other ones.

One case in twenty is a call that must be refused instead. A failure is printed with the command that repeats it, and the run
goes on; after an error that leaves the GPU unusable it goes on in a new process. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # without a GPU the Triton kernels are interpreted, which must be said before triton is imported
    if "cpu" in sys.argv or not __import__("torch").cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from attention_truth import HEAD_DIMS, LENGTHS, LEVELS, make, naive_attention, naive_mask, relative, sdpa_by_segment  # noqa: E402

from hlip_kernels import attention  # noqa: E402
from hlip_kernels.backends import BACKENDS, Query  # noqa: E402
from hlip_kernels.backends.base import Numerics  # noqa: E402
from hlip_kernels.pattern import Plan  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WRONG = ("rows", "heads", "dtype", "ints", "stride", "ndim", "level", "neighbours", "summary", "backend", "layout")
REFUSALS = (ValueError, TypeError, NotImplementedError)
ENOUGH = 2048  # elements of q: a relative error over fewer is a matter of luck


@dataclass(frozen=True)
class Case:
    """What a case draws. ``strides`` and ``grad_strides``: how q, k and v, and the gradient of the output, lie in memory."""

    lengths: list
    num_prefix: int
    row_multiple: int
    level: str
    options: dict
    dtype: torch.dtype
    heads: int
    head_dim: int
    logits: float  # their standard deviation
    strides: str
    grad_strides: str
    lse_gradient: bool
    dead_nan: bool
    deterministic: bool

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


def draw(seed: int, number: int, most_rows: int = 450) -> Case:
    """Case ``number`` of a seed: the same on every machine."""
    rng = random.Random(f"{seed}/{number}")
    if rng.random() < 0.1:
        most_rows *= 4
    lengths, room = [], most_rows
    for _ in range(rng.randrange(4)):
        lengths.append([])
        for _ in range(rng.randrange(4)):
            lengths[-1].append([])
            for _ in range(rng.randrange(5)):
                n = rng.choice(LENGTHS) if rng.random() < 0.7 else rng.randrange(max(1, most_rows // 3))
                n = min(n, room)
                room -= n
                lengths[-1][-1].append(n)
    num_prefix = rng.choice((0, 1, 2, 3))
    level = rng.choice(LEVELS)
    options = {}
    if level != "study" and rng.random() < 0.3:
        options["neighbours"] = rng.choice((1, 2, 5))
    if level != "study" and num_prefix and rng.random() < 0.3:
        options["summary"] = "study" if level == "scan" else rng.choice(("scan", "study"))
    head_dim = 64 if rng.random() < 0.5 else rng.choice(HEAD_DIMS)
    rows = sum(n for study in lengths for scan in study for n in scan)
    return Case(
        lengths=lengths,
        num_prefix=num_prefix,
        row_multiple=rng.choice((1, 16, 64)),
        level=level,
        options=options,
        dtype=rng.choice(DTYPES),
        heads=max(rng.choice((1, 2, 3)), min(64, -(-ENOUGH // max(1, rows * head_dim)))),
        head_dim=head_dim,
        logits=rng.choice((1.0, 1.0, 10.0, 100.0, 300.0)),
        strides=rng.choice(("packed", "contiguous", "heads first", "padded")),
        grad_strides=rng.choice(("contiguous", "heads last", "expanded")),
        lse_gradient=rng.random() < 0.4,
        dead_nan=rng.random() < 0.5,
        deterministic=rng.random() < 0.8,
    )


def laid_out(t: torch.Tensor, strides: str) -> torch.Tensor:
    """``(R, N, H, D)`` -> the same values with other strides; ``[:, i]`` are q, k and v."""
    if strides == "heads first":
        return t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if strides == "padded":
        return torch.nn.functional.pad(t, (0, 8))[..., : t.shape[-1]]
    return t if strides == "packed" else t.transpose(0, 1).contiguous().transpose(0, 1)


def gradient_laid_out(t: torch.Tensor, strides: str) -> torch.Tensor:
    """The same for an output gradient ``(R, H, D)``; expanded, all columns are the first one."""
    if strides == "expanded":
        return t[..., :1].expand(t.shape)
    return t.transpose(1, 2).contiguous().transpose(1, 2) if strides == "heads last" else t


class Trial:
    """The inputs of a case on a device, its truth, and the errors of torch's own attention."""

    def __init__(self, case: Case, seed: int, number: int, device: torch.device):
        self.case, self.device = case, device
        self.layout = make(case.lengths, case.num_prefix, case.row_multiple).to(device)
        self.scale = case.logits / case.head_dim**0.5
        self.mask = naive_mask(case.lengths, case.num_prefix, self.layout.num_rows, case.level, **case.options)
        self.dead = slice(self.layout.prefix_rows(case.level).stop, None)
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        shape = (self.layout.num_rows, case.heads, case.head_dim)
        self.qkv = torch.randn(shape[0], 3, *shape[1:], generator=generator).to(device, case.dtype)
        self.grad = torch.randn(shape, generator=generator).to(device, case.dtype)
        if case.grad_strides == "expanded":
            self.grad[:] = self.grad[..., :1]
        self.lse_grad = torch.randn(case.heads, shape[0], generator=generator).to(device)
        self.truth = self._run(self._naive, torch.float64)
        self.torchs = self._run(self._torch, case.dtype)

    def _naive(self, q, k, v):
        return naive_attention(q, k, v, self.mask, self.scale)

    def _torch(self, q, k, v):
        lse = naive_attention(q, k, v, self.mask, self.scale, torch.float32)[1]
        return sdpa_by_segment(q, k, v, self.mask, self.scale), lse

    def _run(self, call, dtype, qkv=None, grad=None):
        """out, lse and the gradients of q, k and v."""
        leaf = (self.qkv if qkv is None else qkv).to(dtype).detach().requires_grad_()
        out, lse = call(*leaf.unbind(1))
        outputs, grads = (out,), ((self.grad if grad is None else grad).to(out.dtype),)
        if self.case.lse_gradient:
            outputs, grads = (out, lse), (*grads, self.lse_grad.to(lse.dtype))
        got = torch.autograd.grad(outputs, leaf, grads)[0] if leaf.numel() else leaf.detach()
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *got.unbind(1)), strict=True))

    def run(self, backend: str) -> dict[str, torch.Tensor]:
        """What a backend makes of it."""
        case, qkv, grad = self.case, self.qkv, self.grad
        if case.dead_nan:
            qkv, grad = qkv.clone(), grad.clone()
            qkv[self.dead] = grad[self.dead] = float("nan")
        options = case.options | {"scale": self.scale, "deterministic": case.deterministic}

        def call(q, k, v):
            return attention(q, k, v, self.layout, case.level, backend=backend, return_lse=True, **options)

        return self._run(call, case.dtype, laid_out(qkv, case.strides), gradient_laid_out(grad, case.grad_strides))

    def complaints(self, got: dict[str, torch.Tensor]) -> list[str]:
        """What is wrong with it."""
        found = []
        for name, t in got.items():
            rows = t.transpose(0, 1) if name == "lse" else t
            if rows[self.dead].any():
                found.append(f"{name} is not 0 in dead rows")
            elif not self.torchs[name].isfinite().all():
                continue  # too large for the dtype
            elif not t.isfinite().all():
                found.append(f"{name} holds {int((~t.isfinite()).sum())} values that are not finite")
            else:
                error, bound = relative(t, self.truth[name]), self.bound(name)
                if not error <= bound:
                    found.append(f"{name}: error {error:.2e}, at most {bound:.2e} allowed")
        return found

    def bound(self, name: str) -> float:
        """Twice torch's error, and what is left to chance where torch happens to be exact."""
        case, truth = self.case, self.truth[name]
        eps, eps32 = torch.finfo(case.dtype).eps, torch.finfo(torch.float32).eps
        if name == "lse":  # torch gives none; for 16-bit inputs its CPU kernel's own, which sdpa passes on, is good to 3e-6
            return 2e-6 if case.dtype == torch.float32 else 1e-5
        if not truth.any():
            # Rows that see one key alone: the gradients of logits cancel, up to a rounding of what cancels.
            return 4 * eps * float(self.truth["dv"].norm()) * max(1.0, case.logits)
        # A float32 logit is rounded by a share of its size, which is the relative error of its probability. Where few rows
        # are not one-hot, whether torch gets those right is luck. What comes through the log-sum-exp meets that rounding twice
        # more, and in torch's attention, which gives none, not at all.
        twice = case.lse_gradient and name in ("dq", "dk")
        return 2 * relative(self.torchs[name], truth) + 0.25 * eps + (4 if twice else 0.5) * eps32 * case.logits


def check(case: Case, seed: int, number: int, device: torch.device, backends) -> tuple[int, list[str]]:
    """Runs a case on every backend that supports it: how many did, and what was wrong."""
    trial = Trial(case, seed, number, device)
    plan = Plan.of(trial.layout.pattern(case.level, **case.options))
    query = Query.of(trial.qkv[:, 0], plan, Numerics(case.deterministic), case.lse_gradient)
    ran, found = 0, []
    for name in backends:
        if not BACKENDS[name].supports(query):
            continue
        ran += 1
        try:
            first = trial.run(name)
            found += [f"{name}: {complaint}" for complaint in trial.complaints(first)]
            if case.deterministic:
                second = trial.run(name)
                found += [f"{name}: {key} has other bits when repeated" for key in first if not same(first[key], second[key])]
        except Exception as error:  # whatever it is, the run goes on
            found.append(f"{name} raised {type(error).__name__}: {error}\n{traceback.format_exc()}")
            if lost(found[-1]):
                break
    return ran, found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else a.shape == b.shape


def check_refusal(seed: int, number: int, device: torch.device) -> list[str]:
    """A call with one thing wrong: it must be refused in words, not crash and not go through."""
    rng = random.Random(f"bad {seed}/{number}")
    layout = make([[[rng.randrange(1, 40)], [3]], []], 1).to(device)
    R, D = layout.num_rows, 64
    good = torch.zeros(R, 2, D, device=device)
    tensors, options = [good, good, good], {"level": "slice"}
    wrong = rng.choice(WRONG)
    at = rng.randrange(3)
    if wrong in ("level", "summary", "backend"):
        options[wrong] = "moon"
    elif wrong == "neighbours":
        options[wrong] = rng.choice((-1, 1.5, True))
    elif wrong == "layout":
        layout = rng.choice((None, [3, 5], make([[[R + 5]]], 0).to(device)))
    elif wrong == "ints":
        tensors = [t.int() for t in tensors]
    else:
        tensors[at] = {
            "rows": lambda: good[: rng.randrange(R)],
            "heads": lambda: good[:, :1],
            "dtype": lambda: good.half(),
            "stride": lambda: torch.zeros(R, D, 2, device=device).transpose(1, 2),
            "ndim": lambda: good.flatten(1),
        }[wrong]()
    try:
        attention(*tensors, layout, options.pop("level"), **options)
    except REFUSALS:
        return []
    except Exception as error:
        return [f"wrong {wrong} raised {type(error).__name__}: {error}"]
    return [f"wrong {wrong} went through"]


def lost(complaint: str) -> bool:
    """Whether it says that the GPU cannot be used any more in this process."""
    return "CUDA error" in complaint or "HIP error" in complaint


@contextlib.contextmanager
def poisoned(deterministic: bool):
    """Memory that torch hands out unwritten holds NaN, which torch does in its deterministic mode only."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def one(seed: int, number: int, device: torch.device, backends, most_rows: int) -> tuple[int, list[str], Case | None]:
    """Case ``number``: how many backends ran it, what was wrong, and the case itself (``None`` for a call to be refused)."""
    if number % 20 == 19:
        return 1, check_refusal(seed, number, device), None
    case = draw(seed, number, most_rows)
    try:
        with poisoned(case.deterministic):
            return *check(case, seed, number, device, backends), case
    except Exception as error:
        return 0, [f"raised {type(error).__name__}: {error}\n{traceback.format_exc()}"], case


def stress(args: argparse.Namespace) -> int:
    """Runs cases until the time or their number is up; returns how many failed."""
    device = torch.device(args.device)
    begin, number, ran, failed = time.monotonic(), args.first, 0, args.failed
    end = float("inf") if args.minutes is None else begin + 60 * args.minutes
    last = args.first + args.cases if args.cases is not None else float("inf")
    while number < last and time.monotonic() < end:
        count, found, case = one(args.seed, number, device, args.backends, args.most_rows)
        ran += count
        if found:
            failed += 1
            print(f"FAILED: case {number} of seed {args.seed}: {case or 'a call that must be refused'}")
            print("".join(f"  {line}\n" for text in found for line in text.splitlines()), end="")
            print(f"  again: python tools/stress.py --device {args.device} --most-rows {args.most_rows} --seed {args.seed} "
                  f"--case {number}", flush=True)  # fmt: skip
        number += 1
        if number % 100 == 0:
            print(f"{number} cases, {ran} runs of backends, {failed} failed, {time.monotonic() - begin:.0f} s", flush=True)
        if any(map(lost, found)):
            again(args, number, failed, end)
    print(f"{number - args.first} cases from {args.first} on, {ran} runs of backends, {failed} failed (seed {args.seed})")
    return failed


def again(args: argparse.Namespace, number: int, failed: int, end: float) -> None:
    """Goes on in a new process, since this one has lost its GPU."""
    print("the GPU cannot be used any more in this process: going on in a new one", flush=True)
    left = ["--minutes", str(max(0.0, (end - time.monotonic()) / 60))] if args.minutes is not None else []
    left += ["--cases", str(max(0, args.first + args.cases - number))] if args.cases is not None else []
    rest = ["--device", args.device, "--seed", str(args.seed), "--most-rows", str(args.most_rows), "--backends", *args.backends]
    os.execv(sys.executable, [sys.executable, __file__, *rest, *left, "--first", str(number), "--failed", str(failed)])


def main(argv: list[str] | None = None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, help="how long (default: 10, unless --cases says how many)")
    parser.add_argument("--cases", type=int, help="how many cases")
    parser.add_argument("--seed", type=int, help="default: from the clock")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS), metavar="NAME")
    parser.add_argument("--most-rows", type=int, help="tokens of a layout, usually (default: 450; 60 in Triton's interpreter)")
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--first", type=int, default=0, help="start with this case")
    parser.add_argument("--failed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = time.time_ns() // 10**6 % 10**6
    if args.most_rows is None:
        args.most_rows = 450 if args.device.startswith("cuda") else 60
    if args.case is not None:
        args.first, args.cases, args.minutes = args.case, 1, None
    elif args.minutes is None and args.cases is None:
        args.minutes = 10.0
    print(f"seed {args.seed}, {args.device}, torch {torch.__version__}, backends: {', '.join(args.backends)}", flush=True)
    return int(stress(args) > 0)


if __name__ == "__main__":
    sys.exit(main())
