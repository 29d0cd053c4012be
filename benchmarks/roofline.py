"""One roofline of the attention workloads: arithmetic intensity against TFLOP/s, measured points filled, predicted ones hollow.

python -m benchmarks.roofline rows.csv --out roofline.svg                     # rows of benchmarks.report, with its ceilings
python -m benchmarks.roofline --predicted H200 --out docs/roofline.svg        # before anything is measured
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

LEVELS = {"slice": "#0b6bb5", "scan": "#c2500c", "study": "#0a8060"}  # and their colours
MARKERS = {"forward": "o", "backward": "s"}


@dataclass(frozen=True)
class Point:
    """One workload, level and pass, in FLOP/byte and FLOP/s; the model: ``low`` if nothing overlaps, ``high`` if all does."""

    workload: str
    level: str
    part: str
    implementation: str
    intensity: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Roofline:
    """Points under two ceilings, FLOP/s and bytes/s, with a heading and a line about where they come from."""

    points: list[Point]
    flops: float
    bandwidth: float
    heading: str
    source: str


def predicted(gpu: str) -> Roofline:
    """The performance models' points, bfloat16, for the kernels that ``auto`` ships with."""
    from benchmarks import workloads
    from hlip_kernels.backends import Query, auto
    from hlip_kernels.pattern import Plan
    from hlip_kernels.performance import RATES, predict
    from hlip_kernels.performance_short import predict_short

    rates, models = RATES[gpu], {"cuda": predict_short, "triton": predict}
    capability = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0)}[gpu]
    points = []
    for name in workloads.NAMES:
        w = workloads.make(name, full=True)
        for level in w.levels:
            query = Query("cuda", capability, torch.bfloat16, w.head_dim, Plan.of(w.layout.pattern(level)).longest)
            kernels = next(line.backend for line in auto.SHIPPED if line.applies(query) and line.backend in models)
            for part in ("forward", "backward"):
                kind = {"heads": w.heads, "head_dim": w.head_dim, "dtype": torch.bfloat16, "rates": rates}
                time = models[kernels](w.layout, level, backward=part == "backward", **kind)
                flops = w.attention_flops(level) * (2.5 if part == "backward" else 1)
                nbytes = w.attention_bytes(torch.bfloat16) * (2 if part == "backward" else 1)
                low, high = flops / time.serial, flops / time.overlapped
                points.append(Point(name, level, part, f"hlip {kernels}", flops / nbytes, low=low, high=high))
    return Roofline(
        points, rates.multiprocessors * rates.clock * rates.matrix[2], rates.bandwidth,
        f"Predicted, not measured: attention on an {gpu}, bfloat16",
        "Ceilings: the data sheet's. A line goes from nothing overlapped to everything overlapped; its marker is the middle.",
    )  # fmt: skip


def measured(rows: list[dict]) -> Roofline:
    """Points of measured rows: of each case the fastest of our deterministic implementations, and its prediction if it has one.

    Raises:
        ValueError: no row of the attention op is among them, or rows of several devices are.
    """
    ours = [
        row for row in rows
        if row["what"] == "attention" and row["implementation"].startswith("hlip ") and "fast" not in row["implementation"]
    ]  # fmt: skip
    if not ours:
        raise ValueError("no rows of attention with one of our implementations")
    devices = {row["device"] for row in ours}
    if len(devices) > 1:
        raise ValueError(f"rows of several devices, which have different ceilings: {', '.join(sorted(devices))}")
    best: dict[tuple, dict] = {}
    for row in ours:
        case = row["workload"], row["level"], row["part"]
        if case not in best or row["median_s"] < best[case]["median_s"]:
            best[case] = row
    points = []
    for case, row in best.items():
        low, high = (row["flops"] / row[k] if row.get(k) else None for k in ("predicted_serial_s", "predicted_overlapped_s"))
        points.append(
            Point(*case, row["implementation"], row["flops"] / row["bytes"], row["flops"] / row["median_s"], low, high)
        )
    row = ours[0]
    return Roofline(
        points, float(row["matmul_flops"]), float(row["copy_bandwidth"]),
        f"Measured: attention on {row['device']}, {row['dtype']}",
        "Ceilings measured in the same run; torch {torch}, triton {triton}, commit {commit}, {date}.".format(**row),
    )  # fmt: skip


def texts(roofline: Roofline) -> list[str]:
    """A line for every point, which the picture also carries in its description."""
    return [f"{p.workload}, {p.level}, {p.part}: {_rates(p)} TFLOP/s at {p.intensity:.3g} FLOP/byte, {p.implementation}"
            for p in roofline.points]  # fmt: skip


def draw(roofline: Roofline, path: Path) -> None:
    """Writes the picture, as what the ending of the path says. The figures stand in a table for each level under the plot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": "roofline", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(9, 6.4))
        figure.subplots_adjust(left=0.08, right=0.98, top=0.9, bottom=0.36)
        for p in roofline.points:
            colour, tflops = LEVELS[p.level], {"low": p.low, "high": p.high, "measured": p.measured}
            low, high, seen = (tflops[k] and tflops[k] / 1e12 for k in tflops)
            shape = {"marker": MARKERS[p.part], "markersize": 6, "color": colour}
            if low and high:
                axes.plot([p.intensity] * 2, [low, high], color=colour, alpha=0.45)
                hollow = [low, high] if seen else [(low * high) ** 0.5]
                axes.plot([p.intensity] * len(hollow), hollow, linestyle="", markerfacecolor="white", **shape)
            if seen:
                axes.plot(p.intensity, seen, linestyle="", **shape)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of device memory", ylabel="TFLOP/s")
        left, right = axes.get_xlim()
        ridge = roofline.flops / roofline.bandwidth
        slope = f"{roofline.bandwidth / 1e12:.3g} TB/s, {roofline.flops / 1e12:.3g} TFLOP/s"
        at = [min(left, ridge / 3), ridge, max(right, ridge * 3)]
        axes.plot(at, [min(x * roofline.bandwidth, roofline.flops) / 1e12 for x in at], color="black", label=slope)
        for part, marker in MARKERS.items():
            axes.plot([], [], linestyle="", marker=marker, color="grey", markerfacecolor="white", label=part)
        axes.legend(loc="lower right")
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_formatter("{x:g}")
        figure.suptitle(roofline.heading, x=0.08, ha="left", weight="bold")
        axes.set_title(roofline.source, loc="left", fontsize=8)
        for column, level in enumerate(LEVELS):
            text = _table([p for p in roofline.points if p.level == level])
            place = {"family": "monospace", "fontsize": 7, "va": "top"}
            figure.text(0.03 + 0.325 * column, 0.27, level, color=LEVELS[level], weight="bold")
            figure.text(0.03 + 0.325 * column, 0.255, text, **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        svg = path.suffix == ".svg"
        figure.savefig(path, metadata={"Date": None, "Description": "\n".join(texts(roofline))} if svg else None, dpi=150)
        plt.close(figure)


def _number(x: float) -> str:
    """Two digits or more, never an exponent."""
    return f"{x:.0f}" if x >= 20 else f"{x:.3g}"


def _rates(p: Point) -> str:
    if p.measured:
        return _number(p.measured / 1e12)
    return f"{_number(p.low / 1e12)} - {_number(p.high / 1e12)}"


def _table(points: list[Point]) -> str:
    """Workloads of a level by intensity: FLOP/byte of the forward pass, TFLOP/s of both passes."""
    lines = [f"{'':13} {'FLOP/B':>6} {'forward':>10} {'backward':>10}"]
    backward = {p.workload: _rates(p) for p in points if p.part == "backward"}
    for p in sorted((p for p in points if p.part == "forward"), key=lambda p: p.intensity):
        lines.append(f"{p.workload:13} {_number(p.intensity):>6} {_rates(p):>10} {backward.get(p.workload, '-'):>10}")
    return "\n".join(lines).replace(" ", "\u00a0")  # SVG runs plain spaces together


def main(argv: list[str] | None = None) -> int:
    from benchmarks.report import read
    from hlip_kernels.performance import RATES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path, nargs="*", help="rows of benchmarks.report (CSV, or pytest-benchmark JSON)")
    parser.add_argument("--predicted", choices=list(RATES), metavar="GPU", help="the models' points instead")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write, .svg or .png")
    args = parser.parse_args(argv)
    if bool(args.rows) == bool(args.predicted):
        parser.error("give rows or --predicted, one of them")
    try:
        roofline = predicted(args.predicted) if args.predicted else measured([row for path in args.rows for row in read(path)])
        draw(roofline, args.out)
    except ImportError:
        print("roofline: drawing needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
