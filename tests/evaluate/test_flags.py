"""Each flag is raised by the prediction that it is meant for, and none by a replicate."""

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon.data import simulate, splits
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.evaluate import flags, scores
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import exact
from knockon.evaluate.suites import ALL
from knockon.evaluate.truth import Truth
from knockon.models.additive import Config as Additive
from knockon.models.mean_shift import Config as MeanShift
from knockon.predict import generate

HELD_OUT = ("KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2")


@pytest.fixture(scope="module")
def simulated():
    """Six doubles of singles that are measured, about 120 cells each, targets among the genes."""
    config = replace(simulate.tiny(), cells=3000, doubles=12, control_share=0.1, seed=1)
    screen = Screen.from_anndata(simulate.simulate(config), columns=Columns())
    return screen, splits.make("additive", screen, fraction=0.5)


@pytest.fixture(scope="module")
def truth(simulated):
    return Truth.of(*simulated)


def halved(truth, seed=0):
    return scores._halved(truth, np.random.default_rng(seed))


def raised(pairs):
    return set(flags.check(pairs)["flag"])


# ---- a replicate raises none -------------------------------------------------------------------------


def test_a_replicate_raises_no_flag(truth):
    for seed in range(10):
        assert flags.check(halved(truth, seed)).empty


@pytest.mark.parametrize("cells", [1, 2, 10, 30, 300])
def test_a_second_experiment_raises_no_flag_however_large(make, screen, split, cells):
    replicate = make.cells(["control", "A+B", "B+C", "C+D"], cells=cells, seed=4)
    assert flags.check(Pairs.of(replicate, screen, split)).empty


def few(truth, cells, seed):
    """So many real cells as prediction, and the others as truth."""
    orders = [np.random.default_rng(seed).permutation(some.shape[0]) for some in truth.cells]
    parts = list(zip(truth.cells, orders, strict=True))
    rest = replace(truth, cells=tuple(some[order[cells:]] for some, order in parts))
    return Pairs(truth=rest, cells=tuple(some[order[:cells]] for some, order in parts))


def test_replicates_of_real_cells_raise_no_flag(shared, make):
    screen = make.screen(anndata.read_h5ad(shared / "data" / "norman19.h5ad"))
    truth = Truth.of(screen, make.split(screen, lambda label: label.perturbation in HELD_OUT))
    for seed in range(5):
        assert flags.check(halved(truth, seed)).empty
        for cells in (2, 10, 20, 80):
            assert flags.check(few(truth, cells, seed)).empty, (cells, seed)


def test_replicates_of_real_cells_of_weak_perturbations_raise_no_flag(shared, make):
    screen = make.screen(anndata.read_h5ad(shared / "data" / "papalexi21.h5ad"))
    weak = ("IFNGR1", "IRF1", "STAT5A", "SMAD4", "POU2F2", "CUL3")
    truth = Truth.of(screen, make.split(screen, lambda label: label.perturbation in weak))
    for seed in range(2):
        assert flags.check(halved(truth, seed)).empty
        assert flags.check(few(truth, 30, seed)).empty


# ---- adversaries -------------------------------------------------------------------------------------


def each(change):
    """Change the cells of each condition of a replicate."""

    def predict(pairs):
        draw = np.random.default_rng(0)
        made = [
            change(cells.toarray(), row, pairs.truth, draw).clip(0) for row, cells in enumerate(pairs.cells)
        ]
        return replace(pairs, cells=tuple(exact(sp.csr_matrix(x)) for x in made))

    return predict


def changes(truth):
    return truth.moments.mean - truth.control


def control_cells(truth, count, draw):
    rows = truth.screen.control_rows(truth.labels[0])
    return truth.screen.gather(draw.choice(rows, count)).astype(np.float64)


def flipped(x, row, truth, draw):
    return control_cells(truth, len(x), draw) - changes(truth)[row]


def half(x, row, truth, draw):
    mixed = len(x) * 6 // 10
    return np.concatenate([control_cells(truth, mixed, draw), x[mixed:]])


def overshooting(x, row, truth, draw):
    return x + 1.5 * changes(truth)[row]


def spread_out(x, row, truth, draw):
    """Same means: each value is doubled or taken away."""
    return x * 2 * draw.integers(0, 2, x.shape)


def drawn_together(x, row, truth, draw):
    return 0.3 * x + 0.7 * x.mean(0)


def repeated_mean(x, row, truth, draw):
    return np.tile(x.mean(0), (len(x), 1))


def repeated(x, row, truth, draw):
    return np.tile(x[: len(x) // 4], (4, 1))


def spiked(x, row, truth, draw):
    own = truth.labels[row].perturbations
    for gene in {name for label in truth.screen.conditions for name in label.perturbations} - set(own):
        x[:, truth.screen.genes.index(gene)] += 3
    return x


def never_zero(x, row, truth, draw):
    return np.where(x == 0, 0.01, x)


def training_cells(x, row, truth, draw):
    return truth.screen.cells_of(truth.train[0])[: len(x)].astype(np.float64)


def training_mean(x, row, truth, draw):
    """Other cells, moved to the mean of a training condition."""
    wanted, cells = truth.screen.cells_of(truth.train[0]).mean(0), control_cells(truth, 2000, draw)
    return cells * wanted / cells.mean(0).clip(1e-9)


def alike(pairs):
    pooled = sp.vstack(pairs.cells).toarray()
    draw = np.random.default_rng(0)
    return replace(
        pairs,
        cells=tuple(exact(sp.csr_matrix(pooled[draw.permutation(len(pooled))[:100]])) for _ in pairs.cells),
    )


def drifted(pairs):
    rows = pairs.truth.screen.control_rows(pairs.truth.labels[0])
    return replace(pairs, controls={(): exact(pairs.truth.screen.matrix[rows]) * 1.2})


ADVERSARIES = {
    "sign_flip": each(flipped),
    "collapse": alike,
    "scaled": each(half),
    "scaled too far": each(overshooting),
    "drifted_controls": drifted,
    "repeated_cells": each(repeated),
    "repeated_cells of a mean": each(repeated_mean),
    "over_dispersion": each(spread_out),
    "under_dispersion": each(drawn_together),
    "spikes": each(spiked),
    "copies of cells": each(training_cells),
    "copies of a mean": each(training_mean),
    "never_off": each(never_zero),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_an_adversary_raises_its_flag(truth, name):
    pairs = ADVERSARIES[name](halved(truth))
    table = flags.check(pairs)
    flag = name.split(" ")[0]
    assert flag in set(table["flag"])
    found = table[table["flag"] == flag]
    whole = {"collapse": {ALL}, "drifted_controls": {"control"}}
    assert set(found["condition"]) <= whole.get(flag, {str(label) for label in truth.labels})
    assert np.isfinite(found[["value", "limit"]]).all(axis=None)
    assert found["message"].str.len().between(20, 200).all()


def test_copies_are_found_some_training_cells_at_a_time(truth, monkeypatch):
    pairs = ADVERSARIES["copies of cells"](halved(truth))
    whole = flags.check(pairs)
    monkeypatch.setattr(flags, "SEARCHED", 50)
    pd.testing.assert_frame_equal(flags.check(pairs), whole)


@pytest.mark.parametrize("name", ["never_off", "spikes", "drifted_controls", "over_dispersion", "scaled"])
def test_an_adversary_raises_no_more_than_it_deserves(truth, name):
    expected = {"spikes": {"spikes", "scaled"}}.get(name, {name})
    assert raised(ADVERSARIES[name](halved(truth))) <= expected


def test_real_control_cells_have_not_drifted(truth):
    rows = truth.screen.control_rows(truth.labels[0])
    for cells in (1, 5, 50, len(rows)):
        some = exact(truth.screen.matrix[rows[:cells]])
        assert flags.check(replace(halved(truth), controls={(): some})).empty


def test_genes_that_are_missing_have_not_drifted(make, screen, split):
    predicted = make.cells(["control", "A+B", "B+C", "C+D"], seed=4)
    fewer = predicted[:, 1:].copy()
    assert "drifted_controls" not in raised(Pairs.of(fewer, screen, split))


# ---- honest baselines --------------------------------------------------------------------------------


def baseline(simulated, truth, config):
    screen, split = simulated
    model = config.build(screen.spec())
    model.fit_statistics(screen.select((*split.train, *screen.controls)))
    return Pairs.align(generate(model, screen, truth.labels, cells=100), truth)


def test_an_additive_baseline_raises_none(simulated, truth):
    assert raised(baseline(simulated, truth, Additive())) <= {"scaled"}


def test_a_mean_shift_collapses(simulated, truth):
    found = raised(baseline(simulated, truth, MeanShift()))
    assert "collapse" in found
    assert found <= {"collapse", "scaled", "sign_flip"}


# ---- printing ----------------------------------------------------------------------------------------


def test_a_flag_is_described_in_one_line(truth):
    lines = flags.describe(flags.check(alike(halved(truth))))
    start = f"collapse: all {len(truth.labels)} conditions alike (spread "
    assert sum(line.startswith(start) for line in lines) == 1
    table = pd.DataFrame(
        [
            ("scaled", "A", 0.5, 0.6, "a"),
            ("scaled", "B", 9.0, 1.5, "b"),
            ("copies", "A", 0.1, 0.4, "c"),
        ],
        columns=flags.COLUMNS,
    )
    assert flags.describe(table) == ["scaled: 2 conditions, worst B: b", "copies: A: c"]
    assert flags.describe(flags.check(halved(truth))) == []


def test_the_truth_handed_in_is_told(make, screen, split):
    found = flags.check(Pairs.of(make.cells(["A+B", "B+C", "C+D"], seed=9), screen, split))
    assert "very cells that they are scored against" not in " ".join(found["message"])
    truth = Truth.of(screen, split)
    found = flags.check(Pairs(truth=truth, cells=truth.cells))
    told = found[found["message"].str.contains("very cells that they are scored against")]
    assert list(told["condition"]) == [str(label) for label in truth.labels]


def test_a_change_that_points_away_is_told_where_few_genes_are_clear(make, screen, split, monkeypatch):
    truth = Truth.of(screen, split)
    flipped = [
        sp.csr_matrix(np.maximum(2 * control - cells.toarray(), 0))
        for control, cells in zip(truth.control, truth.cells, strict=True)
    ]
    monkeypatch.setattr(flags, "LEAST", len(screen.genes) + 1)  # more than any condition can have
    raised = list(flags.sign_flip(flags.gather(Pairs(truth=truth, cells=tuple(flipped)))))
    assert [name for name, *_ in raised] == [str(label) for label in truth.labels]
    assert all(-1.2 < value < -0.5 and "points away" in message for _, value, _, message in raised)
    replicate = Pairs.align(make.cells([str(label) for label in truth.labels], seed=4), truth)
    assert not list(flags.sign_flip(flags.gather(replicate)))
