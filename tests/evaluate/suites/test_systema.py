import numpy as np
import pytest
import scipy.sparse as sp

from knockon.evaluate import metrics
from knockon.evaluate.metrics import Evidence
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.suites import score, systema
from knockon.evaluate.suites.systema import (
    METRICS,
    centroid_accuracy,
    jaccard_top20,
    rmse,
    systematic_variation,
)
from knockon.evaluate.truth import Truth

NAMES = (
    "pearson_delta pearson_delta_top20 centroid_delta centroid_delta_top20 "
    "centroid_accuracy rmse jaccard_top20"
)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_tuple_shares_the_correlations_of_core():
    assert [metric.name for metric in METRICS] == NAMES.split()
    assert all(metric in metrics.METRICS for metric in METRICS[:4])
    assert all(set(metric.needs) <= set(Evidence.__dataclass_fields__) for metric in METRICS)


def test_rmse_is_the_length_per_gene(draw):
    predicted, real = draw.normal(size=(2, 3, 7))
    np.testing.assert_allclose(rmse(predicted, real), metrics.l2(predicted, real) / np.sqrt(7))


# ---- centroids -------------------------------------------------------------------------------------

CANDIDATES = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [0.0, -20.0]])
OTHERS = ~np.eye(4, dtype=bool)


def test_centroid_accuracy_counts_the_centroids_that_are_farther():
    own = np.arange(4)
    assert centroid_accuracy(CANDIDATES, CANDIDATES, own, OTHERS).tolist() == [1, 1, 1, 1]
    origin = np.zeros((4, 2))
    assert centroid_accuracy(origin, CANDIDATES, own, OTHERS) == pytest.approx([1, 2 / 3, 1 / 3, 0])


def test_centroid_accuracy_is_euclidean_and_as_near_is_not_farther():
    candidates = np.array([[3.0, 3.0], [0.0, 5.0]])  # L1 would choose the second, L2 the first
    own, others = np.arange(2), ~np.eye(2, dtype=bool)
    assert centroid_accuracy(np.zeros((2, 2)), candidates, own, others).tolist() == [1, 0]
    between = np.array([[0.5, 0.5]] * 2)
    assert centroid_accuracy(between, np.eye(2), own, others).tolist() == [0, 0]


def test_rivals_are_those_of_the_context_and_without_one_nothing_is_said():
    own = np.arange(4)
    rivals = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=bool)
    found = centroid_accuracy(np.tile(CANDIDATES[3], (4, 1)), CANDIDATES, own, rivals)
    np.testing.assert_array_equal(found, [1, 0, np.nan, np.nan])


def test_one_prediction_for_all_is_at_chance(draw):
    candidates = draw.normal(size=(9, 30))
    same = np.tile(candidates.mean(axis=0), (9, 1))
    found = centroid_accuracy(same, candidates, np.arange(9), ~np.eye(9, dtype=bool))
    assert found.mean() == pytest.approx(0.5)


# ---- genes that change most ------------------------------------------------------------------------


def test_jaccard_is_shared_genes_over_all():
    control = np.zeros((3, 60))
    real, predicted = np.zeros((2, 3, 60))
    real[:, :20] = 1 + np.arange(20)
    predicted[0] = -real[0]  # blind to signs
    predicted[1, 10:30] = 5
    predicted[2, 40:] = 5
    assert jaccard_top20(predicted, real, control) == pytest.approx([1, 10 / 30, 0])


def test_no_change_is_no_choice_and_fewer_changes_are_no_fewer_wrong():
    control = np.ones((1, 60))
    real = control + np.linspace(1, 2, 60)
    assert jaccard_top20(control, real, control) == 0
    assert jaccard_top20(control.astype(np.float32).astype(float) + 1e-9, real, control) == 0
    one = control + 3.0 * (np.arange(60) == 59)
    assert jaccard_top20(one, real, control) == pytest.approx(1 / 20)
    assert np.isnan(jaccard_top20(real, control, control))


def test_chance_is_next_to_nothing(draw):
    predicted, real = draw.normal(size=(2, 200, 1000))
    assert jaccard_top20(predicted, real, np.zeros((200, 1000))).mean() < 0.02


# ---- a screen --------------------------------------------------------------------------------------


def test_adversaries_are_in_order(screen, split, prediction):
    pairs = Pairs.align(prediction, Truth.of(screen, split))
    truth = pairs.truth
    replicate = pairs.moments.mean
    fields = systema.gather(pairs, 256)

    def mean(predicted):
        evidence = metrics.Evidence(**{**vars(fields), "predicted": predicted})
        return {metric.name: metric(evidence).mean() for metric in METRICS}

    best = mean(replicate)
    change = replicate - truth.control
    others = {
        "no change": mean(truth.control),
        "mean": mean(truth.centroid),
        "sign flip": mean(truth.control - change),
    }
    for name, values in others.items():
        for metric in METRICS:
            better = best[metric.name] - values[metric.name]
            equal = name == "sign flip" and metric.name == "jaccard_top20"
            assert equal or (better if metric.direction == "higher" else -better) > 0, (name, metric.name)
    assert others["sign flip"]["centroid_delta"] < 0
    assert others["mean"]["centroid_delta"] == 0
    assert others["no change"]["jaccard_top20"] == 0


def test_scores_are_complete(screen, split, prediction):
    scores = score(Pairs.of(prediction, screen, split), "systema")
    assert list(scores["metric"].unique()) == NAMES.split()
    assert len(scores) == 3 * len(METRICS)


def test_systematic_variation_is_one_where_all_change_alike(make, screen, split):
    truth = Truth.of(screen, split)
    found = systematic_variation(truth)
    changes = truth.moments.mean - truth.control
    average = truth.centroid - truth.control
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(changes, average, strict=True)]
    assert found == pytest.approx(np.mean(cosines))
    alike = make.cells(["control", "A", "B"])
    order = np.random.default_rng(0).permutation(30)
    alike.X = sp.vstack([alike.X[:60], alike.X[30:60][order]]).tocsr()
    one = make.screen(alike)
    truth = Truth.of(one, make.split(one, lambda label: label.perturbation == "B"))
    assert systematic_variation(truth) == pytest.approx(1)
