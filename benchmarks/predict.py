"""The performance model's times for every workload, before anything is measured.

python -m benchmarks.predict [--gpu H200]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from benchmarks import workloads
from hlip_kernels.backends.cuda import max_rows
from hlip_kernels.backends.hopper.config import HEAD_DIMS
from hlip_kernels.backends.triton.config import FUSED_FROM
from hlip_kernels.pattern import Plan
from hlip_kernels.performance import RATES, predict
from hlip_kernels.performance_hopper import predict_hopper
from hlip_kernels.performance_short import predict_short


def table(gpu: str) -> str:
    """Markdown: both bounds of the models for every kernel that can run the workload, bf16, and what binds."""
    lines = [
        f"Predicted, not measured: {gpu}, bfloat16.",
        "",
        "| workload | level | pass | kernels | overlapped | serial | TFLOP/s | binds | useful | balance |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rates = RATES[gpu]
    capability = (8, 0) if rates.family == "ampere" else (9, 0)
    for name in workloads.NAMES:
        w = workloads.make(name, full=True)
        for level in w.levels:
            models = {"Triton": predict}
            longest = Plan.of(w.layout.pattern(level)).longest
            if longest <= max_rows(w.head_dim, capability):
                models["CUDA"] = predict_short
            if longest >= FUSED_FROM:
                models["Triton, fast"] = partial(predict, deterministic=False)
            if rates.family == "hopper" and w.head_dim in HEAD_DIMS:
                models["Hopper"] = predict_hopper
            for backward in (False, True):
                for kernels, model in models.items():
                    if kernels == "Triton, fast" and not backward:  # the same
                        continue
                    p = model(
                        w.layout,
                        level,
                        heads=w.heads,
                        head_dim=w.head_dim,
                        dtype=torch.bfloat16,
                        rates=rates,
                        backward=backward,
                    )
                    flops = w.attention_flops(level) * (2.5 if backward else 1) / 1e12
                    part = "backward" if backward else "forward"
                    lines.append(
                        f"| {name} | {level} | {part} | {kernels} | {p.overlapped * 1e3:.3g} ms | "
                        f"{p.serial * 1e3:.3g} ms | {flops / p.serial:.0f} to {flops / p.overlapped:.0f} | {p.binds} | "
                        f"{100 * p.useful:.0f}% | {100 * p.balance:.0f}% |"
                    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.split("\n\n")[0])
    parser.add_argument("--gpu", choices=list(RATES), default="H200")
    print(table(parser.parse_args(argv).gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
