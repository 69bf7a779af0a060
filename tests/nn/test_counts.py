import numpy as np
import pytest
import torch

from knockon.nn.counts import (
    ABOVE,
    STEP,
    Dispersion,
    normalized,
    rounded,
    single_counts,
    soften,
    whole_counts,
)
from knockon.types import Noise

GENES = 40
CAP = np.exp(ABOVE * STEP)


def draw_cells(seed: int, cells: int = 1500, genes: int = GENES) -> np.ndarray:
    """Log1p of normalized negative-binomial counts, from hardly ever on to always on."""
    rng = np.random.default_rng(seed)
    mean = np.geomspace(0.02, 60, genes) * rng.lognormal(0, 0.4, (cells, 1))
    return np.log1p(rng.poisson(mean * rng.gamma(2, 0.5, (cells, genes))) * 1.7).astype(np.float32)


@pytest.fixture
def population() -> np.ndarray:
    return draw_cells(0)


@pytest.fixture
def layer(population: np.ndarray) -> Dispersion:
    layer = Dispersion(GENES)
    layer.fit([np.array_split(population, 3)], [population])
    return layer


def move(layer: Dispersion, cells: np.ndarray, mean: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    index = torch.zeros(1, dtype=torch.long)
    moved = layer(torch.from_numpy(cells)[None], torch.from_numpy(mean).float()[None], index, Noise(rng))
    return moved[0].numpy()


def test_population_mean_is_exact(layer: Dispersion, population: np.ndarray) -> None:
    np.testing.assert_allclose(layer.mean[0], population.mean(0), rtol=1e-5)


@pytest.mark.parametrize("fold", [0.001, 0.03, 0.5, 0.99, 1.01, 1.5, 3.0, CAP * 0.99])
def test_scaling_reaches_the_wanted_mean(layer: Dispersion, population: np.ndarray, fold: float) -> None:
    wanted = np.log1p(np.expm1(population.astype(np.float64)) * fold).mean(0)
    moved = move(layer, population, wanted)
    np.testing.assert_allclose(moved.mean(0, dtype=np.float64), wanted, rtol=1e-3)
    assert ((moved == 0) == (population == 0)).all()  # nothing is switched on without need


def test_scaling_gives_back_the_cells_of_a_scaled_population(
    layer: Dispersion, population: np.ndarray
) -> None:
    scaled = np.log1p(np.expm1(population) * 0.4)
    np.testing.assert_allclose(move(layer, population, scaled.mean(0)), scaled, rtol=2e-3, atol=1e-5)


def test_own_mean_returns_the_very_same_cells(layer: Dispersion, population: np.ndarray) -> None:
    assert (move(layer, population, layer.mean[0].numpy()) == population).all()


def test_mean_of_zero_switches_everything_off(layer: Dispersion, population: np.ndarray) -> None:
    assert (move(layer, population, np.zeros(GENES)) == 0).all()


def test_beyond_scaling_genes_are_switched_on_where_they_are_off(
    layer: Dispersion, population: np.ndarray
) -> None:
    reach = np.log1p(np.expm1(population.astype(np.float64)) * CAP).mean(0)
    off = (population == 0).mean(0)
    typical = layer.typical.numpy()
    wanted = reach + 0.4 * off * typical
    moved = move(layer, population, wanted)
    switched = (population == 0) & (moved > 0)
    np.testing.assert_allclose(switched.mean(0), 0.4 * off, atol=4 * np.sqrt(0.25 / len(population)))
    means = [move(layer, population, wanted, seed).mean(0) for seed in range(20)]
    np.testing.assert_allclose(np.mean(means, axis=0), wanted, rtol=0.01, atol=0.002)
    assert np.isclose(moved[switched], np.broadcast_to(typical, moved.shape)[switched]).all()


def test_what_switching_on_cannot_give_is_added_to_every_cell(
    layer: Dispersion, population: np.ndarray
) -> None:
    wanted = np.full(GENES, 12.0)
    np.testing.assert_allclose(move(layer, population, wanted).mean(0), wanted, rtol=1e-3)


def test_silent_gene_is_switched_on_at_its_typical_value() -> None:
    control, treated = draw_cells(1), draw_cells(2)
    control[:, 30] = 0
    control[:, 31] = treated[:, 31] = 0
    layer = Dispersion(GENES)
    layer.fit([[control]], [control, treated])
    wanted = control.mean(0)
    wanted[30], wanted[31] = treated[:, 30].mean(), 0.01
    means = [move(layer, control, wanted, seed).mean(0) for seed in range(20)]
    moved = move(layer, control, wanted)
    np.testing.assert_allclose(np.mean(means, axis=0)[30], wanted[30], rtol=0.02)
    np.testing.assert_allclose(np.mean(means, axis=0)[31], wanted[31], rtol=0.3)
    np.testing.assert_allclose((moved[:, 30] > 0).mean(), (treated[:, 30] > 0).mean(), atol=0.05)


def test_population_without_any_count_still_gives_finite_cells() -> None:
    layer = Dispersion(2)
    nothing = np.zeros((5, 2), dtype=np.float32)
    layer.fit([[nothing]], [nothing])
    assert np.isfinite(move(layer, nothing, np.array([0.0, 0.5]))).all()


def test_fate_of_a_cell_does_not_depend_on_the_others(layer: Dispersion, population: np.ndarray) -> None:
    wanted = population.mean(0) * 0.5
    together = move(layer, population[:7], wanted)
    np.testing.assert_array_equal(move(layer, population[:1], wanted), together[:1])


def test_same_generator_same_cells(layer: Dispersion, population: np.ndarray) -> None:
    wanted = population.mean(0) + 0.3
    first, again, other = (move(layer, population, wanted, seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_populations_are_kept_apart_and_pooled_last() -> None:
    a, b = draw_cells(3, 300), draw_cells(4, 100) / 2
    layer = Dispersion(GENES)
    layer.fit([[a], [b]], [a, b])
    for index, cells in enumerate((a, b, np.concatenate([a, b]))):
        np.testing.assert_allclose(layer.mean[index], cells.mean(0), rtol=1e-5)
        np.testing.assert_allclose(layer.off[index], (cells == 0).mean(0), atol=1e-6)


def test_whole_counts_keep_their_expectation(rng):
    """In normalized counts, with the depth of each control cell; what is above one count stays."""
    depth = torch.tensor([0.5, 1.0, 4.0])
    control = torch.log1p(torch.tensor([[1.0, 0, 3]] * 3) / depth[:, None])[None]
    values = torch.log1p(torch.tensor([[0.3, 0.9, 2.5]] * 3) / depth[:, None])[None]
    many = 20_000
    ones = single_counts(control, torch.ones(())).repeat(many, 1, 1)
    drawn = whole_counts(values.repeat(many, 1, 1), ones, Noise(rng))
    counts = drawn.expm1() * depth[:, None]
    assert torch.allclose(counts.mean(0), values.expm1()[0] * depth[:, None], atol=0.02)
    low = counts[..., :2]
    assert torch.isclose(low, torch.zeros(())).logical_or(torch.isclose(low, torch.ones(()))).all()
    assert torch.allclose(counts[..., 2], torch.tensor(2.5))


def test_an_empty_control_cell_has_counts_of_a_typical_cell(rng):
    one = torch.tensor(0.4)
    assert (single_counts(torch.zeros(1, 5, 4), one) == one).all()
    drawn = whole_counts(torch.full((1, 500, 4), 0.2), one, Noise(rng))
    assert set(drawn.unique().tolist()) == {0.0, one.item()}


def test_small_changes_are_undone_and_others_shrunk():
    one = torch.tensor([[[0.5]]])
    counts = torch.tensor([[[0.0, 1.0, 3.0, 0.0, 2.0]]])
    start = (counts * one.expm1()).log1p()
    moved = ((counts + torch.tensor([0.05, -0.05, 1.0, 0.4, -2.0])) * one.expm1()).log1p()
    softened = soften(moved, start, one, 0.1).expm1() / one.expm1()
    torch.testing.assert_close(softened, torch.tensor([[[0.0, 1.0, 3.9, 0.3, 0.1]]]))
    assert softened[0, 0, 0] == 0


def test_counts_are_brought_to_a_total():
    counts = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(normalized(counts, 8.0).expm1(), torch.tensor([[2.0, 6.0], [0.0, 0.0]]))
    torch.testing.assert_close(normalized(counts).expm1().sum(-1), torch.tensor([10_000.0, 0.0]))


def test_rounding_keeps_expectations_and_whole_counts(rng):
    counts = torch.tensor([0.0, 0.2, 1.5, 6.0 + 1e-6, 7.0 - 1e-6]).expand(1, 20_000, 5)
    drawn = rounded(counts, Noise(rng))
    assert torch.equal(drawn, drawn.round())
    assert drawn[0].mean(0).tolist() == pytest.approx([0.0, 0.2, 1.5, 6.0, 7.0], abs=0.015)
    assert drawn[0, :, 3:].unique().tolist() == [6.0, 7.0]
