"""The real side of an evaluation: the scored conditions and all that scores refer to."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int

from knockon.data import prepare
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate.differential import Context, Differences, differences
from knockon.evaluate.populations import Moments, exact, moments, sample
from knockon.evaluate.space import Space
from knockon.types import CP10K, Label, Units, UserError

TESTED = 256
"""Most cells of a condition and side that are tested against control."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The real cells of the scored conditions and all that scores refer to, in log1p.

    Parameters
    ----------
    source
        The screen as it was given; it may have further genes.
    screen
        Where all of it is from, in log1p. A screen in counts is normalized to the median total of its
        training cells first.
    units
        What that screen was in.
    labels
        The scored conditions: the rows of everything here.
    train
        The conditions that training may have seen; validation conditions are among them.
    cells
        Real cells of each scored condition.
    counts
        The same cells in counts, of a screen in counts.
    half
        Half of the number of real cells of each, which is what a replicate has on either side; kept where
        ``cells`` are halved.
    space
        For comparing whole cells.
    control, centroid, candidates, own, rivals
        See ``metrics.Evidence``. In a context without training perturbations, the centroid is its
        control moved by the average change of the training perturbations in their own contexts.
        Only test conditions are held out here.
    notes
        What was done to make the sides comparable, to be printed.
    """

    source: Screen
    screen: Screen
    units: Units
    labels: tuple[Label, ...]
    train: tuple[Label, ...]
    cells: tuple[sp.csr_matrix, ...]
    half: Int[np.ndarray, "conditions"]
    space: Space
    control: Float[np.ndarray, "conditions genes"]
    centroid: Float[np.ndarray, "conditions genes"]
    candidates: Float[np.ndarray, "candidates genes"]
    own: Int[np.ndarray, "conditions"]
    rivals: Bool[np.ndarray, "conditions candidates"]
    counts: tuple[sp.csr_matrix, ...] | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def moments(self) -> Moments:
        """Of the real cells."""
        return moments(self.cells)

    def population(self, label: Label) -> sp.csr_matrix:
        """Real cells of any condition of the screen or of any control, scored or not."""
        screen = self.screen
        return _cells(screen, screen.control_rows(label) if label.is_control else screen.rows[label])

    def counted(self, rows: Int[np.ndarray, "_"]) -> sp.csr_matrix:
        """Find the counts of the panel's genes in some cells of a screen that has counts."""
        return _counted(self.source, self.screen, rows)

    def share(self, genes: Bool[np.ndarray, "genes"]) -> float:
        """Share of some genes in what all genes of the control cells sum to, before the logarithm."""
        sums = np.zeros(len(genes))
        for cells in self._controls.values():
            sums += np.bincount(cells.indices, np.expm1(cells.data), minlength=len(genes))
        return float(sums[genes].sum() / sums.sum())

    @cached_property
    def differences(self) -> Differences:
        """Of real cells from control."""
        return self.differing(self.cells)

    def differing(self, cells: Sequence[sp.csr_matrix]) -> Differences:
        """Compare cells of each condition, at most as many as a replicate has, with real control cells."""
        sides = zip(self.labels, cells, self.half.tolist(), strict=True)
        drawn = [sample(label, some, max(1, min(half, TESTED))) for label, some, half in sides]
        return differences(drawn, [label.covariates for label in self.labels], self._controls)

    @cached_property
    def _controls(self) -> dict[Context, sp.csr_matrix]:
        """Control cells of each scored context."""
        controls = {label.covariates: label.control() for label in self.labels}
        return {context: self.population(control) for context, control in controls.items()}

    @classmethod
    def of(cls, screen: Screen, split: Split, *, source: Screen | None = None) -> "Truth":
        """Gather the test part of a screen.

        Parameters
        ----------
        screen
            As it was measured, or prepared for a model.
        source
            As it was measured, where ``screen`` is prepared: for what is scored in counts.

        Raises
        ------
        UserError
            If the split tests nothing, trains nothing, or names what the screen has not.
        """
        test = _part(screen, split.test, "test")
        train = _part(screen, (*split.train, *split.validation), "training")
        source, units, screen = source or screen, screen.units, _in_log1p(screen, train)
        means = screen.means()
        controls = {label.covariates: screen.control_moments(label).mean for label in screen.conditions}
        centroids = _centroids({label: means[label] for label in train}, controls)
        own = np.array([screen.conditions.index(label) for label in test])
        rivals = np.array([[q.covariates == label.covariates for q in screen.conditions] for label in test])
        rivals[np.arange(len(test)), own] = False
        return cls(
            source=source,
            screen=screen,
            units=units,
            labels=test,
            train=train,
            cells=tuple(_cells(screen, screen.rows[label]) for label in test),
            counts=tuple(_counted(source, screen, source.rows[label]) for label in test)
            if source.units == "counts"
            else None,
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
        if kept.all():
            return self  # with what was already found of the real cells
        return replace(
            self,
            labels=tuple(label for label in self.labels if label in wanted),
            cells=tuple(compress(self.cells, kept)),
            counts=None if self.counts is None else tuple(compress(self.counts, kept)),
            half=self.half[kept],
            control=self.control[kept],
            centroid=self.centroid[kept],
            own=self.own[kept],
            rivals=self.rivals[kept],
        )


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
    return exact(sp.csr_matrix(screen.matrix[rows]))


def _counted(source: Screen, screen: Screen, rows: Int[np.ndarray, "_"]) -> sp.csr_matrix:
    place = {gene: i for i, gene in enumerate(source.genes)}
    return _cells(source, rows)[:, [place[gene] for gene in screen.genes]]


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
