"""What is trained on which screen with what held out, done once and kept in a folder.

A task is a screen and a way of holding out, in one fold or several. Each fold has a folder of its own, which
is a comparison (`knockon.compare`) with two more files: `done.json`, what was scored in it and how it came
about, and `all_scores.csv`, the scores of all that, whichever run of the command they are of.
"""

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import anndata
import pandas as pd
import torch

from benchmarks.measure import commit, machine
from knockon import splits
from knockon.compare import Comparison, compare, recipes
from knockon.data import screen as screens
from knockon.data.conventions import Columns
from knockon.data.design import Simulation
from knockon.data.screen import Screen
from knockon.data.simulate import simulate
from knockon.data.splits import Split
from knockon.evaluate.summary import CEILING
from knockon.files import read_json, write_json, write_text, written_aside
from knockon.model import Recipe, model_class
from knockon.predict import Refusal
from knockon.record import RECORD
from knockon.train import Options, train
from knockon.types import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
COUNTS = Columns(layer="counts")
"""How screens with log1p values and counts are read as counts."""
HERE = Path(__file__).parent

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A screen, and what is held out of it."""

    name: str
    """Of its folder, and of its columns in tables."""
    data: Simulation | Path
    """What to simulate, or a file."""
    about: str = ""
    """The screen and what is held out, in words."""
    columns: Columns = Columns()
    """How the file is read."""
    split: str = "additive"
    """A kind of split, or a file with one."""
    seeds: tuple[int, ...] = (42,)
    """A fold of the split for each of these seeds."""
    each_level: bool = False
    """A fold for each level of the first covariate instead."""
    fraction: float | None = None
    """Of what is held out; by default that of the kind."""
    fallback: str | None = None
    """Baseline that answers where a model has no basis; without one, such a model is left out."""
    genes: int | None = None
    """Most variable genes to keep; all without it."""

    @property
    def has_truth(self) -> bool:
        """Whether true residuals of doubles are known: not where counts are brought to another total."""
        simulated = isinstance(self.data, Simulation) and self.columns != COUNTS
        return simulated and self.split == "additive"

    def file(self, folder: Path) -> Path:
        """Return the screen's file; a simulated one lies in the folder, and is made where it is missing."""
        if isinstance(self.data, Path):
            return self.data
        path = folder / "screens" / f"{self.name}.h5ad"
        if not path.exists():
            adata = simulate(self.data)
            with written_aside(path) as aside:
                adata.write_h5ad(aside)
        return path

    def screen(self, folder: Path) -> Screen:
        """Read the screen."""
        return screens.read(self.file(folder), self.columns)

    def folds(self, screen: Screen) -> dict[str, Split]:
        """Hold out, by the name of each fold."""
        if self.each_level:
            levels = screen.covariates[0].levels
            return {slug(level): splits.make(self.split, screen, holdout=(level,)) for level in levels}
        return {
            str(seed): splits.make(self.split, screen, seed=seed, fraction=self.fraction)
            for seed in self.seeds
        }


@dataclass(frozen=True, kw_only=True)
class How:
    """What all models of a folder share."""

    out: Path
    cells: int = 256
    seed: int = 0
    steps: int | None = None
    """Of training, for a trial; each recipe's own without it."""
    options: Options = Options()
    again: tuple[str, ...] = ()
    """Models that are trained and scored anew, since their code has changed and not their recipe."""

    def comparison(self, fallback: str | None = None) -> Comparison:
        return Comparison(models=(), cells=self.cells, steps=self.steps, seed=self.seed, fallback=fallback)


def slug(text: str) -> str:
    """Make a text fit for the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", text)


def plain(recipe: Recipe) -> list[object]:
    """A recipe as the record of its run holds it."""
    return json.loads(json.dumps([asdict(recipe.model), asdict(recipe.train)]))


def configuration(recipe: Recipe, cells: int) -> str:
    """A short name that differs for any two recipes of one model, and numbers of predicted cells."""
    return hashlib.sha256(json.dumps([*plain(recipe), cells]).encode()).hexdigest()[:8]


def has_basis(recipe: Recipe, screen: Screen, folds: Iterable[Split], options: Options = Options()) -> bool:
    """Whether a model can predict any test condition of any fold; found before it is trained."""
    untrained = Recipe(model=recipe.model.answering(), train=replace(recipe.train, steps=0))
    for split in folds:
        try:
            with tempfile.TemporaryDirectory() as folder:
                train(untrained, screen, split, out=folder, options=options, wanted=split.test)
        except Refusal as refusal:
            if len(refusal.offenders) == len(split.test):
                continue
        return True
    return False


def readable(asked: Mapping[str, Recipe], screen: Screen) -> dict[str, Recipe]:
    """Leave out what needs counts, where a screen has none."""
    logs = screen.units != "counts"
    return {
        name: one for name, one in asked.items() if not (logs and model_class(one.model).units == "counts")
    }


def score(
    task: Task, folder: Path, screen: Screen, split: Split, how: How, further: Mapping[str, Recipe]
) -> Iterator[str]:
    """Train, predict and score in a fold's folder what was not yet; yield the name of each that was scored.

    Each model is a comparison with the anchors alone, so that what is finished is kept, and a model whose
    cells cannot be scored keeps nobody from it; what is wrong with them is noted.
    """
    asked, done = recipes(how.comparison(), further), finished(folder)
    options = replace(how.options, genes=task.genes)
    marks = {name: configuration(recipe, how.cells) for name, recipe in asked.items()}
    old = {name for name, mark in marks.items() if done.get(name, {}).get("configuration") == mark}
    new = [name for name in asked if name not in old or name in how.again]
    for name in new:
        _forget(folder / "runs" / name, asked[name], always=name in how.again)
    for name in [name for name in new if name in further] or new[:1]:
        alone = {name: further[name]} if name in further else {}
        about = {"date": str(datetime.now(UTC).date()), "commit": commit(), "cells": how.cells}
        try:
            comparison = how.comparison(task.fallback)
            compare(screen, split, out=folder, comparison=comparison, options=options, further=alone)
        except UserError as error:
            log.error("%s: %s", name, error)
            done[name] = {**about, "scored": False, "error": str(error)}
            write_json(folder / "done.json", done)
            continue
        found = _merged(folder, name)
        scored = [one for one in new if one in found]  # the anchors come with the first comparison
        new = [one for one in new if one not in scored]
        for one in scored:
            done[one] = {"configuration": marks[one], "scored": True, **about, **_took(folder, one)}
        if name not in found:
            done[name] = {"configuration": marks[name], "scored": False, **about}
        write_json(folder / "done.json", done)
        yield from scored


def _merged(folder: Path, name: str) -> set[str]:
    """Put the scores of a comparison in the place of older ones; return the names that they are of."""
    scores = pd.read_csv(folder / "scores.csv")
    found, path = set(scores["model"]), folder / "all_scores.csv"
    if path.exists():
        kept = pd.read_csv(path)
        scores = pd.concat([scores, kept[~kept["model"].isin(found | {name})]])
    write_text(path, scores.to_csv(index=False))
    return found


def finished(folder: Path) -> dict[str, dict[str, object]]:
    """Read what was done in a fold's folder, by the names of models."""
    path = folder / "done.json"
    return read_json(path) if path.exists() else {}


def pooled(folders: Mapping[str, Path]) -> pd.DataFrame:
    """Join the scores of folds; conditions are named ``fold/condition``."""
    tables = []
    for fold, folder in folders.items():
        table, done = pd.read_csv(folder / "all_scores.csv"), finished(folder)
        last = {name for name, note in done.items() if note["scored"]}  # not of an older recipe
        table = table[table["model"].isin(last | {CEILING})]
        tables.append(table.assign(condition=fold + "/" + table["condition"]))
    scores = pd.concat(tables, ignore_index=True)
    # the ceiling comes last, whatever was scored after it
    return scores.sort_values("model", key=lambda names: names == CEILING, kind="stable", ignore_index=True)


def _forget(run: Path, recipe: Recipe, *, always: bool) -> None:
    """Remove a run of another recipe, since a folder keeps one for each name."""
    if not (run / RECORD).exists():
        return
    record = read_json(run / RECORD)
    if always or [record["config"], record["train"]] != plain(recipe):
        log.info("%s is trained again", run)
        shutil.rmtree(run)


def _took(folder: Path, name: str) -> dict[str, object]:
    """Seconds of training and of generation, and how many conditions a fallback answered."""
    record = read_json(folder / "runs" / name / RECORD)
    about = anndata.read_h5ad(folder / "predictions" / f"{name}.h5ad").uns["knockon"]
    return {
        "machine": machine(torch.device(record["device"])),
        "train": record["seconds"],
        "generate": float(about["seconds"]),
        "fallback": len(about["by_fallback"]),
    }
