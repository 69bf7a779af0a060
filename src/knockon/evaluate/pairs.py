"""Prediction and truth, aligned condition by condition and checked once, before anything is scored."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from jaxtyping import Bool, Float, Int

from knockon.data import conventions, prepare, values
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate.space import Space
from knockon.types import CP10K, Label, Units, UserError

Context = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The real cells of the scored conditions and all that scores refer to, in log1p.

    Parameters
    ----------
    screen
        Where all of it is from, in log1p. A screen in counts is normalized to the median total of its
        training cells first.
    units
        What the screen was in.
    labels
        The scored conditions: the rows of everything here.
    cells
        Real cells of each.
    half
        Half of the number of real cells of each, which is what a replicate has on either side; kept where
        ``cells`` are halved.
    space
        For comparing whole cells.
    control, centroid, candidates, own, rivals
        See ``metrics.Evidence``. In a context without training perturbations, the centroid is its
        control moved by the average change of the training perturbations in their own contexts.
        Validation conditions count as training: only test conditions are held out here.
    notes
        What was done to make the sides comparable, to be printed.
    """

    screen: Screen
    units: Units
    labels: tuple[Label, ...]
    cells: tuple[sp.csr_matrix, ...]
    half: Int[np.ndarray, "conditions"]
    space: Space
    control: Float[np.ndarray, "conditions genes"]
    centroid: Float[np.ndarray, "conditions genes"]
    candidates: Float[np.ndarray, "candidates genes"]
    own: Int[np.ndarray, "conditions"]
    rivals: Bool[np.ndarray, "conditions candidates"]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, screen: Screen, split: Split) -> "Truth":
        """Gather the test part of a screen.

        Raises
        ------
        UserError
            If the split tests nothing, trains nothing, or names what the screen has not.
        """
        test = _part(screen, split.test, "test")
        train = _part(screen, (*split.train, *split.validation), "training")
        units, screen = screen.units, _in_log1p(screen, train)
        means = {label: mean(_cells(screen, screen.rows[label])) for label in screen.conditions}
        controls = {context: mean(_cells(screen, rows)) for context, rows in _controls(screen).items()}
        centroids = _centroids({label: means[label] for label in train}, controls)
        own = np.array([screen.conditions.index(label) for label in test])
        rivals = np.array([[q.covariates == label.covariates for q in screen.conditions] for label in test])
        rivals[np.arange(len(test)), own] = False
        return cls(
            screen=screen,
            units=units,
            labels=test,
            cells=tuple(_cells(screen, screen.rows[label]) for label in test),
            half=np.array([len(screen.rows[label]) // 2 for label in test]),
            space=Space(train=screen.select((*train, *screen.controls))),
            control=np.stack([controls[label.covariates] for label in test]),
            centroid=np.stack([centroids[label.covariates] for label in test]),
            candidates=np.stack([means[label] for label in screen.conditions]),
            own=own,
            rivals=rivals,
            notes=_notes(screen, units, test, train),
        )

    def select(self, labels: Iterable[Label]) -> "Truth":
        """Score only these conditions; candidates stay."""
        wanted = set(labels)
        kept = np.array([label in wanted for label in self.labels])
        return replace(
            self,
            labels=tuple(label for label in self.labels if label in wanted),
            cells=tuple(cells for cells, keep in zip(self.cells, kept, strict=True) if keep),
            half=self.half[kept],
            control=self.control[kept],
            centroid=self.centroid[kept],
            own=self.own[kept],
            rivals=self.rivals[kept],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Predicted cells for each condition of a truth, in log1p and the screen's order of genes.

    Parameters
    ----------
    truth
        What they are scored against.
    cells
        Predicted cells of each of its conditions.
    model
        What made them, where they tell.
    notes
        What was done to align them, to be printed.
    """

    truth: Truth
    cells: tuple[sp.csr_matrix, ...]
    model: str = "prediction"
    notes: tuple[str, ...] = ()

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
        matrix, rescaled = _matrix(adata, truth, units)
        cells = tuple(_exact(matrix[rows[label]][:, columns]) for label in truth.labels)
        model = str(adata.uns.get("knockon", {}).get("model", "prediction"))
        return cls(
            truth=truth, cells=cells, model=model, notes=(*truth.notes, *reordered, *ignored, *rescaled)
        )


def mean(cells: sp.csr_matrix) -> Float[np.ndarray, "genes"]:
    """Mean over cells."""
    return np.asarray(cells.mean(axis=0)).ravel()


def num_cells(cells: sp.csr_matrix) -> int:
    """Rows of a matrix."""
    return len(cells.indptr) - 1


# ---- the screen's side ---------------------------------------------------------------------------


def _part(screen: Screen, labels: Iterable[Label], name: str) -> tuple[Label, ...]:
    """Perturbed conditions of a part of a split, in the screen's order."""
    wanted = {label for label in labels if not label.is_control}
    missing = sorted(wanted - set(screen.conditions))
    if missing:
        raise UserError(
            f"The {name} part of the split names conditions that the screen has not",
            offenders=missing,
            expected="a split of this screen",
            mend="make it again with knockon split",
        )
    if not wanted:
        raise UserError(f"The {name} part of the split is empty", mend="choose another --split")
    return tuple(label for label in screen.conditions if label in wanted)


def _in_log1p(screen: Screen, train: Iterable[Label]) -> Screen:
    if screen.units == "log1p":
        return screen
    return prepare.apply(screen, prepare.fit(screen.select((*train, *screen.controls)), units="log1p"))


def _cells(screen: Screen, rows: Int[np.ndarray, "cells"]) -> sp.csr_matrix:
    return _exact(sp.csr_matrix(screen.matrix[rows]))


def _exact(cells: sp.csr_matrix) -> sp.csr_matrix:
    """Cells in float64, without stored zeros."""
    cells = sp.csr_matrix(cells, dtype=np.float64)
    cells.eliminate_zeros()
    return cells


def _controls(screen: Screen) -> dict[Context, Int[np.ndarray, "cells"]]:
    """Control cells of each context."""
    return {label.covariates: screen.control_rows(label) for label in screen.conditions}


def _centroids(
    means: Mapping[Label, Float[np.ndarray, "genes"]],
    controls: Mapping[Context, Float[np.ndarray, "genes"]],
) -> dict[Context, Float[np.ndarray, "genes"]]:
    """Mean of the training perturbations in each context."""
    groups = defaultdict(list)
    for label, value in means.items():
        groups[label.covariates].append(value)
    change = np.mean([value - controls[label.covariates] for label, value in means.items()], axis=0)
    return {
        context: np.mean(groups[context], axis=0) if context in groups else control + change
        for context, control in controls.items()
    }


def _notes(
    screen: Screen, units: Units, test: tuple[Label, ...], train: tuple[Label, ...]
) -> tuple[str, ...]:
    notes = []
    if units == "counts":
        per = f"{screen.total:g} (suite generation: {CP10K:,g})"
        notes.append(f"counts are compared as log1p of counts per {per}, on both sides")
    alone = [str(label) for label in test if len(screen.rows[label]) == 1]
    if alone:
        notes.append(f"one real cell, so no variance and no distance between populations: {', '.join(alone)}")
    uncontrolled = sorted({str(label.control()) for label in test if label.control() not in screen.rows})
    if uncontrolled:
        notes.append(f"all controls serve where a context has none: {', '.join(uncontrolled)}")
    trained = {label.covariates for label in train}
    new = sorted({" | ".join(label.covariates) for label in test if label.covariates not in trained})
    if new:
        notes.append(
            f"the centroid of a new context is its control moved by the mean effect: {', '.join(new)}"
        )
    return tuple(notes)


# ---- the prediction's side -----------------------------------------------------------------------


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


def _matrix(adata: AnnData, truth: Truth, declared: Units | None) -> tuple[sp.csr_matrix, list[str]]:
    """Values of a prediction, checked and in log1p of the truth's total."""
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
        return matrix, []
    if units == "counts" or (truth.units == "counts" and theirs <= 0):
        raise UserError(
            f"The prediction is in {units} and the screen in {truth.units}",
            expected='one scale for both, or log1p with its total in uns["knockon"]["total"]',
            mend="read the screen with the --layer that has the prediction's scale",
        )
    if ours is None or theirs <= 0 or np.isclose(ours, theirs, rtol=1e-6):
        return matrix, []
    matrix.data = np.log1p(np.expm1(matrix.data.astype(np.float64)) * (ours / theirs))
    return matrix, [f"the prediction is log1p of counts per {theirs:g} and was brought to {ours:g}"]
