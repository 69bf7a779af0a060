"""Does PerturbDiff gain from another screen, where its own has a tenth of the cells?

    python -m benchmarks.pretraining [--seeds 0 1] [--steps 400]

A simulated screen is cut in two: a tenth of the cells of every condition, to train on, and nine tenths,
without the conditions that are held out and without labels, to pretrain on. All runs predict the same
held-out doubles, and are scored against all of their cells.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

import knockon as ko
from benchmarks.measure import table
from knockon.data import simulate, splits
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.evaluate import suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.truth import Truth
from knockon.model import Recipe
from knockon.models import perturbdiff

METRICS = ("mse", "pearson_delta", "energy_distance", "variance_corr", "zero_fraction_error")
SHARE = 10
"""One cell of so many is in the small screen."""


def cut(adata: anndata.AnnData, held: Sequence[str], seed: int) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Cut into the small screen, and cells to pretrain on that are in neither it nor the test."""
    rng = np.random.default_rng(seed)
    small = np.zeros(adata.n_obs, dtype=bool)
    names = adata.obs["perturbation"].astype(str).to_numpy()
    for name in np.unique(names):
        cells = np.flatnonzero(names == name)
        small[rng.permutation(cells)[: max(2, len(cells) // SHARE)]] = True
    return adata[small].copy(), adata[~small & ~np.isin(names, held)].copy()


def run(seed: int, steps: int, folder: Path) -> Mapping[str, Mapping[str, float]]:
    """Score each way of training by the mean of each metric over the test conditions."""
    adata = simulate.simulate(replace(simulate.demo(), seed=seed))
    whole = Screen.from_anndata(adata)
    whole_split = splits.additive(whole)
    test, truth = whole_split.test, Truth.of(whole, whole_split)
    little, rest = cut(adata, [label.perturbation for label in test], seed)
    screen = Screen.from_anndata(little)
    kept = tuple(label for label in screen.conditions if label not in set(test))
    split = replace(splits.everything(screen), kind="custom", train=kept, test=test)

    recipe = perturbdiff.default()
    training = replace(recipe.train, seed=seed)
    pretrained = ko.train(
        Recipe(model=perturbdiff.marginal().model, train=replace(training, steps=2 * steps)),
        Screen.from_anndata(rest, columns=Columns(unlabelled=True)),
        "none",
        out=folder / "pretrained",
    )
    plain = replace(perturbdiff.marginal().model, marginal=False, control_dropout=0.0)
    ways = {
        "no effect": (ko.models.recipe("no_effect"), None),
        "additive": (ko.models.recipe("additive"), None),
        "from scratch": (Recipe(model=plain, train=replace(training, steps=steps)), None),
        "from scratch, three times the steps": (
            Recipe(model=plain, train=replace(training, steps=3 * steps)),
            None,
        ),
        "fine-tuned": (Recipe(model=plain, train=replace(training, steps=steps)), pretrained.folder),
        "from scratch, residual": (Recipe(model=recipe.model, train=replace(training, steps=steps)), None),
    }
    found = {}
    for i, (name, (asked, start)) in enumerate(ways.items()):
        trained = ko.train(asked, screen, split, out=folder / str(i), start=start)
        cells = trained.predict("test", cells=128)
        scores = suites.score(Pairs.align(cells, truth), "core")
        found[name] = scores.groupby("metric")["value"].mean().to_dict()
        print(seed, name, {metric: round(found[name][metric], 4) for metric in METRICS}, flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400, help="of training; pretraining takes twice as many")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, scores in run(seed, options.steps, Path(folder) / str(seed)).items():
                rows.append((seed, name, *(scores[metric] for metric in METRICS)))
    frame = pd.DataFrame(rows, columns=["seed", "training", *METRICS])
    lines = [(r[0], r[1], *(f"{value:.4f}" for value in r[2:])) for r in frame.itertuples(index=False)]
    text = f"{options.steps} steps, twice as many of pretraining.\n\n" + table(list(frame.columns), lines)
    print(text)
    return text


if __name__ == "__main__":
    main()
