"""What cells say of genes: moments, correlations, and the graph of the strongest of them."""

import functools
import operator

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.data import arrays
from knockon.data.values import Matrix

GENE_BLOCK = 1024


def moments(
    matrix: Matrix, rows: Int[np.ndarray, "cells"], *, second_log: bool = False
) -> tuple[Float[np.ndarray, "genes"], Float[np.ndarray, "genes"]]:
    """Mean and sample standard deviation of each gene; a gene that does not vary has exactly 0.

    Parameters
    ----------
    second_log
        Take ``log1p`` of the values first, whatever they are.
    """
    found = arrays.moments(matrix, {"all": rows}, second_log=second_log)["all"]
    return found.mean, found.std


def correlation(
    matrix: Matrix, rows: Int[np.ndarray, "cells"], *, second_log: bool = False
) -> Float[np.ndarray, "genes genes"]:
    """Pearson correlation of all pairs of genes, in float64; only a block of cells is dense at a time.

    A gene that does not vary correlates with nothing but itself. See ``moments`` for ``second_log``.
    """
    mean, std = moments(matrix, rows, second_log=second_log)
    inverse = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0)
    function = functools.partial(_products, mean=mean, inverse=inverse, second_log=second_log)
    total = arrays.fold(function, operator.iadd, matrix, np.sort(rows), result=8 * len(mean) ** 2)
    total /= max(1, len(rows) - 1)
    np.fill_diagonal(total, 1.0)
    return np.clip(total, -1.0, 1.0, out=total)


def neighbors(
    correlations: Float[np.ndarray, "genes genes"], k: int, *, negative: bool = True
) -> sp.csr_matrix:
    """Symmetric graph of the strongest correlations, with every gene its own neighbor.

    Each gene selects the k others of largest absolute correlation; exact zeros are never selected.
    Genes may end with more than k neighbors, and hubs have many.

    Parameters
    ----------
    negative
        Keep an edge that either end selected, whatever its sign. Without it, a negative edge survives
        only where both ends selected it.

    Returns
    -------
    csr_matrix
        True where two genes are neighbors.
    """
    genes = len(correlations)
    k = min(k, genes - 1)
    selected = [np.empty((0, k), int)]
    for start in range(0, genes, GENE_BLOCK):
        strength = np.abs(correlations[start : start + GENE_BLOCK])
        own = np.arange(len(strength))
        strength[own, start + own] = -1.0
        selected.append(np.argpartition(-strength, k, axis=1)[:, :k])
    every = np.arange(genes)
    row = np.concatenate([every, np.repeat(every, k)])
    column = np.concatenate([every, np.concatenate(selected).ravel()])
    weights = np.abs(correlations[row, column]) if negative else correlations[row, column]
    directed = sp.csr_matrix((weights, (row, column)), (genes, genes))
    graph = sp.csr_matrix(directed.maximum(directed.T))
    graph.eliminate_zeros()
    graph.sort_indices()
    return sp.csr_matrix(graph, dtype=bool)


def one_count(matrix: Matrix, rows: Int[np.ndarray, "cells"]) -> float:
    """Value of a single count in a typical cell: the median over cells of their smallest value above 0."""
    found = np.concatenate(arrays.fold(_smallest, operator.iadd, matrix, np.sort(rows)))
    return float(np.median(found)) if len(found) else 0.0


def _smallest(block: sp.csr_matrix) -> list[np.ndarray]:
    """Smallest stored value of each cell of which it is above 0."""
    starts = block.indptr[:-1][np.diff(block.indptr) > 0]
    least = np.minimum.reduceat(block.data, starts) if len(starts) else block.data
    return [least[least > 0]]


def _products(
    block: sp.csr_matrix,
    *,
    mean: Float[np.ndarray, "genes"],
    inverse: Float[np.ndarray, "genes"],
    second_log: bool,
) -> Float[np.ndarray, "genes genes"]:
    """Sum over cells of the products of standard scores of all pairs of genes."""
    scores = block.toarray().astype(np.float64, copy=False)
    if second_log:
        scores = np.log1p(np.maximum(scores, 0.0))
    scores -= mean
    scores *= inverse
    return scores.T @ scores
