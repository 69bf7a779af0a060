"""A screen: cells, genes, and which cells were treated how. The only reader of files."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float, Int

from knockon.data.arrays import Moments, moments
from knockon.data.chunks import Names, Sheet
from knockon.data.conventions import Columns
from knockon.data.formats import Stored, choose_layer, load, stay_inside
from knockon.data.manifest import Manifest, is_store
from knockon.data.recognize import Design, recognize
from knockon.data.values import Matrix, OnDisk, Scale, compressed, scale, survey
from knockon.data.vectors import stacked
from knockon.types import Covariate, Label, Spec, Units, UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Screen:
    """Expression of cells under perturbations, with the rows of each condition found once.

    A selection of conditions (``select``) shares the matrix and only names fewer rows, so that
    training code that is given the training screen cannot reach a test cell.

    Parameters
    ----------
    matrix
        Cells x genes, all cells of the file; in memory or on disk, indexed by rows alike.
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
    columns
        How it was read, to read it again.
    notes
        What was recognized rather than told, one line each, to be printed.
    vocabulary
        All conditions of the file, whatever is selected: what a ``Spec`` may name.
    spellings
        How the file writes each combination, by which the published additive split is ordered.
    shuffled
        Whether the rows of each condition follow each other in random order, as in a store, so that a few
        cells that lie together are a random sample of it.
    """

    matrix: Matrix
    genes: tuple[str, ...]
    cells: Sequence[str]
    rows: Mapping[Label, Int[np.ndarray, "cells"]]
    covariates: tuple[Covariate, ...] = ()
    units: Units = "log1p"
    total: float | None = None
    dose_unit: str | None = None
    digest: str = ""
    source: str = ""
    columns: Columns = Columns()
    notes: tuple[str, ...] = ()
    vocabulary: tuple[Label, ...] = ()
    spellings: Mapping[Label, str] = field(default_factory=dict)
    shuffled: bool = False

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

    def select(self, labels: Iterable[Label]) -> "Screen":
        """Only these conditions, in this screen's order."""
        wanted = set(labels)
        return replace(self, rows={label: rows for label, rows in self.rows.items() if label in wanted})

    def gather(self, rows: Int[np.ndarray, "cells"]) -> Float[np.ndarray, "cells genes"]:
        """Dense float32 values of some rows of ``matrix``."""
        return self.matrix[rows].toarray().astype(np.float32, copy=False)

    def cells_of(self, label: Label) -> Float[np.ndarray, "cells genes"]:
        """Dense float32 values of all cells of a condition."""
        return self.gather(self.rows[label])

    def names_of(self, rows: Int[np.ndarray, "cells"]) -> list[str]:
        """Names of the cells in some rows of ``matrix``."""
        if isinstance(self.cells, Names):
            return self.cells.take(rows)
        return [str(self.cells[row]) for row in rows.tolist()]

    def control_rows(self, label: Label) -> Int[np.ndarray, "cells"]:
        """Rows of the control cells that match a condition's covariates.

        Where its context has none, all control cells serve.
        """
        found = [self.rows[control] for control in self._matching(label)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def control_moments(self, label: Label) -> Moments:
        """Moments of the same cells as ``control_rows`` gives."""
        return self.pooled(self._matching(label))

    def _matching(self, label: Label) -> tuple[Label, ...]:
        found = (label.control(),) if label.control() in self.rows else self.controls
        if not found:
            raise UserError("The screen has no control cells", mend="name them with --control")
        return found

    @property
    def every(self) -> Int[np.ndarray, "cells"]:
        """Rows of all selected conditions, in the order of the file."""
        return np.sort(np.concatenate(list(self.rows.values())))

    @cached_property
    def moments(self) -> Mapping[Label, Moments]:
        """Of the cells of each condition, in the screen's units, as float64; all are found together."""
        return moments(self.matrix, self.rows)

    def pooled(self, labels: Iterable[Label]) -> Moments:
        """Moments of the cells of several conditions together."""
        return reduce(add, (self.moments[label] for label in labels))

    def means(self) -> dict[Label, Float[np.ndarray, "genes"]]:
        """Mean over the cells of each condition, in the screen's units, as float64."""
        return {label: found.mean for label, found in self.moments.items()}

    def spec(self, vectors: Mapping[str, Float[np.ndarray, "width"]] | None = None) -> Spec:
        """Tell a model what it may know of this screen: names and units of the whole file, no values.

        Parameters
        ----------
        vectors
            Fixed vectors of perturbations. Further names in it become perturbations that a model can predict
            unseen; those of the screen that it lacks are known by their cells alone.

        Raises
        ------
        UserError
            If no perturbation of the screen has a vector, or the vectors differ in length.
        """
        labels = self.vocabulary or self.labels
        names = {name for label in labels for name in label.perturbations}
        perturbations = tuple(sorted(names | set(vectors or ())))
        return Spec(
            genes=self.genes,
            perturbations=perturbations,
            covariates=self.covariates,
            slots=max((len(label.perturbations) for label in labels), default=1) or 1,
            units=self.units,
            total=self.total,
            dose_unit=self.dose_unit,
            vectors=None if vectors is None else stacked(vectors, perturbations, names),
        )

    @classmethod
    def read(  # noqa: PLR0913 - one for each option of the command line
        cls,
        path: str | Path,
        *,
        perturbation_key: str | None = None,
        control: str | None = None,
        covariate_keys: Sequence[str] | None = None,
        dose_key: str | None = None,
        layer: str | None = None,
        units: Units | None = None,
        unlabelled: bool = False,
        backed: bool = False,
    ) -> "Screen":
        """Read ``.h5ad`` or ``.zarr``; what is not told is recognized and noted.

        Parameters
        ----------
        path
            The file.
        perturbation_key, control, covariate_keys, dose_key, layer, units, unlabelled
            See ``Columns``.
        backed
            Leave the values on disk, for screens larger than memory.

        Raises
        ------
        UserError
            If the file cannot be read as a screen.
        """
        columns = Columns(
            perturbation_key=perturbation_key,
            control=control,
            covariate_keys=None if covariate_keys is None else tuple(covariate_keys),
            dose_key=dose_key,
            layer=layer,
            units=units,
            unlabelled=unlabelled,
        )
        return read(path, columns, backed=backed)

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        columns: Columns = Columns(),
        source: str = "",
    ) -> "Screen":
        """Make a screen of cells in memory or on disk.

        Raises
        ------
        UserError
            If genes are not unique, a layer or a column is missing, there is no control, or the
            values are neither counts nor ``log1p``.
        """
        choose_layer(columns.layer, list(adata.layers), has_x=adata.X is not None)
        values = adata.X if columns.layer is None else adata.layers[columns.layer]
        stored = Stored(
            obs=cast(pd.DataFrame, adata.obs),
            genes=tuple(adata.var_names.astype(str)),
            values=OnDisk(data=values) if adata.isbacked and columns.layer is None else compressed(values),
        )
        return _assemble(stored, columns, source)


def read(path: str | Path, columns: Columns = Columns(), *, backed: bool = False) -> Screen:
    """Read ``.h5ad``, ``.zarr`` or a store; like ``Screen.read``, with all columns in one piece."""
    if is_store(Path(path)):
        return _open(Path(path), columns)
    return _assemble(load(Path(path), layer=columns.layer, backed=backed), columns, str(path))


def _assemble(stored: Stored, columns: Columns, source: str) -> Screen:
    refuse_duplicates(stored.genes)
    design = recognize(stored.obs, stored.genes, columns)
    judged = scale(survey(stored.values), columns.units)
    order = np.argsort(design.codes, kind="stable")
    ends = np.cumsum(np.bincount(design.codes, minlength=len(design.labels)))
    rows = dict(zip(design.labels, np.split(order, ends[:-1]), strict=True))
    cells = tuple(stored.obs.index.astype(str))
    return Screen(
        matrix=stored.values,
        genes=stored.genes,
        cells=cells,
        rows=rows,
        covariates=design.covariates,
        units=judged.units,
        total=judged.total,
        dose_unit=design.dose_unit,
        digest=digest_of(stored.genes, cells, design),
        source=source,
        columns=columns,
        notes=(*design.notes, *notes_of(rows, judged, columns)),
        vocabulary=design.labels,
        spellings=design.spellings,
    )


def _open(folder: Path, columns: Columns) -> Screen:
    """Open a prepared screen; of its cells nothing is read but where the values of each begin."""
    stay_inside(folder)
    known = Manifest.read(folder)
    refuse_duplicates(known.genes)
    refuse_other_columns(known, columns)
    sheet = Sheet(folder / "X", shape=(known.cells, len(known.genes)), values=known.values, sizes=known.sizes)
    numbers = np.arange(known.cells, dtype=np.int32 if known.cells < 2**31 else np.int64)
    return Screen(
        matrix=OnDisk(data=sheet),
        genes=known.genes,
        cells=Names(folder / "obs" / "_index", known.cells),
        rows={stretch.label: numbers[stretch.start : stretch.stop] for stretch in known.stretches},
        covariates=known.covariates,
        units=known.units,
        total=known.total,
        dose_unit=known.dose_unit,
        digest=known.digest,
        source=str(folder),
        columns=known.plan.columns,
        notes=known.notes,
        vocabulary=tuple(stretch.label for stretch in known.stretches),
        spellings={spelling.label: spelling.text for spelling in known.spellings},
        shuffled=True,
    )


def refuse_other_columns(known: Manifest, columns: Columns) -> None:
    """Refuse to read a prepared screen in another way than the files were read that it was made of."""
    before = {**asdict(known.plan.columns), "units": known.units}
    other = [
        f"--{name.replace('_', '-')}"
        for name, told in asdict(columns).items()
        if told and told != before[name]
    ]
    if other:
        raise UserError(
            "The store was prepared with other options",
            offenders=other,
            expected="the options that it was prepared with, or none",
            mend="leave them out, or prepare another store with them",
        )


def refuse_duplicates(genes: Sequence[str]) -> None:
    """Refuse genes that occur twice."""
    twice = sorted(gene for gene, times in Counter(genes).items() if times > 1)
    if twice:
        raise UserError(
            "Duplicate genes",
            offenders=twice,
            expected="each gene once",
            mend="adata.var_names_make_unique(), or sum them",
        )


def digest_of(genes: Sequence[str], cells: Sequence[str], design: Design) -> str:
    """Hash names and design, not values: a layer of the same cells is the same screen."""
    marks = hashlib.sha256()
    for texts in (genes, cells, [str(label) for label in design.labels]):
        marks.update("\n".join(texts).encode())
        marks.update(f"\0{len(texts)}\0".encode())
    marks.update(design.codes.astype("<i8").tobytes())
    return marks.hexdigest()


def notes_of(rows: Mapping[Label, np.ndarray], judged: Scale, columns: Columns) -> list[str]:
    """Say what the values are, and which conditions have too few cells."""
    where = f"layer {columns.layer!r}" if columns.layer else "X"
    total = f" of {judged.total:g} per cell" if judged.total else ""
    notes = [] if columns.units else [f"{where} holds {judged.units}{total}"]
    single = [str(label) for label, found in rows.items() if len(found) == 1]
    if single:
        notes.append(f"{len(single)} conditions have one cell: {', '.join(single[:3])}")
    return notes
