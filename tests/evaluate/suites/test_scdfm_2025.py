from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.evaluate import suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.suites import scdfm_2025

from .toy import SCALES
from .toy_pairs import lonely, pairs, reality, scored

FROZEN = pd.read_csv(Path(__file__).parent / "toy_scdfm_2025.csv", comment="#", index_col=[0, 1])
"""Of cell-eval 0.5.42 itself on the same cells; see benchmarks/toy_scdfm_2025.py."""
TABLE = pd.DataFrame(
    {
        "replicate": (0.029, 0.135, 0.817, 1, 1, 0.968, 0.998, 0.797, 0.892),
        "half": (0.045, 0.158, 0.667, 1, 1, 0.957, 0.973, 0.519, 0.736),
        "mean": (0.089, 0.194, 0.208, 0.590, 0.472, 0.449, 0.715, 0.003, 0.069),
        "no change": (0.094, 0.188, 0.105, 0.646, 0.632, 0.124, 0.570, 0, 0.056),
        "sign flip": (0.293, 0.244, -0.664, 1, 1, -0.962, 0.065, 0.776, 0.868),
    },
    index=[
        *("mse", "mae", "pearson_delta", "discrimination_score_l1", "discrimination_score_cosine"),
        *("de_spearman_lfc_sig", "de_direction_match", "overlap_at_N", "pr_auc"),
    ],
)
"""Published numbers of the same design with other draws."""
TOLERANCE = (0.012, 0.01, 0.04, 0.13, 0.16, 0.08, 0.06, 0.09, 0.04)


@pytest.fixture(scope="module")
def scores() -> dict[str, pd.DataFrame]:
    return {name: scored(pairs(name), "scdfm-2025") for name in (*SCALES, "mean")}


def test_numbers_are_those_of_the_old_package(scores):
    for name, found in scores.items():
        expected = FROZEN.loc[name].reindex(found.index)
        shared = [metric for metric in found if metric in expected]
        assert len(shared) == len(scdfm_2025.METRICS) - 1  # all but l2, which it has not
        undefined = expected[shared].isna()
        assert set(undefined.columns[undefined.any()]) <= {"de_spearman_sig"}, name
        assert (found[shared][undefined].stack() == 0).all()  # its NaN is a prediction that says nothing
        np.testing.assert_allclose(found[shared].where(~undefined), expected[shared], atol=1e-6, rtol=0)


def test_the_published_table_is_reproduced(scores):
    means = pd.DataFrame({name: found.mean() for name, found in scores.items()})
    off = (means.loc[TABLE.index, TABLE.columns] - TABLE).abs()
    assert (off.le(TOLERANCE, axis=0)).all(axis=None), off


def test_every_sign_wrong_is_a_perfect_discrimination_here_and_nowhere_else(scores):
    blind = scores["sign flip"].mean()
    assert (blind.filter(like="discrimination") == 1).all()
    assert blind[["overlap_at_N", "pr_auc", "roc_auc"]].min() > 0.7
    assert blind[["pearson_delta", "de_spearman_lfc_sig"]].max() < -0.6
    assert blind["de_direction_match"] < 0.1
    core = suites.score(pairs("sign flip")).groupby("metric")["value"].mean()
    assert core["discrimination"] < 0.4
    marked = [metric.name for metric in scdfm_2025.METRICS if "sign-blind" in metric.how]
    assert len(marked) == 7


def test_anchors_are_needed_to_read_any_number(scores):
    means = pd.DataFrame({name: found.mean() for name, found in scores.items()})
    assert means.loc["pearson_delta", "no change"] > 0.05  # of shared control cells alone
    assert means.loc["pearson_delta", "replicate"] < 0.9
    assert 0.25 < means.loc["mse", "replicate"] / means.loc["mse", "no change"] < 0.4
    assert means.loc["de_spearman_lfc_sig", "mean"] > 0.3  # the shared response
    assert means.loc["de_direction_match", "mean"] > 0.6
    assert means.loc["discrimination_score_l1", "half"] == means.loc["discrimination_score_l1", "replicate"]
    assert means.loc["overlap_at_N", "half"] < 0.7 * means.loc["overlap_at_N", "replicate"]


def test_l2_is_the_root_of_the_summed_squares(scores):
    found = scores["half"]
    np.testing.assert_allclose(found["l2"], np.sqrt(found["mse"] * 500))


def test_the_truth_itself_is_perfect():
    truth = reality()
    found = scored(Pairs(truth=truth, cells=truth.cells), "scdfm-2025").mean()
    for metric in scdfm_2025.METRICS:
        assert found[metric.name.removeprefix("scdfm-2025:")] == pytest.approx(metric.best, abs=1e-9)


def test_a_repeated_control_mean_says_nothing_and_hides_behind_no_nan():
    truth = reality()
    means = [sp.csr_matrix(np.tile(mean, (20, 1))) for mean in truth.control]
    found = scored(Pairs(truth=truth, cells=tuple(means)), "scdfm-2025")
    assert found.notna().all(axis=None)
    assert (found["pearson_delta"] == 0).all()


def test_undefined_by_the_prediction_is_nothing_and_undefined_by_the_truth_is_left_out():
    zeros, fold = np.zeros((2, 3)), np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    p = np.array([[0.01, 0.01, 0.01], [0.01, 1.0, 1.0]])
    found = scdfm_2025.de_spearman_lfc_sig(zeros, fold, p)
    np.testing.assert_array_equal(found, [0, np.nan])  # one gene has no order
    assert scdfm_2025.de_spearman_sig(zeros, p) == 0
    assert np.isnan(scdfm_2025.de_spearman_sig(p, zeros))
    assert np.isnan(scdfm_2025.de_direction_match(fold, fold, np.ones((2, 3)))).all()


# ---- closed forms ----------------------------------------------------------------------------------


def test_fold_changes_are_bounded_where_a_mean_is_zero_only():
    change, control = np.array([[2.0, 0.0, 1.0, 0.0, 300.0]]), np.array([[1.0, 1.0, 0.0, 0.0, 3.0]])
    expected = np.log([[2, 1 / 20, 20, 20, 100]])
    np.testing.assert_allclose(scdfm_2025.fold(change, control), expected)


def test_p_values_are_adjusted_over_all_conditions_at_once():
    rng = np.random.default_rng(0)
    control = sp.csr_matrix(rng.random((30, 1)))
    moved = sp.csr_matrix(2 + rng.random((30, 1)))
    alone = scdfm_2025.adjusted([moved], [control])[0, 0]
    beside = scdfm_2025.adjusted([moved, control, control], [control] * 3)
    assert beside[0, 0] == pytest.approx(3 * alone)
    assert (beside[1:] == 1).all()


def test_few_cells_without_ties_are_tested_exactly():
    low, high = (sp.csr_matrix(np.array([values]).T) for values in ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    assert scdfm_2025.adjusted([high], [low])[0, 0] == pytest.approx(2 / 20)  # two of 6-choose-3 orders


def test_overlap_takes_as_many_predicted_genes_as_are_real():
    fold, real_p = np.array([[3.0, -2.0, 1.0, 0.5]]), np.array([[0.0, 1.0, 0.0, 1.0]])
    assert scdfm_2025.overlap_at_n(fold, np.zeros((1, 4)), real_p)[0] == 0.5  # 3 and -2 are the largest two
    assert scdfm_2025.overlap_at_n(fold, np.array([[0.0, 1, 0, 0]]), real_p)[0] == 1
    assert scdfm_2025.overlap_at_n(fold, np.zeros((1, 4)), np.ones((1, 4)))[0] == 0  # none is real


def test_areas_of_ties_and_of_perfect_and_reversed_orders():
    real = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert scdfm_2025.roc_auc(np.full((1, 4), 0.5), real) == 0.5
    assert scdfm_2025.roc_auc(np.array([[0.1, 0.2, 0.3, 0.4]]), real) == 1
    assert scdfm_2025.pr_auc(np.array([[0.1, 0.2, 0.3, 0.4]]), real) == 1
    assert scdfm_2025.roc_auc(np.array([[0.4, 0.3, 0.2, 0.1]]), real) == 0
    assert np.isnan(scdfm_2025.roc_auc(np.ones((1, 4)), np.ones((1, 4))))


def test_only_correlations_are_carried_over_from_halves():
    carried = {metric.name for metric in scdfm_2025.METRICS if metric.noise == "reliability"}
    correlations = ("pearson_delta", "de_spearman_lfc_sig", "de_spearman_sig")
    assert carried == {f"scdfm-2025:{name}" for name in correlations}


def test_among_one_condition_none_is_told_apart():
    found = scored(lonely(), "scdfm-2025")
    assert len(found) == 1
    assert not [name for name in found if name.startswith("discrimination")]


def test_contexts_are_scored_one_by_one(make):
    texts = ["control", "A", "B", "C"]
    screen = make.screen(make.cells(texts, contexts=["T", "B"]), ("cell_type",))
    split = make.split(screen, lambda label: label.perturbation != "C")
    cells = make.cells(texts[1:3], seed=1, contexts=["T", "B"])
    both, *apart = (
        suites.score(
            Pairs.of(cells[cells.obs["cell_type"].isin(contexts)].copy(), screen, split), "scdfm-2025"
        )
        for contexts in (["T", "B"], ["T"], ["B"])
    )
    alone = pd.concat(apart).groupby(["metric", "condition"])["value"].mean()
    found = both.set_index(["metric", "condition"])["value"].sort_index()
    assert {"A | T", "B | B", suites.ALL} <= set(both["condition"])
    pd.testing.assert_series_equal(found, alone)  # one number of all conditions is the mean over contexts
