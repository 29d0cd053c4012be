"""The roofline plot: which points it has and where they lie, and that the committed one is what the models say."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.report import COLUMNS, write
from benchmarks.roofline import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Axes, Point, Roofline

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def row(**changes):
    return dict.fromkeys(COLUMNS, "") | {
        "what": "attention", "part": "forward", "workload": "w", "level": "slice", "implementation": "hlip triton",
        "dtype": "bfloat16", "median_s": 2.0, "flops": 1e15, "bytes": 1e13, "matmul_flops": 8e14, "copy_bandwidth": 4e12,
        "device": "card & co", "torch": "2", "triton": "3", "commit": "c", "date": "d",
    } | changes  # fmt: skip


def groups(text):
    """Of every point: its level, its text, and (tag, class, centre y) of what is drawn."""
    found = []
    for group in ET.fromstring(text).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            drawn = []
            for shape in group:
                kind = shape.tag.removeprefix(SVG)
                if kind == "circle":
                    drawn.append((kind, shape.get("class"), float(shape.get("cy"))))
                elif kind == "rect":
                    drawn.append((kind, shape.get("class"), float(shape.get("y")) + 4))
            found.append((group.get("class"), title.text, drawn))
    return found


def test_the_committed_picture_is_what_the_models_say():
    committed = (ROOT / "docs" / "roofline.svg").read_text()
    again = "python -m benchmarks.roofline --predicted H200 --out docs/roofline.svg"
    assert committed == roofline.svg(roofline.predicted("H200")), again
    points = groups(committed)
    assert len(points) == 2 * 19 and "Predicted, not measured" in committed
    assert all(kind == "predicted" for _, _, drawn in points for _, kind, _ in drawn)
    assert sum("hlip cuda" in title for _, title, _ in points) == 4  # where auto takes them: many_short, dropout_50
    texts = [(float(t.get("x")), float(t.get("y"))) for t in ET.fromstring(committed).iter(f"{SVG}text") if t.get("x")]
    assert len(set(texts)) == len(texts)


def test_points_lie_where_their_figures_say():
    points = [
        Point("a", "scan", "forward", "hlip x", 50.0, measured=1e14),
        Point("b", "scan", "backward", "hlip x", 500.0, 2e14),
    ]
    picture = Roofline(points, 8e14, 4e12, "h", "s")
    axes = Axes(picture)
    (x1, y1), (x2, y2), (x3, y3) = axes.at(50, 1e14), axes.at(500, 2e14), axes.at(5000, 4e14)
    assert x3 - x2 == pytest.approx(x2 - x1) and y3 - y2 == pytest.approx(y2 - y1) and x2 > x1 and y2 < y1  # logarithmic, up
    for p in points:
        x, y = axes.at(p.intensity, p.measured)
        assert LEFT < x < WIDTH - RIGHT and TOP < y < BOTTOM
    (first, _, a), (second, _, b) = groups(roofline.svg(picture))
    assert (first, second) == ("scan", "scan")
    assert a == [("circle", "measured", pytest.approx(y1, abs=0.06))] and b == [
        ("rect", "measured", pytest.approx(y2, abs=0.06))
    ]
    roof = re.search(r'class="roof" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)H([\d.]+)"', roofline.svg(picture))
    x0, y0, ridge_x, ridge_y, end = map(float, roof.groups())
    assert (ridge_x, ridge_y) == pytest.approx(axes.at(200, 8e14), abs=0.06) and end == pytest.approx(WIDTH - RIGHT)
    intensity = 10 ** (axes.x[0] + (x0 - LEFT) / (WIDTH - RIGHT - LEFT) * (axes.x[1] - axes.x[0]))
    rate = 10 ** (axes.y[0] + (BOTTOM - y0) / (BOTTOM - TOP) * (axes.y[1] - axes.y[0]))
    assert math.log10(rate / intensity) == pytest.approx(math.log10(4e12), abs=0.01)


def test_measured_rows_the_fastest_of_ours_with_its_prediction(tmp_path):
    rows = [
        row(),
        row(implementation="hlip cuda", median_s=1.0, predicted_serial_s=4.0, predicted_overlapped_s=0.5),
        row(implementation="hlip triton fast", median_s=0.1),
        row(implementation="padded SDPA", median_s=0.2),
        row(what="segment_mean", implementation="hlip", median_s=0.1),
        row(part="backward", level="study", median_s=4.0, flops=4e15),
    ]
    write(rows, tmp_path / "rows.csv")
    assert roofline.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path / "made" / "r.svg")]) == 0
    text = (tmp_path / "made" / "r.svg").read_text()
    assert "Measured: attention on card &amp; co, bfloat16" in text and "800 TFLOP/s" in text and "4 TB/s" in text
    forward, backward = groups(text)
    assert forward[:2] == ("slice", "w, slice, forward: 1000 TFLOP/s, hlip cuda")
    assert [kind for _, kind, _ in forward[2]] == ["predicted", "predicted", "measured"]
    low, high, seen = (y for _, _, y in forward[2])
    assert high < seen < low  # upwards is faster
    assert backward[1] == "w, study, backward: 1000 TFLOP/s, hlip triton" and [k for _, k, _ in backward[2]] == ["measured"]


@pytest.mark.parametrize("rows", [[], [row(implementation="padded SDPA")], [row(), row(device="another")]])
def test_rows_it_cannot_draw(tmp_path, capsys, rows):
    write(rows, tmp_path / "rows.csv")
    assert roofline.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path / "r.svg")]) == 1
    assert "roofline: " in capsys.readouterr().err and not (tmp_path / "r.svg").exists()


def test_numbers_have_no_exponent():
    assert [roofline._number(x) for x in (0.0412, 1.234, 19.99, 98.6, 31508.2)] == ["0.0412", "1.23", "20", "99", "31508"]
