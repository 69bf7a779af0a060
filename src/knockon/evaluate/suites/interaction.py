"""Interaction: what two perturbations do together beyond the sum of what each does alone.

Scored are doubles of the test part whose two singles were measured in training, at the same doses and in
the same context. Conventions [ahlmann2025]. Space and means: those of ``core``, all genes, the targets too.
Expected change: the sum of the changes of the two *real* singles; all changes are against the *real* control
of the context, on both sides. Residual: change less expected change. Sampling error of the real residual:
root of the summed variances of the means of its four populations (double, two singles, control).
Tested genes: those whose mean is at least .1 in one of the four; rarer ones can hardly have a residual of
that size. Really non-additive genes: tested ones whose real residual is at least .1, and significant by a
two-sided normal test against its sampling error with a false discovery rate of .05 within the double
[benjamini1995]; a double with fewer than 5 of them has none. Detection: among tested genes.
Classes: ``synergy``, the residual points where the expected change does, or nothing was expected (a change
below .1); ``opposite``, it points the other way and so far that the change is reversed, by at least .1;
``buffering``, it points the other way and is neither.

All scores look at really non-additive genes: a double without any has none. Both residuals subtract the same
singles and share their sampling noise, by which over all genes a prediction without information (no change at
all) and a replicate correlate where nothing is non-additive, the more so the weaker the singles are. Cells of
their own for the two sides are no remedy, because models were trained on all cells of the singles, and the
additive baseline would be wrong by construction. That baseline predicts no residual but what sampling its
cells leaves, and scores about chance; no change predicts a residual, that the singles cancel, which does find
genes: read all of these between floor and ceiling.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Bool, Int
from scipy.stats import false_discovery_control, norm

from knockon.data.splits import singles
from knockon.evaluate.metrics import FLAT, Means, Metric, Values
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import moments, num_cells
from knockon.evaluate.truth import Truth
from knockon.types import Label, UserError

SIZE = 0.1
"""Change of a mean, in log1p, below which nothing is made of it."""
RATE = 0.05
"""False discovery rate of really non-additive genes, within a double."""
LEAST = 5
"""Really non-additive genes without which a double has none: a few may be called by chance."""
CLASSES = ("additive", "synergy", "buffering", "opposite")
"""What a gene does under a double; ``additive`` where it is not really non-additive."""

Calls = Bool[np.ndarray, "conditions genes"]
Classes = Int[np.ndarray, "conditions genes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What metrics of interaction look at; NaN for conditions that are not scored.

    Parameters
    ----------
    predicted, real
        Residuals: changes of the mean against control, less the expected change.
    expected
        Sum of the real changes under the two singles.
    error
        Sampling error of ``real``, a standard deviation.
    doubt
        That of the mean of the predicted cells.
    tested, called
        Whether a gene is tested, and whether it is really non-additive; none is in conditions that are not
        scored.
    """

    predicted: Means
    real: Means
    expected: Means
    error: Means
    doubt: Means
    tested: Calls
    called: Calls


# ---- metrics ---------------------------------------------------------------------------------------


def interaction_cosine(predicted: Means, real: Means, called: Calls) -> Values:
    """Cosine of predicted and real residual over the really non-additive genes.

    A correlation about 0, which is the residual of an additive double. 1 is best, 0 says nothing, -1 is
    worst; NaN where there are no such genes.
    """
    ours, theirs = (np.where(called, residual, 0.0) for residual in (predicted, real))
    norms = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    cosine = (ours * theirs).sum(axis=1) / np.maximum(norms[0] * norms[1], FLAT**2)
    return np.where(called.any(axis=1), cosine, np.nan)


def interaction_ap(predicted: Means, error: Means, doubt: Means, tested: Calls, called: Calls) -> Values:
    """Average precision of predicted residuals in finding the really non-additive genes.

    Tested genes are ranked by the size of the predicted residual in units of the sampling errors of the real
    one and of the predicted cells, without which genes that vary much would be found by chance. Chance is
    the share of tested genes that are really non-additive; NaN where none or all are.
    """
    from sklearn.metrics import average_precision_score  # noqa: PLC0415 (a second)

    return _detection(average_precision_score, _surprise(predicted, error, doubt), tested, called)


def interaction_auroc(predicted: Means, error: Means, doubt: Means, tested: Calls, called: Calls) -> Values:
    """Area under the ROC curve of predicted residuals in finding the really non-additive genes.

    Ranked as for ``interaction_ap``. 1 is best and .5 chance, however many such genes there are.
    """
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 (a second)

    return _detection(roc_auc_score, _surprise(predicted, error, doubt), tested, called)


def _surprise(predicted: Means, error: Means, doubt: Means) -> Means:
    return np.abs(predicted) / np.maximum(np.hypot(error, doubt), FLAT)


def _detection(area: Callable[..., float], scores: Means, tested: Calls, called: Calls) -> Values:
    values = np.full(len(called), np.nan)
    for row in np.flatnonzero(called.any(axis=1) & (tested & ~called).any(axis=1)):
        values[row] = area(called[row, tested[row]], scores[row, tested[row]])
    return values


def interaction_class(predicted: Means, real: Means, expected: Means, called: Calls) -> Values:
    """Balanced accuracy of synergy, buffering or opposite over really non-additive genes, above chance.

    The mean over the classes that are present of the share of genes given the right class and direction,
    brought to 0 for chance (one over the number of classes) and 1 for all right. NaN where fewer than two
    classes are present, because always the same answer would be right then.
    """
    ours, theirs = classes(predicted, expected), classes(real, expected)
    right = (ours == theirs) & (np.sign(predicted) == np.sign(real)) & (np.abs(predicted) > FLAT)
    values = np.full(len(real), np.nan)
    for row, genes in enumerate(called):
        present = np.unique(theirs[row, genes])
        if len(present) > 1:
            recall = np.mean([right[row, genes & (theirs[row] == kind)].mean() for kind in present])
            values[row] = (recall - 1 / len(present)) / (1 - 1 / len(present))
    return values


def interaction_size(predicted: Means, real: Means, called: Calls) -> Values:
    """Difference of the sizes of predicted and real residual, in ratio to their sum.

    Sizes are Euclidean norms over the really non-additive genes. From 0 to 1, which is no interaction; 1/3
    for twice the real size or half of it. NaN where there are no such genes.
    """
    ours, theirs = (np.linalg.norm(np.where(called, x, 0.0), axis=1) for x in (predicted, real))
    return np.where(called.any(axis=1), np.abs(ours - theirs) / np.maximum(ours + theirs, FLAT), np.nan)


def classes(residual: Means, expected: Means) -> Classes:
    """Class of each gene, as a place in ``CLASSES``, by a residual and the change that was expected."""
    along = residual * np.sign(expected)
    reversed_ = np.abs(expected) + along <= -SIZE
    kinds = np.where(reversed_, CLASSES.index("opposite"), CLASSES.index("buffering"))
    return np.where((along > 0) | (np.abs(expected) < SIZE), CLASSES.index("synergy"), kinds)


# ---- evidence --------------------------------------------------------------------------------------


def gather(pairs: Pairs, cells: int) -> Evidence:  # noqa: ARG001 (means are of all cells)
    """Gather what the metrics of interaction look at.

    Raises
    ------
    UserError
        If no scored condition is a double with both singles in training.
    """
    truth = pairs.truth
    rows, size = _scored(truth), truth.control.shape
    expected, variance, highest = np.full((3, *size), np.nan)
    expected[rows], variance[rows], highest[rows] = _from_parts(truth, rows)
    measured, predicted = truth.moments, pairs.moments
    real = measured.mean - truth.control - expected
    error = np.sqrt(measured.variance / _counts(truth.cells) + variance)
    tested = (np.fmax(highest, measured.mean) >= SIZE) & (error > 0)
    return Evidence(
        predicted=predicted.mean - truth.control - expected,
        real=real,
        expected=expected,
        error=error,
        doubt=np.sqrt(predicted.variance / _counts(pairs.cells)),
        tested=tested,
        called=non_additive(real, error, tested),
    )


def _counts(populations: Iterable[sp.csr_matrix]) -> Int[np.ndarray, "conditions 1"]:
    return np.array([num_cells(cells) for cells in populations])[:, None]


def _scored(truth: Truth) -> list[int]:
    """Rows of the doubles whose singles were both measured in training."""
    train = set(truth.train)
    rows = [
        row
        for row, label in enumerate(truth.labels)
        if len(label.perturbations) == 2 and train.issuperset(singles(label))
    ]
    if not rows:
        raise UserError(
            "No test condition is a double whose two singles were measured in training",
            offenders=truth.labels,
            expected="doubles A+B, with A and B in training in the same context",
            mend="choose another --suite, or --split additive",
        )
    return rows


def _from_parts(truth: Truth, rows: list[int]) -> tuple[Means, Means, Means]:
    """Find what the singles and the control of doubles give.

    Returns
    -------
    The sum of the changes under the singles, the sum of the sampling variances of the three means, and the
    highest of the three.
    """
    parts = [(*singles(label), label.control()) for label in _at(truth, rows)]
    each = sorted({part for three in parts for part in three})
    populations = [truth.population(part) for part in each]
    found = moments(populations)
    place = np.array([[each.index(part) for part in three] for three in parts])
    means, variances = found.mean[place], (found.variance / _counts(populations))[place]
    return means[:, 0] + means[:, 1] - 2 * means[:, 2], variances.sum(axis=1), means.max(axis=1)


def _at(truth: Truth, rows: list[int]) -> list[Label]:
    return [truth.labels[row] for row in rows]


def non_additive(residual: Means, error: Means, tested: Calls) -> Calls:
    """Call the genes whose real residual is at least ``SIZE`` and significant at ``RATE`` in their row.

    A row of fewer than ``LEAST`` has none.
    """
    called = np.zeros(residual.shape, dtype=bool)
    for row, genes in enumerate(tested):
        if genes.any():
            p = 2 * norm.sf(np.abs(residual[row, genes]) / error[row, genes])
            called[row, genes] = false_discovery_control(p) <= RATE
    called &= np.abs(residual) >= SIZE
    return called & (called.sum(axis=1, keepdims=True) >= LEAST)


def table(pairs: Pairs) -> pd.DataFrame:
    """Tabulate the changes of every gene under every scored double, against control, to be drawn.

    Returns
    -------
    DataFrame
        ``condition, gene, expected, real, predicted, class``: the sum of the two singles' changes, the real
        and the predicted change, and which of ``CLASSES`` the gene really has.

    Raises
    ------
    UserError
        If no scored condition is a double with both singles in training.
    """
    found, rows = gather(pairs, 0), _scored(pairs.truth)
    names, genes = [str(label) for label in _at(pairs.truth, rows)], pairs.truth.screen.genes
    kinds = np.where(found.called, classes(found.real, found.expected), CLASSES.index("additive"))
    return pd.DataFrame(
        {
            "condition": np.repeat(names, len(genes)),
            "gene": np.tile(genes, len(rows)),
            "expected": found.expected[rows].ravel(),
            "real": (found.expected + found.real)[rows].ravel(),
            "predicted": (found.expected + found.predicted)[rows].ravel(),
            "class": np.array(CLASSES)[kinds[rows]].ravel(),
        }
    )


CALLED = f"genes with |real residual| >= {SIZE:g} log1p and a false discovery rate of {RATE:g}"

METRICS = (
    Metric(
        *("interaction_cosine", interaction_cosine, "higher", 1.0, "reliability"),
        how=f"of residuals, real singles and control on both sides; {CALLED}",
    ),
    Metric(
        *("interaction_ap", interaction_ap, "higher", 1.0, "none"),
        how=f"|residual| / sampling errors; finds {CALLED}; chance is their share of tested genes",
    ),
    Metric(
        *("interaction_auroc", interaction_auroc, "higher", 1.0, "none"),
        how=f"|residual| / sampling errors; finds {CALLED}; chance .5",
    ),
    Metric(
        *("interaction_class", interaction_class, "higher", 1.0, "none"),
        how=f"synergy, buffering, opposite; balanced accuracy, 0 is chance; {CALLED}",
    ),
    Metric(
        *("interaction_size", interaction_size, "lower", 0.0, "none"),
        how=f"|a - b| / (a + b) of the norms; {CALLED}",
    ),
)
