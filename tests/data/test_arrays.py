import pickle
import threading
from functools import partial

import dask.config
import numpy as np
import pytest
import scipy.sparse as sp

from knockon import devices
from knockon.data import arrays, graph, prepare, values
from knockon.data.screen import Screen
from knockon.types import UserError

from .screens import DOUBLES, adata


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 cells, of which a thread merges two, so that a small screen has many."""
    monkeypatch.setattr(values, "BLOCK", 16)
    monkeypatch.setattr(arrays, "SPAN", 2)
    monkeypatch.setattr(prepare, "FEW", 0)


@pytest.fixture
def both(tmp_path):
    """The same counts in memory and on disk; conditions are mixed in the file."""
    data = adata(DOUBLES)
    order = np.random.default_rng(0).permutation(data.n_obs)
    data[order].copy().write_h5ad(tmp_path / "screen.h5ad")
    return [Screen.read(tmp_path / "screen.h5ad", backed=backed) for backed in (False, True)]


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for label, found in ours.items():
        assert found.cells == theirs[label].cells
        np.testing.assert_array_equal(found.mean, theirs[label].mean)
        np.testing.assert_array_equal(found.squares, theirs[label].squares)


def test_moments_of_conditions_in_one_passage(both, small):
    here, there = both
    found = arrays.moments(here.matrix, here.rows)
    for label in here.labels:
        cells = here.cells_of(label).astype(np.float64)
        assert found[label].cells == len(cells)
        np.testing.assert_allclose(found[label].mean, cells.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found[label].std, cells.std(0, ddof=1), rtol=1e-12)
    equal(arrays.moments(there.matrix, there.rows), found)


def test_moments_add_up(both):
    here, _ = both
    rows = here.every
    np.testing.assert_allclose(
        here.pooled(here.labels).mean, here.gather(rows).mean(0, dtype=float), rtol=1e-12
    )
    np.testing.assert_allclose(
        here.pooled(here.labels).std, here.gather(rows).std(0, ddof=1, dtype=float), rtol=1e-12
    )
    assert arrays.moments(here.matrix, {}) == {}


def test_one_cell_and_constant_genes_do_not_vary():
    matrix = sp.csr_matrix(np.array([[0.1, 0.3], [0.2, 0.3], [0.7, 0.3]], dtype=np.float32))
    found = arrays.moments(matrix, {"one": np.array([1]), "two": np.array([2, 0])})
    assert (found["one"].std == 0).all()
    assert found["two"].std[1] == 0 < found["two"].std[0]


def test_what_is_on_disk_gives_the_same_bits(both, small):
    here, there = both
    rows = np.random.default_rng(1).permutation(180)[:90]
    for statistic in (arrays.totals, arrays.sums, graph.correlation, graph.one_count):
        np.testing.assert_array_equal(statistic(there.matrix, rows), statistic(here.matrix, rows))
    np.testing.assert_array_equal(arrays.cells(there.matrix, rows).compute().toarray(), here.gather(rows))
    for how in ({"units": "log1p"}, {"units": "counts", "panel": here.genes[:7]}):
        assert prepare.fit(there, **how) == prepare.fit(here, **how)


def test_variable_genes_do_not_depend_on_blocks(both, monkeypatch):
    here, there = both
    few = prepare.fit(here, units="log1p", genes=10)
    monkeypatch.setattr(prepare, "FEW", 0)
    monkeypatch.setattr(values, "BLOCK", 16)
    assert prepare.fit(here, units="log1p", genes=10) == few
    assert prepare.fit(there, units="log1p", genes=10) == few


def watched(block, *, inside, most):
    inside.append(1)
    most.append(len(inside))
    threading.Event().wait(0.002)
    inside.pop()
    return block.shape[0]


def test_no_more_blocks_are_in_memory_than_there_is_room_for(both, small):
    _, there = both
    block = arrays.PASSES * 8 * 16 * 40
    for room, threads in ((0, 1), (block, 1), (2 * block, 2)):
        inside, most = [], []
        function = partial(watched, inside=inside, most=most)
        with arrays.computing(memory=room):
            assert arrays.threads(there.matrix) == min(threads, arrays.CPU_COUNT)
            assert arrays.fold(function, int.__add__, there.matrix, there.every) == there.num_cells
        assert len(most) == -(-there.num_cells // 16)
        assert max(most) <= threads


def test_results_take_room_too(both, small, monkeypatch):
    """Of correlations each thread holds a table of genes x genes, and one more while it adds to it."""
    _, there = both
    monkeypatch.setattr(arrays, "CPU_COUNT", 8)
    block, table = arrays.PASSES * 8 * 16 * 40, 8 * 40 * 40
    inside, most = [], []
    monkeypatch.setattr(graph, "_products", partial(among, graph._products, inside=inside, most=most))
    for room, threads in ((4 * block, 1), (2 * block + 5 * table, 2), (9 * (block + table), 4)):
        with arrays.computing(memory=room):
            assert arrays.threads(there.matrix, table) == threads
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(devices, "neighbors", lambda: 4)
                assert arrays.threads(there.matrix, table) == min(threads, 8 // 4)
            most.clear()
            graph.correlation(there.matrix, there.every)
        assert 0 < max(most) <= threads


def among(function, *blocks, inside, most, **options):
    watched(*blocks, inside=inside, most=most)
    return function(*blocks, **options)


def test_values_travel_by_their_place(both):
    _, there = both
    ready = prepare.apply(there, prepare.Preparation(units="log1p", total=10.0, genes=there.genes[3:9]))
    sent = pickle.dumps(ready.matrix)
    assert len(sent) < 2000
    np.testing.assert_array_equal(pickle.loads(sent)[:50].toarray(), ready.matrix[:50].toarray())


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_values_are_found_from_another_folder(kind, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    getattr(adata(DOUBLES), {"h5ad": "write_h5ad", "zarr": "write_zarr"}[kind])(f"screen.{kind}")
    matrix = Screen.read(f"screen.{kind}", backed=True).matrix
    sent, wanted = pickle.dumps(matrix), matrix[:9].toarray()
    monkeypatch.chdir(tmp_path / "there")
    np.testing.assert_array_equal(pickle.loads(sent)[:9].toarray(), wanted)


def test_rows_that_lie_close_are_read_at_once(both, small):
    here, there = both
    for rows in (np.array([5, 3, 3, 40, 41]), np.arange(170, 20, -3), np.array([], dtype=int)):
        np.testing.assert_array_equal(there.matrix[rows].toarray(), here.matrix[rows].toarray())


def test_a_cluster_that_is_not_there():
    pytest.importorskip("distributed")
    with pytest.raises(UserError, match=r"No dask cluster answers at nowhere.*dask scheduler"):
        arrays.computing("nowhere")


def test_a_cluster_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'knockon\[cluster\]'"):
        arrays.computing("tcp://127.0.0.1:1", memory=7)
    assert dask.config.get(arrays.ROOM, None) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_gives_the_same_bits(both, small):
    distributed = pytest.importorskip("distributed")
    here, there = both
    local = arrays.moments(there.matrix, there.rows), prepare.fit(there, units="log1p", genes=10)
    with (
        distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        arrays.computing(cluster.scheduler_address),
    ):
        equal(arrays.moments(there.matrix, there.rows), local[0])
        assert prepare.fit(there, units="log1p", genes=10) == local[1]
        assert prepare.fit(here, units="log1p", genes=10) == local[1]
        np.testing.assert_array_equal(
            graph.correlation(there.matrix, there.every), graph.correlation(here.matrix, here.every)
        )
    assert arrays.threads(there.matrix) >= 1
