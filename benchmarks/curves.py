"""What training costs, and how that grows: with genes, cells, conditions, sets and the size of the screen.

    python -m benchmarks.curves [--models scdfm perturbdiff] [--axes genes] [--profile] [--threads 1]

A step is drawing the batch, the loss, its gradient and the update, as in training; set-up is preparing the
screen and fitting the model's statistics. Seconds are of the processor, all cores together. The exponent is
the slope of a line through the last three points in logarithms: 0 does not grow, 1 grows in proportion.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import machine, table
from knockon import models
from knockon.data import prepare
from knockon.data.conventions import Columns
from knockon.data.sampler import Sampler
from knockon.data.screen import Screen
from knockon.data.simulate import demo, simulate
from knockon.embed import table as embedded
from knockon.model import Model, Recipe, model_class

MODELS = ("scdfm", "perturbdiff", "scldm_vae", "scldm", "ripple")
MATRIX = ("mm", "addmm", "bmm", "baddbmm", "scaled_dot_product", "convolution", "linear")
"""Parts of the names of operations that are matrix products, attention included."""


@dataclass(frozen=True)
class Size:
    """Of a screen and of a training step; the defaults are those of a small screen."""

    genes: int = 250
    screen: int = 4000
    """Cells of the screen."""
    conditions: int = 40
    sets: int = 4
    cells: int = 16
    """Cells of a set."""


AXES: Mapping[str, tuple[int, ...]] = {
    "genes": (125, 250, 500, 1000, 2000),
    "cells": (8, 16, 32, 64, 128),
    "sets": (1, 2, 4, 8, 16),
    "conditions": (10, 20, 40, 80, 160),
    "screen": (4000, 8000, 16_000, 32_000, 64_000),
}


@cache
def simulated(genes: int, cells: int, conditions: int) -> Screen:
    config = replace(
        demo(), genes=genes, cells=max(cells, 25 * conditions), singles=conditions, doubles=0, truth_cells=16
    )
    # counts, which every model can take
    return Screen.from_anndata(simulate(config), columns=Columns(layer="counts"))


class Subject:
    """A model that was set up to train, and what that took."""

    def __init__(self, recipe: Recipe, screen: Screen, size: Size) -> None:
        began = time.process_time()
        fitted = prepare.fit(screen, units=model_class(recipe.model).units)
        self.screen = prepare.apply(screen, fitted)
        self.model = build(recipe, self.screen)
        conditions = self.screen.conditions
        self.sampler = Sampler(
            self.screen,
            self.model.spec,
            conditions=conditions,
            sets=size.sets,
            cells=size.cells,
            seed=0,
            embedded=embedded(self.model, self.screen) if self.model.learns_embedded else None,
        )
        self.set_up = time.process_time() - began
        self.trains = recipe.train.steps > 0
        if self.trains:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.done = 0

    def step(self) -> None:
        rng = torch.Generator().manual_seed(self.done)
        self.model.loss(self.sampler.batch(self.done), rng)["total"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1


def build(recipe: Recipe, screen: Screen) -> Model:
    """Build a model and fit its statistics; an earlier stage is there, and was not trained."""
    earlier = recipe.model.earlier()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # noqa: TID251 (layers draw their weights from the global generator)
        model = recipe.model.build(screen.spec())
    model.fit_statistics(screen)
    if isinstance(earlier, Recipe):
        model.take(build(earlier, screen))
    return model.train()


def measured(name: str, size: Size) -> tuple[float, float]:
    """Seconds of a step (the median of six, the first and slowest among them) and of the set-up."""
    subject = Subject(models.recipe(name), simulated(size.genes, size.screen, size.conditions), size)
    if not subject.trains:
        return float("nan"), subject.set_up
    return statistics.median(seconds(subject.step) for _ in range(6)), subject.set_up


def seconds(task: Callable[[], object]) -> float:
    began = time.process_time()
    task()
    return time.process_time() - began


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of the last three points in logarithms."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)[0])


def curves(name: str, axes: Sequence[str]) -> str:
    """Cost along each axis, all else as in ``Size``."""
    rows = []
    for axis in axes:
        sizes = AXES[axis]
        steps, set_ups = zip(*(measured(name, replace(Size(), **{axis: at})) for at in sizes), strict=True)
        for what, times in (("step", steps), ("set-up", set_ups)):
            if not np.isnan(times[0]) and (what == "step" or axis in ("genes", "conditions", "screen")):
                shown = [f"{at:,}: {value:.3g}" for at, value in zip(sizes, times, strict=True)]
                rows.append((name, axis, what, ", ".join(shown), f"{exponent(sizes, times):.2f}"))
                print(rows[-1], flush=True)
    return table(("model", "axis", "part", "seconds at each size", "exponent"), rows)


def profiled(name: str, lines: int = 12) -> str:
    """Where the time of a step of the default recipe goes, on a screen with the genes of `norman`."""
    recipe = models.recipe(name)
    size = Size(genes=2000, screen=8000, conditions=105, sets=recipe.train.sets, cells=recipe.train.cells)
    subject = Subject(recipe, simulated(size.genes, size.screen, size.conditions), size)
    subject.step()
    each = statistics.median(seconds(subject.step) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        subject.step()
        subject.step()
    events = sorted(watched.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    matrix = sum(e.self_cpu_time_total for e in events if any(part in e.key for part in MATRIX)) / total
    epoch = 91_000 / (recipe.train.sets * recipe.train.cells)
    rows = [(f"`{e.key}`", e.count // 2, f"{e.self_cpu_time_total / total:.1%}") for e in events[:lines]]
    minutes = epoch * each / 60
    head = (
        f"{name}: {each:.3g} s a step of {size.sets} x {size.cells} cells and {size.genes:,} genes, so "
        f"{minutes:.0f} min for as many cells as `norman` has (91,000); {1 - matrix:.0%} of the time is "
        "outside of matrix products and attention."
    )
    return f"{head}\n\n{table(('operation', 'calls a step', 'share'), rows)}"


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--axes", nargs="*", choices=tuple(AXES), default=tuple(AXES))
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = f"{machine(torch.device('cpu'))}. Where an axis is not varied: {Size()}."
    parts = [base, *(curves(name, options.axes) for name in options.models if options.axes)]
    if options.profile:
        parts += [profiled(name) for name in options.models if models.recipe(name).train.steps]
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
