"""What cells say of genes: moments, correlations, and the graph of the strongest of them."""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.data.values import Matrix, blocks

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
    cells = len(rows)
    mean = squares = np.zeros(1)
    for block in _dense(matrix, rows, second_log=second_log):
        mean = mean + block.sum(axis=0) / cells
    for block in _dense(matrix, rows, second_log=second_log):
        squares = squares + np.square(block - mean).sum(axis=0)
    std = np.sqrt(squares / max(1, cells - 1))
    return mean, np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 0.0)


def correlation(
    matrix: Matrix, rows: Int[np.ndarray, "cells"], *, second_log: bool = False
) -> Float[np.ndarray, "genes genes"]:
    """Pearson correlation of all pairs of genes, in float64; only a block of cells is dense at a time.

    A gene that does not vary correlates with nothing but itself. See ``moments`` for ``second_log``.
    """
    mean, std = moments(matrix, rows, second_log=second_log)
    inverse = np.divide(1.0, std, out=np.zeros_like(std), where=std > 0)
    total = np.zeros((len(mean), len(mean)))
    for block in _dense(matrix, rows, second_log=second_log):
        scores = (block - mean) * inverse
        total += scores.T @ scores
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
    found = []
    for block in blocks(matrix, rows):
        ends = block.indptr[1:][np.diff(block.indptr) > 0]
        found.extend(part.min() for part in np.split(block.data, ends[:-1]) if part.size and part.min() > 0)
    return float(np.median(found)) if found else 0.0


def _dense(
    matrix: Matrix, rows: Int[np.ndarray, "cells"], *, second_log: bool
) -> Iterator[Float[np.ndarray, "cells genes"]]:
    for block in blocks(matrix, rows):
        dense = block.toarray().astype(np.float64, copy=False)
        yield np.log1p(np.maximum(dense, 0.0)) if second_log else dense
