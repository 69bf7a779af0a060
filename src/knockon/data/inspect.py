"""What is in a file, what is wrong with it, and how to mend it: all at once, and never an error."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Int

from knockon.data.conventions import Columns
from knockon.data.formats import Stored, load, stay_inside
from knockon.data.manifest import Manifest, is_store
from knockon.data.recognize import (
    PERTURBATION_COLUMNS,
    Design,
    read_covariates,
    read_doses,
    recognize,
)
from knockon.data.screen import refuse_duplicates, refuse_other_columns
from knockon.data.splits import singles
from knockon.data.values import Scale, Survey, scale, survey
from knockon.progress import bar
from knockon.types import Label, UserError

T = TypeVar("T")
FEW = 10
"""Cells below which the mean of a condition is mostly noise."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something to know about a file.

    Parameters
    ----------
    fault
        Whether the file cannot be used as it is; otherwise it is a remark.
    text
        What was found and what mends it, in plain words.
    """

    fault: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``inspect`` found.

    Parameters
    ----------
    path
        The file.
    facts
        Names and values, in the order of reading.
    findings
        Faults first.
    """

    path: Path
    facts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What keeps the file from being used."""
        return tuple(finding for finding in self.findings if finding.fault)

    def lines(self) -> Iterator[str]:
        """Give the report line by line, for the command line."""
        yield str(self.path)
        width = max((len(name) for name, _ in self.facts), default=0)
        yield from (f"  {name:<{width}}  {value}" for name, value in self.facts)
        yield from (f"{'FAULT ' if finding.fault else 'remark'}  {finding.text}" for finding in self.findings)
        if self.faults:
            yield f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)}"
        else:
            yield "Nothing keeps this file from being used."


def inspect(path: str | Path, columns: Columns = Columns()) -> Report:
    """Read a file as ``Screen.read`` would, and list everything that is in its way.

    Parameters
    ----------
    path
        An ``.h5ad``, a ``.zarr`` or a store, in whatever state.
    columns
        As they would be given to ``Screen.read``.
    """
    faults: list[str] = []
    if is_store(Path(path)):
        return _store(Path(path), columns, faults)
    stored = _attempt(faults, partial(load, Path(path), layer=columns.layer))
    if stored is None and columns.layer is not None:
        stored = _attempt([], load, Path(path))  # what else is wrong can be said without the layer
    if stored is None:
        return _report(path, faults, [], [])
    _attempt(faults, refuse_duplicates, stored.genes)
    design = _design(stored, columns, faults)
    looks = survey(stored.values)
    judged = _values(looks, columns, faults)
    facts = [
        *_size(len(stored.obs), len(stored.genes), looks.stored),
        *(_scale(judged, looks.largest) if judged else []),
        *(_conditions(design, _counts(design)) if design else []),
    ]
    remarks = [*_names(stored), *(_weak(design, _counts(design), stored.genes) if design else [])]
    return _report(path, faults, facts, remarks)


def _store(folder: Path, columns: Columns, faults: list[str]) -> Report:
    """Say what the manifest of a store says; nothing else of it is read."""
    known = _known(folder, faults)
    if known is None:
        return _report(folder, faults, [], [])
    _attempt(faults, refuse_duplicates, known.genes)
    _attempt(faults, refuse_other_columns, known, columns)
    design = Design(
        labels=tuple(stretch.label for stretch in known.stretches),
        codes=np.empty(0, dtype=np.int64),
        covariates=known.covariates,
        spellings={},
        dose_unit=known.dose_unit,
        notes=known.notes,
    )
    counts = np.array([stretch.stop - stretch.start for stretch in known.stretches])
    made = ", ".join(file.name for file in known.plan.inputs)
    facts = [
        ("store of", made),
        *_size(known.cells, len(known.genes), known.values),
        *_scale(Scale(units=known.units, total=known.total), known.largest),
        *_conditions(design, counts),
    ]
    return _report(folder, faults, facts, [*_weak(design, counts, known.genes)])


def verify(path: str | Path, *, quiet: bool = True) -> Report:
    """Read every file of a store, and name those that are not as they were written.

    Raises
    ------
    UserError
        If the path is no store.
    """
    folder, faults = Path(path), list[str]()
    if not is_store(folder):
        raise UserError(
            f"{path} has no checksums",
            expected="a folder that knockon prepare wrote",
            mend="leave out --verify",
        )
    known = _known(folder, faults)
    if known is not None:
        with bar("verifying", total=len(known.files), quiet=quiet) as advance:
            for fault in known.verify(folder):
                faults += [fault] if fault else []
                advance()
    facts = [("files", f"{len(known.files):,}, {len(faults):,} of them damaged")] if known else []
    return _report(folder, faults, facts, [])


def _known(folder: Path, faults: list[str]) -> Manifest | None:
    """Read a manifest, and nothing of a folder with links that lead out of it."""
    _attempt(faults, stay_inside, folder)
    return None if faults else _attempt(faults, Manifest.read, folder)


def _report(
    path: str | Path, faults: Sequence[str], facts: Sequence[tuple[str, str]], remarks: Sequence[str]
) -> Report:
    found = [Finding(fault=True, text=text) for text in dict.fromkeys(faults)]
    found += [Finding(fault=False, text=text) for text in remarks]
    return Report(path=Path(path), facts=tuple(facts), findings=tuple(found))


def _attempt(faults: list[str], action: Callable[..., T], *arguments: object) -> T | None:
    """Do something that may meet a fault, and note the fault."""
    try:
        return action(*arguments)
    except UserError as error:
        faults.append(str(error))
        return None


def _design(stored: Stored, columns: Columns, faults: list[str]) -> Design | None:
    """Recognize what was done to the cells; after a fault, look for others that it hides."""
    design = _attempt(faults, recognize, stored.obs, stored.genes, columns)
    if design is None:
        keys = [key for key in (columns.perturbation_key, *PERTURBATION_COLUMNS) if key in stored.obs.columns]
        known = stored.obs.dropna(subset=keys[:1])
        _attempt(faults, recognize, known, stored.genes, replace(columns, covariate_keys=(), dose_key=None))
        _attempt(faults, read_covariates, stored.obs, columns.covariate_keys, [])
        _attempt(faults, read_doses, stored.obs, columns.dose_key, [])
    return design


def _values(looks: Survey, columns: Columns, faults: list[str]) -> Scale | None:
    """Judge the values; each sort of fault hides the next, so each is looked for alone."""
    clean = replace(looks, nonfinite=[], negative=[])
    _attempt(faults, scale, replace(clean, nonfinite=looks.nonfinite), columns.units)
    _attempt(faults, scale, replace(clean, negative=looks.negative), columns.units)
    return _attempt(faults, scale, clean, columns.units)


def _size(cells: int, genes: int, values: int) -> Iterator[tuple[str, str]]:
    yield "cells", f"{cells:,}"
    yield "genes", f"{genes:,}"
    yield "zeros", f"{1 - values / max(1, cells * genes):.1%}"


def _scale(judged: Scale, largest: float) -> Iterator[tuple[str, str]]:
    total = f", {judged.total:g} per cell" if judged.total else ""
    yield "values", f"{judged.units}{total}, largest {largest:g}"


def _counts(design: Design) -> Int[np.ndarray, "conditions"]:
    return np.bincount(design.codes, minlength=len(design.labels))


def _conditions(design: Design, counts: Int[np.ndarray, "conditions"]) -> Iterator[tuple[str, str]]:
    treated = counts[[not label.is_control for label in design.labels]]
    yield "control cells", f"{counts.sum() - treated.sum():,}"
    yield "conditions", f"{len(treated):,}"
    if len(treated):
        low, middle, high = np.quantile(treated, [0.05, 0.5, 0.95])
        yield "cells in each", f"median {middle:g}, 5 % to 95 %: {low:g} to {high:g}"
    wide = [label for label in design.labels if len(label.perturbations) > 1]
    narrow = {label.everywhere for label in design.labels if len(label.perturbations) == 1}
    yield "single perturbations", str(len(narrow))
    yield "combinations", f"{len(wide)}, of which {len(_additive(design, wide))} have all their singles"
    for covariate in design.covariates:
        yield covariate.name, f"{len(covariate.levels)} levels: {', '.join(covariate.levels[:6])}"
    doses = sorted({dose for label in design.labels for dose in label.doses if dose})
    if doses:
        yield "doses", f"{len(doses)}, from {doses[0]:g} to {doses[-1]:g} {design.dose_unit or '(no unit)'}"
    yield from (("recognized", note) for note in design.notes)


def _additive(design: Design, wide: Sequence[Label]) -> list[Label]:
    return [label for label in wide if set(singles(label)) <= set(design.labels)]


def _names(stored: Stored) -> Iterator[str]:
    """Remark on names of genes, cells and columns."""
    folded = Counter(gene.upper() for gene in set(stored.genes))
    alike = [gene for gene in stored.genes if folded[gene.upper()] > 1]
    if alike:
        yield f"Genes that differ only in capitals: {', '.join(alike[:3])}. Are they the same gene?"
    if stored.obs.index.duplicated().any():
        yield "Names of cells occur twice. Write adata.obs_names_make_unique() to tell them apart."
    for name, column in stored.obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype) and (column.value_counts() == 0).any():
            yield f"obs[{name!r}] knows values that no cell has; they are left out."


def _weak(design: Design, counts: Int[np.ndarray, "conditions"], genes: Sequence[str]) -> Iterator[str]:
    """Remark on what can be used but will disappoint."""
    few = [str(label) for label, count in zip(design.labels, counts, strict=True) if count < FEW]
    if few:
        named = ", ".join(few[:3])
        yield f"{len(few)} conditions have fewer than {FEW} cells, so their scores will be noise: {named}."
    alone = [str(la) for la in design.labels if not la.is_control and la.control() not in design.labels]
    if alone:
        yield f"{len(alone)} conditions have no control cells in their context: {', '.join(alone[:3])}."
    names = {name for label in design.labels for name in label.perturbations}
    spelled = Counter(name.upper() for name in names)
    alike = sorted(name for name in names if spelled[name.upper()] > 1)
    if alike:
        yield f"Perturbations that differ only in capitals: {', '.join(alike[:3])}. Write each in one way."
    inside = len(names & set(genes))
    ensembl = np.mean([gene.startswith("ENS") for gene in genes]) > 0.5
    if names and not inside and ensembl:
        yield (
            "Genes are Ensembl numbers and perturbations are not, so none of them is found in the panel. "
            "Write adata.var_names = adata.var['gene_name'] where there is such a column."
        )
    elif inside:
        yield f"{inside} of {len(names)} perturbations are genes of the panel."
