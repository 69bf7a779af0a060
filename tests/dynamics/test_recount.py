"""Cells moved to another mean stay counts of the same kind."""

import math

import pytest
import torch
from torch import Tensor

from knockon.dynamics.recount import TOUCH, changes, move, rates, reached, recount, touch_up
from knockon.types import Noise

PHI = 0.5
UNIT = 2.0


def negative_binomial(
    rng: torch.Generator, mean: float, shape: tuple[int, int], phi: float = PHI
) -> tuple[Tensor, Tensor]:
    """Counts, and the rates that they were drawn at."""
    rate = torch._standard_gamma(torch.full(shape, 1 / phi), generator=rng) * phi * mean
    return torch.poisson(rate, generator=rng), rate


def log1p(count: Tensor, unit: float = UNIT) -> Tensor:
    return (unit * count).log1p()


def moved(
    cells: Tensor, mean: Tensor, rng: torch.Generator, *, still: float = 0.3, phi: float = PHI
) -> Tensor:
    unit, dispersion = torch.full((len(cells), 1), UNIT), torch.full_like(mean, phi)
    return move(cells, mean, unit=unit, dispersion=dispersion, still=still, noise=Noise(rng))


@pytest.mark.parametrize("ratio", [0.1, 0.6, 1.0, 1.7, 8.0])
def test_negative_binomial_counts_stay_negative_binomial(rng: torch.Generator, ratio: float) -> None:
    mean, number = 1.5, 200_000
    count, _ = negative_binomial(rng, mean, (number, 1))
    unit, dispersion = torch.ones(number, 1), torch.tensor([PHI])
    change = torch.tensor([math.log(ratio)])
    got = recount(
        count, rates(count, unit, dispersion, torch.zeros(1)), change, dispersion, Noise(rng)
    ).double()
    expected = ratio * mean
    variance = expected + PHI * expected**2
    zeros = (1 + PHI * expected) ** (-1 / PHI)
    error = 5 / math.sqrt(number)
    assert torch.equal(got, got.round())
    assert got.mean().item() == pytest.approx(expected, abs=error * math.sqrt(variance))
    assert got.var().item() == pytest.approx(variance, rel=0.04)
    assert (got == 0).double().mean().item() == pytest.approx(zeros, abs=error)


@pytest.mark.parametrize("ratio", [0.3, 3.0])
def test_a_cell_stays_what_it_was_as_far_as_it_can(rng: torch.Generator, ratio: float) -> None:
    count, _ = negative_binomial(rng, 4.0, (1000, 1))
    unit, dispersion = torch.ones(1000, 1), torch.tensor([PHI])
    rate = rates(count, unit, dispersion, torch.zeros(1))
    got = recount(count, rate, torch.tensor([math.log(ratio)]), dispersion, Noise(rng))
    assert (got <= count).all() if ratio < 1 else (got >= count).all()
    assert torch.corrcoef(torch.cat([got, count], dim=1).T)[0, 1] > 0.7


def test_without_a_change_counts_stay(rng: torch.Generator) -> None:
    count, rate = negative_binomial(rng, 2.0, (50, 6))
    assert torch.equal(recount(count, rate, torch.zeros(6), torch.full((6,), PHI), Noise(rng)), count)


def test_rates_are_the_posterior_mean(rng: torch.Generator) -> None:
    count, rate = negative_binomial(rng, 3.0, (100_000, 1))
    unit, dispersion = torch.ones(len(count), 1), torch.tensor([PHI])
    found = rates(count, unit, dispersion, torch.zeros(1))
    for seen in range(6):
        here = (count == seen)[:, 0]
        assert found[here].unique().numel() == 1
        closed = (1 / PHI + seen) / (1 / PHI + 3.0) * 3.0
        assert found[here][0].item() == pytest.approx(closed, rel=0.01)
        assert rate[here].mean().item() == pytest.approx(closed, rel=0.05)


def test_rates_know_that_counts_of_deep_cells_are_worth_less() -> None:
    count, unit = torch.tensor([[2.0], [4.0]]), torch.tensor([[2.0], [1.0]])
    found = rates(
        count, unit, torch.tensor([1e-6]), torch.zeros(1)
    )  # without dispersion all cells have one rate
    torch.testing.assert_close(found * unit, torch.full((2, 1), 4.0), rtol=1e-4, atol=0)
    found = rates(count, unit, torch.tensor([1e6]), torch.zeros(1))  # with much of it each has its own
    torch.testing.assert_close(found, count, rtol=1e-4, atol=0)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_the_mean_of_single_counts_that_are_lost_is_exact(ratio: float) -> None:
    count = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    unit = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    change = torch.full((2,), math.log(ratio))
    expected = (ratio * count * unit.log1p()).mean(0)
    torch.testing.assert_close(reached(count, unit, count, change, torch.full((2,), PHI)), expected)


@pytest.mark.parametrize("ratio", [0.2, 5.0])
def test_the_mean_of_many_counts_is_that_of_their_expectation(ratio: float) -> None:
    count, unit = torch.tensor([[1e5], [3e5]]), torch.full((2, 1), 0.5)
    found = reached(count, unit, count, torch.tensor([math.log(ratio)]), torch.tensor([PHI]))
    torch.testing.assert_close(found, (0.5 * ratio * count).log1p().mean(0))


def test_the_mean_of_single_counts_that_are_found_is_that_of_rare_events() -> None:
    unit, rate, double = torch.full((1, 1), UNIT), torch.tensor([[1e-3]]), torch.tensor([math.log(2)])
    found = reached(torch.zeros(1, 1), unit, rate, double, torch.tensor([PHI]))
    assert found.item() == pytest.approx(1e-3 * math.log1p(UNIT), rel=2e-3)


@pytest.mark.parametrize("phi", [0.1, 2.0, 10.0])
def test_as_many_cells_find_a_gene_as_are_expected_to(rng: torch.Generator, phi: float) -> None:
    """Where one count is worth very much, its mean only tells how many cells have any."""
    count, worth = torch.zeros(100_000, 1), torch.full((100_000, 1), 1e30)
    rate, change, dispersion = torch.full_like(count, 0.4), torch.tensor([2.0]), torch.tensor([phi])
    got = recount(count, rate, change, dispersion, Noise(rng))
    expected = reached(count, worth, rate, change, dispersion) / worth.log1p().mean()
    assert (got > 0).float().mean().item() == pytest.approx(expected.item(), abs=0.03)


def test_what_is_reached_grows_with_the_change(rng: torch.Generator) -> None:
    count, _ = negative_binomial(rng, 1.0, (64, 3))
    unit = torch.rand(64, 1, generator=rng) + 0.5
    dispersion = torch.full((3,), PHI)
    rate = rates(count, unit, dispersion, torch.zeros(3))
    steps = torch.linspace(-6, 6, 49)
    values = torch.stack([reached(count, unit, rate, step.expand(3), dispersion) for step in steps])
    assert (values.diff(dim=0) > 0).all()
    sought = changes(count, unit, rate, values[30], dispersion)
    torch.testing.assert_close(sought, steps[30].expand(3), atol=2e-3, rtol=0)


@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.25])
def test_small_changes_reach_the_mean_exactly_without_a_draw(rng: torch.Generator, ratio: float) -> None:
    cells = log1p(negative_binomial(rng, 1.0, (60, 8))[0])
    mean = (cells.expm1() * ratio).log1p().mean(0)
    before = rng.get_state()
    got = moved(cells, mean, rng)
    assert torch.equal(rng.get_state(), before)
    torch.testing.assert_close(got.mean(0), mean, atol=1e-5, rtol=0)
    assert torch.equal(got > 0, cells > 0)
    torch.testing.assert_close(got.expm1(), ratio * cells.expm1(), rtol=1e-3, atol=1e-4)


def test_cells_that_have_the_mean_come_back(rng: torch.Generator) -> None:
    cells = log1p(negative_binomial(rng, 0.7, (40, 10))[0])
    torch.testing.assert_close(moved(cells, cells.mean(0), rng), cells, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("phi", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    ("ratio", "tolerance"), [(0.2, 0.02), (0.5, 0.02), (2.0, 0.01), (5.0, 0.02), (20.0, 0.04)]
)
def test_large_changes_reach_the_mean_nearly_and_the_cells_of_that_mean(
    rng: torch.Generator, ratio: float, tolerance: float, phi: float
) -> None:
    cells = log1p(negative_binomial(rng, 1.0, (128, 40), phi)[0])
    wanted = log1p(negative_binomial(rng, ratio, (100_000, 1), phi)[0])
    got = moved(cells, wanted.mean(0).expand(40), rng, phi=phi)
    assert got.mean().item() == pytest.approx(wanted.mean().item(), rel=tolerance, abs=0.01)
    assert (got > 0).float().mean().item() == pytest.approx((wanted > 0).float().mean().item(), abs=0.04)
    assert got.std(0).mean().item() == pytest.approx(wanted.std().item(), rel=0.1)


def test_a_gene_is_found_in_more_cells_when_its_mean_rises_and_in_fewer_when_it_falls(
    rng: torch.Generator,
) -> None:
    cells = log1p(negative_binomial(rng, 1.0, (300, 2))[0])
    got = moved(cells, cells.mean(0) * torch.tensor([2.0, 0.4]), rng)
    on, before = (got > 0).float().mean(0), (cells > 0).float().mean(0)
    assert on[0] > before[0] + 0.1
    assert on[1] < before[1] - 0.1


def test_counts_stay_whole_but_for_one_factor_of_the_gene(rng: torch.Generator) -> None:
    cells = log1p(negative_binomial(rng, 2.0, (100, 6))[0])
    size = moved(cells, torch.tensor([0.3, 0.5, 1.0, 2.0, 3.0, 3.5]), rng).expm1() / UNIT
    for gene in size.T:
        values = gene[gene > 0] / gene[gene > 0].min()
        torch.testing.assert_close(values, values.round(), atol=2e-3, rtol=0)


def test_only_genes_that_move_are_drawn(rng: torch.Generator) -> None:
    cells = log1p(negative_binomial(rng, 1.0, (50, 3))[0])
    mean = cells.mean(0) * torch.tensor([1.0, 3.0, 1.0])
    one, other = (moved(cells, mean, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(one[:, [0, 2]], other[:, [0, 2]])
    assert not torch.equal(one[:, 1], other[:, 1])
    assert torch.equal(one, moved(cells, mean, torch.Generator().manual_seed(1)))


def test_silent_genes_stay_silent_and_means_of_zero_silence(rng: torch.Generator) -> None:
    cells = log1p(negative_binomial(rng, 1.0, (50, 3))[0])
    cells[:, 0] = 0
    mean = torch.stack([torch.zeros(()), torch.zeros(()), cells[:, 2].mean()])
    got = moved(cells, mean, rng)
    assert not got[:, 0].any()
    assert got[:, 1].mean() < 0.01
    assert (got[:, 2] > 0).any()


def test_a_silent_gene_is_switched_on_where_its_mean_is_high(rng: torch.Generator) -> None:
    cells = torch.cat([torch.zeros(400, 1), log1p(negative_binomial(rng, 1.0, (400, 1))[0])], dim=1)
    got = moved(cells, torch.tensor([1.0, cells[:, 1].mean()]), rng)
    assert got[:, 0].mean().item() == pytest.approx(1.0, abs=0.05)
    assert 0.4 < (got[:, 0] > 0).float().mean() < 1  # counts are found, not added to every cell


def test_one_cell_and_no_counts_at_all(rng: torch.Generator) -> None:
    got = moved(torch.zeros(1, 4), torch.tensor([0.0, 1e-6, 0.1, 3.0]), rng)
    assert got.isfinite().all()
    assert (got >= 0).all()
    assert (moved(log1p(torch.ones(1, 4)), torch.tensor([0.0, 1.0, 3.0, 8.0]), rng)).isfinite().all()


def test_double_precision_stays(rng: torch.Generator) -> None:
    cells = log1p(negative_binomial(rng, 1.0, (30, 4))[0]).double()
    got = moved(cells, 2 * cells.mean(0), rng)
    assert got.dtype == torch.float64


def test_touching_up_is_bounded(rng: torch.Generator) -> None:
    cells = log1p(negative_binomial(rng, 3.0, (30, 2))[0])
    got = touch_up(cells, torch.tensor([0.0, 9.0]))
    factor = torch.tensor([-TOUCH, TOUCH]).exp()
    torch.testing.assert_close(got.expm1(), factor * cells.expm1(), rtol=1e-5, atol=1e-5)
