import numpy as np
import pytest
import torch

from knockon.data.sampler import Sampler, resident
from knockon.data.screen import Screen
from knockon.types import Label, UserError

from .screens import DOUBLES, adata


@pytest.fixture
def screen():
    return Screen.from_anndata(adata(DOUBLES))


def sampler(screen, **changes):
    settings = {"conditions": screen.conditions, "sets": 3, "cells": 8, "seed": 0} | changes
    return Sampler(screen, screen.spec(), **settings)


def rows_of(values, screen):
    """Rows of the screen that hold these cells; all cells of the screen differ."""
    everything = screen.gather(np.arange(screen.matrix.shape[0]))
    return [
        int(np.flatnonzero((everything == cell).all(axis=1))[0])
        for cell in values.reshape(-1, values.shape[-1])
    ]


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("target", "control"))


def test_cells_are_of_their_condition_and_controls_are_controls(screen):
    batch = sampler(screen).batch(0)
    assert batch.target.shape == batch.control.shape == (3, 8, 40)
    spec = screen.spec()
    for cells, codes in zip(batch.target.numpy(), batch.condition.perturbation, strict=True):
        label = Label.of([spec.perturbations[code - 1] for code in codes if code])
        assert set(rows_of(cells, screen)) <= set(screen.rows[label].tolist())
    assert set(rows_of(batch.control.numpy(), screen)) <= set(screen.rows[Label()].tolist())


def test_a_batch_depends_on_seed_and_step_only(screen):
    one = sampler(screen)
    one.batch(5)
    assert same(one.batch(7), sampler(screen).batch(7))
    assert not same(one.batch(7), one.batch(8))
    assert not same(one.batch(7), sampler(screen, seed=1).batch(7))
    assert same(one.batch(7), one.batch(7, 0))
    assert not same(one.batch(7), one.batch(7, 1))


def test_cells_repeat_only_where_there_are_too_few(screen):
    for step in range(10):
        for cells in sampler(screen, cells=15).batch(step).target.numpy():
            assert len(set(rows_of(cells, screen))) == 15
    assert sampler(screen, cells=64).batch(0).target.shape == (3, 64, 40)
    drawn = [
        len(set(rows_of(c, screen)))
        for c in sampler(screen, cells=15, sets=9, replace=True).batch(0).target.numpy()
    ]
    assert min(drawn) < 15


def test_copies_are_told_from_cells(screen):
    """Every cell of a small condition comes once, and copies of them after it."""
    assert sampler(screen, cells=5).batch(0).real is None
    batch = sampler(screen, cells=64, sets=9).batch(0)
    spec = screen.spec()
    for cells, real, codes in zip(batch.target, batch.real, batch.condition.perturbation, strict=True):
        rows = screen.rows[Label.of([spec.perturbations[code - 1] for code in codes if code])]
        assert real.tolist() == [place < len(rows) for place in range(64)]
        assert set(rows_of(cells[real].numpy(), screen)) == set(rows.tolist())
        assert set(rows_of(cells[~real].numpy(), screen)) <= set(rows.tolist())
    assert sampler(screen, cells=64, replace=True).batch(0).real is None


def test_conditions_and_cells_are_drawn_evenly(screen):
    draws = sampler(screen, cells=2, sets=900, conditions=[Label.of(["A"]), Label.of(["B"])]).batch(0)
    share = (draws.condition.perturbation[:, 0] == 1).float().mean()
    assert abs(share - 0.5) < 0.07
    used = np.bincount(rows_of(draws.control.numpy(), screen), minlength=30)[:30]
    assert used.min() > 0.5 * used.mean()


def test_a_batch_reads_its_own_cells_only():
    """The cost of a batch is the rows that it reads, however large the screen."""
    read = {}
    for factor in (1, 50):
        screen = Screen.from_anndata(adata({name: factor * count for name, count in DOUBLES.items()}))
        drawn = sampler(screen)
        seen: list[int] = []
        gather = drawn._gather
        drawn._gather = lambda rows, gather=gather, seen=seen: (seen.append(len(rows)), gather(rows))[1]
        drawn.batch(0)
        read[factor] = sum(seen)
    assert read[1] == read[50] == 2 * 3 * 8


def test_controls_share_the_context():
    data = adata({"control": 40, "A": 40}, cell_type=["T", "B"] * 40)
    screen = Screen.from_anndata(data)
    drawn = sampler(screen)
    assert drawn.notes == ()
    batch = drawn.batch(0)
    for cells, code in zip(batch.control.numpy(), batch.condition.covariates[:, 0], strict=True):
        assert {data.obs["cell_type"].iloc[row] for row in rows_of(cells, screen)} == {"BT"[code]}


def test_missing_controls_are_replaced_and_that_is_said():
    screen = Screen.from_anndata(adata({"control": 40, "A": 40}, cell_type=["T"] * 50 + ["B"] * 30))
    assert sampler(screen).notes == ("no control cells in B: the control cells of all contexts stand in",)
    assert sampler(screen, sets=20).batch(0).control.shape == (20, 8, 40)


def test_gathering_on_a_device_equals_indexing(screen):
    rows = np.array([5, 0, 5, 120, 7])
    assert (resident(screen, "cpu")(rows).numpy() == screen.gather(rows)).all()


def test_cells_without_values_are_gathered():
    data = adata({"control": 9, "A": 9})
    values = data.X.toarray()
    values[:9] = 0
    data.X = values
    screen = Screen.from_anndata(data)
    assert resident(screen, "cpu")(np.arange(4)).sum() == 0
    assert (resident(screen, "cpu")(np.arange(18)).numpy() == values).all()


def test_a_screen_on_disk_gives_the_same_batches(tmp_path):
    adata(DOUBLES).write_h5ad(tmp_path / "screen.h5ad")
    here, there = (Screen.read(tmp_path / "screen.h5ad", backed=backed) for backed in (False, True))
    assert same(sampler(here).batch(3), sampler(there).batch(3))


def test_conditions_without_cells_are_refused(screen):
    with pytest.raises(UserError, match="Conditions without cells: X"):
        sampler(screen, conditions=[Label.of(["X"])])
    with pytest.raises(UserError, match="Conditions without cells"):
        sampler(screen, conditions=[])


def test_conditions_are_drawn_as_often_as_they_have_cells(screen):
    alike, by_cells = (sampler(screen, sets=4000, cells=1, by_cells=x).batch(0) for x in (False, True))
    sizes = np.array([len(screen.rows[label]) for label in screen.conditions])
    codes = screen.spec().encode(screen.conditions).perturbation
    for batch, wanted in ((alike, np.full(len(sizes), 1 / len(sizes))), (by_cells, sizes / sizes.sum())):
        same = (batch.condition.perturbation[:, None] == codes).all(-1).float()
        np.testing.assert_allclose(same.mean(0).numpy(), wanted, atol=0.03)


def test_what_was_embedded_is_given_instead_of_values(screen):
    table = torch.arange(2.0 * screen.matrix.shape[0]).view(-1, 2)
    batch, plain = sampler(screen, embedded=table).batch(3), sampler(screen).batch(3)
    assert batch.embedded is not None
    assert batch.embedded[..., 0].flatten().tolist() == [
        2 * row for row in rows_of(plain.target.numpy(), screen)
    ]
    assert batch.target.shape == plain.target.shape
    assert not batch.target.any()
