from pathlib import Path

import pandas as pd
import pytest

from knockon.compare import Comparison, compare
from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.evaluate.tables import render
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
    models = ["no_effect", "mean_shift", "additive", "nearest", "latent_additive-small", "ceiling"]
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


def test_what_cannot_be_predicted_is_left_out_and_said(
    screen: Screen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unseen = splits.unseen(screen, fraction=0.2)
    with caplog.at_level("INFO", logger="knockon"):
        summary = compare(
            screen,
            unseen,
            out=tmp_path,
            comparison=Comparison(models=("latent_additive:small",), cells=8, steps=1),
        )
    assert "latent_additive-small is left out" in caplog.text
    assert "the mean effect stands in" in caplog.text
    assert set(summary["model"]) == {"no_effect", "mean_shift", "additive", "ceiling"}


def test_an_unknown_model_is_refused_before_anything_is_done(screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Unknown model: scdmf"):
        compare(screen, splits.additive(screen), out=tmp_path, comparison=Comparison(models=("scdmf",)))
    assert not list(tmp_path.iterdir())


def test_the_table_shows_every_model_and_metric(folder: Path) -> None:
    table = render(pd.read_csv(folder / "summary.csv"))
    assert [str(column.header).splitlines()[0] for column in table.columns][1:] == [
        *("no_effect", "mean_shift", "additive", "nearest", "latent_additive-small", "ceiling")
    ]
    assert table.row_count == 11
