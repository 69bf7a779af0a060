"""Counts of predictions in log1p: drawn, so that evaluators which take nothing else can be asked about them.

A cell gets, on average, as many counts as the control cell that it came from, shared out as its normalized
values say; each expected count is rounded up or down at random, so that expectations stay: a value that
stands for .02 counts is one count in one of fifty cells. Cells keep the spread that they were predicted
with; no further sampling noise is added, because cells that were moved from control cells have it already.
A control cell that did not move gets its own counts back.
"""

import zlib

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.truth import Truth
from knockon.types import UserError


def counts(pairs: Pairs) -> tuple[sp.csr_matrix, ...]:
    """Predicted cells in counts, as they came or drawn from log1p; always the same for one condition.

    Raises
    ------
    UserError
        If the screen has no counts to compare with, or the prediction tells neither its counts nor the
        control cells that it came from.
    """
    if pairs.truth.counts is None:
        raise UserError(
            "The screen is in log1p",
            expected="counts, on both sides",
            mend="read the screen with --layer counts, if it has such a layer",
        )
    if pairs.counts is not None:
        return pairs.counts
    if pairs.origins is None:
        raise UserError(
            "The prediction is in log1p and does not tell the control cells that its cells came from",
            expected='counts, or obs["control_cell"] with names of cells of the screen',
            mend="predict with a model in counts, or write counts with knockon export",
        )
    found = zip(pairs.truth.labels, pairs.cells, pairs.origins, strict=True)
    return tuple(
        drawn(cells, _totals(pairs.truth, rows), np.random.default_rng(zlib.crc32(str(label).encode())))
        for label, cells, rows in found
    )


def _totals(truth: Truth, rows: Int[np.ndarray, "cells"]) -> Float[np.ndarray, "cells"]:
    return np.asarray(truth.counted(rows).sum(axis=1)).ravel()


def drawn(cells: sp.csr_matrix, sizes: Float[np.ndarray, "cells"], rng: np.random.Generator) -> sp.csr_matrix:
    """Draw whole counts.

    Parameters
    ----------
    cells
        Natural log1p of normalized counts, of whatever total.
    sizes
        Counts that each cell has on average. A cell without any value gets none.
    """
    odds = np.expm1(cells.data.astype(np.float64))
    expected = sp.csr_matrix((odds, cells.indices, cells.indptr), cells.shape, copy=True)
    sums = np.asarray(expected.sum(axis=1)).ravel()
    shares = np.divide(sizes, sums, out=np.zeros_like(sums), where=sums > 0)
    expected.data *= np.repeat(shares, np.diff(expected.indptr))
    expected.data = np.floor(expected.data + rng.random(expected.nnz))
    expected.eliminate_zeros()
    return expected
