"""One roofline of the attention workloads: arithmetic intensity against TFLOP/s, measured points filled, predicted ones hollow.

python -m benchmarks.roofline rows.csv --out roofline.svg                     # rows of benchmarks.report, with its ceilings
python -m benchmarks.roofline --predicted H200 --out docs/roofline.svg        # before anything is measured
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

LEVELS = ("slice", "scan", "study")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 900, 64, 20, 58, 388  # of the picture, and of the plot in it
LINE = 17  # between two lines of the lists under the plot
# Colours on a light and on a dark page, and what takes them (no CSS variables: not every viewer knows them).
_LIGHT = {
    "slice": "#0b6bb5",
    "scan": "#c2500c",
    "study": "#0a8060",
    "key": "#666",
    "back": "#fff",
    "text": "#333",
    "grid": "#ddd",
}
_DARK = {
    "slice": "#5db3f0",
    "scan": "#f0924e",
    "study": "#3fc49b",
    "key": "#aaa",
    "back": "#16191d",
    "text": "#ddd",
    "grid": "#333",
}


def _colours(of: dict[str, str]) -> str:
    rules = [
        f".back, .predicted {{ fill: {of['back']}; }} text {{ fill: {of['text']}; }} .grid {{ stroke: {of['grid']}; }}",
        f".roof {{ stroke: {of['text']}; }}",
    ]
    for group in (*LEVELS, "key"):
        rules.append(f".{group} .predicted, .{group} .range, .{group} .measured {{ stroke: {of[group]}; }}")
        rules.append(f".{group} .measured, .{group} .name {{ fill: {of[group]}; }}")
    return "\n    ".join(rules)


STYLE = f"""
    text {{ font: 12px sans-serif; }} .title {{ font-size: 15px; font-weight: bold; }} .small {{ font-size: 11px; }}
    .axis {{ stroke: #888; fill: none; }} .roof {{ stroke-width: 2; fill: none; }} .name {{ font-weight: bold; }}
    .range {{ stroke-opacity: 0.45; stroke-width: 2; }} .predicted, .measured {{ stroke-width: 1.5; }}
    {_colours(_LIGHT)}
    @media (prefers-color-scheme: dark) {{
    {_colours(_DARK)}
    }}"""


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


class Axes:
    """Where a point lies in the picture; both axes are logarithmic and as long as the points need."""

    def __init__(self, roofline: Roofline):
        rates = [roofline.flops] + [r for p in roofline.points for r in (p.measured, p.low, p.high) if r]
        intensities = [p.intensity for p in roofline.points] + [roofline.flops / roofline.bandwidth / 3]
        self.x = math.log10(min(intensities) / 1.6), math.log10(max(intensities) * 1.6)
        self.y = math.log10(min(rates) / 1.6), math.log10(max(rates) * 1.5)

    def at(self, intensity: float, rate: float) -> tuple[float, float]:
        across = (math.log10(intensity) - self.x[0]) / (self.x[1] - self.x[0])
        up = (math.log10(rate) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)


def svg(roofline: Roofline) -> str:
    """The picture. Labels stand in a list for each level under the plot, in the order of the points from left to right."""
    axes = Axes(roofline)
    lists, height = _lists(roofline.points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"  <style>{STYLE}\n  </style>",
        f'  <rect class="back" width="{WIDTH}" height="{height}"/>',
        f'  <text class="title" x="{LEFT}" y="22">{escape(roofline.heading)}</text>',
        f'  <text class="small" x="{LEFT}" y="42">{escape(roofline.source)}</text>',
        *_grid(axes),
        *_roof(axes, roofline),
        *(line for point in roofline.points for line in _marker(axes, point)),
        *lists,
        *_key(roofline, height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _grid(axes: Axes) -> list[str]:
    lines = []
    for exponent in range(math.floor(axes.x[0]), math.ceil(axes.x[1]) + 1):
        if axes.x[0] <= exponent <= axes.x[1]:
            x, _ = axes.at(10**exponent, 10 ** axes.y[0])
            lines.append(f'  <path class="grid" d="M{x:.1f} {TOP}V{BOTTOM}"/>')
            lines.append(f'  <text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{10**exponent:g}</text>')
    for exponent in range(math.floor(axes.y[0]), math.ceil(axes.y[1]) + 1):
        for digit in (1, 2, 5):
            rate = digit * 10.0**exponent
            if axes.y[0] <= math.log10(rate) <= axes.y[1]:
                _, y = axes.at(10 ** axes.x[0], rate)
                lines.append(f'  <path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
                lines.append(f'  <text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{rate / 1e12:g}</text>')
    across, middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + BOTTOM) / 2
    return [
        *lines,
        f'  <path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{WIDTH - RIGHT}"/>',
        f'  <text x="{across:.0f}" y="{BOTTOM + 36}" text-anchor="middle">FLOP per byte of device memory</text>',
        f'  <text transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">TFLOP/s</text>',
    ]


def _roof(axes: Axes, roofline: Roofline) -> list[str]:
    ridge = roofline.flops / roofline.bandwidth
    left = max(10 ** axes.x[0], 10 ** axes.y[0] / roofline.bandwidth)  # where the slope enters the plot
    (x0, y0), (x1, y1), (x2, _) = (
        axes.at(left, roofline.bandwidth * left), axes.at(ridge, roofline.flops), axes.at(10 ** axes.x[1], roofline.flops)
    )  # fmt: skip
    middle, angle = ((x0 + x1) / 2, (y0 + y1) / 2), math.degrees(math.atan2(y1 - y0, x1 - x0))
    return [
        f'  <path class="roof" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}H{x2:.1f}"/>',
        f'  <text transform="translate({middle[0]:.1f} {middle[1]:.1f}) rotate({angle:.1f})" text-anchor="middle" dy="-9">'
        f"{roofline.bandwidth / 1e12:.3g} TB/s</text>",
        f'  <text x="{x1 + 4:.1f}" y="{y1 - 7:.1f}">{roofline.flops / 1e12:.3g} TFLOP/s</text>',
    ]


def _shape(part: str, kind: str, x: float, y: float) -> str:
    if part == "forward":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    return f'<rect class="{kind}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'


def _marker(axes: Axes, p: Point) -> list[str]:
    """A point, with a text that shows under the mouse."""
    inside = []
    if p.low and p.high:
        (x, low), (_, high) = axes.at(p.intensity, p.low), axes.at(p.intensity, p.high)
        inside.append(f'<path class="range" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        if not p.measured:
            inside.append(_shape(p.part, "predicted", x, (low + high) / 2))
        else:
            inside += [_shape(p.part, "predicted", x, y) for y in (low, high)]
    if p.measured:
        inside.append(_shape(p.part, "measured", *axes.at(p.intensity, p.measured)))
    title = f"{p.workload}, {p.level}, {p.part}: {_rates(p)} TFLOP/s, {p.implementation}"
    return [f'  <g class="{escape(p.level)}"><title>{escape(title)}</title>{"".join(inside)}</g>']


def _number(x: float) -> str:
    """Two digits or more, never an exponent."""
    return f"{x:.0f}" if x >= 20 else f"{x:.3g}"


def _rates(p: Point) -> str:
    if p.measured:
        return _number(p.measured / 1e12)
    low, high = _number(p.low / 1e12), _number(p.high / 1e12)
    return low if low == high else f"{low} - {high}"


def _lists(points: list[Point]) -> tuple[list[str], int]:
    """For every level its workloads, from left to right in the plot; and the height of the picture with the longest list."""
    lines, longest = [], 0
    levels = [level for level in LEVELS if any(p.level == level for p in points)]
    step = (WIDTH - LEFT - RIGHT) / max(1, len(levels))
    top = BOTTOM + 66
    for column, level in enumerate(levels):
        x = LEFT + column * step
        lines.append(f'  <g class="{level}"><text class="name" x="{x:.0f}" y="{top}">{level}</text></g>')
        forward = sorted((p for p in points if p.level == level and p.part == "forward"), key=lambda p: p.intensity)
        table = [("", "FLOP/byte", "forward", "backward")]
        for p in forward:
            other = next((o for o in points if (o.workload, o.level, o.part) == (p.workload, level, "backward")), None)
            table.append((p.workload, _number(p.intensity), _rates(p), _rates(other) if other else "-"))
        for n, (name, *cells) in enumerate(table):
            y = top + n * LINE
            if name:
                lines.append(f'  <text class="small" x="{x:.0f}" y="{y}">{escape(name)}</text>')
            for at, cell in zip((128, 192, 258), cells, strict=True):
                lines.append(f'  <text class="small" x="{x + at:.0f}" y="{y}" text-anchor="end">{escape(cell)}</text>')
        longest = max(longest, len(forward))
    return lines, top + longest * LINE + 44


def _key(roofline: Roofline, height: int) -> list[str]:
    x, y = LEFT, height - 16
    lines = [
        f'  <g class="key">{_shape("forward", "predicted", x + 5, y - 4)}{_shape("backward", "predicted", x + 77, y - 4)}</g>'
    ]
    lines.append(f'  <text class="small" x="{x + 15}" y="{y}">forward</text>')
    hollow = "hollow: predicted; filled: measured" if any(p.measured for p in roofline.points) else "hollow: predicted"
    lines.append(f'  <text class="small" x="{x + 87}" y="{y}">backward ({hollow})</text>')
    lines.append(
        f'  <text class="small" x="{WIDTH - RIGHT}" y="{y}" text-anchor="end">'
        "tables: FLOP/byte of the forward pass; forward and backward in TFLOP/s</text>"
    )
    return lines


def main(argv: list[str] | None = None) -> int:
    from benchmarks.report import read
    from hlip_kernels.performance import RATES

    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path, nargs="*", help="rows of benchmarks.report (CSV, or pytest-benchmark JSON)")
    parser.add_argument("--predicted", choices=list(RATES), metavar="GPU", help="the models' points instead")
    parser.add_argument("--out", type=Path, required=True, help="the SVG file to write")
    args = parser.parse_args(argv)
    if bool(args.rows) == bool(args.predicted):
        parser.error("give rows or --predicted, one of them")
    try:
        roofline = predicted(args.predicted) if args.predicted else measured([row for path in args.rows for row in read(path)])
    except (OSError, ValueError) as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg(roofline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
