import pickle
import shutil

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from knockon.data import formats, values
from knockon.types import UserError

from .screens import counts, log1p


def judge(matrix, declared=None):
    return values.scale(values.survey(values.compressed(matrix)), declared)


def test_counts_and_log1p_are_told_apart():
    raw = counts(50)
    assert judge(raw) == values.Scale(units="counts")
    assert judge(log1p(raw)) == values.Scale(units="log1p", total=1e4)
    assert judge(log1p(raw, 2500.0)).total == 2500.0
    assert judge(log1p(raw)[:, :20]) == values.Scale(units="log1p")  # of a subset of the genes


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: np.where(x == 3, np.nan, x), "not finite: nan"),
        (lambda x: np.where(x == 3, np.inf, x), "not finite: inf"),
        (lambda x: x - 1, "Negative values: -1"),
        (lambda x: x * 0, "All values are zero"),
        (lambda x: x + 20.5, "neither counts nor log1p"),
        (lambda x: np.concatenate([x, log1p(x)]), "Some cells hold counts \\(50\\)"),
    ],
)
def test_other_values_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        judge(change(counts(50)).astype(np.float32))


def test_a_contradiction_is_an_error_both_ways():
    with pytest.raises(UserError, match=r"whole numbers.*Expected: log1p.*--units counts"):
        judge(counts(50), "log1p")
    with pytest.raises(UserError, match=r"fractions.*Expected: counts.*--units log1p"):
        judge(log1p(counts(50)), "counts")


def test_log1p_brings_cells_to_one_total():
    raw = sp.csr_matrix(np.concatenate([counts(20), np.zeros((1, 40), dtype=np.float32)]))
    out = values.log1p(raw, 1000.0)
    np.testing.assert_allclose(np.expm1(out.toarray()).sum(axis=1), [1000.0] * 20 + [0.0], rtol=1e-5)
    assert (raw.toarray()[:20] == counts(20)).all()


def test_blocks_cover_all_rows_in_order(monkeypatch):
    monkeypatch.setattr(values, "BLOCK", 7)
    matrix = sp.csr_matrix(counts(50))
    assert (sp.vstack(list(values.blocks(matrix))).toarray() == counts(50)).all()
    rows = np.array([3, 49, 3, 8, 1, 0, 20, 31, 2])
    assert (sp.vstack(list(values.blocks(matrix, rows))).toarray() == counts(50)[rows]).all()


@pytest.mark.parametrize("put", [shutil.move, shutil.copyfile])
def test_a_file_that_takes_the_place_of_another_is_read(tmp_path, put):
    """Values on disk travel as their place, and another process may have met the place before."""
    path = tmp_path / "cells.h5ad"
    for cells in (50, 80):
        ad.AnnData(sp.csr_matrix(counts(cells))).write_h5ad(tmp_path / "new.h5ad")
        put(tmp_path / "new.h5ad", path)
        sent = sent if cells > 50 else pickle.dumps(formats.load(path, backed=True).values)
        assert pickle.loads(sent)[:].sum() == counts(cells).sum()


def test_few_files_stay_open(tmp_path):
    for name in "abcdef":
        ad.AnnData(sp.csr_matrix(counts(5))).write_h5ad(tmp_path / f"{name}.h5ad")
        pickle.loads(pickle.dumps(formats.load(tmp_path / f"{name}.h5ad", backed=True).values))
    assert list(values._OPEN) == [str(tmp_path / f"{name}.h5ad") for name in "cdef"]


def test_a_total_is_of_the_genes_that_were_chosen_before(tmp_path):
    ad.AnnData(sp.csr_matrix(counts(50))).write_h5ad(tmp_path / "cells.h5ad")
    whole, some = formats.load(tmp_path / "cells.h5ad", backed=True).values, np.arange(5, 20)
    after, before = whole.normalized(100.0).panel(some), whole.panel(some).normalized(100.0)
    wanted = values.log1p(sp.csr_matrix(counts(50)[:, some]), 100.0).toarray()
    for matrix in (before, pickle.loads(pickle.dumps(before))):
        np.testing.assert_allclose(matrix[:].toarray(), wanted, rtol=1e-6)
    every = values.log1p(sp.csr_matrix(counts(50)), 100.0).toarray()
    np.testing.assert_allclose(after[:].toarray(), every[:, some], rtol=1e-6)
