"""Several models on one screen and one split: trained, predicted, scored, in one table."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import pandas as pd

from knockon import models
from knockon.data.screen import Screen
from knockon.data.splits import Split, singles
from knockon.evaluate import scores, suites
from knockon.evaluate.pairs import Pairs, Truth
from knockon.files import digest, write_text, written_aside
from knockon.model import Recipe
from knockon.predict import Refusal
from knockon.progress import bar
from knockon.run import RECORD, Run
from knockon.train import Options, train
from knockon.types import UserError

ANCHORS = ("no_effect", "mean_shift", "additive")
"""Baselines of every comparison, asked for or not: scores mean nothing without them."""

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How models are compared."""

    models: tuple[str, ...] = (*ANCHORS, "scdfm")
    """Names, or name:preset; the simple baselines are added where they are missing."""
    cells: int = 256
    """Predicted cells of each condition."""
    steps: int | None = None
    """Training steps of every model that has any; each preset's own without it."""
    seed: int = 0
    """Seed of training, prediction and the ceiling."""
    suite: str = "core"
    """Which metrics, by which conventions."""


def compare(
    screen: Screen,
    split: Split,
    *,
    out: str | Path,
    comparison: Comparison = Comparison(),  # noqa: B008 (frozen)
    options: Options = Options(),  # noqa: B008 (frozen)
) -> pd.DataFrame:
    """Train, predict and score models; what lies in the folder already is not done again.

    Writes ``runs/``, ``predictions/``, ``scores.csv`` and ``summary.csv``.

    Returns
    -------
    DataFrame
        The summary: ``model, metric, mean, low, high, floor, ceiling, calibrated``.
    """
    folder = Path(out)
    names = [*(name for name in ANCHORS if name not in _canonical(comparison.models)), *comparison.models]
    recipes = {name.replace(":", "-"): _recipe(name, comparison) for name in _canonical(names)}
    _announce(screen, split)
    tables, truth = [], None
    for name, recipe in recipes.items():
        log.info("%s ...", name)
        run = train(recipe, screen, split, out=folder / "runs" / name, options=options)
        truth = truth or Truth.of(run.screen, split)
        try:
            predicted = _predict(run, folder / "predictions" / f"{name}.h5ad", comparison, quiet=options.quiet)
        except Refusal as refusal:
            log.warning("%s is left out. %s", name, refusal)
            continue
        table = suites.score(Pairs.align(predicted, truth), comparison.suite)
        tables.append(table.assign(model=name))
    ...
