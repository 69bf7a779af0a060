"""What a folder says in words: by which metrics models are judged, and against which baseline."""

import json

import pandas as pd
import pytest

from knockon.evaluate import tables
from knockon.evaluate.report.findings import Findings

CORE, FOREIGN = "pearson_delta", ("cell-eval:mse", "cell-eval:mae", "scdfm-2025:mse")


def found(folder, values, suites=None, conditions=("A", "B")):
    """Findings of ``{metric: {model: value}}``, alike in all conditions."""
    rows = [
        (model, condition, metric, value)
        for metric, of_models in values.items()
        for model, value in of_models.items()
        for condition in conditions
    ]
    tables.write(pd.DataFrame(rows, columns=tables.LONG), folder)
    if suites is not None:
        (folder / "about.json").write_text(json.dumps({"suites": suites}))
    return Findings.read(folder)


@pytest.fixture
def values():
    """The models' order in core, turned around in everything else."""
    good = {"no_effect": 1.0, "additive": 0.6, "mine": 0.4, "ceiling": 0.2}
    bad = {"no_effect": 0.3, "additive": 0.4, "mine": 0.9, "ceiling": 0.2}
    core = {name: 1 - value for name, value in good.items()}
    return {CORE: core, "mse": good, "mmd2": bad, **dict.fromkeys(FOREIGN, bad)}


@pytest.mark.parametrize("suites", [["core", "generation", "cell-eval"], ["cell-eval", "core"]])
def test_models_are_judged_by_the_first_suite_and_not_by_its_retellings(tmp_path, values, suites):
    findings = found(tmp_path, values, suites)
    assert findings.basis == ("core", [CORE, "mse"])
    assert findings.models[0] == "mine"
    assert findings.ranks["mine"] == 1
    assert findings.wins("mine") == (2, 2)
    assert findings.calibrated["mine"] == pytest.approx(0.5)
    assert "2 of 2 metrics of core" in findings.answer()


def test_another_suite_judges_where_it_was_asked_for_first(tmp_path, values):
    findings = found(tmp_path, values, ["generation", "core"])
    assert findings.basis == ("generation", ["mmd2"])
    assert findings.models[-1] == "mine"
    assert findings.judges == "1 metric of generation"


def test_a_folder_that_names_no_suite_is_judged_by_all_metrics_that_are_ours(tmp_path, values):
    findings = found(tmp_path, values)
    assert findings.basis == ("", [CORE, "mse", "mmd2"])
    assert "2 of 3 metrics" in findings.answer()
    assert findings.judges == "3 metrics"


def test_the_numbers_of_others_judge_where_nothing_else_is_there(tmp_path, values):
    foreign = {name: values[name] for name in FOREIGN}
    assert found(tmp_path, foreign, ["cell-eval", "scdfm-2025"]).basis == ("cell-eval", list(FOREIGN[:2]))


def test_tests_of_other_suites_prove_nothing(tmp_path, values):
    findings = found(tmp_path, values, ["core", "generation"], conditions=[f"C{i}" for i in range(8)])
    assert (findings.paired["p"] < 0.05).sum() > 2
    assert findings.proven("mine") == (2, 0)


def test_a_win_is_over_the_baseline_of_the_paired_test(tmp_path):
    # additive lacks a condition, and is best over the others only
    lines = [("no_effect", "AB", 0.5), ("additive", "A", 0.1), ("mine", "AB", 0.3), ("ceiling", "AB", 0.1)]
    rows = [(model, condition, "mse", value) for model, names, value in lines for condition in names]
    tables.write(pd.DataFrame(rows, columns=tables.LONG), tmp_path)
    findings = Findings.read(tmp_path)
    assert set(findings.paired["baseline"]) == {"no_effect"}
    assert findings.baselines == {"mse": "no_effect"}
    assert findings.wins("mine") == (1, 1)


def test_a_win_is_over_the_conditions_of_the_paired_test(tmp_path):
    lines = [("no_effect", {"A": 0.1, "B": 0.9}), ("mine", {"A": 0.2})]
    rows = [(model, name, "mse", value) for model, values in lines for name, value in values.items()]
    tables.write(pd.DataFrame(rows, columns=tables.LONG), tmp_path)
    assert Findings.read(tmp_path).wins("mine") == (0, 1)  # though its mean is better, over other conditions


def test_a_tie_belongs_to_the_baseline(tmp_path):
    same = {"mine": 0.6, "no_effect": 1.0, "additive": 0.6, "ceiling": 0.2}
    findings = found(tmp_path, {"mse": same}, ["core"])
    assert findings.models[:2] == ["additive", "mine"]
    assert findings.answer().startswith("The simple baseline additive ranks first.")
