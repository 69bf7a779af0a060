"""Peak memory of each stage of a large screen's way from a file to training.

    python -m benchmarks.memory [--preset norman] [--genes 2000] [--steps 3]

Every stage runs in a process of its own that also does what comes before it (reading, preparing), as a
user's command would.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import GIB, machine, peak_in_child, table
from knockon import models
from knockon.data import prepare, simulate, splits
from knockon.data.screen import Screen
from knockon.model import Recipe
from knockon.train import Options, train

LIMIT = 8 * GIB


@dataclasses.dataclass(frozen=True)
class Job:
    """A screen, and how much is done with it."""

    folder: Path
    preset: str
    genes: int
    steps: int
    threads: int

    @property
    def data(self) -> Path:
        return self.folder / "screen.h5ad"


def simulate_screen(job: Job) -> None:
    simulate.simulate(getattr(simulate, job.preset)()).write_h5ad(job.data)


def read_screen(job: Job) -> Screen:
    return Screen.read(job.data)


def prepare_screen(job: Job) -> None:
    screen = read_screen(job)
    known = splits.training(splits.make("additive", screen), screen)
    prepare.apply(screen, prepare.fit(known, units="log1p", genes=job.genes))


def train_model(job: Job) -> None:
    """A few steps of the default recipe, batch and all, that end in a finished run."""
    torch.set_num_threads(job.threads)
    recipe = models.recipe("scdfm")
    short = dataclasses.replace(recipe.train, steps=job.steps, validate_every=0)
    options = Options(genes=job.genes, device="cpu")
    train(
        Recipe(model=recipe.model, train=short),
        read_screen(job),
        "additive",
        out=job.folder / "run",
        options=options,
    )


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


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="norman", help="simulated screen")
    parser.add_argument("--genes", type=int, default=2000, help="variable genes that are kept")
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), options.preset, options.genes, options.steps, options.threads)
        result = measure(job)
    text = (
        f"Simulated screen `{options.preset}`, {options.genes:,} genes kept, {options.steps} steps of the "
        f"default recipe of scDFM on a CPU ({machine(torch.device('cpu'))}).\n\n{result}"
    )
    print(text)
    return text


if __name__ == "__main__":
    main()
