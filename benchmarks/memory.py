"""Peak memory of each stage of a large screen's way from a file to training.

    python -m benchmarks.memory [--models scdfm scldm] [--steps 3]

Every stage runs in a process of its own that also does what comes before it (reading, preparing), as a
user's command would.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.measure import GIB, machine, peak_in_child, table
from knockon import models
from knockon.data import prepare, simulate, splits
from knockon.data.design import Simulation
from knockon.data.screen import Screen
from knockon.model import Recipe, Training, model_class
from knockon.models import scldm
from knockon.train import Options, train

LIMIT = 8 * GIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A screen, and how much is done with it."""

    model: str
    simulation: Simulation
    genes: int | None
    """Variable genes that are kept; None for all."""
    steps: int
    """Of training; of each stage where there are two."""
    validated: bool
    """Whether the last step is followed by a score on validation conditions."""


WIDE = dataclasses.replace(
    simulate.demo(), cells=4_000, genes=17_002, panel_share=1.0, depth=8_000.0, truth_cells=64
)
"""All genes of a genome, of which a cell has some 2,000."""
PLANS: Mapping[str, Plan] = {
    plan.model: plan
    for plan in (
        Plan(model="scdfm", simulation=simulate.norman(), genes=2000, steps=3, validated=False),
        Plan(model="scldm", simulation=WIDE, genes=None, steps=24, validated=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A plan, where its files go, and how many threads it has."""

    plan: Plan
    folder: Path
    threads: int

    @property
    def data(self) -> Path:
        return self.folder / "screen.h5ad"

    @property
    def recipe(self) -> Recipe:
        """The default one, cut short, its first stage as well."""
        recipe = models.recipe(self.plan.model)
        model = recipe.model
        if isinstance(model, scldm.Config):
            model = dataclasses.replace(model, stage_one=self.shortened(model.stage_one))
        return Recipe(model=model, train=self.shortened(recipe.train))

    def shortened(self, training: Training) -> Training:
        every = self.plan.steps if self.plan.validated else 0
        return dataclasses.replace(training, steps=self.plan.steps, validate_every=every)

    @property
    def options(self) -> Options:
        return Options(genes=self.plan.genes, device="cpu")


def simulate_screen(job: Job) -> None:
    simulate.simulate(job.plan.simulation).write_h5ad(job.data)


def read_screen(job: Job) -> Screen:
    counts = model_class(job.recipe.model).units == "counts"
    return Screen.read(job.data, layer="counts" if counts else None)


def prepare_screen(job: Job) -> None:
    screen = read_screen(job)
    known = splits.training(splits.make("additive", screen), screen)
    units = model_class(job.recipe.model).units
    prepare.apply(screen, prepare.fit(known, units=units, genes=job.plan.genes))


def train_model(job: Job) -> None:
    """A few steps of the default recipe, batch and all, that end in a finished run."""
    torch.set_num_threads(job.threads)
    train(job.recipe, read_screen(job), "additive", out=job.folder / "run", options=job.options)


STAGES = {
    "simulate": simulate_screen,
    "read": read_screen,
    "read, prepare": prepare_screen,
    "read, prepare, train": train_model,
}


def measure(job: Job) -> str:
    """Run all stages and return a table."""
    rows = []
    for name, stage in STAGES.items():
        peak = peak_in_child(stage, job)
        rows.append((name, f"{peak / GIB:.2f}", "yes" if peak < LIMIT else "no"))
    return table(["stage", "peak memory (GiB)", f"within {LIMIT / GIB:.0f} GiB"], rows)


def describe(plan: Plan) -> str:
    """Say what is done."""
    screen = plan.simulation
    kept = "all" if plan.genes is None else f"{plan.genes:,}"
    steps = f"{plan.steps} steps" + (" of each stage, and a validation," if plan.validated else "")
    return (
        f"Simulated screen of {screen.cells:,} cells x {screen.genes:,} genes, {kept} genes kept, {steps} of "
        f"the default recipe of {plan.model} on a CPU ({machine(torch.device('cpu'))})."
    )


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(PLANS), default=tuple(PLANS))
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    parts = []
    for plan in (PLANS[name] for name in options.models):
        asked = dataclasses.replace(plan, steps=options.steps or plan.steps)
        with tempfile.TemporaryDirectory() as folder:
            result = measure(Job(asked, Path(folder), options.threads))
        parts.append(f"{describe(asked)}\n\n{result}")
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
