import math

import pytest
import torch

from knockon.dynamics import discrepancy


@pytest.fixture
def samples(rng):
    x = torch.randn(2, 12, 5, generator=rng, dtype=torch.float64)
    y = 1.5 * torch.randn(2, 9, 5, generator=rng, dtype=torch.float64) + 0.5
    return x, y


def test_squared_distances(samples):
    x, y = samples
    torch.testing.assert_close(discrepancy.squared_distances(x, y), torch.cdist(x, y).square())


def test_squared_distances_far_from_the_origin(rng):
    x = torch.randn(20, 5, generator=rng)
    far = discrepancy.squared_distances(x + 1000, x + 1000)
    torch.testing.assert_close(far, torch.cdist(x, x).square(), rtol=1e-3, atol=1e-2)


def test_off_diagonal():
    square = torch.arange(9.0).view(3, 3)
    assert discrepancy.off_diagonal(square).tolist() == [1, 2, 3, 5, 6, 7]


def test_bandwidths_follow_the_lower_median():
    y = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(
        discrepancy.median_bandwidths(y), (4 * torch.tensor(discrepancy.FACTORS)).sqrt()
    )
    y = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # squared distances 1 4 9 16 36 49
    assert discrepancy.median_bandwidths(y, (1.0,)).item() == pytest.approx(3.0)


def test_mmd_by_hand(samples):
    x, y = (sample[0] for sample in samples)
    bandwidth = torch.tensor([1.3], dtype=torch.float64)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-((a - b) ** 2).sum().item() / (2 * 1.3**2))

    def within(z: torch.Tensor) -> float:
        n = len(z)
        return sum(kernel(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    between = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    ours = discrepancy.mmd_per_kernel(x, y, bandwidth)
    assert ours.item() == pytest.approx(within(x) + within(y) - 2 * between)


def test_sets_do_not_depend_on_each_other(samples):
    x, y = samples
    for function in (discrepancy.mmd, discrepancy.energy_distance):
        together = function(x, y)
        torch.testing.assert_close(together, torch.stack([function(a, b) for a, b in zip(x, y, strict=True)]))


def test_unbiased_estimates_vanish_on_average(rng):
    x, y = torch.randn(2, 4000, 6, 3, generator=rng, dtype=torch.float64)
    one = torch.ones(4000, 1, dtype=torch.float64)
    for values in (discrepancy.mmd_per_kernel(x, y, one), discrepancy.energy_distance(x, y)):
        assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))


def test_energy_distance_of_shifted_gaussians(rng):
    """2 E|X-Y| - E|X-X'| - E|Y-Y'| in one dimension, where E|N(m, 2)| is known."""
    x = torch.randn(1500, 1, generator=rng, dtype=torch.float64)
    y = torch.randn(1500, 1, generator=rng, dtype=torch.float64) + 1
    folded = 2 / math.sqrt(math.pi) * math.exp(-0.25) + math.erf(0.5)
    truth = 2 * folded - 2 * 2 / math.sqrt(math.pi)
    assert discrepancy.energy_distance(x, y).item() == pytest.approx(truth, abs=0.1)


def test_the_biased_energy_distance_is_zero_only_for_the_same_sample(samples):
    x, y = samples
    torch.testing.assert_close(
        discrepancy.energy_distance(x, x, unbiased=False), torch.zeros(2).double(), rtol=0, atol=1e-12
    )
    assert (discrepancy.energy_distance(x, y, unbiased=False) > 0).all()


def test_gradients_stay_finite_where_cells_coincide(rng):
    x = torch.randn(1, 4, 3, generator=rng).expand(4, 4, 3).clone().requires_grad_()
    loss = discrepancy.energy_distance(x, x.detach()).sum() + discrepancy.mmd(x, x.detach()).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("unbiased", [True, False])
def test_cells_that_do_not_count_change_nothing(rng, unbiased):
    x, y = torch.randn(2, 2, 6, 4, generator=rng)
    real = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    masked = discrepancy.energy_distance(x, y, unbiased=unbiased, real=(real, real))
    torch.testing.assert_close(masked[0], discrepancy.energy_distance(x[0, :4], y[0, :4], unbiased=unbiased))
    torch.testing.assert_close(masked[1], discrepancy.energy_distance(x[1], y[1], unbiased=unbiased))


def test_one_cell_has_no_distance_within(rng):
    x, y = torch.randn(2, 1, 4, generator=rng)
    torch.testing.assert_close(discrepancy.energy_distance(x, y), 2 * (x - y).norm())
