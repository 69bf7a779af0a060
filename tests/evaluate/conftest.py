from collections.abc import Callable, Sequence
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.types import Label

GENES = [f"G{i}" for i in range(40)]
CONDITIONS = ["control", "A", "B", "C", "D", "A+B", "B+C", "C+D"]


def population(text: str, cells: int, draw: np.random.Generator, context: int = 0) -> np.ndarray:
    """Counts whose log expectation is additive in the perturbations and the context."""
    effects = np.random.default_rng(7).normal(size=(4, len(GENES))) * 0.7
    rate = np.linspace(-0.5, 1.5, len(GENES)) + 0.4 * context * np.cos(np.arange(len(GENES)))
    rate = rate + sum((effects["ABCD".index(name)] for name in text.split("+") if text != "control"), 0)
    return draw.poisson(np.exp(rate), size=(cells, len(GENES))).astype(np.float32)


def cells_of(
    texts: Sequence[str], cells: int = 30, *, seed: int = 0, contexts: Sequence[str] = ()
) -> anndata.AnnData:
    """Cells of some conditions as log1p, in each of some contexts."""
    draw = np.random.default_rng(seed)
    blocks, obs = [], []
    for i, context in enumerate(contexts or [""]):
        for text in texts:
            blocks.append(np.log1p(population(text, cells, draw, i)))
            obs += [{"perturbation": text} | ({"cell_type": context} if contexts else {})] * cells
    table = pd.DataFrame(obs, index=[f"c{i}" for i in range(len(obs))])
    return anndata.AnnData(sp.csr_matrix(np.vstack(blocks)), obs=table, var=pd.DataFrame(index=GENES))


def screen_of(adata: anndata.AnnData, covariates: tuple[str, ...] = ()) -> Screen:
    columns = Columns(perturbation_key="perturbation", control="control", covariate_keys=covariates)
    return Screen.from_anndata(adata, columns=columns)


def split_of(screen: Screen, is_test: Callable[[Label], bool]) -> Split:
    parts = {True: [], False: []}
    for label in screen.conditions:
        parts[is_test(label)].append(label)
    return Split(
        kind="custom",
        seed=0,
        train=tuple(parts[False]),
        validation=(),
        test=tuple(parts[True]),
        digest=screen.digest,
    )


def is_double(label: Label) -> bool:
    return len(label.perturbations) == 2


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Screens, splits and predictions of one small additive world."""
    return SimpleNamespace(cells=cells_of, screen=screen_of, split=split_of)


@pytest.fixture(scope="session")
def screen() -> Screen:
    return screen_of(cells_of(CONDITIONS))


@pytest.fixture(scope="session")
def split(screen: Screen) -> Split:
    return split_of(screen, is_double)


@pytest.fixture
def prediction() -> anndata.AnnData:
    """A replicate of the test conditions, spelled and ordered in its own way."""
    return cells_of(["C+B", "B+A", "D+C"], cells=20, seed=1)
