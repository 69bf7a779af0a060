"""How far predicted cells are from real ones: a metric, and those of the suite ``core``.

Every metric takes arrays with one row per condition and returns one value per condition. Its parameters
are fields of ``Evidence``, by name: that is how a suite knows what a metric needs, and why a new metric
is one function and one line of ``METRICS``.

A prediction for which a correlation is undefined (a constant change) scores 0, as one that says nothing:
there is no NaN to hide behind [cell-eval2]. NaN is left for what the *real* cells cannot tell, such as a
variance where one cell was measured.

Conventions. Space: natural log1p of normalized counts, all genes of the screen; a screen and a prediction
in counts are first normalized to the median total of training cells. Pseudobulk: arithmetic mean over cells
after log1p. Reference of ``pearson_delta``: mean of the *real* control cells of the same context, on both
sides. Reference of ``centroid_delta``: unweighted mean of the training perturbations' means in the same
context. ``top20``: genes with the largest absolute real change against control, ties in the order of genes.
``discrimination``: L1, signed effects, all genes (the targets too), candidates are all perturbed conditions
of the same context in training or not, mid ranks, 1 - k / (N - 1). ``energy_distance``: Euclidean, not
squared, U-statistic, at most 256 cells drawn without replacement on each side, equally many.
``variance_corr``: unbiased variances, Pearson over genes that vary on either side. ``zero_fraction_error``:
exact zeros. A value that the real cells cannot give (one cell, no rival) is left out of the table; a
prediction cannot leave one out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import getdoc, signature
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int
from scipy.spatial.distance import cdist

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import draw

Means = Float[np.ndarray, "conditions genes"]
Values = Float[np.ndarray, "conditions"]
Noise = Literal["square", "root", "reliability", "determination", "none"]

TOP = 20
"""Genes of the ``top20`` metrics."""
FLAT = 1e-7
"""Root mean square below which a change is rounding of float32 and counts as none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What metrics look at, in natural log1p of normalized counts; one row for each scored condition.

    Parameters
    ----------
    predicted, real
        Means over cells.
    control
        Mean of the real control cells of the same context, for both sides.
    centroid
        Mean of the training perturbations' means in the same context.
    candidates
        Means of all perturbed conditions of the screen, in training or not.
    own
        Which candidate each condition is.
    rivals
        Which other candidates share its context.
    predicted_variance, real_variance
        Unbiased variances over cells; NaN where a real condition has one cell, 0 where a predicted one has.
    predicted_zeros, real_zeros
        Fractions of cells that are exactly 0.
    predicted_cells, real_cells
        The cells themselves, equally many on both sides.
    """

    predicted: Means
    real: Means
    control: Means
    centroid: Means
    candidates: Float[np.ndarray, "candidates genes"]
    own: Int[np.ndarray, "conditions"]
    rivals: Bool[np.ndarray, "conditions candidates"]
    predicted_variance: Means
    real_variance: Means
    predicted_zeros: Means
    real_zeros: Means
    predicted_cells: Sequence[sp.csr_matrix]
    real_cells: Sequence[sp.csr_matrix]


# ---- means ---------------------------------------------------------------------------------------


def mse(predicted: Means, real: Means) -> Values:
    """Mean over genes of the squared difference of means."""
    return np.square(predicted - real).mean(axis=1)


def mae(predicted: Means, real: Means) -> Values:
    """Mean over genes of the absolute difference of means."""
    return np.abs(predicted - real).mean(axis=1)


def l2(predicted: Means, real: Means) -> Values:
    """Euclidean distance of the means over all genes [ahlmann2025]."""
    return np.sqrt(np.square(predicted - real).sum(axis=1))


def pearson(x: Means, y: Means) -> Values:
    """Pearson correlation of each row of ``x`` with that of ``y``; 0 where either is constant."""
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    flat = np.minimum(*norms) <= FLAT * np.sqrt(x.shape[1])
    correlation = (x * y).sum(axis=1) / np.where(flat, 1.0, norms[0] * norms[1])
    return np.where(flat, 0.0, np.clip(correlation, -1.0, 1.0))


def pearson_delta(predicted: Means, real: Means, control: Means) -> Values:
    """Correlation of predicted and real change against control.

    Both changes contain the sampling noise of one control, so that a prediction without information can
    score above 0: read it between floor and ceiling.
    """
    return pearson(predicted - control, real - control)


def pearson_delta_top20(predicted: Means, real: Means, control: Means) -> Values:
    """``pearson_delta`` over the 20 genes that really changed most."""
    top = largest(real - control)
    return pearson(_take(predicted - control, top), _take(real - control, top))


def centroid_delta(predicted: Means, real: Means, centroid: Means) -> Values:
    """Correlation of predicted and real difference from the average training perturbation [systema].

    What all perturbations of a screen have in common earns nothing here.
    """
    return pearson(predicted - centroid, real - centroid)


def centroid_delta_top20(predicted: Means, real: Means, control: Means, centroid: Means) -> Values:
    """``centroid_delta`` over the 20 genes that really changed most against control."""
    top = largest(real - control)
    return pearson(_take(predicted - centroid, top), _take(real - centroid, top))


def largest(change: Means, count: int = TOP) -> Int[np.ndarray, "conditions top"]:
    """Genes with the largest absolute change, of equal ones the first; all where there are fewer."""
    return np.argsort(-np.abs(change), axis=1, kind="stable")[:, :count]


def _take(values: Means, genes: Int[np.ndarray, "conditions top"]) -> Float[np.ndarray, "conditions top"]:
    return np.take_along_axis(values, genes, axis=1)


def share(
    part: Bool[np.ndarray, "conditions genes"],
    whole: Bool[np.ndarray, "conditions genes"],
    none: float = np.nan,
) -> Values:
    """Share of the genes of each row; ``none`` where there is none of which to take one."""
    count = whole.sum(axis=1)
    return np.where(count > 0, part.sum(axis=1) / np.maximum(count, 1), none)


# ---- ranks ---------------------------------------------------------------------------------------


def discrimination(
    predicted: Means,
    candidates: Float[np.ndarray, "candidates genes"],
    own: Int[np.ndarray, "conditions"],
    rivals: Bool[np.ndarray, "conditions candidates"],
) -> Values:
    """How well a prediction is told from the other perturbations: 1 - k / (N - 1).

    k counts the rivals whose real mean is nearer to the prediction than that of its own condition, equally
    near ones as a half; N - 1 are the rivals. Distances are L1. They are those of signed effects too,
    because both sides subtract the same control. 1 is best, 0.5 chance, 0 worst; NaN without a rival.
    """
    distances = cdist(predicted, candidates, "cityblock")
    mine = distances[np.arange(len(own)), own][:, None]
    ties = rivals & np.isclose(distances, mine, rtol=1e-12, atol=0.0)
    nearer = rivals & (distances < mine) & ~ties
    count = rivals.sum(axis=1)
    rank = nearer.sum(axis=1) + 0.5 * ties.sum(axis=1)
    return np.where(count > 0, 1 - rank / np.maximum(count, 1), np.nan)


def discrimination_scdfm(
    predicted: Means, real: Means, control: Means, distance: Literal["l1", "l2", "cosine"] = "l1"
) -> Values:
    """Score discrimination as behind scDFM's published tables (cell-eval 0.5.42): 1 - rank / P.

    Effects are *absolute*, so that a prediction with every sign wrong scores as a perfect one; candidates
    are the P scored conditions alone; ties are won; the worst is 1 / P. Only for comparison with those
    tables.
    """
    between = _distances(np.abs(predicted - control), np.abs(real - control), distance)
    return 1 - (between < np.diag(between)[:, None]).mean(axis=1)


def _distances(
    x: Means, y: Means, kind: Literal["l1", "l2", "cosine"]
) -> Float[np.ndarray, "conditions conditions"]:
    match kind:
        case "l1":
            return cdist(x, y, "cityblock")
        case "l2":
            return cdist(x, y, "euclidean")
        case "cosine":
            return np.nan_to_num(cdist(x, y, "cosine"), nan=1.0)  # no change has no direction


# ---- populations ---------------------------------------------------------------------------------


def energy_distance(predicted_cells: Sequence[sp.csr_matrix], real_cells: Sequence[sp.csr_matrix]) -> Values:
    """``energy`` between the cells of each condition, over all genes."""
    return np.array([_energy_of(x, y) for x, y in zip(predicted_cells, real_cells, strict=True)])


def _energy_of(x: sp.csr_matrix, y: sp.csr_matrix) -> float:
    """Skip genes that are 0 in all cells, which add nothing to a distance."""
    alive = np.flatnonzero(x.getnnz(axis=0) + y.getnnz(axis=0))
    return energy(x[:, alive].toarray().astype(np.float64), y[:, alive].toarray().astype(np.float64))


def energy(x: Float[np.ndarray, "cells genes"], y: Float[np.ndarray, "others genes"]) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| of two samples [szekely2013].

    Euclidean and not squared; within a sample, pairs of different cells only (a U-statistic), so that it is
    unbiased: 0 on average for two samples of one population, and negative half of the time there. A
    predicted sample ``x`` of one cell counts as that cell repeated; NaN for one real cell.
    """
    if len(y) < 2:
        return float("nan")
    within = _euclidean(x, x).sum() / (len(x) * (len(x) - 1)) if len(x) > 1 else 0.0
    return float(2 * _euclidean(x, y).mean() - within - _euclidean(y, y).sum() / (len(y) * (len(y) - 1)))


def _euclidean(
    x: Float[np.ndarray, "cells genes"], y: Float[np.ndarray, "others genes"]
) -> Float[np.ndarray, "cells others"]:
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    if x is y:
        np.fill_diagonal(squares, 0.0)  # not what rounding leaves there
    return np.sqrt(np.maximum(squares, 0.0))


def variance_corr(predicted_variance: Means, real_variance: Means) -> Values:
    """Correlation over genes of the variances, over genes that vary on either side.

    It tells a population from a repeated mean, which scores 0.
    """
    scores = np.full(len(real_variance), np.nan)
    for row, (predicted, real) in enumerate(zip(predicted_variance, real_variance, strict=True)):
        if np.isfinite(real).all():
            varies = np.maximum(predicted, real) > FLAT**2
            scores[row] = pearson(predicted[None, varies], real[None, varies])[0] if varies.any() else 0.0
    return scores


def zero_fraction_error(predicted_zeros: Means, real_zeros: Means) -> Values:
    """Mean over genes of the absolute difference of the fractions of cells that are exactly 0."""
    return np.abs(predicted_zeros - real_zeros).mean(axis=1)


# ---- the tuple -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A metric and how to read it.

    Its function returns one value per condition, or a single one (of no dimension) for all of them.

    Parameters
    ----------
    name
        As in every table.
    function
        Fields of its suite's evidence (here ``Evidence``) in, one value per condition out.
    direction
        Whether higher or lower values are better.
    best
        Its value for a perfect prediction of endlessly many cells.
    noise
        How the sampling of finitely many cells enters, by which a ceiling that was measured between
        halves is carried over to whole conditions: as a variance (``square``), as a standard deviation
        (``root``), as an unreliability (``reliability``), as a variance in ratio to a spread that has
        half of it (``determination``), or alike in both (``none``): because it is not in the mean, or
        because the suite compares no more cells than a half has.
    how
        The conventions without which the number means little, in a few words, to be printed beside it.
    """

    name: str
    function: Callable[..., Float[np.ndarray, "*conditions"]]
    direction: Literal["higher", "lower"]
    best: float
    noise: Noise
    how: str = ""

    @property
    def about(self) -> str:
        """What it is, in a sentence."""
        return (getdoc(self.function) or "").splitlines()[0].replace("``", "")

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of its suite's evidence that it looks at."""
        return tuple(signature(self.function).parameters)

    def __call__(self, evidence: object) -> Float[np.ndarray, "*conditions"]:
        """Score every condition, or all at once."""
        return self.function(*(getattr(evidence, name) for name in self.needs))


def gather(pairs: Pairs, cells: int) -> Evidence:
    """Gather what the core metrics look at."""
    truth = pairs.truth
    predicted, real = pairs.moments, truth.moments
    drawn = [
        draw(label, x, y, cells) for label, x, y in zip(truth.labels, pairs.cells, truth.cells, strict=True)
    ]
    return Evidence(
        predicted=predicted.mean,
        real=real.mean,
        control=truth.control,
        centroid=truth.centroid,
        candidates=truth.candidates,
        own=truth.own,
        rivals=truth.rivals,
        predicted_variance=predicted.variance,
        real_variance=real.variance,
        predicted_zeros=predicted.zeros,
        real_zeros=real.zeros,
        predicted_cells=[x for x, _ in drawn],
        real_cells=[y for _, y in drawn],
    )


CONTROL = "against the real control of the context, on both sides"
CENTROID = "against the mean of the training perturbations' means in the context"
METRICS = (
    Metric("mse", mse, "lower", 0.0, "square", how="means of log1p, mean over all genes"),
    Metric("mae", mae, "lower", 0.0, "root", how="means of log1p, mean over all genes"),
    Metric("l2", l2, "lower", 0.0, "root", how="means of log1p, all genes"),
    Metric("pearson_delta", pearson_delta, "higher", 1.0, "reliability", how=f"all genes, {CONTROL}"),
    Metric(
        *("pearson_delta_top20", pearson_delta_top20, "higher", 1.0, "reliability"),
        how=f"the 20 genes that really change most, {CONTROL}",
    ),
    Metric("centroid_delta", centroid_delta, "higher", 1.0, "reliability", how=f"all genes, {CENTROID}"),
    Metric(
        *("centroid_delta_top20", centroid_delta_top20, "higher", 1.0, "reliability"),
        how=f"the 20 genes that really change most against control, {CENTROID}",
    ),
    Metric(
        *("discrimination", discrimination, "higher", 1.0, "none"),
        how="1 - k / (N - 1), L1, signed, mid ranks, all genes, all conditions of the context",
    ),
    Metric(
        *("energy_distance", energy_distance, "lower", 0.0, "none"),
        how="U-statistic, Euclidean, all genes, at most 256 cells a side",
    ),
    Metric(
        *("variance_corr", variance_corr, "higher", 1.0, "reliability"),
        how="unbiased variances of log1p, genes that vary on either side",
    ),
    Metric(
        *("zero_fraction_error", zero_fraction_error, "lower", 0.0, "root"),
        how="exact zeros, mean over all genes",
    ),
)
