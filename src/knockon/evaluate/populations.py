"""Populations as sparse cells: their number, their moments, and equally many of two of them."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from knockon.types import Label


def mean(cells: sp.csr_matrix) -> Float[np.ndarray, "genes"]:
    """Mean over cells."""
    return np.asarray(cells.mean(axis=0)).ravel()


def num_cells(cells: sp.csr_matrix) -> int:
    """Rows of a matrix."""
    return len(cells.indptr) - 1


def num_distinct(cells: sp.csr_matrix) -> int:
    """Rows that differ from all before them; indices are sorted."""
    bounds = zip(cells.indptr[:-1], cells.indptr[1:], strict=True)
    return len({(cells.indices[a:b].tobytes(), cells.data[a:b].tobytes()) for a, b in bounds})


def exact(cells: sp.csr_matrix) -> sp.csr_matrix:
    """Cells in float64, without stored zeros."""
    cells = sp.csr_matrix(cells, dtype=np.float64, copy=True)
    cells.eliminate_zeros()
    return cells


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Means, unbiased variances (NaN of one cell) and fractions of exact zeros, a row for each population."""

    mean: Float[np.ndarray, "conditions genes"]
    variance: Float[np.ndarray, "conditions genes"]
    zeros: Float[np.ndarray, "conditions genes"]


def moments(populations: Sequence[sp.csr_matrix]) -> Moments:
    """Find the moments of populations at the cost of their non-zeros."""
    _, genes = populations[0].get_shape()
    means, variances, zeros = np.empty((3, len(populations), genes))
    for row, cells in enumerate(populations):
        count = num_cells(cells)
        filled = np.bincount(cells.indices, minlength=genes)
        means[row] = np.bincount(cells.indices, cells.data, minlength=genes) / count
        # about the mean, because the mean of squares less the squared mean loses digits
        around = np.square(cells.data - means[row, cells.indices])
        squares = np.bincount(cells.indices, around, genes) + (count - filled) * np.square(means[row])
        variances[row] = squares / (count - 1) if count > 1 else np.nan
        zeros[row] = 1 - filled / count
    return Moments(mean=means, variance=variances, zeros=zeros)


def draw(
    label: Label, predicted: sp.csr_matrix, real: sp.csr_matrix, most: int
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Draw equally many cells of both sides; at least two, where there are, since one has no distance within.

    A prediction of one cell stands for a population of that cell, and so does not limit the real side.
    """
    few = num_cells(predicted) if num_cells(predicted) > 1 else most
    count = max(2, min(few, num_cells(real), most))
    rng = np.random.default_rng(zlib.crc32(str(label).encode()))
    return _some(predicted, count, rng), _some(real, count, rng)


def sample(label: Label, cells: sp.csr_matrix, most: int) -> sp.csr_matrix:
    """Draw some cells of a condition: the same whenever as many are drawn of as many."""
    return _some(cells, most, np.random.default_rng(zlib.crc32(str(label).encode())))


def _some(cells: sp.csr_matrix, count: int, rng: np.random.Generator) -> sp.csr_matrix:
    if num_cells(cells) <= count:
        return cells
    return cells[np.sort(rng.choice(num_cells(cells), count, replace=False))]
