"""What `knockon train --dry-run` forecasts against what the run then takes: memory, time and disk.

    python -m benchmarks.forecast [--models scdfm ripple] [--screens tiny demo] [--clock]

Forecast and run have a fresh process each, one after the other. Ratios are forecast / run. Seconds are those
of the processor, on one thread: other work on the machine moves those on the clock, for which `--clock` asks.
"""

import argparse
import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import GIB, machine, table
from knockon import models
from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.forecast import forecast, peak_memory
from knockon.model import Recipe, Training, model_class
from knockon.train import Options, train

STEPS: Mapping[str, Mapping[str, int]] = {
    "tiny": {"scdfm": 300, "perturbdiff": 300, "scldm": 400, "ripple": 0},
    "demo": {"scdfm": 100, "perturbdiff": 40, "scldm": 200, "ripple": 0},
}
"""Training steps, of each stage where there are two; a model without steps is fitted as it is."""
PRESETS: Mapping[str, str] = {"tiny": "small", "demo": "default"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on a screen."""

    model: str
    screen: str
    folder: Path
    clock: bool

    @property
    def data(self) -> Path:
        return self.folder / f"{self.screen}.h5ad"

    @property
    def recipe(self) -> Recipe:
        """A preset, cut short, with two validations."""
        preset = PRESETS[self.screen] if hasattr(models.load(self.model), PRESETS[self.screen]) else "default"
        recipe = models.recipe(self.model, preset)
        stages = {
            field.name: self.shortened(value)
            for field in dataclasses.fields(recipe.model)
            if isinstance(value := getattr(recipe.model, field.name), Training)
        }
        return Recipe(model=dataclasses.replace(recipe.model, **stages), train=self.shortened(recipe.train))

    def shortened(self, training: Training) -> Training:
        steps = STEPS[self.screen][self.model]
        return dataclasses.replace(
            training, steps=steps, validate_every=steps // 2, checkpoint_every=steps // 4, patience=0
        )

    def read(self) -> Screen:
        counts = model_class(self.recipe.model).units == "counts"
        return Screen.read(self.data, layer="counts" if counts else None)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Seconds, and bytes of memory and of disk."""

    seconds: float
    memory: int
    disk: int


def set_up(plan: Plan) -> None:
    """Make this process count its seconds as it is asked to; nothing else in it tells the time."""
    if not plan.clock:
        torch.set_num_threads(1)
        time.perf_counter = time.monotonic = time.process_time


def foretold(plan: Plan) -> tuple[Taken, float]:
    """What is forecast, and the seconds that the forecast took."""
    set_up(plan)
    began = time.monotonic()
    screen = plan.read()
    split = splits.make("additive", screen)
    options = Options(device="cpu")
    found = forecast(plan.recipe, screen, split, out=plan.folder, options=options, began=began)
    return Taken(seconds=found.total, memory=found.memory, disk=found.disk), time.monotonic() - began


def taken(plan: Plan) -> Taken:
    """What the run takes; of its disk at its end, with the largest file twice, as while it was written."""
    set_up(plan)
    began = time.monotonic()
    screen = plan.read()
    out = plan.folder / f"{plan.model}-{plan.screen}"
    train(plan.recipe, screen, splits.make("additive", screen), out=out, options=Options(device="cpu"))
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    return Taken(seconds=time.monotonic() - began, memory=peak_memory(), disk=sum(sizes) + max(sizes))


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(STEPS["tiny"]), default=tuple(STEPS["tiny"]))
    parser.add_argument("--screens", nargs="+", choices=tuple(STEPS), default=tuple(STEPS))
    parser.add_argument("--clock", action="store_true", help="seconds on the clock, with all threads")
    options = parser.parse_args(arguments)
    rows, context = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for screen in options.screens:
            adata = simulate.simulate(getattr(simulate, screen)())
            adata.write_h5ad(Path(folder) / f"{screen}.h5ad")
            for model in options.models:
                plan = Plan(model=model, screen=screen, folder=Path(folder), clock=options.clock)
                results = []
                for work in (foretold, taken):
                    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
                        results.append(pool.submit(work, plan).result())
                (told, lasted), real = results
                rows.append(
                    (
                        model, screen, STEPS[screen][model] or "none",
                        f"{told.memory / real.memory:.2f}", f"{real.memory / GIB:.2f}",
                        f"{told.seconds / real.seconds:.2f}", f"{real.seconds:.0f}",
                        f"{told.disk / real.disk:.2f}", f"{lasted:.0f}",
                    )
                )  # fmt: skip
                print(rows[-1], flush=True)
    header = (
        "model", "screen", "steps", "memory: ratio", "GiB", "time: ratio", "s", "disk: ratio", "forecast (s)"
    )  # fmt: skip
    text = f"Forecast / run, on a CPU ({machine(torch.device('cpu'))}).\n\n{table(header, rows)}"
    print(text)
    return text


if __name__ == "__main__":
    main()
