"""Prediction and truth, aligned condition by condition and checked once, before anything is scored."""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from jaxtyping import Int

from knockon.data import conventions, values
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate.populations import Moments, exact, moments
from knockon.evaluate.truth import Truth
from knockon.types import Label, Units, UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Predicted cells for each condition of a truth, in log1p and the screen's order of genes.

    Parameters
    ----------
    truth
        What they are scored against.
    cells
        Predicted cells of each of its conditions.
    counts
        The same cells in counts, of a prediction in counts.
    model
        What made them, where they tell.
    notes
        What was done to align them, to be printed.
    """

    truth: Truth
    cells: tuple[sp.csr_matrix, ...]
    counts: tuple[sp.csr_matrix, ...] | None = None
    model: str = "prediction"
    notes: tuple[str, ...] = ()

    @cached_property
    def moments(self) -> Moments:
        """Of the predicted cells; variances of one cell are 0, as those of that cell repeated."""
        found = moments(self.cells)
        return replace(found, variance=np.nan_to_num(found.variance))

    @classmethod
    def of(
        cls, prediction: AnnData | str | Path, screen: Screen, split: Split, *, units: Units | None = None
    ) -> "Pairs":
        """Align a prediction with the test part of a screen; see ``align``."""
        return cls.align(prediction, Truth.of(screen, split), units=units)

    @classmethod
    def align(cls, prediction: AnnData | str | Path, truth: Truth, *, units: Units | None = None) -> "Pairs":
        """Align a prediction with the truth.

        Genes are put in order by name, further genes left out, and test conditions that the prediction
        lacks not scored; each is noted. Predicted control
        cells and conditions outside the test part are not looked at: scores refer to the real control
        on both sides.

        Parameters
        ----------
        prediction
            Cells or a file of them; ``obs`` has ``perturbation``, in any spelling that a screen may
            have, and the screen's covariates.
        truth
            What it is scored against.
        units
            Scale of the prediction; by default what ``uns["knockon"]`` declares, else what it looks like.

        Raises
        ------
        UserError
            If genes or all test conditions are missing, conditions are unknown, values are negative or not
            finite, or the scale is not the screen's.
        """
        adata = prediction if isinstance(prediction, AnnData) else read_prediction(Path(prediction))
        columns, reordered = _columns(adata, truth.screen)
        rows, ignored = _rows(pd.DataFrame(adata.obs), truth)
        truth = truth.select(rows)
        matrix, is_counts, rescaled = _matrix(adata, truth, units)
        taken = [(rows[label], columns) for label in truth.labels]
        counts = sp.csr_matrix(adata.X) if is_counts else None
        return cls(
            truth=truth,
            cells=tuple(exact(matrix[some][:, genes]) for some, genes in taken),
            counts=None if counts is None else tuple(exact(counts[some][:, genes]) for some, genes in taken),
            model=str(adata.uns.get("knockon", {}).get("model", "prediction")),
            notes=(*truth.notes, *reordered, *ignored, *rescaled),
        )


def read_prediction(path: Path) -> AnnData:
    """Read a file of predicted cells.

    Raises
    ------
    UserError
        If it cannot be read.
    """
    if not path.exists():
        raise UserError("No such file", offenders=[path], expected="predicted cells in .h5ad")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:
        raise UserError(
            f"Cannot read {path} ({(str(error).splitlines() or [type(error).__name__])[0]})",
            expected="a whole .h5ad file, as anndata writes it",
            mend="predict or download it again",
        ) from error


def _columns(adata: AnnData, screen: Screen) -> tuple[Int[np.ndarray, "genes"], list[str]]:
    """Place of each gene of the screen in the prediction."""
    names = [str(name) for name in adata.var_names]
    place = {name: i for i, name in enumerate(names)}
    missing = [gene for gene in screen.genes if gene not in place]
    if missing:
        raise UserError(
            f"The prediction lacks {len(missing)} of the screen's {len(screen.genes)} genes",
            offenders=missing,
            expected="the screen's var_names",
            mend="predict all genes, or evaluate against the prepared screen that the model was given",
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError("Genes that the prediction has twice", offenders=twice, expected="unique var_names")
    columns = np.array([place[gene] for gene in screen.genes])
    notes = []
    if len(names) > len(columns):
        notes.append(f"{len(names) - len(columns)} predicted genes that the screen has not are left out")
    if (np.diff(columns) < 0).any():
        notes.append("predicted genes were put in the screen's order")
    return columns, notes


def _rows(obs: pd.DataFrame, truth: Truth) -> tuple[dict[Label, Int[np.ndarray, "cells"]], list[str]]:
    """Predicted cells of each scored condition."""
    screen = truth.screen
    found = _labels(obs, screen)
    unknown = sorted(label for label in found if not label.is_control and label not in screen.rows)
    if unknown:
        raise UserError(
            "The prediction has conditions that the screen has not",
            offenders=unknown,
            expected=f"conditions such as {', '.join(map(str, screen.conditions[:3]))}",
            mend="leave them out: there is nothing to score them against",
        )
    missing = [label for label in truth.labels if label not in found]
    if len(missing) == len(truth.labels):
        raise UserError(
            "The prediction lacks all test conditions",
            offenders=missing,
            expected="cells of them",
            mend="predict them with knockon predict --part test",
        )
    ignored = [label for label in found if not label.is_control and label not in set(truth.labels)]
    notes = [f"{len(ignored)} predicted conditions outside the test part are ignored"] if ignored else []
    if missing:
        named = ", ".join(str(label) for label in missing)
        notes.append(
            f"not comparable with others: the prediction lacks {len(missing)} test conditions: {named}"
        )
    return found, notes


def _labels(obs: pd.DataFrame, screen: Screen) -> dict[Label, Int[np.ndarray, "cells"]]:
    """Predicted cells of each condition, whatever its spelling."""
    keys = ["perturbation", *(covariate.name for covariate in screen.covariates)]
    missing = [key for key in keys if key not in obs]
    if missing:
        raise UserError(
            "Columns that obs of the prediction lacks",
            offenders=missing,
            expected=f"{', '.join(keys)}, as the screen has them; found {', '.join(map(str, obs.columns))}",
            mend="rename the columns of the prediction",
        )
    known = {*screen.genes, *(name for label in screen.labels for name in label.perturbations)}
    groups = obs[keys].astype(str).groupby(keys, sort=False).indices
    rows = defaultdict(list)
    for key, members in groups.items():
        text, *context = key if isinstance(key, tuple) else (key,)
        label = conventions.parse(str(text), known=known)
        rows[replace(label, covariates=tuple(context))].append(members)
    return {label: np.sort(np.concatenate(members)) for label, members in rows.items()}


def _matrix(adata: AnnData, truth: Truth, declared: Units | None) -> tuple[sp.csr_matrix, bool, list[str]]:
    """Values of a prediction, checked and in log1p of the truth's total; and whether they were counts."""
    if adata.X is None:
        raise UserError("The prediction has no X", expected=f"values in {truth.units}")
    about = adata.uns.get("knockon", {})
    matrix = sp.csr_matrix(adata.X, copy=True)
    units = values.scale(values.survey(matrix), declared or about.get("units")).units
    ours, theirs = truth.screen.total, float(about.get("total", -1.0))
    if units == "counts" and ours is not None:
        share = 1.0 if truth.units == "counts" else float(about.get("share", 1.0))
        totals = np.asarray(matrix.sum(axis=1)).ravel()
        matrix.data = np.log1p(
            matrix.data * np.repeat(share * ours / np.maximum(totals, 1.0), np.diff(matrix.indptr))
        )
        return matrix, True, []
    if units == "counts" or (truth.units == "counts" and theirs <= 0):
        raise UserError(
            f"The prediction is in {units} and the screen in {truth.units}",
            expected='one scale for both, or log1p with its total in uns["knockon"]["total"]',
            mend="read the screen with the --layer that has the prediction's scale",
        )
    if ours is None or theirs <= 0 or np.isclose(ours, theirs, rtol=1e-6):
        return matrix, False, []
    matrix.data = np.log1p(np.expm1(matrix.data.astype(np.float64)) * (ours / theirs))
    return matrix, False, [f"the prediction is log1p of counts per {theirs:g} and was brought to {ours:g}"]
