import numpy as np
import pytest
import scipy.sparse as sp

from knockon.evaluate.counting import counts, drawn
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.truth import Truth
from knockon.models.no_effect import Config as NoEffect
from knockon.predict import generate
from knockon.types import UserError


def log1p(values: np.ndarray, total: float = 1e4) -> sp.csr_matrix:
    return sp.csr_matrix(np.log1p(values / values.sum(1, keepdims=True) * total))


def test_whole_counts_come_back():
    values = np.random.default_rng(0).poisson(3.0, size=(50, 30)).astype(float)
    found = drawn(log1p(values), values.sum(1), np.random.default_rng(0))
    np.testing.assert_array_equal(found.toarray(), values)


def test_expectations_stay_and_totals_are_those_of_the_control_cells():
    rng = np.random.default_rng(0)
    values = np.tile(rng.gamma(0.3, size=30), (4000, 1))
    sizes = np.repeat([10.0, 40.0], 2000)
    found = drawn(log1p(values, 123.0), sizes, rng).toarray()
    np.testing.assert_array_equal(found, np.floor(found))
    for part, size in ((found[:2000], 10), (found[2000:], 40)):
        expected = values[0] / values[0].sum() * size
        np.testing.assert_allclose(part.mean(0), expected, atol=4 * 0.5 / np.sqrt(2000))
        assert part.var(0).max() <= 0.26  # rounding alone


def test_a_cell_without_values_gets_no_counts():
    assert drawn(sp.csr_matrix((2, 3)), np.ones(2), np.random.default_rng(0)).nnz == 0


@pytest.fixture(scope="module")
def counted(make):
    adata = make.cells(["control", "A", "B", "A+B"])
    adata.X = sp.csr_matrix(np.rint(np.expm1(adata.X.toarray())))
    screen = make.screen(adata)
    return screen, Truth.of(screen, make.split(screen, lambda label: label.perturbation == "A+B"))


def test_control_cells_that_did_not_move_have_their_own_counts(counted):
    screen, truth = counted
    model = NoEffect().build(truth.screen.spec())
    model.fit_statistics(truth.screen)
    predicted = generate(model, truth.screen, truth.labels, cells=20)
    predicted.uns["knockon"] = {"units": "log1p", "total": truth.screen.total}
    pairs = Pairs.align(predicted, truth)
    assert pairs.counts is None
    (found,) = counts(pairs)
    # a value of float32 stands for 2.999999 counts, which one in a million times are 2
    np.testing.assert_array_equal(found.toarray(), screen.gather(pairs.origins[0]))
    (again,) = counts(pairs)
    assert (found != again).nnz == 0


def test_what_has_no_counts_is_refused(make, screen, split, prediction, counted):
    with pytest.raises(UserError, match=r"screen is in log1p.*--layer counts"):
        counts(Pairs.of(prediction, screen, split))
    _, truth = counted
    foreign = make.cells(["A+B"], seed=1)
    foreign.uns["knockon"] = {"units": "log1p", "total": 100.0}
    with pytest.raises(UserError, match=r"does not tell the control cells.*knockon export"):
        counts(Pairs.align(foreign, truth))
    foreign.obs["control_cell"] = "nobody"
    with pytest.raises(UserError, match="does not tell the control cells"):
        counts(Pairs.align(foreign, truth))


def test_cells_are_left_as_they_are():
    """Counts that are drawn as 0 leave their matrix, which shares nothing with that of the cells."""
    cells = sp.random(20, 50, 0.3, format="csr", random_state=np.random.default_rng(0))
    before = cells.copy()
    drawn(cells, np.full(20, 5.0), np.random.default_rng(0))
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(cells, name), getattr(before, name))
