"""Predicted cells, whoever made them: read, named in the words of a screen, and their values checked."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from jaxtyping import Float, Int

from knockon.data import formats, prepare, recognize, values
from knockon.data.prepare import Preparation
from knockon.data.screen import Screen, refuse_duplicates
from knockon.data.split_file import Split, assemble
from knockon.evaluate.populations import num_distinct
from knockon.types import Label, Units, UserError

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a prediction is to be read; what is not told is recognized, and said.

    Parameters
    ----------
    perturbation_key
        Column of ``obs`` with what was predicted; else ``perturbation``, or one of the columns that screens
        have it in.
    layer
        Layer with the values; ``X`` without it.
    units
        Scale of the values; else what ``uns["knockon"]`` declares, or what they look like.
    total
        Sum that counts were normalized to before ``log1p``; else what ``uns["knockon"]`` declares, or what
        all cells sum to.
    """

    perturbation_key: str | None = None
    layer: str | None = None
    units: Units | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Predicted cells in their own units and genes, by condition.

    Parameters
    ----------
    matrix
        Cells x genes.
    genes
        Names, each once.
    rows
        Cells of each condition, in the screen's names of perturbations and contexts; controls included.
    units, total
        Their scale; a total of None is not known.
    plain
        Whether the total was not declared, but is what all cells sum to.
    control_cells
        Name of the control cell that each cell came from; None where the file does not tell.
    about
        ``uns["knockon"]``.
    notes
        What was recognized rather than told.
    """

    matrix: sp.csr_matrix
    genes: tuple[str, ...]
    rows: Mapping[Label, Int[np.ndarray, "cells"]]
    units: Units
    total: float | None = None
    plain: bool = False
    control_cells: tuple[str, ...] | None = None
    about: Mapping[str, object]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """What made the cells, where they tell."""
        return str(self.about.get("model", "prediction"))

    @property
    def share(self) -> float:
        """Share that the predicted genes have in all counts of a cell, where the file tells."""
        return _number(self.about, "share") or 1.0

    def origins(self, screen: Screen) -> Int[np.ndarray, "cells"] | None:
        """Find the row in a screen of the control cell that each cell came from.

        None where the file does not tell, or names cells that the screen has not, or has twice.
        """
        if self.control_cells is None:
            return None
        wanted = set(self.control_cells)
        found = [(str(name), row) for row, name in enumerate(screen.cells) if name in wanted]
        rows = dict(found)
        if len(rows) < max(len(wanted), len(found)):
            return None
        return np.array([rows[name] for name in self.control_cells], dtype=np.int64)

    def prepare(self, screen: Screen) -> Screen:
        """Prepare a screen as the run that made the cells did, where that run had chosen genes."""
        if not self.about.get("panel"):
            return screen
        log.info("scored on the %d of %d genes that the run had chosen", len(self.genes), len(screen.genes))
        total = self.total if (screen.units, self.units) == ("counts", "log1p") else None
        return prepare.apply(screen, Preparation(units=self.units, total=total, genes=self.genes))

    def split(self, screen: Screen) -> Split:
        """Take the predicted conditions for those that training has not seen, for want of a split.

        Raises
        ------
        UserError
            If none of them, or all, are conditions of the screen.
        """
        test = [label for label in screen.conditions if label in self.rows]
        if not test:
            raise UserError(
                "The prediction has no condition of the screen",
                offenders=[label for label in self.rows if not label.is_control],
                expected=f"conditions such as {', '.join(map(str, screen.conditions[:3]))}",
                mend="name the column with --pred-perturbation-key, or write the names as the screen does",
            )
        if len(test) == len(screen.conditions):
            raise UserError(
                "The prediction holds all conditions of the screen, so that none is left for training",
                expected="a split that says which of them the model has not seen",
                mend="--split FILE.json, or a kind of split",
            )
        rest = len(screen.conditions) - len(test)
        log.info("no split: the %d predicted conditions are tested, %d are for training", len(test), rest)
        return assemble(screen, kind="custom", seed=0, test=test, validation=())

    def remarks(self, split: Split) -> tuple[str, ...]:
        """Say so where a run of knockon was trained by another split than the one that is scored."""
        made_by = self.about.get("split_digest")
        if made_by is None or made_by == hashlib.sha256(split.text.encode()).hexdigest():
            return ()
        kind = self.about.get("split", "unknown kind")
        return (f"predicted by another split ({kind}): its training may have seen what is tested here",)


def read(
    source: AnnData | str | Path, screen: Screen, reading: Reading = Reading(), *, units: Units | None = None
) -> Prediction:
    """Read predicted cells of conditions of a screen.

    Parameters
    ----------
    source
        Cells, or an ``.h5ad`` or ``.zarr`` of them.
    screen
        Whose names of perturbations and contexts are understood, in any spelling that a screen may have.
    reading
        What is told of it.
    units
        Short for the units of ``reading``.

    Raises
    ------
    UserError
        If the file cannot be read, genes occur twice, a column is missing or empty, or values are negative,
        not finite, or not of one scale.
    """
    reading = replace(reading, units=units or reading.units)
    stored, about = _stored(source, reading.layer)
    refuse_duplicates(stored.genes)
    if not len(stored.obs):
        raise UserError("The prediction has no cells", expected="cells of test conditions")
    known = {*screen.genes, *screen.spec().perturbations}
    columns = replace(screen.columns, perturbation_key=_column(stored.obs, screen, reading, about))
    rows, notes = recognize.follow(
        stored.obs, columns, known=known, covariates=screen.covariates, dosed=screen.dose_unit is not None
    )
    matrix = cast(sp.csr_matrix, stored.values)
    _refuse_impossible(matrix, stored)
    declared = reading.units or _declared_units(about)
    found = values.survey(matrix)
    _refuse_mixed(matrix, stored.obs.index)
    judged = values.scale(found, declared, options="--pred-").units
    total = _total(reading, about, judged)
    if reading.total is not None and screen.units == "counts":
        _refuse_other_total(reading.total, np.concatenate(found.totals))
    plain = _plain(matrix, np.concatenate(found.totals)) if judged == "log1p" and total is None else None
    if declared is None:
        notes = (*notes, f"the prediction holds {judged} (or --pred-units)")
    return Prediction(
        matrix=matrix,
        genes=stored.genes,
        rows=rows,
        units=judged,
        total=total or plain,
        plain=plain is not None,
        control_cells=tuple(stored.obs["control_cell"].astype(str)) if "control_cell" in stored.obs else None,
        about=about,
        notes=notes,
    )


def _stored(source: AnnData | str | Path, layer: str | None) -> tuple[formats.Stored, Mapping[str, object]]:
    """Tables, values in memory, and what knockon noted."""
    if not isinstance(source, AnnData):
        return formats.load(Path(source), layer=layer, option="--pred-layer"), formats.read_about(
            Path(source)
        )
    formats.choose_layer(layer, list(source.layers), has_x=source.X is not None, option="--pred-layer")
    raw: Any = source.X if layer is None else source.layers[layer]
    if source.isbacked and layer is None:
        raw = raw[:]
    if np.ma.isMaskedArray(raw) or getattr(getattr(raw, "dtype", None), "kind", "O") not in "biuf":
        raise UserError(
            f"The values of the prediction are a {type(raw).__name__} of {getattr(raw, 'dtype', 'no type')}",
            expected="numbers in a numpy array or a scipy.sparse matrix, none of them masked",
            mend="convert them, or choose another --pred-layer",
        )
    obs, genes = cast(pd.DataFrame, source.obs), tuple(source.var_names.astype(str))
    stored = formats.Stored(obs=obs, genes=genes, values=values.compressed(raw))
    return stored, formats.about(source.uns.get("knockon"))


def _column(obs: pd.DataFrame, screen: Screen, reading: Reading, about: Mapping[str, object]) -> str | None:
    """Column of perturbations: told, or the screen's own in a file that was made after the screen."""
    own = screen.columns.perturbation_key
    return reading.perturbation_key or (own if own in obs.columns and not about else None)


def _refuse_impossible(matrix: sp.csr_matrix, stored: formats.Stored) -> None:
    """Refuse values that are no expression, and name their places."""
    if matrix.nnz == 0:
        raise UserError("All predicted values are zero", expected="expression")
    for what, wrong, mend in (
        ("Predicted values that are not finite", ~np.isfinite(matrix.data), "choose another --pred-layer"),
        (
            *("Negative predicted values", matrix.data < 0),
            "choose another --pred-layer, or set them to 0 if you mean that: adata.X = adata.X.clip(0)",
        ),
    ):
        places = np.flatnonzero(wrong)
        if len(places):
            cells = np.searchsorted(matrix.indptr, places[:3], side="right") - 1
            named = [
                f"{matrix.data[at]:g} (of {stored.genes[matrix.indices[at]]} in {stored.obs.index[cell]})"
                for at, cell in zip(places, cells, strict=False)
            ]
            raise UserError(
                f"{what} ({len(places):,})", offenders=named, expected="counts, or log1p of them", mend=mend
            )


def _refuse_mixed(matrix: sp.csr_matrix, names: pd.Index) -> None:
    """Refuse cells on several scales, and name some of the rarer kind."""
    whole, fractional = values.kinds(matrix)
    if whole.any() and fractional.any():
        rarer = min((whole, fractional), key=np.count_nonzero)
        raise UserError(
            f"Some predicted cells hold counts ({whole.sum()}) and others fractions ({fractional.sum()})",
            offenders=names[rarer].tolist(),
            expected="one scale for all cells",
            mend="bring all cells to one scale, or choose another --pred-layer",
        )


def _declared_units(about: Mapping[str, object]) -> Units | None:
    units = about.get("units")
    if units is not None and units not in get_args(Units):
        raise UserError(
            f'uns["knockon"]["units"] is {units!r}',
            expected=" or ".join(get_args(Units)),
            mend="--pred-units",
        )
    return cast(Units | None, units)


def _number(about: Mapping[str, object], name: str) -> float | None:
    """Read a positive number that a file declares; None where it declares none."""
    try:
        value = float(cast(float, about.get(name, -1.0)))
    except (TypeError, ValueError) as error:
        raise UserError(f'uns["knockon"]["{name}"] is {about[name]!r}', expected="a number") from error
    return value if 0 < value < np.inf else None


def _total(reading: Reading, about: Mapping[str, object], units: Units) -> float | None:
    """Total that is told or declared."""
    if reading.total is None:
        return _number(about, "total") if units == "log1p" else None
    if units == "counts" or not 0 < reading.total < np.inf:
        raise UserError(
            f"--pred-total {reading.total:g} for a prediction in {units}",
            expected="a positive sum of counts per cell, of a prediction in log1p",
            mend="leave out --pred-total",
        )
    return reading.total


def _refuse_other_total(total: float, sums: Float[np.ndarray, "cells"]) -> None:
    """Refuse a total that was told and that cells do not sum to, as the counts of the screen will."""
    usual = float(np.median(sums))
    if not total / 2 < usual < total * 2:
        raise UserError(
            f"The prediction's cells sum to {usual:,.0f} counts and not to --pred-total {total:g}",
            expected="the sum over the genes of the file, to which counts of the screen will be brought, too",
            mend="evaluate against log1p values of the screen (without --layer), if the file has only a part "
            "of the genes that were normalized",
        )


def _plain(matrix: sp.csr_matrix, sums: Float[np.ndarray, "cells"]) -> float | None:
    """Total that is plain from the values: all cells sum to it once ``log1p`` is undone.

    Copies of a few cells are no evidence, since a mean vector has another sum.
    """
    middle = float(np.median(sums))
    shared = np.abs(sums - middle).max() <= 1e-3 * middle
    return float(f"{middle:.4g}") if shared and num_distinct(matrix) >= max(10, len(sums) / 2) else None
