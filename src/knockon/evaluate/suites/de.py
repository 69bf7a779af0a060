"""Does a prediction tell which genes change, how many, and which way? The suite ``de``.

Both sides are compared with the *real* control cells of the same context. ``real`` genes are those that are
significant in the real cells of a condition, ``predicted`` genes those that are in the predicted cells.

Conventions. Space: as the suite ``core``. Cells: equally many on both sides, drawn without replacement, half
of the condition's real cells, at most 256; and all control cells. Half, because more genes are significant in
more cells, by no law that holds for all metrics: so predictions are compared by as many cells as the ceiling
has, and nothing is extrapolated. Test: two-sided Mann-Whitney U, ties and continuity corrected, normal
approximation, by illico, which is told the scale. Tested: genes that at least 5 cells of the condition have
counts of, or would if as large a share had them as of control cells. Adjusted over these [benjamini1995],
within a condition and a side; significant below .05. Fold change: log2 of arithmetic means of expm1 with a
pseudocount of .01 on both; genes are not filtered by it. A condition without a real gene is left out, but for
counts: they leave out conditions of too few cells to test any gene. A prediction that calls nothing gets the
worst value.

``de_overlap``, ``de_precision``, ``de_jaccard`` and ``de_pr_auc`` are blind to the direction of a change: a
prediction with every sign wrong scores as well as a replicate. Read them beside ``de_signed_overlap`` and
``de_direction``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from knockon.evaluate.metrics import Metric, Values, pearson, share
from knockon.evaluate.pairs import Pairs

Genes = Bool[np.ndarray, "conditions genes"]
Changes = Float[np.ndarray, "conditions genes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What the metrics look at; one row for each scored condition.

    Parameters
    ----------
    predicted, real
        Genes that differ significantly from control.
    predicted_adjusted
        Adjusted p-values.
    predicted_lfc, real_lfc
        Log2 fold changes against control, of all genes; 0 for genes that do not change.
    predicted_count, real_count
        Numbers of significant genes; NaN of real cells that are too few to test any gene.
    """

    predicted: Genes
    real: Genes
    predicted_adjusted: Changes
    predicted_lfc: Changes
    real_lfc: Changes
    predicted_count: Values
    real_count: Values


# ---- which genes -----------------------------------------------------------------------------------


def overlap(predicted: Genes, real: Genes, predicted_lfc: Changes) -> Values:
    """Share of the real genes among as many predicted genes, those of the largest fold changes."""
    return share(_top(predicted, real, predicted_lfc) & real, real)


def precision(predicted: Genes, real: Genes) -> Values:
    """Share of the predicted genes that are real."""
    return _of_real(share(predicted & real, predicted, none=0.0), real)


def jaccard(predicted: Genes, real: Genes) -> Values:
    """Genes that are predicted and real, as a share of those that are either."""
    return _of_real(share(predicted & real, predicted | real), real)


def pr_auc(real: Genes, predicted_adjusted: Changes) -> Values:
    """Average precision of finding the real genes by the predicted p-value.

    By -log10 of the adjusted p-value; genes of equal ones share a threshold.
    """
    return _each(real, lambda row: average_precision_score(real[row], -predicted_adjusted[row]), least=1)


# ---- which way -------------------------------------------------------------------------------------


def signed_overlap(predicted: Genes, real: Genes, predicted_lfc: Changes, real_lfc: Changes) -> Values:
    """``de_overlap``, where a gene counts only if it changes in the right direction."""
    return share(_top(predicted, real, predicted_lfc) & real & _agree(predicted_lfc, real_lfc), real)


def direction(real: Genes, predicted_lfc: Changes, real_lfc: Changes) -> Values:
    """Share of the real genes that the prediction changes in the right direction, significantly or not.

    A guess is right in half of them; genes that the prediction leaves unchanged are wrong.
    """
    return share(real & _agree(predicted_lfc, real_lfc), real)


def lfc_spearman(real: Genes, predicted_lfc: Changes, real_lfc: Changes) -> Values:
    """Rank correlation of predicted and real fold changes over the real genes, of which it takes two."""
    return _each(
        real, lambda row: _spearman(predicted_lfc[row, real[row]], real_lfc[row, real[row]]), least=2
    )


# ---- how many --------------------------------------------------------------------------------------


def count_spearman(predicted_count: Values, real_count: Values) -> Float[np.ndarray, ""]:
    """Rank correlation over conditions of the numbers of predicted and of real genes: one value for all."""
    told = np.isfinite(real_count)
    if told.sum() < 3 or len(np.unique(real_count[told])) < 2:  # two have no order to speak of
        return np.array(np.nan)
    return np.array(_spearman(predicted_count[told], real_count[told]))


def count_error(predicted_count: Values, real_count: Values) -> Values:
    """Absolute log2 ratio of the numbers of predicted and real genes, one added to both: 1 is twice or half.

    Also of conditions in which no gene is real, where it counts false alarms.
    """
    return np.abs(np.log2((predicted_count + 1) / (real_count + 1)))


# ---- parts -----------------------------------------------------------------------------------------


def _top(predicted: Genes, real: Genes, predicted_lfc: Changes) -> Genes:
    """As many predicted genes as are real: those of the largest fold changes, of equal ones the first."""
    order = np.argsort(np.where(predicted, -np.abs(predicted_lfc), np.inf), axis=1, kind="stable")
    place = np.argsort(order, axis=1)
    return predicted & (place < real.sum(axis=1, keepdims=True))


def _agree(predicted_lfc: Changes, real_lfc: Changes) -> Genes:
    return np.sign(predicted_lfc) * np.sign(real_lfc) > 0


def _of_real(values: Values, real: Genes) -> Values:
    return np.where(real.any(axis=1), values, np.nan)


def _each(real: Genes, score: Callable[[int], float], least: int) -> Values:
    """Score the conditions that have at least so many real genes."""
    enough = real.sum(axis=1) >= least
    return np.array([score(row) if told else np.nan for row, told in enumerate(enough)])


def _spearman(x: Float[np.ndarray, "_"], y: Float[np.ndarray, "_"]) -> float:
    """Give 0 where either is constant."""
    return float(pearson(rankdata(x)[None], rankdata(y)[None])[0])


def gather(pairs: Pairs, _: int) -> Evidence:
    """Gather what the metrics look at; how many cells are compared is the truth's choice."""
    predicted, real = pairs.differences, pairs.truth.differences
    count = real.significant.sum(axis=1)
    return Evidence(
        predicted=predicted.significant,
        real=real.significant,
        predicted_adjusted=predicted.adjusted,
        predicted_lfc=predicted.lfc,
        real_lfc=real.lfc,
        predicted_count=predicted.significant.sum(axis=1).astype(float),
        real_count=np.where(real.tested.any(axis=1), count, np.nan),
    )


HOW = "Mann-Whitney U, BH < .05, half of the real cells a side"
METRICS = (
    Metric("de_overlap", overlap, "higher", 1.0, "none", f"{HOW}, top by |log2 FC|, sign-blind"),
    Metric("de_precision", precision, "higher", 1.0, "none", f"{HOW}, sign-blind"),
    Metric("de_direction", direction, "higher", 1.0, "none", f"{HOW}, over real genes"),
    Metric("de_signed_overlap", signed_overlap, "higher", 1.0, "none", f"{HOW}, top by |log2 FC|"),
    Metric("de_lfc_spearman", lfc_spearman, "higher", 1.0, "none", f"{HOW}, over real genes"),
    Metric("de_count_spearman", count_spearman, "higher", 1.0, "none", f"{HOW}, over conditions"),
    Metric("de_pr_auc", pr_auc, "higher", 1.0, "none", f"{HOW}, by -log10 adjusted p, sign-blind"),
    Metric(
        "de_count_error", count_error, "lower", 0.0, "none", f"{HOW}, |log2 ((predicted + 1) / (real + 1))|"
    ),
    Metric("de_jaccard", jaccard, "higher", 1.0, "none", f"{HOW}, sign-blind"),
)
