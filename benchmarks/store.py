"""Memory and speed of training from a store, for screens of very different size; and of preparing them.

    python -m benchmarks.store [--cells 10000 100000 2000000] [--steps 60] [--models scdfm perturbdiff]

Screens of more than 100,000 cells are made of plates: four are simulated, of one network and one design, and
linked to as often as it takes, under other names of their cells. Every stage runs in a process of its own.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import GIB, in_turns, machine, peak_in_child, table
from knockon import models
from knockon.data import simulate, splits
from knockon.data.build import prepare
from knockon.data.sampler import Sampler
from knockon.data.screen import Screen
from knockon.model import Recipe
from knockon.run import Run
from knockon.train import Options, train
from knockon.types import CellSets

PLATE = 100_000
DISTINCT = 4
"""Plates that are simulated; more are links to them."""
LIMIT = 4 * GIB


@dataclasses.dataclass(frozen=True)
class Job:
    """A screen of so many cells, and what is done with it."""

    cells: int
    folder: Path
    steps: int
    threads: int
    memory: str

    @property
    def store(self) -> Path:
        return self.folder / f"store{self.cells}"

    @property
    def notes(self) -> Path:
        return self.folder / "notes.json"


def plates(job: Job) -> list[Path]:
    """Files of so many cells in all; those that are there are used again."""
    size = min(job.cells, PLATE)
    number = -(-job.cells // size)
    for distinct in range(min(number, DISTINCT)):
        path = _plate(job, size, distinct)
        if not path.exists():
            config = dataclasses.replace(
                simulate.demo(), cells=size + 4 * distinct
            )  # other cells of one network
            simulate.simulate(config).write_h5ad(path)
    for copy in range(DISTINCT, number):
        if not _plate(job, size, copy).exists():
            _plate(job, size, copy).hardlink_to(_plate(job, size, copy % DISTINCT))
    return [_plate(job, size, i) for i in range(number)]


def _plate(job: Job, size: int, number: int) -> Path:
    return job.folder / f"plate{size}_{number:02d}.h5ad"


def prepare_store(job: Job, paths: Sequence[Path]) -> None:
    began = time.perf_counter()
    prepare(paths, job.store, memory=job.memory)
    job.notes.write_text(json.dumps({"seconds": time.perf_counter() - began}))


def train_model(job: Job, name: str) -> None:
    """Train the small recipe from disk; note how long its steps took, and how long they waited for cells."""
    torch.set_num_threads(job.threads)
    asked, waited = [], []
    batch = Sampler.batch

    def timed(sampler: Sampler, *step: int) -> object:
        asked.append(time.perf_counter())
        made = batch(sampler, *step)
        waited.append(time.perf_counter() - asked[-1])
        return made

    Sampler.batch = timed  # pyright: ignore[reportAttributeAccessIssue]
    recipe = models.recipe(name, "small")
    training = dataclasses.replace(recipe.train, steps=job.steps, validate_every=0)
    began = time.perf_counter()
    train(
        Recipe(model=recipe.model, train=training),
        Screen.read(job.store),
        "additive",
        out=_run(job, name),
        options=Options(device="cpu", memory="0"),
    )
    rest = slice(len(asked) // 4, None)  # what the first steps take is not the rule
    lengths = [b - a for a, b in zip(asked[rest], asked[rest][1:], strict=False)]
    found = {
        "fit": asked[0] - began,
        "step": statistics.median(lengths),
        "waiting": sum(waited[rest]) / (asked[-1] - asked[rest][0] + waited[-1]),
    }
    job.notes.write_text(json.dumps(found))


def speed(jobs: Sequence[Job], name: str) -> list[list[str]]:
    """Processor time of steps from each job's store in turns, on weights of the first, without reading ahead.

    Other work on the machine moves times on the clock more than the stores do.
    """
    torch.set_num_threads(jobs[0].threads)
    run = Run.load(_run(jobs[0], name), screen=jobs[0].store)
    turn = itertools.count()
    makers = {job.cells: _sampler(run, job)._make for job in jobs}
    model = run.model.train()
    model.fit_statistics(splits.training(run.split, run.screen))  # what only training needs is not kept

    def read(cells: int) -> CellSets:
        return makers[cells](next(turn), 0)

    def step(cells: int) -> None:
        losses = model.loss(read(cells), torch.Generator().manual_seed(0))
        losses["total"].backward()

    tasks = {(kind, job.cells): partial(kind, job.cells) for kind in (read, step) for job in jobs}
    found = in_turns(tasks, repeats=jobs[0].steps, device=torch.device("cpu"))
    medians = {key: statistics.median(sample.processor for sample in some) for key, some in found.items()}
    first = medians[step, jobs[0].cells]
    rows = []
    for cells in (job.cells for job in jobs):
        reading, whole = medians[read, cells], medians[step, cells]
        rows.append(
            [name, f"{cells:,}", f"{1e3 * reading:.1f}", f"{1e3 * whole:.0f}", f"{first / whole:.2f}"]
        )
    return rows


def _sampler(run: Run, job: Job) -> Sampler:
    screen = run.prepared(Screen.read(job.store))
    training = run.record.train
    return Sampler(
        screen, run.model.spec, conditions=run.split.train, sets=training.sets, cells=training.cells, seed=0
    )  # fmt: skip


def _run(job: Job, name: str) -> Path:
    return job.folder / f"run_{name}_{job.cells}"


def measure(job: Job, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """One row about preparing, and one for each model."""
    paths = plates(job)
    peak = peak_in_child(prepare_store, job, paths)
    seconds = json.loads(job.notes.read_text())["seconds"]
    disk = sum(path.stat().st_size for path in job.store.rglob("*") if path.is_file())
    numbers = f"{seconds:.0f}", f"{job.cells / seconds:,.0f}", f"{peak / GIB:.2f}", f"{disk / GIB:.2f}"
    prepared = [f"{job.cells:,}", *numbers]
    rows = []
    for name in names:
        peak = peak_in_child(train_model, job, name)
        found = json.loads(job.notes.read_text())
        memory = f"{peak / GIB:.3f}", "yes" if peak < LIMIT else "no"
        speed = f"{1 / found['step']:.2f}", f"{found['waiting']:.1%}", f"{found['fit']:.0f}"
        rows.append([name, f"{job.cells:,}", *memory, *speed])
    return prepared, rows


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", type=int, default=(10_000, 100_000, 2_000_000))
    parser.add_argument("--models", nargs="+", default=("scdfm", "perturbdiff"))
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--memory", default="2GB", help="of prepare")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where plates are kept for another time")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as aside:
        folder = options.folder or Path(aside)
        prepared, rows = [], []
        jobs = [Job(n, folder, options.steps, options.threads, options.memory) for n in options.cells]
        for job in jobs:
            one, several = measure(job, options.models)
            prepared.append(one)
            rows += several
            print(one, *several, sep="\n", flush=True)
        steps = [line for name in options.models for line in speed(jobs, name)]
    rows.sort(key=lambda row: options.models.index(row[0]))
    header = ["model", "cells", "peak memory (GiB)", f"under {LIMIT / GIB:.0f} GiB", "steps/s"]
    text = "\n\n".join(
        (
            f"Simulated screens of the demo network (500 genes), the small recipes, {options.steps} steps, "
            f"values on disk, on a CPU ({machine(torch.device('cpu'))}).",
            table(["cells", "prepare (s)", "cells/s", "peak memory (GiB)", "store (GiB)"], prepared),
            table([*header, "waiting for cells", "until the first step (s)"], rows),
            "Processor time of batches of all stores in turns, on the same weights, in one process that "
            "reads nothing ahead:",
            table(["model", "cells", "read (ms)", "read and step (ms)", "steps/s, to the first"], steps),
        )
    )
    print(text)
    return text


if __name__ == "__main__":
    main()
