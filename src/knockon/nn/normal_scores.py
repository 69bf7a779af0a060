"""Normal scores: coordinates in which each gene is a standard normal over training cells.

Expression is no Gaussian: most values of most genes are 0, and the rest has a long tail. Its ranks, mapped to
the quantiles of a normal [waerden1952], are what a model of Gaussians asks for; on the way back, values lie
among those that were measured, and zeros are exact.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.special import ndtr, ndtri

from knockon.types import Noise

FARTHEST = 4.0
"""Scores are at most so far from 0."""
STEP = 1 / 16
"""Distance of neighboring scores whose values are tabulated."""
SCORES = torch.arange(-FARTHEST, FARTHEST + STEP, STEP)
CENTERS = torch.arange(-1.5 * FARTHEST, 1.5 * FARTHEST + 2 * STEP, 2 * STEP)
"""Means of scores for which means of values are tabulated."""
NODES = torch.linspace(-5, 5, 161)
"""Places of a standard normal over which these are averaged, by its density."""


class Ranks(nn.Module):
    """Maps values of genes to normal scores and back.

    A score is ``ndtri(F(x))`` with the distribution F of the gene's values in some cells. Where many cells
    share a value, 0 above all, each draws its rank among them at random, so that scores are normal whatever
    the values are; the way back needs no chance.

    Parameters
    ----------
    genes
        Size of the panel.
    """

    values: Float[Tensor, "genes scores"]
    """Value of each gene at each score of the table, in the units of the cells it was fitted to."""
    zero: Float[Tensor, "genes"]
    """Score up to which a gene is 0; infinite where it never is (negatively) or always is."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.register_buffer("values", SCORES.expand(genes, -1).clone())
        self.register_buffer("zero", torch.full((genes,), -torch.inf))

    def fit(self, populations: Sequence[Float[np.ndarray, "_ genes"]]) -> None:
        """Learn the distribution of each gene over all cells.

        Parameters
        ----------
        populations
            Cells of each condition, not negative; at least one cell in all.
        """
        cells = np.sort(np.concatenate(populations), axis=0)
        ranks = (ndtr(SCORES.double()).numpy() * len(cells)).astype(int).clip(max=len(cells) - 1)
        self.values.copy_(torch.from_numpy(cells[ranks].T.astype(np.float32)))
        self.zero.copy_(ndtri(torch.from_numpy((cells <= 0).mean(axis=0))))

    def forward(
        self,
        values: Float[Tensor, "sets cells genes"],
        noise: Noise,
        genes: Int[Tensor, "genes"] | None = None,
    ) -> Float[Tensor, "sets cells genes"]:
        """Return normal scores of values.

        Parameters
        ----------
        values
            Cells, not negative.
        noise
            Breaks ties.
        genes
            Which of the panel they are; all of them by default.
        """
        table, zero = self._of(genes)
        columns = values.to(table).flatten(0, -2).T.contiguous()
        below, upto = (torch.searchsorted(table, columns, right=right) for right in (False, True))
        lowest = torch.where(columns > 0, zero, -torch.inf)
        first = torch.where(below > 0, STEP * (below - 0.5) - FARTHEST, -torch.inf).maximum(lowest)
        last = torch.where(upto < table.shape[1], STEP * (upto - 0.5) - FARTHEST, torch.inf)
        last = torch.where(columns > 0, last.maximum(zero), zero)
        low, high = ndtr(first.double()), ndtr(last.double())
        drawn = noise.uniform(values).flatten(0, -2).T
        scores = ndtri(low + (high - low) * drawn).clamp(-FARTHEST, FARTHEST)
        return scores.T.reshape(values.shape).to(values)

    def inverse(
        self, scores: Float[Tensor, "*cells genes"], genes: Int[Tensor, "genes"] | None = None
    ) -> Float[Tensor, "*cells genes"]:
        """Return values of scores: linear between tabulated ones, never between 0 and another."""
        table, zero = self._of(genes)
        columns = scores.to(table).flatten(0, -2).T
        place = (columns + FARTHEST) / STEP
        lower = place.nan_to_num(0).floor().clamp(0, table.shape[1] - 2).long()
        at, to = table.gather(1, lower), table.gather(1, lower + 1)
        found = torch.where(at > 0, at, to).lerp(to, (place - lower).clamp(0, 1))
        found = torch.where(columns < zero, 0.0, found)
        return found.T.reshape(scores.shape).to(scores)

    def _of(
        self, genes: Int[Tensor, "genes"] | None
    ) -> tuple[Float[Tensor, "genes scores"], Float[Tensor, "genes 1"]]:
        values, zero = (x if genes is None else x[genes] for x in (self.values, self.zero))
        return values, zero[:, None]


class NormalScores(Ranks):
    """Normal scores of log1p values, which within a condition spread around means of their own."""

    spread: Float[Tensor, "genes"]
    """Standard deviation of scores within a condition."""
    means: Float[Tensor, "genes centers"]
    """Mean value of a gene whose scores spread around each center of the table, log1p."""

    def __init__(self, genes: int) -> None:
        super().__init__(genes)
        self.register_buffer("spread", torch.ones(genes))
        self.register_buffer("means", CENTERS.expand(genes, -1).clone())

    def fit(self, populations: Sequence[Float[np.ndarray, "_ genes"]]) -> None:
        """Learn the distribution of each gene over all cells, and its spread within populations.

        Parameters
        ----------
        populations
            Cells of each condition, log1p; at least one cell in all.
        """
        super().fit(populations)
        noise = Noise(torch.Generator(self.values.device).manual_seed(0))
        squares, freedom = torch.zeros_like(self.spread), 0
        for population in populations:
            scores = self(torch.from_numpy(population).to(self.values)[None], noise)[0]
            squares += (scores - scores.mean(0)).square().sum(0)
            freedom += len(scores) - 1
        self.spread.copy_((squares / freedom).sqrt() if freedom else torch.ones_like(squares))
        nodes = NODES.to(self.spread)[:, None] * self.spread
        weights = NODES.square().div(-2).softmax(0).to(self.spread)
        for i, center in enumerate(CENTERS.tolist()):
            self.means[:, i] = weights @ self.inverse(center + nodes)

    def center(self, mean: Float[Tensor, "sets genes"]) -> Float[Tensor, "sets genes"]:
        """Return the means of scores at which values have these means, as far as the table reaches.

        None is lower than where a gene is 0 in nearly all cells: how far below, zeros do not tell.
        """
        wanted, table = mean.to(self.means).T.contiguous(), self.means
        upper = torch.searchsorted(table, wanted).clamp(1, table.shape[1] - 1)
        at, to = table.gather(1, upper - 1), table.gather(1, upper)
        part = torch.where(to > at, (wanted - at) / (to - at), 0.0).clamp(0, 1)
        center = float(CENTERS[0]) + 2 * STEP * (upper - 1 + part)
        never = self.zero.clamp(max=FARTHEST) - FARTHEST * self.spread
        return center.maximum(never[:, None]).T.to(mean)
