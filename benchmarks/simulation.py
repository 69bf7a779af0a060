"""Compare simulated screens with real ones, in one table and one picture.

    python benchmarks/simulation.py [--real ../shared/data] [--picture docs/images/simulation.png]

Every condition is cut to 100 cells, controls included, so that noise weighs the same everywhere.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.sparse as sp

from knockon.data.simulate import Simulation, demo, norman, simulate

CELLS = 100
COLORS = {"norman19": "#1b6ca8", "papalexi21": "#159a7c", "demo": "#e07a1f", "norman": "#b8327a"}


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What is compared: counts, library sizes and log1p values of cells with a perturbation each."""

    name: str
    counts: sp.csr_matrix
    logged: sp.csr_matrix
    library: np.ndarray
    perturbation: np.ndarray

    def rows(self, perturbation: str) -> np.ndarray:
        return np.flatnonzero(self.perturbation == perturbation)[:CELLS]


def read(path: Path, layer: str, library: str) -> Screen:
    real = ad.read_h5ad(path)
    return Screen(
        name=path.stem,
        counts=sp.csr_matrix(real.layers[layer]),
        logged=sp.csr_matrix(real.X),
        library=real.obs[library].to_numpy(float),
        perturbation=real.obs["perturbation"].to_numpy(str),
    )


def make(name: str, config: Simulation) -> Screen:
    """Simulate, and keep 500 random genes, as the real screens have."""
    screen = simulate(config)
    kept = np.random.default_rng(0).permutation(config.genes)[:500]
    screen = screen[:, np.sort(kept)]
    return Screen(
        name=name,
        counts=screen.layers["counts"],
        logged=screen.X,
        library=screen.obs["n_counts"].to_numpy(float),
        perturbation=screen.obs["perturbation"].to_numpy(str),
    )


def moments(screen: Screen) -> pd.DataFrame:
    """Mean count, dispersion and zero fraction of each gene, in all control cells."""
    rows = np.flatnonzero(screen.perturbation == "control")
    counts = screen.counts[rows].toarray()
    size = (screen.library[rows] / screen.library[rows].mean())[:, None]
    mean = counts.sum(0) / size.sum()
    excess = ((counts - size * mean) ** 2 - size * mean).sum(0)
    dispersion = excess / ((size**2).sum() * np.maximum(mean, 1e-9) ** 2)
    table = pd.DataFrame({"mean": mean, "dispersion": dispersion, "zeros": (counts == 0).mean(0)})
    return table[mean > 0.02]


def effects(screen: Screen) -> pd.DataFrame:
    """Length of each effect without its noise, and the genes that it moves."""
    control = screen.logged[screen.rows("control")].toarray()
    records = {}
    for name in sorted(set(screen.perturbation) - {"control"}):
        cells = screen.logged[screen.rows(name)].toarray()
        delta = cells.mean(0) - control.mean(0)
        variance = cells.var(0, ddof=1) / len(cells) + control.var(0, ddof=1) / len(control)
        moved = np.abs(delta) > 4 * np.sqrt(variance) + 0.05
        length = np.sqrt(max(0.0, (delta**2).sum() - variance.sum()))
        records[name] = {"length": length, "moved": moved.sum(), "double": "+" in name}
    return pd.DataFrame(records).T.infer_objects()


def additivity(screen: Screen) -> pd.DataFrame:
    """Each double against the sum of its singles: correlation, slope without noise, residual beyond it."""
    groups = {name: screen.logged[screen.rows(name)].toarray() for name in set(screen.perturbation)}
    mean = {name: cells.mean(0) for name, cells in groups.items()}
    noise = {name: (cells.var(0, ddof=1) / len(cells)).sum() for name, cells in groups.items()}
    records = []
    for name in sorted(mean):
        parts = name.split("+")
        if len(parts) != 2 or any(part not in mean for part in parts):
            continue
        double, one, two = (mean[key] - mean["control"] for key in (name, *parts))
        both = one + two
        # The three effects share the control cells, whose noise would pass for agreement.
        length = both @ both - noise[parts[0]] - noise[parts[1]] - 4 * noise["control"]
        excess = ((double - both) ** 2).sum() - sum(noise[key] for key in (name, *parts, "control"))
        clear = length > noise["control"]
        records.append(
            {
                "correlation": np.corrcoef(both, double)[0, 1],
                "slope": (both @ double - 2 * noise["control"]) / length if clear else np.nan,
                "sum": np.sqrt(max(0.0, length)),
                "double": np.sqrt(max(0.0, double @ double - noise[name] - noise["control"])),
                "residual": np.sqrt(max(0.0, excess)),
            }
        )
    return pd.DataFrame(records, columns=["correlation", "slope", "sum", "double", "residual"])


def summary(screen: Screen) -> dict[str, str]:
    """One column of the table; quartiles as low / middle / high."""
    genes, effect, double = moments(screen), effects(screen), additivity(screen)
    effect = effect.astype({"length": float, "moved": float, "double": bool})
    single = effect[~effect["double"]]
    seen = np.asarray((screen.counts > 0).mean(0)).ravel() > 0
    density = screen.counts.nnz / (screen.counts.shape[0] * max(seen.sum(), 1))

    def quartiles(values: pd.Series, digits: int = 2) -> str:
        if not len(values):
            return "-"
        return " / ".join(f"{v:.{digits}f}" for v in values.quantile([0.25, 0.5, 0.75]))

    def of_genes(low: float, high: float) -> str:
        chosen = genes[(genes["mean"] >= low) & (genes["mean"] < high)]
        return quartiles(chosen["dispersion"])

    return {
        "cells x genes": f"{screen.counts.shape[0]:,} x {screen.counts.shape[1]:,}",
        "genes ever seen": f"{seen.sum():,}",
        "zeros among genes ever seen": f"{1 - density:.3f}",
        "median library size": f"{np.median(screen.library):,.0f}",
        "sd of log library size": f"{np.log(screen.library).std():.2f}",
        "dispersion, mean count 0.1 to 0.3": of_genes(0.1, 0.3),
        "dispersion, mean count 0.3 to 1": of_genes(0.3, 1),
        "dispersion, mean count 1 to 10": of_genes(1, 10),
        "length of single effects": quartiles(single["length"]),
        "largest single effect": f"{single['length'].max():.2f}",
        "singles shorter than 0.3": f"{(single['length'] < 0.3).mean():.0%}",
        "genes moved by a single": quartiles(single["moved"], 0),
        "most genes moved": f"{effect['moved'].max():.0f}",
        "doubles with both singles": f"{len(double)}",
        "correlation with the sum": quartiles(double["correlation"]),
        "slope on the sum, without noise": quartiles(double["slope"]),
        "residual beyond noise": quartiles(double["residual"]),
        "residual / sum": quartiles((double["residual"] / double["sum"])[double["slope"].notna()]),
    }


def ecdf(axis: plt.Axes, values: pd.Series, screen: Screen) -> None:
    ordered = np.sort(values.to_numpy(float))
    axis.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", color=COLORS[screen.name])


def draw(screens: list[Screen], path: Path) -> None:
    mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    panels: list[tuple[str, str, str, Callable[[plt.Axes, Screen], None]]] = [
        ("Library sizes", "counts of a cell", "density", _library),
        ("Dispersion falls with the mean", "mean count of a gene", "dispersion in control cells", _trend),
        ("Zeros follow the mean", "mean count of a gene", "share of zeros", _zeros),
        ("Effects of singles, free of noise", "length of the effect (log1p)", "share of singles", _lengths),
        ("Genes that a single moves", "genes with |z| > 4", "share of singles", _moved),
        (
            "Doubles against the sum, free of noise",
            "length of the sum of singles",
            "length of the double",
            _doubles,
        ),
    ]
    for axis, (title, x, y, fill) in zip(axes.flat, panels, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
        for screen in screens:
            fill(axis, screen)
    axes[1, 2].axline((0, 0), slope=1, color="0.6", lw=0.8, ls="--")
    handles = [mpl.lines.Line2D([], [], color=COLORS[s.name], lw=3) for s in screens]
    kinds = {"norman19": "real", "papalexi21": "real"}
    names = [f"{s.name} ({kinds.get(s.name, 'simulated')})" for s in screens]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _library(axis: plt.Axes, screen: Screen) -> None:
    axis.set(xlim=(0, 40_000))
    bins = np.linspace(0, 40_000, 60)
    axis.hist(screen.library, bins=bins, density=True, histtype="step", color=COLORS[screen.name])
    axis.set(yticks=[], xticks=[0, 10_000, 20_000, 30_000, 40_000])


def _trend(axis: plt.Axes, screen: Screen) -> None:
    """Plot genes, and the median of each decade of means as a line."""
    axis.set(xscale="log", yscale="log", ylim=(0.03, 20), xlim=(0.05, 300))
    genes = moments(screen)
    genes = genes[genes["mean"] > 0.05]
    color = COLORS[screen.name]
    axis.scatter(genes["mean"], genes["dispersion"], s=3, alpha=0.3, color=color)
    groups = genes.groupby((np.log10(genes["mean"]) * 2).round())
    middle = groups.median()[groups.size() >= 5]
    middle = middle[middle["dispersion"] > 0]
    axis.plot(middle["mean"], middle["dispersion"], color=color, lw=1.8)


def _zeros(axis: plt.Axes, screen: Screen) -> None:
    axis.set_xscale("log")
    genes = moments(screen)
    axis.scatter(genes["mean"], genes["zeros"], s=4, alpha=0.4, color=COLORS[screen.name])


def _lengths(axis: plt.Axes, screen: Screen) -> None:
    effect = effects(screen)
    ecdf(axis, effect["length"][~effect["double"].astype(bool)], screen)


def _moved(axis: plt.Axes, screen: Screen) -> None:
    axis.set_xscale("symlog", linthresh=1)
    effect = effects(screen)
    ecdf(axis, effect["moved"][~effect["double"].astype(bool)], screen)


def _doubles(axis: plt.Axes, screen: Screen) -> None:
    pairs = additivity(screen)
    axis.scatter(pairs["sum"], pairs["double"], s=10, alpha=0.7, color=COLORS[screen.name])


def main() -> None:
    here = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--real", type=Path, default=here.parent / "shared" / "data")
    parser.add_argument("--picture", type=Path, default=here / "docs" / "images" / "simulation.png")
    arguments = parser.parse_args()
    screens = [
        read(arguments.real / "norman19.h5ad", "counts_approx", "lib_size_approx"),
        read(arguments.real / "papalexi21.h5ad", "counts", "n_umi"),
        make("demo", demo()),
        make("norman", replace(norman(), cells=30_000)),
    ]
    table = pd.DataFrame({screen.name: summary(screen) for screen in screens})
    header = ["statistic", *table.columns]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in table.itertuples():
        print("| " + " | ".join(row) + " |")
    draw(screens, arguments.picture)


if __name__ == "__main__":
    main()
