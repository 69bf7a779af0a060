import numpy as np
import pytest
import torch
from scipy import stats

from knockon.dynamics.likelihood import gaussian_kl, negative_binomial, negative_binomial_of_cells


@pytest.fixture
def cells(rng):
    mean = 5 * torch.rand(6, 9, generator=rng, dtype=torch.float64) + 0.01
    counts = torch.poisson(mean, generator=rng)
    return counts, mean, torch.rand(1, 9, generator=rng, dtype=torch.float64) + 0.2


def test_it_is_the_negative_binomial_of_scipy(cells):
    counts, mean, inverse = cells
    r = inverse.numpy()
    wanted = stats.nbinom.logpmf(counts.numpy(), r, r / (r + mean.numpy()))
    np.testing.assert_allclose(negative_binomial(counts, mean, inverse).numpy(), wanted, rtol=1e-6)


def test_the_sum_over_genes_costs_the_counts_and_is_the_same(cells):
    counts, mean, inverse = cells
    summed = negative_binomial_of_cells(counts, mean, inverse)
    torch.testing.assert_close(summed, negative_binomial(counts, mean, inverse).sum(1))
    silent = negative_binomial_of_cells(torch.zeros_like(counts), mean, inverse)
    torch.testing.assert_close(silent, negative_binomial(torch.zeros_like(counts), mean, inverse).sum(1))


def test_probabilities_sum_to_one_and_have_the_mean():
    x = torch.arange(2000, dtype=torch.float64)
    p = negative_binomial(x, torch.full_like(x, 7.0), torch.full_like(x, 1.5)).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert float((x * p).sum()) == pytest.approx(7, abs=1e-5)
    assert float(((x - 7).square() * p).sum()) == pytest.approx(7 + 49 / 1.5, abs=1e-3)


def test_divergence_of_gaussians():
    mean, log_variance = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.0, 0.5, -1.0])
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    wanted = torch.distributions.kl_divergence(own, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), wanted)
