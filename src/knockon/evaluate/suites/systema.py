"""The conventions of Systema: what is left of a score when what all perturbations share earns nothing.

Conventions [systema]. Means of log1p over all genes, as in ``core``, of which the four correlations are: with
control and with the mean of the training perturbations' means in the same context as reference; over the
20 genes that really changed most against control in ``top20``. ``centroid_accuracy``: Euclidean, among the
real means of all perturbed conditions of the same context, in training or not; as near is not farther.
``jaccard_top20``: of the predicted and the real 20 genes with the largest absolute change against control,
shared ones over all; blind to signs, so it is to be read beside a correlation. Its ceiling between halves is
carried over to whole conditions as a correlation's is: for simulated effects that is up to .06 too high, and
to leave it as it is would be up to .15 too low.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial.distance import cdist

from knockon.evaluate import metrics
from knockon.evaluate.metrics import FLAT, TOP, Means, Metric, Values, largest, mse
from knockon.evaluate.truth import Truth

SHARED = "pearson_delta", "pearson_delta_top20", "centroid_delta", "centroid_delta_top20"
"""Metrics of ``core`` that are Systema's, too."""


def rmse(predicted: Means, real: Means) -> Values:
    """Root of the mean over genes of the squared difference of means."""
    return np.sqrt(mse(predicted, real))


def centroid_accuracy(
    predicted: Means,
    candidates: Float[np.ndarray, "candidates genes"],
    own: Int[np.ndarray, "conditions"],
    rivals: Bool[np.ndarray, "conditions candidates"],
) -> Values:
    """Share of the other conditions whose real mean is farther from the prediction than that of its own.

    1 is best, .5 chance, 0 worst; NaN without another condition in the context.
    """
    distances = cdist(predicted, candidates)
    farther = distances > distances[np.arange(len(own)), own][:, None] * (1 + 1e-12)
    count = rivals.sum(axis=1)
    return np.where(count > 0, (farther & rivals).sum(axis=1) / np.maximum(count, 1), np.nan)


def jaccard_top20(predicted: Means, real: Means, control: Means) -> Values:
    """Jaccard index of the 20 genes that change most by prediction and the 20 that really do.

    A gene that does not change is not among them, so that no change scores 0; NaN where no gene really
    changes. Two choices of 20 out of many genes at random share next to nothing.
    """
    ours, theirs = _top(predicted - control), _top(real - control)
    union = (ours | theirs).sum(axis=1)
    return np.where(theirs.any(axis=1), (ours & theirs).sum(axis=1) / np.maximum(union, 1), np.nan)


def _top(change: Means) -> Bool[np.ndarray, "conditions genes"]:
    chosen = np.zeros(change.shape, dtype=bool)
    np.put_along_axis(chosen, largest(change, TOP), values=True, axis=1)
    return chosen & (np.abs(change) > FLAT)


def systematic_variation(truth: Truth) -> float:
    """How alike perturbations are: mean cosine of each real change with the average training change.

    Both are against control, whose sampling noise they share. Near 1, what all perturbations have in
    common is nearly everything, and a score with control as reference says little.
    """
    changes, average = truth.moments.mean - truth.control, truth.centroid - truth.control
    norms = np.linalg.norm(changes, axis=1) * np.linalg.norm(average, axis=1)
    return float(((changes * average).sum(axis=1) / np.maximum(norms, FLAT**2)).mean())


gather = metrics.gather

METRICS = (
    *(metric for metric in metrics.METRICS if metric.name in SHARED),
    Metric(
        *("centroid_accuracy", centroid_accuracy, "higher", 1.0, "none"),
        how="Euclidean, all perturbed conditions of the context",
    ),
    Metric("rmse", rmse, "lower", 0.0, "root", how="means of log1p, all genes"),
    Metric(
        *("jaccard_top20", jaccard_top20, "higher", 1.0, "reliability"),
        how="largest absolute change against control on each side, blind to sign",
    ),
)
