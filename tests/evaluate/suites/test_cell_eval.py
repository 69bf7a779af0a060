import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from knockon.evaluate import suites
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.suites import cell_eval
from knockon.types import UserError

from .toy import SCALES, known, log1p, with_control
from .toy_pairs import lonely, pairs, reality, scored, world

TABLE = pd.DataFrame(
    {
        "replicate": (0.029, 0.135, 0.817, 1, 1, 0.965, 0.995, 0.798, 0.889, 0.985),
        "half": (0.045, 0.158, 0.667, 1, 1, 0.952, 0.973, 0.531, 0.733, 0.882),
        "mean": (0.089, 0.194, 0.208, 0.562, 0.403, 0.480, 0.711, 0.006, 0.077, -0.208),
        "no change": (0.094, 0.188, 0.105, 0.590, 0.514, 0.109, 0.570, 0, 0.063, 0.078),
        "sign flip": (0.293, 0.244, -0.664, 0.333, 0.083, -0.952, 0.059, 0.796, 0.867, 0.666),
    },
    index=[
        *("mse", "mae", "pearson_delta", "discrimination_score_l1", "discrimination_score_cosine"),
        *("de_spearman_lfc_sig", "de_direction_match", "overlap_at_N", "pr_auc", "pearson_edistance"),
    ],
)
"""Published numbers of the same design with other draws."""
TOLERANCE = (0.012, 0.01, 0.04, 0.13, 0.16, 0.08, 0.06, 0.09, 0.04, 0.3)


def direct(prediction: str, folder: Path, *, few: bool = False) -> pd.DataFrame:
    """What the package finds in files, called as its users call it."""
    from cell_eval import MetricsEvaluator  # noqa: PLC0415 (some seconds)

    real = log1p(world().real)
    sides = {"pred": with_control(log1p(world().predictions[prediction]), real), "real": known(real)}
    for name, side in sides.items():
        kept = ["control", "G0", "G1"] if few else side.obs["perturbation"].unique()
        side[side.obs["perturbation"].isin(kept)].write_h5ad(folder / f"{name}.h5ad")
    evaluator = MetricsEvaluator(
        *(str(folder / f"{name}.h5ad") for name in sides),
        control_pert="control",
        pert_col="perturbation",
        num_threads=1,
        outdir=str(folder / "out"),
    )
    skipped = list(cell_eval.TOGETHER) if few else None
    results, _ = evaluator.compute(write_csv=False, skip_metrics=skipped)
    return pd.DataFrame(results.to_dict(as_series=False)).set_index("perturbation")


def agree(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """To 1e-6, but for what is undefined for them because the prediction says nothing: 0 for us."""
    theirs = theirs.reindex(ours.index)[ours.columns]
    np.testing.assert_allclose(ours, theirs.fillna(0.0), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")  # of the package, which is called by itself here
@pytest.mark.slow
def test_our_numbers_are_those_of_the_package_on_files(tmp_path, monkeypatch, capfd):
    found = pairs("half")
    few = Pairs.align(log1p(world().predictions["half"]), found.truth.select(found.truth.labels[:2]))
    theirs = direct("half", tmp_path, few=True)
    capfd.readouterr()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = scored(few, "cell-eval")
    assert capfd.readouterr() == ("", "")
    assert not list(Path.cwd().iterdir())
    assert list(ours.index) == ["G0", "G1"]
    assert set(ours) == {*cell_eval.ERRORS, *cell_eval.ALONE}  # two conditions are too few for the others
    agree(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_published_table_is_reproduced_and_every_number_is_the_packages(tmp_path):
    means = {}
    for name in (*SCALES, "mean"):
        (tmp_path / name).mkdir()
        ours, theirs = scored(pairs(name), "cell-eval"), direct(name, tmp_path / name)
        assert len(ours.columns) == len(cell_eval.METRICS)
        agree(ours, theirs)
        means[name] = {**ours.mean(), "called": theirs["de_nsig_counts_pred"].mean()}
        assert 26 < theirs["de_nsig_counts_real"].mean() < 30
    found = pd.DataFrame(means)
    off = (found.loc[TABLE.index, TABLE.columns] - TABLE).abs()
    assert (off.le(TOLERANCE, axis=0)).all(axis=None), off
    np.testing.assert_allclose(found.loc["called", ["replicate", "half"]], [28.7, 15.7], atol=2)
    # signs are seen since 0.6, but not by overlap, precision and areas
    assert found.loc["discrimination_score_cosine", "sign flip"] < 0.1
    assert found.loc[["overlap_at_N", "precision_at_N", "pr_auc"], "sign flip"].min() > 0.7
    # of twelve conditions, clusters tell nothing: here, every sign wrong is ahead of a replicate
    assert found.loc["clustering_agreement", "sign flip"] > found.loc["clustering_agreement", "replicate"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_core_agrees_where_it_defines_the_same(tmp_path):
    """Deviations by definition: ranks are over N - 1 rivals, ties in the middle, and keep the own gene."""
    for name in ("half", "no change", "sign flip"):
        (tmp_path / name).mkdir()
        found = pairs(name)
        scored_only = np.isin(np.arange(len(found.truth.candidates)), found.truth.own)
        rivals = found.truth.rivals & scored_only  # the package is not given the training condition
        found = replace(found, truth=replace(found.truth, rivals=rivals))
        ours, theirs = scored(found, "core"), direct(name, tmp_path / name)
        agree(ours[["mse", "mae", "pearson_delta"]], theirs)
        unnamed = _without_own_gene(name, tmp_path / name)
        rank = (1 - unnamed["discrimination_score_l1"].reindex(ours.index)) * 12
        np.testing.assert_allclose(ours["discrimination"], 1 - rank / 11, atol=1e-6)


def _without_own_gene(name: str, folder: Path) -> pd.DataFrame:
    """The package, of genes that are not called as conditions are, so that none is left out."""
    import anndata  # noqa: PLC0415
    from cell_eval import MetricsEvaluator  # noqa: PLC0415

    sides = [anndata.read_h5ad(folder / f"{side}.h5ad") for side in ("pred", "real")]
    for side in sides:
        side.var_names = [f"x{gene}" for gene in side.var_names]
    evaluator = MetricsEvaluator(
        *sides, control_pert="control", pert_col="perturbation", outdir=str(folder), skip_de=True
    )
    results, _ = evaluator.compute(profile="anndata", write_csv=False, skip_metrics=["pearson_edistance"])
    return pd.DataFrame(results.to_dict(as_series=False)).set_index("perturbation")


@pytest.mark.slow
def test_contexts_are_scored_one_by_one(make):
    texts = ["control", "A", "B", "C"]
    screen = make.screen(make.cells(texts, contexts=["T", "B"]), ("cell_type",))
    split = make.split(screen, lambda label: label.perturbation != "C")
    both = suites.score(
        Pairs.of(make.cells(texts[1:3], seed=1, contexts=["T", "B"]), screen, split), "cell-eval"
    )
    one = make.cells(texts[1:3], seed=1, contexts=["T", "B"])
    one = one[one.obs["cell_type"] == "T"].copy()
    alone = suites.score(Pairs.of(one, screen, split), "cell-eval")
    assert set(alone["condition"]) == {"A | T", "B | T"}
    kept = both[both["condition"].isin(alone["condition"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, alone)


def test_no_prediction_hides_behind_a_nan():
    truth = reality()
    truth = truth.select(truth.labels[:2])
    control = truth.population(truth.labels[0].control())
    found = scored(Pairs(truth=truth, cells=(control, control)), "cell-eval")
    assert found.notna().all(axis=None)
    nothing = ["pearson_delta", "de_spearman_lfc_sig", "overlap_at_N", "de_sig_genes_recall"]
    assert (found[nothing] == 0).all(axis=None)


def test_what_the_real_cells_cannot_tell_is_left_out():
    """Numbers of really significant genes, and what each metric must not blame on the prediction."""
    found = pd.DataFrame(np.nan, index=range(3), columns=[*cell_eval.ERRORS, *cell_eval.ALONE])
    found["de_spearman_sig"] = np.nan
    told = {}
    for numbers in ((0, 5, 0), (0, 5, 5), (0, 5, 6), (0, 0, 0)):
        told[numbers] = cell_eval._told(found.assign(de_nsig_counts_real=numbers))
        for name in ("de_sig_genes_recall", "de_direction_match", "pr_auc", "roc_auc"):
            expected = [0.0 if number else np.nan for number in numbers]
            np.testing.assert_array_equal(told[numbers][name], expected, err_msg=name)
    values = {numbers: float(values["de_spearman_sig"]) for numbers, values in told.items()}
    # the package correlates over conditions with a significant gene: one, or equal ones, have no order
    assert values.pop((0, 5, 6)) == 0
    assert np.isnan(list(values.values())).all()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cell_eval", None)
    with pytest.raises(UserError, match=r"needs the package cell-eval.*knockon\[eval\]"):
        suites.score(pairs("half"), "cell-eval")


def test_only_correlations_are_carried_over_from_halves():
    carried = {metric.name for metric in cell_eval.METRICS if metric.noise == "reliability"}
    correlations = ("pearson_delta", "de_spearman_lfc_sig", "de_spearman_sig")
    assert carried == {f"cell-eval:{name}" for name in correlations}


def test_among_one_condition_none_is_told_apart():
    found = scored(lonely(), "cell-eval")
    assert len(found) == 1
    assert not [name for name in found if name.startswith("discrimination")]


def test_too_many_distances_are_not_computed(monkeypatch):
    truth = reality()
    few = Pairs.align(log1p(world().predictions["half"]), truth.select(truth.labels[:3]))
    monkeypatch.setattr(cell_eval, "MOST", 300**2 * 500 - 1)
    monkeypatch.setattr(cell_eval, "SLOW", ("pearson_edistance", "clustering_agreement"))  # which compiles
    found = scored(few, "cell-eval")
    assert set(found) == {*cell_eval.ERRORS, *cell_eval.ALONE, "de_spearman_sig"}
