import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import norm

from knockon.evaluate import metrics
from knockon.evaluate.metrics import METRICS, Evidence

NAMES = (
    "mse mae l2 pearson_delta pearson_delta_top20 centroid_delta centroid_delta_top20 discrimination "
    "energy_distance variance_corr zero_fraction_error"
)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_tuple_names_the_core_metrics_and_only_needs_what_evidence_has():
    assert " ".join(metric.name for metric in METRICS) == NAMES
    fields = set(Evidence.__dataclass_fields__)
    assert all(metric.needs and set(metric.needs) <= fields for metric in METRICS)


# ---- agreement with published numbers --------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared):
    arrays = np.load(shared / "parity" / "scdfm.npz", allow_pickle=False)
    parts = {k.removeprefix("metrics/"): arrays[k] for k in arrays.files if k.startswith("metrics/")}
    means = {side: parts[f"{side}_cells"].astype(np.float64).mean(axis=1) for side in ("real", "pred")}
    control = parts["control_cells"].astype(np.float64).mean(axis=0)
    return parts, means["pred"], means["real"], np.tile(control, (len(means["real"]), 1))


@pytest.mark.parametrize("name", ["mse", "mae", "l2"])
def test_distances_agree_with_the_released_program(published, name):
    parts, predicted, real, _ = published
    np.testing.assert_allclose(getattr(metrics, name)(predicted, real), parts[name], rtol=0, atol=1e-9)


def test_correlations_agree_with_the_released_program(published):
    parts, predicted, real, control = published
    centroid = np.tile(parts["train_centroids"].astype(np.float64).mean(axis=0), (len(real), 1))
    found = metrics.pearson_delta(predicted, real, control)
    np.testing.assert_allclose(found, parts["pearson_delta"], rtol=0, atol=1e-9)
    found = metrics.centroid_delta(predicted, real, centroid)
    np.testing.assert_allclose(found, parts["pearson_delta_hat"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
def test_absolute_discrimination_agrees_with_the_released_program(published, distance):
    parts, predicted, real, control = published
    found = metrics.discrimination_scdfm(predicted, real, control, distance)
    np.testing.assert_allclose(found, parts[f"discrimination_{distance}"], rtol=0, atol=1e-9)


def test_absolute_discrimination_of_no_effect_agrees_with_the_released_program(published):
    parts, _, real, control = published
    found = metrics.discrimination_scdfm(control, real, control)
    np.testing.assert_allclose(found, parts["discrimination_l1_of_control_predictor"], rtol=0, atol=1e-9)
    assert np.mean(found) == pytest.approx((len(real) + 1) / (2 * len(real)))


# ---- adversarial predictions -----------------------------------------------------------------------


@pytest.fixture
def world(draw):
    """Eight conditions with sparse effects: control, real means, a noisy replicate."""
    control = np.tile(draw.uniform(0.5, 2, 200), (8, 1))
    effect = draw.normal(size=(8, 200)) * (draw.random((8, 200)) < 0.2) + 0.3 * draw.normal(size=200)
    real = control + effect
    return control, real, real + 0.05 * draw.normal(size=real.shape)


def discrimination(predicted: np.ndarray, real: np.ndarray) -> np.ndarray:
    own = np.arange(len(real))
    return metrics.discrimination(predicted, real, own, ~np.eye(len(real), dtype=bool))


def test_a_sign_flip_is_caught_by_signed_metrics_and_only_fools_the_absolute_one(world):
    control, real, _ = world
    flipped = 2 * control - real
    assert metrics.pearson_delta(flipped, real, control) == pytest.approx(-1)
    assert metrics.pearson_delta_top20(flipped, real, control) == pytest.approx(-1)
    assert discrimination(flipped, real).mean() < 0.5
    assert metrics.discrimination_scdfm(flipped, real, control) == pytest.approx(1)


def test_half_an_effect_has_the_direction_but_not_the_size(world):
    control, real, replicate = world
    half = (control + real) / 2
    assert metrics.pearson_delta(half, real, control) == pytest.approx(1)
    no_effect = metrics.mse(control, real)
    assert metrics.mse(half, real) == pytest.approx(no_effect / 4)
    assert (metrics.mse(half, real) > metrics.mse(replicate, real)).all()


def test_the_mean_of_all_perturbations_earns_nothing_beyond_what_they_share(world):
    control, real, _ = world
    mean = np.tile(real.mean(axis=0), (8, 1))
    assert metrics.pearson_delta(mean, real, control).mean() > 0.4
    assert (metrics.centroid_delta(mean, real, mean) == 0).all()
    assert (metrics.centroid_delta_top20(mean, real, control, mean) == 0).all()
    assert discrimination(mean, real).mean() == pytest.approx(0.5, abs=0.02)


def test_no_change_is_worst_on_correlations_and_has_no_nan(world):
    control, real, _ = world
    assert (metrics.pearson_delta(control, real, control) == 0).all()
    assert (metrics.pearson_delta_top20(control, real, control) == 0).all()
    rounded = control.astype(np.float32).astype(np.float64)
    assert (metrics.pearson_delta(rounded, real, control) == 0).all()
    assert discrimination(control, real).mean() == pytest.approx(0.5, abs=0.15)


def test_spikes_in_a_few_genes_cost_more_than_they_earn(world):
    control, real, _ = world
    spiked = control.copy()
    spiked[:, :3] += 10
    assert metrics.mse(spiked, real).mean() > metrics.mse(control, real).mean()
    assert np.abs(metrics.pearson_delta(spiked, real, control)).mean() < 0.2


def test_a_replicate_is_best_on_every_metric_of_means(world):
    control, real, replicate = world
    others = [control, 2 * control - real, (control + real) / 2, np.tile(real.mean(axis=0), (8, 1))]
    centroid = np.tile(real.mean(axis=0), (8, 1))
    for other in others:
        assert metrics.mse(replicate, real).mean() < metrics.mse(other, real).mean()
        assert metrics.mae(replicate, real).mean() < metrics.mae(other, real).mean()
        mine, theirs = (metrics.centroid_delta(x, real, centroid).mean() for x in (replicate, other))
        assert mine > theirs - 0.02  # half an effect is parallel to the whole
        assert discrimination(replicate, real).mean() >= discrimination(other, real).mean()


# ---- properties ------------------------------------------------------------------------------------


def test_pearson_is_that_of_numpy_and_ignores_scale(draw):
    x, y = draw.normal(size=(2, 5, 40))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    assert metrics.pearson(x, y) == pytest.approx(expected, abs=1e-12)
    assert metrics.pearson(3 * x + 1, y) == pytest.approx(expected, abs=1e-12)


def test_top_genes_are_those_of_the_real_change_and_ties_go_to_the_first():
    change = np.array([[0.0, -3.0, 1.0, 3.0, 1.0, 0.5]])
    assert metrics.largest(change, 3).tolist() == [[1, 3, 2]]
    assert metrics.largest(change, 20).shape == (1, 6)


def test_discrimination_counts_ties_as_a_half_and_is_nothing_without_a_rival():
    candidates = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
    own = np.array([1, 3])
    rivals = np.array([[True, False, True, True], [False, False, False, False]])
    predicted = np.array([[1.0, 0.0], [5.0, 0.0]])
    scores = metrics.discrimination(predicted, candidates, own, rivals)
    assert scores[0] == pytest.approx(1 - 0.5 / 3)
    assert np.isnan(scores[1])


def test_discrimination_spans_zero_to_one():
    candidates = np.arange(4.0)[:, None]
    own, rivals = np.array([0]), np.array([[False, True, True, True]])
    assert metrics.discrimination(np.array([[0.1]]), candidates, own, rivals) == pytest.approx(1)
    assert metrics.discrimination(np.array([[9.0]]), candidates, own, rivals) == pytest.approx(0)


def test_energy_distance_of_two_points():
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]])
    assert metrics.energy(x, y) == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)


def test_energy_distance_of_gaussians_has_its_closed_form():
    def mean_abs(mu: float) -> float:
        """E|z| of a normal z with mean mu and variance 2, as a difference of two unit normals is."""
        return 2 / np.sqrt(np.pi) * np.exp(-(mu**2) / 4) + mu * (1 - 2 * norm.cdf(-mu / np.sqrt(2)))

    quantiles = norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    found = metrics.energy(quantiles, quantiles + 1.5)
    assert found == pytest.approx(2 * mean_abs(1.5) - 2 * mean_abs(0), rel=2e-3)


@pytest.mark.parametrize("cells", [3, 10])
def test_energy_distance_is_unbiased_however_few_cells(draw, cells):
    values = np.array([metrics.energy(*draw.normal(size=(2, cells, 5))) for _ in range(2000)])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
    assert (values < 0).any()


def test_energy_distance_of_sparse_cells_is_that_of_dense_ones(draw):
    x, y = draw.poisson(0.3, size=(2, 12, 30)).astype(float)
    found = metrics.energy_distance([sp.csr_matrix(x)], [sp.csr_matrix(y)])
    assert found == pytest.approx([metrics.energy(x, y)], abs=1e-12)


def test_a_repeated_mean_is_punished_by_metrics_of_populations(draw):
    real = draw.poisson(1.0, size=(100, 50)).astype(float)
    other = draw.poisson(1.0, size=(100, 50)).astype(float)
    repeated = np.tile(real.mean(axis=0), (100, 1))
    assert metrics.energy(repeated, real) > 20 * abs(metrics.energy(other, real))
    assert metrics.variance_corr(repeated.var(0)[None], real.var(0)[None]) == 0


def test_single_cells():
    one, two = np.ones((1, 3)), np.array([[0.0, 0, 0], [2.0, 0, 0]])
    assert np.isnan(metrics.energy(two, one))
    assert metrics.energy(one, two) == pytest.approx(2 * np.sqrt(3) - 2)
    unknown, known = np.full((1, 3), np.nan), np.ones((1, 3))
    assert np.isnan(metrics.variance_corr(known, unknown)).all()


def test_variances_are_compared_where_either_side_varies():
    predicted, real = np.array([[1.0, 2.0, 0.0, 3.0]]), np.array([[1.0, 2.0, 0.0, 3.0]])
    assert metrics.variance_corr(predicted, real) == pytest.approx(1)
    assert metrics.variance_corr(np.zeros((1, 4)), np.zeros((1, 4))) == 0


def test_zero_fractions():
    found = metrics.zero_fraction_error(np.array([[0.5, 1.0]]), np.array([[0.25, 1.0]]))
    assert found == pytest.approx([0.125])
