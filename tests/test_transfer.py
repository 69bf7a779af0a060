"""Training that begins with the weights of another run."""

from dataclasses import replace
from pathlib import Path

import anndata
import pytest
import torch

import knockon as ko
from knockon import models
from knockon.data import simulate, splits
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.model import Recipe
from knockon.run import Run
from knockon.types import UserError


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return simulate.simulate(simulate.tiny())


@pytest.fixture(scope="module")
def pretrained(adata: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A few steps on cells without labels."""
    screen = Screen.from_anndata(adata, columns=Columns(unlabelled=True))
    assert not screen.conditions
    config = replace(models.perturbdiff.marginal().model, width=32, layers=2, heads=2, branch=16, visited=5)
    recipe = Recipe(model=config, train=replace(models.recipe("perturbdiff", "small").train, steps=3))
    return ko.train(recipe, screen, splits.everything(screen), out=tmp_path_factory.mktemp("run"))


def begin(adata: anndata.AnnData, pretrained: Run, out: Path, **changes: object) -> Run:
    """No step at all, so that what was taken over can be seen."""
    recipe = models.recipe("perturbdiff", "small")
    config = replace(recipe.model, branch=16, **changes)
    screen = Screen.from_anndata(adata)
    return ko.train(
        Recipe(model=config, train=replace(recipe.train, steps=0)),
        screen,
        splits.additive(screen),
        out=out,
        start=pretrained.folder,
    )


def test_entries_are_taken_over_by_name(
    adata: anndata.AnnData, pretrained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fewer = adata[:, ::-2].copy()
    fewer.var_names = ["new", *fewer.var_names[1:]]
    with caplog.at_level("INFO", logger="knockon"):
        run = begin(fewer, pretrained, tmp_path / "run")
    old, new = dict(pretrained.model.named_parameters()), dict(run.model.named_parameters())
    place = {gene: i for i, gene in enumerate(pretrained.screen.genes)}
    rows = torch.tensor([place[gene] for gene in run.screen.genes[1:]])
    assert torch.equal(new["network.head.weight"][1:], old["network.head.weight"][rows])
    assert torch.equal(new["network.control.weight"][:, 1:], old["network.control.weight"][:, rows])
    genes = len(place)
    shown = torch.cat([rows, rows + genes])
    ours = [i for i in range(2 * len(run.screen.genes)) if i % len(run.screen.genes)]
    assert torch.equal(new["network.state.weight"][:, ours], old["network.state.weight"][:, shown])
    inner = "network.blocks.0.attention.inputs.0.weight"
    assert torch.equal(new[inner], old[inner])
    table = "conditions.own.table.weight"
    assert torch.equal(new[table][0], old[table][0])
    assert len(new[table]) > len(old[table]) == 1
    assert "kept in part" in caplog.text
    assert "network.head.weight" in caplog.text


def test_another_width_is_said_to_be_new(
    adata: anndata.AnnData, pretrained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="knockon"):
        begin(adata, pretrained, tmp_path / "run", width=16)
    assert "initialized anew: hidden" in caplog.text


@pytest.mark.slow
def test_a_run_knows_what_it_began_with(adata: anndata.AnnData, pretrained: Run, tmp_path: Path) -> None:
    begin(adata, pretrained, tmp_path / "run")
    screen = Screen.from_anndata(adata)
    recipe = models.recipe("perturbdiff", "small")
    again = Recipe(model=replace(recipe.model, branch=16), train=replace(recipe.train, steps=0))
    with pytest.raises(UserError, match="begun"):
        ko.train(again, screen, splits.additive(screen), out=tmp_path / "run")


def test_what_cannot_be_begun_with_is_refused(
    adata: anndata.AnnData, pretrained: Run, tmp_path: Path
) -> None:
    screen = Screen.from_anndata(adata)
    for model, start, message in (
        ("perturbdiff", tmp_path, "is no run folder"),
        ("latent_additive", pretrained.folder, "a finished run of latent_additive"),
        ("ripple", pretrained.folder, "ripple has no weights"),
    ):
        with pytest.raises(UserError, match=message):
            ko.train(model, screen, splits.additive(screen), out=tmp_path / "x", start=start)
        assert not (tmp_path / "x").exists()


def test_unlabelled_cells_need_a_model_that_learns_from_them(adata: anndata.AnnData, tmp_path: Path) -> None:
    screen = Screen.from_anndata(adata, columns=Columns(unlabelled=True))
    with pytest.raises(UserError, match="no perturbed cell to train on"):
        ko.train("scdfm", screen, "none", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_marginal_model_predicts_cells_whatever_was_done(pretrained: Run) -> None:
    cells = pretrained.predict(list(pretrained.screen.controls), cells=5)
    assert cells.n_obs > 5


def test_a_model_without_names_needs_the_same_genes(adata: anndata.AnnData, tmp_path: Path) -> None:
    recipe = models.recipe("latent_additive", "small")
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    screen, turned = Screen.from_anndata(adata), Screen.from_anndata(adata[:, ::-1].copy())
    ko.train(recipe, screen, splits.additive(screen), out=tmp_path / "a")
    ko.train(recipe, screen, splits.additive(screen), out=tmp_path / "b", start=tmp_path / "a")
    with pytest.raises(UserError, match="other genes"):
        ko.train(recipe, turned, splits.additive(turned), out=tmp_path / "c", start=tmp_path / "a")


@pytest.mark.slow
def test_a_leak_through_pretraining_is_said(
    adata: anndata.AnnData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cells of the held-out conditions were in the file that was pretrained on."""
    adata.write_h5ad(tmp_path / "screen.h5ad")
    recipe = models.recipe("perturbdiff", "small")
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    screen = Screen.read(tmp_path / "screen.h5ad")
    ko.train(recipe, screen, "none", out=tmp_path / "all")
    ko.train(recipe, screen, "additive", out=tmp_path / "some")
    with caplog.at_level("INFO", logger="knockon"):
        ko.train(recipe, screen, "additive", out=tmp_path / "b", start=tmp_path / "some")
    assert "Leak" not in caplog.text
    with caplog.at_level("INFO", logger="knockon"):
        ko.train(recipe, screen, "additive", out=tmp_path / "c", start=tmp_path / "all")
    assert "Leak: the earlier run" in caplog.text


def test_the_same_perturbation_in_another_context_is_no_leak(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two runs on one context split; and one on everything, of the same screen under another name."""
    drugs = simulate.Simulation(
        cells=300, genes=20, singles=0, doubles=0, drugs=2, doses=(1.0,), cell_types=2, truth_cells=64
    )
    simulate.simulate(drugs).write_h5ad(tmp_path / "screen.h5ad")
    (tmp_path / "other.h5ad").write_bytes((tmp_path / "screen.h5ad").read_bytes())
    recipe = models.recipe("perturbdiff", "small")
    recipe = replace(recipe, train=replace(recipe.train, steps=1))
    screen, other = (Screen.read(tmp_path / name) for name in ("screen.h5ad", "other.h5ad"))
    split = splits.context(screen)
    ko.train(recipe, screen, split, out=tmp_path / "same")
    ko.train(recipe, other, "none", out=tmp_path / "all")
    for start, leaks in (("same", False), ("all", True)):
        caplog.clear()
        with caplog.at_level("INFO", logger="knockon"):
            ko.train(recipe, screen, split, out=tmp_path / f"after_{start}", start=tmp_path / start)
        assert ("Leak" in caplog.text) == leaks
