"""Expression values: in memory or on disk, judged by what they are, never converted silently."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.types import Units, UserError

LARGEST_LOG1P = 15.0
"""No ``log1p`` of a count reaches this: it would be three million molecules of one gene."""
BLOCK = 4096
"""Cells that are looked at together, so that no second copy of the values is ever in memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnDisk:
    """Values that stay in their file; rows are read, and prepared, when they are asked for.

    Parameters
    ----------
    data
        Anything that gives rows for sorted row numbers: an ``h5py`` or ``zarr`` array, or a sparse
        dataset of anndata.
    total
        Sum that counts are normalized to before ``log1p``; None leaves values as they are.
    genes
        Columns that are kept after that; None keeps all.
    """

    data: Any
    total: float | None = None
    genes: Int[np.ndarray, "genes"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        cells, genes = self.data.shape
        return cells, genes if self.genes is None else len(self.genes)

    def __getitem__(self, rows: slice | Int[np.ndarray, "cells"]) -> sp.csr_matrix:
        if isinstance(rows, slice):
            return self._prepared(compressed(self.data[rows]))
        needed, places = np.unique(rows, return_inverse=True)
        return self._prepared(compressed(self.data[needed]))[places]

    def _prepared(self, block: sp.csr_matrix) -> sp.csr_matrix:
        if self.total is not None:
            block = log1p(block, self.total)
        return block if self.genes is None else block[:, self.genes]

    def normalized(self, total: float) -> Self:
        """Bring counts to a common total and take ``log1p``, whenever rows are read."""
        return replace(self, total=total)

    def panel(self, places: Int[np.ndarray, "genes"]) -> Self:
        """Only some columns."""
        return replace(self, genes=places if self.genes is None else self.genes[places])


Matrix = sp.csr_matrix | OnDisk
"""Cells x genes."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Units of values, and the total that counts were normalized to where the values tell."""

    units: Units
    total: float | None = None


def compressed(values: Any) -> sp.csr_matrix:
    """Values of any layout as sparse rows of float32 with sorted indices; copies only where it must."""
    matrix = sp.csr_matrix(values, dtype=np.float32)
    matrix.sum_duplicates()
    return matrix


def blocks(matrix: Matrix, rows: Int[np.ndarray, "cells"] | None = None) -> Iterator[sp.csr_matrix]:
    """Rows in a few at a time: all of them, or those that are named."""
    for start in range(0, matrix.shape[0] if rows is None else len(rows), BLOCK):
        stop = start + BLOCK
        yield matrix[start:stop] if rows is None else matrix[rows[start:stop]]


def log1p(counts: sp.csr_matrix, total: float) -> sp.csr_matrix:
    """Natural logarithm of 1 + counts per ``total`` of each cell; cells without counts stay empty."""
    sums = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(total, sums, out=np.zeros_like(sums), where=sums > 0)
    data = counts.data * np.repeat(factors, np.diff(counts.indptr)).astype(np.float32)
    return sp.csr_matrix((np.log1p(data, out=data), counts.indices, counts.indptr), counts.shape)


def scale(matrix: Matrix, declared: Units | None = None) -> Scale:
    """Judge the units of values by looking at all of them.

    Parameters
    ----------
    matrix
        Cells x genes.
    declared
        What the user says; a contradiction is an error.

    Raises
    ------
    UserError
        For negative or non-finite values, for values that are neither counts nor ``log1p``, and for
        values that contradict what was declared.
    """
    largest, whole, totals = 0.0, True, []
    for block in blocks(matrix):
        _refuse(block.data, ~np.isfinite(block.data), "Values that are not finite")
        _refuse(block.data, block.data < 0, "Negative values")
        largest = max(largest, float(block.data.max(initial=0)))
        whole = whole and bool((block.data == np.rint(block.data)).all())
        totals.append(_undone(block))
    if largest == 0:
        raise UserError("All values are zero", expected="expression", mend="choose another --layer")
    found: Units | None = "counts" if whole else "log1p" if largest < LARGEST_LOG1P else None
    if found is None or declared not in (None, found):
        raise _contradiction(found, declared, largest)
    return Scale(units=found, total=_common(totals) if found == "log1p" else None)


def _undone(block: sp.csr_matrix) -> Float[np.ndarray, "cells"]:
    """Sum of each row once ``log1p`` is undone; not used for counts."""
    data = np.expm1(np.minimum(block.data, LARGEST_LOG1P))
    undone = sp.csr_matrix((data, block.indices, block.indptr), block.shape)
    return np.asarray(undone.sum(axis=1, dtype=np.float64)).ravel()


def _common(totals: Sequence[Float[np.ndarray, "cells"]]) -> float | None:
    """Find the total that nearly all cells share; there is none where genes were removed afterwards."""
    sums = np.concatenate(totals)
    middle = float(np.median(sums))
    shared = np.abs(sums - middle) <= 0.01 * middle
    return float(f"{middle:.4g}") if shared.mean() > 0.99 else None


def _refuse(values: Float[np.ndarray, "values"], bad: np.ndarray, what: str) -> None:
    if bad.any():
        raise UserError(
            what,
            offenders=[f"{value:g}" for value in values[bad]],
            expected="counts, or log1p of normalized counts",
            mend="choose the layer that holds them with --layer",
        )


def _contradiction(found: Units | None, declared: Units | None, largest: float) -> UserError:
    what = {
        "counts": "whole numbers, so counts",
        "log1p": "fractions, as log1p of normalized counts is",
        None: "neither counts nor log1p",
    }[found]
    return UserError(
        f"The values are {what} (largest {largest:g})",
        expected=declared or f"whole numbers (counts), or values below {LARGEST_LOG1P:g} (log1p)",
        mend=f"choose another --layer, or declare --units {found}"
        if found
        else "choose another --layer, or take the logarithm: sc.pp.log1p(adata)",
    )
