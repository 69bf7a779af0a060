"""Noise is taken out as closed forms and Bayes' rule say."""

import numpy as np
import pytest

from knockon.dynamics import shrinkage
from knockon.dynamics.shrinkage import denoise, low_rank, slopes, stand_out

Draw = np.random.Generator


@pytest.fixture
def draw() -> Draw:
    return np.random.default_rng(0)


def direction(draw: Draw, length: int) -> np.ndarray:
    vector = draw.normal(size=length)
    return vector / np.linalg.norm(vector)


def error(estimate: np.ndarray, truth: np.ndarray) -> float:
    return float(np.square(estimate - truth).mean())


@pytest.mark.parametrize(("rows", "genes"), [(20, 80), (80, 20), (50, 50)])
@pytest.mark.parametrize("theta", [1.2, 2.0, 10.0])
def test_a_singular_value_becomes_its_size_without_noise_times_what_is_left_of_its_directions(
    draw: Draw, rows: int, genes: int, theta: float
) -> None:
    ratio, long = min(rows, genes) / max(rows, genes), max(rows, genes)
    seen = np.sqrt((theta + 1 / theta) * (theta + ratio / theta))  # of a pattern of size theta, with noise
    cosines = (theta**4 - ratio) / np.sqrt((theta**4 + ratio * theta**2) * (theta**4 + theta**2))
    pattern = np.outer(direction(draw, rows), direction(draw, genes)) * np.sqrt(long)
    np.testing.assert_allclose(low_rank(seen * pattern), theta * cosines * pattern, atol=1e-8)


def test_a_singular_value_that_noise_makes_vanishes(draw: Draw) -> None:
    pattern = np.outer(direction(draw, 20), direction(draw, 80)) * np.sqrt(80)
    assert not low_rank(1.49 * pattern).any()  # noise reaches 1 + sqrt(20 / 80)
    assert low_rank(1.51 * pattern).any()


@pytest.mark.parametrize("seed", range(5))
def test_of_pure_noise_nearly_nothing_is_left(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=(60, 300))
    assert np.square(low_rank(noise)).mean() < 0.02
    assert np.square(stand_out(noise)).mean() < 0.02


def test_the_error_of_a_planted_pattern_is_the_smallest_possible(draw: Draw) -> None:
    theta, ratio = 2.0, 100 / 400
    pattern = theta * np.outer(direction(draw, 100), direction(draw, 400)) * np.sqrt(400)
    white = pattern + draw.normal(size=pattern.shape)
    cosines = (theta**4 - ratio) ** 2 / ((theta**4 + ratio * theta**2) * (theta**4 + theta**2))
    expected = theta**2 * (1 - cosines) / 100
    assert error(low_rank(white), pattern) == pytest.approx(expected, rel=0.2)
    assert expected < 0.3 * np.square(pattern).mean()


@pytest.mark.parametrize("variance", [4.0, 64.0])
def test_entries_of_one_variance_are_shrunk_by_one_factor(draw: Draw, variance: float) -> None:
    truth = draw.normal(scale=np.sqrt(variance), size=(100, 400))
    white = truth + draw.normal(size=truth.shape)
    best = white * variance / (1 + variance)
    assert error(stand_out(white), best) < 0.01
    assert error(stand_out(white), truth) == pytest.approx(variance / (1 + variance), rel=0.03)


def test_entries_of_a_known_mixture_become_their_posterior_mean(draw: Draw) -> None:
    share, variance = 0.1, 64.0
    effect = draw.normal(scale=np.sqrt(variance), size=(200, 500)) * (draw.random((200, 500)) < share)
    white = effect + draw.normal(size=effect.shape)
    wide = share * np.exp(-(white**2) / (2 * (1 + variance))) / np.sqrt(1 + variance)
    narrow = (1 - share) * np.exp(-(white**2) / 2)
    best = wide / (wide + narrow) * white * variance / (1 + variance)
    assert error(stand_out(white), best) < 0.01
    assert error(stand_out(white), effect) < 1.05 * error(best, effect)


def test_a_spike_is_kept_and_the_noise_around_it_is_not(draw: Draw) -> None:
    white = draw.normal(size=(50, 200))
    white[3, 7] = -40.0
    found = stand_out(white)
    assert found[3, 7] == pytest.approx(-40, rel=0.01)
    assert np.square(np.delete(found, 3, axis=0)).mean() < 0.02
    np.testing.assert_array_equal(stand_out(-white), -found)


def test_many_rows_cost_no_other_answer_than_few(draw: Draw) -> None:
    """What is kept of an entry follows from its size, and from the shares of all entries."""
    white = draw.normal(size=(40, 100)) * np.where(draw.random((40, 100)) < 0.2, 6, 1)
    np.testing.assert_allclose(
        stand_out(np.tile(white, (3, 1))), np.tile(stand_out(white), (3, 1)), rtol=1e-4
    )


def test_some_of_many_entries_tell_how_many_stand_out(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    white = draw.normal(size=(300, 200)) * np.where(draw.random((300, 200)) < 0.1, 6, 1)
    every = stand_out(white)
    monkeypatch.setattr(shrinkage, "ENTRIES", 10_000)
    assert error(stand_out(white), every) < 0.01


def test_effects_with_unequal_noise_come_nearer_to_the_truth(draw: Draw) -> None:
    rows, genes = 40, 200
    truth = draw.normal(size=(rows, 2)) @ draw.normal(size=(2, genes))
    truth[np.arange(rows), np.arange(rows)] -= 15  # a perturbed gene is its own
    per_row, per_gene = draw.uniform(0.2, 5, rows), draw.uniform(0.1, 4, genes)
    noisy = truth + draw.normal(size=truth.shape) * np.sqrt(np.outer(per_row, per_gene))
    found = denoise(noisy, per_row, per_gene)
    assert error(found, truth) < 0.35 * error(noisy, truth)
    own = found[np.arange(rows), np.arange(rows)] - truth[np.arange(rows), np.arange(rows)]
    assert np.abs(own).mean() < 3
    alike = denoise(noisy, np.full(rows, per_row.mean()), np.full(genes, per_gene.mean()))
    assert error(found, truth) < error(alike, truth)


def test_scales_of_rows_genes_and_units_do_not_matter(draw: Draw) -> None:
    noisy, per_row, per_gene = draw.normal(size=(10, 30)), draw.uniform(1, 2, 10), draw.uniform(1, 2, 30)
    found = denoise(noisy, per_row, per_gene)
    np.testing.assert_allclose(denoise(noisy, 4 * per_row, per_gene / 4), found)
    np.testing.assert_allclose(denoise(1e-3 * noisy, 1e-6 * per_row, per_gene), 1e-3 * found, rtol=1e-5)


def test_genes_without_noise_are_left_alone(draw: Draw) -> None:
    noisy, per_gene = draw.normal(size=(8, 6)), np.array([0, 1.0, 0, 2, 1, 1])
    before = noisy.copy()
    found = denoise(noisy, np.ones(8), per_gene)
    np.testing.assert_array_equal(found[:, per_gene == 0], before[:, per_gene == 0])
    np.testing.assert_array_equal(noisy, before)
    expected = denoise(noisy[:, per_gene > 0], np.ones(8), per_gene[per_gene > 0])
    np.testing.assert_array_equal(found[:, per_gene > 0], expected)
    np.testing.assert_array_equal(denoise(noisy, np.ones(8), np.zeros(6)), noisy)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 5), (5, 1), (1, 1)])
def test_the_smallest_tables(draw: Draw, shape: tuple[int, int]) -> None:
    noisy = draw.normal(size=shape)
    found = denoise(noisy, np.ones(shape[0]), np.ones(shape[1]))
    assert found.shape == shape
    assert (np.abs(found) <= np.abs(noisy) + 1e-9).all()


def test_slopes_are_those_of_least_squares_where_these_lie_within_0_and_1(draw: Draw) -> None:
    guesses = draw.normal(size=(50, 2))
    measured = guesses @ [0.3, 0.8] + draw.normal(scale=0.1, size=50)
    free = np.linalg.lstsq(guesses, measured)[0]
    np.testing.assert_allclose(slopes(guesses.T @ guesses, guesses.T @ measured), free, rtol=1e-6)


def test_slopes_are_bounded_and_others_make_up_for_it(draw: Draw) -> None:
    guesses = draw.normal(size=(50, 2)) + draw.normal(size=(50, 1))
    measured = guesses @ [-0.5, 0.6]
    alone = guesses[:, 1] @ measured / np.square(guesses[:, 1]).sum()
    found = slopes(guesses.T @ guesses, guesses.T @ measured)
    np.testing.assert_allclose(found, [0, alone], atol=1e-6)
    np.testing.assert_allclose(slopes(np.eye(2), np.array([2.0, 0.5])), [1, 0.5])


def test_a_guess_that_is_always_zero_changes_no_other() -> None:
    np.testing.assert_allclose(slopes(np.diag([0, 2.0]), np.array([0, 1.0])), [0, 0.5])
    np.testing.assert_allclose(slopes(np.diag([0, 1.0]), np.array([0, 2.0])), [0, 1])
    np.testing.assert_allclose(slopes(np.ones((2, 2)), np.full(2, 0.5)).sum(), 0.5)  # both the same
