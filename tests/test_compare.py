from dataclasses import replace
from pathlib import Path

import anndata
import pandas as pd
import pytest

from knockon import models
from knockon.compare import Comparison, _trial, compare, compare_all, recipes
from knockon.data import simulate, splits
from knockon.data.build import prepare
from knockon.data.screen import Screen
from knockon.evaluate.summary import BASELINES
from knockon.evaluate.tables import render
from knockon.record import Record
from knockon.train import Options
from knockon.types import UserError

QUICK = Comparison(models=("nearest", "latent-additive:small"), cells=16, steps=2)


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()))


@pytest.fixture(scope="module")
def folder(screen: Screen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    compare(screen, splits.additive(screen), out=folder, comparison=QUICK)
    return folder


def test_the_anchors_are_always_there(folder: Path) -> None:
    scores, summary = pd.read_csv(folder / "scores.csv"), pd.read_csv(folder / "summary.csv")
    models = [*BASELINES, "nearest", "latent_additive-small", "ceiling"]
    assert list(scores["model"].unique()) == models
    assert list(summary["model"].unique()) == models
    floor = summary[summary["model"] == "no_effect"].set_index("metric")
    assert (floor["mean"] == floor["floor"]).all()


def test_the_means_are_of_the_scores(folder: Path) -> None:
    scores, summary = pd.read_csv(folder / "scores.csv"), pd.read_csv(folder / "summary.csv")
    means = scores.groupby(["model", "metric"])["value"].mean()
    for line in summary.itertuples():
        assert line.mean == pytest.approx(means[line.model, line.metric])
        assert line.low - 1e-9 <= line.mean <= line.high + 1e-9


def test_generated_cells_are_compared_too(screen: Screen, tmp_path: Path) -> None:
    comparison = Comparison(models=("nearest",), suite=("generation",))
    summary = compare(screen, splits.additive(screen), out=tmp_path, comparison=comparison)
    assert list(summary["model"].unique()) == [*BASELINES, "nearest", "ceiling"]
    means = summary.set_index(["metric", "model"])["mean"]
    assert means["w2", "ceiling"] < means["w2", "no_effect"]
    assert means["mean_r2", "ceiling"] > means["mean_r2", "no_effect"]
    assert "w2 ↓" in list(render(summary).columns[0].cells)


def test_only_what_is_missing_is_done_again(screen: Screen, folder: Path) -> None:
    files = [*folder.glob("runs/*/weights.safetensors"), *folder.glob("predictions/*.h5ad")]
    before = [file.stat().st_mtime_ns for file in files]
    scores = (folder / "scores.csv").read_text()
    (folder / "predictions" / "nearest.h5ad").unlink()
    compare(screen, splits.additive(screen), out=folder, comparison=QUICK)
    after = [file.stat().st_mtime_ns for file in files]
    changed = [file.name for file, a, b in zip(files, before, after, strict=True) if a != b]
    assert changed == ["nearest.h5ad"]
    assert (folder / "scores.csv").read_text() == scores


def test_what_cannot_be_predicted_is_left_out_or_guessed_and_both_are_said(
    screen: Screen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unseen = splits.unseen(screen, fraction=0.2)
    with caplog.at_level("INFO", logger="knockon"):
        summary = compare(
            screen,
            unseen,
            out=tmp_path,
            comparison=Comparison(models=("latent_additive:small", "ripple"), cells=8, steps=1),
        )
    assert "latent_additive-small is left out" in caplog.text
    assert "ripple guess their effects" in caplog.text
    assert set(summary["model"]) == {*BASELINES, "ripple", "ceiling"}


def test_what_cannot_be_predicted_is_not_trained_either(screen: Screen, tmp_path: Path) -> None:
    comparison = Comparison(models=("latent_additive:small",), cells=8, steps=1)
    compare(screen, splits.unseen(screen, fraction=0.2), out=tmp_path, comparison=comparison)
    assert not (tmp_path / "runs" / "latent_additive-small").exists()


@pytest.mark.parametrize("fallback", ["mean_shift", "response_surface"])
def test_a_fallback_answers_for_what_a_model_does_not_know(
    screen: Screen, tmp_path: Path, caplog: pytest.LogCaptureFixture, fallback: str
) -> None:
    unseen = splits.unseen(screen, fraction=0.2)
    names = ("latent_additive:small", "response_surface")
    asked = Comparison(models=names, cells=8, steps=1, fallback=fallback)
    with caplog.at_level("INFO", logger="knockon"):
        compare(screen, unseen, out=tmp_path, comparison=asked)
    assert f"{fallback} answers for {len(unseen.test)} of {len(unseen.test)} conditions" in caplog.text
    scores = pd.read_csv(tmp_path / "scores.csv")
    of = {name: part.drop(columns="model") for name, part in scores.groupby("model")}
    pd.testing.assert_frame_equal(
        of["latent_additive-small"].reset_index(drop=True), of[fallback].reset_index(drop=True)
    )
    with pytest.raises(UserError, match=r"fallback: ripple.*response_surface"):
        compare(screen, unseen, out=tmp_path, comparison=replace(asked, fallback="ripple"))


def test_models_share_their_genes_whatever_they_are_fitted_to(screen: Screen, tmp_path: Path) -> None:
    """Baselines learn from validation conditions too; the genes are those of training all the same."""
    split = splits.additive(screen)
    assert split.validation
    options = Options(genes=12)
    summary = compare(screen, split, out=tmp_path, comparison=QUICK, options=options)
    assert "latent_additive-small" in set(summary["model"])


def test_an_unknown_model_is_refused_before_anything_is_done(screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown model: scdmf"):
        compare(screen, splits.additive(screen), out=tmp_path, comparison=Comparison(models=("scdmf",)))
    assert not list(tmp_path.iterdir())


def test_the_table_shows_every_model_and_metric(folder: Path) -> None:
    table = render(pd.read_csv(folder / "summary.csv"))
    assert [str(column.header).splitlines()[0] for column in table.columns][1:] == [
        *(*BASELINES, "nearest", "latent_additive-small", "ceiling"),
        "[dim]how[/dim]",
    ]
    assert table.row_count == 11


def test_models_that_are_no_preset_stand_under_their_own_names(screen: Screen, tmp_path: Path) -> None:
    softer = models.recipe("nearest")
    further = {"nearest-ten": replace(softer, model=replace(softer.model, neighbors=10))}
    asked = Comparison(models=(), cells=8, seed=3)
    assert list(recipes(asked, further)) == [*BASELINES, "nearest-ten"]
    summary = compare(screen, splits.additive(screen), out=tmp_path, comparison=asked, further=further)
    assert "nearest-ten" in set(summary["model"])
    record = Record.read(tmp_path / "runs" / "nearest-ten")
    assert (record.model, record.config, record.train.seed) == ("nearest", further["nearest-ten"].model, 3)
    about = anndata.read_h5ad(tmp_path / "predictions" / "nearest-ten.h5ad").uns["knockon"]
    assert about["seconds"] > 0
    assert record.seconds > 0


def test_jobs_that_nobody_could_do(screen: Screen, tmp_path: Path) -> None:
    for jobs, cluster in ((0, None), (2, "tcp://node:8786")):
        asked, options = Comparison(jobs=jobs), Options(cluster=cluster)
        with pytest.raises(UserError, match=f"--jobs {jobs}"):
            compare(screen, splits.additive(screen), out=tmp_path, comparison=asked, options=options)
    assert not list(tmp_path.iterdir())


def test_what_a_cluster_reads_is_named_from_the_root(screen: Screen) -> None:
    far, near = (
        _trial(
            Path("out"), screen, splits.additive(screen), QUICK, Options(vectors=Path("v.csv"), cluster=to)
        )
        for to in ("tcp://node:8786", None)
    )
    assert (far.folder, far.options.vectors) == (Path("out").absolute(), Path("v.csv").absolute())
    assert (near.folder, near.options.vectors) == (Path("out"), Path("v.csv"))


def test_one_comparison_does_not_replace_several_nor_they_one(screen: Screen, tmp_path: Path) -> None:
    split = splits.additive(screen)
    (tmp_path / "scores.csv").write_text("split,seed,model,condition,metric,value\n")
    with pytest.raises(UserError, match="several splits or seeds"):
        compare(screen, split, out=tmp_path, comparison=QUICK)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="one split and seed"):
        compare_all(screen, {"additive": split}, (0, 1), out=tmp_path, comparison=QUICK)


@pytest.mark.slow
def test_a_model_that_fails_leaves_the_others_alone(screen: Screen, tmp_path: Path) -> None:
    split, good = splits.additive(screen), models.recipe("latent_additive", "small")
    asked = Comparison(models=("nearest",), cells=8, steps=20)
    wild = {"wild": replace(good, train=replace(good.train, lr=1e30))}
    with pytest.raises(UserError, match=r"Failed: wild \(Training diverged"):
        compare(screen, split, out=tmp_path, comparison=asked, further=wild)
    assert set(pd.read_csv(tmp_path / "scores.csv")["model"]) == {*BASELINES, "nearest", "ceiling"}
    before = (tmp_path / "runs" / "nearest" / "weights.safetensors").stat().st_mtime_ns
    summary = compare(screen, split, out=tmp_path, comparison=asked, further={"tame": good})
    assert "tame" in set(summary["model"])
    assert (tmp_path / "runs" / "nearest" / "weights.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_splits_and_seeds_have_folders_of_their_own_and_tables_together(
    screen: Screen, folder: Path, tmp_path: Path
) -> None:
    held_out = {"additive": splits.additive(screen), "random": splits.random(screen)}
    found = compare_all(screen, held_out, (0, 1), out=tmp_path, comparison=QUICK)
    scores, summary = pd.read_csv(tmp_path / "scores.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert list(scores)[:3] == list(summary)[:3] == ["split", "seed", "model"]
    alone = scores[(scores["split"] == "additive") & (scores["seed"] == 0)].drop(columns=["split", "seed"])
    pd.testing.assert_frame_equal(
        alone.reset_index(drop=True), pd.read_csv(folder / "scores.csv"), check_exact=True
    )
    assert (tmp_path / "random-seed1" / "about.json").exists()
    both = summary[summary["split"] == "random"].groupby(["model", "metric"])["mean"].mean()
    for line in found["random"].itertuples():
        assert line.mean == pytest.approx(both[line.model, line.metric])
    weights = sorted(tmp_path.glob("*/runs/*/weights.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    compare_all(screen, held_out, (0, 1), out=tmp_path, comparison=QUICK)
    assert [path.stat().st_mtime_ns for path in weights] == before


@pytest.mark.slow
def test_models_side_by_side_have_the_same_scores_to_the_bit(
    screen: Screen, folder: Path, tmp_path: Path
) -> None:
    asked = replace(QUICK, jobs=2)
    compare(screen, splits.additive(screen), out=tmp_path, comparison=asked)
    for name in ("scores", "summary", "paired", "strata", "flags"):
        assert (tmp_path / f"{name}.csv").read_bytes() == (folder / f"{name}.csv").read_bytes()
    for path in folder.glob("runs/*/weights.safetensors"):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the cluster's own end
def test_a_cluster_has_the_same_scores_to_the_bit(folder: Path, tmp_path: Path) -> None:
    """Its workers read the screen from its file, and find the statistics of what stays there themselves."""
    distributed = pytest.importorskip("distributed")
    simulate.simulate(simulate.tiny()).write_h5ad(tmp_path / "tiny.h5ad")
    screen = Screen.read(tmp_path / "tiny.h5ad")
    kind = {"dashboard_address": None, "processes": True}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **kind) as cluster:
        options = Options(cluster=cluster.scheduler_address)
        compare(screen, splits.additive(screen), out=tmp_path / "out", comparison=QUICK, options=options)
        prepare([tmp_path / "tiny.h5ad"], tmp_path / "store")
        store, options = Screen.read(tmp_path / "store"), replace(options, memory="1")
        compare(store, splits.additive(store), out=tmp_path / "far", comparison=QUICK, options=options)
    compare(store, splits.additive(store), out=tmp_path / "here", comparison=QUICK)
    for one, other in ((tmp_path / "out", folder), (tmp_path / "far", tmp_path / "here")):
        assert (one / "scores.csv").read_bytes() == (other / "scores.csv").read_bytes()
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, **kind) as cluster:
        options = Options(cluster=cluster.scheduler_address)
        with pytest.raises(UserError, match="several jobs in one process"):
            compare(screen, splits.additive(screen), out=tmp_path / "two", comparison=QUICK, options=options)
