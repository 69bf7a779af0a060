"""How much of the noise of measured effects should be taken out of them."""

import numpy as np
from jaxtyping import Float

from knockon.data.arrays import moments
from knockon.data.screen import Screen
from knockon.dynamics.shrinkage import denoise

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of noise that are tried."""
HALVINGS = 2
"""Random halvings that they are tried on."""


def share_by_halves(train: Screen, genes: Float[np.ndarray, "genes"]) -> float:
    """Find the share of the noise with which halves of training conditions predict the other halves best.

    Parameters
    ----------
    genes
        Variance of each gene within conditions.
    """
    draw, means = np.random.default_rng(0), train.means()
    labels = [label for label in train.conditions if len(train.rows[label]) > 1]
    if not labels:
        return 1.0
    errors = np.zeros(len(SHARES))
    for _ in range(HALVINGS):
        groups = {}
        for label in labels:
            order = draw.permutation(train.rows[label])
            groups[label, 0], groups[label, 1] = np.split(order, [len(order) // 2])
        found = moments(train.matrix, groups)
        sides = [[found[x, i].mean - means.get(x.control(), 0) for x in labels] for i in (0, 1)]
        known, wanted = map(np.array, sides)
        rows = np.array([1 / found[label, 0].cells for label in labels])
        for i, share in enumerate(SHARES):
            errors[i] += np.square(denoise(known, share * rows, genes) - wanted).sum()
    return SHARES[int(errors.argmin())]
