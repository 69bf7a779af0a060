import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

from knockon.evaluate import report, tables
from knockon.evaluate.suites import METRICS
from knockon.types import UserError

HOSTILE = "<b onclick='x()'>$\\alpha$ & \"co\""


@pytest.fixture
def comparison(tmp_path):
    draw = np.random.default_rng(0)
    rows = [
        (model, condition, metric.name, draw.random() * level)
        for model, level in (("no_effect", 1.0), ("additive", 0.6), (HOSTILE, 0.5), ("ceiling", 0.2))
        for condition in ("A+B", "<script>alert(1)</script>")
        for metric in METRICS
    ]
    frame = pd.DataFrame(rows, columns=["model", "condition", "metric", "value"])
    tables.write(frame, tmp_path)
    return tmp_path


def test_the_report_is_one_file_that_needs_no_network(comparison):
    report.write(comparison, comparison / "report.html")
    page = (comparison / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    for outside in ("<link", "<script", "src=", "@import", "url(http"):
        assert outside not in page
    for metric in METRICS:
        assert metric.name in page


def test_names_are_escaped_in_tables_and_in_the_picture(comparison):
    report.write(comparison, comparison / "report.html")
    page = (comparison / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<b onclick" not in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    assert "\\alpha" in "".join(ET.fromstring(svg).itertext())


def test_the_picture_follows_the_colors_of_the_page(comparison):
    report.write(comparison, comparison / "report.html")
    page = (comparison / "report.html").read_text()
    assert "fill: var(--ink)" in page
    assert "#010203" not in page


def test_equal_comparisons_give_equal_reports(comparison):
    for name in ("one.html", "two.html"):
        report.write(comparison, comparison / name)
    assert (comparison / "one.html").read_bytes() == (comparison / "two.html").read_bytes()


def test_the_picture_is_written_in_the_format_of_its_name(comparison):
    report.picture(comparison, comparison / "scores.png")
    assert (comparison / "scores.png").read_bytes()[:4] == b"\x89PNG"


def test_missing_anchors_intervals_and_metrics_are_drawn_around(tmp_path):
    frame = pd.DataFrame(
        [("mine", "A", "mse", 1.0), ("other", "A", "mse", 2.0), ("other", "A", "mae", 2.0)],
        columns=["model", "condition", "metric", "value"],
    )
    tables.write(frame, tmp_path)
    report.write(tmp_path, tmp_path / "report.html")
    assert "other" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("damage", ["missing", "columns", "empty"])
def test_a_folder_without_a_comparison_is_refused_and_nothing_is_written(comparison, damage):
    path = comparison / "summary.csv"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else "model,metric\nx,mse\n")
    with pytest.raises(UserError, match=r"summary\.csv"):
        report.write(comparison, comparison / "report.html")
    assert not (comparison / "report.html").exists()
