"""Prediction and truth, aligned condition by condition and checked once, before anything is scored."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from jaxtyping import Bool, Int

from knockon.data import values
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate.differential import Differences
from knockon.evaluate.populations import Moments, exact, moments, num_cells
from knockon.evaluate.prediction import Prediction, read
from knockon.evaluate.truth import Context, Truth
from knockon.types import UserError

FEWEST = 0.05
"""Share of the screen's genes that a prediction must have: fewer, and the names are of another kind."""


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
    origins
        Row in the screen of the control cell that each came from, where the prediction tells.
    controls
        Predicted control cells of each context, where there are any. No metric looks at them: both sides
        refer to the real ones.
    present
        The genes that were predicted; None for all. The others were filled in, see ``align``.
    model
        What made them, where they tell.
    notes
        What was done to align them, to be printed.
    """

    truth: Truth
    cells: tuple[sp.csr_matrix, ...]
    counts: tuple[sp.csr_matrix, ...] | None = None
    origins: tuple[Int[np.ndarray, "_"], ...] | None = None
    controls: Mapping[Context, sp.csr_matrix] = field(default_factory=dict)
    present: Bool[np.ndarray, "genes"] | None = None
    model: str = "prediction"
    notes: tuple[str, ...] = ()

    @cached_property
    def moments(self) -> Moments:
        """Of the predicted cells; variances of one cell are 0, as those of that cell repeated."""
        found = moments(self.cells)
        return replace(found, variance=np.nan_to_num(found.variance))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of the notes is about the prediction."""
        return tuple(note for note in self.notes if note not in self.truth.notes)

    @cached_property
    def differences(self) -> Differences:
        """Of predicted cells from real control cells; see ``Truth.differing``."""
        return self.truth.differing(self.cells)

    @classmethod
    def of(cls, prediction: Prediction | AnnData | str | Path, screen: Screen, split: Split) -> "Pairs":
        """Align a prediction with the test part of a screen; see ``align``."""
        found = prediction if isinstance(prediction, Prediction) else read(prediction, screen)
        pairs = cls.align(found, Truth.of(found.prepare(screen), split, source=screen))
        return replace(pairs, notes=(*pairs.notes, *found.remarks(split)))

    @classmethod
    def align(cls, prediction: Prediction | AnnData | str | Path, truth: Truth) -> "Pairs":
        """Align a prediction with the truth.

        Genes are put in order by name and further genes left out. A gene that the prediction lacks counts as
        wrong: in each condition it is taken as silenced (0 in all cells) or, where silence would be nearer
        to the truth than no effect, as unchanged (values of real control cells). Test conditions that the
        prediction lacks are not scored, and conditions outside the test part not looked at. All of that is
        noted.

        Parameters
        ----------
        prediction
            Cells or a file of them; see ``prediction.read``, also for what is refused there.
        truth
            What it is scored against.

        Raises
        ------
        UserError
            If hardly any gene or no test condition is in common, or the scale is not the screen's.
        """
        found = prediction if isinstance(prediction, Prediction) else read(prediction, truth.source)
        places, noted = _places(found, truth.screen)
        outside = _outside(found, truth)
        truth = truth.select(found.rows)
        raw = _arranged(found.matrix, places)
        absent = places < 0
        matrix, scaled = _in_log1p(raw, found, truth, absent)
        rows = [found.rows[label] for label in truth.labels]
        origins = found.origins(truth.source)
        counted = None if truth.counts is None else truth.counted
        return cls(
            truth=truth,
            cells=_filled([matrix[some] for some in rows], truth, absent, lambda x: truth.screen.matrix[x]),
            counts=_filled([raw[some] for some in rows], truth, absent, counted)
            if found.units == "counts"
            else None,
            origins=None if origins is None else tuple(origins[some] for some in rows),
            controls={x.covariates: exact(matrix[rows]) for x, rows in found.rows.items() if x.is_control},
            present=~absent if absent.any() else None,
            model=found.model,
            notes=(*truth.notes, *found.notes, *noted, *outside, *scaled),
        )


def _places(found: Prediction, screen: Screen) -> tuple[Int[np.ndarray, "genes"], list[str]]:
    """Place of each gene of the screen in the prediction, -1 where it is missing."""
    place = {name: i for i, name in enumerate(found.genes)}
    places = np.array([place.get(gene, -1) for gene in screen.genes])
    missing = [gene for gene in screen.genes if gene not in place]
    shared = len(places) - len(missing)
    if shared < max(1.0, FEWEST * len(places)):
        raise UserError(
            f"The prediction has {shared} of the screen's {len(places):,} genes",
            expected=f"names such as {', '.join(screen.genes[:3])}; found {', '.join(found.genes[:3])}",
            mend="write var_names as the screen has them (Ensembl ids and symbols are different names), or "
            "evaluate against a screen of the genes that are predicted",
        )
    notes = []
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        notes.append(
            f"the prediction lacks {len(missing):,} of the screen's {len(places):,} genes, which count as "
            f"wrong (silenced or unchanged, whichever is worse): {named}"
        )
    if len(found.genes) > shared:
        notes.append(f"{len(found.genes) - shared:,} predicted genes that the screen has not are left out")
    if (np.diff(places[places >= 0]) < 0).any():
        notes.append("predicted genes were put in the screen's order")
    return places, notes


def _outside(found: Prediction, truth: Truth) -> list[str]:
    """Name the test conditions that are missing, and what is not looked at."""
    missing = [label for label in truth.labels if label not in found.rows]
    if len(missing) == len(truth.labels):
        have = [str(label) for label in found.rows if not label.is_control][:3]
        raise UserError(
            "The prediction lacks all test conditions",
            offenders=missing,
            expected=f"cells of them; found {', '.join(have) or 'control cells only'}",
            mend="predict them with knockon predict --part test, or choose another --split",
        )
    tested = set(truth.labels)
    others = [label for label in found.rows if not label.is_control and label not in tested]
    unknown = [str(label) for label in others if label not in truth.screen.rows]
    notes = []
    if len(others) > len(unknown):
        notes.append(f"{len(others) - len(unknown)} predicted conditions outside the test part are ignored")
    if unknown:
        named = ", ".join(unknown[:3]) + (" ..." if len(unknown) > 3 else "")
        notes.append(f"{len(unknown)} predicted conditions that the screen has not are ignored: {named}")
    if missing:
        named = ", ".join(str(label) for label in missing)
        notes.append(
            f"not comparable with others: the prediction lacks {len(missing)} test conditions: {named}"
        )
    return notes


def _arranged(matrix: sp.csr_matrix, places: Int[np.ndarray, "genes"]) -> sp.csr_matrix:
    """Put genes in the screen's order; what was not predicted is empty."""
    there = np.flatnonzero(places >= 0)
    chosen = sp.csr_matrix(matrix[:, places[there]])
    chosen.sort_indices()
    return sp.csr_matrix(
        (chosen.data, there[chosen.indices], chosen.indptr), (num_cells(chosen), len(places))
    )


def _in_log1p(
    raw: sp.csr_matrix, found: Prediction, truth: Truth, absent: Bool[np.ndarray, "genes"]
) -> tuple[sp.csr_matrix, list[str]]:
    """Bring values to log1p of the truth's total.

    What the genes that are there sum to is brought to the share of that total that they really have.
    """
    ours, theirs = truth.screen.total, found.total
    if ours is not None and absent.any() and (found.units == "counts" or found.plain):
        ours *= truth.share(~absent)
    if found.units == "counts" and ours is not None:
        return values.log1p(raw, ours * (1.0 if truth.units == "counts" else found.share)), []
    if found.units == "counts" or (truth.units == "counts" and theirs is None):
        raise UserError(
            f"The prediction is in {found.units} and the screen in {truth.units}",
            expected="one scale for both, or log1p of a known total",
            mend="--pred-total 10000, if that is what counts were normalized to before log1p"
            if found.units == "log1p"
            else "read the screen with the --layer that holds counts",
        )
    if ours is None or theirs is None or np.isclose(ours, theirs, rtol=1e-3 if found.plain else 1e-6):
        return raw, []
    scaled = np.log1p(np.expm1(raw.data.astype(np.float64)) * (ours / theirs))
    plain = ", as all its cells sum to that," if found.plain else ""
    note = f"the prediction is log1p of counts per {theirs:g}{plain} and was brought to {ours:g}"
    return sp.csr_matrix((scaled, raw.indices, raw.indptr), raw.shape), [note]


def _filled(
    cells: Sequence[sp.csr_matrix],
    truth: Truth,
    absent: Bool[np.ndarray, "genes"],
    measured: Callable[[Int[np.ndarray, "_"]], sp.csr_matrix] | None,
) -> tuple[sp.csr_matrix, ...]:
    """Cells of each condition, in which genes that were not predicted are silenced or unchanged.

    Parameters
    ----------
    measured
        Gives real cells by their rows, for the values of control cells; None where there are none in these
        units.
    """
    if measured is None or not absent.any():
        return tuple(exact(some) for some in cells)
    filled = []
    for some, label, real, control in zip(
        cells, truth.labels, truth.moments.mean, truth.control, strict=True
    ):
        unchanged = absent & (np.abs(real - control) > real)
        rows, count = truth.screen.control_rows(label), num_cells(some)
        rng = np.random.default_rng(zlib.crc32(str(label).encode()))
        drawn = rng.choice(rows, count, replace=count > len(rows))
        filled.append(exact(some + sp.csr_matrix(measured(drawn)) @ sp.diags(unchanged.astype(np.float64))))
    return tuple(filled)
