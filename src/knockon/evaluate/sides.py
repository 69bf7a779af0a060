"""Both sides of an evaluation as moments, and how far halves of the real cells are from each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import Moments, moments, num_cells
from knockon.evaluate.truth import Context, Truth
from knockon.types import Label

Means = Float[np.ndarray, "conditions genes"]
Values = Float[np.ndarray, "conditions"]

HALVINGS = 8
"""Random halvings of the real cells that say how far a replicate may be off."""
ENOUGH = 10
"""Cells of either side, and of half of the real ones, without which lengths of changes are not judged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Moments of some cells of each condition, and what their number makes of the means.

    Parameters
    ----------
    of
        Means, variances (0 for one cell) and fractions of zeros.
    count
        Cells of each condition.
    """

    of: Moments
    count: Int[np.ndarray, "conditions"]

    @classmethod
    def make(cls, cells: Sequence[sp.csr_matrix]) -> "Side":
        """Take the moments of cells."""
        found = moments(cells)
        found = Moments(mean=found.mean, variance=np.nan_to_num(found.variance), zeros=found.zeros)
        return cls(of=found, count=np.array([num_cells(some) for some in cells]))

    @property
    def noise(self) -> Means:
        """Squared standard error of the means."""
        return self.of.variance / self.count[:, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What flags look at, in log1p.

    Parameters
    ----------
    pairs
        The cells of both sides.
    predicted, real
        Their moments.
    control_noise
        Squared standard errors of the means of the real control cells.
    halves
        Two disjoint halves of the real cells, several times; the first has no more cells than were
        predicted.
    """

    pairs: Pairs
    predicted: Side
    real: Side
    control_noise: Means
    halves: tuple[tuple[Side, Side], ...]

    @property
    def truth(self) -> Truth:
        """The real side."""
        return self.pairs.truth

    @property
    def names(self) -> list[str]:
        """Of the conditions."""
        return [str(label) for label in self.truth.labels]

    def strength(self, side: Side) -> Values:
        """Squared length of the change of the means against real control cells, unbiased, not below 0."""
        noise = side.noise + self.control_noise
        return np.maximum((np.square(side.of.mean - self.truth.control) - noise).sum(axis=1), 0.0)

    def room(self, ratio: Callable[[Side, Side], Values]) -> Values:
        """Smallest ratio, or reciprocal of one, between halves of the real cells; 0 of too few cells."""
        found = np.stack([ratio(one, other) for one, other in self.halves])
        with np.errstate(divide="ignore"):
            least = np.nan_to_num(np.minimum(found, 1 / found).min(axis=0)).clip(0, 1)
        enough = (self.predicted.count >= ENOUGH) & (self.real.count >= 2 * ENOUGH)
        return np.where(enough, least, 0.0)


def gather(pairs: Pairs) -> Evidence:
    """Gather what flags look at; the halves are drawn by a fixed seed."""
    truth, rng = pairs.truth, np.random.default_rng(0)
    predicted = Side.make(pairs.cells)
    halves = []
    for _ in range(HALVINGS):
        orders = [rng.permutation(num_cells(cells)) for cells in truth.cells]
        sides = [
            (cells[order[: max(1, min(len(order) // 2, few))]], cells[order[len(order) // 2 :]])
            for cells, order, few in zip(truth.cells, orders, predicted.count.tolist(), strict=True)
        ]
        halves.append((Side.make([one for one, _ in sides]), Side.make([other for _, other in sides])))
    found = Side.make([truth.population(Label(covariates=context)) for context in contexts(truth)])
    noise = dict(zip(contexts(truth), found.noise, strict=True))
    return Evidence(
        pairs=pairs,
        predicted=predicted,
        real=Side.make(truth.cells),
        control_noise=np.stack([noise[label.covariates] for label in truth.labels]),
        halves=tuple(halves),
    )


def contexts(truth: Truth) -> list[Context]:
    """List the contexts of the scored conditions."""
    return list(dict.fromkeys(label.covariates for label in truth.labels))
