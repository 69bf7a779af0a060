"""How much of the noise of measured effects should be taken out of them."""

import numpy as np
from jaxtyping import Float

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
        first, second, rows = [], [], []
        for label in labels:
            control = means.get(label.control(), 0.0)
            cells = draw.permutation(train.cells_of(label))
            middle = len(cells) // 2
            first.append(cells[:middle].mean(axis=0, dtype=np.float64) - control)
            second.append(cells[middle:].mean(axis=0, dtype=np.float64) - control)
            rows.append(1 / middle)
        known, wanted = np.array(first), np.array(second)
        for i, share in enumerate(SHARES):
            errors[i] += np.square(denoise(known, share * np.array(rows), genes) - wanted).sum()
    return SHARES[int(errors.argmin())]
