from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate import tables
from knockon.evaluate.report import portrait
from knockon.evaluate.report.portrait import Portrait, Scene, Side
from knockon.evaluate.suites import suite_named
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


def scored(models: dict[str, float], conditions: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Scores of noise, of each model at its level."""
    draw = np.random.default_rng(0)
    rows = [
        (model, condition, metric, draw.random() * level)
        for model, level in models.items()
        for condition in conditions
        for metric in metrics
    ]
    return pd.DataFrame(rows, columns=["model", "condition", "metric", "value"])


def is_double(label: Label) -> bool:
    return len(label.perturbations) == 2


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Screens, splits and predictions of one small additive world."""
    return SimpleNamespace(cells=cells_of, screen=screen_of, split=split_of, scored=scored)


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


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of 9 models on 100 conditions of 5,000 genes, all of noise, which packs worst."""
    folder, conditions, genes = tmp_path_factory.mktemp("large"), 100, 5000
    models = ["no_effect", "mean_shift", "additive", *(f"model_{i}" for i in range(6))]
    draw = np.random.default_rng(0)
    names = tuple(f"GENE{i}+GENE{i + 1}" for i in range(conditions))
    metrics = [metric.name for metric in suite_named("core").metrics]
    levels = dict(zip((*models, "ceiling"), np.linspace(1, 0.2, len(models) + 1), strict=True))
    tables.write(scored(levels, names, metrics), folder)

    def side():
        return Side(
            cells=np.full(conditions, 256),
            zeros=draw.random((conditions, portrait.TOP)),
            quantiles=np.sort(draw.gamma(2, size=(conditions, portrait.TOP, len(portrait.LEVELS))), axis=2),
            spots=draw.normal(size=(conditions, portrait.SPOTS, 4)),
            center=draw.normal(size=(conditions, 4)),
        )

    kept = portrait.CHANGED + portrait.SURPRISING
    order = np.argsort(draw.random((conditions, genes)), axis=1)
    shape = (conditions, kept)
    change = draw.normal(size=shape)
    scene = Scene(
        mark="large",
        genes=tuple(f"GENE{i}" for i in range(genes)),
        conditions=names,
        shown=order[:, :kept],
        level=draw.gamma(2, size=shape),
        change=change,
        expected=change + 0.3 * draw.normal(size=shape),
        effect=draw.gamma(2, size=conditions),
        real=side(),
        control=side(),
    )
    portrait.save(folder, scene)
    own = (conditions, portrait.OWN)
    for model in models:
        made = Portrait(
            mark="large",
            conditions=names,
            change=change + 0.4 * draw.normal(size=shape),
            own=order[:, kept : kept + portrait.OWN],
            own_level=draw.gamma(2, size=own),
            own_real=0.1 * draw.normal(size=own),
            own_change=draw.normal(size=own),
            cells=side(),
        )
        portrait.save(folder, made, model)
    return folder
