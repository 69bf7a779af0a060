"""Preparation of a screen for a model: units and genes, fitted on training cells only."""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Int

from knockon.data import arrays
from knockon.data.screen import Screen
from knockon.data.values import OnDisk, log1p
from knockon.types import Units, UserError

FEW = 1 << 15
"""Cells that may be in memory a second time: for so few, dask would take longer than the work."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to a screen before a model sees it; plain values, so that a run can keep it.

    Parameters
    ----------
    units
        Of the result.
    total
        Sum that counts are normalized to before ``log1p``; None where nothing is normalized.
    genes
        Names that are kept, in the order of the file; None keeps all.
    share
        Of all counts of training cells, those of the genes that are kept, where counts stay counts; 1
        elsewhere.
    """

    units: Units
    total: float | None = None
    genes: tuple[str, ...] | None = None
    share: float = 1.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done, one line each."""
        scaled = [f"counts are normalized to {self.total:g} per cell, then log1p"] if self.total else []
        kept = [f"{len(self.genes)} genes are kept"] if self.genes is not None else []
        return (*scaled, *kept)


def fit(
    train: Screen,
    *,
    units: Units,
    genes: int | None = None,
    total: float | Literal["median"] | None = None,
    keep: Collection[str] | None = None,
    panel: Collection[str] | None = None,
) -> Preparation:
    """Learn a preparation from training cells, controls included; no other cell has an influence.

    Parameters
    ----------
    train
        Training conditions and controls, as the file has them.
    units
        What the model reads. Counts become ``log1p``; the reverse is refused.
    genes
        How many variable genes to choose (scanpy's ``seurat`` flavor on ``log1p``); None keeps all.
    total
        Sum that counts are normalized to; the median of training cells by default.
    keep
        Names that are kept besides, as far as they are genes of the panel; by default all
        perturbations of the screen.
    panel
        Names to keep instead of choosing any.
    """
    if units == "counts" and train.units == "log1p":
        raise UserError(
            "The screen holds log1p values",
            expected="counts, which this model needs",
            mend="choose a layer with counts: --layer counts",
        )
    if total is not None and train.units == "log1p":
        raise UserError(
            "The values are log1p already", expected="counts to normalize", mend="leave out --total"
        )
    normalize = units == "log1p" and train.units == "counts"
    target = _total(train, total) if normalize else None
    if panel is not None:
        chosen = set(panel)
    elif genes is None or genes >= len(train.genes):
        chosen = set(train.genes)
    else:
        scale = None if train.units == "log1p" else _total(train, total)
        forced = set(train.spec().perturbations if keep is None else keep)
        chosen = forced | _variable(train, scale, genes)
    kept = tuple(gene for gene in train.genes if gene in chosen)
    if kept == train.genes:
        return Preparation(units=units, total=target)
    share = _share(train, kept) if units == "counts" else 1.0
    return Preparation(units=units, total=target, genes=kept, share=share)


def apply(screen: Screen, preparation: Preparation) -> Screen:
    """Prepare all cells of a screen; its conditions, digest and names stay.

    Raises
    ------
    UserError
        If the screen lacks a gene, or its values cannot be brought to the units.
    """
    if preparation.units != screen.units and preparation.total is None:
        raise UserError(
            f"The screen holds {screen.units}",
            expected=preparation.units,
            mend="choose another layer with --layer",
        )
    matrix, total, genes = screen.matrix, screen.total, screen.genes
    if preparation.total is not None and screen.units == "counts":
        total = preparation.total
        matrix = matrix.normalized(total) if isinstance(matrix, OnDisk) else log1p(matrix, total)
    if preparation.genes is not None:
        places, genes = _places(screen, preparation.genes), preparation.genes
        matrix = matrix.panel(places) if isinstance(matrix, OnDisk) else matrix[:, places]
    return replace(screen, matrix=matrix, genes=genes, units=preparation.units, total=total)


def _total(train: Screen, asked: float | Literal["median"] | None) -> float:
    return _median(train) if asked in (None, "median") else float(asked)


def _median(train: Screen) -> float:
    """Median total of training cells that have counts."""
    sums = arrays.totals(train.matrix, train.every)
    return float(np.median(sums[sums > 0]))


def _share(train: Screen, genes: Sequence[str]) -> float:
    """Share of the counts of training cells that some genes have."""
    sums = arrays.sums(train.matrix, train.every)
    return float(np.take(sums, _places(train, genes)).sum() / max(1.0, float(np.sum(sums))))


def _variable(train: Screen, total: float | None, count: int) -> set[str]:
    """Find the most variable genes of training cells, by scanpy's ``seurat`` flavor [satija2015]."""
    from scanpy.preprocessing import highly_variable_genes  # noqa: PLC0415 (some seconds, not always needed)

    every = train.every
    if len(every) <= FEW:
        cells = train.matrix[every] if total is None else log1p(train.matrix[every], total)
    else:
        cells = arrays.cells(train.matrix, every)
        cells = cells if total is None else cells.map_blocks(log1p, total, dtype=np.float32, meta=cells._meta)
    nameless = pd.DataFrame(index=np.full(len(every), "", dtype=object))  # names would take much memory
    with arrays.engine(train.matrix), arrays.own_threads(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        chosen = AnnData(cells, obs=nameless, var=pd.DataFrame(index=pd.Index(train.genes)))
        highly_variable_genes(chosen, n_top_genes=count, flavor="seurat")
    return set(chosen.var_names[chosen.var["highly_variable"]])


def _places(screen: Screen, genes: Sequence[str]) -> Int[np.ndarray, "genes"]:
    place = {gene: i for i, gene in enumerate(screen.genes)}
    missing = [gene for gene in genes if gene not in place]
    if missing:
        raise UserError(
            "The screen lacks genes of the panel",
            offenders=missing,
            expected=f"the {len(genes)} genes that the run was trained on",
            mend="give a screen with these genes",
        )
    return np.array([place[gene] for gene in genes], dtype=np.int64)
