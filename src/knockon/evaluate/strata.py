"""Means over parts of the test conditions: easy and hard ones, well and poorly measured, seen and unseen."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float

from knockon.data import splits
from knockon.evaluate.populations import moments, num_cells
from knockon.evaluate.suites import ALL
from knockon.evaluate.truth import Truth
from knockon.types import Label

STRATA = ("model", "metric", "by", "stratum", "conditions", "mean")
"""Columns of a table of strata."""
FEWEST = 3
"""Conditions of a third, below which the test conditions are not cut into thirds."""


def stratify(scores: pd.DataFrame, truth: Truth) -> pd.DataFrame:
    """Average over parts of the test conditions.

    Parameters
    ----------
    scores
        Long, with the columns ``model, condition, metric, value``, the anchors among the models: so each
        mean stands beside its floor and its ceiling in the same part.
    truth
        What they are scored against.

    Returns
    -------
    DataFrame
        ``model, metric, by, stratum, conditions, mean``; empty for what all conditions have in common.
        ``by`` is ``effect`` (thirds of the size of the real effect), ``cells`` (thirds of the number of
        real cells), ``seen`` (whether training has the perturbations) or ``context`` (whether it has the
        covariates).
    """
    of_each = describe(truth)
    tables = []
    for by in of_each.columns:
        if of_each[by].nunique() < 2:
            continue
        known = scores[scores["condition"] != ALL].assign(by=by)
        strata = of_each[by]
        known["stratum"] = [strata[name] for name in known["condition"]]
        groups = known.groupby(["model", "metric", "by", "stratum"], sort=False)["value"]
        tables.append(groups.agg(conditions="size", mean="mean").reset_index())
    if not tables:
        return pd.DataFrame(columns=pd.Index(STRATA))
    return pd.concat(tables, ignore_index=True).reindex(columns=list(STRATA))


def describe(truth: Truth) -> pd.DataFrame:
    """Name the stratum of each test condition; one row per condition, one column per kind of stratum."""
    cells = np.array([num_cells(matrix) for matrix in truth.cells], dtype=float)
    columns = {
        "effect": _thirds(effect_size(truth), ("weak", "middle", "strong")),
        "cells": _thirds(cells, ("few", "middle", "many")),
        "seen": [_seen(label, truth.train) for label in truth.labels],
        "context": [_context(label, truth.train) for label in truth.labels],
    }
    return pd.DataFrame(columns, index=pd.Index([str(label) for label in truth.labels], name="condition"))


def effect_size(truth: Truth) -> Float[np.ndarray, "conditions"]:
    """Euclidean length of the real change of the mean against control, log1p.

    The noise of both means is taken out of its square, so that few cells do not look like an effect.
    """
    noise = np.array([_noise(cells) for cells in truth.cells])
    controls = [truth.screen.control_moments(label) for label in truth.labels]
    noise += [float(np.square(found.std).sum() / found.cells) for found in controls]
    squares = np.square(truth.moments.mean - truth.control).sum(axis=1)
    return np.sqrt(np.maximum(squares - noise, 0.0))


def _noise(cells: sp.csr_matrix) -> float:
    """Expect this squared error of the mean of cells, a sum over genes; 0 where one cell cannot tell."""
    count = num_cells(cells)
    return float(moments([cells]).variance.sum() / count) if count > 1 else 0.0


def _thirds(values: Float[np.ndarray, "conditions"], names: tuple[str, str, str]) -> list[str]:
    """Cut conditions into three parts of equal size, of equal values into the same; one where few."""
    if len(values) < 3 * FEWEST:
        return [names[1]] * len(values)
    part = np.searchsorted(np.quantile(values, (1 / 3, 2 / 3)), values, side="left")
    return [names[i] for i in part]


def _seen(label: Label, train: Iterable[Label]) -> str:
    known = splits.seen(train, label)
    if known == len(label.perturbations):
        return "seen"
    return "partly unseen" if known else "unseen"


def _context(label: Label, train: Iterable[Label]) -> str:
    return "seen" if label.covariates in {other.covariates for other in train} else "unseen"
