import json
from dataclasses import asdict

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import torch

from knockon.data import prepare, splits
from knockon.data.screen import Screen
from knockon.types import UserError

from .screens import DOUBLES, GENES, adata, log1p


@pytest.fixture
def screen():
    return Screen.from_anndata(adata(DOUBLES))


def test_counts_become_log1p_of_the_training_median(screen):
    training = splits.training(splits.additive(screen, fraction=1.0), screen)
    rows = np.concatenate(list(training.rows.values()))
    preparation = prepare.fit(training, units="log1p")
    assert preparation.total == np.median(screen.gather(rows).sum(axis=1))
    ready = prepare.apply(screen, preparation)
    np.testing.assert_allclose(np.expm1(ready.gather(rows)).sum(axis=1), preparation.total, rtol=1e-4)
    assert (ready.units, ready.total, ready.digest) == ("log1p", preparation.total, screen.digest)
    assert screen.units == "counts"
    assert prepare.fit(training, units="log1p", total=1e4).total == 1e4


def test_choosing_genes_leaves_torch_its_threads(screen, monkeypatch):
    """numba sets them, for all that share its OpenMP, when a process first needs it."""
    choose, before = scanpy.preprocessing.highly_variable_genes, torch.get_num_threads()

    def first(*args, **kwargs):
        torch.set_num_threads(before + 1)
        choose(*args, **kwargs)

    monkeypatch.setattr(scanpy.preprocessing, "highly_variable_genes", first)
    prepare.fit(screen, units="log1p", genes=10)
    assert torch.get_num_threads() == before


def test_counts_stay_counts_where_a_model_reads_counts(screen):
    preparation = prepare.fit(screen, units="counts", genes=10)
    assert preparation.total is None
    ready = prepare.apply(screen, preparation)
    assert ready.units == "counts"
    assert (ready.gather(np.arange(3)) == np.rint(ready.gather(np.arange(3)))).all()


def test_perturbed_genes_are_kept_in_the_order_of_the_file():
    data = adata(DOUBLES)
    data.var_names = ["A", "B", *GENES[2:]]
    screen = Screen.from_anndata(data)
    preparation = prepare.fit(screen, units="log1p", genes=10)
    assert {"A", "B"} <= set(preparation.genes)
    assert 10 <= len(preparation.genes) <= 12
    assert list(preparation.genes) == [gene for gene in screen.genes if gene in preparation.genes]
    ready = prepare.apply(screen, preparation)
    assert ready.genes == ready.spec().genes == preparation.genes
    only = prepare.fit(screen, units="log1p", genes=10, keep=())
    assert len(only.genes) == 10


def test_test_cells_have_no_influence():
    data = adata(DOUBLES)
    screen = Screen.from_anndata(data)
    split = splits.additive(screen, fraction=1.0)
    before = prepare.fit(splits.training(split, screen), units="log1p", genes=10)
    rows = np.concatenate([screen.rows[label] for label in split.test])
    values = data.X.toarray()
    values[rows] = np.random.default_rng(1).poisson(50, size=(len(rows), len(GENES)))
    data.X = values
    other = Screen.from_anndata(data)
    assert prepare.fit(splits.training(split, other), units="log1p", genes=10) == before
    assert prepare.fit(other, units="log1p", genes=10) != before


@pytest.mark.parametrize("name", ["papalexi21", "kang18"])
def test_variable_genes_are_those_of_scanpy(shared, name):
    screen = Screen.read(shared / "data" / f"{name}.h5ad")
    found = prepare.fit(screen, units="log1p", genes=100, keep=()).genes
    data = anndata.AnnData(screen.matrix.copy(), var=pd.DataFrame(index=list(screen.genes)))
    scanpy.pp.highly_variable_genes(data, flavor="seurat", n_top_genes=100)
    assert list(found) == data.var_names[data.var["highly_variable"]].tolist()


def test_a_preparation_is_plain(screen):
    preparation = prepare.fit(screen, units="log1p", genes=10)
    plain = json.loads(json.dumps(asdict(preparation)))
    assert prepare.Preparation(**plain | {"genes": tuple(plain["genes"])}) == preparation
    assert len(preparation.notes) == 2


def test_log1p_never_becomes_counts():
    data = adata(DOUBLES)
    data.X = log1p(data.X.toarray())
    screen = Screen.from_anndata(data)
    with pytest.raises(UserError, match="--layer counts"):
        prepare.fit(screen, units="counts")
    with pytest.raises(UserError, match="--total"):
        prepare.fit(screen, units="log1p", total=1e4)
    with pytest.raises(UserError, match="holds log1p"):
        prepare.apply(screen, prepare.Preparation(units="counts"))
    assert prepare.fit(screen, units="log1p") == prepare.Preparation(units="log1p")


def test_a_missing_gene_is_named(screen):
    with pytest.raises(UserError, match="lacks genes of the panel: X1"):
        prepare.apply(screen, prepare.Preparation(units="counts", genes=("G1", "X1")))


def test_a_screen_on_disk_is_prepared_alike(tmp_path):
    data = adata(DOUBLES)
    data.write_h5ad(tmp_path / "screen.h5ad")
    here, there = Screen.read(tmp_path / "screen.h5ad"), Screen.read(tmp_path / "screen.h5ad", backed=True)
    preparation = prepare.fit(here, units="log1p", genes=10)
    assert prepare.fit(there, units="log1p", genes=10) == preparation
    rows = np.array([4, 2, 2, 60])
    ready = prepare.apply(there, preparation)
    np.testing.assert_allclose(ready.gather(rows), prepare.apply(here, preparation).gather(rows), rtol=1e-6)
    assert prepare.apply(ready, prepare.Preparation(units="log1p", genes=preparation.genes[2:4])).gather(
        rows
    ) == pytest.approx(ready.gather(rows)[:, 2:4])


def test_real_screens(shared):
    screen = Screen.read(shared / "data" / "papalexi21.h5ad", layer="counts")
    training = splits.training(splits.random(screen), screen)
    preparation = prepare.fit(training, units="log1p", genes=100)
    inside = {name for label in screen.conditions for name in label.perturbations} & set(screen.genes)
    assert len(inside) == 9
    assert inside <= set(preparation.genes)
    assert prepare.apply(screen, preparation).matrix.shape == (18826, len(preparation.genes))


def test_the_same_genes_are_chosen_for_models_of_counts_and_of_log1p(screen):
    for total in (None, 50.0):
        panels = [prepare.fit(screen, units=u, genes=10, total=total).genes for u in ("counts", "log1p")]
        assert panels[0] == panels[1]


def test_a_panel_of_counts_knows_its_share_of_all_counts(screen):
    preparation = prepare.fit(screen, units="counts", panel=screen.genes[:7])
    assert preparation.genes == screen.genes[:7]
    rows = np.concatenate(list(screen.rows.values()))
    counts = screen.gather(rows)
    assert preparation.share == pytest.approx(counts[:, :7].sum() / counts.sum())
    assert prepare.fit(screen, units="counts").share == 1
