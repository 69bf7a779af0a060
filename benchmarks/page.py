"""The page of results, drawn from the record."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import torch

from benchmarks.jobs import Task
from benchmarks.measure import commit, machine, table
from benchmarks.record import DISTRIBUTIONS, GROUPS, MEANS, RESIDUALS, Found, Note, Record
from knockon.evaluate.summary import BASELINES, CEILING

OVERVIEW = (*GROUPS, "energy_distance", "mse")
"""Groups and metrics with a table of all tasks."""

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
- An empty field: not measured, no basis for any test condition, no scores (the screen's remarks say why), or,
  for scLDM, no counts.
- `no_effect` is the floor. `scdfm`, `perturbdiff`, `scldm` and `ripple` are the default presets.
- `scdfm-paper`, `perturbdiff-paper`, `scldm-paper`: objective and switches of the paper preset at the widths,
  layers, heads, sets, cells and steps of the default one, and with its rates; scLDM also with its solver.
  scDFM has more steps than its default, which begins nearer to its end: 700 at a rate of .001, and ten Euler
  steps. The published solvers take many times as long, and the published sizes and 200,000 steps cannot be
  trained on two cores: these rows show what the switches do, not what the papers reached.
- *train*: seconds of training with preparation and statistics; *generate*: seconds of {cells} cells of each
  test condition; means over folds, and other work on the machine is in them.
- *scored*: how often the test conditions were scored with this configuration of the model, in brackets with
  any. No look at them before this ledger was kept is in it.
"""

INTERACTIONS = """Correlation over genes of the predicted residual of a double (its mean less the sum of its
singles) with the true one, which the simulation knows; mean over held-out doubles, with its interval.
*measured singles*: the sum is that of the measured singles on both sides, so that both share its noise, and
no effect at all scores above 0. *true singles*: of the true ones on both sides, without noise; an additive
prediction scores about 0, one that shrinks all effects above it. `ceiling`: the real cells of the double.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What the page says of one task."""

    task: Task
    found: Found
    models: Sequence[str]
    """In the order of tables, the ceiling last."""
    looks: Mapping[str, str]
    """Of each model, how often it was scored."""

    @property
    def conditions(self) -> int:
        """Test conditions of all folds."""
        return max(self.answered(model) for model in self.found.notes)

    def answered(self, model: str) -> int:
        """Test conditions of which a model has scores."""
        return sum(note["conditions"] for note in self.found.notes.get(model, ()))


def part(task: Task, record: Record, order: Sequence[str]) -> Part | None:
    """Take a task out of the record; None where it was never run."""
    found = record.found(task.name)
    if found is None:
        return None
    there = [*dict.fromkeys(found.lines.index.get_level_values("model"))]
    models = [name for name in order if name in there]
    models += [name for name in there if name not in (*models, CEILING)]
    looks = {name: _looks(name, found.notes.get(name, ()), task.name, record) for name in models}
    return Part(task=task, found=found, models=(*models, CEILING), looks=looks)


def _looks(model: str, notes: Sequence[Note], task: str, record: Record) -> str:
    """Most looks at any fold, with this configuration and with any of the model."""
    this = every = 0
    for note in notes:
        there = record.looks.get(f"{task}/{note['fold']}", {})
        this = max(this, there.get(f"{model} {note.get('configuration')}", 0))
        every = max(every, sum(count for key, count in there.items() if key.split()[0] == model))
    return str(this) if this == every else f"{this} ({every})"


def written(tasks: Sequence[Task], record: Record, *, order: Sequence[str], command: str) -> str:
    """Write the whole page as Markdown."""
    parts = [one for task in tasks if (one := part(task, record, order))]
    missing = [task.name for task in tasks if task.name not in record.tasks]
    texts = [_head(parts, command), overview(parts, order), interactions(parts, order)]
    texts += [screen(one) for one in parts]
    if missing:
        texts.append("Not run yet: " + ", ".join(missing) + ".\n")
    return "\n".join(text for text in texts if text)


def _head(parts: Sequence[Part], command: str) -> str:
    notes = [note for one in parts for notes in one.found.notes.values() for note in notes if note["scored"]]
    origins = sorted({f"{note['commit']} on {note['date']} ({note['machine']})" for note in notes})
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


def overview(parts: Sequence[Part], order: Sequence[str]) -> str:
    """Models x tasks, a table for each group, and where models are not better than the baseline."""
    scores = {one.task.name: one.found.lines for one in parts}
    models = [name for name in order if any(name in one.models for one in parts)]
    lines = ["## Overview\n", *(f"- **{one.task.name}**: {_described(one)}" for one in parts), ""]
    for metric in OVERVIEW:
        rows = [
            (f"`{model}`", *(_calibrated(lines, model, metric) for lines in scores.values()))
            for model in models
        ]
        rows.append(("*metrics that count*", *(_counting(lines, metric) for lines in scores.values())))
        title = metric.replace("_", " ").capitalize()
        lines += [f"### {title}, calibrated\n", table(["model", *scores], rows), ""]
    lines.append("### Where a model is not better than the best simple baseline\n")
    lines += [verdict(model, scores) for model in models if model not in BASELINES]
    return "\n".join(lines) + "\n"


def verdict(model: str, scores: Mapping[str, pd.DataFrame]) -> str:
    """Say where a model is better than the best simple baseline with its interval, and where it is not."""
    lines = []
    for group in GROUPS:
        better, level, worse, untold, none = [], [], [], [], []
        for task, found in scores.items():
            if (model, group) not in found.index:
                none.append(task)
                continue
            line = found.loc[(model, group), :]
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


def interactions(parts: Sequence[Part], order: Sequence[str]) -> str:
    """Correlations of residuals, of simulated doubles."""
    parts = [one for one in parts if one.task.has_truth]
    if not parts:
        return ""
    models = [name for name in (*order, CEILING) if any(name in one.models for one in parts)]
    ways = [(one, way) for one in parts for way in RESIDUALS]
    rows = [
        (f"`{model}`", *(_correlated(one.found.lines, model, RESIDUALS[way]) for one, way in ways))
        for model in models
    ]
    header = ["model", *(f"{one.task.name}, {way} singles" for one, way in ways)]
    return "\n".join(("## Interactions\n", INTERACTIONS, table(header, rows), ""))


def screen(one: Part) -> str:
    """Every metric of every model on one task."""
    found, lines = one.found.lines, [f"## {one.task.name}\n", f"{_described(one)}.\n"]
    valued = found["value"].dropna().index.get_level_values("metric")
    for metrics, about in ((MEANS, ()), (DISTRIBUTIONS, ("train (s)", "generate (s)", "scored"))):
        known = [metric for metric in metrics if metric in valued]
        rows = [
            (
                f"`{model}`",
                *(_scored(found, model, metric) for metric in known),
                *(_about(one, model) if about else ()),
            )
            for model in one.models
        ]
        lines += [table(["model", *known, *about], rows), ""]
    lines += _remarks(one)
    return "\n".join(lines)


def _described(one: Part) -> str:
    folds = f" in {one.found.folds} folds" if one.found.folds > 1 else ""
    return f"{one.task.about}; {one.conditions} test conditions{folds}"


def _remarks(one: Part) -> list[str]:
    """Say what is not as the table looks."""
    lines, folds = [], one.found.folds
    for model, notes in one.found.notes.items():
        errors = [note["error"] for note in notes if note.get("error")]
        refused = sum(not note["scored"] for note in notes) - len(errors)
        if errors:
            lines.append(f"- `{model}` has no scores in {len(errors)} of {folds} folds: {errors[0]}")
        if refused:
            lines.append(f"- `{model}` has no basis for some test conditions in {refused} of {folds} folds.")
    if one.found.baseless:
        names = ", ".join(f"`{name}`" for name in one.found.baseless)
        lines.append(f"- No basis for any test condition, and not trained: {names}.")
    for model in one.models[:-1]:
        scored, elsewhere = one.answered(model), sum(n.get("fallback", 0) for n in one.found.notes[model])
        if elsewhere:
            lines.append(
                f"- `{model}` has no basis for {elsewhere} of {scored} conditions: "
                f"`{one.task.fallback}` answers."
            )
        if scored < one.conditions:
            lines.append(f"- `{model}` has scores of {scored} of {one.conditions} conditions.")
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


def _calibrated(lines: pd.DataFrame, model: str, metric: str) -> str:
    if (model, metric) not in lines.index:
        return ""
    line = lines.loc[(model, metric), :]
    return span(line["calibrated"], line["low"], line["high"])


def _counting(lines: pd.DataFrame, metric: str) -> str:
    """Say how many metrics of a group have room between baseline and replicate."""
    counted = lines.xs(metric, level="metric")["metrics"].max()
    return f"{counted:.0f} of {len(GROUPS.get(metric, (metric,)))}"


def _correlated(lines: pd.DataFrame, model: str, metric: str) -> str:
    if (model, metric) not in lines.index:
        return ""
    return span(*lines.loc[(model, metric), ["value", "low", "high"]])


def _scored(lines: pd.DataFrame, model: str, metric: str) -> str:
    if (model, metric) not in lines.index:
        return ""
    text = raw(lines.loc[(model, metric), "value"])
    return text if model == CEILING else f"{text}<br>{_calibrated(lines, model, metric)}"


def _about(one: Part, model: str) -> tuple[str, str, str]:
    notes = [note for note in one.found.notes.get(model, ()) if note["scored"]]
    if not notes:
        return "", "", ""
    train, generate = (np.mean([note[key] for note in notes]) for key in ("train", "generate"))
    return f"{train:.0f}" if train >= 10 else f"{train:.1f}", f"{generate:.1f}", one.looks[model]
