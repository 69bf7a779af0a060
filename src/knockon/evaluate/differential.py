"""Which genes differ between populations and control cells: rank tests by illico, and fold changes."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control

from knockon.evaluate.populations import num_cells
from knockon.types import UserError

Context = tuple[str, ...]
"""Levels of the covariates."""

ALPHA = 0.05
"""Adjusted p-values below it are significant."""
EXPRESSED = 5
"""Cells of a population that must have counts of a gene for it to be tested, or would if as large a share had
them as of control cells. With fewer, the normal approximation takes single cells for effects."""
PSEUDOCOUNT = 0.01
"""Added to both means of a fold change, in normalized counts a cell: what one cell of a hundred shows, so
that a gene that a small sample misses by chance is no boundless change. Per 10,000 it is one in a million."""
ROUNDING = 1e-6
"""What may differ by rounding: log2 fold changes up to it are none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Differences:
    """How populations differ from control, a row for each.

    Parameters
    ----------
    adjusted
        p-values of two-sided Mann-Whitney U tests, adjusted within each population over the genes that were
        tested [benjamini1995]; 1 for the others.
    lfc
        log2 fold changes of mean normalized counts, of all genes; 0 where no more than rounding differs.
    tested
        Which genes enough cells have counts of.
    """

    adjusted: Float[np.ndarray, "conditions genes"]
    lfc: Float[np.ndarray, "conditions genes"]
    tested: Bool[np.ndarray, "conditions genes"]

    @cached_property
    def significant(self) -> Bool[np.ndarray, "conditions genes"]:
        """Whether adjusted p-values are below ``ALPHA``."""
        return self.adjusted < ALPHA


def differences(
    populations: Sequence[sp.csr_matrix],
    contexts: Sequence[Context],
    controls: Mapping[Context, sp.csr_matrix],
) -> Differences:
    """Compare every gene of each population with control cells.

    Parameters
    ----------
    populations
        Cells in log1p of normalized counts.
    contexts
        Which control is that of each population.
    controls
        Control cells of each context; those of one are ranked once for all of its populations.
    """
    shape = len(populations), populations[0].get_shape()[1]
    adjusted, lfc, tested = np.ones(shape), np.empty(shape), np.empty(shape, dtype=bool)
    for context in dict.fromkeys(contexts):
        rows = [row for row, own in enumerate(contexts) if own == context]
        reference, usual = _counts(controls[context])
        for row in rows:
            mean, share = _counts(populations[row])
            expressing = np.maximum(share, usual) * num_cells(populations[row])
            tested[row] = expressing > EXPRESSED - ROUNDING
            lfc[row] = np.log2((mean + PSEUDOCOUNT) / (reference + PSEUDOCOUNT))
        genes = np.flatnonzero(tested[rows].any(axis=0))
        if len(genes):
            found = _p_values([populations[row][:, genes] for row in rows], controls[context][:, genes])
            for row, p in zip(rows, found, strict=True):
                kept = tested[row, genes]
                adjusted[row, genes[kept]] = false_discovery_control(p[kept])
    return Differences(adjusted=adjusted, lfc=np.where(np.abs(lfc) > ROUNDING, lfc, 0.0), tested=tested)


def _counts(cells: sp.csr_matrix) -> tuple[Float[np.ndarray, "genes"], Float[np.ndarray, "genes"]]:
    """Mean normalized counts, and the share of cells that have any."""
    number, genes = cells.get_shape()
    sums = np.bincount(cells.indices, np.expm1(cells.data.astype(np.float64)), genes)
    return sums / number, np.bincount(cells.indices, cells.data > 0, genes) / number


def _p_values(
    populations: Sequence[sp.csr_matrix], control: sp.csr_matrix
) -> Float[np.ndarray, "populations genes"]:
    """Two-sided, ties and continuity corrected, by the normal approximation."""
    try:
        from illico import asymptotic_wilcoxon  # noqa: PLC0415 - slow to import, and not always installed
        from loguru import logger  # noqa: PLC0415 - the log of illico, and installed with it
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", mend="pip install 'knockon[eval]'") from error
    logger.disable("illico")
    samples = [control, *populations]
    names = [str(place) for place in range(len(samples))]
    groups = pd.Categorical(np.repeat(names, [num_cells(cells) for cells in samples]), names)
    # columns, because genes are ranked one by one; float32, in which equal values of both sides are equal
    values = sp.vstack(samples, format="csr").astype(np.float32).tocsc()
    obs = pd.DataFrame({"group": groups}, index=np.arange(len(groups)).astype(str))
    with contextlib.redirect_stderr(io.StringIO()):  # where its bar goes, which cannot be turned off
        table = asymptotic_wilcoxon(
            AnnData(values, obs=obs),
            is_log1p=True,
            group_keys="group",
            reference="0",
            n_threads=torch.get_num_threads(),
        )
    return np.stack([table["p_value"].loc[name].to_numpy() for name in names[1:]])
