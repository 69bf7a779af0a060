"""Which metrics, with every convention named.

``core``
    Space: natural log1p of normalized counts, all genes of the screen; a screen and a prediction in counts
    are first normalized to 10,000 a cell. Pseudobulk: arithmetic mean over cells after log1p. Reference of
    ``pearson_delta``: mean of the *real* control cells of the same context, on both sides. Reference of
    ``centroid_delta``: unweighted mean of the training perturbations' means in the same context. ``top20``:
    genes with the largest absolute real change against control, ties in the order of genes.
    ``discrimination``: L1, signed effects, all genes (the targets too), candidates are all perturbed
    conditions of the same context in training or not, mid ranks, 1 - k / (N - 1). ``energy_distance``:
    Euclidean, not squared, U-statistic, at most 256 cells drawn without replacement on each side, equally
    many. ``variance_corr``: unbiased variances, Pearson over genes that vary on either side.
    ``zero_fraction_error``: exact zeros. A value that the real cells cannot give (one cell, no rival) is
    left out of the table; a prediction cannot leave one out.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float

from knockon.evaluate.metrics import METRICS, Evidence, Metric
from knockon.evaluate.pairs import Pairs, num_cells
from knockon.types import Label, UserError


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A choice of metrics.

    Parameters
    ----------
    name
        On the command line.
    metrics
        In the order of tables.
    cells
        Most cells of a condition and side that enter distances between cells.
    """

    name: str
    metrics: tuple[Metric, ...]
    cells: int = 256


SUITES = (Suite(name="core", metrics=METRICS),)


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
    evidence = _evidence(pairs, suite.cells)
    wide = pd.DataFrame(
        {metric.name: metric(evidence) for metric in suite.metrics},
        index=pd.Index([str(label) for label in pairs.truth.labels], name="condition"),
    )
    long = wide.melt(var_name="metric", value_name="value", ignore_index=False).reset_index()
    return long.dropna(ignore_index=True)


def _evidence(pairs: Pairs, cells: int) -> Evidence:
    truth = pairs.truth
    genes = len(truth.screen.genes)
    predicted, real = _moments(pairs.cells, genes), _moments(truth.cells, genes)
    drawn = [
        _draw(label, x, y, cells) for label, x, y in zip(truth.labels, pairs.cells, truth.cells, strict=True)
    ]
    return Evidence(
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
