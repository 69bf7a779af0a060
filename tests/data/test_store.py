"""Screens that are read from a store while they are used."""

import itertools
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import knockon as ko
from knockon.cli import main
from knockon.data import build, inspect
from knockon.data.ahead import DEPTH, Ahead
from knockon.data.chunks import Sizes
from knockon.data.conventions import Columns
from knockon.data.leaks import audit
from knockon.data.manifest import MANIFEST, _sum
from knockon.data.memory import bytes_of
from knockon.data.room import settle
from knockon.data.sampler import WINDOW, Sampler
from knockon.data.screen import Screen, read
from knockon.data.values import OnDisk
from knockon.model import Recipe, Training
from knockon.models import perturbdiff
from knockon.types import Label, UserError

from .screens import DOUBLES, adata


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file and its store."""
    folder = tmp_path_factory.mktemp("store")
    adata(DOUBLES).write_h5ad(folder / "screen.h5ad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SIZES", Sizes(chunk=128, shard=1024))
        ko.prepare([folder / "screen.h5ad"], folder / "store", memory="60KB")
    return folder


@pytest.fixture
def store(made):
    return Screen.read(made / "store")


@pytest.fixture
def copy(made, tmp_path):
    """A store to be damaged."""
    return shutil.copytree(made / "store", tmp_path / "store")


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 3 if place is None else place] ^= 4
    path.write_bytes(content)


def sampler(screen, **changes):
    settings = {"conditions": screen.conditions, "sets": 3, "cells": 8, "seed": 0} | changes
    return Sampler(screen, screen.spec(), **settings)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("target", "control"))


def test_any_rows_are_read(store):
    whole = store.matrix[:].toarray()
    assert (whole[3:9] == store.matrix[3:9].toarray()).all()
    rng = np.random.default_rng(0)
    for count in (1, 2, 30, 185, 400):
        rows = rng.integers(185, size=count)
        assert (store.gather(rows) == whole[rows]).all()
    assert store.gather(np.empty(0, dtype=np.int64)).shape == (0, 40)
    assert (settle(store, "1GB").matrix.toarray() == whole).all()


def test_values_travel_as_their_place(store):
    text = pickle.dumps(store.matrix.normalized(1e4).panel(np.arange(5)))
    assert len(text) < 1000
    again = pickle.loads(text)
    assert (again[3:9] != store.matrix.normalized(1e4)[3:9][:, :5]).nnz == 0


def test_values_of_another_store_in_the_same_place_are_refused(made, tmp_path):
    ko.prepare([made / "screen.h5ad"], tmp_path / "store")
    text = pickle.dumps(Screen.read(tmp_path / "store").matrix)
    assert pickle.loads(text).shape == (185, 40)
    shutil.rmtree(tmp_path / "store")
    ko.prepare([made / "screen.h5ad"], tmp_path / "store", seed=1)
    with pytest.raises(UserError, match="prepared anew"):
        pickle.loads(text)


def test_prepared_values_stay_prepared_when_they_are_loaded(store):
    ready = replace(store, matrix=store.matrix.normalized(1e4).panel(np.arange(5)), genes=store.genes[:5])
    loaded = settle(ready, "1GB").matrix
    assert isinstance(loaded, sp.csr_matrix)
    np.testing.assert_array_equal(loaded.toarray(), ready.matrix[:].toarray())


def test_little_is_held_for_each_cell(store):
    numbers = next(iter(store.rows.values())).base
    held = numbers.nbytes + store.matrix.data.ends.nbytes
    assert held <= 8 * (store.num_cells + 1)
    assert all(rows.base is numbers for rows in store.rows.values())
    assert list(store.cells)[7] == store.cells[7] == store.cells[7:9][0]


def test_room_decides_where_values_are_and_not_what_is_drawn(store, caplog):
    caplog.set_level("INFO", logger="knockon")
    streamed, loaded = settle(store, "0"), settle(store, "1 MB")
    assert isinstance(streamed.matrix, OnDisk)
    assert isinstance(loaded.matrix, sp.csr_matrix)
    assert isinstance(settle(store).matrix, sp.csr_matrix)
    assert ["stay on disk" in line for line in caplog.messages] == [True, False, False]
    one, other = sampler(streamed), sampler(loaded)
    assert all(same(one.batch(step), other.batch(step)) for step in (0, 1, 2, 7, 3))


@pytest.mark.slow
def test_a_store_trains_predicts_and_is_scored_as_its_file(made, tmp_path):
    recipe = Recipe(model=perturbdiff.small().model, train=Training(steps=3, sets=2, cells=8))
    screen, file = Screen.read(made / "store"), Screen.read(made / "screen.h5ad")
    runs = [
        ko.train(recipe, screen, out=tmp_path / memory, options=ko.Options(memory=memory, device="cpu"))
        for memory in ("0B", "1GB")
    ]
    weights = [(run.folder / "weights.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    predicted = runs[0].predict("test", cells=5)
    again = ko.Run.load(runs[0].folder, screen=made / "screen.h5ad").predict("test", cells=5)
    assert set(predicted.obs["control_cell"]) == set(again.obs["control_cell"])
    tables = [ko.evaluate(predicted, one, runs[0].split) for one in (screen, file)]
    scores = [table[(table["model"] == "perturbdiff") & (table["metric"] == "mse")] for table in tables]
    np.testing.assert_allclose(scores[0]["value"], scores[1]["value"], rtol=1e-4)


def test_a_batch_depends_on_seed_and_step_only(store):
    one = sampler(store)
    ahead = [one.batch(step) for step in (5, 6, 7)]
    assert same(ahead[2], sampler(store).batch(7))
    assert not same(ahead[2], ahead[1])
    assert not same(ahead[2], sampler(store, seed=1).batch(7))
    assert not same(ahead[2], one.batch(7, 1))
    assert same(one.batch(7, 1), sampler(store).batch(7, 1))


def test_windows_give_each_cell_equally_often_and_none_twice(store):
    drawn = sampler(store, conditions=[Label.of(["A"])], sets=1, cells=12)
    rows = store.rows[Label.of(["A"])]
    times, together = np.zeros(len(rows)), set()
    rng = np.random.default_rng(0)
    for _ in range(1000):
        found = drawn._draw(rows, rng) - rows[0]
        assert len(set(found.tolist())) == 12
        times[found] += 1
        together.add(tuple(sorted(found.tolist())))
    assert abs(times / 1000 - 12 / 20).max() < 0.07
    assert len(together) == 20 * 2  # every beginning, and either window first
    big = np.arange(100, 1100)
    found = np.sort(drawn._draw(big, rng))
    assert (np.diff(found) == 1).sum() >= WINDOW - 1
    replaced = sampler(store, replace=True)
    counts = np.bincount(np.concatenate([replaced._draw(big, rng) for _ in range(2000)]), minlength=1100)[
        100:
    ]
    assert abs(counts.mean() - 16) < 0.1
    assert counts.max() < 40


def test_few_cells_are_drawn_one_by_one(store):
    batch = sampler(store, cells=19, conditions=[Label.of(["A"])]).batch(0)
    assert len({cell.numpy().tobytes() for cell in batch.target.flatten(0, 1)}) <= 20
    assert sampler(store, cells=64).batch(0).real is not None


def test_what_comes_next_is_made_ahead():
    made = []
    ahead = Ahead(lambda step, number: (made.append(step), step**2 + number)[1])
    assert [ahead(step) for step in (3, 4, 10)] == [9, 16, 100]
    assert (ahead(11), ahead(11, 1), ahead(12), ahead(12, 1)) == (121, 122, 144, 145)
    assert set(made) <= {3, 4, 5, 6, *range(10, 13 + DEPTH)}
    with pytest.raises(ZeroDivisionError):
        Ahead(lambda step, number: number // step)(0)


def test_a_flipped_bit_is_never_read(copy):
    screen = Screen.read(copy)
    for name in ("data", "indices"):
        path = copy / "X" / name / "c" / "2"
        before = path.read_bytes()
        for place in (0, len(before) // 2, len(before) - 10):
            flip(path, place)
            with pytest.raises(UserError, match=rf"X/{name}/c/2 is damaged.*--verify.*remove it and prepare"):
                Screen.read(copy).matrix[:]
            path.write_bytes(before)
    flip(copy / "X" / "data" / "c" / "4")
    drawn = sampler(screen, sets=40)
    with pytest.raises(UserError, match=r"X/data/c/4 is damaged"):
        for step in range(5):
            drawn.batch(step)
    (copy / "X" / "data" / "c" / "4").unlink()
    with pytest.raises(UserError, match=r"X/data/c/4 is damaged \(No such file"):
        Screen.read(copy).matrix[:]


@pytest.mark.parametrize("name", [MANIFEST, "X/indptr/c/0"])
def test_a_flipped_bit_elsewhere_is_named(copy, name):
    flip(copy / name)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Screen.read(copy)


def test_a_flipped_bit_in_a_name_is_found(copy):
    screen = Screen.read(copy)
    flip(copy / "obs" / "_index" / "c" / "0")
    with pytest.raises(UserError, match="obs/_index is damaged"):
        list(screen.cells)


def lie(folder, **change):
    """Change the manifest of a store, with a checksum that fits."""
    plain = {**json.loads((folder / MANIFEST).read_text())["manifest"], **change}
    text = json.dumps(plain, indent=1)
    (folder / MANIFEST).write_text(json.dumps({"sha256": _sum(text), "manifest": plain}))


def test_a_manifest_that_lies_is_refused(copy):
    value = json.loads((copy / MANIFEST).read_text())["manifest"]
    last = max(range(len(value["stretches"])), key=lambda i: value["stretches"][i]["stop"])
    enlarged = [
        [{**one, "stop": stop} if i == last else one for i, one in enumerate(value["stretches"])]
        for stop in (10**30, 2**62, 2**47, 186, 100_000)
    ]
    for change in (
        {"files": {"../../etc/passwd": ""}},
        {"stretches": value["stretches"][1:]},
        {"format": 99},
        {"values": "many"},
        {"sizes": {"chunk": 0, "shard": 1}},
        {"genes": value["genes"][:-1]},
        {"values": value["values"] - 1},
        {"values": -1},
        {"values": 10**400},
        {"genes": value["genes"][:-1] + value["genes"][:1]},
        *({"stretches": stretches} for stretches in enlarged),
    ):
        lie(copy, **{**value, **change})
        with pytest.raises(UserError):
            Screen.read(copy).matrix[:]
        inspect.inspect(copy)
    lie(copy, **{**value, "genes": value["genes"][:-1] + value["genes"][:1]})
    assert "Duplicate genes" in inspect.inspect(copy).faults[0].text
    lie(copy, **{**value, "stretches": enlarged[1]})
    assert "knockon.json is damaged" in inspect.inspect(copy).faults[0].text
    lie(copy, **{**value, "files": {"a\0b": ""}})
    assert "cannot be read" in inspect.verify(copy).faults[0].text


@pytest.mark.parametrize("name", ["X", "obs/_index/c/0", MANIFEST])
def test_a_link_out_of_a_store_is_not_followed(copy, name):
    (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to(copy.parent / "elsewhere")
    with pytest.raises(UserError, match="leads out of it"):
        Screen.read(copy)
    for report in (inspect.inspect(copy), inspect.verify(copy)):
        assert not report.facts
        assert "leads out of it" in report.faults[0].text


def test_a_link_in_a_ring_is_damage(copy):
    (copy / "X" / "data" / "c" / "2").unlink()
    (copy / "X" / "data" / "c" / "2").symlink_to("2")
    with pytest.raises(UserError, match="X/data/c/2 is damaged"):
        Screen.read(copy).matrix[:]
    assert "X/data/c/2 cannot be read" in inspect.verify(copy).faults[0].text


def test_inspecting_and_verifying(copy, capsys, refused):
    report = dict(inspect.inspect(copy).facts)
    plain = dict(inspect.inspect(copy.parent / "none.h5ad").facts)
    assert not plain
    assert report["cells"] == "185"
    assert report["control cells"] == "30"
    assert report["values"].startswith("counts")
    main(["inspect", str(copy)])
    main(["inspect", str(copy), "--verify"])
    assert "0 of them damaged" in capsys.readouterr().out
    flip(copy / "obs" / "perturbation" / "codes" / "c" / "0")
    (copy / "var" / "zarr.json").unlink()
    with pytest.raises(SystemExit):
        main(["inspect", str(copy), "--verify"])
    said = capsys.readouterr().out
    assert "obs/perturbation/codes/c/0 is not what was written" in said
    assert "var/zarr.json cannot be read" in said
    assert "no checksums" in refused("inspect", copy / "X", "--verify")


def test_the_command_prepares_what_others_read(made, tmp_path, capsys, refused):
    main(["prepare", str(made / "screen.h5ad"), "--out", str(tmp_path / "store"), "--quiet"])
    assert "185 cells x 40 genes, 9 conditions" in capsys.readouterr().out
    main(["split", str(tmp_path / "store"), "--out", str(tmp_path / "split.json")])
    screen = Screen.read(made / "screen.h5ad")
    assert ko.splits.read(tmp_path / "split.json", screen).digest == screen.digest
    assert "--memory is 'much'" in refused(
        "prepare", made / "screen.h5ad", "--out", tmp_path, "--memory", "much"
    )
    assert "No such file" in refused("prepare", tmp_path / "none.h5ad", "--out", tmp_path / "x")


def test_leaks_are_found_alike(made, store):
    screen = Screen.read(made / "screen.h5ad")
    doubled = adata(DOUBLES)
    values = doubled.X.toarray()
    values[155:160] = values[30:35]  # cells of A stand in C+D
    doubled.X = sp.csr_matrix(values)
    split = ko.splits.additive(screen, fraction=1.0)
    found = [list(audit(split, one)) for one in (screen, store, Screen.from_anndata(doubled))]
    assert found[0] == found[1]
    assert len(found[2]) == len(found[0]) + 1


def test_amounts_of_memory():
    texts = {"2GB": 2e9, "512MiB": 512 * 2**20, "1.5 kB": 1500, "0": 0, "3T": 3e12, "7b": None, "-1GB": None}
    for text, expected in texts.items():
        if expected is None:
            with pytest.raises(UserError, match="amount of memory"):
                bytes_of(text)
        else:
            assert bytes_of(text) == expected


def test_other_options_than_those_of_preparing_are_refused(made):
    assert read(made / "store", Columns(units="counts")).units == "counts"
    for columns in (
        Columns(units="log1p"),
        Columns(perturbation_key="perturbation"),
        Columns(unlabelled=True),
    ):
        with pytest.raises(UserError, match="other options"):
            read(made / "store", columns)
    assert len(list(itertools.islice(read(made / "store").cells, 3))) == 3
