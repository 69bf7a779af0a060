from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import pdist

from knockon.evaluate import space
from knockon.evaluate.space import Space
from knockon.evaluate.truth import Truth


@pytest.fixture
def counts(make) -> anndata.AnnData:
    cells = make.cells(["control", "A", "B", "C", "A+B", "B+C"])
    cells.X = sp.csr_matrix(np.rint(np.expm1(cells.X.toarray())))
    return cells


def truth_of(make, adata: anndata.AnnData, held_out: str = "validation") -> Truth:
    """A+B is tested, B+C is of some other part."""
    screen = make.screen(adata)
    split = make.split(screen, lambda label: label.perturbation == "A+B")
    other = tuple(label for label in split.train if label.perturbation == "B+C")
    train = tuple(label for label in split.train if label not in other)
    return Truth.of(screen, replace(split, train=train, **{held_out: (*getattr(split, held_out), *other)}))


def changed(adata: anndata.AnnData, *conditions: str) -> anndata.AnnData:
    """Other counts in some conditions, of another depth and in other genes."""
    adata = adata.copy()
    values = adata.X.toarray()
    rows = adata.obs["perturbation"].isin(conditions).to_numpy()
    values[rows] = 7 * values[rows][:, ::-1]
    adata.X = sp.csr_matrix(values)
    return adata


def test_only_training_cells_are_looked_at(make, counts):
    """Components, their center and the total of counts: test cells have no part in any of them."""
    somewhere = sp.csr_matrix(np.random.default_rng(0).exponential(size=(5, 40)))
    before = truth_of(make, counts).space.project(somewhere)
    after = truth_of(make, changed(counts, "A+B")).space.project(somewhere)
    np.testing.assert_array_equal(after, before)
    for trained in ("B+C", "control", "A"):  # validation counts as training
        moved = truth_of(make, changed(counts, trained)).space.project(somewhere)
        assert not np.allclose(moved, before)


def test_a_second_test_condition_is_not_looked_at_either(make, counts):
    somewhere = sp.csr_matrix(np.random.default_rng(0).exponential(size=(5, 40)))
    before, after = (
        truth_of(make, adata, "test").space.project(somewhere) for adata in (counts, changed(counts, "B+C"))
    )
    np.testing.assert_array_equal(after, before)


def test_counts_are_compared_per_ten_thousand(make, counts):
    truth = truth_of(make, counts)
    raw = counts[(counts.obs["perturbation"] == "A+B").to_numpy()].X.toarray()
    expected = np.log1p(1e4 * raw / raw.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(truth.space.scaled(truth.cells[0]).toarray(), expected, rtol=1e-5)


def test_log1p_of_an_unknown_total_stays_as_it_is(make, screen, split):
    truth = Truth.of(screen, split)
    assert screen.total is None
    assert truth.space.scaled(truth.cells[0]) is truth.cells[0]


def test_log1p_of_a_known_total_is_as_that_of_counts(make, counts):
    """A screen that a run has prepared is compared in the same units as one in counts."""
    totals = np.asarray(counts.X.sum(axis=1))
    other = counts.copy()
    other.X = sp.csr_matrix(np.log1p(500 * counts.X.toarray() / totals))
    one, two = truth_of(make, counts), truth_of(make, other)
    assert (one.units, two.units, two.screen.total) == ("counts", "log1p", 500)
    a, b = (truth.space.scaled(truth.cells[0]).toarray() for truth in (one, two))
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_components_are_those_of_the_dense_centered_cells(make, screen, split):
    found = Space(train=screen).project(sp.csr_matrix(screen.matrix))
    dense = screen.matrix.toarray().astype(np.float64)
    dense -= dense.mean(axis=0)
    left, values, _ = np.linalg.svd(dense, full_matrices=False)
    assert found.shape == (screen.num_cells, space.DIMS)
    np.testing.assert_allclose(pdist(found[:50]), pdist((left * values)[:50, : space.DIMS]), rtol=1e-6)


@pytest.mark.parametrize(("cells", "genes", "dims"), [(240, 7, 7), (6, 40, 5), (4, 4, 3)])
def test_there_are_fewer_components_where_the_data_force_it(screen, cells, genes, dims):
    rows = {label: part[: -(-cells // len(screen.rows))] for label, part in screen.rows.items()}
    few = replace(
        screen,
        rows=dict(list(rows.items())[:cells]),
        genes=screen.genes[:genes],
        matrix=screen.matrix[:, :genes],
    )
    assert few.num_cells == cells
    assert Space(train=few).project(few.matrix[:9]).shape == (9, dims)


def test_not_more_than_so_many_cells_are_fitted_on(screen, monkeypatch):
    whole = Space(train=screen).project(screen.matrix[:9])
    monkeypatch.setattr(space, "MOST", 100)
    twice = [Space(train=screen).project(screen.matrix[:9]) for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    assert not np.allclose(twice[0], whole)


def test_components_are_fitted_once_and_only_when_asked_for(screen, split):
    truth = Truth.of(screen, split)
    part = truth.select(truth.labels[:1])
    assert "_components" not in vars(truth.space)
    part.space.project(part.cells[0])
    assert part.space is truth.space
    assert "_components" in vars(truth.space)
