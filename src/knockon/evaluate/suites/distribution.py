"""How far predicted populations are from real ones, by distances that name all their conventions.

Conventions. Cells: equally many on both sides, drawn without replacement by condition: half of the real
cells, at most 256, as in ``generation`` and for its reason: all of these but the U-statistics depend on the
number of cells, and a replicate has no more. Units: natural log1p of counts per 10,000. Space of all but
``w1_genes``: the first 30 principal components of the real training cells (``space.Space``).
``energy_pca``: Euclidean, not squared, U-statistic. ``mmd2_median``: U-statistic, *mean* of four Gaussian
kernels exp(-d^2 / 2 s^2) with s = .5, 1, 2 and 4 times the median distance of two drawn *real* cells of the
condition, so that a prediction cannot choose its kernel. ``w1_genes``: 1-Wasserstein distance of the two
samples of each gene alone, exact, mean over all genes of the screen, also those that no cell expresses.
``spread_error``: total unbiased variance. ``frechet`` and ``nn_accuracy_error`` are those of ``generation``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float
from scipy.spatial.distance import pdist

from knockon.evaluate.metrics import FLAT, Metric, Values, energy
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import num_cells
from knockon.evaluate.suites import generation
from knockon.evaluate.suites.generation import CELLS, IN_SPACE, Others, Points, Sample, drawn, each, mmd2

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Widths of the kernels of ``mmd2_median``, in median distances of real cells."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What distances between populations look at: equally many cells of both sides of each condition.

    Parameters
    ----------
    predicted_cells, real_cells
        In log1p of counts per 10,000; not negative.
    predicted_points, real_points
        The same cells in the space.
    """

    predicted_cells: Sequence[sp.csr_matrix]
    real_cells: Sequence[sp.csr_matrix]
    predicted_points: Sequence[Sample]
    real_points: Sequence[Sample]


# ---- two samples of points -------------------------------------------------------------------------


def energy_pca(x: Points, y: Others) -> float:
    """Energy distance of predicted and real cells in the space; see ``metrics.energy``."""
    return energy(x, y)


def mmd2_median(x: Points, y: Others) -> float:
    """Squared maximum mean discrepancy with kernels as wide as real cells are apart [gretton2012].

    The widths are .5, 1, 2 and 4 times the median distance of two real cells ``y``, and the kernels are
    averaged, so it is at most 2. Unbiased: negative half of the time for two samples of one population.
    """
    median = max(float(np.median(pdist(y))), FLAT)  # of equal cells: whether two are equal
    return mmd2(x, y, [factor * median for factor in FACTORS]) / len(FACTORS)


def spread_error(x: Points, y: Others) -> float:
    """Difference of the total variances of predicted and real cells, in ratio to their sum.

    From 0 to 1, which is a repeated cell; 1/3 for twice the real variance or half of it.
    """
    predicted, real = (z.var(axis=0, ddof=1).sum() for z in (x, y))
    return float(abs(predicted - real) / (predicted + real)) if predicted + real > FLAT**2 else 0.0


# ---- genes -----------------------------------------------------------------------------------------


def w1_genes(predicted_cells: Sequence[sp.csr_matrix], real_cells: Sequence[sp.csr_matrix]) -> Values:
    """1-Wasserstein distance of predicted and real values of a gene, mean over all genes.

    In log1p units. Of each gene alone: that genes vary together earns nothing here. NaN for one real cell.
    """
    return np.array([_w1_of(x, y) for x, y in zip(predicted_cells, real_cells, strict=True)])


def _w1_of(x: sp.csr_matrix, y: sp.csr_matrix) -> float:
    if num_cells(y) < 2:
        return float("nan")
    if num_cells(x) == 1:
        x = sp.csr_matrix(sp.vstack([x] * num_cells(y)))
    return float(w1(x, y).mean())


def w1(x: sp.csr_matrix, y: sp.csr_matrix) -> Float[np.ndarray, "genes"]:
    """1-Wasserstein distance of the samples of each gene: the mean absolute difference of equal ranks.

    Parameters
    ----------
    x, y
        Equally many cells of values that are not negative. The cost is that of their non-zeros.
    """
    if num_cells(x) != num_cells(y):
        raise ValueError(f"{num_cells(x)} and {num_cells(y)} cells have no equal ranks")
    return np.asarray(abs(_ranked(x) - _ranked(y)).sum(axis=0)).ravel() / num_cells(x)


def _ranked(cells: sp.csr_matrix) -> sp.csc_matrix:
    """Put the values of each gene in falling order; what is not stored is 0 and so comes last."""
    columns = sp.csc_matrix(cells)
    genes = np.repeat(np.arange(len(columns.indptr) - 1), np.diff(columns.indptr))
    values = columns.data[np.lexsort((np.negative(columns.data), genes))]
    ranks = np.arange(len(values)) - columns.indptr[genes]
    return sp.csc_matrix((values, ranks, columns.indptr), columns.shape)


# ---- the tuple -------------------------------------------------------------------------------------


def gather(pairs: Pairs, cells: int) -> Evidence:
    """Gather what the metrics of populations look at."""
    space, sides = pairs.truth.space, drawn(pairs, cells)
    return Evidence(
        predicted_cells=[space.scaled(x) for x, _ in sides],
        real_cells=[space.scaled(y) for _, y in sides],
        predicted_points=[space.project(x) for x, _ in sides],
        real_points=[space.project(y) for _, y in sides],
    )


METRICS = (
    Metric(
        *("energy_pca", each(energy_pca), "lower", 0.0, "none"),
        how=f"U-statistic, Euclidean, not squared; {IN_SPACE}",
    ),
    Metric(
        *("mmd2_median", each(mmd2_median), "lower", 0.0, "none"),
        how=f"U-statistic, mean of Gaussian kernels of widths .5, 1, 2, 4 x median of real; {IN_SPACE}",
    ),
    Metric(
        *("w1_genes", w1_genes, "lower", 0.0, "none"),
        how=f"exact, gene by gene, mean over all genes; {CELLS}",
    ),
    *(metric for metric in generation.METRICS if metric.name in ("frechet", "nn_accuracy_error")),
    Metric("spread_error", each(spread_error), "lower", 0.0, "none", how=f"total variance; {IN_SPACE}"),
)
