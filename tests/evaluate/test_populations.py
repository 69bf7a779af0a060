import numpy as np
import pytest
import scipy.sparse as sp

from knockon.evaluate.populations import exact


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_exact_cells_are_others(kind):
    cells = sp.csr_matrix(np.array([[1, 2, 3], [4, 5, 6]], dtype=kind))
    cells.data[[0, 4]] = 0
    before = cells.copy()
    assert exact(cells).nnz == 4
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(cells, name), getattr(before, name))
