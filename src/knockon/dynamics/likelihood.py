"""Likelihoods of counts."""

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-8
"""Added to what a logarithm is taken of."""


def negative_binomial(
    counts: Float[Tensor, "*shape"], mean: Float[Tensor, "*shape"], inverse: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """Log-probability under negative binomials, in nats.

    With mean m and inverse dispersion r it is ``r log(r / (r + m)) + x log(m / (r + m)) + lgamma(x + r) -
    lgamma(r) - lgamma(x + 1)``, and the variance is ``m + m^2 / r``. Arguments broadcast.
    """
    total = (inverse + mean + EPSILON).log()
    log_odds = (inverse + EPSILON).log() - total, (mean + EPSILON).log() - total
    return inverse * log_odds[0] + counts * log_odds[1] + _ways(counts, inverse)


def negative_binomial_of_cells(
    counts: Float[Tensor, "cells genes"],
    mean: Float[Tensor, "cells genes"],
    inverse: Float[Tensor, "#cells genes"],
) -> Float[Tensor, "cells"]:
    """Sum ``negative_binomial`` over genes; what only counts above 0 have is computed for those."""
    total = (inverse + mean + EPSILON).log()
    silent = (inverse * ((inverse + EPSILON).log() - total)).sum(-1)
    cell, gene = counts.nonzero(as_tuple=True)
    x, r = counts[cell, gene], inverse.expand_as(mean)[cell, gene]
    rest = x * ((mean[cell, gene] + EPSILON).log() - total[cell, gene]) + _ways(x, r)
    return silent.index_add(0, cell, rest)


def gaussian_kl(
    mean: Float[Tensor, "*shape"], log_variance: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Kullback-Leibler divergence from the standard normal, in nats [kingma2014, appendix B]."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def _ways(counts: Tensor, inverse: Tensor) -> Tensor:
    return torch.lgamma(counts + inverse) - torch.lgamma(inverse) - torch.lgamma(counts + 1)
