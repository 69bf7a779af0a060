"""Measured effects with their noise taken out: what conditions share, and what stands out of one.

A condition has some hundred cells, so that the noise of its mean is often larger than its effect. Effects
are the sum of a few patterns that conditions share (singular values beyond what noise makes), and of
single entries that no pattern explains, such as the perturbed gene itself.
"""

import numpy as np
from jaxtyping import Float
from scipy.optimize import lsq_linear

SCALES = 4.0 ** np.arange(6)
"""Variances that the entries which stand out may have, in units of that of the noise."""
ENTRIES = 500_000
"""Entries that the shares of those variances are estimated from at most, drawn at random."""
ROUNDS = 30
"""Iterations that the shares of those variances are estimated in."""

Table = Float[np.ndarray, "rows genes"]


def denoise(effects: Table, rows: Float[np.ndarray, "rows"], genes: Float[np.ndarray, "genes"]) -> Table:
    """Estimate the effects behind noisy ones.

    Parameters
    ----------
    effects
        As they were measured.
    rows, genes
        The variance of the noise of an entry is the product of its row's and its gene's. A gene without
        noise, which no cell has, keeps its entries.
    """
    noisy = genes > 0
    scale = np.sqrt(np.outer(rows, genes[noisy]))
    white = effects[:, noisy] / scale
    patterns = low_rank(white)
    found = effects.copy()
    found[:, noisy] = (patterns + stand_out(white - patterns)) * scale
    return found


def low_rank(white: Table) -> Table:
    """Shrink the singular values of a table with noise of variance 1 [gavish2017, eq. 7].

    The result has the smallest expected squared error that any shrinkage of singular values reaches, for
    large tables.
    """
    if not white.size:
        return white
    u, s, v = np.linalg.svd(white, full_matrices=False)
    short, long = sorted(white.shape)
    ratio, value = short / long, s / np.sqrt(long)
    inside = (value**2 - ratio - 1) ** 2 - 4 * ratio
    beyond = value > 1 + np.sqrt(ratio)
    shrunken = np.sqrt(np.where(beyond, inside, 0)) / np.where(beyond, value, 1)
    return (u * (shrunken * np.sqrt(long))) @ v


def stand_out(white: Table) -> Table:
    """Shrink entries that are zero, or normal of one of several variances, with noise of variance 1.

    The result is their posterior mean. How many are of which variance is estimated from all of them, or from
    ``ENTRIES`` of them, by expectation maximization (empirical Bayes [stephens2017]).
    """
    if not white.size:
        return white
    variances = np.concatenate([[0.0], SCALES])
    precision = 1 / (1 + variances)
    some = white.ravel()
    if white.size > ENTRIES:
        some = some[np.random.default_rng(0).integers(white.size, size=ENTRIES)]
    likelihood = _likelihood(some, precision)
    share = np.full(len(variances), 1 / len(variances))
    for _ in range(ROUNDS):
        total = np.tensordot(share.astype(np.float32), likelihood, 1)
        share = share * np.array([float(np.mean(one / total)) for one in likelihood])
    found = np.empty_like(white)
    for row, entries in enumerate(white):
        likelihood = _likelihood(entries, precision)
        total = np.tensordot(share.astype(np.float32), likelihood, 1)
        kept = np.tensordot((share * (1 - precision)).astype(np.float32), likelihood, 1) / total
        found[row] = entries * kept
    return found


def slopes(
    gram: Float[np.ndarray, "guesses guesses"], moment: Float[np.ndarray, "guesses"]
) -> Float[np.ndarray, "guesses"]:
    """Find the factors, between 0 and 1, by which a sum of guesses is nearest to what was measured.

    Parameters
    ----------
    gram, moment
        Products of the guesses with each other, and with what was measured. A guess that is always 0 gets 0.
    """
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.maximum(values, 0))
    right = np.divide(vectors.T @ moment, root, out=np.zeros_like(root), where=root > 1e-6 * root.max())
    found = lsq_linear((vectors * root).T, right, bounds=(0, 1)).x
    return np.where(np.diag(gram) > 0, found, 0)


def _likelihood(
    entries: Float[np.ndarray, "entries"], precision: Float[np.ndarray, "variances"]
) -> Float[np.ndarray, "variances entries"]:
    """Density of entries at each variance, but for a factor that only depends on the entry."""
    squares = np.square(entries, dtype=np.float32)
    return np.stack([np.sqrt(p) * np.exp(squares * np.float32((precision[-1] - p) / 2)) for p in precision])
