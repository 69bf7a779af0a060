import hashlib
import multiprocessing
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scanpy as sc

import knockon as ko
from knockon import files
from knockon.data import build
from knockon.data.chunks import Sizes
from knockon.data.conventions import Columns
from knockon.data.manifest import ASIDE, MANIFEST
from knockon.data.screen import Screen, read
from knockon.types import Label, UserError

from .screens import DOUBLES, GENES, adata, log1p

SMALL = Sizes(chunk=128, shard=1024)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(build, "SIZES", SMALL)


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.h5ad"
    adata(DOUBLES).write_h5ad(path)
    return path


def plates(tmp_path):
    """Two files with the same names of cells, the genes of the second in another order."""
    paths = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    adata(DOUBLES, cell_type=["T", "B"] * 92 + ["B"]).write_h5ad(paths[0])
    adata({"control": 9, "A": 9}, cell_type=["B", "T"] * 9)[:, list(GENES[::-1])].copy().write_h5ad(paths[1])
    return paths


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def by_name(screen):
    """Values of each cell of each condition."""
    return {
        label: dict(zip(screen.names_of(rows), map(bytes, screen.gather(rows)), strict=True))
        for label, rows in screen.rows.items()
    }


def test_a_store_is_the_screen_of_its_file(plain, tmp_path):
    store = ko.prepare([plain], tmp_path / "store", memory="60KB")
    screen = Screen.read(plain)
    assert by_name(store) == by_name(screen)
    for name in ("genes", "digest", "units", "total", "spellings", "vocabulary", "notes", "covariates"):
        assert getattr(store, name) == getattr(screen, name), name
    assert list(store.rows) == list(screen.rows)
    assert list(store.cells) == store.names_of(np.arange(screen.num_cells))
    assert ko.splits.additive(store) == ko.splits.additive(screen)


def test_a_store_opens_as_any_zarr(plain, tmp_path):
    store = ko.prepare([plain], tmp_path / "store", memory="60KB")
    found = anndata.io.read_zarr(tmp_path / "store")
    sc.pp.calculate_qc_metrics(found, inplace=True, percent_top=None)
    assert found.obs_names.tolist() == list(store.cells)
    assert (found.X.toarray() == store.gather(np.arange(store.num_cells))).all()
    truth = anndata.read_h5ad(plain)[found.obs_names]
    assert (truth.X.toarray() == found.X.toarray()).all()
    assert truth.obs["perturbation"].tolist() == found.obs["perturbation"].tolist()


def test_cells_of_a_condition_lie_together_in_random_order(plain, tmp_path):
    stores = [ko.prepare([plain], tmp_path / f"store{seed}", seed=seed) for seed in (0, 1)]
    for store in stores:
        places = []
        for rows in store.rows.values():
            assert (np.diff(rows) == 1).all()
            places.append([int(name[4:]) for name in store.names_of(rows)])
        assert all(sorted(some) != some for some in places)
    assert list(stores[0].cells) != list(stores[1].cells)


def test_plates_become_one_screen(tmp_path):
    paths = plates(tmp_path)
    store = ko.prepare(paths, tmp_path / "store", plate_key="plate", memory="60KB")
    assert [c.name for c in store.covariates] == ["cell_type", "plate"]
    assert store.genes == GENES
    assert any("names of cells occur in several files" in note for note in store.notes)
    for path in paths:
        screen, plate = Screen.read(path), path.stem
        for label, rows in screen.rows.items():
            there = store.rows[Label(label.perturbations, label.doses, (*label.covariates, plate))]
            order = np.argsort(store.names_of(there))
            names = np.array([f"{name}-{plate}" for name in screen.names_of(rows)])
            columns = [screen.genes.index(gene) for gene in GENES]
            assert np.array(store.names_of(there))[order].tolist() == sorted(names)
            assert (store.gather(there[order]) == screen.gather(rows[np.argsort(names)])[:, columns]).all()
    contexts = [label.covariates for label, _ in sorted(store.rows.items(), key=lambda item: item[1][0])]
    assert contexts == sorted(contexts)


def test_files_that_differ_are_refused(tmp_path):
    one, two = plates(tmp_path)
    few = anndata.read_h5ad(two)[:, :30].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(UserError, match=r"40 in all, 30 in every file.*few.h5ad \(30, lacks 10\).*shared"):
        ko.prepare([one, tmp_path / "few.h5ad"], tmp_path / "store")
    store = ko.prepare([one, tmp_path / "few.h5ad"], tmp_path / "shared", genes="shared")
    assert store.genes == GENES[10:]
    logs = anndata.read_h5ad(two)
    logs.X = log1p(logs.X.toarray())
    logs.write_h5ad(tmp_path / "logs.h5ad")
    with pytest.raises(UserError, match=r"units: one.h5ad \(counts\), logs.h5ad \(log1p\)"):
        ko.prepare([one, tmp_path / "logs.h5ad"], tmp_path / "other")
    with pytest.raises(UserError, match=r"already: one\.h5ad"):
        ko.prepare([one], tmp_path / "third", plate_key="cell_type")
    assert Screen.read(tmp_path / "shared").genes == GENES[10:]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_dense_files_and_layers(tmp_path):
    data = adata(DOUBLES)
    data.layers["counts"] = data.X.copy()
    data.X = log1p(data.X.toarray())
    data.write_zarr(tmp_path / "dense.zarr")
    dense = ko.prepare([tmp_path / "dense.zarr"], tmp_path / "store", memory="60KB")
    assert by_name(dense) == by_name(Screen.read(tmp_path / "dense.zarr"))
    assert (dense.units, dense.total) == ("log1p", 1e4)
    counts = ko.prepare([tmp_path / "dense.zarr"], tmp_path / "counts", columns=Columns(layer="counts"))
    assert counts.units == "counts"
    assert read(tmp_path / "counts", Columns(layer="counts")).units == "counts"
    with pytest.raises(UserError, match="prepared with other options: --layer"):
        read(tmp_path / "store", Columns(layer="counts"))


class Killed(BaseException):
    """What ends a process at once."""


def interrupt(monkeypatch, after):
    """Let the process die at the so many-th file that is written."""
    done, replace, rename = [0], os.replace, Path.rename

    def count(*_):
        done[0] += 1
        if done[0] > after:
            raise Killed

    def replacing(self, target):
        count()
        return Path(replace(self, target) or target)

    def renaming(self, target):
        count()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replacing)
    monkeypatch.setattr(Path, "rename", renaming)
    return done


def killed_in(monkeypatch, step, plain, folder):
    """Prepare until a step, at which the process dies."""
    with monkeypatch.context() as patch:
        patch.setattr(build._Builder, step, lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            ko.prepare([plain], folder, memory="60KB")


def test_an_interrupted_store_is_continued_to_the_same_bytes(plain, tmp_path, monkeypatch):
    ko.prepare([plain], tmp_path / "whole", memory="60KB")
    expected, folder, met = content(tmp_path / "whole"), tmp_path / "store", 0
    assert not any(name.startswith(ASIDE) for name in expected)
    for after in (0, 1, 4, 9, 25, 10_000):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            try:
                ko.prepare([plain], folder, memory="60KB")
            except Killed:
                met += 1
        if after >= 1 and after < 10_000 and not (folder / MANIFEST).exists():
            with pytest.raises(UserError, match="prepare was interrupted"):
                Screen.read(folder)
    assert met >= 3
    assert content(folder) == expected


def test_an_interruption_while_files_are_marked_is_continued(plain, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    killed_in(monkeypatch, "_checksums", plain, folder)
    ko.prepare([plain], folder, memory="60KB")
    ko.prepare([plain], tmp_path / "whole", memory="60KB")
    assert content(folder) == content(tmp_path / "whole")


def test_what_is_there_is_not_done_again(plain, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    killed_in(monkeypatch, "_write_tables", plain, folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "X" / "data" / "c").iterdir()}
    before |= {path: path.stat().st_mtime_ns for path in (folder / ASIDE / "runs").rglob("data")}
    assert len(before) > 5
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    ko.prepare([plain], folder, memory="60KB")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_was_damaged_since_is_done_again(plain, tmp_path, monkeypatch):
    ko.prepare([plain], tmp_path / "whole", memory="60KB")
    folder = tmp_path / "store"
    killed_in(monkeypatch, "_write_tables", plain, folder)
    runs = sorted((folder / ASIDE / "runs").iterdir())
    os.truncate(runs[0] / "starts", 11)
    (runs[1] / "indices").write_bytes(bytes((runs[1] / "indices").stat().st_size))
    (runs[2] / "sums.json").write_text("{")
    os.truncate(folder / "X" / "data" / "c" / "1", 100)
    os.truncate(folder / "X" / "indptr" / "c" / "0", 100)
    values = bytearray((folder / "X" / "indices" / "c" / "2").read_bytes())
    values[20] ^= 4
    (folder / "X" / "indices" / "c" / "2").write_bytes(values)
    ko.prepare([plain], folder, memory="60KB")
    assert content(folder) == content(tmp_path / "whole")


def test_a_finished_store_is_left_alone(plain, tmp_path):
    folder = tmp_path / "store"
    ko.prepare([plain], folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ko.prepare([plain], folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(UserError, match="made of other files or in another way"):
        ko.prepare([plain], folder, seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear")
    with pytest.raises(UserError, match="holds something else"):
        ko.prepare([plain], tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_two_at_once_are_kept_apart(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    sort, met = build._Builder._sort, []

    def sorting(builder):
        with pytest.raises(UserError, match="Another command is at work in"):
            ko.prepare([plain], tmp_path / "store")
        met.append(1)
        return sort(builder)

    with monkeypatch.context() as patch:
        patch.setattr(build._Builder, "_sort", sorting)
        ko.prepare([plain], tmp_path / "store")
    ko.prepare([plain], tmp_path / "alone")
    assert met
    assert content(tmp_path / "store") == content(tmp_path / "alone")
    assert not any(".lock" in name for name in content(tmp_path / "store"))


def test_who_waited_for_a_store_has_it(plain, tmp_path, monkeypatch):
    """Where one waits for the lock, the other one removes the folder that it lies in."""

    @contextmanager
    def late(folder):
        monkeypatch.undo()
        ko.prepare([plain], tmp_path / "store")
        assert not folder.exists()
        raise UserError("Cannot write")
        yield

    monkeypatch.setattr(build, "alone", late)
    assert len(ko.prepare([plain], tmp_path / "store").conditions) == len(Screen.read(plain).conditions)


def test_a_full_disk_is_said(plain, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=r"1 kB free.*185 cells.*free some space"):
            ko.prepare([plain], tmp_path / "store")
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr(build, "_merged", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match=r"disk of .* is full.*same command again"):
            ko.prepare([plain], tmp_path / "store")
    assert by_name(ko.prepare([plain], tmp_path / "store")) == by_name(Screen.read(plain))


def test_no_files_and_too_little_memory_are_refused(plain, tmp_path):
    with pytest.raises(UserError, match="No files"):
        ko.prepare([], tmp_path / "store")
    for memory in ("0", "1kB"):
        with pytest.raises(UserError, match=r"--memory is .*at least"):
            ko.prepare([plain], tmp_path / "store", memory=memory)
    assert not (tmp_path / "store").exists()


def test_a_plate_without_cells_adds_none(plain, tmp_path):
    adata(DOUBLES)[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    for paths in ([plain, tmp_path / "none.h5ad"], [tmp_path / "none.h5ad", plain]):
        store = ko.prepare(paths, tmp_path / paths[0].stem, memory="60KB")
        assert by_name(store) == by_name(Screen.read(plain))
        assert (store.units, store.total) == ("counts", None)
    with pytest.raises(UserError, match="No control cells"):
        ko.prepare([tmp_path / "none.h5ad"], tmp_path / "store")


def test_row_pointers_of_fewer_cells_are_refused(plain, tmp_path):
    shutil.copy(plain, tmp_path / "cut.h5ad")
    with h5py.File(tmp_path / "cut.h5ad", "r+") as file:
        starts = file["X/indptr"][:-5]
        del file["X/indptr"]
        file["X/indptr"] = starts
    for paths in ([tmp_path / "cut.h5ad"], [tmp_path / "cut.h5ad", plain]):
        with pytest.raises(UserError, match=r"cut\.h5ad .*indptr is of 180 cells and its shape of 185"):
            ko.prepare(paths, tmp_path / "store")


@pytest.mark.parametrize("layout", ["csc"])
def test_genes_together_are_refused(tmp_path, layout):
    data = adata(DOUBLES)
    data.X = data.X.tocsc()
    data.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(UserError, match="tocsr"):
        ko.prepare([tmp_path / "csc.h5ad"], tmp_path / "store")


@pytest.mark.slow
def test_kills_at_random_moments(plain, tmp_path):
    """A process that is killed again and again ends with the bytes of one that never was."""
    expected = content(ko.prepare([plain], tmp_path / "whole", memory="60KB") and tmp_path / "whole")
    rng, context = np.random.default_rng(0), multiprocessing.get_context("fork")
    for _ in range(30):
        process = context.Process(target=_prepare_small, args=(plain, tmp_path / "store"))
        process.start()
        process.join(float(rng.uniform(0, 0.6)))
        process.kill()
        process.join()
    _prepare_small(plain, tmp_path / "store")
    assert content(tmp_path / "store") == expected


def _prepare_small(plain, folder):
    build.prepare([plain], folder, memory="60KB")
