"""Which metrics, with every convention named.

``core``
    Space: natural log1p of normalized counts, all genes of the screen; a screen and a prediction in counts
    are first normalized to the median total of training cells. Pseudobulk: arithmetic mean over cells after
    log1p. Reference of ``pearson_delta``: mean of the *real* control cells of the same context, on both
    sides. Reference of ``centroid_delta``: unweighted mean of the training perturbations' means in the same
    context. ``top20``: genes with the largest absolute real change against control, ties in the order of
    genes. ``discrimination``: L1, signed effects, all genes (the targets too), candidates are all perturbed
    conditions of the same context in training or not, mid ranks, 1 - k / (N - 1). ``energy_distance``:
    Euclidean, not squared, U-statistic, at most 256 cells drawn without replacement on each side, equally
    many. ``variance_corr``: unbiased variances, Pearson over genes that vary on either side.
    ``zero_fraction_error``: exact zeros. A value that the real cells cannot give (one cell, no rival) is
    left out of the table; a prediction cannot leave one out.

``generation``
    Whole cells rather than means. Units: natural log1p of counts per 10,000, into which counts and log1p
    values of a known total are brought; log1p values of an unknown one stay as they are. Space: the first 30
    principal components (centered, not scaled; as many as genes, or one less than cells, where those are
    fewer) of the real *training* cells: training and validation conditions and all controls, at most 20,000
    cells; both sides are projected. ``w2``, ``frechet``, ``mmd2``, ``nn_accuracy_error``, ``precision`` and
    ``recall`` are of points in this space, Euclidean, equally many on both sides and drawn without
    replacement: half of the condition's real cells, at most 256. Half, because all of these depend on the
    number of cells, by no law that holds for few cells in many dimensions: so predictions are compared by
    as many cells as the ceiling has, and nothing is extrapolated. ``w2``: root of the exact cost, squared
    ground distance. ``frechet``: squared, unbiased covariances. ``mmd2``: U-statistic, *sum* of Gaussian
    kernels with standard deviations 1, 2, 4, 8 and 16. ``nn_accuracy_error``: one neighbor, leave-one-out,
    |accuracy - .5| of predicted and of real cells, averaged. ``precision``, ``recall``: balls up to the
    third neighbor. ``mean_r2``, ``variance_r2``, ``zero_fraction_r2``: 1 - SS_residual / SS_total over all
    genes, real values as reference, all cells of both sides, unbiased variances, exact zeros.
"""

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float

from knockon.evaluate import generation, metrics
from knockon.evaluate.metrics import Metric
from knockon.evaluate.pairs import Pairs, num_cells
from knockon.types import Label, UserError

log = logging.getLogger("knockon")
Name = Literal["core", "generation"]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A choice of metrics, and how what they look at is gathered.

    Parameters
    ----------
    name
        On the command line.
    metrics
        In the order of tables.
    gather
        Pairs and ``cells`` in, an object with all fields that the metrics need out.
    cells
        Most cells of a condition and side that enter distances between cells.
    """

    name: str
    metrics: tuple[Metric, ...]
    gather: Callable[[Pairs, int], object]
    cells: int = 256


def suite_named(name: str) -> Suite:
    """Find a suite.

    Raises
    ------
    UserError
        If there is none of this name.
    """
    for suite in SUITES:
        if suite.name == name:
            return suite
    raise UserError(
        f"Unknown suite {name}", expected="one of " + ", ".join(s.name for s in SUITES), mend="--suite core"
    )


def score(pairs: Pairs, suite: Suite | str = "core") -> pd.DataFrame:
    """Score every condition with every metric.

    Deterministic: the cells that are drawn depend only on the condition.

    Returns
    -------
    DataFrame
        Long, with the columns ``condition, metric, value``.
    """
    suite = suite_named(suite) if isinstance(suite, str) else suite
    evidence = suite.gather(pairs, suite.cells)
    wide = pd.DataFrame(
        {metric.name: metric(evidence) for metric in suite.metrics},
        index=pd.Index([str(label) for label in pairs.truth.labels], name="condition"),
    )
    long = wide.melt(var_name="metric", value_name="value", ignore_index=False).reset_index()
    return long.dropna(ignore_index=True)


def _core(pairs: Pairs, cells: int) -> metrics.Evidence:
    truth = pairs.truth
    genes = len(truth.screen.genes)
    predicted, real = _moments(pairs.cells, genes), _moments(truth.cells, genes)
    drawn = [
        _draw(label, x, y, cells) for label, x, y in zip(truth.labels, pairs.cells, truth.cells, strict=True)
    ]
    return metrics.Evidence(
        predicted=predicted.mean,
        real=real.mean,
        control=truth.control,
        centroid=truth.centroid,
        candidates=truth.candidates,
        own=truth.own,
        rivals=truth.rivals,
        predicted_variance=np.nan_to_num(predicted.variance),
        real_variance=real.variance,
        predicted_zeros=predicted.zeros,
        real_zeros=real.zeros,
        predicted_cells=[x for x, _ in drawn],
        real_cells=[y for _, y in drawn],
    )


def _generation(pairs: Pairs, cells: int) -> generation.Evidence:
    truth, space = pairs.truth, pairs.truth.space
    most = np.minimum(truth.half, cells).tolist()
    few = sum(num_cells(x) < count for x, count in zip(pairs.cells, most, strict=True))
    if few:
        log.warning(
            "%d of %d conditions have fewer predicted cells than the anchors, on which distances between "
            "populations depend: predict %d cells of each",
            *(few, len(most), max(most)),
        )
    sides = zip(truth.labels, pairs.cells, truth.cells, most, strict=True)
    drawn = [_draw(label, x, y, count) for label, x, y, count in sides]
    genes = len(truth.screen.genes)
    predicted = _moments(tuple(space.scaled(x) for x in pairs.cells), genes)
    real = _moments(tuple(space.scaled(y) for y in truth.cells), genes)
    return generation.Evidence(
        predicted_points=[space.project(x) for x, _ in drawn],
        real_points=[space.project(y) for _, y in drawn],
        predicted=predicted.mean,
        real=real.mean,
        predicted_variance=np.nan_to_num(predicted.variance),
        real_variance=real.variance,
        predicted_zeros=predicted.zeros,
        real_zeros=real.zeros,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Moments:
    mean: Float[np.ndarray, "conditions genes"]
    variance: Float[np.ndarray, "conditions genes"]
    zeros: Float[np.ndarray, "conditions genes"]


def _moments(populations: tuple[sp.csr_matrix, ...], genes: int) -> _Moments:
    """Mean, unbiased variance (NaN for one cell) and fraction of zeros, at the cost of the non-zeros."""
    mean, variance, zeros = np.empty((3, len(populations), genes))
    for row, cells in enumerate(populations):
        count = num_cells(cells)
        filled = np.bincount(cells.indices, minlength=genes)
        mean[row] = np.bincount(cells.indices, cells.data, minlength=genes) / count
        # about the mean, because the mean of squares less the squared mean loses digits
        around = np.square(cells.data - mean[row, cells.indices])
        squares = np.bincount(cells.indices, around, genes) + (count - filled) * np.square(mean[row])
        variance[row] = squares / (count - 1) if count > 1 else np.nan
        zeros[row] = 1 - filled / count
    return _Moments(mean=mean, variance=variance, zeros=zeros)


def _draw(
    label: Label, predicted: sp.csr_matrix, real: sp.csr_matrix, most: int
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Equally many cells of both sides; at least two where there are, since one has no distance within."""
    count = max(2, min(num_cells(predicted), num_cells(real), most))
    rng = np.random.default_rng(zlib.crc32(str(label).encode()))
    return _some(predicted, count, rng), _some(real, count, rng)


def _some(cells: sp.csr_matrix, count: int, rng: np.random.Generator) -> sp.csr_matrix:
    if num_cells(cells) <= count:
        return cells
    return cells[np.sort(rng.choice(num_cells(cells), count, replace=False))]


SUITES = (
    Suite(name="core", metrics=metrics.METRICS, gather=_core),
    Suite(name="generation", metrics=generation.METRICS, gather=_generation),
)
METRICS = tuple(metric for suite in SUITES for metric in suite.metrics)
"""Of all suites; names are unique."""
