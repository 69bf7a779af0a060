import numpy as np
import pytest
import scipy.sparse as sp

from knockon.data import graph


@pytest.fixture
def cells():
    draw = np.random.default_rng(0)
    values = draw.poisson(1.0, (5000, 30)).astype(np.float32)
    values[:, 7], values[:, 8] = 0.0, 0.3  # a silent gene, and a constant one
    return np.log1p(values)


def test_moments_over_blocks_of_cells(cells):
    mean, std = graph.moments(sp.csr_matrix(cells), np.arange(4500))
    np.testing.assert_allclose(mean, cells[:4500].mean(0, dtype=np.float64), rtol=1e-9, atol=1e-12)
    expected = cells[:4500].std(0, ddof=1, dtype=np.float64)
    varying = np.setdiff1d(np.arange(30), [7, 8])
    np.testing.assert_allclose(std[varying], expected[varying], rtol=1e-9)
    assert (std[[7, 8]] == 0).all()


def test_correlation_and_genes_that_do_not_vary(cells):
    rows = np.arange(0, 5000, 3)
    ours = graph.correlation(sp.csr_matrix(cells), rows)
    varying = np.setdiff1d(np.arange(30), [7, 8])
    expected = np.corrcoef(cells[rows][:, varying], rowvar=False)
    np.testing.assert_allclose(ours[np.ix_(varying, varying)], expected, atol=1e-10)
    np.testing.assert_array_equal(ours[7], np.eye(30)[7])
    np.testing.assert_array_equal(ours[8], np.eye(30)[8])


CORRELATIONS = np.array(
    [
        [1.0, 0.9, -0.8, 0.1],
        [0.9, 1.0, 0.2, 0.3],
        [-0.8, 0.2, 1.0, 0.0],
        [0.1, 0.3, 0.0, 1.0],
    ]
)


def edges(found: sp.csr_matrix) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in zip(*found.nonzero(), strict=True) if i < j}


def test_neighbors_by_absolute_correlation():
    assert edges(graph.neighbors(CORRELATIONS, 1)) == {(0, 1), (0, 2), (1, 3)}
    assert edges(graph.neighbors(CORRELATIONS, 1, negative=False)) == {(0, 1), (1, 3)}
    assert edges(graph.neighbors(CORRELATIONS, 2, negative=False)) == {(0, 1), (0, 2), (1, 2), (1, 3), (0, 3)}


def test_every_gene_is_its_own_neighbor_and_zeros_are_none():
    found = graph.neighbors(CORRELATIONS, 99)
    assert found.diagonal().all()
    assert not found[2, 3]
    assert (found != found.T).nnz == 0
    assert graph.neighbors(np.eye(1), 30).toarray().tolist() == [[True]]


def test_one_count_is_that_of_a_typical_cell():
    depths = np.array([0.5, 1.0, 2.0])
    values = np.log1p(np.array([[1, 3, 0], [0, 2, 1], [1, 0, 1]]) / depths[:, None])
    empty = np.zeros((1, 3))
    matrix = sp.csr_matrix(np.vstack([values, empty]))
    assert graph.one_count(matrix, np.arange(4)) == pytest.approx(np.log1p(1.0))
    assert graph.one_count(matrix, np.arange(2, 4)) == pytest.approx(np.log1p(0.5))
    assert graph.one_count(matrix, np.array([3])) == 0
