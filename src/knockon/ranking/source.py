"""Predicted changes of the mean against control, drawn several times, of a run or of a file of its cells.

Only means are kept: the cells of a draw are forgotten once they are summed, so thousands of conditions fit.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from jaxtyping import Float, Int

from knockon.data import conventions, prepare, values
from knockon.data.formats import read_obs
from knockon.data.prepare import Preparation
from knockon.data.screen import Screen
from knockon.data.vectors import present
from knockon.evaluate.populations import mean
from knockon.evaluate.prediction import Prediction, read
from knockon.predict import all_pairs, draw, groups, unknown
from knockon.run import Run
from knockon.types import CP10K, Label, UserError

FEWEST = 3
"""Draws without which an unbiased square has no interval."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How often each condition is drawn, and how many cells each time."""

    draws: int = 5
    """Draws of each condition, at least 3; intervals are between them."""
    cells: int = 64
    """Cells of each draw; a prediction file is parted into draws instead."""
    seed: int = 0
    """Seed of the first draw; the others count on."""

    def __post_init__(self) -> None:
        if self.draws < FEWEST:
            raise UserError(
                f"{self.draws} draws tell nothing of their spread",
                expected=f"at least {FEWEST}",
                mend="raise --draws",
            )
        if self.cells < 1:
            raise UserError(f"{self.cells} cells in each draw", expected="at least 1", mend="set --cells")


class Source(ABC):
    """What a model says of conditions, as changes of the mean of log1p against the real control cells.

    Parameters
    ----------
    measured
        What was measured, in log1p: the conditions of training, and all controls.
    whole
        The screen that it was selected from.
    """

    measured: Screen
    whole: Screen
    total: float | None = None
    """Sum that all counts of a cell were normalized to before ``log1p``; None where nobody knows."""
    with_vectors: frozenset[str] = frozenset()
    """Perturbations of which the model was given a vector."""

    @cached_property
    def controls(self) -> Mapping[tuple[str, ...], Float[np.ndarray, "genes"]]:
        """Mean of the control cells of each context."""
        controls = self.measured.select(self.measured.controls)
        return {label.covariates: found for label, found in controls.means().items()}

    def control(self, label: Label) -> Float[np.ndarray, "genes"]:
        """Mean of the control cells that a condition is compared with; all, where its context has none."""
        if label.covariates in self.controls:
            return self.controls[label.covariates]
        sizes = [len(self.measured.rows[control]) for control in self.measured.controls]
        return np.average(list(self.controls.values()), axis=0, weights=sizes)

    def observed(self, label: Label, draws: Draws) -> Float[np.ndarray, "draws genes"]:
        """Take the measured change of a condition, the same for every draw."""
        (found,) = self.measured.select([label]).means().values()
        return np.tile(found - self.control(label), (draws.draws, 1))

    @abstractmethod
    def unknown(self, labels: Sequence[Label]) -> list[Label]:
        """List the conditions of which nothing can be said."""

    @abstractmethod
    def candidates(self) -> list[Label]:
        """List the pairs that were not measured."""

    @abstractmethod
    def resolve(self, conditions: Sequence[str | Label]) -> list[Label]:
        """Conditions as labels; without context, in every one."""

    @abstractmethod
    def draw(
        self, labels: Sequence[Label], draws: Draws
    ) -> Iterator[tuple[Label, Float[np.ndarray, "draws genes"]]]:
        """Draw conditions, one after the other, as changes of the mean in natural log1p units.

        A change is taken against the very control cells that were made into the predicted ones, so that most
        of their noise cancels; over many draws that is against all control cells of the context.
        """


class OfRun(Source):
    """Drawn from a run, with one seed after the other."""

    def __init__(self, run: Run) -> None:
        self.run = run
        counts = run.screen.units == "counts"
        self.panel_total = CP10K * run.record.preparation.share if counts else None
        self.total = CP10K if counts else run.screen.total
        self.whole = _in_log1p(run.screen, self.panel_total)
        train = (*run.split.train, *run.split.validation)
        self.measured = self.whole.select((*train, *self.whole.controls))
        spec = run.model.spec
        if spec.vectors is not None:
            self.with_vectors = frozenset(np.array(spec.perturbations)[present(spec.vectors)].tolist())

    def unknown(self, labels: Sequence[Label]) -> list[Label]:
        """List what the model has no basis to predict."""
        return unknown(self.run.model, labels)

    def candidates(self) -> list[Label]:
        """List the pairs that the screen leaves open."""
        return all_pairs(self.run.model, self.run.screen)

    def resolve(self, conditions: Sequence[str | Label]) -> list[Label]:
        """See ``Run.resolve``."""
        return self.run.resolve(conditions)

    def draw(
        self, labels: Sequence[Label], draws: Draws
    ) -> Iterator[tuple[Label, Float[np.ndarray, "draws genes"]]]:
        """Generate cells and keep their means."""
        for group in groups(labels, draws.cells):
            changes = np.empty((len(group), draws.draws, len(self.whole.genes)))
            for turn in range(draws.draws):
                made = draw(self.run.model, self.run.screen, group, cells=draws.cells, seed=draws.seed + turn)
                for row, (cells, origin) in enumerate(made):
                    changes[row, turn] = self._mean(cells.cpu().numpy()) - mean(self.whole.matrix[origin])
            yield from zip(group, changes, strict=True)

    def _mean(self, cells: Float[np.ndarray, "cells genes"]) -> Float[np.ndarray, "genes"]:
        if self.panel_total is None:
            return cells.mean(axis=0, dtype=np.float64)
        return mean(values.log1p(sp.csr_matrix(cells), self.panel_total))


class OfFile(Source):
    """Read from cells that ``knockon predict`` wrote; disjoint parts of a condition's cells are its draws.

    What the run was trained on is not in the file: whatever the screen has counts as measured.
    """

    def __init__(self, prediction: AnnData | str | Path, screen: Screen) -> None:
        found = _read(prediction, screen)
        if found.about.get("screen") != screen.digest:
            raise UserError(
                "The prediction was not made from this screen",
                expected="cells that knockon predict wrote, and with --data the screen of their run",
                mend="give that screen with --data, or a run folder instead of the cells",
            )
        obs = prediction.obs if isinstance(prediction, AnnData) else read_obs(Path(prediction))
        counts = found.units == "counts"
        panel_total = CP10K * found.share if counts else None
        self.total = CP10K if counts else found.total
        panel = Preparation(units=found.units, total=None if counts else found.total, genes=found.genes)
        self.whole = _in_log1p(prepare.apply(screen, panel), panel_total)
        cells = replace(screen, matrix=found.matrix, genes=found.genes, rows=found.rows, units=found.units)
        self.predicted = _in_log1p(cells, panel_total)
        self.measured = self.whole
        self.origin = _origin(cast(pd.DataFrame, obs))

    def unknown(self, labels: Sequence[Label]) -> list[Label]:
        """List what the file lacks."""
        return [label for label in labels if label not in self.predicted.rows]

    def candidates(self) -> list[Label]:
        """List the combinations of the file that the screen leaves open."""
        found = [label for label in self.predicted.conditions if label not in self.whole.rows]
        pairs = [label for label in found if len(label.perturbations) > 1]
        if not pairs:
            raise UserError(
                "The file has no combination that was not measured",
                expected="cells of some",
                mend="knockon predict --all-pairs, or name conditions with --perturbations",
            )
        return pairs

    def resolve(self, conditions: Sequence[str | Label]) -> list[Label]:
        """Conditions as labels; without context, in every one that the file has."""
        known = {name for label in self.predicted.conditions for name in label.perturbations}
        named = [c if isinstance(c, Label) else conventions.parse(c, known=known) for c in conditions]
        contexts = [control.covariates for control in self.predicted.controls]
        return [
            label
            for name in named
            for label in ([name] if name.covariates else [replace(name, covariates=c) for c in contexts])
        ]

    def draw(
        self, labels: Sequence[Label], draws: Draws
    ) -> Iterator[tuple[Label, Float[np.ndarray, "draws genes"]]]:
        """Part the cells of each condition at random, and take the mean of each part."""
        few = [label for label in labels if len(self.predicted.rows[label]) < draws.draws]
        if few:
            raise UserError(
                "Fewer predicted cells than draws",
                offenders=few,
                expected=f"at least {draws.draws} cells of each condition",
                mend="predict more --cells",
            )
        for label in labels:
            rows = np.random.default_rng(draws.seed).permutation(self.predicted.rows[label])
            parts = np.array_split(rows, draws.draws)
            yield label, np.stack([self._change(part) for part in parts])

    def _change(self, rows: Int[np.ndarray, "cells"]) -> Float[np.ndarray, "genes"]:
        return mean(self.predicted.matrix[rows]) - mean(self.predicted.matrix[self.origin[rows]])


def _read(prediction: AnnData | str | Path, screen: Screen) -> Prediction:
    try:
        return read(prediction, screen)
    except UserError as error:
        what, _, mend = str(error).removesuffix(".").partition(". To mend it: ")
        if "--pred-" not in mend:
            raise
        # evaluation takes cells from anywhere and has options to read them; here they are knockon's own
        raise UserError(what, mend="take the file as knockon predict wrote it") from error


def _origin(obs: pd.DataFrame) -> Int[np.ndarray, "cells"]:
    """Row of the control cell that each cell was made from."""
    names = obs.index.astype(str)
    asked = pd.Index(obs["control_cell"].astype(str) if "control_cell" in obs else [])
    if len(asked) != len(names) or not names.is_unique or not asked.isin(names).all():
        raise UserError(
            "The prediction lacks control cells that its cells were made from",
            expected='obs["control_cell"], and these cells below the predicted ones',
            mend="take the whole file that knockon predict wrote",
        )
    return names.get_indexer(asked)


def _in_log1p(screen: Screen, total: float | None) -> Screen:
    """Screen in log1p; from counts, of counts per ``total``."""
    return prepare.apply(screen, Preparation(units="log1p", total=total))
