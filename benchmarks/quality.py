"""How soon a score is reached: the least training and the least generation that agree with the most.

    python -m benchmarks.quality [--only training generation] [--variants default ...] [--threads 1]

On the simulated screen `demo` with a seed that nothing else uses: its held-out conditions are for choosing
samplers and schedules by, and no result is ever told of them. A training is done anew for
each number of steps, so that its schedule ends there. Seconds are of the processor, all cores together, so
that other work on the machine counts little.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import t as student

from benchmarks.measure import machine, table
from benchmarks.results import paper_switches
from knockon import models, splits
from knockon.data.screen import Screen
from knockon.data.simulate import demo, simulate
from knockon.data.splits import Split
from knockon.dynamics.solve import Method, evaluations
from knockon.evaluate.scores import evaluate
from knockon.model import Recipe
from knockon.models import scdfm
from knockon.run import Run
from knockon.train import train

SEED = 301
METRICS = ("mse", "pearson_delta", "energy_distance", "variance_corr", "zero_fraction_error")
STEPS = (25, 100, 350, 700)
SAMPLERS: tuple[tuple[Method, int], ...] = (
    ("rk4_38", 20), ("rk4_38", 5), ("rk4_38", 2), ("heun", 6), ("heun", 3), ("midpoint", 3), ("midpoint", 2),
    ("euler", 21), ("euler", 11), ("euler", 6), ("euler", 3),
)  # fmt: skip
"""The first is that of the released program."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A change of the default recipe of scDFM."""

    model: Mapping[str, object] = field(default_factory=dict)
    train: Mapping[str, object] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        base = models.recipe("scdfm")
        return Recipe(model=replace(base.model, **self.model), train=replace(base.train, **self.train))


VARIANTS: Mapping[str, Variant] = {
    "default": Variant(),
    "not pulled": Variant(model={"pulled": False}),
    "no anchor": Variant(model={"pulled": False, "anchored_base": False}),
    "no Gaussian base": Variant(model={"pulled": False, "anchored_base": False, "gaussian_base": False}),
    "80 genes a step": Variant(model={"genes_per_step": 80}),
    "half the conditions": Variant(train={"sets": 2}),
    "conditions for cells": Variant(train={"sets": 8, "cells": 8}),
    "three times the rate": Variant(train={"lr": 3e-3}),
    "no average": Variant(train={"ema": 0.0}),
    "constant rate": Variant(train={"schedule": "constant"}),
    "bf16": Variant(train={"precision": "bf16"}),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A screen with held-out conditions to choose by, and how many cells of each."""

    screen: Screen
    split: Split
    cells: int

    def score(self, run: Run) -> tuple[pd.DataFrame, float]:
        """Scores of each held-out condition by the metrics, and the seconds of their generation."""
        began = time.process_time()
        made = run.predict(self.split.test, cells=self.cells)
        seconds = time.process_time() - began
        found = evaluate(made, self.screen, self.split)
        ours = found[found["model"] == run.record.model]
        return ours.pivot_table(index="condition", columns="metric", values="value")[list(METRICS)], seconds


def trained(trial: Trial, recipe: Recipe, steps: int, folder: Path) -> tuple[Run, float]:
    """Train, and the seconds that it took."""
    recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    began = time.process_time()
    run = train(recipe, trial.screen, trial.split, out=folder)
    return run, time.process_time() - began


def written(scores: pd.DataFrame, reference: pd.DataFrame) -> list[str]:
    """Write the mean of each metric, in bold where it differs from the reference beyond a 95 % t-interval."""
    cells = []
    for metric in METRICS:
        gap = (scores[metric] - reference[metric]).dropna()
        half = float(student.ppf(0.975, len(gap) - 1) * gap.std() / len(gap) ** 0.5)
        text = f"{scores[metric].mean():.4f}"
        cells.append(f"**{text}**" if abs(gap.mean()) > half else text)
    return cells


def training(trial: Trial, variants: Sequence[str], steps: Sequence[int]) -> str:
    """Each variant after each number of steps, against the default after the most."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, spent = trained(trial, VARIANTS["default"].recipe, max(steps), folder / "reference")
        reference, _ = trial.score(run)
        rows.append(("default", max(steps), f"{spent:.0f}", *written(reference, reference)))
        run, spent = trained(trial, paper_switches("scdfm"), max(steps), folder / "paper")
        rows.append(("paper switches", max(steps), f"{spent:.0f}", *written(trial.score(run)[0], reference)))
        for variant in variants:
            for count in steps:
                if (variant, count) != ("default", max(steps)):
                    place = folder / f"{variant}-{count}"
                    run, spent = trained(trial, VARIANTS[variant].recipe, count, place)
                    cells = written(trial.score(run)[0], reference)
                    rows.append((variant, count, f"{spent:.0f}", *cells))
                    print(rows[-1], flush=True)
    return table(("variant", "steps", "seconds", *METRICS), rows)


def generation(trial: Trial, steps: int) -> str:
    """Each solver and grid, against the released one, with and without the pull."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        run, _ = trained(trial, VARIANTS["default"].recipe, steps, Path(name) / "run")
        for pulled in (True, False):
            reference, slowest = None, 0.0
            for solver, points in SAMPLERS:
                changed = run.change({"solver": solver, "points": points})
                assert isinstance(changed.model, scdfm.SCDFM)
                changed.model.pulled = pulled
                scores, seconds = trial.score(changed)
                reference, slowest = scores if reference is None else reference, max(slowest, seconds)
                count = evaluations(solver, points)
                sampler = (solver, points, count, f"{seconds:.1f}", f"{slowest / seconds:.1f}")
                rows.append(("yes" if pulled else "no", *sampler, *written(scores, reference)))
                print(rows[-1], flush=True)
    return table(("pulled", "solver", "points", "evaluations", "seconds", "ratio", *METRICS), rows)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=("training", "generation"), default=("training", "generation")
    )
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--cells", type=int, default=64, help="generated cells of each condition")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    screen = Screen.from_anndata(simulate(replace(demo(), seed=SEED)))
    trial = Trial(screen=screen, split=splits.make("additive", screen), cells=options.cells)
    parts = [
        f"{machine(torch.device('cpu'))}. {len(trial.split.test)} held-out conditions, "
        f"{options.cells} generated cells of each. Bold: differs from the reference, the first line of the "
        "table, beyond a 95 % t-interval over conditions."
    ]
    if "training" in options.only:
        parts.append(training(trial, options.variants, options.steps))
    if "generation" in options.only:
        parts.append(generation(trial, max(options.steps)))
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
