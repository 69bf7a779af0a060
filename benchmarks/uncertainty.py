"""Do the standard errors of predicted means hold? Shares of true means that lie within intervals.

    python -m benchmarks.uncertainty [--screens demo interaction contexts] [--seeds 211 212 213]
    python -m benchmarks.uncertainty --tasks papalexi21-replicates kang18-context [--out runs/results]

Test conditions of simulated screens, whose true means are known; or of the screens of `benchmarks.results`,
where the measured means stand for them, and their own sampling errors are added. An interval of 50 % or 90 %
is as many standard errors wide as that of a normal distribution; *size* is the root mean square of the
standard errors as a multiple of that of the errors, so that 1 is right. Genes that change by more than .25
(log1p) stand alone, too.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import norm

from benchmarks.jobs import Task
from benchmarks.measure import table
from benchmarks.results import TASKS
from knockon.data import conventions, prepare, splits
from knockon.data.screen import Screen
from knockon.data.simulate import contexts, demo, interaction, simulate, truth
from knockon.data.splits import Split
from knockon.models.response_surface import Config, ResponseSurface
from knockon.types import Label
from knockon.uncertainty import FITS, misses, refits

SIMULATED = {"demo": demo, "interaction": interaction, "contexts": contexts}
LEVELS = (0.5, 0.9)
CHANGES = 0.25
"""Least change of a gene that counts as one, log1p."""

Values = Float[np.ndarray, "conditions genes"]


def fitted(screen: Screen, split: Split) -> tuple[ResponseSurface, Screen]:
    """Fit to all but the test conditions, which come back as well."""
    train = screen.select((*split.train, *split.validation, *screen.controls))
    model = Config(missing="mean").build(train.spec())
    model.fit_statistics(train)
    return model, train


def kinds(model: ResponseSurface, train: Screen, labels: Sequence[Label]) -> dict[str, Values]:
    """Standard errors of each kind."""
    again, missed = refits(model, train, labels, FITS), misses(model, train, labels)
    return {"none": np.zeros_like(again), "refits": again, "misses": missed, "both": np.hypot(again, missed)}


def covered(off: Values, error: Values, changed: Values) -> dict[str, float]:
    """Shares of errors that lie within intervals, and how large standard errors are beside them."""
    row = {"size": float(np.sqrt(np.square(error).mean() / np.square(off).mean()))}
    for genes, some in (("all", off >= 0), ("changed", changed)):
        for level in LEVELS:
            inside = off[some] <= norm.ppf((1 + level) / 2) * error[some]
            row[f"{genes}, {level:.0%}"] = float(inside.mean())
    return row


def simulated(name: str, seed: int) -> Iterator[dict[str, object]]:
    """Hold against the truth."""
    made = simulate(replace(SIMULATED[name](), seed=seed))
    screen, true = Screen.from_anndata(made), truth(made)
    split = splits.context(screen, fraction=0.34) if screen.covariates else splits.additive(screen)

    names = {conventions.parse(name, known=screen.spec().perturbations): name for name in true.index}

    wanted, base = (
        true.loc[[names[x] for x in some]].to_numpy()
        for some in (split.test, [x.control() for x in split.test])
    )
    yield from held(name, screen, split, wanted, base, np.zeros_like(wanted))


def measured(task: Task, out: Path) -> Iterator[dict[str, object]]:
    """Hold against what was measured, in every fold of a task."""
    whole = task.screen(out)
    for split in task.folds(whole).values():
        how = prepare.fit(splits.training(split, whole), units="log1p", genes=task.genes)
        screen = prepare.apply(whole, how)
        found = [screen.moments[label] for label in split.test]
        base = np.stack([screen.moments[label.control()].mean for label in split.test])
        noise = np.stack([np.square(one.std) / one.cells for one in found])
        yield from held(task.name, screen, split, np.stack([one.mean for one in found]), base, noise)


@torch.no_grad()
def held(
    name: str, screen: Screen, split: Split, wanted: Values, base: Values, noise: Values
) -> Iterator[dict[str, object]]:
    """Hold each kind of standard error against errors that have a noise of their own."""
    model, train = fitted(screen, split)
    off = np.abs(model.mean(model.spec.encode(split.test)).double().numpy() - wanted)
    for kind, error in kinds(model, train, split.test).items():
        row = covered(off, np.sqrt(np.square(error) + noise), np.abs(wanted - base) > CHANGES)
        yield {"screen": name, "from": kind, **row}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, means over seeds or folds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--screens", nargs="*", choices=tuple(SIMULATED), default=tuple(SIMULATED))
    parser.add_argument("--seeds", nargs="+", type=int, default=(211, 212, 213))
    parser.add_argument("--tasks", nargs="*", choices=[task.name for task in TASKS], default=())
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the tasks' screens")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for name in asked.screens for seed in asked.seeds for row in simulated(name, seed)]
    rows += [row for task in TASKS if task.name in asked.tasks for row in measured(task, asked.out)]
    shown = pd.DataFrame(rows).groupby(["screen", "from"], sort=False).mean().reset_index()
    texts = shown.map(lambda value: value if isinstance(value, str) else f"{value:.2f}")
    print(table(list(shown.columns), texts.to_numpy().tolist()))


if __name__ == "__main__":
    main()
