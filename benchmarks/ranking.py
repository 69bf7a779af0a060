"""Does a ranking by interaction find the interactions that are there?

    python benchmarks/ranking.py [MODEL[:PRESET] ...] [--seed 0] [--runs FOLDER]

The preset ``interaction`` measures 60 of the 120 pairs of its perturbations; the other 60 are ranked, and
compared with the noise-free truth. The last line ranks fresh real cells of them, as many as a condition of
the screen has: what an experiment would find.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import knockon as ko
from knockon import models
from knockon.data.simulate import interaction, simulate, truth
from knockon.ranking.rank import excess, length, square
from knockon.ranking.source import Draws, OfFile, OfRun, Source

FIRST = 10


def true_scores(world: ad.AnnData, pairs: list[str]) -> pd.DataFrame:
    """What ``knockon rank`` estimates, from the expectations of the simulated screen."""
    means = truth(world)
    change = means - means.loc["control"]
    scores = []
    for pair in pairs:
        both = np.tile(change.loc[pair], (3, 1))
        expected = np.tile(sum(change.loc[name] for name in pair.split("+")), (3, 1))
        along = excess(both, expected)
        scores.append({"effect": length(square(both)), "synergy": along, "buffering": -along})
    return pd.DataFrame(scores, index=pairs)


def replicate(world: ad.AnnData, screen: ko.Screen, pairs: list[str]) -> OfFile:
    """Real cells of the pairs and their parts, as if a model had predicted them."""
    parts = {name for pair in pairs for name in pair.split("+")}
    cells = world[world.obs["perturbation"].isin({"control", *parts, *pairs}).to_numpy()].copy()
    controls = cells.obs_names[cells.obs["control"]]
    cells.obs["control_cell"] = np.random.default_rng(0).choice(controls, cells.n_obs)
    cells.obs.loc[controls, "control_cell"] = controls
    del cells.layers["counts"], cells.varm, cells.uns
    cells.uns["knockon"] = {"screen": screen.digest, "units": "log1p", "total": -1.0, "share": 1.0}
    return OfFile(cells, screen)


def line(name: str, source: Source, pairs: list[str], scores: pd.DataFrame) -> dict[str, object]:
    found: dict[str, object] = {"model": name}
    for by in ("effect", "synergy", "buffering"):
        table = ko.rank(source, pairs, by=by, draws=Draws()).set_index("condition")
        true = scores.loc[table.index, by]
        found[f"{by} rho"] = round(float(table["score"].corr(true, method="spearman")), 2)
        best = set(true.nlargest(FIRST).index)
        found[f"{by} first {FIRST}"] = len(best & set(table.index[:FIRST]))
        if by != "effect":
            share = ((table["low"] <= true) & (true <= table["high"])).mean()
            found[f"{by} covered"] = round(float(share), 2)
    return found


def main(show: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["additive", "nearest", "linear"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.mkdtemp()))
    asked = parser.parse_args()
    config = replace(interaction(), seed=asked.seed)
    screen = ko.Screen.from_anndata(simulate(config))
    every = config.singles * (config.singles - 1) // 2
    # the same world with all its pairs, and as many cells of each condition
    world = simulate(replace(config, doubles=every, cells=config.cells * 2))
    split = ko.splits.make("none", screen)
    lines, pairs, scores = [], [], pd.DataFrame()
    for name in asked.models:
        kind, _, preset = name.partition(":")
        recipe = models.recipe(kind, preset or "default")
        run = ko.train(recipe, screen, split, out=asked.runs / f"{name.replace(':', '-')}-{asked.seed}")
        source = OfRun(run)
        pairs = [str(label) for label in source.candidates()]
        scores = true_scores(world, pairs)
        lines.append(line(name, source, pairs, scores))
        show(str(lines[-1]))
    lines.append(line("real cells", replicate(world, screen, pairs), pairs, scores))
    show(pd.DataFrame(lines).to_string(index=False))


if __name__ == "__main__":
    main()
