"""Cells moved to another mean as counts: molecules are lost, and others are found.

A cell that has a gene at rate l (molecules found on average) has a Poisson number of counts. At rate r l it
keeps each count with probability r, where r < 1, and finds Poisson((r - 1) l) more, where r > 1. If rates
are gamma distributed over cells, counts are negative binomial before and after, exactly; a cell stays what
it was as far as it can, and a silent gene finds counts only where its wanted mean asks for them. Cells are
measured as ``log1p(unit * count)``, where ``unit`` is what one count is worth in a cell.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from knockon.types import Noise

Cells = Float[Tensor, "cells genes"]
Unit = Float[Tensor, "cells 1"]
Genes = Float[Tensor, "genes"]

REACH = 6.0
"""Largest change of a rate, in natural logarithm."""
TINY = 1e-6
"""Mean of normalized counts that any gene is taken to have at least."""
ROUNDS = 14
"""Halvings of the interval in which the change of a rate is sought."""
TOUCH = 0.3
"""Largest change of values, in natural logarithm, that makes a mean exact at the end."""
LEAST = 0.02
"""Share of the wanted mean of normalized counts that a gene is taken to have at least, so that a silent one
can be switched on."""


def move(cells: Cells, mean: Genes, *, unit: Unit, dispersion: Genes, still: float, noise: Noise) -> Cells:
    """Give cells another mean of each gene.

    The cells have that mean together, where it can be reached; so each depends on the others.

    Parameters
    ----------
    cells
        Of one population, log1p.
    mean
        Wanted, log1p, not negative.
    unit
        Value of a single count in each cell, normalized counts.
    dispersion
        The variance of a count is ``mean + dispersion * mean**2`` within a population; positive.
    still
        Change of a rate, in natural logarithm, up to which no count is lost or found: values are scaled.
    """
    count = cells.expm1() / unit
    rate = rates(count, unit, dispersion, LEAST * mean.expm1())
    bounds = [reached(count, unit, rate, torch.full_like(mean, x), dispersion) for x in (-still, still)]
    moving = ((mean < bounds[0]) | (mean > bounds[1])).nonzero().flatten()
    if len(moving):
        some, level, spread = count[:, moving], rate[:, moving], dispersion[moving]
        change = changes(some, unit, level, mean[moving], spread)
        cells = cells.clone()
        cells[:, moving] = (recount(some, level, change, spread, noise) * unit).log1p()
    return touch_up(cells, mean)


def rates(count: Cells, unit: Unit, dispersion: Genes, least: Genes) -> Cells:
    """Expect the rate of each gene in each cell: the posterior mean, given its count and the other cells.

    Parameters
    ----------
    least
        Mean of normalized counts that a gene is taken to have at least.
    """
    mean = torch.maximum((count * unit).mean(0), least.clamp_min(TINY)) / unit
    return (1 / dispersion + count) / (1 / dispersion + mean) * mean


def changes(count: Cells, unit: Unit, rate: Cells, mean: Genes, dispersion: Genes) -> Genes:
    """Find the change of each rate, in natural logarithm, that gives the cells this mean, nearly."""
    low, high = torch.full_like(mean, -REACH), torch.full_like(mean, REACH)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        below = reached(count, unit, rate, middle, dispersion) < mean
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def reached(count: Cells, unit: Unit, rate: Cells, change: Genes, dispersion: Genes) -> Genes:
    """Expect the mean of ``log1p(unit * count)`` after a change: exact for single counts, and for many.

    What is there is taken to be there with the right probability, and then at its mean.
    """
    kept = change.clamp(max=0).exp()
    found, shape = change.clamp_min(0).expm1() * rate, 1 / dispersion + count
    none_found = (-shape * (found / shape).log1p()).exp()  # counts that are found are negative binomial
    absent = (1 - kept).clamp_min(torch.finfo(kept.dtype).tiny).pow(count) * none_found
    present = (1 - absent).clamp_min(1e-6)
    return (present * (unit * (count * kept + found) / present).log1p()).mean(0)


def recount(count: Cells, rate: Cells, change: Genes, dispersion: Genes, noise: Noise) -> Cells:
    """Draw the counts of the same cells after a change of rates, each of which is drawn around ``rate``."""
    whole = count.round()[None]
    kept = noise.binomial(whole, change.clamp(max=0).exp().expand_as(whole))
    shape = 1 / dispersion + whole
    found = change.clamp_min(0).expm1() * noise.gamma(shape) * rate / shape
    return (kept + noise.poisson(found))[0]


def touch_up(cells: Cells, mean: Genes) -> Cells:
    """Scale what is above zero a little, so that cells have exactly this mean where that suffices."""
    size, step = cells.expm1(), torch.zeros_like(mean)
    for _ in range(4):
        moved = (size * step.exp()).log1p()
        slope = (1 - (-moved).exp()).mean(0).clamp_min(1e-6)
        step = (step + (mean - moved.mean(0)) / slope).clamp(-TOUCH, TOUCH)
    return (size * step.exp()).log1p()
