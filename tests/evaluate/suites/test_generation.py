import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics import r2_score

from knockon.evaluate import metrics
from knockon.evaluate.suites import generation
from knockon.evaluate.suites.generation import (
    BANDWIDTHS,
    METRICS,
    Evidence,
    frechet,
    mmd2,
    nn_accuracies,
    nn_accuracy_error,
    precision,
    r2,
    recall,
    w2,
)

NAMES = "w2 frechet mmd2 nn_accuracy_error precision recall mean_r2 variance_r2 zero_fraction_r2"
FAR = 1000.0


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def gaussian(draw: np.random.Generator, cells: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return draw.multivariate_normal(mean, covariance, size=cells)


def gelbrich(m: np.ndarray, n: np.ndarray, s: np.ndarray, t: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, which is their Fréchet distance [dowson1982]."""
    return float(np.square(m - n).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t))))


TWO = (
    np.array([0.0, 0.0]),
    np.array([1.0, -2.0]),
    np.array([[2.0, 0.8], [0.8, 1.0]]),
    np.array([[0.5, -0.4], [-0.4, 3.0]]),  # does not commute with the other
)


def test_the_tuple_names_the_metrics_and_only_needs_what_evidence_has():
    assert [metric.name for metric in METRICS] == NAMES.split()
    fields = set(Evidence.__dataclass_fields__)
    assert all(metric.needs and set(metric.needs) <= fields for metric in METRICS)
    assert not {metric.name for metric in METRICS} & {metric.name for metric in metrics.METRICS}
    assert all(metric.function.__doc__ for metric in METRICS)


@pytest.mark.parametrize("between", [w2, frechet, mmd2, nn_accuracy_error, precision, recall])
def test_the_order_of_cells_and_the_frame_of_the_space_do_not_matter(draw, between):
    x, y = draw.normal(size=(20, 3)), draw.normal(0.5, size=(20, 3))
    turn = np.linalg.qr(draw.normal(size=(3, 3)))[0]
    assert between(draw.permutation(x), draw.permutation(y)) == pytest.approx(between(x, y), abs=1e-12)
    assert between(x @ turn + 3, y @ turn + 3) == pytest.approx(between(x, y), abs=1e-10)


@pytest.mark.parametrize("between", [w2, frechet, mmd2, nn_accuracy_error])
def test_distances_are_symmetric(draw, between):
    x, y = draw.normal(size=(20, 3)), draw.normal(0.5, size=(20, 3))
    assert between(y, x) == pytest.approx(between(x, y), abs=1e-12)


# ---- transport -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_w2_of_gaussians_has_the_closed_form(draw):
    m, n, s, t = TWO
    found = w2(gaussian(draw, 1500, m, s), gaussian(draw, 1500, n, t))
    assert found == pytest.approx(np.sqrt(gelbrich(m, n, s, t)), rel=0.02)


def test_w2_of_known_plans(draw):
    x = draw.normal(size=(50, 4))
    assert w2(x, x) == 0
    assert w2(x, draw.permutation(x)) == 0
    assert w2(x, x + np.array([3.0, 0, 4.0, 0])) == pytest.approx(5)
    line = draw.normal(size=(2, 60, 1))  # on a line, the plan is the order
    sorted_cost = np.square(np.sort(line[0], axis=0) - np.sort(line[1], axis=0)).mean()
    assert w2(*line) == pytest.approx(np.sqrt(sorted_cost))


def test_w2_refuses_samples_of_different_sizes(draw):
    with pytest.raises(ValueError, match="3 and 2 cells"):
        w2.__wrapped__(np.zeros((3, 1)), np.zeros((2, 1)))


# ---- Gaussians -------------------------------------------------------------------------------------


def test_frechet_of_gaussians_has_the_closed_form(draw):
    m, n, s, t = TWO
    found = frechet(gaussian(draw, 20000, m, s), gaussian(draw, 10000, n, t))
    assert found == pytest.approx(gelbrich(m, n, s, t), rel=0.02)


def test_frechet_is_the_formula_of_sample_moments(draw):
    x, y = draw.normal(size=(40, 5)) @ draw.normal(size=(5, 5)), draw.normal(1, 2, size=(50, 5))
    moments = [part for z in (x, y) for part in (z.mean(0), np.cov(z.T))]
    m, s, n, t = moments
    assert frechet(x, y) == pytest.approx(gelbrich(m, n, s, t), abs=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet(x, x + 2) == pytest.approx(5 * 4)
    scaled = np.square(x.mean(0)).sum() + np.trace(s)  # of (3 - 1)^2
    assert frechet(x, 3 * x) == pytest.approx(4 * scaled)


def test_frechet_needs_fewer_cells_than_dimensions(draw):
    x, y = draw.normal(size=(5, 30)), draw.normal(size=(5, 30))
    assert np.isfinite(frechet(x, y))
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


# ---- kernels ---------------------------------------------------------------------------------------


def test_mmd2_is_the_double_loop_over_pairs(draw):
    x, y = draw.normal(size=(6, 3)), draw.normal(2, 3, size=(4, 3))

    def kernel(a, b):
        return sum(np.exp(-np.square(a - b).sum() / (2 * width**2)) for width in (1, 2, 4, 8, 16))

    within_x = [kernel(x[i], x[j]) for i in range(6) for j in range(6) if i != j]
    within_y = [kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j]
    between = [kernel(a, b) for a in x for b in y]
    expected = np.mean(within_x) + np.mean(within_y) - 2 * np.mean(between)
    assert mmd2(x, y) == pytest.approx(expected, abs=1e-12)


def test_mmd2_is_unbiased_and_bounded_by_the_sum_of_kernels(draw):
    values = [mmd2(*draw.normal(size=(2, 12, 5))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8
    x = draw.normal(size=(20, 5))
    assert mmd2(x, x) < 0
    points = np.zeros((20, 5))
    assert mmd2(points, points + FAR) == pytest.approx(2 * len(BANDWIDTHS))


# ---- neighbors -------------------------------------------------------------------------------------


def test_the_nearest_neighbor_tells_far_samples_and_not_equal_ones(draw):
    x, y = draw.normal(size=(2, 400, 3))
    assert np.mean(nn_accuracies(x, y)) == pytest.approx(0.5, abs=0.06)
    assert nn_accuracy_error(x, y) < 0.06
    assert nn_accuracies(x, y + FAR) == (1, 1)
    assert nn_accuracy_error(x, y + FAR) == 0.5


def test_copies_of_real_cells_are_no_second_sample(draw):
    x = draw.normal(size=(30, 3))
    assert nn_accuracies(x, x) == (0, 0)
    assert nn_accuracy_error(x, x) == 0.5


def test_equally_near_neighbors_share_the_vote():
    x, y = np.zeros((2, 1)), np.zeros((3, 1))
    assert nn_accuracies(x, y) == (pytest.approx(1 / 4), pytest.approx(2 / 4))


def test_cells_near_the_mean_do_not_pass_for_real_ones(draw):
    """In many dimensions, real cells are nearer to their mean than to each other: both errors cancel."""
    y = draw.normal(size=(60, 100))
    x = y.mean(axis=0) + 0.01 * draw.normal(size=y.shape)
    assert np.mean(nn_accuracies(x, y)) == pytest.approx(0.5, abs=0.05)
    assert nn_accuracy_error(x, y) > 0.45


def test_precision_and_recall_of_collapsed_and_of_overdispersed_cells(draw):
    y = draw.normal(size=(200, 10))
    same = draw.normal(size=(200, 10))
    collapsed = y.mean(axis=0) + 0.01 * draw.normal(size=y.shape)
    wide = 4 * draw.normal(size=y.shape)
    assert (precision(y, y), recall(y, y)) == (1, 1)
    assert precision(same, y) > 0.7
    assert recall(same, y) > 0.7
    assert precision(collapsed, y) == 1
    assert recall(collapsed, y) == 0
    assert precision(wide, y) < 0.1
    assert recall(wide, y) > 0.9
    assert (precision(y + FAR, y), recall(y + FAR, y)) == (0, 0)


def test_the_manifold_is_of_third_neighbors():
    y = np.array([[0.0], [1.0], [3.0], [6.0]])  # radii 6, 5, 3, 6
    x = np.array([[-6.0], [-6.1], [12.0], [12.1]])
    assert precision(x, y) == 0.5
    assert precision(x, y[:2]) == 0  # of two cells, the only neighbor
    assert precision(np.array([[-1.0], [2.0], [-1.1]]), y[:2]) == pytest.approx(2 / 3)


# ---- genes -----------------------------------------------------------------------------------------


def test_r2_is_the_coefficient_of_determination(draw):
    real = draw.normal(size=(3, 20))
    predicted = real + draw.normal(size=(3, 20))
    expected = [r2_score(y, x) for x, y in zip(predicted, real, strict=True)]
    np.testing.assert_allclose(r2(predicted, real), expected, atol=1e-12)
    np.testing.assert_allclose(r2(real, real), 1)
    np.testing.assert_allclose(r2(np.tile(real.mean(1, keepdims=True), 20), real), 0, atol=1e-12)
    assert (r2(-3 * real, real) < -1).all()


def test_r2_needs_real_values_that_differ():
    real = np.array([[1.0, 1.0, 1.0], [1.0, np.nan, np.nan], [0.0, 1.0, 2.0]])
    found = r2(np.zeros((3, 3)), real)
    assert np.isnan(found).tolist() == [True, True, False]


# ---- conditions ------------------------------------------------------------------------------------


def test_one_cell_is_a_repeated_cell_where_predicted_and_no_population_where_real(draw):
    y = draw.normal(size=(5, 3))
    one = draw.normal(size=(1, 3))
    for metric in METRICS[:6]:
        pure = getattr(generation, metric.name)
        found = metric.function([one, y], [y, one])
        assert found[0] == pytest.approx(pure(np.repeat(one, 5, axis=0), y), abs=1e-12)
        assert np.isnan(found[1])
