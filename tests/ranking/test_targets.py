"""Targets: what a user may give, and how it finds its place among the genes of a screen."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.data.screen import Screen
from knockon.ranking.targets import Target, read
from knockon.types import Label, UserError

GENES = ("g1", "g2", "g3")
CONTROL = np.array([1.0, 1.0, 1.0])
RATES = np.arange(1, 25)


@pytest.fixture
def screen() -> Screen:
    return Screen(
        matrix=sp.csr_matrix(np.ones((1, 3), dtype=np.float32)),
        genes=GENES,
        cells=["c"],
        rows={Label(): np.array([0])},
    )


def cells(values: np.ndarray, path: Path | None = None) -> anndata.AnnData:
    names = ["g3", "g1", *(f"x{i}" for i in range(values.shape[1] - 2))]
    obs = pd.DataFrame({"kind": ["a", "b"] * (len(values) // 2)}, index=[str(i) for i in range(len(values))])
    adata = anndata.AnnData(sp.csr_matrix(values.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))
    if path is not None:
        adata.write_h5ad(path)
    return adata


def test_signatures_and_lists(tmp_path: Path, screen: Screen) -> None:
    (tmp_path / "s.csv").write_text("gene,weight\ng3,-2\ng1,0.5\nother,9\n")
    target = Target.align(read([tmp_path / "s.csv"]), screen, None)
    assert list(target.places) == [2, 0]
    assert list(target.direction(CONTROL)) == [-2, 0.5]
    assert "1 of 3 genes" in target.notes[0]
    (tmp_path / "bare.csv").write_text("g3,-2\ng1,0.5\nother,9\n")
    assert read([tmp_path / "bare.csv"]) == read([tmp_path / "s.csv"])
    (tmp_path / "bare.tsv").write_text("g3\t-2\n")
    assert read([tmp_path / "bare.tsv"]) == {"g3": -2}
    (tmp_path / "up.txt").write_text("g1\ng2\n")
    (tmp_path / "down.txt").write_text("g3\n")
    assert read([tmp_path / "up.txt", tmp_path / "down.txt"]) == {"g1": 1, "g2": 1, "g3": -1}
    assert read([tmp_path / "up.txt"]) == {"g1": 1, "g2": 1}


def test_cells_are_brought_to_the_scale_of_the_screen(tmp_path: Path, screen: Screen) -> None:
    counts = np.random.default_rng(0).poisson(RATES, size=(10, 24)).astype(float)
    cells(counts, tmp_path / "t.h5ad")
    target = Target.align(read([tmp_path / "t.h5ad"], {"kind": "b"}), screen, 1000.0)
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1000)
    np.testing.assert_allclose(target.direction(CONTROL), logged[1::2, [0, 1]].mean(0) - 1, rtol=1e-5)
    with pytest.raises(UserError, match="counts"):
        Target.align(cells(counts), screen, None)
    with pytest.raises(UserError, match="counts per 1000"):
        Target.align(cells(logged), screen, 10_000.0)
    near = Target.align(cells(logged), screen, 1000.0).direction(CONTROL)
    np.testing.assert_allclose(near, logged[:, [0, 1]].mean(0) - 1, rtol=1e-5)


@pytest.mark.parametrize("contexts", [["B", "T", "T", "B"], ["B", "T", "T", None]])
def test_target_cells_are_one_population_whatever_their_contexts(
    contexts: list[str | None], tmp_path: Path, screen: Screen
) -> None:
    logged = np.log1p(np.random.default_rng(0).random((4, 24)) + 0.5)
    target = cells(logged)
    target.obs["cell_type"] = contexts
    target.write_h5ad(tmp_path / "t.h5ad")
    found = Target.align(read([tmp_path / "t.h5ad"]), screen, None)
    np.testing.assert_allclose(found.values, logged[:, [0, 1]].mean(0), rtol=1e-5)


def test_bad_targets(tmp_path: Path, screen: Screen) -> None:
    def refused(words: str, *names: str, where: dict[str, str] | None = None) -> None:
        with pytest.raises(UserError, match=words):
            Target.align(read([tmp_path / name for name in names], where or {}), screen, None)

    (tmp_path / "bad.csv").write_text("gene,weight\ng1,much\n")
    (tmp_path / "short.csv").write_text("gene\ng1\n")
    (tmp_path / "twice.csv").write_text("gene,weight\ng1,1\ng1,2\n")
    (tmp_path / "nan.csv").write_text("gene,weight\ng1,nan\n")
    (tmp_path / "zero.csv").write_text("gene,weight\ng1,0\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "up.txt").write_text("g1\n")
    (tmp_path / "other.txt").write_text("h1\n")
    cells(np.random.default_rng(0).random((4, 24)) + 0.5, tmp_path / "t.h5ad")
    refused("without a weight", "bad.csv")
    refused("without a weight", "short.csv")
    refused("no signature: g1", "twice.csv")
    refused("no signature", "nan.csv")
    refused("weight 0", "zero.csv")
    refused("is empty", "empty.txt")
    refused("up and down: g1", "up.txt", "up.txt")
    refused("no gene", "other.txt")
    refused("no target", "up.txt", "zero.csv")
    refused("no target", "up.txt", where={"kind": "a"})
    refused("Cannot read", "missing.txt")
    refused("No such file", "missing.h5ad")
    refused("no column", "t.h5ad", where={"sort": "a"})
    refused("kind=c", "t.h5ad", where={"kind": "c"})
