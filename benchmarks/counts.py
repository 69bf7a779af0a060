"""How well does scLDM tell cells again, and how well does it generate them?

    python -m benchmarks.counts [--data SCREEN.h5ad] [--steps 800] [--flow-steps 2000] [--split FILE]

On a screen with counts: the autoencoder with count embeddings that see magnitudes and with one that does not,
beside a negative binomial of each gene with library size; then cells of the test conditions, beside a floor
(genes drawn independently with the *real* means of the condition), the simple baselines, and real cells.
On a simulated screen of several cell types: a linear probe of the cell type on the latents.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

import knockon as ko
from benchmarks.measure import table
from knockon.data import simulate, splits
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.embed import embed
from knockon.evaluate import reconstruction, scores, suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.truth import Truth
from knockon.model import Recipe
from knockon.models import scldm, scldm_vae
from knockon.run import Run

EMBEDDINGS = ("modulated", "projconcat", "log1p")
CELLS = 256


def autoencoder(screen: Screen, split: Split, embedding: str, steps: int, folder: Path) -> Run:
    """Train the default autoencoder with this count embedding."""
    recipe = scldm_vae.default()
    assert isinstance(recipe.model, scldm_vae.Config)
    config = replace(recipe.model, embedding=embedding)  # pyright: ignore[reportArgumentType]
    return ko.train(
        Recipe(model=config, train=replace(recipe.train, steps=steps)), screen, split, out=folder / embedding
    )


def reconstruct(screen: Screen, split: Split, runs: Sequence[Run]) -> str:
    """Score cells of test conditions, told again by each autoencoder; the floor is the same for all."""
    rows = np.concatenate([screen.rows[label] for label in split.test])
    found = {run.folder.name: reconstruction.score(run, run.screen, rows) for run in runs}
    frame = pd.concat(found, names=["embedding", ""]).reset_index("embedding")
    lines = [tuple(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row) for row in frame.to_numpy()]
    return f"{len(rows):,} cells of {len(split.test)} test conditions.\n\n" + table(
        list(frame.columns), lines
    )


def independent(screen: Screen, split: Split, truth: Truth) -> anndata.AnnData:
    """Draw genes independently: real means of each test condition, dispersions of training cells."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([screen.rows[label] for label in (*split.train, *screen.controls)])
    counts = screen.gather(rows).astype(np.float64)
    mean = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    excess = (np.square(counts - mean) - mean).sum(0) / np.square(mean).sum(0).clip(1e-12)
    inverse = 1 / excess.clip(1e-3)
    blocks, labels = [], []
    for label in truth.labels:
        real = screen.cells_of(label).astype(np.float64)
        sizes = screen.gather(screen.control_rows(label)).sum(1)
        wanted = rng.choice(sizes, CELLS)[:, None] * real.sum(0) / real.sum()
        blocks.append(rng.poisson(rng.gamma(inverse, size=wanted.shape) * wanted / inverse))
        labels += [label] * CELLS
    obs = pd.DataFrame({"perturbation": [label.perturbation for label in labels]})
    for i, covariate in enumerate(screen.covariates):
        obs[covariate.name] = [label.covariates[i] for label in labels]
    obs.index = obs.index.astype(str)
    matrix = sp.csr_matrix(np.concatenate(blocks).astype(np.float32))
    made = anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=list(screen.genes)))
    made.uns["knockon"] = {"units": "counts"}
    return made


def generate(screen: Screen, split: Split, vae: Run, steps: int, folder: Path) -> str:
    """Score generated cells of test conditions by the suite ``generation``."""
    recipe = scldm.default()
    assert isinstance(recipe.model, scldm.Config)
    flow = ko.train(
        Recipe(model=replace(recipe.model, vae=str(vae.folder)), train=replace(recipe.train, steps=steps)),
        screen, split, out=folder / "flow",
    )  # fmt: skip
    truth = Truth.of(screen, split)
    made = {
        "scldm": flow.predict("test", cells=CELLS),
        "independent genes": independent(screen, split, truth),
    }
    found = [
        suites.score(Pairs.align(cells, truth), "generation").assign(model=name)
        for name, cells in made.items()
    ]
    wide = pd.concat([*found, scores.anchors(truth, split, "generation")])
    wide = wide.pivot_table(index="metric", columns="model", values="value", sort=False)
    lines = [
        (name, *(f"{value:.4f}" for value in row))
        for name, row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return table(["metric", *map(str, wide.columns)], lines)


def probe(steps: int, folder: Path) -> str:
    """Tell the cell type from latents by logistic regression, on cells that neither part has seen."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 (only here)
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    adata = simulate.simulate(replace(simulate.contexts(), cells=4_000))
    screen = Screen.from_anndata(adata, columns=Columns(layer="counts"))
    split = splits.random(screen)
    rows = {
        part: np.concatenate([screen.rows[x] for x in getattr(split, part)]) for part in ("train", "test")
    }
    types = {part: adata.obs["cell_type"].to_numpy()[found].astype(str) for part, found in rows.items()}
    lines = []
    for name in EMBEDDINGS:
        run = autoencoder(screen, split, name, steps, folder / "probe")
        latents = {part: embed(run.model, run.screen, found).numpy() for part, found in rows.items()}
        scaler = StandardScaler().fit(latents["train"])
        model = LogisticRegression(max_iter=1000).fit(scaler.transform(latents["train"]), types["train"])
        accuracy = model.score(scaler.transform(latents["test"]), types["test"])
        most = max(np.mean(types["test"] == x) for x in set(types["test"]))
        lines.append((name, f"{accuracy:.3f}", f"{most:.3f}"))
    return table(["embedding", "accuracy", "most frequent type"], lines)


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print, and return the lines for the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="its layer counts is read; the simulated demo without it")
    parser.add_argument("--covariate-keys", nargs="*", default=None)
    parser.add_argument("--split", default="additive", help="kind or file")
    parser.add_argument(
        "--steps", type=int, default=scldm_vae.default().train.steps, help="of the autoencoder"
    )
    parser.add_argument("--flow-steps", type=int, default=scldm.default().train.steps)
    options = parser.parse_args(arguments)
    if options.data is None:
        screen = Screen.from_anndata(simulate.simulate(simulate.demo()), columns=Columns(layer="counts"))
    else:
        screen = Screen.read(options.data, layer="counts", covariate_keys=options.covariate_keys)
    split = splits.make(options.split, screen)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [autoencoder(screen, split, kind, options.steps, folder) for kind in EMBEDDINGS]
        parts = [reconstruct(screen, split, runs)]
        parts.append(generate(screen, split, runs[0], options.flow_steps, folder))
        parts.append(probe(options.steps, folder))
    text = "\n\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    main()
