"""What was found of every model on every task, kept beside the page of results, which is drawn from it alone.

Runs lie where they were made, and go with the machine. Of each, the record keeps the averages with their
intervals (`results.csv`), how they came about and how often test conditions were looked at (`results.json`),
so that the page grows by a model whose neighbours were trained elsewhere, long ago.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
from filelock import FileLock

from benchmarks import residuals
from benchmarks.jobs import Task, finished, pooled
from knockon.data.simulate import truth
from knockon.evaluate.summary import BASELINES, CEILING, calibrate, summarize
from knockon.files import read_json, write_json, write_text

MEANS = (
    "mse", "mae", "l2", "pearson_delta", "pearson_delta_top20", "centroid_delta", "centroid_delta_top20",
    "discrimination",
)  # fmt: skip
DISTRIBUTIONS = ("energy_distance", "variance_corr", "zero_fraction_error")
GROUPS = {"mean metrics": MEANS, "distribution metrics": DISTRIBUTIONS}
"""Metrics whose calibrated scores are averaged."""
RESIDUALS = {way: f"residuals against {way} singles" for way in residuals.WAYS}
"""Names that correlations of residuals have among the metrics, by their way."""

LINES = ("task", "model", "metric", "value", "calibrated", "low", "high", "metrics")
"""Columns of `results.csv`. ``value`` is the mean over conditions (none for a group), ``low`` and ``high``
bound ``calibrated``, or ``value`` where nothing is calibrated; ``metrics`` counts those that have room."""
KEYS = ("model", "metric")

Note = dict[str, Any]
"""What one fold notes of a model: configuration, commit, date, machine, cells, seconds, or why there are no
scores; ``conditions`` counts those with scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """All that was found in one task."""

    lines: pd.DataFrame
    """``value, calibrated, low, high, metrics`` by model and metric."""
    folds: int
    notes: Mapping[str, Sequence[Note]]
    """Of each model, one for each of its folds."""
    baseless: Sequence[str] = ()
    """Models that have a basis for no test condition."""


@dataclass(kw_only=True)
class Record:
    """What is known of all tasks; ``changed`` writes it."""

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each task its folds, the notes of its models, and those that have no basis."""
    looks: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each ``task/fold``, how often its test conditions were scored, by model and configuration."""
    lines: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*LINES]))

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read what is there; an empty record where nothing is."""
        path = folder / "results.json"
        about = read_json(path) if path.exists() else {}
        scores = folder / "results.csv"
        return cls(**about, **({"lines": pd.read_csv(scores)} if scores.exists() else {}))

    def found(self, task: str) -> Found | None:
        """Return what is known of a task; None where it was never run."""
        if task not in self.tasks:
            return None
        about = self.tasks[task]
        lines = self.lines[self.lines["task"] == task].set_index([*KEYS]).drop(columns="task")
        return Found(
            lines=lines, folds=about["folds"], notes=about["models"], baseless=about.get("baseless", ())
        )


@contextmanager
def changed(folder: Path) -> Iterator[Record]:
    """Yield the record of a folder as it is now, and write what was changed of it; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "results.lock"):
        record = Record.read(folder)
        yield record
        write_json(folder / "results.json", {"looks": record.looks, "tasks": record.tasks})
        ordered = record.lines.sort_values(["task", "model"], kind="stable")
        write_text(folder / "results.csv", ordered.to_csv(index=False, float_format="%.6g"))


def count(folder: Path, place: str, what: str) -> None:
    """Note that the test conditions of a fold were looked at once more, by a model of some configuration."""
    with changed(folder) as record:
        there = record.looks.setdefault(place, {})
        there[what] = there.get(what, 0) + 1


def keep(
    folder: Path, task: Task, out: Path, models: Collection[str], baseless: Collection[str] = ()
) -> None:
    """Put what was found of some models, and of the anchors, in the place of what was found of them before.

    Parameters
    ----------
    folder
        Of the record.
    task, out
        What was run, and the folder of its runs.
    models
        Those of which the runs there are the newest.
    baseless
        Models that have a basis for none of the test conditions, and were not trained.
    """
    found = measured(task, out, {*models, *BASELINES, CEILING})
    with changed(folder) as record:
        lines = found.lines.reset_index().assign(task=task.name)[[*LINES]]
        old = record.lines
        gone = (old["task"] == task.name) & old["model"].isin({*lines["model"], *found.notes})
        record.lines = pd.concat([old[~gone], lines]) if len(old) else lines
        about = record.tasks.setdefault(task.name, {"models": {}})
        about["folds"] = max(found.folds, about.get("folds", 0))
        about["models"] |= found.notes
        about["baseless"] = sorted({*baseless, *about.get("baseless", ())} - {*lines["model"]})


def measured(task: Task, out: Path, models: Collection[str]) -> Found:
    """Average the scores of some models over the folds of a task."""
    folders = {path.parent.name: path.parent for path in sorted((out / task.name).glob("*/done.json"))}
    scores = pooled(folders)
    scores = scores[scores["model"].isin(models)].dropna(subset="value")
    means = summarize(scores)[["model", "metric", "mean"]].rename(columns={"mean": "value"})
    metrics = {name: (name,) for name in (*MEANS, *DISTRIBUTIONS)}
    placed = calibrate(scores, metrics | GROUPS).rename(columns={"group": "metric"}).query("conditions > 0")
    lines = means[means["metric"].isin(metrics)].merge(placed, on=[*KEYS], how="outer")
    if task.has_truth:
        lines = pd.concat([lines, _correlated(task, out, folders, {*scores["model"]})])
    return Found(
        lines=lines.set_index([*KEYS])[[*LINES[3:]]],
        folds=len(folders),
        notes={
            name: [note | _counted(scores, fold, name) for fold, note in of_folds.items()]
            for name, of_folds in _by_model(folders).items()
            if name in models
        },
    )


def _by_model(folders: Mapping[str, Path]) -> dict[str, dict[str, Note]]:
    """Turn what folds note of models into what is noted of models in folds."""
    notes: dict[str, dict[str, Note]] = {}
    for fold, folder in folders.items():
        for name, note in finished(folder).items():
            notes.setdefault(name, {})[fold] = note
    return notes


def _counted(scores: pd.DataFrame, fold: str, model: str) -> Note:
    own = scores.loc[scores["model"] == model, "condition"].unique()
    return {"fold": fold, "conditions": sum(name.startswith(f"{fold}/") for name in own)}


def _correlated(task: Task, out: Path, folders: Mapping[str, Path], models: Collection[str]) -> pd.DataFrame:
    """Correlations of residuals, of simulated doubles."""
    real, true = task.screen(out), truth(anndata.read_h5ad(task.file(out)))
    folds = task.folds(real)
    tables = [residuals.of_fold(folder, real, folds[fold], true) for fold, folder in folders.items()]
    found = residuals.averaged(pd.concat(tables)).reset_index()
    found = found[found["model"].isin(models)].rename(columns={"mean": "value"})
    return found.assign(metric=found["way"].map(RESIDUALS)).drop(columns="way")
