import dataclasses
import io

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from rich.console import Console

from knockon import models
from knockon.data import simulate
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.dynamics.likelihood import negative_binomial_of_cells
from knockon.evaluate import reconstruction
from knockon.evaluate.reconstruction import Floor, Reconstructed, Tally, render, score
from knockon.model import Model
from knockon.types import Label, Noise, UserError


def counts(cells: int = 60, genes: int = 7, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.poisson(draw.gamma(1.0, 3.0, size=genes) + 1, size=(cells, genes)).astype(np.float32)


def tally(true: np.ndarray, samples: np.ndarray, means: np.ndarray, blocks: int = 1) -> dict[str, float]:
    seen = Tally(true.shape[1])
    for rows in np.array_split(np.arange(len(true)), blocks):
        parts = (torch.from_numpy(x[rows]) for x in (samples, means))
        seen.see(torch.from_numpy(true[rows]), Reconstructed(torch.full((len(rows),), 2.0), *parts))
    return seen.scores()


def log1p(x: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * x / x.sum(1, keepdims=True))


def test_a_perfect_reconstruction() -> None:
    found = tally(counts(), counts(), counts())
    assert found["pcc_samples"] == pytest.approx(1.0)
    assert found["pcc_means"] == pytest.approx(1.0)
    assert (found["mse_samples"], found["mse_means"], found["zeros_samples"]) == (0.0, 0.0, 1.0)
    assert found["nll"] == 2.0


@pytest.mark.parametrize("blocks", [1, 4, 60])
def test_scores_are_of_all_cells_at_once_whatever_the_blocks(blocks: int) -> None:
    true, samples, means = counts(seed=0), counts(seed=1), counts(seed=2) + 0.5
    found = tally(true, samples, means, blocks)
    x = log1p(true.astype(np.float64))
    for kind, y in (("samples", log1p(samples.astype(float))), ("means", log1p(means.astype(float)))):
        each = [np.corrcoef(x[:, gene], y[:, gene])[0, 1] for gene in range(x.shape[1])]
        assert found[f"pcc_{kind}"] == pytest.approx(np.mean(each))
        assert found[f"mse_{kind}"] == pytest.approx(np.square(x - y).mean())
    assert found["zeros_samples"] == pytest.approx(((true > 0) == (samples > 0)).mean())


def test_genes_that_say_nothing() -> None:
    """A true constant is left out; a reconstruction cannot leave a gene out by being constant."""
    true = counts(genes=3)
    true[:, 2] = 0
    made = true.copy()
    made[:, 1] = 0  # is constant after normalizing, too
    x, y = log1p(true.astype(float)), log1p(np.maximum(made, 1e-30).astype(float))
    expected = np.corrcoef(x[:, 0], y[:, 0])[0, 1] / 2
    assert tally(true, made, made)["pcc_means"] == pytest.approx(expected)
    constant = np.zeros((5, 2), np.float32)
    assert np.isnan(tally(constant, constant, constant)["pcc_means"])


def negative_binomials(cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of cells of many sizes, and the shares and dispersions behind them; the last gene is Poisson."""
    draw = np.random.default_rng(seed)
    shares, inverse = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.5, 2.0, 8.0, np.inf])
    mean = draw.integers(50, 400, size=(cells, 1)) * shares
    rate = np.concatenate(
        [mean[:, :3] * draw.gamma(inverse[:3], size=(cells, 3)) / inverse[:3], mean[:, 3:]], 1
    )
    return draw.poisson(rate).astype(np.float32), shares, inverse


def screen_of(values: np.ndarray) -> Screen:
    rows = {Label(): np.arange(0, len(values), 2), Label.of(["A"]): np.arange(1, len(values), 2)}
    cells = [f"c{i}" for i in range(len(values))]
    genes = tuple(f"G{i}" for i in range(values.shape[1]))
    return Screen(matrix=sp.csr_matrix(values), genes=genes, cells=cells, rows=rows, units="counts")


def test_the_floor_finds_the_negative_binomials_behind_counts() -> None:
    values, shares, inverse = negative_binomials(4000)
    # given the sum of its counts, a cell's genes are not independent; a fifth gene of many counts hides that
    values = np.concatenate([values, np.full((len(values), 1), 20_000, np.float32)], axis=1)
    floor = Floor.fit(screen_of(values))
    ratio = floor.shares[:4] / floor.shares[:4].sum()
    np.testing.assert_allclose(ratio, shares, rtol=0.05)
    # sizes hardly differ now, so their spread c is dispersion: of the mixture, 1/r' = (1 + c)(1 + 1/r) - 1
    spread = np.var(np.arange(50, 400)) / np.mean(np.arange(50, 400)) ** 2
    expected = 1 / ((1 + spread) * (1 + 1 / inverse) - 1)
    np.testing.assert_allclose(floor.inverse[:4], expected, rtol=0.15)


def test_the_floor_of_counts_that_vary_with_the_size_alone_is_poisson() -> None:
    draw = np.random.default_rng(0)
    values = draw.poisson(draw.integers(50, 400, size=(2000, 1)) * np.full(20, 0.05)).astype(np.float32)
    floor = Floor.fit(screen_of(values))
    assert (floor.inverse > 50).all()
    cells = torch.from_numpy(values)
    found = floor(cells, Noise(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(found.means.sum(1), cells.double().sum(1))
    assert torch.equal(found.samples, found.samples.round())
    rates = cells.double().sum(1, keepdim=True) / 20
    poisson = -torch.distributions.Poisson(rates.expand(-1, 20)).log_prob(cells.double()).sum(1)
    torch.testing.assert_close(found.nll.mean(), poisson.mean(), rtol=2e-3, atol=0.0)


@pytest.fixture(scope="module")
def screen() -> Screen:
    adata = simulate.simulate(simulate.tiny())
    return Screen.from_anndata(adata, columns=Columns(layer="counts"))


def built(screen: Screen, name: str = "scldm_vae", **changes: object) -> Model:
    config = dataclasses.replace(models.recipe(name, "small").model, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = config.build(screen.spec())
    model.fit_statistics(screen)
    return model.eval()


@pytest.mark.slow
def test_a_model_is_scored_by_its_own_likelihood(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = built(screen), np.arange(0, 300, 2)
    table = score(model, screen, rows, seed=1)
    assert list(table) == ["model", "cells", *reconstruction.METRICS]
    assert table["model"].tolist() == ["scldm_vae"]
    assert table["cells"].tolist() == [150]
    cells = torch.from_numpy(screen.gather(rows))
    with torch.no_grad():
        latents, _ = model.encode(model.tokens(cells))
        mean, inverse = model.decode(latents, cells.sum(1))
        own = model.nll(cells, latents).mean()
    assert table["nll"][0] == pytest.approx(float(own), rel=1e-4)
    expected = -negative_binomial_of_cells(cells.double(), mean.double(), inverse.double()).mean()
    assert table["nll"][0] == pytest.approx(float(expected), rel=1e-6)
    assert score(model, screen, rows, seed=1).equals(table)
    monkeypatch.setattr(reconstruction, "BLOCK", 7)
    parts = score(model, screen, rows, seed=1)
    for metric in ("nll", "pcc_means", "mse_means"):
        assert parts[metric][0] == pytest.approx(table[metric][0], rel=1e-4)


def test_the_second_stage_is_scored_by_its_autoencoder(screen: Screen) -> None:
    table = score(built(screen, "scldm"), screen, np.arange(20))
    assert table["model"].tolist() == ["scldm"]
    assert np.isfinite(table["nll"][0])


def test_a_density_of_log1p_is_no_likelihood_of_counts(screen: Screen) -> None:
    table = score(built(screen, likelihood="gaussian"), screen, np.arange(20))
    assert np.isnan(table["nll"][0])
    assert np.isfinite(table["mse_means"][0])


def test_what_reconstructs_nothing_is_refused(screen: Screen) -> None:
    with pytest.raises(UserError, match="no_effect reconstructs no cells"):
        score(models.recipe("no_effect").model.build(screen.spec()), screen, np.arange(20))
    with pytest.raises(UserError, match="No cell"):
        score(built(screen), screen, np.arange(0))


def test_the_table_that_is_printed(screen: Screen) -> None:
    model = built(screen)
    table = reconstruction.score_parts(model, screen, {"train": np.arange(20), "test": np.arange(20, 30)})
    assert table["part"].tolist() == ["train", "test"]
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(render(table))
    shown = console.export_text()
    assert all(name in shown for name in (*reconstruction.METRICS, "train, 20 cells", "test, 10 cells"))
