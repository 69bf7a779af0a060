"""The page of results, made of what lies in the folder of the runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from benchmarks import residuals
from benchmarks.jobs import BASELESS, Task, finished, pooled
from benchmarks.measure import commit, machine, table
from knockon.data.simulate import truth
from knockon.evaluate.summary import BASELINES, CEILING, calibrate, summarize
from knockon.evaluate.tables import LONG
from knockon.files import read_json

MEANS = (
    "mse", "mae", "l2", "pearson_delta", "pearson_delta_top20", "centroid_delta", "centroid_delta_top20",
    "discrimination",
)  # fmt: skip
DISTRIBUTIONS = ("energy_distance", "variance_corr", "zero_fraction_error")
GROUPS = {
    "mean metrics": MEANS,
    "distribution metrics": DISTRIBUTIONS,
    "energy distance": ("energy_distance",),
    "mse": ("mse",),
}
"""Calibrated scores of the overview."""

HEAD = """# Results

Commit {commit}, {date}; {machine}. Made by `{command}`: do not edit by hand.
{origin}

Every model on every screen. **Calibrated scores are 0 for the best simple baseline** ({simple}; the best by
the mean of that very metric) **and 1 for a replicate**, which is what a second experiment of the same size
would reach as a prediction (see [evaluation](evaluation.md)); its cells are noisy too, so a model can be
above 1. In brackets stands the 95 % interval, from a bootstrap over the test conditions of all folds. It
holds for other conditions of the same screen, not for other screens, and not for other draws of the training
seed: each model is trained once in each fold. Conditions of one screen share cells (control, singles), so
that intervals are somewhat too narrow. Bold: above 0 with its interval.

- *mean metrics*: the average of the calibrated scores of {means}; *distribution metrics*: of
  {distributions}.
- A metric counts only where the replicate is better than the best simple baseline beyond such an interval; a
  dash stands where it is not, since the baseline cannot be told from a replicate by that metric.
- `ripple-independent` is ripple with cells moved by the thousand (`together=1024`), nearly independent of
  each other. Sets of `ripple`, `scdfm`, `perturbdiff` and `scldm` have nearly no noise in their means: that
  is worth something where means are scored, and flatters the energy distance, which takes cells for
  independent.
- `no_effect` is the floor. `scdfm`, `perturbdiff`, `scldm` and `ripple` are the default presets.
- `scdfm-paper`, `perturbdiff-paper`, `scldm-paper`: objective and switches of the paper preset at the widths,
  layers, heads, sets, cells and steps of the default one, and with its rates; scDFM and scLDM also with its
  solver, since the published ones take many times as long. The published sizes and 200,000 steps cannot be
  trained on two cores: these rows show what the switches do, not what the papers reached.
- *train*: seconds of training with preparation and statistics; *generate*: seconds of {cells} cells of each
  test condition; means over folds, and other work on the machine is in them.
- *scored*: how often the test conditions were scored with this configuration of the model, in brackets with
  any. No look at them before this ledger was kept is in it.
"""

RESIDUALS = """Correlation over genes of the predicted residual of a double (its mean less the sum of its
singles) with the true one, which the simulation knows; mean over held-out doubles, with its interval.
*measured singles*: the sum is that of the measured singles on both sides, so that both share its noise, and
no effect at all scores above 0. *true singles*: of the true ones on both sides, without noise; an additive
prediction scores about 0, one that shrinks all effects above it. `ceiling`: the real cells of the double.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """All that was found in one task."""

    task: Task
    folders: Mapping[str, Path]
    scores: pd.DataFrame
    about: Mapping[str, list[dict[str, object]]]
    """Of each model, what every fold notes of it."""
    baseless: Sequence[str]
    """Models that have a basis for no test condition."""
    looks: Mapping[str, str]
    """Of each model, how often it was scored."""
    models: Sequence[str] = field(default=())
    """In the order of tables, the ceiling last."""

    def calibrated(self, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
        """Calibrated scores, by model and group."""
        return calibrate(self.scores, groups).set_index(["model", "group"])


def find(task: Task, out: Path, looks: Mapping[str, Mapping[str, int]], order: Sequence[str]) -> Found | None:
    """Gather a task's folds; None where none is finished."""
    folders = {path.parent.name: path.parent for path in sorted((out / task.name).glob("*/done.json"))}
    if not folders:
        return None
    scores = pooled(folders)
    scores = scores.dropna(subset="value")
    notes = [finished(folder) for folder in folders.values()]
    there = set(scores["model"])
    models = [name for name in order if name in there]
    models += [name for name in dict.fromkeys(scores["model"]) if name not in (*models, CEILING)]
    path = out / task.name / BASELESS
    counts = [looks.get(f"{task.name}/{fold}", {}) for fold in folders]
    return Found(
        task=task,
        folders=folders,
        scores=scores[LONG],
        about={name: [note[name] for note in notes if name in note] for note in notes for name in note},
        baseless=read_json(path)["models"] if path.exists() else [],
        looks={name: _looks(name, [note.get(name, {}) for note in notes], counts) for name in models},
        models=(*models, CEILING),
    )


def _looks(name: str, notes: Sequence[Mapping[str, object]], counts: Sequence[Mapping[str, int]]) -> str:
    """Most looks at any fold, with this configuration and with any of the model."""
    this = max(
        there.get(f"{name} {note.get('configuration')}", 0) for note, there in zip(notes, counts, strict=True)
    )
    every = max(sum(n for key, n in there.items() if key.split()[0] == name) for there in counts)
    return str(this) if this == every else f"{this} ({every})"


def written(tasks: Sequence[Task], out: Path, ledger: Path, *, order: Sequence[str], command: str) -> str:
    """Write the whole page as Markdown."""
    looks = read_json(ledger) if ledger.exists() else {}
    every = [found for task in tasks if (found := find(task, out, looks, order))]
    missing = [task.name for task in tasks if task.name not in {found.task.name for found in every}]
    parts = [_head(every, command), overview(every, order), interactions(every, out, order)]
    parts += [screen(found) for found in every]
    if missing:
        parts.append("Not run yet: " + ", ".join(missing) + ".\n")
    return "\n".join(part for part in parts if part)


def _head(every: Sequence[Found], command: str) -> str:
    notes = [note for found in every for notes in found.about.values() for note in notes]
    origins = sorted({f"{n['commit']} on {n['date']} ({n['machine']})" for n in notes if n["scored"]})
    return HEAD.format(
        commit=commit(),
        date=datetime.now(UTC).date(),
        machine=f"{machine(torch.device('cpu'))}, load average {os.getloadavg()[0]:.1f}",
        command=command,
        origin="Trained and scored at: " + "; ".join(origins) + ".",
        simple=", ".join(f"`{name}`" for name in BASELINES),
        means=", ".join(f"`{name}`" for name in MEANS),
        distributions=", ".join(f"`{name}`" for name in DISTRIBUTIONS),
        cells=", ".join(sorted({str(note["cells"]) for note in notes})),
    )


# ---- tables ----------------------------------------------------------------------------------------


def overview(every: Sequence[Found], order: Sequence[str]) -> str:
    """Models x tasks, a table for each group, and where models are not better than the baseline."""
    scores = {found.task.name: found.calibrated(GROUPS) for found in every}
    models = [name for name in (*order, CEILING) if any(name in found.models for found in every)]
    lines = ["## Overview\n", *(f"- **{found.task.name}**: {_described(found)}" for found in every), ""]
    for group in GROUPS:
        rows = [
            (f"`{model}`", *(_calibrated(table, model, group) for table in scores.values()))
            for model in models
            if model != CEILING
        ]
        rows.append(("*metrics that count*", *(_counting(found, group) for found in scores.values())))
        lines += [f"### {group.capitalize()}, calibrated\n", table(["model", *scores], rows), ""]
    lines.append("### Where a model is not better than the best simple baseline\n")
    lines += [verdict(model, scores) for model in models if model not in (*BASELINES, CEILING)]
    return "\n".join(lines) + "\n"


def verdict(model: str, scores: Mapping[str, pd.DataFrame]) -> str:
    """Say where a model is better than the best simple baseline with its interval, and where it is not."""
    lines = []
    for group in ("mean metrics", "distribution metrics"):
        better, level, worse, untold, none = [], [], [], [], []
        for task, calibrated in scores.items():
            if (model, group) not in calibrated.index:
                none.append(task)
                continue
            line = calibrated.loc[(model, group), :]
            if pd.isna(line["low"]):
                untold.append(task)
            elif line["low"] > 0:
                better.append(task)
            else:
                (worse if line["high"] < 0 else level).append(task)
        said = [
            f"{what} on {', '.join(where)}"
            for what, where in (
                ("**better**", better),
                ("**not better** (within its interval)", level),
                ("**worse**", worse),
                ("no room to tell", untold),
                ("no scores", none),
            )
            if where
        ]
        lines.append(f"  - {group}: {'; '.join(said)}.")
    return "\n".join([f"- `{model}`", *lines])


def interactions(every: Sequence[Found], out: Path, order: Sequence[str]) -> str:
    """Correlations of residuals, of simulated doubles."""
    with_truth = [found for found in every if found.task.has_truth]
    if not with_truth:
        return ""
    averages: dict[str, pd.DataFrame] = {}
    for found in with_truth:
        real = found.task.screen(out)
        true = truth(anndata.read_h5ad(found.task.file(out)))
        folds = found.task.folds(real)
        tables = [
            residuals.of_fold(folder, real, folds[fold], true) for fold, folder in found.folders.items()
        ]
        averages[found.task.name] = residuals.averaged(pd.concat(tables))
    models = [name for name in (*order, CEILING) if any(name in found.models for found in with_truth)]
    rows = [
        (
            f"`{model}`",
            *(_correlated(table, model, way) for table in averages.values() for way in residuals.WAYS),
        )
        for model in models
    ]
    header = ["model", *(f"{name}, {way} singles" for name in averages for way in residuals.WAYS)]
    return "\n".join(
        (
            "## Interactions\n",
            RESIDUALS,
            table(header, rows),
            "",
        )
    )


def screen(found: Found) -> str:
    """Every metric of every model on one task."""
    scores = summarize(found.scores)
    means = scores.set_index(["metric", "model"])["mean"]
    calibrated = found.calibrated({name: [name] for name in (*MEANS, *DISTRIBUTIONS)})
    lines = [f"## {found.task.name}\n", f"{_described(found)}.\n"]
    for metrics, about in ((MEANS, ()), (DISTRIBUTIONS, ("train (s)", "generate (s)", "scored"))):
        known = [metric for metric in metrics if metric in means.index.get_level_values(0)]
        rows = [
            (
                f"`{model}`",
                *(_scored(means, calibrated, model, metric) for metric in known),
                *(_about(found, model) if about else ()),
            )
            for model in found.models
        ]
        lines += [table(["model", *known, *about], rows), ""]
    lines += _remarks(found)
    return "\n".join(lines)


def _described(found: Found) -> str:
    count, folds = found.scores["condition"].nunique(), len(found.folders)
    return f"{found.task.about}; {count} test conditions" + (f" in {folds} folds" if folds > 1 else "")


def _remarks(found: Found) -> list[str]:
    """Say what is not as the table looks."""
    lines, folds = [], len(found.folders)
    whole = found.scores.groupby("model")["condition"].nunique()
    for model, notes in found.about.items():
        errors = [str(note["error"]) for note in notes if note.get("error")]
        refused = sum(not note["scored"] for note in notes) - len(errors)
        if errors:
            lines.append(f"- `{model}` has no scores in {len(errors)} of {folds} folds: {errors[0]}")
        if refused:
            lines.append(f"- `{model}` has no basis for some test conditions in {refused} of {folds} folds.")
    if found.baseless:
        names = ", ".join(f"`{name}`" for name in found.baseless)
        lines.append(f"- No basis for any test condition, and not trained: {names}.")
    for model in found.models:
        answered = sum(int(str(note.get("fallback", 0))) for note in found.about.get(model, ()))
        if answered:
            lines.append(
                f"- `{model}` has no basis for {answered} of {whole[model]} conditions: "
                f"`{found.task.fallback}` answers."
            )
        if whole[model] < whole.max():
            lines.append(f"- `{model}` has scores of {whole[model]} of {whole.max()} conditions.")
    return [*lines, ""] if lines else lines


# ---- cells of tables -------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a calibrated score or a correlation."""
    if np.isinf(value):
        return "∞" if value > 0 else "-∞"
    text = f"{value:.0f}" if abs(value) >= 10 else f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text


def span(value: float, low: float, high: float) -> str:
    """Write a score with its interval, in bold where that is above 0; a dash where there is none."""
    if pd.isna(value):
        return "-"
    text = f"**{number(value)}**" if low > 0 else number(value)
    return text if pd.isna(low) else f"{text} [{number(low)}, {number(high)}]"


def raw(value: float) -> str:
    """Write a mean with three significant digits, at most four decimals."""
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3g}"


def _calibrated(calibrated: pd.DataFrame, model: str, group: str) -> str:
    if (model, group) not in calibrated.index:
        return ""
    line = calibrated.loc[(model, group), :]
    return span(line["calibrated"], line["low"], line["high"])


def _counting(calibrated: pd.DataFrame, group: str) -> str:
    """Say how many metrics of a group have room between baseline and replicate."""
    return f"{calibrated.xs(group, level='group')['metrics'].max()} of {len(GROUPS[group])}"


def _correlated(averages: pd.DataFrame, model: str, way: str) -> str:
    if (model, way) not in averages.index:
        return ""
    return span(*averages.loc[(model, way), :])


def _scored(means: pd.Series, calibrated: pd.DataFrame, model: str, metric: str) -> str:
    if (metric, model) not in means.index:
        return ""
    text = raw(means[metric, model])
    return text if model == CEILING else f"{text}<br>{_calibrated(calibrated, model, metric)}"


def _about(found: Found, model: str) -> tuple[str, str, str]:
    notes = [note for note in found.about.get(model, ()) if note.get("scored")]
    if not notes:
        return "", "", ""
    train, generate = (np.mean([float(str(note[key])) for note in notes]) for key in ("train", "generate"))
    return f"{train:.0f}" if train >= 10 else f"{train:.1f}", f"{generate:.1f}", found.looks[model]
