"""Several models on one screen and one split: trained, predicted, scored, in one table."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import pandas as pd

from knockon import models
from knockon.data.screen import Screen
from knockon.data.splits import Split, singles
from knockon.evaluate import flags, scores, suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.report.portrait import Album
from knockon.evaluate.summary import BASELINES, CEILING
from knockon.evaluate.truth import Truth
from knockon.evaluate.verdict import Verdict
from knockon.files import digest, written_aside
from knockon.model import Recipe
from knockon.predict import Refusal, refuse_few, unknown
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
    """Baseline that answers for the conditions that a model has no basis to predict; without one, such a
    model is left out."""


def compare(
    screen: Screen,
    split: Split,
    *,
    out: str | Path,
    comparison: Comparison = Comparison(),
    options: Options = Options(),
    further: Mapping[str, Recipe] | None = None,
) -> pd.DataFrame:
    """Train, predict and score models; what lies in the folder already is not done again.

    Writes ``runs/``, ``predictions/``, ``portraits/``, and the tables of ``Verdict.write``.

    Parameters
    ----------
    further
        Models that are no preset, by the names under which they stand beside the others.

    Returns
    -------
    DataFrame
        The summary: ``model, metric, mean, low, high, floor, ceiling, calibrated``.
    """
    folder = Path(out)
    chosen = recipes(comparison, further)
    if comparison.fallback not in (None, *BASELINES):
        raise UserError(
            "Unknown --fallback", offenders=[comparison.fallback], expected="one of " + ", ".join(BASELINES)
        )
    suites.refuse_unfit(comparison.suite, screen)
    refuse_few(comparison.cells)
    _announce(split)
    judged: list[scores.Judged] = []
    truth: Truth | None = None
    album: Album | None = None
    fallback: Run | None = None
    for name, recipe in chosen.items():
        log.info("%s ...", name)
        wanted = () if fallback else split.test
        try:
            run = train(recipe, screen, split, out=folder / "runs" / name, options=options, wanted=wanted)
        except Refusal as refusal:
            log.warning("%s is left out. %s", name, refusal)
            continue
        truth = truth or Truth.of(run.screen, split, source=screen)
        path = folder / "predictions" / f"{name}.h5ad"
        predicted = _predicted(run, fallback, path, comparison, quiet=options.quiet)
        if name == comparison.fallback:
            fallback = run
        album = album or Album.begin(folder, truth)
        judged.append(scores.look(name, Pairs.align(predicted, truth), comparison.suite, album))
        for line in flags.describe(judged[-1].flags) if name not in BASELINES else ():
            log.warning("%s: %s", name, line)
    if truth is None:
        raise UserError("No model could predict the test conditions", mend="choose other --models")
    top = scores.ceiling(truth, comparison.suite, seed=comparison.seed).assign(model=CEILING)
    raised = [one.flags for one in judged]
    return Verdict(
        scores=pd.concat([*(one.scores for one in judged), top], ignore_index=True),
        truth=truth,
        split=split,
        suite=comparison.suite,
        flags=pd.concat([table for table in raised if len(table)] or raised[:1], ignore_index=True),
        notes={one.name: one.notes for one in judged},
    ).write(folder)


def recipes(comparison: Comparison, further: Mapping[str, Recipe] | None = None) -> dict[str, Recipe]:
    """List what is compared by the name of its run, the anchors first, with the shared seed and steps."""
    asked = [text.replace("-", "_") for text in comparison.models]
    found = {}
    for text in (*BASELINES, *(name for name in asked if name not in BASELINES)):
        name, _, preset = text.partition(":")
        recipe = scores.simple(name) if text in BASELINES else models.recipe(name, preset or "default")
        found[text.replace(":", "-")] = recipe
    for name, recipe in (found | dict(further or {})).items():
        training = dataclasses.replace(recipe.train, seed=comparison.seed)
        if training.steps and comparison.steps is not None:
            training = dataclasses.replace(training, steps=comparison.steps)
        found[name] = dataclasses.replace(recipe, train=training)
    return found


def _announce(split: Split) -> None:
    """Say what stands in where the additive baselines lack a single."""
    measured = {label.everywhere for label in (*split.train, *split.validation)}
    tested = {label.everywhere for label in split.test}
    lacking = sorted({str(s) for label in tested - measured for s in singles(label) if s not in measured})
    if lacking:
        log.info(
            "additive and shrunken_additive: the mean effect stands in for what was not measured alone: %s",
            ", ".join(lacking),
        )


def _predicted(
    run: Run, fallback: Run | None, path: Path, comparison: Comparison, *, quiet: bool
) -> anndata.AnnData:
    """Cells of the test conditions, from the file where an earlier comparison wrote them."""
    lacking = unknown(run.model, run.split.test)
    if lacking:
        told = (run.record.model, comparison.fallback, len(lacking), len(run.split.test))
        log.warning("%s has no basis: %s answers for %d of %d conditions", *told)
    by = digest(fallback.folder / RECORD) if lacking and fallback else ""
    marks = {"run": digest(run.folder / RECORD), "cells": comparison.cells, "fallback": by}
    if path.exists():
        earlier = anndata.read_h5ad(path)
        if marks.items() <= earlier.uns["knockon"].items():
            return earlier
    parts = [(run, [label for label in run.split.test if label not in set(lacking)])]
    parts += [(fallback, lacking)] if fallback else []
    began = time.monotonic()
    with bar("predicting", total=len(run.split.test), quiet=quiet) as advance:
        made = [
            asked.predict(labels, cells=comparison.cells, seed=comparison.seed, advance=advance)
            for asked, labels in parts
            if labels
        ]
    predicted = _joined(made)
    about = {"by_fallback": [str(label) for label in lacking], "seconds": time.monotonic() - began}
    predicted.uns["knockon"] |= marks | about
    with written_aside(path) as aside:
        predicted.write_h5ad(aside)
    return predicted


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
