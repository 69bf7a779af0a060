"""Expectations under the count model of a simulated screen, without drawing a cell."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import CubicSpline
from scipy.stats.qmc import Sobol

SPAN = (-21.0, 0.2)
"""Log shares of a library that are told apart; below, a gene is never seen."""
POINTS = 2_000
"""Points of the table; linear interpolation between them is exact to 1e-5."""


@dataclass(frozen=True, kw_only=True)
class CountModel:
    """How counts and library sizes scatter."""

    depth: float
    """Median library size."""
    spread: float
    """Standard deviation of the log of the library size, which is normal."""
    total: float
    """What the counts of a cell are normalized to before log1p."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LogMean:
    """Expectation of log1p of normalized counts, as a function of a gene's share of the RNA."""

    table: Float[np.ndarray, "levels points"]
    """Over evenly spaced log shares, for each level of dispersion."""

    @classmethod
    def tabulate(cls, model: CountModel, dispersion: Float[np.ndarray, "levels"]) -> "LogMean":
        """Integrate over counts exactly and over library sizes by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(12)
        library = model.depth * np.exp(model.spread * nodes)[:, None, None]
        coarse = np.linspace(*SPAN, 107)
        value = expected_log1p(np.exp(coarse) * library, dispersion[:, None], model.total / library)
        value = np.tensordot(weights / weights.sum(), value, 1)
        fine = CubicSpline(coarse, value, axis=1)(np.linspace(*SPAN, POINTS))
        return cls(table=fine.astype(np.float32))

    def at(
        self, log_share: Float[np.ndarray, "cells genes"], level: Int[np.ndarray, "genes"]
    ) -> Float[np.ndarray, "cells genes"]:
        """Look up genes that have these levels of dispersion."""
        place = (log_share - SPAN[0]) * ((POINTS - 1) / (SPAN[1] - SPAN[0]))
        place = place.clip(0, POINTS - 1.001)
        index = place.astype(np.int32)
        place -= index
        index += (level * POINTS).astype(np.int32)
        flat = self.table.ravel()
        return flat[index] * (1 - place) + flat[index + 1] * place


def expected_log1p(
    mean: Float[np.ndarray, "..."], dispersion: Float[np.ndarray, "..."], scale: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Compute the expectation of ``log1p(scale * count)`` for negative binomial counts.

    log(1 + x) is the integral over t > 0 of (exp(-t) - exp(-t (1 + x))) / t, and the expectation of the
    second term is the Laplace transform of the count, known in closed form. The trapezoidal rule in log
    t converges exponentially; this step gives about 1e-7.

    Parameters
    ----------
    mean
        Of the count. The arguments broadcast.
    dispersion
        Positive; the variance of the count is ``mean + dispersion * mean**2``.
    scale
        What one count is worth.
    """
    step = 0.5
    expectation = np.zeros(np.broadcast_shapes(mean.shape, dispersion.shape, scale.shape))
    for log_t in np.arange(-26.0, 4.0, step):
        t = np.exp(log_t)
        log_transform = -np.log1p(dispersion * mean * -np.expm1(-scale * t)) / dispersion
        expectation -= step * np.exp(-t) * np.expm1(log_transform)
    return expectation


def fill_cube(points: int, dimensions: int) -> Float[np.ndarray, "points dimensions"]:
    """Spread points evenly over the open unit cube, as an integral over it needs them.

    Sobol points, moved off the faces of the cube; their number is rounded up to a power of two.
    """
    log_points = (points - 1).bit_length()
    return Sobol(dimensions, scramble=False).random_base2(log_points) + 0.5**log_points / 2
