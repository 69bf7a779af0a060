"""The conventions behind scDFM's published tables (cell-eval 0.5.42, pdex 0.1.21), to compare with them only.

The discrimination scores, ``overlap_at_N``, ``pr_auc`` and ``roc_auc`` do not see signs: a prediction with
every sign wrong is as good as a perfect one. Read them beside ``de_direction_match``, and judge a method by
other suites.

Conventions, of one evaluator at one version, which is told the column of contexts and so scores them one by
one: "all conditions" are those of a context, and a value of all of them is then the mean over contexts.
Space: natural log1p, all genes of the screen; means after log1p. Discrimination: *absolute* effects, 1 - rank
/ N over the scored conditions, no gene left out. Differential expression, predicted and real cells each
against the *real* control cells of their context: two-sided Mann-Whitney test with continuity and tie
correction (exact for at most 8 cells without ties); Benjamini-Hochberg over all tests of all conditions *at
once*; significant below .05; fold change = ratio of means of log1p values, which is no fold change of
expression, set to 20 where the control's mean is 0 and to 1 / 20 where only the condition's is.
``overlap_at_N``: of the N really significant genes, how many are among the N predicted significant ones with
the largest absolute logarithm of the fold change. ``de_spearman_sig``: over conditions, of the *numbers* of
significant genes, which is what the paper's column appears to be; ``de_spearman_lfc_sig``: over really
significant genes, of fold changes, which is what its text describes. ``pr_auc`` and ``roc_auc``: of all tests
of all conditions at once, score -log10 of the adjusted p-value (at least 1e-10), areas by trapezoids. Where a
prediction leaves a value undefined it counts as saying nothing.

Only correlations are carried over from halves to whole conditions: for shares and areas no law does that (see
the suite ``de``), so their ceilings are those of halves, and a little low.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control, mannwhitneyu, rankdata

from knockon.evaluate import metrics
from knockon.evaluate.metrics import Means, Metric, Noise, Values, share
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.suites.bridges import Table, by_context, column, joined

Called = Bool[np.ndarray, "conditions genes"]
One = Float[np.ndarray, ""]
"""A value of all conditions at once."""

LEVEL = 0.05
"""Adjusted p-values below are significant."""
UNBOUNDED = 20.0
"""Fold change where the control's mean is 0; its inverse where only the condition's is."""
SMALL = 8
"""With at most so many cells, a test without ties is exact."""
LEAST = 1e-10
"""Adjusted p-values below count as this one in the areas under curves."""
GENES = 256
"""Genes that are tested at once, so that memory does not grow with the panel."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the metrics look at, one row for each scored condition of one context.

    Parameters
    ----------
    predicted, real, control
        Means over cells, log1p; those of the real control for both sides.
    predicted_fold, real_fold
        Natural logarithms of the fold changes.
    predicted_p, real_p
        p-values, adjusted over all conditions.
    """

    predicted: Means
    real: Means
    control: Means
    predicted_fold: Means
    real_fold: Means
    predicted_p: Means
    real_p: Means


# ---- differential expression -----------------------------------------------------------------------


def fold(change: Means, control: Means) -> Means:
    """Natural logarithm of the ratio of means, bounded where one of them is 0."""
    ratio = np.divide(change, control, out=np.full_like(change, UNBOUNDED), where=control > 0)
    return np.log(np.where(ratio > 0, ratio, 1 / UNBOUNDED))


def adjusted(
    cells: Sequence[sp.csr_matrix], controls: Sequence[sp.csr_matrix]
) -> Float[np.ndarray, "conditions genes"]:
    """p-values of every gene between each condition and its control, adjusted over all tests at once."""
    found = np.stack([_tested(x, y) for x, y in zip(cells, controls, strict=True)])
    return false_discovery_control(found.ravel()).reshape(found.shape)


def _tested(cells: sp.csr_matrix, control: sp.csr_matrix) -> Float[np.ndarray, "genes"]:
    _, genes = cells.get_shape()
    parts = [slice(start, start + GENES) for start in range(0, genes, GENES)]
    x, y = cells.tocsc(), control.tocsc()
    return np.concatenate([_p_values(x[:, part].toarray(), y[:, part].toarray()) for part in parts])


def _p_values(
    x: Float[np.ndarray, "cells genes"], y: Float[np.ndarray, "others genes"]
) -> Float[np.ndarray, "genes"]:
    if min(len(x), len(y)) > SMALL:
        return mannwhitneyu(x, y, axis=0, method="asymptotic").pvalue
    return np.array([mannwhitneyu(a, b).pvalue for a, b in zip(x.T, y.T, strict=True)])


# ---- metrics ---------------------------------------------------------------------------------------


def overlap_at_n(predicted_fold: Means, predicted_p: Means, real_p: Means) -> Values:
    """Share of the N really significant genes among the N largest predicted significant ones; sign-blind."""
    predicted, real = _called(predicted_p), _called(real_p)
    size = np.where(predicted, -np.abs(predicted_fold), np.inf)
    place = rankdata(size, method="ordinal", axis=1)
    numbers = real.sum(axis=1)
    shared = predicted & real & (place <= numbers[:, None])
    return shared.sum(axis=1) / np.maximum(numbers, 1)


def de_sig_genes_recall(predicted_p: Means, real_p: Means) -> Values:
    """Share of the really significant genes that are significant in the prediction, too."""
    real = _called(real_p)
    return share(real & _called(predicted_p), real)


def de_direction_match(predicted_fold: Means, real_fold: Means, real_p: Means) -> Values:
    """Share of the really significant genes whose predicted change has the right sign."""
    return share(_called(real_p) & (np.sign(predicted_fold) == np.sign(real_fold)), _called(real_p))


def de_spearman_lfc_sig(predicted_fold: Means, real_fold: Means, real_p: Means) -> Values:
    """Rank correlation of predicted and real fold changes over the really significant genes."""
    called = _called(real_p)
    rows = zip(predicted_fold, real_fold, called, strict=True)
    return np.array([_spearman(x[some], y[some]) for x, y, some in rows])


def de_spearman_sig(predicted_p: Means, real_p: Means) -> One:
    """Rank correlation over conditions of the numbers of significant genes."""
    return np.array(_spearman(_called(predicted_p).sum(axis=1), _called(real_p).sum(axis=1)))


def pr_auc(predicted_p: Means, real_p: Means) -> One:
    """Area under precision and recall of the really significant genes, all conditions at once; sign-blind."""
    true, false = _curve(predicted_p, real_p)
    if not true[-1]:
        return np.array(np.nan)
    # the first point of the curve is precision 1 at recall 0, by convention
    precision = np.concatenate([[1.0], true[1:] / (true[1:] + false[1:])])
    return np.array(np.trapezoid(precision, true / true[-1]))


def roc_auc(predicted_p: Means, real_p: Means) -> One:
    """Area under true and false positive rates, all conditions at once; sign-blind."""
    true, false = _curve(predicted_p, real_p)
    if not true[-1] or not false[-1]:
        return np.array(np.nan)
    return np.array(np.trapezoid(true / true[-1], false / false[-1]))


def _curve(
    predicted_p: Means, real_p: Means
) -> tuple[Float[np.ndarray, "levels"], Float[np.ndarray, "levels"]]:
    """Numbers of true and of false positives at every level of the predicted p-value, from none on."""
    levels, at = np.unique(np.maximum(predicted_p, LEAST), return_inverse=True)
    real, at = _called(real_p).ravel(), at.ravel()
    found = [np.bincount(at, weights, len(levels)).cumsum() for weights in (real, ~real)]
    true, false = (np.concatenate([[0.0], counts]) for counts in found)
    return true, false


def _called(p: Means) -> Called:
    return p < LEVEL


def _spearman(predicted: np.ndarray, real: np.ndarray) -> float:
    """NaN where the real side does not vary, 0 where only the predicted one does not."""
    if len(real) < 2 or np.ptp(real) == 0:
        return float("nan")
    return 0.0 if np.ptp(predicted) == 0 else float(np.corrcoef(rankdata(predicted), rankdata(real))[0, 1])


# ---- the tuple -------------------------------------------------------------------------------------


def gather(pairs: Pairs, cells: int) -> Table:  # noqa: ARG001 (all cells are tested)
    """Score each context; all cells of either side are tested."""
    parts = []
    for places in by_context(pairs.truth.labels):
        evidence = _evidence(pairs, places)
        parts.append((places, {metric.name: metric(evidence) for metric in OF_A_CONTEXT}))
    return Table(values=joined(parts, len(pairs.truth.labels)))


def _evidence(pairs: Pairs, places: Int[np.ndarray, "some"]) -> Evidence:
    truth = pairs.truth
    controls = [truth.population(truth.labels[places[0]].control())] * len(places)
    predicted, real, control = (
        means[places] for means in (pairs.moments.mean, truth.moments.mean, truth.control)
    )
    return Evidence(
        predicted=predicted,
        real=real,
        control=control,
        predicted_fold=fold(predicted, control),
        real_fold=fold(real, control),
        predicted_p=adjusted([pairs.cells[i] for i in places], controls),
        real_p=adjusted([truth.cells[i] for i in places], controls),
    )


def _discrimination(distance: Literal["l1", "l2", "cosine"]) -> Callable[..., Values]:
    def scored(predicted: Means, real: Means, control: Means) -> Values:
        if len(real) < 2:  # without a rival, anything is told apart
            return np.full(len(real), np.nan)
        return metrics.discrimination_scdfm(predicted, real, control, distance)

    scored.__doc__ = f"Discrimination by the {distance} distance of *absolute* effects; sign-blind."
    return scored


def _metric(
    name: str,
    function: Callable[..., Float[np.ndarray, "*conditions"]],
    noise: Noise = "none",
    how: str = "",
) -> Metric:
    errors = noise in ("square", "root")
    direction, best = ("lower", 0.0) if errors else ("higher", 1.0)
    how = ", ".join(filter(None, (how, "cell-eval 0.5.42, to compare with scDFM's tables only")))
    return Metric(f"scdfm-2025:{name}", function, direction, best, noise, how)


OF_A_CONTEXT = (
    _metric("l2", metrics.l2, "root"),
    _metric("mse", metrics.mse, "square"),
    _metric("mae", metrics.mae, "root"),
    _metric("pearson_delta", metrics.pearson_delta, "reliability"),
    _metric("discrimination_score_l1", _discrimination("l1"), how="sign-blind"),
    _metric("discrimination_score_l2", _discrimination("l2"), how="sign-blind"),
    _metric("discrimination_score_cosine", _discrimination("cosine"), how="sign-blind"),
    _metric("overlap_at_N", overlap_at_n, how="sign-blind, adjusted over all tests"),
    _metric("de_sig_genes_recall", de_sig_genes_recall, how="sign-blind, adjusted over all tests"),
    _metric("de_direction_match", de_direction_match, how="ratio of mean log1p"),
    _metric("de_spearman_lfc_sig", de_spearman_lfc_sig, "reliability", "ratio of mean log1p"),
    _metric("de_spearman_sig", de_spearman_sig, "reliability", "numbers of genes, adjusted over all tests"),
    _metric("pr_auc", pr_auc, how="sign-blind, all tests pooled, trapezoids"),
    _metric("roc_auc", roc_auc, how="sign-blind, all tests pooled, trapezoids"),
)
"""Functions of the evidence of one context."""
METRICS = tuple(replace(metric, function=column(metric.name, metric.about)) for metric in OF_A_CONTEXT)
