"""Anchors, without which no score can be read: the floor, the best simple baseline and the ceiling."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from anndata import AnnData

from knockon import models
from knockon.baseline import MeanModel
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.evaluate import flags
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import mean, num_cells
from knockon.evaluate.prediction import Prediction, read
from knockon.evaluate.report.portrait import Album
from knockon.evaluate.suites import Asked, metric_named, refuse_unfit, score, silent
from knockon.evaluate.summary import BASELINES, CEILING, refuse_empty
from knockon.evaluate.truth import Truth
from knockon.evaluate.verdict import Verdict
from knockon.predict import generate
from knockon.types import Spec, Units, UserError

log = logging.getLogger("knockon")

HALVINGS = 5
"""Random halvings that a ceiling is the mean of."""


def evaluate(
    prediction: Prediction | AnnData | str | Path,
    screen: Screen,
    split: Split | None = None,
    *,
    suite: Asked = "core",
    units: Units | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted cells, and beside them the anchors by which to read their scores.

    Parameters
    ----------
    prediction
        Cells, a file of them, or what ``prediction.read`` made of either. It is called by its model where
        that is told and no anchor, else ``prediction``. Where its run had chosen genes, those are scored.
    split
        Its test conditions are scored; without one, all predicted conditions, and the others are what
        training may have seen.
    units
        Scale of the prediction; by default what it declares, else what it looks like.
    seed
        Of the baselines' cells and of the halves of the ceiling.

    Returns
    -------
    DataFrame
        Long, with the columns ``model, condition, metric, value``; ``summarize`` makes it short.
    """
    found = prediction if isinstance(prediction, Prediction) else read(prediction, screen, units=units)
    split = split or found.split(screen)
    return judge(Pairs.of(found, screen, split), split, suite, seed=seed).scores


def judge(
    pairs: Pairs, split: Split, suite: Asked = "core", *, seed: int = 0, out: Path | None = None
) -> Verdict:
    """Score aligned cells beside the anchors, and say how they were aligned; see ``evaluate``.

    With a folder ``out``, the portraits that a report shows are written to it.
    """
    refuse_unfit(suite, pairs.truth.source)
    if seed < 0:
        raise UserError(f"The seed is {seed}", expected="0 or more", mend="set --seed")
    for note in pairs.notes:
        log.info(note)
    name = pairs.model if pairs.model not in (*BASELINES, CEILING) else "prediction"
    album = None if out is None else Album.begin(out, pairs.truth)
    found = look(name, pairs, suite, album)
    # as many as were predicted: few cells are noisier, and that is not the prediction's fault
    cells = max(2, int(np.median([num_cells(some) for some in pairs.cells])))
    beside = anchors(pairs.truth, split, suite, cells=cells, seed=seed, album=album)
    return Verdict(
        scores=_ordered(found.scores, beside),
        truth=pairs.truth,
        split=split,
        suite=suite,
        flags=found.flags,
        notes={name: found.notes},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What was found of one prediction: its scores and flags with its name, and how it was aligned."""

    name: str
    scores: pd.DataFrame
    flags: pd.DataFrame
    notes: tuple[str, ...]


def look(name: str, pairs: Pairs, suite: Asked, album: Album | None = None) -> Judged:
    """Score aligned cells, raise their flags, and take their portrait for an album.

    Raises
    ------
    UserError
        If the real cells can give none of the scores.
    """
    scores = score(pairs, suite).assign(model=name)
    refuse_empty(scores)
    if album:
        album.add(name, pairs)
    notes = [*pairs.remarks, *silent(suite, scores)]
    if all(num_cells(cells) == 1 for cells in pairs.cells):
        notes.append("one predicted cell of each condition: metrics of populations say nothing of it")
    for note in notes[len(pairs.remarks) :]:
        log.warning("%s: %s", name, note)
    raised = flags.check(pairs).assign(model=name)
    return Judged(name=name, scores=scores, flags=raised, notes=tuple(notes))


def anchors(
    truth: Truth,
    split: Split,
    suite: Asked = "core",
    *,
    cells: int = 256,
    seed: int = 0,
    album: Album | None = None,
) -> pd.DataFrame:
    """Score the simple baselines, fitted on everything but test conditions, and the ceiling.

    Where a combination has a part that was not measured alone, the additive baseline takes the mean effect.

    Returns
    -------
    DataFrame
        Long, with the columns ``model, condition, metric, value``.
    """
    screen, tables = truth.screen, []
    train = screen.select((*split.train, *split.validation, *screen.controls))
    for name, model in _baselines(train, screen.spec()):
        predicted = generate(model, screen, truth.labels, cells=cells, seed=seed)
        predicted.uns["knockon"] = {"units": model.units, "total": screen.total or -1.0}
        pairs = Pairs.align(predicted, truth)
        if album:
            album.add(name, pairs)
        tables.append(score(pairs, suite).assign(model=name))
    return _ordered(*tables, ceiling(truth, suite, seed=seed).assign(model=CEILING))


def _baselines(train: Screen, spec: Spec) -> Iterator[tuple[str, MeanModel]]:
    """Fit the simple baselines. What they know of control cells is the same, and learned once."""
    first = None
    for name in BASELINES:
        model = cast(MeanModel, models.recipe(name).model.answering().build(spec))
        if first is None:
            model.fit_controls(train)
            first = model
        else:
            model.contexts, model.dispersion = first.contexts, first.dispersion
        model.fit_effects(train)
        yield name, model


def ceiling(truth: Truth, suite: Asked = "core", *, seed: int = 0) -> pd.DataFrame:
    """Score a replicate: what a second experiment of the same size would reach as a prediction.

    The real cells of each condition are halved at random; one half predicts the other, which also takes
    its place among the candidates. Halves are noisier than the whole conditions that predictions are
    scored against, so the mean score over halvings is carried over to whole conditions by how noise enters
    the metric: squared errors are halved, absolute errors divided by the root of 2, correlations r become
    2r / (1 + r) [spearman1910, brown1910], coefficients of determination 1 - u become 1 - 2u / (4 - u).
    Discrimination stays, and is a little too low. Distances between populations stay, too: those of the
    suite ``generation`` are taken between equally many cells here and of predictions.

    Returns
    -------
    DataFrame
        Long, with the columns ``condition, metric, value``; without conditions of one cell.
    """
    truth = truth.select(
        label for label, cells in zip(truth.labels, truth.cells, strict=True) if num_cells(cells) > 1
    )
    if not truth.labels:
        return pd.DataFrame({"condition": [], "metric": [], "value": []})
    rng = np.random.default_rng(seed)
    halves = pd.concat([score(_halved(truth, rng), suite) for _ in range(HALVINGS)])
    groups = halves.groupby(["condition", "metric"], sort=False, as_index=False)
    means = groups.agg(value=("value", "mean"), told=("value", "size"))
    # what only some halvings can tell would be a mean of the lucky ones
    means = means.loc[means["told"] == HALVINGS, ["condition", "metric", "value"]].reset_index(drop=True)
    whole = [_whole(value, name) for name, value in zip(means["metric"], means["value"], strict=True)]
    return means.assign(value=whole)


def _halved(truth: Truth, rng: np.random.Generator) -> Pairs:
    """One half of the cells of each condition as prediction, the other as truth."""
    orders = [rng.permutation(num_cells(cells)) for cells in truth.cells]
    cuts = [len(order) // 2 for order in orders]
    parts = list(zip(truth.cells, orders, cuts, strict=True))
    real = tuple(cells[order[cut:]] for cells, order, cut in parts)
    candidates = truth.candidates.copy()
    candidates[truth.own] = [mean(cells) for cells in real]
    predicted = tuple(cells[order[:cut]] for cells, order, cut in parts)
    truth = replace(truth, cells=real, candidates=candidates)
    if truth.counts is None:
        return Pairs(truth=truth, cells=predicted)
    counts = list(zip(truth.counts, orders, cuts, strict=True))
    truth = replace(truth, counts=tuple(cells[order[cut:]] for cells, order, cut in counts))
    return Pairs(
        truth=truth, cells=predicted, counts=tuple(cells[order[:cut]] for cells, order, cut in counts)
    )


def _whole(value: float, name: str) -> float:
    """Carry a score between halves over to whole conditions."""
    match metric_named(name).noise:
        case "square":
            return value / 2
        case "root":
            return value / np.sqrt(2)
        case "reliability" if value > 0:
            return 2 * value / (1 + value)
        case "determination" if value > -1:
            # With squared noise e of a whole condition and true spread s, u = 1 - value is 4e / (s + 2e)
            # between halves and 2e / (s + e) between wholes; -1 is what noise alone has in both.
            return 1 - 2 * (1 - value) / (3 + value)
        case _:
            return value


def _ordered(*tables: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(tables, ignore_index=True).reindex(columns=["model", "condition", "metric", "value"])
