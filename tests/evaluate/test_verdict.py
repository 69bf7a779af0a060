import json
from importlib.metadata import version

import pandas as pd

from knockon.evaluate import scores
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.summary import PAIRED, SUMMARY
from knockon.evaluate.truth import Truth
from knockon.evaluate.verdict import Verdict
from knockon.record import versions


def test_a_folder_has_all_tables_and_says_what_they_are_of(screen, split, tmp_path):
    truth = Truth.of(screen, split)
    found = scores.anchors(truth, split, ("core", "generation"), cells=20)
    verdict = Verdict(scores=found, truth=truth, split=split, suite=("core", "generation"))
    summary = verdict.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("scores.csv", "summary.csv", "paired.csv", "strata.csv", "about.json")
    }
    assert tuple(summary.columns) == SUMMARY
    assert tuple(pd.read_csv(tmp_path / "paired.csv").columns) == PAIRED
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["screen"]["genes"] == len(screen.genes)
    assert about["screen"]["cells"] == screen.num_cells
    assert about["split"]["test"] == 3
    assert about["suites"] == ["core", "generation"]
    assert set(about["metrics"]) == set(summary["metric"])
    assert "U-statistic" in about["metrics"]["energy_distance"]["how"]


def test_flags_are_written_where_somebody_looked(screen, split, tmp_path, prediction):
    verdict = scores.judge(Pairs.of(prediction, screen, split), split)
    verdict.write(tmp_path)
    assert (tmp_path / "flags.csv").read_text() == "model,flag,condition,value,limit,message\n"
    prediction.X = prediction.X * 2.0
    verdict = scores.judge(Pairs.of(prediction, screen, split), split)
    verdict.write(tmp_path)
    table = pd.read_csv(tmp_path / "flags.csv")
    assert set(table["model"]) == {"prediction"}
    assert "scaled" in set(table["flag"])


def test_versions_of_evaluators_are_recorded_where_they_are_installed(screen, split):
    scores = pd.DataFrame(columns=["model", "condition", "metric", "value"])
    verdict = Verdict(scores=scores, truth=Truth.of(screen, split), split=split, suite="core")
    found = verdict.about()["versions"]
    for name in ("scikit-learn", "cell-eval", "cell-eval2", "pdex", "illico", "torch"):
        assert found[name] == version(name)
    assert versions("no-such-package") == versions()
