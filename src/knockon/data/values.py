"""Expression values: read in blocks, judged by what they are, and never converted silently."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.types import Units, UserError

LARGEST_LOG1P = 15.0
"""No ``log1p`` of a count reaches this: it would be three million molecules of one gene."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Units of values, and the total that counts were normalized to where the file tells."""

    units: Units
    total: float | None = None


def blocks(matrix: sp.csr_matrix, size: int = 4096) -> Iterator[sp.csr_matrix]:
    """Consecutive rows, a few at a time, so that no full copy of the matrix is ever made."""
    for start in range(0, matrix.shape[0], size):
        yield matrix[start : start + size]


def scale(matrix: sp.csr_matrix, declared: Units | None = None) -> Scale:
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
    largest, whole, sums = 0.0, True, []
    for block in blocks(matrix):
        values = block.data
        if not np.isfinite(values).all():
            raise _fault("Values that are not finite", values[~np.isfinite(values)])
        if (values < 0).any():
            raise _fault("Negative values", values[values < 0])
        largest = max(largest, float(values.max(initial=0)))
        whole = whole and bool((values == np.rint(values)).all())
        sums.append(_totals(block))
    if largest == 0:
        raise UserError("All values are zero", expected="expression", mend="choose another --layer")
    found: Units | None = "counts" if whole else "log1p" if largest < LARGEST_LOG1P else None
    if found is None or declared not in (None, found):
        raise _contradiction(found, declared, largest)
    return Scale(units=found, total=_common(np.concatenate(sums)) if found == "log1p" else None)


def _totals(block: sp.csr_matrix) -> Float[np.ndarray, "cells"]:
    """Sum of each row once ``log1p`` is undone; meaningless, and not used, for counts."""
    undone = sp.csr_matrix(
        (np.expm1(np.minimum(block.data, LARGEST_LOG1P).astype(np.float64)), block.indices, block.indptr), block.shape
    )
    return np.asarray(undone.sum(axis=1)).ravel()


def _common(totals: Float[np.ndarray, "cells"]) -> float | None:
    """Find the total that (nearly) all cells share; none where genes were removed after normalizing."""
    middle = float(np.median(totals))
    shared = np.abs(totals - middle) <= 0.01 * middle
    return float(f"{middle:.4g}") if shared.mean() > 0.99 else None


def _fault(found: str, values: np.ndarray) -> UserError:
    return UserError(
        f"{found} ({len(values)} in one block of cells)",
        offenders=values[:3].tolist(),
        expected="counts, or log1p of normalized counts",
        mend="choose the layer that holds them with --layer",
    )


def _contradiction(found: Units | None, declared: Units | None, largest: float) -> UserError:
    what = {"counts": "whole numbers, so counts", "log1p": "log1p of normalized counts", None: "neither"}[found]
    return UserError(
        f"The values are {what} (largest {largest:g})",
        expected=declared or f"whole numbers (counts), or values below {LARGEST_LOG1P:g} (log1p)",
        mend="choose another --layer, or declare --units " + found
        if found
        else "choose another --layer, or take the logarithm: sc.pp.log1p(adata)",
    )
