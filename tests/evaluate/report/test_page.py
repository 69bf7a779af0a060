import base64
import html
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from anndata import AnnData

from knockon.cli import Compare
from knockon.compare import Comparison
from knockon.evaluate import tables
from knockon.evaluate.report.findings import Findings
from knockon.evaluate.report.page import number, picture, write
from knockon.evaluate.report.payload import encode
from knockon.evaluate.suites import ALL, METRICS
from knockon.types import UserError

HOSTILE = "<b onclick='x()'>$\\alpha$ & \"co\""
CLOSING = "</script><script>alert(1)</script>"


def text_of(folder):
    write(folder, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def without_library(page):
    """The page without plotly, which is somebody else's text."""
    return re.sub(r'<script id="plotly".*?</script>', "", page, flags=re.DOTALL)


@pytest.fixture
def comparison(make, tmp_path):
    models = {"no_effect": 1.0, "additive": 0.6, HOSTILE: 0.5, "ceiling": 0.2}
    tables.write(make.scored(models, ["A+B", CLOSING], [metric.name for metric in METRICS]), tmp_path)
    return tmp_path


# ---- the page ----------------------------------------------------------------------------------------


def test_the_report_is_one_file_that_needs_no_network(comparison):
    page = without_library(text_of(comparison))
    assert "prefers-color-scheme: dark" in page
    for outside in ("src=", "@import", "url(http", "http:", "https:"):
        assert outside not in page
    assert re.findall(r"<link[^>]*>", page) == ['<link rel="icon" href="data:,">']
    for metric in METRICS:
        assert metric.name in page


def test_names_cannot_break_out_of_the_page(comparison):
    page = text_of(comparison)
    assert "<b onclick" not in page
    assert CLOSING not in page
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(page)
    assert tags.count("script") == 3  # data, library, code


def test_equal_folders_give_equal_reports(comparison):
    for name in ("one.html", "two.html"):
        write(comparison, comparison / name)
    assert (comparison / "one.html").read_bytes() == (comparison / "two.html").read_bytes()


def test_missing_anchors_intervals_and_metrics_are_shown_around(tmp_path):
    frame = pd.DataFrame(
        [("mine", "A", "mse", 1.0), ("other", "A", "mse", 2.0), ("other", "A", "mae", 2.0)],
        columns=["model", "condition", "metric", "value"],
    )
    tables.write(frame, tmp_path)
    assert "There is no simple baseline" in text_of(tmp_path)


def test_values_of_all_conditions_at_once_are_no_condition(make, tmp_path):
    tables.write(make.scored({"no_effect": 1.0, "mine": 0.5}, ["A", ALL], ["mse"]), tmp_path)
    assert Findings.read(tmp_path).conditions == ["A"]
    assert "1 held-out condition." in text_of(tmp_path)


def test_a_metric_that_is_not_ours_is_shown_without_a_rank(comparison):
    for name in ("scores", "summary", "paired"):
        path = comparison / f"{name}.csv"
        path.write_text(path.read_text().replace("mse,", "theirs,"))
    found = Findings.read(comparison)
    assert "theirs" in found.metrics
    assert "theirs" not in found.baselines
    assert "theirs" in text_of(comparison)


@pytest.mark.parametrize("damage", ["missing", "columns", "empty"])
def test_a_folder_without_a_comparison_is_refused_and_nothing_is_written(comparison, damage):
    path = comparison / "summary.csv"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else "model,metric\nx,mse\n")
    with pytest.raises(UserError, match=r"summary\.csv"):
        write(comparison, comparison / "report.html")
    assert not (comparison / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("paired.csv", "model,metric\n"),
        ("flags.csv", "a,b\n1,2\n"),
        ("about.json", "{"),
        ("runs/x/run.json", "no json"),
        ("portraits/truth.npz", "no archive"),
    ],
)
def test_a_damaged_file_is_named(comparison, name, text):
    path = comparison / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.raises(UserError, match=name.rpartition("/")[2].replace(".", r"\.")):
        write(comparison, comparison / "report.html")


def test_what_else_lies_in_the_folder_is_shown(comparison):
    files = {
        "flags.csv": "model,flag,condition,value,limit,message\nmine,collapse,,.9,.5,All & alike\n"
        "mean_shift,collapse,,.9,.5,as it is made\n",
        "strata.csv": "model,metric,by,stratum,conditions,mean\nadditive,mse,seen,partly unseen,3,.25\n",
        "about.json": json.dumps(
            {"screen": {"cells": 1234, "covariates": {}}, "split": {"kind": "unseen"}, "notes": ["noted"]}
        ),
        "runs/additive/run.json": json.dumps({"config": {"width": 64}}),
    }
    for name, text in files.items():
        (comparison / name).parent.mkdir(parents=True, exist_ok=True)
        (comparison / name).write_text(text)
    page = text_of(comparison)
    for shown in ("All &amp; alike", "partly unseen", "1,234", "unseen", "noted", "width"):
        assert shown in page
    assert "1 flag raised" in page  # which counts no baseline


@pytest.mark.parametrize(
    ("notes", "shown"),
    [
        (["alone & <b>"], {"screen": ["alone & <b>"]}),
        (
            {"screen": ["one"], HOSTILE: ["two", "three"], "calm": []},
            {"screen": ["one"], HOSTILE: ["two", "three"]},
        ),
        ({"mine": "a sentence"}, {"mine": ["a sentence"]}),
        ([], {}),
        (None, {}),
    ],
)
def test_notes_are_shown_beside_the_flags_by_model(comparison, notes, shown):
    (comparison / "about.json").write_text(json.dumps({"notes": notes}))
    page = text_of(comparison)
    flags = page[page.index('<section id="flags">') : page.index('<section id="metrics">')]
    found = re.findall(r"<dt>(?:<span[^>]*></span>)?(.*?)</dt>((?:<dd>.*?</dd>)+)", flags)
    read = {html.unescape(n): re.findall("<dd>(.*?)</dd>", html.unescape(text)) for n, text in found}
    assert read == shown
    assert "<b>" not in flags


def test_a_path_as_long_as_a_digest_is_shown_whole(comparison):
    path = "/" + 58 * "x" + ".h5ad"
    (comparison / "about.json").write_text(json.dumps({"screen": {"file": path, "digest": 64 * "a"}}))
    page = text_of(comparison)
    assert f">{path}<" in page.replace("\n", "")
    assert f">{12 * 'a'}…<" in page


@pytest.fixture
def compared(comparison):
    """With two runs and their predictions."""
    for name, steps in (("additive", 0), ("scdfm-small", 7)):
        record = {
            "source": "a b.h5ad",
            "columns": {"layer": "counts", "control": None, "unlabelled": False},
            "preparation": {"total": 5000.0, "genes": None},
            "train": {"steps": steps, "seed": 3},
        }
        run(comparison, name, record)
        prediction(comparison, name)
    run(comparison, "scdfm-small/earlier", {"train": {"steps": 99, "seed": 3}})
    (comparison / "about.json").write_text(json.dumps({"suites": ["core", "generation"]}))
    return comparison


def run(folder, name, record):
    (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
    (folder / "runs" / name / "run.json").write_text(json.dumps(record))


def prediction(folder, name, **marks):
    adata = AnnData(np.zeros((1, 1), np.float32), uns={"knockon": {"cells": 16, "fallback": "", **marks}})
    (folder / "predictions").mkdir(exist_ok=True)
    adata.write_h5ad(folder / "predictions" / f"{name}.h5ad")


def command(folder):
    text = text_of(folder)
    return re.findall("<pre[^>]*>(knockon.*?)</pre>", html.unescape(without_library(text)))


def test_the_command_makes_the_same_again(compared):
    (text,) = command(compared)
    words = shlex.split(text)
    again = tyro.cli(Compare, args=words[2:])
    assert again.comparison == Comparison(
        models=("additive", "scdfm:small"), cells=16, steps=7, seed=3, suite=("core", "generation")
    )
    assert again.data == Path("a b.h5ad")
    assert again.split == (str(compared / "runs" / "additive" / "split.json"),)
    assert again.options.total == 5000
    assert again.columns.layer == "counts"


def test_models_with_steps_of_their_own_keep_them(compared):
    run(compared, "scdfm", {"train": {"steps": 8, "seed": 3}})
    prediction(compared, "scdfm")
    assert "--steps" not in command(compared)[0]


@pytest.mark.parametrize("lost", ["prediction", "cells", "fallback", "vectors", "genes"])
def test_a_command_that_would_not_do_the_same_is_not_shown(compared, lost):
    if lost == "prediction":
        (compared / "predictions" / "additive.h5ad").unlink()
    elif lost in ("cells", "fallback"):
        prediction(compared, "additive", **{lost: {"cells": 17, "fallback": "digest"}[lost]})
    else:
        run(
            compared,
            "additive",
            {"vectors": "digest"} if lost == "vectors" else {"preparation": {"genes": ["G"]}},
        )
    assert command(compared) == []


def test_nobody_looked_for_flags_is_not_no_flags(comparison):
    assert "not looked for" in text_of(comparison)
    (comparison / "flags.csv").write_text("model,flag,condition,value,limit,message\n")
    assert "No flags raised" in text_of(comparison)


def test_the_picture_is_written_in_the_format_of_its_name(make, tmp_path):
    tables.write(make.scored({"no_effect": 1.0, HOSTILE: 0.5, "ceiling": 0.2}, ["A"], ["mse"]), tmp_path)
    picture(tmp_path, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"


# ---- in words ----------------------------------------------------------------------------------------


def headline(folder, means):
    rows = [
        (model, condition, metric, value + shift)
        for model, values in means.items()
        for metric, value in values.items()
        for condition, shift in (("A", -0.01), ("B", 0.01))
    ]
    tables.write(pd.DataFrame(rows, columns=["model", "condition", "metric", "value"]), folder)
    return Findings.read(folder).answer()


def test_the_headline_says_who_leads_and_how_far_to_the_ceiling(tmp_path):
    means = {
        "no_effect": {"mse": 1.0, "pearson_delta": 0.0},
        "additive": {"mse": 0.6, "pearson_delta": 0.5},
        "mine": {"mse": 0.4, "pearson_delta": 0.7},
        "ceiling": {"mse": 0.2, "pearson_delta": 0.9},
    }
    text = headline(tmp_path, means)
    assert text.startswith("mine ranks first: it beats the best simple baseline in 2 of 2 metrics")
    assert "50%" in text


def test_the_headline_does_not_praise_a_model_behind_the_baselines(tmp_path):
    means = {
        "no_effect": {"mse": 1.0, "pearson_delta": 0.0},
        "additive": {"mse": 0.3, "pearson_delta": 0.8},
        "mine": {"mse": 0.4, "pearson_delta": 0.7},
        "ceiling": {"mse": 0.2, "pearson_delta": 0.9},
    }
    text = headline(tmp_path, means)
    assert "additive ranks first" in text
    assert "0 of 2 metrics" in text
    assert "%" not in text


def test_baselines_alone_are_called_so(tmp_path):
    text = headline(tmp_path, {"no_effect": {"mse": 1.0}, "additive": {"mse": 0.5}})
    assert text == "Only simple baselines were compared; additive ranks first."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.46, "0.460"), (123.4, "123"), (-0.0, "0"), (1234.5, "1,234"), (-1.5e-5, "−1.5e−05")),
        *((7, "7"), (np.nan, ""), (None, "")),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


# ---- its size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[[1.5, np.nan], [-2.0, 0.0]], [[], []], [3e-9]])
def test_arrays_are_packed_within_half_a_step(values):
    array = np.array(values, dtype=float)
    packed = encode(array)
    found = np.frombuffer(base64.b64decode(packed["data"]), "<i2").reshape(packed["shape"])
    there = ~np.isnan(array)
    np.testing.assert_array_equal(found == -32768, ~there)
    np.testing.assert_allclose(found[there] * packed["step"], array[there], atol=0.51 * packed["step"])


@pytest.mark.slow
def test_a_hundred_conditions_of_five_thousand_genes_and_nine_models_stay_small(large_folder, tmp_path):
    write(large_folder, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 15e6
