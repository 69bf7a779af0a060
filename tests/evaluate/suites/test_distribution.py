import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import wasserstein_distance

from knockon.evaluate import metrics
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.scores import ceiling
from knockon.evaluate.suites import distribution, generation, score
from knockon.evaluate.suites.distribution import (
    METRICS,
    Evidence,
    energy_pca,
    gather,
    mmd2_median,
    spread_error,
    w1,
    w1_genes,
)
from knockon.evaluate.truth import Truth

NAMES = "energy_pca mmd2_median w1_genes frechet nn_accuracy_error spread_error"


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


def counts(draw: np.random.Generator, cells: int, rate: float = 0.5) -> sp.csr_matrix:
    return sp.csr_matrix(np.log1p(draw.poisson(rate, size=(cells, 30))))


def test_the_tuple_names_the_metrics_and_shares_those_of_generation():
    assert [metric.name for metric in METRICS] == NAMES.split()
    fields = set(Evidence.__dataclass_fields__)
    assert all(metric.needs and set(metric.needs) <= fields and metric.how for metric in METRICS)
    shared = {metric.name: metric for metric in generation.METRICS}
    assert all(metric is shared.get(metric.name, metric) for metric in METRICS)


# ---- genes -----------------------------------------------------------------------------------------


def test_w1_is_that_of_scipy_gene_by_gene(draw):
    x, y = counts(draw, 25), counts(draw, 25, 1.5)
    x, y = x.multiply(np.arange(30) != 3).tocsr(), y.multiply(np.arange(30) != 4).tocsr()
    expected = [wasserstein_distance(a, b) for a, b in zip(x.toarray().T, y.toarray().T, strict=True)]
    np.testing.assert_allclose(w1(x, y), expected, atol=1e-12)
    np.testing.assert_allclose(w1(y, x), expected, atol=1e-12)
    assert w1_genes([x], [y])[0] == pytest.approx(np.mean(expected))


def test_w1_of_shifted_samples_is_the_shift_and_of_the_same_cells_is_none(draw):
    x = draw.uniform(1, 2, size=(40, 3))
    shift = np.array([0.0, 0.5, 2.0])
    found = w1(sp.csr_matrix(draw.permutation(x)), sp.csr_matrix(x + shift))
    np.testing.assert_allclose(found, shift, atol=1e-12)
    assert w1_genes([counts(draw, 9)], [sp.csr_matrix((9, 30))])[0] > 0


def test_w1_of_scaled_exponentials_has_the_closed_form(draw):
    x, y = (sp.csr_matrix(draw.exponential(scale, size=(20_000, 1))) for scale in (1.0, 3.0))
    assert w1(x, y)[0] == pytest.approx(2, rel=0.05)  # the difference of means, as one is always above


def test_w1_refuses_samples_of_different_sizes(draw):
    with pytest.raises(ValueError, match="3 and 2 cells"):
        w1(counts(draw, 3), counts(draw, 2))


# ---- points ----------------------------------------------------------------------------------------


def test_energy_is_that_of_the_definition_and_unbiased(draw):
    x, y = draw.normal(size=(6, 3)), draw.normal(1, size=(6, 3))

    def apart(a, b):
        return np.linalg.norm(a[:, None] - b, axis=-1)

    expected = 2 * apart(x, y).mean() - (apart(x, x).sum() + apart(y, y).sum()) / 30
    assert energy_pca(x, y) == pytest.approx(expected)
    values = [energy_pca(*draw.normal(size=(2, 12, 5))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_mmd2_is_unbiased_whatever_the_unit_of_the_space(draw):
    values = [mmd2_median(*draw.normal(size=(2, 12, 5))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    x, y = draw.normal(size=(20, 5)), draw.normal(1, 2, size=(20, 5))
    assert mmd2_median(1000 * x, 1000 * y) == pytest.approx(mmd2_median(x, y))
    widths = [factor * median(y) for factor in (0.5, 1, 2, 4)]
    assert mmd2_median(x, y) == pytest.approx(generation.mmd2(x, y, widths) / 4)


def median(y: np.ndarray) -> float:
    apart = np.linalg.norm(y[:, None] - y, axis=-1)
    return float(np.median(apart[np.triu_indices(len(y), 1)]))


def test_mmd2_of_gaussians_has_the_closed_form(draw):
    """E k(a, b) = (s^2 / (s^2 + v))^(d / 2) exp(-|m|^2 / 2 (s^2 + v)) for a - b ~ N(m, v I)."""
    dims, shift, scale = 3, 1.0, 1.5
    x, y = draw.normal(shift, scale, size=(1500, dims)), draw.normal(size=(1500, dims))
    widths = np.square(median(y[:500]) * np.array([0.5, 1, 2, 4]))

    def kernel(variance, mean=0.0):
        return (widths / (widths + variance)) ** (dims / 2) * np.exp(
            -dims * mean**2 / (2 * (widths + variance))
        )

    expected = kernel(2 * scale**2) + kernel(2.0) - 2 * kernel(1 + scale**2, shift)
    assert mmd2_median(x, y) == pytest.approx(expected.mean(), rel=0.1)


def test_a_prediction_cannot_choose_the_kernel(draw):
    y = draw.normal(size=(20, 4))
    for x in (1e-6 * draw.normal(size=(20, 4)), np.zeros((20, 4))):
        assert mmd2_median(x, y) > 0.1
    same = np.ones((20, 4))
    assert mmd2_median(same, same) == 0
    assert mmd2_median(y, same) == pytest.approx(1)  # no two of y are equal, all of the real cells are


def test_spread_is_told_apart_both_ways_and_only_spread(draw):
    y = draw.normal(size=(50, 4))
    assert spread_error(y + 7, y) == pytest.approx(0, abs=1e-12)
    assert spread_error(np.sqrt(2) * y, y) == pytest.approx(1 / 3)
    assert spread_error(y / np.sqrt(2), y) == pytest.approx(1 / 3)
    assert spread_error(np.zeros((50, 4)), y) == 1
    assert spread_error(np.zeros((50, 4)), np.ones((50, 4))) == 0


# ---- conditions ------------------------------------------------------------------------------------


def test_cells_are_as_many_as_a_half_has_and_the_same_in_both_forms(screen, split, prediction):
    pairs = Pairs.align(prediction, Truth.of(screen, split))
    found = gather(pairs, 256)
    assert {x.shape for x in (*found.predicted_cells, *found.real_cells)} == {(15, 40)}
    space = pairs.truth.space
    np.testing.assert_allclose(space._components.transform(found.real_cells[0]), found.real_points[0])


def test_one_cell_is_a_repeated_cell_where_predicted_and_no_population_where_real(draw):
    y, points = counts(draw, 6), draw.normal(size=(6, 3))
    assert np.isnan(w1_genes([y], [y[:1]])[0])
    repeated = sp.csr_matrix(np.repeat(y[:1].toarray(), 6, axis=0))
    np.testing.assert_allclose(w1_genes([y[:1]], [y]), w1_genes([repeated], [y]))
    for metric in METRICS:
        if metric.name != "w1_genes":
            found = metric.function([points[:1], points], [points, points[:1]])
            assert np.isfinite(found[0])
            assert np.isnan(found[1])


def test_a_replicate_beats_every_adversary(make, screen, split):
    truth = Truth.of(screen, split)
    replicate = Pairs.align(make.cells([str(label) for label in truth.labels], seed=5), truth).cells
    control = screen.cells_of(screen.controls[0]).astype(float)
    draw, moved = (
        np.random.default_rng(0),
        [x.mean(0).A1 - c for x, c in zip(replicate, truth.control, strict=True)],
    )
    everything = screen.matrix.toarray()
    worse = {
        "no change": [control] * 3,
        "mean for all": [everything[draw.choice(len(everything), 30)]] * 3,
        "one mean": [np.tile(x.mean(0).A1, (30, 1)) for x in replicate],
        "sign flip": [np.maximum(x.toarray() - 2 * d, 0) for x, d in zip(replicate, moved, strict=True)],
        "half effect": [np.maximum(x.toarray() - d / 2, 0) for x, d in zip(replicate, moved, strict=True)],
        "shuffled genes": [draw.permuted(x.toarray(), axis=1) for x in replicate],
    }

    def mean(cells):
        pairs = Pairs(truth=truth, cells=tuple(sp.csr_matrix(x) for x in cells))
        return score(pairs, "distribution").groupby("metric")["value"].mean()

    best = mean(replicate)
    assert set(best.index) == set(NAMES.split())
    scored = {name: mean(cells) for name, cells in worse.items()}
    for name, values in scored.items():
        assert (best[distances] < values[distances]).all(), name
    assert scored["one mean"]["spread_error"] == 1
    for name in ("energy_pca", "w1_genes"):
        order = [scored[kind][name] for kind in ("half effect", "no change", "sign flip")]
        assert order == sorted(order)


def test_the_ceiling_is_that_of_whole_conditions(make):
    """Compared with experiments that are really repeated, of twice as many cells as a half has."""
    screen = make.screen(make.cells(["control", "A", "B", "A+B"], cells=60))
    truth = Truth.of(screen, make.split(screen, lambda label: label.perturbation == "A+B"))
    repeated = [
        score(Pairs.align(make.cells(["A+B"], cells=60, seed=seed), truth), "distribution")
        for seed in range(1, 13)
    ]
    expected = pd.concat(repeated).groupby("metric")["value"].agg(["mean", "std"])
    found = ceiling(truth, "distribution").set_index("metric")["value"]
    for name in NAMES.split():
        assert abs(found[name] - expected.loc[name, "mean"]) < 3 * expected.loc[name, "std"], name
    for name in ("w1_genes", "frechet"):
        assert found[name] == pytest.approx(expected.loc[name, "mean"], rel=0.1)


distances = ["energy_pca", "mmd2_median", "w1_genes", "frechet", "nn_accuracy_error"]


def test_the_dependence_of_genes_shows_in_points_and_not_in_genes(draw):
    """Each gene's values are dealt anew to the cells: marginals stay, and cells are no cells."""
    state = draw.normal(size=(200, 1))
    y, again = (state + 0.1 * draw.normal(size=(200, 5)) + 9 for _ in range(2))
    dealt = draw.permuted(y, axis=0)
    assert w1(sp.csr_matrix(dealt), sp.csr_matrix(y)).max() < 1e-12
    assert energy_pca(dealt, y) > 10 * abs(energy_pca(again, y))
    assert metrics.energy(dealt, y) == energy_pca(dealt, y)
    assert distribution.mmd2_median(dealt, y) > 0.05
