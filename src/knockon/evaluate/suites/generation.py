"""How far generated cells are from real ones as populations: pure functions, and the tuple ``METRICS``.

``x`` are predicted and ``y`` real cells as points of one space (``space.Space``), equally many of both. All
distances are Euclidean and all depend on the number of cells, so that a value can only be read beside those
of other predictions with as many, such as the anchors.

Conventions. Units: natural log1p of counts per 10,000, into which counts and log1p values of a known total
are brought; log1p values of an unknown one stay as they are. Space: the first 30 principal components
(centered, not scaled; as many as genes, or one less than cells, where those are fewer) of the real
*training* cells: training and validation conditions and all controls, at most 20,000 cells; both sides are
projected. ``w2``, ``frechet``, ``mmd2``, ``nn_accuracy_error``, ``precision`` and ``recall`` are of points
in this space, Euclidean, equally many on both sides and drawn without replacement: half of the condition's
real cells, at most 256. Half, because all of these depend on the number of cells, by no law that holds for
few cells in many dimensions: so predictions are compared by as many cells as the ceiling has, and nothing
is extrapolated. ``w2``: root of the exact cost, squared ground distance. ``frechet``: squared, unbiased
covariances. ``mmd2``: U-statistic, *sum* of Gaussian kernels with standard deviations 1, 2, 4, 8 and 16.
``nn_accuracy_error``: one neighbor, leave-one-out, |accuracy - .5| of predicted and of real cells,
averaged. ``precision``, ``recall``: balls up to the third neighbor. ``mean_r2``, ``variance_r2``,
``zero_fraction_r2``: 1 - SS_residual / SS_total over all genes, real values as reference, all cells of both
sides, unbiased variances, exact zeros.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from knockon.evaluate.metrics import FLAT, Means, Metric, Values
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import draw, moments
from knockon.evaluate.space import DIMS

log = logging.getLogger("knockon")

Points = Float[np.ndarray, "cells dims"]
Others = Float[np.ndarray, "others dims"]
Sample = Float[np.ndarray, "_ dims"]  # conditions need not have equally many

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Standard deviations of the Gaussian kernels of ``mmd2``, in units of the space."""
CELLS = "log1p per 10k, a side half as many cells as are real, <= 256"
IN_SPACE = f"{DIMS} PCs of training cells, {CELLS}"
"""How cells and points are made and drawn, to be printed beside each number."""
NEIGHBORS = 3
"""Which neighbor's distance is the radius of a ball in ``precision`` and ``recall``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What metrics of generation look at; one row, or one array of points, for each scored condition.

    Parameters
    ----------
    predicted_points, real_points
        Cells in the space, equally many on both sides.
    predicted, real
        Means over all cells, in the units that the space is made of.
    predicted_variance, real_variance
        Unbiased variances of the same; NaN where a real condition has one cell, 0 where a predicted one has.
    predicted_zeros, real_zeros
        Fractions of cells that are exactly 0.
    """

    predicted_points: Sequence[Sample]
    real_points: Sequence[Sample]
    predicted: Means
    real: Means
    predicted_variance: Means
    real_variance: Means
    predicted_zeros: Means
    real_zeros: Means


# ---- two samples of points -------------------------------------------------------------------------


def w2(x: Points, y: Points) -> float:
    """2-Wasserstein distance of two samples of equal size: the root of the exact cost of transport.

    The ground cost is the squared distance, and the mean is taken over cells. Equal samples of equal
    weights have an optimal plan that is a permutation, so the assignment problem is exact and nothing is
    regularized. In the units of the space; 0 for equal samples only. Two samples of one population are
    far from 0, the more so the fewer cells and the more dimensions.
    """
    if len(x) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} cells have no permutation as a plan")
    cost = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def frechet(x: Points, y: Others) -> float:
    """Fréchet distance of two Gaussians with the means m and covariances S of the samples.

    |m_x - m_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)) [dowson1982, heusel2017]: a square, and not its root.
    Covariances are unbiased. The trace of the root of a product is the sum of the singular values of the
    product of the roots, which needs no root of a matrix that is not symmetric.
    """
    between = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    covariances = _covariance(x), _covariance(y)
    spread = sum(np.trace(covariance) for covariance in covariances)
    shared = np.linalg.norm(_root(covariances[0]) @ _root(covariances[1]), "nuc")
    return float(between + spread - 2 * shared)


def _covariance(x: Points) -> Float[np.ndarray, "dims dims"]:
    around = x - x.mean(axis=0)
    return around.T @ around / (len(x) - 1)


def _root(covariance: Float[np.ndarray, "dims dims"]) -> Float[np.ndarray, "dims dims"]:
    """Symmetric root; rounding below 0 is 0, since fewer cells than dimensions leave directions flat."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def mmd2(x: Points, y: Others, bandwidths: Sequence[float] = BANDWIDTHS) -> float:
    """Squared maximum mean discrepancy, unbiased, under a sum of Gaussian kernels [gretton2012, eq. 3].

    k(a, b) = sum over s of exp(-|a - b|^2 / (2 s^2)), with the bandwidths s = 1, 2, 4, 8, 16 of the space:
    a sum and not a mean, so at most twice their number. Pairs of different cells only within a sample: 0 on
    average for two samples of one population, and then negative half of the time.
    """
    within = [(_kernel(z, z, bandwidths).sum() - len(z) * len(bandwidths)) for z in (x, y)]
    means = [total / (len(z) * (len(z) - 1)) for total, z in zip(within, (x, y), strict=True)]
    return float(means[0] + means[1] - 2 * _kernel(x, y, bandwidths).mean())


def _kernel(x: Points, y: Others, bandwidths: Sequence[float]) -> Float[np.ndarray, "cells others"]:
    squares = cdist(x, y, "sqeuclidean")
    return np.sum([np.exp(squares / (-2 * width**2)) for width in bandwidths], axis=0)


def nn_accuracies(x: Points, y: Others) -> tuple[float, float]:
    """Leave-one-out accuracies of a classifier by the nearest neighbor, of ``x`` and of ``y``.

    For equally many cells their mean is the accuracy of the two-sample test [lopezpaz2017]: 1 for samples
    far from each other, about .5 for two of one population, 0 for copies. Neighbors at exactly the same
    distance share the vote.
    """
    pooled = np.concatenate([x, y])
    distances = cdist(pooled, pooled)
    np.fill_diagonal(distances, np.inf)
    nearest = distances == distances.min(axis=1, keepdims=True)
    votes = nearest[:, : len(x)].sum(axis=1) / nearest.sum(axis=1)
    return float(votes[: len(x)].mean()), float(1 - votes[len(x) :].mean())


def nn_accuracy_error(x: Points, y: Others) -> float:
    """Distance from .5 of the accuracy by which the nearest neighbor tells predicted from real cells.

    Leave-one-out, |accuracy - .5| for predicted and for real cells, then the mean of the two: from 0 to .5.
    Where both are on one side of .5, it is that of the pooled accuracy of published tables. That accuracy is
    near .5 also for cells that all lie near the mean, which are the neighbors of each other (1) and in many
    dimensions those of real cells, too (0): here such errors do not cancel.
    """
    return float(np.mean([abs(accuracy - 0.5) for accuracy in nn_accuracies(x, y)]))


def precision(x: Points, y: Others) -> float:
    """Fraction of predicted cells that lie within the manifold of real cells, so are realistic.

    The manifold is the union of balls around cells, each as large as the distance to its third nearest
    neighbor, or to its last where there are fewer [kynkaanniemi2019]. 1 for cells that all lie near the mean:
    read it with ``recall``.
    """
    return _covered(x, y)


def recall(x: Points, y: Others) -> float:
    """Fraction of real cells that lie within the manifold of predicted cells, so are covered.

    See ``precision``. 1 for cells that are spread too widely: read it with ``precision``.
    """
    return _covered(y, x)


def _covered(points: Points, manifold: Others) -> float:
    neighbor = min(NEIGHBORS, len(manifold) - 1)
    radii = np.partition(cdist(manifold, manifold), neighbor, axis=1)[:, neighbor]  # place 0 is the cell
    return float((cdist(points, manifold) <= radii).any(axis=1).mean())


# ---- genes -----------------------------------------------------------------------------------------


def mean_r2(predicted: Means, real: Means) -> Values:
    """Coefficient of determination of the means of genes; see ``r2``."""
    return r2(predicted, real)


def variance_r2(predicted_variance: Means, real_variance: Means) -> Values:
    """Coefficient of determination of the variances of genes over cells; see ``r2``."""
    return r2(predicted_variance, real_variance)


def zero_fraction_r2(predicted_zeros: Means, real_zeros: Means) -> Values:
    """Coefficient of determination of the fractions of cells in which genes are 0; see ``r2``."""
    return r2(predicted_zeros, real_zeros)


def r2(predicted: Means, real: Means) -> Values:
    """Coefficient of determination over genes, with the real values as reference.

    1 - sum (predicted - real)^2 / sum (real - mean of real)^2: the line of identity and not a fitted one, so
    it is no squared correlation. 1 is best, 0 is one value for all genes, and there is no lower bound. NaN
    where the real values are missing or all equal.
    """
    residual = np.square(predicted - real).sum(axis=1)
    total = np.square(real - real.mean(axis=1, keepdims=True)).sum(axis=1)
    varies = total > FLAT**2 * real.shape[1]
    return np.where(varies, 1 - residual / np.where(varies, total, 1.0), np.nan)


# ---- the tuple -------------------------------------------------------------------------------------


def each(
    between: Callable[[Points, Points], float],
) -> Callable[[Sequence[Sample], Sequence[Sample]], Values]:
    """Apply to the points of each condition.

    NaN for one real cell, which has no spread. A predicted one counts as that cell repeated.
    """

    def scored(predicted_points: Sequence[Sample], real_points: Sequence[Sample]) -> Values:
        values = np.full(len(real_points), np.nan)
        for row, (x, y) in enumerate(zip(predicted_points, real_points, strict=True)):
            if len(y) > 1:
                values[row] = between(x if len(x) > 1 else np.repeat(x, len(y), axis=0), y)
        return values

    scored.__doc__ = between.__doc__
    return scored


def drawn(pairs: Pairs, cells: int) -> list[tuple[sp.csr_matrix, sp.csr_matrix]]:
    """Draw as many predicted and real cells of each condition as a half of its real cells has.

    Parameters
    ----------
    pairs
        Where from. Where fewer cells are predicted, there are fewer on both sides.
    cells
        At most so many.
    """
    most = np.minimum(pairs.truth.half, cells).tolist()
    sides = zip(pairs.truth.labels, pairs.cells, pairs.truth.cells, most, strict=True)
    return [draw(label, x, y, count) for label, x, y, count in sides]


def gather(pairs: Pairs, cells: int) -> Evidence:
    """Gather what the metrics of generation look at."""
    truth, space = pairs.truth, pairs.truth.space
    sides = drawn(pairs, cells)
    predicted = moments([space.scaled(x) for x in pairs.cells])
    real = moments([space.scaled(y) for y in truth.cells])
    return Evidence(
        predicted_points=[space.project(x) for x, _ in sides],
        real_points=[space.project(y) for _, y in sides],
        predicted=predicted.mean,
        real=real.mean,
        predicted_variance=np.nan_to_num(predicted.variance),
        real_variance=real.variance,
        predicted_zeros=predicted.zeros,
        real_zeros=real.zeros,
    )


METRICS = (
    Metric("w2", each(w2), "lower", 0.0, "none", how=f"exact transport, squared cost, its root; {IN_SPACE}"),
    Metric("frechet", each(frechet), "lower", 0.0, "none", how=f"Gaussians, a square; {IN_SPACE}"),
    Metric(
        *("mmd2", each(mmd2), "lower", 0.0, "none"),
        how=f"U-statistic, sum of Gaussian kernels of widths 1, 2, 4, 8, 16; {IN_SPACE}",
    ),
    Metric(
        *("nn_accuracy_error", each(nn_accuracy_error), "lower", 0.0, "none"),
        how=f"1 neighbor, leave-one-out, Euclidean, sides apart; {IN_SPACE}",
    ),
    Metric("precision", each(precision), "higher", 1.0, "none", how=f"third neighbor; {IN_SPACE}"),
    Metric("recall", each(recall), "higher", 1.0, "none", how=f"third neighbor; {IN_SPACE}"),
    Metric(
        "mean_r2",
        mean_r2,
        "higher",
        1.0,
        "determination",
        how="means of log1p per 10k over all genes, all cells",
    ),
    Metric(
        "variance_r2",
        variance_r2,
        "higher",
        1.0,
        "determination",
        how="unbiased variances of log1p per 10k over all genes, all cells",
    ),
    Metric(
        "zero_fraction_r2",
        zero_fraction_r2,
        "higher",
        1.0,
        "determination",
        how="shares of exact zeros of log1p per 10k over all genes, all cells",
    ),
)
