"""From measurements to committed rows and Markdown tables.

pytest benchmarks/ --rows rows.csv                                         # each row as soon as it is measured
python -m benchmarks.report rows.csv --markdown table.md                   # show them
python -m benchmarks.report run.json --rows benchmarks/results/cpu.csv     # from pytest-benchmark's own JSON
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

COLUMNS = (
    "what", "part", "workload", "level", "implementation", "dtype", "median_s", "p10_s", "p90_s", "rounds", "flops", "bytes",
    "matmul_flops", "copy_bandwidth", "peak_bytes", "predicted_overlapped_s", "predicted_serial_s",
    "device", "torch", "triton", "python", "commit", "date",
)  # fmt: skip
_NUMBERS = (
    "median_s", "p10_s", "p90_s", "flops", "bytes", "matmul_flops", "copy_bandwidth", "peak_bytes", "predicted_overlapped_s",
    "predicted_serial_s",
)  # fmt: skip


def read(path: Path) -> list[dict]:
    """Rows from a pytest-benchmark JSON file or from a CSV of rows.

    Raises:
        ValueError: neither.
    """
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [_typed(row) for row in csv.DictReader(file)]
    data = json.loads(path.read_text())
    if "benchmarks" not in data:
        raise ValueError(f"{path}: not a pytest-benchmark JSON file")
    date = data["datetime"][:10]
    return [row for entry in data["benchmarks"] for row in rows_of(entry["extra_info"], date, entry["stats"]["data"])]


def rows_of(info: dict, date: str, seconds: Sequence[float] = ()) -> list[dict]:
    """The rows of one benchmark: its own and those of what was measured beside it.

    Args:
        info: what ``benchmarks.measure.run`` noted. seconds: of its calls, if it did not note them.
    """
    rows = []
    for implementation, times in {info["implementation"]: info.get("seconds") or seconds, **info.get("beside", {})}.items():
        times = sorted(times)
        row = {column: info.get(column, "") for column in COLUMNS}
        row |= {
            "implementation": implementation,
            "median_s": statistics.median(times), "p10_s": _quantile(times, 0.1), "p90_s": _quantile(times, 0.9),
            "rounds": len(times), "date": date,
        }  # fmt: skip
        rows.append(row)
    return rows


def _quantile(values: list[float], q: float) -> float:
    return values[min(len(values) - 1, int(q * len(values)))]


def _typed(row: dict) -> dict:
    return {k: (float(v) if k in _NUMBERS and v != "" else v) for k, v in row.items()}


def write(rows: list[dict], path: Path, append: bool = False) -> None:
    """Rows as CSV, numbers with four digits; ``append``: to what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def markdown(rows: list[dict]) -> str:
    """One table per kind of measurement: every implementation in its own row, times relative to the fastest peer."""
    lines = []
    for device in _unique(row["device"] for row in rows):
        chosen = [row for row in rows if row["device"] == device]
        first = chosen[0]
        lines += [
            f"Measured on: {device}; torch {first['torch']}, triton {first['triton']}, Python {first['python']}, "
            f"{first['dtype']}, commit {first['commit']}, {first['date']}.",
            f"Ceilings measured in the same run: {float(first['matmul_flops']) / 1e12:.3g} TFLOP/s matrix product, "
            f"{float(first['copy_bandwidth']) / 1e9:.3g} GB/s copy.",
            "",
        ]
        for what, part in _unique((row["what"], row["part"]) for row in chosen):
            group = [row for row in chosen if (row["what"], row["part"]) == (what, part)]
            lines += [f"**{what}, {part}**", "", *_table(group), ""]
    return "\n".join(lines)


def _table(rows: list[dict]) -> list[str]:
    with_floor = any(row["bytes"] for row in rows)
    head = ["workload", "level", "implementation", "median", "10-90 %"]
    head += ["TFLOP/s", "GB/s", "share of floor"] if with_floor else []
    with_prediction = any(row.get("predicted_serial_s") for row in rows)
    head += ["predicted"] if with_prediction else []
    head += ["vs fastest peer"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in _unique((row["workload"], row["level"]) for row in rows):
        group = [row for row in rows if (row["workload"], row["level"]) == case]
        peers = [row["median_s"] for row in group if not row["implementation"].startswith("hlip")]
        for row in sorted(group, key=lambda r: r["median_s"]):
            seconds = row["median_s"]
            name = row["implementation"]
            cells = [*case, f"**{name}**" if name.startswith("hlip") else name, _time(seconds)]
            cells += [f"{_time(row['p10_s'])} - {_time(row['p90_s'])}"]
            if with_floor:
                floor = max(row["flops"] / row["matmul_flops"], row["bytes"] / row["copy_bandwidth"])
                cells += [
                    f"{row['flops'] / seconds / 1e12:.3g}",
                    f"{row['bytes'] / seconds / 1e9:.3g}",
                    f"{100 * floor / seconds:.0f}%",
                ]
            if with_prediction:
                low, high = row.get("predicted_overlapped_s"), row.get("predicted_serial_s")
                cells += [f"{_time(low)} to {_time(high)}" if high else ""]
            cells += [f"{min(peers) / seconds:.2f}x" if peers else "-"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _unique(values) -> list:
    return list(dict.fromkeys(values))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, nargs="+", help="pytest-benchmark JSON files, or CSV files of rows")
    parser.add_argument("--rows", type=Path, help="write the rows here, as CSV")
    parser.add_argument("--markdown", type=Path, help="write the tables here instead of printing them")
    args = parser.parse_args(argv)
    rows = [row for path in args.source for row in read(path)]
    if args.rows:
        write(rows, args.rows)
    text = markdown(rows)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    elif not args.rows:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
