"""What the suites share that call the field's own evaluators, so that their numbers are the packages'.

A package sees what a user would give it as files: the scored conditions of one context, predicted and real,
and below both the *same* real control cells of that context, which no prediction can move. Contexts are
scored one by one, because these packages know a single control; a value of all conditions at once is then
the plain mean over contexts.

Every package is called quietly, and in a folder that vanishes, where it insists on writing.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.data.arrays import own_threads
from knockon.evaluate.populations import num_cells
from knockon.types import CONTROL, Label

Column = Float[np.ndarray, "..."]
KEY = "perturbation"
"""The column of ``obs`` that names conditions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What a package found: of each metric one value per condition, or a single one for all of them."""

    values: Mapping[str, Column]


def column(name: str, about: str) -> Callable[[Mapping[str, Column]], Column]:
    """Give the function of a metric that a package has computed already."""

    def pick(values: Mapping[str, Column]) -> Column:
        return values[name]

    pick.__doc__ = about
    return pick


def by_context(labels: Sequence[Label]) -> Iterator[Int[np.ndarray, "some"]]:
    """Places of the conditions of each context."""
    places = defaultdict(list)
    for place, label in enumerate(labels):
        places[label.covariates].append(place)
    yield from map(np.array, places.values())


def side(
    labels: Sequence[Label], cells: Sequence[sp.csr_matrix], control: sp.csr_matrix, genes: Sequence[str]
) -> anndata.AnnData:
    """Cells of some conditions of one context, and the control below them, as a file would hold them."""
    names = [label.perturbation for label in labels] + [CONTROL]
    blocks = [*cells, control]
    texts = np.repeat(names, [num_cells(block) for block in blocks])
    index = pd.Index([f"cell{i}" for i in range(len(texts))])
    return anndata.AnnData(
        sp.vstack(blocks, format="csr"),
        obs=pd.DataFrame({KEY: pd.Categorical(texts)}, index=index),
        var=pd.DataFrame(index=pd.Index(genes)),
    )


def joined(
    parts: Sequence[tuple[Int[np.ndarray, "some"], Mapping[str, Column]]], count: int
) -> dict[str, Column]:
    """Put the values of contexts in the order of conditions; of values without an order, take the mean."""
    found: dict[str, Column] = {}
    for name in parts[0][1]:
        if parts[0][1][name].ndim:
            found[name] = np.full(count, np.nan)
            for places, values in parts:
                found[name][places] = values[name]
        else:
            known = [float(values[name]) for _, values in parts if np.isfinite(values[name])]
            found[name] = np.array(np.mean(known) if known else np.nan)
    return found


@contextmanager
def quiet(*packages: str) -> Iterator[None]:
    """Silence progress bars and the log of some packages, and keep them from torch's threads."""
    loggers = [logging.getLogger(name) for name in packages]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), own_threads():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
