"""The commands as a user gives them: what they write, what they print, and how mistakes end."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from knockon import models
from knockon.cli import COMMANDS, main
from knockon.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen, a split, a run and a prediction, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    main(["simulate", f"{folder}/tiny.h5ad", "--preset", "tiny", "--seed", "0"])
    main(
        [
            "split",
            f"{folder}/tiny.h5ad",
            "--kind",
            "additive",
            "--seed",
            "42",
            "--out",
            f"{folder}/split.json",
        ]
    )
    data = ["--data", f"{folder}/tiny.h5ad", "--split", f"{folder}/split.json"]
    main(["train", "additive", *data, "--out", f"{folder}/run"])
    main(["predict", f"{folder}/run", "--part", "test", "--cells", "16", "--out", f"{folder}/pred.h5ad"])
    return folder


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_without_a_name_the_recommended_model_is_trained(folder: Path, tmp_path: Path) -> None:
    main(["train", "--data", f"{folder}/tiny.h5ad", "--out", f"{tmp_path}/run"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == "ripple"


@pytest.mark.parametrize("command", [*COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: knockon {command}" in shown
    assert "--perturbation-key" in shown or command in ("simulate", "predict", "generate", "report")


def test_inspect_says_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(folder / "tiny.h5ad")])
    shown = capsys.readouterr().out
    assert "800" in shown
    assert "log1p" in shown


def test_a_prediction_file_opens_in_scanpy(folder: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    predicted = scanpy.read_h5ad(folder / "pred.h5ad")
    split = json.loads((folder / "split.json").read_text())
    assert set(predicted.obs["perturbation"]) == {*split["test"], "control"}
    assert predicted.uns["knockon"]["model"] == "additive"
    scanpy.tl.rank_genes_groups(predicted, "perturbation", reference="control", method="t-test")


def test_predict_by_name(folder: Path, tmp_path: Path) -> None:
    first, second = json.loads((folder / "split.json").read_text())["test"][:2]
    backwards = "+".join(reversed(first.split("+")))
    main(
        ["predict", f"{folder}/run", "--perturbations", backwards, second]
        + ["--cells", "3", "--out", f"{tmp_path}/p.h5ad"]
    )
    predicted = anndata.read_h5ad(tmp_path / "p.h5ad")
    assert (predicted.obs["perturbation"].value_counts()[[first, second]] == 3).all()


@pytest.mark.parametrize("suite", ["core", "generation"])
def test_evaluate_writes_scores_between_anchors(
    folder: Path, tmp_path: Path, suite: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["evaluate", "--pred", f"{folder}/pred.h5ad", "--real", f"{folder}/tiny.h5ad"]
        + ["--split", f"{folder}/split.json", "--suite", suite, "--out", f"{tmp_path}/scores"]
    )
    shown = capsys.readouterr().out
    scores, summary = (pd.read_csv(tmp_path / "scores" / name) for name in ("scores.csv", "summary.csv"))
    assert list(scores) == ["model", "condition", "metric", "value"]
    assert list(summary) == ["model", "metric", "mean", "low", "high", "floor", "ceiling", "calibrated"]
    assert list(summary["metric"].unique()) == METRICS[suite]
    assert all(f"{name} " in shown for name in METRICS[suite])
    assert {"no_effect", "additive"} <= set(summary["model"])
    assert summary["mean"].notna().all()


def test_chosen_genes_are_scored_as_they_were_predicted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--split", f"{folder}/split.json", "--quiet"]
    counts = ["--layer", "counts"]
    main(
        ["train", "additive", "--data", f"{folder}/tiny.h5ad", *data, *counts, "--genes", "30"]
        + ["--out", f"{tmp_path}/run"]
    )
    main(["predict", f"{tmp_path}/run", "--part", "test", "--cells", "256", "--out", f"{tmp_path}/p.h5ad"])
    main(
        ["evaluate", "--pred", f"{tmp_path}/p.h5ad", "--real", f"{folder}/tiny.h5ad", *counts]
        + ["--split", f"{folder}/split.json", "--out", f"{tmp_path}/scores"]
    )
    assert "genes that the run had chosen" in capsys.readouterr().err
    summary = pd.read_csv(tmp_path / "scores" / "summary.csv").set_index(["model", "metric"])["mean"]
    assert summary["prediction", "mse"] == pytest.approx(summary["additive", "mse"], rel=0.3)


METRICS = {
    "core": [
        *(
            "mse",
            "mae",
            "l2",
            "pearson_delta",
            "pearson_delta_top20",
            "centroid_delta",
            "centroid_delta_top20",
        ),
        *("discrimination", "energy_distance", "variance_corr", "zero_fraction_error"),
    ],
    "generation": [
        *("w2", "frechet", "mmd2", "nn_accuracy_error", "precision", "recall"),
        *("mean_r2", "variance_r2", "zero_fraction_r2"),
    ],
}


def test_compare_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--data", f"{folder}/tiny.h5ad", "--split", "additive", "--cells", "16"]
    command += [
        "--models",
        "no_effect",
        "additive",
        "scdfm:small",
        "--steps",
        "3",
        "--out",
        f"{tmp_path}/cmp",
    ]
    main(command)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("no_effect", "mean_shift", "additive", "scdfm", "energy_distance"))
    weights = tmp_path / "cmp" / "runs" / "scdfm-small" / "weights.safetensors"
    written = weights.stat().st_mtime_ns
    main(command)
    assert weights.stat().st_mtime_ns == written
    assert (tmp_path / "cmp" / "report.html").exists()
    main(["report", f"{tmp_path}/cmp", "--out", f"{tmp_path}/report.html"])
    assert "scdfm" in (tmp_path / "report.html").read_text()


def test_a_model_that_fails_keeps_nobody_from_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("No luck")

    monkeypatch.setattr(models.load("nearest").Nearest, "fit_statistics", fail)
    command = ["compare", "--data", f"{folder}/tiny.h5ad", "--cells", "16", "--models", "nearest"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--out", f"{tmp_path}/cmp"])
    said = capsys.readouterr()
    assert "Failed: nearest (No luck)" in said.err
    assert f"{tmp_path}/cmp/report.html" in said.out
    assert "energy_distance" in said.out
    assert "mean_shift" in (tmp_path / "cmp" / "report.html").read_text()
    # one that stood in the tables and fails now changes nothing in them
    kept = (tmp_path / "cmp" / "summary.csv").read_bytes()
    (tmp_path / "cmp" / "runs" / "additive" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--out", f"{tmp_path}/cmp"])
    said = capsys.readouterr()
    assert "additive" in said.err
    assert "report.html" not in said.out
    assert (tmp_path / "cmp" / "summary.csv").read_bytes() == kept


@pytest.mark.slow
def test_a_damaged_run_keeps_nobody_from_the_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", f"{folder}/tiny.h5ad", "--cells", "16", "--out", f"{tmp_path}/cmp"]
    main(["train", "nearest", "--data", f"{folder}/tiny.h5ad", "--out", f"{tmp_path}/cmp/runs/nearest"])
    (tmp_path / "cmp" / "runs" / "nearest" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--models", "nearest"])
    said = capsys.readouterr()
    assert "Failed: nearest (" in said.err
    assert f"{tmp_path}/cmp/report.html" in said.out


def test_train_options_reach_the_model(folder: Path, tmp_path: Path) -> None:
    main(
        ["train", "scdfm", "--preset", "small", "--data", f"{folder}/tiny.h5ad", "--out", f"{tmp_path}/run"]
        + ["--split", f"{folder}/split.json", "--train.steps", "2", "--train.seed", "3", "--quiet"]
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["steps"], record["train"]["seed"]) == (2, 3)


def test_models_with_hyphens(folder: Path, tmp_path: Path) -> None:
    main(["train", "no-effect", "--data", f"{folder}/tiny.h5ad", "--out", f"{tmp_path}/run"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"] == "no_effect"


# ---- mistakes ------------------------------------------------------------------------------------


def altered(folder: Path, path: Path, change: Callable[[anndata.AnnData], None]) -> Path:
    adata = anndata.read_h5ad(folder / "tiny.h5ad")
    change(adata)
    adata.write_h5ad(path)
    return path


def test_unknown_words(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    data = ["--data", folder / "tiny.h5ad", "--out", tmp_path / "run"]
    assert "no command" in refused("trian")
    assert "scdfm" in refused("train", "scdmf", *data)
    assert ", ".join(models.names()[:2]) in refused("train")
    assert "small" in refused("train", "scdfm", "--preset", "smal", *data)
    assert "additive" in refused("train", "no_effect", "--split", "addditive", *data)
    refused("train", "scdfm", "--train.stepz", "3", *data)
    refused("split", folder / "tiny.h5ad", "--kind", "nonsense", "--out", tmp_path / "s.json")
    for empty in ("--split", "--suite"):
        assert f"{empty} without any" in refused("compare", *data, empty)
    assert not list(tmp_path.iterdir())


def test_columns_and_layers(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    data = ["--data", folder / "tiny.h5ad", "--out", tmp_path / "run"]
    assert "perturbation" in refused("train", "no_effect", *data, "--perturbation-key", "pertubation")
    assert "counts" in refused("train", "no_effect", *data, "--layer", "count")
    assert "--control" in refused("train", "no_effect", *data, "--control", "DMSO")
    assert "log1p" in refused("train", "no_effect", *data, "--units", "counts")
    assert "counts" in refused("train", "no_effect", *data, "--layer", "counts", "--units", "log1p")
    assert not list(tmp_path.iterdir())


def spoil_value(value: float) -> Callable[[anndata.AnnData], None]:
    def change(adata: anndata.AnnData) -> None:
        adata.X.data[3] = value

    return change


@pytest.mark.parametrize(("value", "word"), [(-1.0, "negative"), (np.nan, "finite"), (np.inf, "finite")])
def test_bad_values(
    folder: Path, tmp_path: Path, refused: Callable[..., str], value: float, word: str
) -> None:
    path = altered(folder, tmp_path / "bad.h5ad", spoil_value(value))
    assert word in refused("train", "no_effect", "--data", path, "--out", tmp_path / "run").lower()
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_screens(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes((folder / "tiny.h5ad").read_bytes()[:20_000])
    out = ["--out", tmp_path / "run"]
    refused("train", "no_effect", "--data", cut, *out)
    assert "nothing.h5ad" in refused("train", "no_effect", "--data", tmp_path / "nothing.h5ad", *out)

    def repeat(adata: anndata.AnnData) -> None:
        adata.var_names = ["SAME", "SAME", *adata.var_names[2:]]

    twice = altered(folder, tmp_path / "twice.h5ad", repeat)
    assert "SAME" in refused("train", "no_effect", "--data", twice, *out)

    def no_control(adata: anndata.AnnData) -> None:
        adata._inplace_subset_obs(adata.obs["perturbation"] != "control")

    assert "--control" in refused(
        "train", "no_effect", "--data", altered(folder, tmp_path / "n.h5ad", no_control), *out
    )
    assert not (tmp_path / "run").exists()


def test_a_split_of_another_file(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    main(["simulate", f"{tmp_path}/other.h5ad", "--preset", "tiny", "--seed", "5"])
    data = ["--data", tmp_path / "other.h5ad", "--out", tmp_path / "run"]
    assert "another screen" in refused("train", "no_effect", *data, "--split", folder / "split.json")
    assert "another screen" in refused(
        "predict",
        folder / "run",
        "--data",
        tmp_path / "other.h5ad",
        "--part",
        "test",
        "--out",
        tmp_path / "p.h5ad",
    )
    assert not (tmp_path / "run").exists()


def test_predictions_of_nothing(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ["--out", tmp_path / "p.h5ad"]
    assert "NOPE" in refused("predict", folder / "run", "--perturbations", "NOPE", *out)
    assert "--part" in refused("predict", folder / "run", *out)
    assert "--cells" in refused("predict", folder / "run", "--part", "test", "--cells", "0", *out)
    assert "run.json" in refused("predict", tmp_path, "--part", "test", *out)
    assert not list(tmp_path.iterdir())


def test_a_run_folder_edited_by_hand(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    spec = tmp_path / "run" / "spec.json"
    spec.write_text(spec.read_text().replace('"slots": 2', '"slots": 3'))
    message = refused("predict", tmp_path / "run", "--part", "test", "--out", tmp_path / "p.h5ad")
    assert "spec.json was changed" in message


def test_an_unwritable_folder(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("")
    assert "Cannot write" in refused("simulate", tmp_path / "file" / "x.h5ad", "--preset", "tiny")
    data = ["--data", folder / "tiny.h5ad", "--out", tmp_path / "file" / "run"]
    assert "Cannot write" in refused("train", "no_effect", *data)


def test_a_prediction_of_other_genes(
    folder: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = anndata.read_h5ad(folder / "pred.h5ad")[:, 3:].copy()
    predicted.write_h5ad(tmp_path / "p.h5ad")
    predicted.uns.pop("knockon")
    predicted.write_h5ad(tmp_path / "foreign.h5ad")
    real = ["--real", str(folder / "tiny.h5ad"), "--split", str(folder / "split.json")]
    main(["evaluate", "--pred", f"{tmp_path}/foreign.h5ad", *real, "--out", f"{tmp_path}/scores"])
    shown = capsys.readouterr()
    assert "lacks 3 of the screen's 80 genes, which count as wrong" in shown.err
    raised = pd.read_csv(tmp_path / "scores" / "flags.csv")
    assert set(raised["model"]) <= {"prediction"}
    assert all(f"flag {name}: " in shown.out for name in raised["flag"])
    predicted.var_names = [f"ENSG{i}" for i in range(predicted.n_vars)]
    predicted.write_h5ad(tmp_path / "strange.h5ad")
    message = refused(
        *("evaluate", "--pred", tmp_path / "strange.h5ad", *real, "--out", tmp_path / "none"),
    )
    assert "found ENSG0" in message
    assert not (tmp_path / "none").exists()


def test_a_condition_with_one_cell(folder: Path, tmp_path: Path) -> None:
    def thin(adata: anndata.AnnData) -> None:
        doubles = adata.obs["perturbation"].str.contains("+", regex=False)
        one = adata.obs["perturbation"][doubles].iloc[0]
        rows = np.flatnonzero(adata.obs["perturbation"] == one)[1:]
        adata._inplace_subset_obs(np.setdiff1d(np.arange(adata.n_obs), rows))

    path = altered(folder, tmp_path / "one.h5ad", thin)
    main(
        ["compare", "--data", str(path), "--models", "no_effect", "--cells", "8", "--out", f"{tmp_path}/cmp"]
        + ["--split", str(everything(path, tmp_path))]
    )
    assert (tmp_path / "cmp" / "summary.csv").exists()


def everything(path: Path, tmp_path: Path) -> Path:
    """A hand-written split that tests all doubles."""
    names = anndata.read_h5ad(path).obs["perturbation"].unique()
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"test": [name for name in names if "+" in name]}))
    return split


def test_the_installed_command_and_a_pipe(folder: Path) -> None:
    """No bar, no color, no traceback where nobody watches."""
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "knockon",
            "predict",
            folder / "run",
            "--perturbations",
            "NOPE",
            "--out",
            "x.h5ad",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("knockon: Unknown perturbation: NOPE.")
    assert "\x1b" not in ended.stderr


def test_dense_counts_become_log1p_and_say_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def to_counts(adata: anndata.AnnData) -> None:
        adata.X = sp.csr_matrix(adata.layers["counts"]).toarray()
        del adata.layers["counts"]

    path = altered(folder, tmp_path / "counts.h5ad", to_counts)
    main(
        ["compare", "--data", str(path), "--models", "no_effect", "--cells", "8", "--out", f"{tmp_path}/cmp"]
    )
    said = capsys.readouterr().err
    assert "X holds counts" in said
    assert "counts are normalized to" in said
