"""Draws of a run and of a file of its cells: changes against control, whatever the units."""

import dataclasses
from pathlib import Path

import anndata
import numpy as np
import pytest

from knockon import models
from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.ranking.source import Draws, OfFile, OfRun
from knockon.run import Run
from knockon.train import Options, train
from knockon.types import Label, UserError


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()))


@pytest.fixture(scope="module")
def run(screen: Screen, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train("additive", screen, splits.additive(screen), out=tmp_path_factory.mktemp("run") / "run")


def test_changes_of_a_run_are_those_of_its_cells(run: Run) -> None:
    source, draws = OfRun(run), Draws(draws=3, cells=40, seed=2)
    labels = source.candidates()[:3]
    found = dict(source.draw(labels, draws))
    assert list(found) == labels
    predicted = run.predict(labels[1:2], cells=40, seed=3)
    made = predicted[~predicted.obs["control"]]
    origin = predicted[made.obs["control_cell"]]
    second = np.asarray(made.X.mean(0) - origin.X.mean(0)).ravel()
    np.testing.assert_allclose(found[labels[1]][1], second, atol=1e-5)
    effect = sum(source.observed(Label.of([name]), draws)[0] for name in labels[0].perturbations)
    assert np.corrcoef(found[labels[0]].mean(0), effect)[0, 1] > 0.95


def test_held_out_conditions_are_not_known(run: Run) -> None:
    source = OfRun(run)
    assert not set(run.split.test) & set(source.measured.rows)
    assert set(run.split.test) <= set(source.whole.rows)


def test_only_perturbations_in_the_table_have_a_vector(screen: Screen, tmp_path: Path) -> None:
    known, new = screen.spec().perturbations[0], "NEW"
    table = tmp_path / "vectors.csv"
    table.write_text(f"name,x,y\n{known},1,0\n{new},0,1\n")
    split, options = splits.additive(screen), Options(vectors=table)
    run = train("additive", screen, split, out=tmp_path / "run", options=options)
    assert OfRun(run).with_vectors == {known, new}


@pytest.mark.parametrize("layer", [None, "counts"])
def test_a_file_says_what_its_run_says(layer: str | None, tmp_path: Path) -> None:
    """Also where counts are normalized for the model, and where the run chose genes."""
    path = tmp_path / "tiny.h5ad"
    simulate.simulate(simulate.tiny()).write_h5ad(path)
    screen = Screen.read(path, layer=layer)
    run = train("additive", screen, splits.make("none", screen), out=tmp_path / "run")
    source = OfRun(run)
    labels = source.candidates()[:2]
    run.predict(labels, cells=200).write_h5ad(tmp_path / "p.h5ad")
    file = OfFile(tmp_path / "p.h5ad", screen)
    assert file.candidates() == labels
    assert file.resolve([str(labels[0])]) == labels[:1]
    assert file.unknown([labels[0], Label.of(["A", "B"])]) == [Label.of(["A", "B"])]
    assert file.total == source.total
    np.testing.assert_allclose(file.control(labels[0]), source.control(labels[0]), atol=1e-5)
    drawn = dict(file.draw(labels, Draws(draws=4)))
    for label, change in source.draw(labels, Draws(cells=200)):
        assert drawn[label].shape == (4, len(screen.genes))
        assert np.corrcoef(drawn[label].mean(0), change.mean(0))[0, 1] > 0.98


def test_counts_are_compared_in_log1p(tmp_path: Path) -> None:
    adata = simulate.simulate(simulate.tiny())
    adata.X = adata.layers["counts"]
    screen = Screen.from_anndata(adata)
    recipe = models.recipe("scldm_vae", "small")
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    run = train(recipe, screen, splits.make("none", screen), out=tmp_path / "run")
    source = OfRun(run)
    labels = [x for x in screen.conditions if len(x.perturbations) == 1][:1]
    ((_, change),) = source.draw(labels, Draws(draws=3, cells=8))
    assert np.isfinite(change).all()
    assert source.whole.units == "log1p"
    predicted = run.predict(labels, cells=8)
    file = OfFile(predicted, screen)
    np.testing.assert_allclose(file.control(labels[0]), source.control(labels[0]), atol=1e-5)


def test_files_that_do_not_fit(run: Run, screen: Screen) -> None:
    predicted = run.predict("test", cells=4)
    other = Screen.from_anndata(simulate.simulate(simulate.Simulation(cells=400, truth_cells=32)))
    with pytest.raises(UserError, match="not made from this screen"):
        OfFile(predicted, other)
    with pytest.raises(UserError, match="lacks control cells"):
        OfFile(
            anndata.AnnData(
                predicted.X,
                obs=predicted.obs.drop(columns="control_cell"),
                var=predicted.var,
                uns=predicted.uns,
            ),
            screen,
        )
    negative = predicted.copy()
    negative.X.data[0] = -1
    with pytest.raises(UserError, match="Negative predicted values") as refused:
        OfFile(negative, screen)
    assert "--pred-" not in str(refused.value)  # rank has no such options
    file = OfFile(predicted, screen)
    with pytest.raises(UserError, match="Fewer predicted cells"):
        dict(file.draw(list(run.split.test), Draws(draws=5)))
    with pytest.raises(UserError, match="no combination"):
        file.candidates()  # those of the test part were measured
