from typing import get_args

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.evaluate import suites
from knockon.evaluate.metrics import METRICS
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import moments
from knockon.evaluate.suites import SUITES, generation, score
from knockon.evaluate.truth import Truth
from knockon.types import UserError


def wide(scores: pd.DataFrame) -> pd.DataFrame:
    return scores.pivot(index="condition", columns="metric", values="value")


def test_scores_are_long_and_complete(screen, split, prediction):
    scores = score(Pairs.of(prediction, screen, split))
    assert list(scores.columns) == ["condition", "metric", "value"]
    assert list(scores["metric"].unique()) == [metric.name for metric in METRICS]
    assert len(scores) == 3 * len(METRICS)
    assert np.isfinite(scores["value"]).all()


def test_moments_are_those_of_dense_cells(screen, split, prediction):
    pairs = Pairs.of(prediction, screen, split)
    found = moments(pairs.cells)
    dense = [cells.toarray() for cells in pairs.cells]
    np.testing.assert_allclose(found.mean, [x.mean(0) for x in dense], atol=1e-12)
    np.testing.assert_allclose(found.variance, [x.var(0, ddof=1) for x in dense], atol=1e-12)
    np.testing.assert_allclose(found.zeros, [(x == 0).mean(0) for x in dense], atol=1e-12)


def test_scoring_is_deterministic_and_conditions_do_not_touch_each_other(screen, split, prediction):
    truth = Truth.of(screen, split)
    twice = [score(Pairs.align(prediction, truth)) for _ in range(2)]
    pd.testing.assert_frame_equal(*twice)
    one = score(Pairs.align(prediction, truth.select(truth.labels[1:2])))
    alone = twice[0][twice[0]["condition"] == "B+C"].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, alone)


def test_the_truth_itself_is_perfect(screen, split):
    truth = Truth.of(screen, split)
    means = wide(score(Pairs(truth=truth, cells=truth.cells))).mean()
    for metric in METRICS:
        if metric.name != "energy_distance":  # identical cells are nearer than independent ones
            assert means[metric.name] == pytest.approx(metric.best, abs=1e-12)
    assert means["energy_distance"] < 0


def variants(make, screen, truth):
    """Predictions by what they do wrong: each condition's cells from those of a fresh replicate."""
    replicate = make.cells([str(label) for label in truth.labels], seed=5)
    pairs = Pairs.align(replicate, truth)
    control = screen.cells_of(screen.controls[0]).astype(float)
    everything = np.vstack([screen.cells_of(label) for label in screen.conditions]).astype(float)
    draw = np.random.default_rng(0)
    yield "replicate", [cells.toarray() for cells in pairs.cells]
    yield "no change", [control] * 3
    yield "mean for all", [everything[draw.choice(len(everything), 30)] for _ in truth.labels]
    yield "one mean", [np.tile(everything.mean(0), (30, 1))] * 3
    moved = [
        (cells.toarray(), cells.toarray().mean(0) - c)
        for cells, c in zip(pairs.cells, truth.control, strict=True)
    ]
    yield "sign flip", [np.maximum(x - 2 * delta, 0) for x, delta in moved]
    yield "half effect", [np.maximum(x - delta / 2, 0) for x, delta in moved]
    yield "spikes", [np.where(np.arange(40) < 3, 8.0, control)] * 3
    yield "one cell", [x[:1] for x, _ in moved]


def test_a_replicate_beats_every_adversary_on_every_metric(make, screen, split):
    truth = Truth.of(screen, split)
    scored = {
        name: wide(score(Pairs(truth=truth, cells=tuple(sp.csr_matrix(x) for x in cells)))).mean()
        for name, cells in variants(make, screen, truth)
    }
    assert all(np.isfinite(values).all() and len(values) == len(METRICS) for values in scored.values())
    best = scored.pop("replicate")
    for name, values in scored.items():
        for metric in METRICS:
            better = best[metric.name] - values[metric.name]
            assert (better if metric.direction == "higher" else -better) > -0.03, (name, metric.name)
    assert scored["sign flip"]["discrimination"] < 0.5
    assert scored["sign flip"]["pearson_delta"] < -0.5
    assert scored["no change"]["mse"] > 5 * best["mse"]
    assert scored["half effect"]["mse"] > 2 * best["mse"]
    assert abs(scored["mean for all"]["centroid_delta"]) < 0.4
    assert scored["one mean"]["variance_corr"] == 0
    assert scored["one mean"]["energy_distance"] > scored["mean for all"]["energy_distance"]
    assert scored["one cell"]["variance_corr"] == 0


def test_what_one_real_cell_cannot_tell_is_left_out(make):
    lonely = make.screen(make.cells(["control", "A", "B", "A+B"])[:91].copy())
    split = make.split(lonely, lambda label: label.perturbation == "A+B")
    scores = score(Pairs.of(make.cells(["A+B"], seed=1), lonely, split))
    missing = {metric.name for metric in METRICS} - set(scores["metric"])
    assert missing == {"energy_distance", "variance_corr"}


def test_discrimination_is_left_out_without_rivals(make):
    screen = make.screen(make.cells(["control", "A"], contexts=["T", "B"]), ("cell_type",))
    split = make.split(screen, lambda label: label.covariates == ("T",))
    scores = score(Pairs.of(make.cells(["A"], seed=1, contexts=["T"]), screen, split))
    assert set(scores["metric"]) == {metric.name for metric in METRICS} - {"discrimination"}
    assert set(scores["condition"]) == {"A | T"}


def test_an_unknown_suite_is_refused(screen, split, prediction):
    with pytest.raises(UserError, match="Unknown suite vcc"):
        score(Pairs.of(prediction, screen, split), "vcc")
    ours = ["core", "de", "generation", "distribution", "interaction", "systema"]
    names = [*ours, "scdfm-2025", "cell-eval", "vcc2026"]
    assert [suite.name for suite in SUITES] == list(get_args(suites.Name)) == names


def test_names_of_metrics_are_unique():
    names = [metric.name for metric in suites.METRICS]
    assert len(set(names)) == len(names)


# ---- generation ------------------------------------------------------------------------------------


def test_scores_of_generation_are_complete_deterministic_and_apart(screen, split, prediction):
    truth = Truth.of(screen, split)
    twice = [score(Pairs.align(prediction, truth), "generation") for _ in range(2)]
    pd.testing.assert_frame_equal(*twice)
    assert list(twice[0]["metric"].unique()) == [metric.name for metric in generation.METRICS]
    assert len(twice[0]) == 3 * len(generation.METRICS)
    one = score(Pairs.align(prediction, truth.select(truth.labels[1:2])), "generation")
    alone = twice[0][twice[0]["condition"] == "B+C"].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, alone)


def test_a_replicate_beats_every_adversary_in_generation(make, screen, split):
    truth = Truth.of(screen, split)
    scored = {
        name: wide(score(Pairs(truth=truth, cells=tuple(sp.csr_matrix(x) for x in cells)), "generation"))
        for name, cells in variants(make, screen, truth)
    }
    assert all(values.notna().all(axis=None) for values in scored.values())
    best = scored.pop("replicate").mean()
    for name, values in scored.items():
        means = values.mean()
        for metric in generation.METRICS[:4] + generation.METRICS[6:]:
            better = best[metric.name] - means[metric.name]
            assert (better if metric.direction == "higher" else -better) > 0, (name, metric.name)
        both = values[["precision", "recall"]].min(axis=1).mean()  # either alone can be had for nothing
        assert both < best[["precision", "recall"]].min() - 0.2, name
    assert scored["one mean"]["precision"].mean() == 1
    assert scored["mean for all"]["recall"].mean() == 1


def test_cells_are_as_many_as_a_half_has(make, screen, split, prediction, caplog):
    truth = Truth.of(screen, split)
    assert truth.half.tolist() == [15, 15, 15]
    found = generation.gather(Pairs.align(prediction, truth), 256)
    assert {len(x) for x in (*found.predicted_points, *found.real_points)} == {15}
    assert {len(x) for x in generation.gather(Pairs.align(prediction, truth), 9).real_points} == {9}
    assert not caplog.text
    few = make.cells(["A+B", "B+C", "C+D"], cells=14, seed=1)
    score(Pairs.align(few, truth), "generation")
    assert "3 of 3 conditions have fewer predicted cells than the anchors" in caplog.text
    assert "predict 15 cells" in caplog.text


def test_of_one_real_cell_generation_keeps_means_and_zeros(make):
    lonely = make.screen(make.cells(["control", "A", "B", "A+B"])[:91].copy())
    split = make.split(lonely, lambda label: label.perturbation == "A+B")
    scores = score(Pairs.of(make.cells(["A+B"], seed=1), lonely, split), "generation")
    assert set(scores["metric"]) == {"mean_r2", "zero_fraction_r2"}
