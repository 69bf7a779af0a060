"""What is done of a comparison in one piece: a model trained and predicted, and the scores of all."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import anndata
import pandas as pd
import scipy.sparse as sp

from knockon.data.conventions import Columns
from knockon.data.formats import about
from knockon.data.h5ad import read_h5ad, write_h5ad
from knockon.data.screen import Screen, read
from knockon.data.splits import Split
from knockon.data.values import state_of
from knockon.evaluate import flags, scores, suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.report.portrait import Album
from knockon.evaluate.summary import BASELINES, CEILING
from knockon.evaluate.truth import Truth
from knockon.evaluate.verdict import Verdict
from knockon.files import digest
from knockon.model import Recipe
from knockon.predict import Refusal, unknown
from knockon.progress import bar
from knockon.record import RECORD
from knockon.run import Run
from knockon.train import Options, train
from knockon.types import UserError

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How models are compared."""

    models: tuple[str, ...] = (*BASELINES, "ripple")
    """Names, or name:preset; the simple baselines are added where they are missing."""
    cells: int = 256
    """Predicted cells of each condition."""
    steps: int | None = None
    """Training steps of every model that has any; each preset's own without it, as in earlier stages."""
    seed: int = 0
    """Seed of training, prediction and the ceiling."""
    suite: tuple[suites.Name, ...] = ("core",)
    """Which metrics, by which conventions; several may be named."""
    fallback: str | None = None
    """Baseline, or ripple or response_surface if they are compared, that answers for the conditions that a
    model has no basis to predict; without one, such a model is left out."""
    jobs: int = 1
    """Models that are trained and predicted side by side, each in a process with its share of the threads."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A screen that other processes read for themselves.

    Parameters
    ----------
    path, columns, backed
        See ``screen.read``.
    source, digest
        What the screen is known by.
    state
        Of the file: its values may be others though its cells have the same names.
    """

    path: Path
    columns: Columns
    backed: bool
    source: str
    digest: str
    state: tuple[int, int]


def sent(screen: Screen, *, far: bool) -> Screen | Elsewhere:
    """Make a screen fit to be given to other processes.

    In memory, it reaches those of this machine as it is, since they share its arrays. Values that lie on
    disk, and all that would go over a network, are read there from the file, where there is one.
    """
    in_memory = isinstance(screen.matrix, sp.csr_matrix)
    if not screen.source or (in_memory and not far):
        return screen
    return Elsewhere(
        path=Path(screen.source).absolute(),
        columns=screen.columns,
        backed=not in_memory,
        source=screen.source,
        digest=screen.digest,
        state=state_of(Path(screen.source)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Some models, one split and one seed.

    Parameters
    ----------
    folder
        Of the runs, predictions and tables.
    split
        What is held out.
    comparison
        How models are compared; its own models do not count.
    recipes
        The models, by the names of their runs.
    screen
        Or where to read it.
    options
        Of training.
    """

    folder: Path
    split: Split
    comparison: Comparison
    recipes: Mapping[str, Recipe]
    screen: Screen | Elsewhere
    options: Options

    def only(self, names: Sequence[str]) -> "Trial":
        """Keep some of the models."""
        return dataclasses.replace(self, recipes={name: self.recipes[name] for name in names})


def make(trial: Trial) -> bool:
    """Train the only model of a trial and predict with it what is not there yet.

    Returns
    -------
    bool
        Whether it has a basis to predict the test conditions.
    """
    ((name, recipe),) = trial.recipes.items()
    screen, asked = _opened(trial.screen), trial.comparison.fallback
    fallback = trial.folder / "runs" / asked if asked and asked != name else None
    out, wanted = trial.folder / "runs" / name, () if fallback else trial.split.test
    try:
        run = train(recipe, screen, trial.split, out=out, options=trial.options, wanted=wanted)
    except Refusal as refusal:
        log.warning("%s is left out. %s", name, refusal)
        return False
    _predict(run, trial, name, screen, fallback)
    return True


def judge(trial: Trial) -> pd.DataFrame:
    """Score the predictions of the models of a trial, write its tables, and return the summary."""
    screen, comparison, judged = _opened(trial.screen), trial.comparison, list[scores.Judged]()
    first = Run.load(trial.folder / "runs" / next(iter(trial.recipes)), screen=screen)
    truth = Truth.of(first.screen, trial.split, source=screen)
    album = Album.begin(trial.folder, truth)
    for name in trial.recipes:
        predicted = read_h5ad(_path(trial, name))
        judged.append(scores.look(name, Pairs.align(predicted, truth), comparison.suite, album))
        for line in flags.describe(judged[-1].flags) if name not in BASELINES else ():
            log.warning("%s: %s", name, line)
    top = scores.ceiling(truth, comparison.suite, seed=comparison.seed).assign(model=CEILING)
    raised = [one.flags for one in judged]
    return Verdict(
        scores=pd.concat([*(one.scores for one in judged), top], ignore_index=True),
        truth=truth,
        split=trial.split,
        suite=comparison.suite,
        flags=pd.concat([table for table in raised if len(table)] or raised[:1], ignore_index=True),
        notes={one.name: one.notes for one in judged},
    ).write(trial.folder)


def _opened(screen: Screen | Elsewhere) -> Screen:
    return _read(screen) if isinstance(screen, Elsewhere) else screen


@lru_cache(maxsize=1)
def _read(where: Elsewhere) -> Screen:
    """Read a screen, once for all jobs of this process."""
    screen = read(where.path, where.columns, backed=where.backed)
    if screen.digest != where.digest:
        raise UserError(f"{where.path} holds another screen than at the start", mend="give the command again")
    return dataclasses.replace(screen, source=where.source)


def _path(trial: Trial, name: str) -> Path:
    return trial.folder / "predictions" / f"{name}.h5ad"


def _predict(run: Run, trial: Trial, name: str, screen: Screen, fallback: Path | None) -> None:
    """Write cells of the test conditions, where an earlier comparison did not."""
    comparison, path = trial.comparison, _path(trial, name)
    lacking = unknown(run.model, run.split.test)
    if lacking:
        told = (run.record.model, comparison.fallback, len(lacking), len(run.split.test))
        log.warning("%s has no basis: %s answers for %d of %d conditions", *told)
    by = digest(fallback / RECORD) if lacking and fallback else ""
    marks = {"run": digest(run.folder / RECORD), "cells": comparison.cells, "fallback": by}
    if path.exists() and marks.items() <= about(read_h5ad(path).uns.get("knockon")).items():
        return
    parts = [(run, [label for label in run.split.test if label not in set(lacking)])]
    began = time.monotonic()
    if lacking and fallback:
        parts.append((Run.load(fallback, screen=screen, device=trial.options.device), lacking))
    with bar("predicting", total=len(run.split.test), quiet=trial.options.quiet) as advance:
        made = [
            asked.predict(labels, cells=comparison.cells, seed=comparison.seed, advance=advance)
            for asked, labels in parts
            if labels
        ]
    predicted = _joined(made)
    noted = {"by_fallback": [str(label) for label in lacking], "seconds": time.monotonic() - began}
    predicted.uns["knockon"] |= marks | noted
    write_h5ad(predicted, path)


def _joined(parts: Sequence[anndata.AnnData]) -> anndata.AnnData:
    """Cells of several predictions, numbered through; their control cells, each once."""
    pieces: list[anndata.AnnData] = []
    made, seen = 0, set[str]()
    for part in parts:
        names = []
        for name, is_control in zip(part.obs_names, part.obs["control"], strict=True):
            names.append(name if is_control else f"predicted_{made}")
            made += not is_control
        new = [name not in seen for name in names]
        piece = part[new].copy()
        piece.obs_names = [name for name, is_new in zip(names, new, strict=True) if is_new]
        pieces.append(piece)
        seen |= set(names)
    whole = anndata.concat(pieces, merge="same")
    whole.uns = dict(parts[0].uns)
    return whole
