"""Cells with a wanted mean: control cells moved in count space, so that they keep their dispersion."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.types import CP10K, Noise

Blocks = Iterable[Float[np.ndarray, "_ genes"]]
"""Cells, a block of any number of them at a time, log1p."""

STEP = 1 / 8
"""Distance of neighboring factors on the grid, in natural logarithm; a power of 2, so sums are exact."""
BELOW = 64
"""Grid points under factor 1: tabulated down to a factor of exp(-8); further down by extrapolation."""
ABOVE = 16
"""Grid points over factor 1. A gene is scaled up by exp(2) at most; what is missing is switched on."""

NEARLY = 1e-3
"""Distance from a whole number that is taken for the error of floating-point numbers."""
LARGEST = 30.0
"""Values from here on, which no cell has, are not turned into counts, which might be infinite."""


def normalized(
    counts: Float[Tensor, "*cells genes"], total: float | Float[Tensor, ""] = CP10K
) -> Float[Tensor, "*cells genes"]:
    """Natural logarithm of 1 + counts brought to a total for each cell; a cell without counts stays empty."""
    sums = counts.sum(-1, keepdim=True)
    return (counts * total / torch.where(sums > 0, sums, 1.0)).log1p()


def rounded(counts: Float[Tensor, "sets cells genes"], noise: Noise) -> Float[Tensor, "sets cells genes"]:
    """Round up or down at random, so that expectations stay; whole numbers stay, but for float error."""
    nearest = counts.round()
    drawn = (counts + noise.uniform(counts)).floor()
    return torch.where((counts - nearest).abs() < NEARLY, nearest, drawn)


def single_counts(
    cells: Float[Tensor, "sets cells genes"], typical: Float[Tensor, ""]
) -> Float[Tensor, "sets cells 1"]:
    """Value of a single count in each cell, its smallest value above 0; ``typical`` where it is empty."""
    least = torch.where(cells > 0, cells, torch.inf).amin(-1, keepdim=True)
    return torch.where(least.isinf(), typical.to(least.dtype), least)


def whole_counts(
    values: Float[Tensor, "sets cells genes"], one_count: Float[Tensor, "*cells"], noise: Noise
) -> Float[Tensor, "sets cells genes"]:
    """Round values below a single count, at random, to none or one, so that their expectation stays.

    Parameters
    ----------
    values
        Predicted, log1p, not negative.
    one_count
        Value of a single count, log1p, of all cells or of each.
    """
    one_count = one_count.to(values.dtype)
    drawn = noise.uniform(values) < values.expm1() / one_count.expm1()
    return torch.where(values < one_count, drawn * one_count, values)


def soften(
    values: Float[Tensor, "sets cells genes"],
    start: Float[Tensor, "sets cells genes"],
    one_count: Float[Tensor, "sets cells 1"],
    counts: float,
) -> Float[Tensor, "sets cells genes"]:
    """Shrink every change from the starting cells by so many counts, and undo those that are smaller.

    What is not negative cannot err downwards where a gene is silent, so small errors without a direction
    would turn genes on.

    Parameters
    ----------
    values, start
        Predicted cells and the cells that they began as, log1p.
    one_count
        Value of a single count in each cell.
    """
    one = one_count.expm1()
    before, after = start.expm1(), values.clamp_max(LARGEST).expm1()
    softened = (before + functional.softshrink((after - before) / one, counts) * one).log1p()
    return torch.where(values < LARGEST, softened, values)


class Dispersion(nn.Module):
    """Moves control cells to a mean, gene by gene, and leaves them as different as they were.

    The value x of a cell becomes ``log1p(expm1(x) * factor)``: its normalized count is scaled, so
    zeros stay zeros. The factor of a gene is the one that gives the *population* of control cells
    the wanted mean, and therefore the fate of a cell does not depend on the cells beside it. It is
    read from a table, fitted once, of the population's mean over a grid of factors; the relative
    error of the mean is below 1e-3.

    Where scaling cannot reach the mean (a gene that is silent in control, or too large a factor) the
    gene is switched on, at its typical value, in randomly chosen cells where it is off, with the
    probability that makes the expectation right; should that not be enough either, the rest is
    added to every cell.

    Parameters
    ----------
    genes
        Size of the panel.
    """

    curve: Float[Tensor, "populations genes grid"]
    """Mean over each population, in log1p, of its cells scaled by each factor of the grid."""
    off: Float[Tensor, "populations genes"]
    """Fraction of the cells of each population in which a gene is zero."""
    typical: Float[Tensor, "genes"]
    """Value of a gene where it is on, in log1p."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.register_buffer("curve", torch.zeros(1, genes, BELOW + 1 + ABOVE))
        self.register_buffer("off", torch.ones(1, genes))
        self.register_buffer("typical", torch.ones(genes))

    @property
    def mean(self) -> Float[Tensor, "populations genes"]:
        """Mean of each population as it is."""
        return self.curve[..., BELOW]

    def fit(
        self,
        populations: Iterable[Blocks],
        everything: Blocks,
    ) -> None:
        """Learn the populations of control cells; one more, all of them pooled, is added at the end.

        Parameters
        ----------
        populations
            For each population its cells, in blocks, log1p.
        everything
            All training cells, in blocks, log1p: they tell what a gene is like where it is on.
        """
        genes = len(self.typical)
        sums, on, cells = zip(*(_sums(blocks, genes) for blocks in populations), strict=True)
        sums, on, cells = np.stack(sums), np.stack(on), np.array(cells)[:, None]
        sums = np.concatenate([sums, sums.sum(0, keepdims=True)])
        on = np.concatenate([on, on.sum(0, keepdims=True)])
        cells = np.concatenate([cells, cells.sum(0, keepdims=True)])
        self.curve = torch.from_numpy((sums / cells[..., None]).astype(np.float32)).to(self.curve.device)
        self.off = torch.from_numpy((1 - on / cells).astype(np.float32)).to(self.off.device)
        self.typical = torch.from_numpy(_typical(everything, genes)).to(self.typical.device)

    def forward(
        self,
        cells: Float[Tensor, "sets cells genes"],
        mean: Float[Tensor, "sets genes"],
        population: Int[Tensor, "sets"],
        noise: Noise,
    ) -> Float[Tensor, "sets cells genes"]:
        """Move cells of the given populations so that the populations would get the given means.

        Parameters
        ----------
        cells
            Control cells, log1p.
        mean
            Wanted, log1p, not negative.
        population
            Index of the population that the cells of each set come from.
        noise
            Chooses the cells in which a gene is switched on.
        """
        curve, off = self.curve[population], self.off[population]
        factor = _factor(curve, mean).unsqueeze(1)
        excess = (mean - curve[..., -1]).clamp_min(0)
        most = off * self.typical
        probability = torch.where(most > 0, (excess / most).clamp(max=1), 0.0)
        rest = (excess - most).clamp_min(0).unsqueeze(1)
        # A factor of 1 must return the very same cells, which expm1 and log1p would only nearly do.
        scaled = torch.where(factor == 1, cells, torch.log1p(torch.expm1(cells) * factor))
        draw = noise.uniform(cells)
        switched = (cells == 0) & (draw < probability.unsqueeze(1))
        return torch.where(switched, self.typical, scaled) + rest


def _factor(
    curve: Float[Tensor, "sets genes grid"], mean: Float[Tensor, "sets genes"]
) -> Float[Tensor, "sets genes"]:
    """Factor at which each curve reaches the mean, at most the largest of the grid.

    Both axes are interpolated in logarithms: there a curve is straight where counts are small.
    """
    upper = torch.searchsorted(curve, mean.unsqueeze(-1).contiguous()).clamp(1, curve.shape[-1] - 1)
    low, high = curve.gather(-1, upper - 1).squeeze(-1), curve.gather(-1, upper).squeeze(-1)
    position = ((mean / low).log() / (high / low).log()).clamp(max=1)
    factor = (STEP * (upper.squeeze(-1) - 1 - BELOW + position)).exp()
    return torch.where(high > 0, factor, 1.0)  # a silent gene has no curve


def _sums(
    blocks: Blocks, genes: int
) -> tuple[Float[np.ndarray, "genes grid"], Int[np.ndarray, "genes"], int]:
    """Sum over cells at each factor of the grid, cells in which a gene is on, and cells."""
    factors = np.exp(STEP * np.arange(-BELOW, ABOVE + 1))
    sums, on, cells = np.zeros((genes, len(factors))), np.zeros(genes, dtype=np.int64), 0
    for block in blocks:
        rows, columns = np.nonzero(block)
        counts = np.expm1(block[rows, columns].astype(np.float64))
        for step, factor in enumerate(factors):
            # log(1 + x) is exact enough in double precision and several times faster than log1p
            sums[:, step] += np.bincount(columns, np.log(1 + factor * counts), minlength=genes)
        on += np.bincount(columns, minlength=genes)
        cells += len(block)
    return sums, on, cells


def _typical(blocks: Blocks, genes: int) -> Float[np.ndarray, "genes"]:
    """Mean of the nonzero values of each gene; the least of them for a gene that is never on."""
    sums, on = np.zeros(genes), np.zeros(genes)
    for block in blocks:
        sums += block.sum(axis=0, dtype=np.float64)
        on += np.count_nonzero(block, axis=0)
    mean = np.divide(sums, on, out=np.full(genes, np.inf), where=on > 0)
    least = mean.min(initial=np.inf)
    return np.where(on > 0, mean, least if np.isfinite(least) else 1.0).astype(np.float32)
