"""How far off are predicted means, and does anything tell? Standard errors of `response_surface`.

    python -m benchmarks.uncertainty [--screens demo interaction] [--seeds 201 202 203] [--fits 10]

Simulated screens, additive split, whose true means are known. A standard error of each gene of each held-out
double is taken from *refits*: the spread of fits to cells that were drawn again, with replacement, within
each condition; from *misses*: the root mean square of what training doubles were missed by when they were
predicted as if they had not been measured, less what the noise of their own cells adds; or from *both*. An
interval of 50 % or 90 % is as many standard errors wide as that of a normal distribution; the table has the
share of true means that lie in it. The mean of the refits is held against the one fit, too.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import norm

from benchmarks.ablation import SCREENS
from benchmarks.measure import table
from knockon.data import splits
from knockon.data.screen import Screen
from knockon.data.simulate import simulate, truth
from knockon.data.splits import Split
from knockon.models.response_surface import Config, ResponseSurface
from knockon.types import CONTROL, Label

Values = Float[np.ndarray, "conditions genes"]

LEVELS = (0.5, 0.9)
CHANGES = 0.25
"""Least true change of a gene that counts as one, log1p."""


def fitted(train: Screen) -> ResponseSurface:
    """Fit to training cells."""
    model = Config(missing="mean").build(train.spec())
    model.fit_statistics(train)
    return model


def drawn_again(train: Screen, seed: int) -> Screen:
    """Draw the cells of each condition with replacement."""
    draw = np.random.default_rng(seed)
    rows = {label: np.sort(draw.choice(some, len(some))) for label, some in train.rows.items()}
    return replace(train, rows=rows)


@torch.no_grad()
def predicted(model: ResponseSurface, labels: Sequence[Label]) -> Values:
    """Means of conditions."""
    return model.mean(model.spec.encode(labels)).double().numpy()


@torch.no_grad()
def misses(model: ResponseSurface, train: Screen) -> Float[np.ndarray, "genes"]:
    """Root mean square over training doubles of what they are missed by, without the noise of their cells."""
    doubles = [label for label in train.conditions if len(label.perturbations) > 1]
    held = model.held_out(model.spec.encode(doubles)).double().numpy()
    found = [train.moments[label] for label in doubles]
    noise = np.stack([np.square(one.std) / one.cells for one in found])
    squares = (np.square(held - np.stack([one.mean for one in found])) - noise).mean(0)
    genes = np.square(model.spread.double().numpy())
    # genes of few cells say little alone: half of what is said is that of all genes, in units of their noise
    shared = genes * (squares.sum() / genes.sum()).clip(min=0)
    return np.sqrt((squares.clip(min=0) + shared) / 2)


def measured(screen: Screen, split: Split, true: pd.DataFrame, fits: int) -> pd.DataFrame:
    """Coverage of each kind of standard error, and errors of one fit and of the mean of refits."""
    train = screen.select((*split.train, *split.validation, *screen.controls))
    model = fitted(train)
    mean = predicted(model, split.test)
    again = np.stack([predicted(fitted(drawn_again(train, seed)), split.test) for seed in range(fits)])
    refits, missed = again.std(0, ddof=1), np.broadcast_to(misses(model, train), mean.shape)
    wanted = true.loc[[str(label) for label in split.test]].to_numpy()
    off = np.abs(mean - wanted)
    changed = np.abs(wanted - true.loc[CONTROL].to_numpy()) > CHANGES
    rows = []
    for name, error in (("refits", refits), ("misses", missed), ("both", np.hypot(refits, missed))):
        row: dict[str, object] = {"standard error": name}
        for genes, some in (("all", np.ones_like(changed)), ("changed", changed)):
            for level in LEVELS:
                inside = off[some] <= norm.ppf((1 + level) / 2) * error[some]
                row[f"{genes}, {level:.0%}"] = inside.mean()
        rows.append(row | {"error / truth": np.sqrt(np.square(error).mean() / np.square(off).mean())})
    errors = {"one fit": np.square(off).mean(), "mean of refits": np.square(again.mean(0) - wanted).mean()}
    return pd.DataFrame(rows).assign(**errors)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--screens", nargs="+", choices=tuple(SCREENS), default=tuple(SCREENS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(201, 202, 203))
    parser.add_argument("--fits", type=int, default=10)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = []
    for name in asked.screens:
        for seed in asked.seeds:
            made = simulate(replace(SCREENS[name](), seed=seed))
            screen = Screen.from_anndata(made)
            found = measured(screen, splits.additive(screen), truth(made), asked.fits)
            parts.append(found.assign(screen=name, seed=seed))
    means = pd.concat(parts).groupby(["screen", "standard error"], sort=False).mean(numeric_only=True)
    shown = means.drop(columns="seed").reset_index()
    print(
        table(
            list(shown.columns),
            [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in shown.to_numpy()],
        )
    )


if __name__ == "__main__":
    main()
