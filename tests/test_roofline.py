"""The roofline plot: which points it has, and that the committed one is what the models say."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import roofline
from benchmarks.report import COLUMNS, write
from benchmarks.roofline import Point, Roofline

ROOT = Path(__file__).parents[1]
DESCRIPTION = ".//{http://purl.org/dc/elements/1.1/}description"


def row(**changes):
    return dict.fromkeys(COLUMNS, "") | {
        "what": "attention", "part": "forward", "workload": "w", "level": "slice", "implementation": "hlip triton",
        "dtype": "bfloat16", "median_s": 2.0, "flops": 1e15, "bytes": 1e13, "matmul_flops": 8e14, "copy_bandwidth": 4e12,
        "device": "card & co", "torch": "2", "triton": "3", "commit": "c", "date": "d",
    } | changes  # fmt: skip


def said(path):
    """The lines of a picture's description."""
    return ET.parse(path).find(DESCRIPTION).text.splitlines()


def test_the_committed_picture_is_what_the_models_say():
    again = "python -m benchmarks.roofline --predicted H200 --out docs/roofline.svg"
    points = said(ROOT / "docs" / "roofline.svg")
    assert points == roofline.texts(roofline.predicted("H200")), again
    assert len(points) == 2 * 19 and "Predicted, not measured" in (ROOT / "docs" / "roofline.svg").read_text()
    assert sum("hlip cuda" in point for point in points) == 4  # where auto takes them: many_short, dropout_50


def test_every_point_is_drawn_where_its_figures_say(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    points = [
        Point("a", "scan", "forward", "hlip x", 50.0, measured=1e14),
        Point("b", "scan", "backward", "hlip x", 500.0, low=1e14, high=4e14),
        Point("c", "study", "forward", "hlip x", 600.0, measured=2e14, low=1e14, high=4e14),
    ]
    roofline.draw(Roofline(points, 8e14, 4e12, "h", "s"), tmp_path / "r.svg")
    (axes,) = kept[0].axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    drawn = [(line.get_marker(), line.get_xydata().tolist()) for line in axes.lines]
    assert ("o", [[50.0, 100.0]]) in drawn and ("s", [[500.0, pytest.approx(200.0)]]) in drawn
    assert ("None", [[500.0, 100.0], [500.0, 400.0]]) in drawn
    assert ("o", [[600.0, 200.0]]) in drawn and ("o", [[600.0, 100.0], [600.0, 400.0]]) in drawn
    (roof,) = (line.get_xydata() for line in axes.lines if line.get_label() == "4 TB/s, 800 TFLOP/s")
    assert roof[1].tolist() == [200.0, 800.0] and roof[0, 1] == pytest.approx(4 * roof[0, 0]) and roof[2, 1] == 800


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
    assert said(tmp_path / "made" / "r.svg") == [
        "w, slice, forward: 1000 TFLOP/s at 100 FLOP/byte, hlip cuda",
        "w, study, backward: 1000 TFLOP/s at 400 FLOP/byte, hlip triton",
    ]
    text = (tmp_path / "made" / "r.svg").read_text()
    assert "Measured: attention on card &amp; co, bfloat16" in text and "4 TB/s, 800 TFLOP/s" in text
    first = roofline.measured(roofline_rows(rows)).points[0]
    assert (first.low, first.high) == (2.5e14, 2e15)


def roofline_rows(rows):
    """Rows as read from a file: what is empty is absent."""
    return [{key: value for key, value in row.items() if value != ""} for row in rows]


@pytest.mark.parametrize("rows", [[], [row(implementation="padded SDPA")], [row(), row(device="another")]])
def test_rows_it_cannot_draw(tmp_path, capsys, rows):
    write(rows, tmp_path / "rows.csv")
    assert roofline.main([str(tmp_path / "rows.csv"), "--out", str(tmp_path / "r.svg")]) == 1
    assert "roofline: " in capsys.readouterr().err and not (tmp_path / "r.svg").exists()


def test_numbers_have_no_exponent():
    assert [roofline._number(x) for x in (0.0412, 1.234, 19.99, 98.6, 31508.2)] == ["0.0412", "1.23", "20", "99", "31508"]
