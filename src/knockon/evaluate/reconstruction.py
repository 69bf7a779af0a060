"""How well latents tell the cells that they were made of, beside a floor that knows only library sizes.

Conventions, all named. ``nll``: negative log-likelihood of all genes of a cell given its true library size,
in nats, a mean over cells; it depends on the panel and the depth, so it is compared within a screen and a
split only. The others are of log1p of counts per 10,000, for which both sides are divided by their own
totals. ``pcc``: Pearson correlation of each gene over all scored cells at once (not within batches), a mean
over the genes whose true values vary; a gene whose reconstruction does not vary counts as 0. ``mse``: a mean
over all entries. ``zeros``: share of entries that are zero, or not, on both sides.

``samples`` are counts drawn from the likelihood, as in published tables, and ``means`` are its expectations.
Drawing costs half of a correlation or more, so the two are never compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from knockon.data import splits, values
from knockon.data.screen import Screen
from knockon.dynamics.likelihood import negative_binomial_of_cells
from knockon.evaluate.metrics import FLAT
from knockon.model import Model, device_of, name_of
from knockon.models.scldm import LatentFlow
from knockon.models.scldm_vae import SetAutoencoder
from knockon.nn.counts import normalized
from knockon.run import Run
from knockon.types import Noise, UserError

BLOCK = 256
"""Cells that are reconstructed at once."""
LARGEST = 1e6
"""Dispersion r of a gene whose counts vary no more than Poisson counts do."""
FLOOR = "floor"
METRICS = {
    "nll": "lower",
    "pcc_samples": "higher",
    "pcc_means": "higher",
    "mse_samples": "lower",
    "mse_means": "lower",
    "zeros_samples": "higher",
}
"""Scores in the order of tables, and which is better."""


class Reconstructed(NamedTuple):
    """Cells once more: their negative log-likelihoods, and their counts drawn and expected."""

    nll: Float[Tensor, "cells"]
    samples: Float[Tensor, "cells genes"]
    means: Float[Tensor, "cells genes"]


Reconstruct = Callable[[Float[Tensor, "cells genes"], Noise], Reconstructed]


def score(
    source: Run | Model,
    screen: Screen,
    rows: Int[np.ndarray, "cells"],
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Score the reconstruction of some cells; memory does not grow with their number.

    Parameters
    ----------
    source
        A run, whose training cells the floor is fitted to; a model alone has no floor.
    screen
        Prepared as the model's training screen was.
    rows
        Row numbers in its matrix.
    seed
        Seed of the counts that are drawn.
    advance
        Called after each block of ``BLOCK`` cells, for a progress bar.

    Returns
    -------
    DataFrame
        One row for the model, and one for the floor: ``model, cells`` and the names of ``METRICS``.

    Raises
    ------
    UserError
        If the model is no autoencoder, or there is no cell.
    """
    return _score(_sources(source), screen, rows, seed, advance)


def parts(run: Run, screen: Screen) -> dict[str, Int[np.ndarray, "_"]]:
    """Rows of the parts of the run's split (controls are training cells); of another screen, all cells."""
    if screen.digest != run.screen.digest:
        return {"all": np.sort(np.concatenate(list(screen.rows.values())))}
    labels = {
        "train": (*run.split.train, *screen.controls),
        "validation": run.split.validation,
        "test": run.split.test,
    }
    return {
        name: np.sort(np.concatenate([screen.rows[label] for label in found]))
        for name, found in labels.items()
        if found
    }


def num_blocks(rows: Int[np.ndarray, "cells"]) -> int:
    """How often ``advance`` is called for these cells."""
    return -(-len(rows) // BLOCK)


def score_parts(
    source: Run | Model,
    screen: Screen,
    rows: Mapping[str, Int[np.ndarray, "_"]],
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Score several parts of a screen; as ``score``, with a first column ``part``."""
    sources = _sources(source)
    found = [_score(sources, screen, some, seed, advance).assign(part=part) for part, some in rows.items()]
    whole = pd.concat(found, ignore_index=True)
    return whole.reindex(columns=["part", *(name for name in whole.columns if name != "part")])


def render(table: pd.DataFrame) -> Table:
    """One line for each score, and for each part a column of the model and one of the floor."""
    shown = Table(title="reconstruction: means are expected counts, samples are drawn ones")
    shown.add_column("")
    several = table["part"].nunique() > 1 or table["part"].iloc[0] != "all"
    for part, model, cells in zip(table["part"], table["model"], table["cells"], strict=True):
        shown.add_column(
            f"{model}\n[dim]{f'{part}, ' if several else ''}{cells:,} cells[/dim]", justify="right"
        )
    for metric, better in METRICS.items():
        numbers = [f"{value:.4g}" for value in table[metric]]
        shown.add_row(f"{metric} {'↑' if better == 'higher' else '↓'}", *numbers)
    return shown


# ---- what is scored --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Floor:
    """A negative binomial for each gene, alike for all cells but for their library sizes.

    Parameters
    ----------
    shares
        Of each gene in the counts of training cells, with half a count more for each gene.
    inverse
        Dispersion r of each gene, by which the variance is ``m + m^2 / r``.
    """

    shares: Float[Tensor, "genes"]
    inverse: Float[Tensor, "genes"]

    @classmethod
    def fit(cls, train: Screen) -> "Floor":
        """Fit to training cells: shares from sums, dispersions from squared errors.

        With the expectation m of a count x, the sum of ``(x - m)^2 - m`` over cells is expected to be that
        of ``m^2 / r``.
        """
        rows = np.sort(np.concatenate(list(train.rows.values())))
        sums = np.zeros((3, len(train.genes)))
        square = 0.0
        for block in values.blocks(train.matrix, rows):
            x = sp.csr_matrix(block, dtype=np.float64)
            sizes = np.asarray(x.sum(axis=1)).ravel()
            sums += np.stack([np.asarray(x.sum(axis=0)).ravel(), x.T @ sizes, _squares(x)])
            square += float(np.square(sizes).sum())
        total, by_size, squares = sums
        shares = (total + 0.5) / (total.sum() + 0.5 * len(total))
        expected = shares**2 * square
        excess = squares - 2 * shares * by_size + expected - shares * total.sum()
        inverse = expected / np.maximum(excess, expected / LARGEST)
        return cls(shares=torch.from_numpy(shares), inverse=torch.from_numpy(inverse))

    def __call__(self, cells: Float[Tensor, "cells genes"], noise: Noise) -> Reconstructed:
        """Expect each gene's share of the counts of a cell."""
        shares, inverse = (x.to(cells.device) for x in (self.shares, self.inverse))
        means = cells.double().sum(-1, keepdim=True) * shares
        drawn = noise.negative_binomial(means[None], inverse.expand_as(means)[None])[0]
        return Reconstructed(-negative_binomial_of_cells(cells.double(), means, inverse[None]), drawn, means)


def _by_autoencoder(model: SetAutoencoder) -> Reconstruct:
    """Encode and decode; latents are the means of their Gaussians, where they have such."""
    gaussian = model.config.likelihood == "gaussian"

    def reconstruct(cells: Tensor, noise: Noise) -> Reconstructed:
        sizes = cells.sum(-1)
        latents, _ = model.encode(model.tokens(cells))
        mean, inverse = model.decode(latents, sizes)
        inverse = inverse.expand_as(mean)
        found = (mean[None], inverse[None], sizes[None])
        samples, means = model.emit(*found, noise)[0], model.emit(*found, None)[0]
        if gaussian:  # a density of log1p values is no probability of counts
            return Reconstructed(torch.full_like(sizes, torch.nan), samples, means)
        nll = -negative_binomial_of_cells(cells.double(), mean.double(), inverse.double())
        return Reconstructed(nll, samples, means)

    return reconstruct


def _sources(source: Run | Model) -> dict[str, tuple[Reconstruct, torch.device]]:
    """Name what is scored, and where each computes."""
    model = source.model if isinstance(source, Run) else source
    autoencoder = model.autoencoder if isinstance(model, LatentFlow) else model
    name = name_of(model)
    if not isinstance(autoencoder, SetAutoencoder):
        raise UserError(f"{name} reconstructs no cells", expected="scldm_vae or scldm")
    device = device_of(model)
    found: dict[str, tuple[Reconstruct, torch.device]] = {name: (_by_autoencoder(autoencoder.eval()), device)}
    if isinstance(source, Run):
        found[FLOOR] = Floor.fit(splits.training(source.split, source.screen)), device
    return found


# ---- sums over blocks of cells ---------------------------------------------------------------------


class Tally:
    """Sums over the cells seen so far, of which scores are made; in float64 on the CPU.

    The correlation is made of moments around the first block's means, so that nothing cancels.
    """

    def __init__(self, genes: int) -> None:
        self.cells = 0
        self.nll = 0.0
        self.agreeing = 0.0
        self.errors = {"samples": 0.0, "means": 0.0}
        self.around: dict[str, Float[Tensor, "two genes"]] = {}
        self.moments = {kind: torch.zeros(5, genes, dtype=torch.float64) for kind in self.errors}

    def see(self, cells: Float[Tensor, "cells genes"], found: Reconstructed) -> None:
        """Take a block of cells and their reconstruction into account."""
        self.cells += len(cells)
        self.nll += float(found.nll.double().sum())
        self.agreeing += float(((cells > 0) == (found.samples > 0)).double().mean(1).sum())
        true = normalized(cells.double())
        for kind, counts in (("samples", found.samples), ("means", found.means)):
            made = normalized(counts.double())
            self.errors[kind] += float((made - true).square().mean(1).sum())
            if kind not in self.around:
                self.around[kind] = torch.stack([true.mean(0), made.mean(0)])
            x, y = true - self.around[kind][0], made - self.around[kind][1]
            sums = torch.stack([x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)])
            self.moments[kind] += sums.cpu()

    def scores(self) -> dict[str, float]:
        """Make scores."""
        return {
            "nll": self.nll / self.cells,
            "pcc_samples": self._correlation("samples"),
            "pcc_means": self._correlation("means"),
            "mse_samples": self.errors["samples"] / self.cells,
            "mse_means": self.errors["means"] / self.cells,
            "zeros_samples": self.agreeing / self.cells,
        }

    def _correlation(self, kind: str) -> float:
        """Mean over genes; NaN where no true value varies."""
        x, y, xx, yy, xy = (self.moments[kind] / self.cells).numpy()
        true, made, both = xx - x**2, yy - y**2, xy - x * y
        varies, moves = true > FLAT**2, made > FLAT**2
        if not varies.any():
            return float("nan")
        scale = np.sqrt(np.where(varies & moves, true * made, 1.0))
        return float(np.where(moves, both / scale, 0.0)[varies].mean())


@torch.inference_mode()
def _score(
    sources: Mapping[str, tuple[Reconstruct, torch.device]],
    screen: Screen,
    rows: Int[np.ndarray, "cells"],
    seed: int,
    advance: Callable[[], None],
) -> pd.DataFrame:
    if not len(rows):
        raise UserError("No cell to score", mend="choose a part that the split has")
    tallies = {name: Tally(len(screen.genes)) for name in sources}
    noises = {name: Noise(torch.Generator(device).manual_seed(seed)) for name, (_, device) in sources.items()}
    for start in range(0, len(rows), BLOCK):
        block = torch.from_numpy(screen.gather(rows[start : start + BLOCK]))
        for name, (reconstruct, device) in sources.items():
            cells = block.to(device)
            tallies[name].see(cells, reconstruct(cells, noises[name]))
        advance()
    return pd.DataFrame(
        [{"model": name, "cells": tally.cells, **tally.scores()} for name, tally in tallies.items()]
    )


def _squares(block: sp.csr_matrix) -> Float[np.ndarray, "genes"]:
    return np.asarray(block.multiply(block).sum(axis=0)).ravel()
