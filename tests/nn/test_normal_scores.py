import numpy as np
import pytest
import torch
from scipy.stats import kstest

from knockon.nn.normal_scores import NormalScores
from knockon.types import Noise

GENES = 5


@pytest.fixture(scope="module")
def cells() -> np.ndarray:
    """Four conditions: two sparse genes, one without zeros, one that never varies, one that is never on."""
    draw = np.random.default_rng(0)
    counts = draw.negative_binomial(2, [[[0.8, 0.5]], [[0.8, 0.5]], [[0.7, 0.4]], [[0.9, 0.6]]], (4, 500, 2))
    depth = draw.uniform(0.5, 2, (4, 500, 1))
    dense = draw.gamma(5, 0.3, (4, 500, 1))
    same = np.ones((4, 500, 1))
    return np.concatenate([np.log1p(counts / depth), dense, same, 0 * same], axis=2).astype(np.float32)


@pytest.fixture(scope="module")
def scores(cells: np.ndarray) -> NormalScores:
    made = NormalScores(GENES)
    made.fit(list(cells))
    return made


def test_scores_of_training_cells_are_standard_normal(rng, scores, cells):
    found = scores(torch.from_numpy(cells), Noise(rng)).flatten(0, 1)
    assert found.isfinite().all()
    for gene in range(GENES):
        assert kstest(found[:, gene].numpy(), "norm").statistic < 0.03


def test_values_come_back(rng, scores, cells):
    values = torch.from_numpy(cells)
    back = scores.inverse(scores(values, Noise(rng)))
    assert torch.equal(back == 0, values == 0)
    error = (back - values).abs().flatten(0, 1)
    # the largest of 2,000 values is beyond the table's steps
    assert error.quantile(0.99, dim=0).max() < 0.05
    assert torch.equal(back[..., 3:], values[..., 3:])


def test_normal_numbers_become_cells(rng, scores, cells):
    drawn = scores.inverse(torch.randn(4000, GENES, generator=rng))
    real = torch.from_numpy(cells).flatten(0, 1)
    torch.testing.assert_close((drawn == 0).float().mean(0), (real == 0).float().mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.mean(0), real.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), real.std(0), atol=0.03, rtol=0)
    assert (drawn >= 0).all()
    assert drawn[:, 0][drawn[:, 0] > 0].min() >= real[:, 0][real[:, 0] > 0].min()


def test_larger_scores_have_larger_values(scores):
    grid = torch.linspace(-5, 5, 1001)[:, None].expand(-1, GENES)
    assert (scores.inverse(grid).diff(dim=0) >= 0).all()


def test_cells_around_a_center_have_the_mean(rng, scores, cells):
    """Within what the table can: no gene is larger than it was ever measured."""
    wanted = torch.from_numpy(cells).mean((0, 1)) * torch.tensor([[0.5], [1.0], [1.5]])
    center = scores.center(wanted)
    drawn = center[:, None] + scores.spread * torch.randn(3, 20_000, GENES, generator=rng)
    found = scores.inverse(drawn).mean(1)
    torch.testing.assert_close(found[:, :3], wanted[:, :3], atol=0.02, rtol=0.02)
    assert (center[1, :3].abs() < 0.1).all()


@pytest.mark.parametrize("on", [0.001, 0.002, 0.01])
def test_sparse_genes_have_the_mean_too(rng, on):
    draw = np.random.default_rng(0)
    cells = ((draw.random((8000, 50)) < on) * draw.gamma(9, 0.1, (8000, 50))).astype(np.float32)
    made = NormalScores(50)
    made.fit([cells[:4000], cells[4000:]])
    wanted = torch.from_numpy(cells.mean(0))[None] * torch.tensor([[0.25], [1.0], [4.0]])
    center = made.center(wanted)[:, None]
    found = made.inverse(center + made.spread * torch.randn(3, 20_000, 50, generator=rng))
    torch.testing.assert_close(found.mean((1, 2)), wanted.mean(1), rtol=0.15, atol=0)


def test_what_is_not_a_number_stays_so(scores):
    assert scores.inverse(torch.full((2, GENES), torch.nan))[:, :3].isnan().all()


def test_what_no_score_reaches_is_as_near_as_it_can_be(scores):
    center = scores.center(torch.tensor([[0.0] * GENES, [100.0] * GENES]))
    assert center.isfinite().all()
    low, high = scores.inverse(center)
    assert (low[:2] == 0).all()
    assert (high[:3] >= scores.values[:3, -2]).all()


def test_spread_is_that_within_conditions(rng):
    draw = np.random.default_rng(0)
    shifted = [draw.normal(5 + shift, 1, (400, 1)).astype(np.float32) for shift in (-2, 0, 2)]
    made = NormalScores(1)
    made.fit(shifted)
    within = np.mean([made(torch.from_numpy(x)[None], Noise(rng))[0].var().item() for x in shifted]) ** 0.5
    assert made.spread.item() == pytest.approx(within, rel=0.02)
    assert made.spread.item() < 0.7
    alone = NormalScores(1)
    alone.fit([x[:1] for x in shifted])
    assert alone.spread.item() == 1


def test_some_genes_are_those_of_the_panel(rng, scores, cells):
    genes = torch.tensor([2, 0])
    values = torch.from_numpy(cells[:, :10])
    part = scores(values[..., genes], Noise(rng), genes)
    whole = scores.inverse(part @ torch.eye(GENES)[genes])
    torch.testing.assert_close(scores.inverse(part, genes), whole[..., genes])
    assert torch.equal(part[..., 0], scores(values, Noise(rng))[..., 2])  # without ties nothing is drawn


def test_sets_draw_for_themselves(scores, cells):
    def noise(*seeds: int) -> Noise:
        return Noise(*(torch.Generator().manual_seed(seed) for seed in seeds))

    values = torch.from_numpy(cells[:2, :10])
    together = scores(values, noise(1, 2))
    assert torch.equal(together[1:], scores(values[1:], noise(2)))


def test_centers_are_no_further_down_than_zeros_can_tell(scores):
    """A gene that is on in a cell of a thousand has random scores where it is off, its center among them."""
    cells = np.zeros((2000, 1), dtype=np.float32)
    cells[:2] = 1
    rare = NormalScores(1)
    rare.fit([cells[:1000], cells[1000:]])
    center = rare.center(torch.zeros(1, 1))
    assert -1.5 < center.item() < 0
    assert (rare.inverse(center + 3 * torch.linspace(-1, 1, 101)[:, None]) == 0).all()
    assert scores.center(torch.zeros(1, GENES)).isfinite().all()
