from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.stats

from knockon.data.design import Simulation
from knockon.data.expectation import expected_log1p, fill_cube
from knockon.data.network import Shape, draw_network
from knockon.data.simulate import PRESETS, contexts, demo, interaction, simulate, tiny, truth
from knockon.types import UserError

TINY = tiny()


@pytest.fixture(scope="module")
def screen() -> ad.AnnData:
    return simulate(TINY)


@pytest.fixture(scope="module")
def drug_screen() -> ad.AnnData:
    return simulate(replace(contexts(), cells=1_000, truth_cells=128))


def log_fold(screen):
    """Log fold change of the expected expression: conditions x genes."""
    expected = np.log(truth(screen, logged=False).astype(float))
    return expected - expected.loc["control"]


def pairs(fold):
    for name in fold.index:
        if "+" in name:
            one, two = name.split("+")
            yield fold.loc[one].to_numpy(), fold.loc[two].to_numpy(), fold.loc[name].to_numpy()


# What is written ---------------------------------------------------------------------------------


def test_screen_has_what_the_rest_reads(screen):
    assert screen.shape == (TINY.cells, TINY.genes)
    assert screen.X.dtype == np.float32
    assert screen.X.format == "csr"
    counts = screen.layers["counts"]
    assert counts.format == "csr"
    assert (counts.data == counts.data.round()).all()
    assert (counts.data > 0).all()
    scale = TINY.total / screen.obs["n_counts"].to_numpy()
    np.testing.assert_allclose(np.expm1(screen.X.toarray()), counts.toarray() * scale[:, None], rtol=1e-4)
    assert list(screen.obs["perturbation"].cat.categories[-1:]) == ["control"]
    assert (screen.obs["control"] == (screen.obs["perturbation"] == "control")).all()
    assert "cell_type" not in screen.obs
    assert screen.obs["perturbation"].nunique() == 1 + TINY.singles + TINY.doubles
    assert not any(set("+_@| ") & set(name) for name in screen.var_names)


def test_perturbed_genes_are_in_the_panel_and_both_singles_are_measured(screen):
    conditions = set(screen.obs["perturbation"])
    for name in conditions - {"control"}:
        for gene in name.split("+"):
            assert gene in screen.var_names
            assert gene in conditions


def test_orphans_are_measured_in_doubles_only():
    screen = simulate(replace(TINY, orphans=3))
    names = set(screen.obs["perturbation"])
    partners = {gene for name in names if "+" in name for gene in name.split("+")}
    assert len(partners - names) == 3


def test_file_keeps_the_truth(screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    assert (back.X != screen.X).nnz == 0
    for logged in (True, False):
        assert truth(back, logged=logged).equals(truth(screen, logged=logged))
    some = back[:, 5:20]
    assert truth(some).equals(truth(screen).iloc[:, 5:20])
    assert back.uns["simulation"]["seed"] == 0


# Determinism -------------------------------------------------------------------------------------


def test_same_seed_same_bits(screen):
    again, other = simulate(TINY), simulate(replace(TINY, seed=1))
    assert again.X.data.tobytes() == screen.X.data.tobytes()
    assert again.obs.equals(screen.obs)
    assert not truth(other).equals(truth(screen))


def test_truth_does_not_depend_on_the_cells_drawn(screen):
    assert truth(simulate(replace(TINY, cells=400))).equals(truth(screen))


# The truth is the expectation --------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e-4, 0.3, 20.0, 600.0])
@pytest.mark.parametrize(("dispersion", "scale"), [(0.05, 1.0), (1.0, 0.2), (5.0, 4.0)])
def test_expected_log1p_is_the_sum_over_counts(mean, dispersion, scale):
    count = np.arange(200_000)
    weight = scipy.stats.nbinom.pmf(count, 1 / dispersion, 1 / (1 + dispersion * mean))
    value = expected_log1p(np.array([mean]), np.array([dispersion]), np.array([scale]))
    np.testing.assert_allclose(value, weight @ np.log1p(scale * count), rtol=1e-5)


def test_points_integrate():
    points = fill_cube(1_000, 6)
    assert points.shape == (1_024, 6)
    assert ((points > 0) & (points < 1)).all()
    np.testing.assert_allclose(points.mean(0), 0.5, atol=1e-3)
    np.testing.assert_allclose(np.prod(2 * points, axis=1).mean(), 1.0, atol=0.01)


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, cells=25_000, control_share=0.1, penetrance=0.7),
        replace(TINY, cells=25_000, mode="knockdown", seed=3),
        replace(TINY, cells=25_000, singles=2, doubles=1, drugs=2, doses=(0.5, 5.0), cell_types=2),
    ],
    ids=["activation", "knockdown", "drugs in two cell types"],
)
def test_cells_converge_to_the_truth(config):
    screen = simulate(config)
    expected = {"X": truth(screen), "normalized": truth(screen, logged=False)}
    scale = config.total / screen.obs["n_counts"].to_numpy()
    values = {"X": screen.X.toarray(), "normalized": screen.layers["counts"].toarray() * scale[:, None]}
    names = screen.obs["perturbation"].astype(str)
    if config.cell_types > 1:
        names += " | " + screen.obs["cell_type"].astype(str)
    for key, table in expected.items():
        assert set(table.index) == set(names)
        z = []
        for name, mean in table.iterrows():
            cells = values[key][names == name]
            z.append((cells.mean(0) - mean) / (cells.std(0, ddof=1) / np.sqrt(len(cells))))
        assert 0.9 < np.std(z) < 1.15, key
        assert abs(np.mean(z)) < 0.15, key
        assert np.abs(z).max() < 6, key


# The mechanism -----------------------------------------------------------------------------------


def test_network_settles():
    shape = Shape(genes=200, regulators=40, perturbed=30, programs=8, interaction=2.5)
    rng = np.random.default_rng(0)
    network = draw_network(shape, rng)
    push = rng.normal(0, 2, (50, 40)).astype(np.float32)
    drive = rng.normal(0, 0.5, (50, 8)).astype(np.float32)
    regulators, activity = network.settle(push, drive)
    again = network.respond(regulators @ network.inputs[0] + drive, regulators @ network.inputs[1])
    np.testing.assert_allclose(activity, again, atol=1e-3)
    np.testing.assert_allclose(regulators, push + activity @ network.feedback, atol=1e-5)


def test_responses_are_bounded_and_a_gate_needs_both():
    shape = Shape(genes=50, regulators=30, perturbed=5, programs=40, interaction=2.0)
    network = draw_network(shape, np.random.default_rng(1))
    drive, nothing = np.full((1, 40), 2.0, np.float32), np.zeros((1, 40), np.float32)
    assert np.allclose(network.respond(nothing, nothing), 0)
    alone, other, both = (
        network.respond(*d)[0] for d in ((drive, nothing), (nothing, drive), (drive, drive))
    )
    gated = network.inputs[1].any(0)
    assert 5 < gated.sum() < 35
    assert (alone[~gated] <= 2 + 1e-5).all()
    assert (both[gated] <= 4 + 1e-5).all()
    assert (both[gated] > (alone + other)[gated]).mean() > 0.7


def test_without_curvature_perturbations_add_up():
    """Independent guides and states multiply expectations, so linear responses add up in their logarithm."""
    fold = log_fold(simulate(replace(TINY, interaction=0.0, effect=0.4, truth_cells=4_096)))
    for one, two, both in pairs(fold):
        np.testing.assert_allclose(both, one + two, atol=0.02)
        assert np.abs(one + two).max() > 0.5


def test_doubles_buffer_enhance_and_mask():
    fold = log_fold(simulate(replace(interaction(), cells=2_000, truth_cells=256)))
    one, two, both = (np.array(part) for part in zip(*pairs(fold), strict=True))
    agree = (one * two > 0) & (np.minimum(abs(one), abs(two)) > 0.1)
    excess = (both - one - two) * np.sign(one)
    assert (excess[agree] < -0.3).sum() > 20, "buffering"
    assert (excess[agree] > 0.2).sum() > 20, "synergy"
    masked = (abs(one) > 0.4) & (abs(two) < 0.1) & (abs(both) < 0.5 * abs(one))
    assert masked.any(), "one perturbation hides the other"


def test_additive_prediction_leaves_a_residual():
    expected = truth(simulate(replace(demo(), cells=2_000, truth_cells=256)))
    delta = expected - expected.loc["control"]
    residual = [np.linalg.norm(both - one - two) for one, two, both in pairs(delta)]
    length = [np.linalg.norm(both) for _, _, both in pairs(delta)]
    assert 0.02 < np.median(np.divide(residual, length)) < 0.4
    assert np.max(np.divide(residual, length)) > 0.15


def test_null_perturbations_change_only_themselves(screen):
    fold = log_fold(screen)
    singles = [name for name in fold.index if name in fold.columns]
    elsewhere = {name: fold.loc[name].drop(name).abs().max() for name in singles}
    assert sum(value < 1e-3 for value in elsewhere.values()) == round(TINY.null_share * TINY.singles)


@pytest.mark.parametrize(("mode", "sign"), [("activation", 1), ("knockdown", -1)])
def test_perturbed_gene_changes_strongly(mode, sign):
    fold = log_fold(simulate(replace(TINY, mode=mode)))
    own = np.array([fold.loc[name, name] for name in fold.index if name in fold.columns])
    assert (sign * own > 0.7).all()


def test_escaped_cells_dilute_the_effect():
    full, half = (simulate(replace(TINY, penetrance=share)) for share in (1.0, 0.5))
    for screen, share in ((full, 1.0), (half, 0.5)):
        treated = screen.obs[~screen.obs["control"]]
        slots = treated["perturbation"].astype(str).str.count(r"\+") + 1
        np.testing.assert_allclose(treated["acting"].sum() / slots.sum(), share, atol=0.05)
        assert (screen.obs.loc[screen.obs["control"], "acting"] == 0).all()
    singles = [name for name in truth(full).index if name in full.var_names]
    change = [
        truth(s, logged=False).loc[singles] - truth(s, logged=False).loc["control"] for s in (full, half)
    ]
    np.testing.assert_allclose(change[1], change[0] / 2, atol=0.1 * np.abs(change[0]).max().max())


def test_dose_response_rises(drug_screen):
    expected = truth(drug_screen)
    assert set(drug_screen.obs["cell_type"]) == {"type1", "type2", "type3"}
    for letter in "ABCDEF":
        for kind in ("type1", "type2", "type3"):
            ladder = [f"drug{letter}@{dose:g}uM | {kind}" for dose in contexts().doses]
            length = [np.linalg.norm(expected.loc[n] - expected.loc[f"control | {kind}"]) for n in ladder]
            assert (np.diff(length) > 0).all()


def test_cell_types_differ_and_respond_differently(drug_screen):
    expected = truth(drug_screen)
    one, two = (
        expected.loc[f"drugA@100uM | {t}"] - expected.loc[f"control | {t}"] for t in ("type1", "type2")
    )
    assert np.linalg.norm(expected.loc["control | type1"] - expected.loc["control | type2"]) > 2
    assert 0.2 < np.corrcoef(one, two)[0, 1] < 0.98


# Realism -----------------------------------------------------------------------------------------


def test_counts_look_like_a_screen():
    screen = simulate(replace(demo(), cells=3_000, control_share=0.4, truth_cells=16))
    counts = screen.layers["counts"]
    assert 0.65 < 1 - counts.nnz / np.prod(counts.shape) < 0.9
    library = screen.obs["n_counts"].to_numpy(float)
    assert 0.35 < np.log(library).std() < 0.55
    control = screen.obs["control"].to_numpy()
    cells, size = counts[control].toarray(), library[control, None] / library[control].mean()
    mean = cells.sum(0) / size.sum()
    excess = ((cells - size * mean) ** 2 - size * mean).sum(0)
    dispersion = excess / (size**2).sum() / np.maximum(mean, 1e-9) ** 2
    rare, common = (np.median(dispersion[(mean > a) & (mean < b)]) for a, b in ((0.1, 0.5), (2, 50)))
    assert 0.1 < common < rare < 1.0


def test_conditions_vary_in_size(screen):
    size = screen.obs["perturbation"].value_counts()
    assert size.min() >= 2
    assert size["control"] > 0.05 * TINY.cells
    assert size.drop("control").max() > 1.3 * size.drop("control").min()


# Configuration -----------------------------------------------------------------------------------


def test_presets_are_named_configurations():
    assert [preset.__name__ for preset in PRESETS] == ["tiny", "demo", "norman", "contexts", "interaction"]
    assert all(isinstance(preset(), Simulation) for preset in PRESETS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": 10}, "too few"),
        ({"doubles": 29}, "cannot be made"),
        ({"orphans": 9}, "cannot be made"),
        ({"genes": 11}, "do not fit"),
        ({"penetrance": 0.0}, "Penetrance"),
        ({"drugs": 30}, "at most 26"),
        ({"drugs": 1, "doses": (0.0,)}, "positive doses"),
    ],
)
def test_impossible_screens_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **change)


def test_other_screens_have_no_truth():
    with pytest.raises(UserError, match="no truth"):
        truth(ad.AnnData(np.zeros((2, 3), np.float32)))
