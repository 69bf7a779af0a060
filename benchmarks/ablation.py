"""What each switch of a default preset does: the table of ablations in `docs/reproduction.md`.

    python -m benchmarks.ablation [--models perturbdiff] [--switches residual] [--write docs/reproduction.md]

Each switch is set back alone and trained on simulated screens, which no other benchmark uses, with a seed for
screen and training together; it is compared with the default preset of the same seed, condition by held-out
condition. What is trained and scored stays in the folder `--out`, and is not done again. What is found goes
into the record `docs/ablations.csv`, of which the table is drawn, wherever its lines were measured.
"""

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from filelock import FileLock
from scipy.stats import t as student

from benchmarks.jobs import COUNTS, HERE, How, Task, configuration, finished, pooled, readable, score
from benchmarks.measure import commit, table
from knockon import models
from knockon.compare import recipes
from knockon.data.design import Simulation
from knockon.data.simulate import contexts, demo, interaction
from knockon.evaluate.suites import metric_named
from knockon.files import write_text
from knockon.model import ModelConfig, Recipe, Training
from knockon.record import WEIGHTS
from knockon.train import STAGE_ONE, Options
from knockon.types import UserError

T = TypeVar("T", ModelConfig, Training)
METRICS = (
    "mse",
    "pearson_delta",
    "discrimination",
    "energy_distance",
    "variance_corr",
    "zero_fraction_error",
)
SCREENS = {
    "demo": Task(name="demo", data=demo()),
    "interaction": Task(name="interaction", data=interaction()),
    "contexts": Task(name="contexts", data=contexts(), columns=COUNTS, split="context", fraction=0.34),
}
"""Each is simulated and split anew for each seed; doubles are held out, or drugs in one of the contexts."""
RECORD = HERE.parent / "docs" / "ablations.csv"
FOUND = ("gain", "low", "high", "agreeing", "seeds", "verdict")
KEYS = ("model", "changed", "screen")
LINES = (*KEYS, "metric", *FOUND, "configurations")
"""Columns of the record; ``configurations`` are the marks of what was compared."""
BEGIN, END = "<!-- ablations: by benchmarks.ablation -->", "<!-- end of ablations -->"
"""Lines of the page between which the table stands."""

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A switch of a model, set back."""

    model: str
    switch: str
    config: Mapping[str, object] = field(default_factory=dict)
    """Fields of the model's configuration that change; ``outer.inner`` is one of a part of it."""
    train: Mapping[str, object] = field(default_factory=dict)
    """Fields of its training that change."""
    preset: str = "default"
    """What it is compared with."""

    @property
    def base(self) -> str:
        """Name of the run that it is compared with."""
        return self.model if self.preset == "default" else f"{self.model}-{self.preset}"

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.base}-{self.switch}"

    @property
    def change(self) -> str:
        """What is changed, as the tables say it."""
        return ", ".join(f"`{key}={value}`" for key, value in {**self.config, **self.train}.items())

    def recipes(self) -> dict[str, Recipe]:
        """What is compared, and this."""
        base = models.recipe(self.model, self.preset)
        model, train = replaced(base.model, self.config), replaced(base.train, self.train)
        return {self.base: base, self.name: Recipe(model=model, train=train)}


def replaced(part: T, fields: Mapping[str, object]) -> T:
    """Replace fields, and fields of fields."""
    for name, value in fields.items():
        outer, _, inner = name.partition(".")
        new = replaced(getattr(part, outer), {inner: value}) if inner else value
        part = replace(part, **{outer: new})
    return part


def _switched(model: str, **switches: object) -> tuple[Ablation, ...]:
    """Make an ablation of each field, named as it is."""
    return tuple(Ablation(model=model, switch=name, config={name: off}) for name, off in switches.items())


ABLATIONS = (
    *_switched("response_surface", noise=0.0, curved=False),
    Ablation(model="ripple", switch="additive", config={"anchor": "additive"}),
    Ablation(model="ripple", switch="shrunken_additive", config={"anchor": "shrunken_additive"}),
    *_switched("ripple", populations=0, together=1024, still=0.0),
    *_switched(
        "perturbdiff",
        pulled=False,
        shrunk=False,
        residual=False,
        anchored=False,
        learn_controls=False,
        whole_counts=False,
        shrinkage=0.0,
        masked=False,
        unbiased_energy=False,
    ),
    Ablation(  # genes of small spread need more steps
        model="scdfm",
        switch="normal_scores",
        config={"normal_scores": False, "solver": "euler", "points": 11},
    ),
    *_switched(
        "scdfm",
        pulled=False,
        shrunk=False,
        gaussian_base=False,
        anchored_base=False,
        skip_constant=False,
        time_scale=1.0,
        zero_init=False,
        normed_keys=False,
        residual_adapter=False,
        gene_graph=False,
        mmd=0.0,
    ),
    *_switched("scldm", quantile_mapped=False, pulled=False, library="condition"),
    Ablation(model="scldm", switch="embedding", config={"autoencoder.embedding": "log1p"}),
    Ablation(model="scldm", switch="rates", config={"autoencoder.rates": False}),
    Ablation(model="scldm", switch="hide", config={"hide": "all", "hidden": 0.8}),
)


def gains(scores: pd.DataFrame, base: str, changed: str) -> pd.DataFrame:
    """Compare two models over seeds and conditions.

    Parameters
    ----------
    scores
        ``model, seed, condition, metric, value``; a condition of a seed is one of its screen.

    Returns
    -------
    DataFrame
        For each metric ``gain, low, high, agreeing, seeds, verdict``. ``gain`` is the mean over all
        conditions of all seeds of how much better ``base`` is than ``changed``, whatever the metric's
        direction, and ``low`` and ``high`` bound its 95 % t-interval, in which each condition of each seed
        counts as one. ``agreeing`` counts the seeds whose own mean has the sign of the gain.
    """
    rows = []
    for metric in METRICS:
        values = scores.loc[scores["metric"] == metric].set_index(["seed", "condition"])
        ours, theirs = (values.loc[values["model"] == name, "value"] for name in (base, changed))
        sign = 1 if metric_named(metric).direction == "higher" else -1
        gain = (sign * (ours - theirs)).dropna()
        mean, count = float(gain.mean()), len(gain)
        half = float(student.ppf(0.975, count - 1) * gain.std() / np.sqrt(count)) if count > 1 else np.nan
        own = gain.groupby("seed").mean()
        agreeing = int((np.sign(own) == np.sign(mean)).sum())
        rows.append((metric, mean, mean - half, mean + half, agreeing, len(own), verdict(mean, half)))
    return pd.DataFrame.from_records(rows, columns=["metric", *FOUND]).set_index("metric")


def verdict(gain: float, half: float) -> str:
    """Say what a switch does by the mean and half the width of the interval of what it gains."""
    if np.isnan(half) or abs(gain) <= half:
        return "no difference beyond its interval"
    return "helps" if gain > 0 else "hurts"


def run(ablation: Ablation, screen: str, seed: int, how: How) -> None:
    """Train and score an ablation and what it is compared with, where that was not done."""
    task = task_of(screen, seed)
    data = task.screen(how.out)
    sides, how = readable(ablation.recipes(), data), replace(how, seed=seed)
    if not sides:
        log.info("%s: %s needs counts", task.name, ablation.model)
    for fold, split in task.folds(data).items() if sides else ():
        folder = how.out / task.name / fold
        for some in ({ablation.base: sides[ablation.base]}, sides):
            for name in score(task, folder, data, split, how, some):
                log.info("%s: scored %s", task.name, name)
            share_stage(folder / "runs", sides)


def share_stage(runs: Path, sides: Mapping[str, Recipe]) -> None:
    """Let what is changed begin with the first stage of what it is compared with, where that is the same."""
    base, other = (runs / name / STAGE_ONE for name in sides)
    stages = [recipe.model.earlier() for recipe in sides.values()]
    trained = (base / WEIGHTS).exists()
    if isinstance(stages[0], Recipe) and stages[0] == stages[1] and trained and not other.exists():
        aside = other.with_name(f"{STAGE_ONE}-aside")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(base, aside)
        aside.rename(other)


def task_of(screen: str, seed: int) -> Task:
    """One simulated screen, and its usual split."""
    task = SCREENS[screen]
    assert isinstance(task.data, Simulation)
    return replace(task, name=f"{screen}{seed}", data=replace(task.data, seed=seed))


def gathered(one: Ablation, screen: str, seeds: Sequence[int], how: How) -> pd.DataFrame:
    """Scores of both sides on the screens of a kind, for seeds for which both were scored as they are now."""
    tables = []
    for seed in seeds:
        marks = _marks_of(one, replace(how, seed=seed))
        paths = (how.out / f"{screen}{seed}").glob("*/done.json")
        folders = {path.parent.name: path.parent for path in paths if _has(path.parent, marks)}
        if folders:
            table = pooled(folders)
            tables.append(table[table["model"].isin(marks)].assign(seed=seed))
    columns = ["model", "condition", "metric", "value", "seed"]
    return pd.concat(tables) if tables else pd.DataFrame(columns=columns)


def _marks_of(one: Ablation, how: How) -> dict[str, str]:
    """Marks of the configurations of both sides, by their names."""
    sides = one.recipes()
    asked = recipes(how.comparison(), sides)
    return {name: configuration(asked[name], how.cells) for name in sides}


def _has(folder: Path, marks: Mapping[str, str]) -> bool:
    """Whether all of these configurations were scored in a fold's folder."""
    done = finished(folder)
    return all(done.get(name, {}).get("configuration") == mark for name, mark in marks.items())


def measured(
    ablations: Sequence[Ablation], screens: Sequence[str], seeds: Sequence[int], how: How
) -> pd.DataFrame:
    """Compare all that was done with the configurations of today; ``LINES``."""
    tables = [pd.DataFrame(columns=[*LINES])]
    for screen in screens:
        for one in ablations:
            scores = gathered(one, screen, seeds, how)
            if len(scores):
                found = gains(scores, one.base, one.name).reset_index()
                about = {"model": one.base, "changed": one.change, "screen": screen}
                marks = " ".join(_marks_of(one, how).values())
                tables.append(found.assign(**about, configurations=marks))
    return pd.concat(tables[1:] or tables)[[*LINES]]


def read(path: Path) -> pd.DataFrame:
    """Read a record; lines from before configurations were noted have none."""
    return pd.read_csv(path).fillna({"configurations": ""})


def kept(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Put new lines in the place of old ones, but for those of the same comparison over more seeds."""
    both = pd.concat([new, old]) if len(old) and len(new) else (new if len(new) else old)
    both = both.reset_index(drop=True)
    newest = both.groupby([*KEYS], sort=False)["configurations"].transform("first")
    both = both[both["configurations"] == newest]
    both = both.sort_values("seeds", ascending=False, kind="stable")
    return both.drop_duplicates([*KEYS, "metric"]).sort_values([*KEYS, "metric"], ignore_index=True)


def written(lines: pd.DataFrame) -> str:
    """Write the table of a record, in the order of models and switches."""
    rows, places = [], lines.set_index([*KEYS, "metric"])
    for screen in SCREENS:
        for one in ABLATIONS:
            if (one.base, one.change, screen, METRICS[0]) in places.index:
                found = places.loc[(one.base, one.change, screen)].loc[[*METRICS]]
                cells = [_cell(line) for _, line in found.iterrows()]
                rows.append((f"`{one.base}`", one.change, screen, *cells, summed(found["verdict"])))
    return table(["model", "changed", "screen", *METRICS, "what the default has instead"], rows)


def summed(verdicts: pd.Series) -> str:
    """Say in which metrics a switch helps and hurts."""
    parts = [
        f"**{what}**: {', '.join(verdicts.index[verdicts == what])}"
        for what in ("helps", "hurts")
        if (verdicts == what).any()
    ]
    return "; ".join(parts) or "no difference beyond its interval"


def placed(text: str, between: str) -> str:
    """Put lines between the markers of a page.

    Raises
    ------
    UserError
        If it has no such markers.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise UserError("The page has no place for ablations", expected=f"the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{between}\n{END}{tail}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the table."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    how = How(out=asked.out, cells=asked.cells, steps=asked.steps, options=Options(device=asked.device))
    ablations = [
        one
        for one in ABLATIONS
        if one.model in asked.models and one.switch in (asked.switches or [one.switch])
    ]
    for seed in asked.seeds:
        for screen in asked.screens:
            for ablation in ablations if not asked.page_only else ():
                run(ablation, screen, seed, how)
    found = measured(ABLATIONS, asked.screens, asked.seeds, how)
    with FileLock(asked.record.with_suffix(".lock")):
        old = read(asked.record) if asked.record.exists() else found
        lines = kept(old, found)
        write_text(asked.record, lines.to_csv(index=False, float_format="%.6g"))
    text = written(lines)
    command = shlex.join(["python", "-m", "benchmarks.ablation", *arguments])
    head = f"Commit {commit()}, {datetime.now(UTC).date()}, `{command}`."
    if asked.write:
        page = asked.write.read_text(encoding="utf-8")
        write_text(asked.write, placed(page, f"{head}\n\n{text}\n"))
    print(text)


def _cell(line: pd.Series) -> str:
    """Write a gain with its interval and the seeds that agree; in bold beyond the interval."""
    digits = 5 if max(abs(line["low"]), abs(line["high"])) < 0.01 else 4 if abs(line["gain"]) < 0.1 else 3
    low, high = f"{line['low']:+.{digits}f}", f"{line['high']:+.{digits}f}"
    mean = f"{line['gain']:+.{digits}f}"
    text = f"**{mean}**" if line["verdict"] in ("helps", "hurts") else mean
    return f"{text} [{low}, {high}] {line['agreeing']}/{line['seeds']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = tuple(dict.fromkeys(one.model for one in ABLATIONS))
    parser.add_argument("--models", nargs="+", choices=every, default=every)
    parser.add_argument("--switches", nargs="+", help="only these")
    parser.add_argument("--screens", nargs="+", choices=tuple(SCREENS), default=tuple(SCREENS))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=(201, 202, 203), help="of screen and training"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder of all runs")
    parser.add_argument("--record", type=Path, default=RECORD, help="the record; another for trials")
    parser.add_argument("--write", type=Path, help="the page that has a place for the table")
    parser.add_argument("--page-only", action="store_true", help="train and score nothing")
    parser.add_argument("--cells", type=int, default=128, help="predicted cells of each condition")
    parser.add_argument("--steps", type=int, help="of training, for a trial")
    parser.add_argument("--device", default="auto")
    return parser


if __name__ == "__main__":
    main()
