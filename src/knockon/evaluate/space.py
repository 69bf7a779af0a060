"""The space in which whole cells are compared: a few principal components of real training cells."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from knockon.data.screen import Screen
from knockon.types import CP10K

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

DIMS = 30
"""Principal components, as in the published tables of generated cells [scldm]."""
MOST = 20_000
"""Training cells that components are fitted on, so that memory does not grow with the screen."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """Principal components of training cells, fitted when they are first asked for and then kept.

    Parameters
    ----------
    train
        Real training conditions and controls, in ``log1p``: all that is ever looked at.
    """

    train: Screen

    def scaled(self, cells: sp.csr_matrix) -> sp.csr_matrix:
        """Bring cells to natural log1p of counts per 10,000.

        Parameters
        ----------
        cells
            In log1p of the screen's total. Where that is not known, they stay as they are.
        """
        factor = CP10K / (self.train.total or CP10K)
        if factor == 1:
            return cells
        values = np.log1p(np.expm1(cells.data.astype(np.float64)) * factor)
        return sp.csr_matrix((values, cells.indices, cells.indptr), cells.shape)

    def project(self, cells: sp.csr_matrix) -> Float[np.ndarray, "cells dims"]:
        """Give the coordinates of cells.

        Parameters
        ----------
        cells
            In log1p of the screen's total.
        """
        return self._components.transform(self.scaled(cells))

    @cached_property
    def _components(self) -> "PCA":
        """30 components, or as many as genes or one less than cells where those are fewer.

        Found by a Lanczos method on the sparse cells, which are never made dense; exact but for rounding.
        """
        from sklearn.decomposition import PCA  # noqa: PLC0415 (a second, and only one suite needs it)

        rows = np.sort(np.concatenate(list(self.train.rows.values())))
        if len(rows) > MOST:
            rows = np.sort(np.random.default_rng(0).choice(rows, MOST, replace=False))
        cells = self.scaled(sp.csr_matrix(self.train.matrix[rows], dtype=np.float64))
        genes = len(self.train.genes)
        dims = min(DIMS, len(rows) - 1, genes)
        if dims == genes:  # which Lanczos cannot give
            return PCA(dims, svd_solver="full").fit(cells.toarray())
        return PCA(dims, svd_solver="arpack", random_state=0).fit(cells)
