"""A screen: cells, genes, and which cells were treated how. The only reader of ``.h5ad`` and ``.zarr``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.types import Covariate, Label, Spec, Units, UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Screen:
    """Expression of cells under perturbations, with the rows of each condition found once.

    A selection of conditions (``select``) shares the matrix and only names fewer rows, so that
    training code that is given the training screen cannot reach a test cell.

    Parameters
    ----------
    matrix
        Cells x genes, all cells of the file.
    genes, cells
        Names; genes are unique.
    rows
        Row numbers in ``matrix`` of each condition, controls included.
    covariates
        Of all cells of the file, with sorted levels; the order of ``Label.covariates``.
    units, total
        See ``Spec``.
    dose_unit
        See ``Spec``.
    digest
        SHA-256 of names and design, by which splits and runs know their screen.
    source
        Where it was read from; empty for a screen made in memory.
    notes
        What was recognized rather than told, one line each, to be printed.
    """

    matrix: sp.csr_matrix
    genes: tuple[str, ...]
    cells: Sequence[str]
    rows: Mapping[Label, Int[np.ndarray, "cells"]]
    covariates: tuple[Covariate, ...] = ()
    units: Units = "log1p"
    total: float | None = None
    dose_unit: str | None = None
    digest: str = ""
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def labels(self) -> tuple[Label, ...]:
        """All conditions, controls first."""
        return tuple(self.rows)

    @property
    def controls(self) -> tuple[Label, ...]:
        """The control of each context that has one."""
        return tuple(label for label in self.rows if label.is_control)

    @property
    def conditions(self) -> tuple[Label, ...]:
        """All conditions but the controls."""
        return tuple(label for label in self.rows if not label.is_control)

    @property
    def num_cells(self) -> int:
        """Cells of the selected conditions."""
        return sum(len(rows) for rows in self.rows.values())

    def select(self, labels: Iterable[Label]) -> Self:
        """Only these conditions, in this screen's order."""
        wanted = set(labels)
        return replace(self, rows={label: rows for label, rows in self.rows.items() if label in wanted})

    def gather(self, rows: Int[np.ndarray, "cells"]) -> Float[np.ndarray, "cells genes"]:
        """Dense float32 values of some rows of ``matrix``."""
        return self.matrix[rows].toarray().astype(np.float32, copy=False)

    def cells_of(self, label: Label) -> Float[np.ndarray, "cells genes"]:
        """Dense float32 values of all cells of a condition."""
        return self.gather(self.rows[label])

    def control_rows(self, label: Label) -> Int[np.ndarray, "cells"]:
        """Rows of the control cells that match a condition's covariates.

        Where its context has none, all control cells serve.
        """
        matched = self.rows.get(label.control())
        if matched is not None:
            return matched
        controls = [self.rows[control] for control in self.controls]
        if not controls:
            raise UserError("The screen has no control cells", mend="name them with --control")
        return np.concatenate(controls)

    def means(self) -> dict[Label, Float[np.ndarray, "genes"]]:
        """Mean over the cells of each condition, in the screen's units, as float64."""
        return {
            label: np.asarray(self.matrix[rows].mean(axis=0, dtype=np.float64)).ravel()
            for label, rows in self.rows.items()
        }

    def spec(self, vectors: Mapping[str, Float[np.ndarray, "width"]] | None = None) -> Spec:
        """What a model may know of this screen: names and units of the whole file, no values."""
        ...
