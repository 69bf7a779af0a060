import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from knockon.evaluate import suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.scores import anchors
from knockon.evaluate.suites.vcc_2026 import METRICS, config
from knockon.evaluate.summary import BASELINES
from knockon.types import UserError

from .toy import SCALES, known, log1p, with_control
from .toy_pairs import lonely, pairs, reality, scored, split_of, world

SHORT = {
    "pds_cosine": "pds",
    "de_wilcoxon_direction_fidelity_yield_raw": "fidelity",
    "de_wilcoxon_direction_reach_raw": "reach",
    "de_wilcoxon_sig_jaccard": "jaccard",
    "de_wilcoxon_lfc_nmae": "nmae",
    "expr_mse_unbiased_capped_norm": "mse",
}
TABLE = pd.DataFrame(
    {
        "replicate": (1.0, 0.952, 1.0, 0.670, 0.171, -0.017),
        "half": (1.0, 0.547, 0.992, 0.493, 0.513, 0.244),
        "mean": (0.485, 0.025, 0.337, 0.003, 0.914, 0.959),
        "no change": (0.561, 0.003, 0.062, 0, 0.981, 1.016),
        "sign flip": (0.0, 0.074, 0, 0.637, 2.01, 3.91),
    },
    index=[*SHORT.values()],
)
"""Published numbers of the same design with other draws."""
TOLERANCE = (0.08, 0.08, 0.08, 0.09, 0.1, 0.06)


@pytest.fixture(scope="module")
def scores() -> dict[str, pd.DataFrame]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {name: scored(pairs(name, counts=True), "vcc2026") for name in (*SCALES, "mean")}


@pytest.mark.slow
def test_the_published_table_is_reproduced(scores):
    found = pd.DataFrame({name: table.mean().rename(SHORT) for name, table in scores.items()})
    off = (found.loc[TABLE.index, TABLE.columns] - TABLE).abs()
    assert (off.le(TOLERANCE, axis=0)).all(axis=None), off
    assert found.loc["pds", "sign flip"] == 0  # every sign wrong is the worst
    assert found.loc["reach", "sign flip"] == 0
    assert found.loc["jaccard", "sign flip"] > 0.5  # which is blind to signs
    assert abs(found.loc["mse", "replicate"]) < 0.03  # noise is no error here
    assert found.loc["pds", "half"] == found.loc["pds", "replicate"] == 1  # blind to scale
    assert found.loc["fidelity", "half"] < 0.7 * found.loc["fidelity", "replicate"]


@pytest.mark.filterwarnings("ignore")  # of the package, which is called by itself here
@pytest.mark.slow
def test_our_numbers_are_those_of_the_package_on_files(scores, tmp_path, monkeypatch, capfd):
    import cell_eval2  # noqa: PLC0415 (some seconds)

    name, real = "half", world().real
    with_control(world().predictions[name], real).write_h5ad(tmp_path / "pred.h5ad")
    known(real).write_h5ad(tmp_path / "real.h5ad")
    preset = cell_eval2.EvalConfig.from_preset("vcc2026")
    settings = replace(
        *(preset,),
        pert_col="perturbation",
        control="control",
        de=replace(preset.de, backend="pdex"),
        device="cpu",
    )
    long = cell_eval2.compute_metrics(tmp_path / "pred.h5ad", tmp_path / "real.h5ad", config=settings)
    overall = dict(cell_eval2.aggregate_metrics(long).select("metric", "mean").iter_rows())
    wide = pd.DataFrame(long.to_dict(as_series=False)).pivot(
        index="perturbation", columns="metric", values="value"
    )
    capfd.readouterr()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ours = scored(pairs(name, counts=True), "vcc2026")
    assert capfd.readouterr() == ("", "")
    assert not list(Path.cwd().iterdir())
    assert len(ours.columns) == len(METRICS)
    for metric in ours:
        if metric in wide:
            np.testing.assert_allclose(ours[metric], wide[metric].reindex(ours.index), atol=1e-6, rtol=0)
        np.testing.assert_allclose(ours[metric].mean(), overall[metric], atol=1e-6)


def test_settings_are_the_presets_but_for_names_and_device():
    from cell_eval2 import EvalConfig  # noqa: PLC0415

    preset, ours = EvalConfig.from_preset("vcc2026").to_dict(), config(set()).to_dict()
    changed = {name for name in preset if preset[name] != ours[name]}
    assert changed == {"pert_col", "control", "device", "num_threads", "de"}
    assert {name for name in preset["de"] if preset["de"][name] != ours["de"][name]} == {"backend"}
    assert config({"A+B"}).target_gene_map == {"A+B": None}


def test_baselines_and_halves_are_scored_beside_a_prediction():
    truth = reality(counts=True)
    found = anchors(truth.select(truth.labels[:3]), split_of(truth.source), "vcc2026", cells=40)
    means = found.pivot_table(index="metric", columns="model", values="value")
    means.index = means.index.str.removeprefix("vcc2026:")
    assert set(means) == {*BASELINES, "ceiling"}
    assert set(means.index) == {metric.name.removeprefix("vcc2026:") for metric in METRICS}
    assert means.loc["expr_mse_unbiased_capped_norm", "ceiling"] < 0.1
    assert 0.8 < means.loc["expr_mse_unbiased_capped_norm", "no_effect"] < 1.2
    assert means.loc["de_wilcoxon_sig_jaccard", "no_effect"] < 0.05


def test_combinations_have_no_target_gene(make):
    adata = make.cells(["control", "A", "B", "A+B", "B+C"])
    adata.X = np.rint(np.expm1(adata.X.toarray()))
    screen = make.screen(adata)
    split = make.split(screen, lambda label: len(label.perturbations) == 2)
    predicted = make.cells(["A+B", "B+C"], seed=1)
    predicted.X = np.rint(np.expm1(predicted.X.toarray()))
    found = suites.score(Pairs.of(predicted, screen, split), "vcc2026")
    assert set(found["condition"]) == {"A+B", "B+C", suites.ALL}


def test_without_real_effects_there_is_no_ratio_to_them():
    truth = reality(counts=True)
    control = truth.source.matrix[truth.source.control_rows(truth.labels[0])].astype(np.float64)
    cells = tuple(control[part] for part in np.array_split(np.arange(300), 12))
    truth = replace(truth, counts=cells)
    found = suites.score(Pairs(truth=truth, cells=truth.cells, counts=cells), "vcc2026")
    assert "vcc2026:expr_mse_unbiased_capped_norm" not in set(found["metric"])
    assert "vcc2026:expr_mse_unbiased" in set(found["metric"])


def test_values_in_log1p_are_refused():
    with pytest.raises(UserError, match=r"screen is in log1p.*--layer counts"):
        suites.score(pairs("half"), "vcc2026")
    foreign = log1p(world().predictions["half"])
    with pytest.raises(UserError, match=r"does not tell the control cells.*knockon export"):
        suites.score(Pairs.align(foreign, reality(counts=True)), "vcc2026")


def test_what_the_package_refuses_is_said_in_its_words():
    found = pairs("half", counts=True)
    assert found.counts is not None
    fractional = replace(found, counts=tuple(cells * 0.5 for cells in found.counts))
    with pytest.raises(UserError, match=r"cell-eval2 refuses to score .*fractional"):
        suites.score(fractional, "vcc2026")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cell_eval2", None)
    with pytest.raises(UserError, match=r"needs the package cell-eval2.*knockon\[eval\]"):
        suites.score(pairs("half", counts=True), "vcc2026")


def test_among_one_condition_none_is_told_apart():
    found = scored(lonely(counts=True), "vcc2026")
    assert len(found) == 1
    assert not [name for name in found if name.startswith("pds")]
