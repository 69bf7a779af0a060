"""Predicting all pairs and ranking them, as a user gives the commands."""

from collections.abc import Callable
from pathlib import Path

import anndata
import pandas as pd
import pytest

from knockon.cli import main
from knockon.data import simulate

CONFIG = simulate.Simulation(cells=400, genes=40, singles=5, doubles=4, orphans=1, truth_cells=32)
DRAWS = ["--draws", "3", "--cells", "8", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen, a baseline that refuses what it does not know, and its pairs in a file."""
    folder = tmp_path_factory.mktemp("rank")
    simulate.simulate(CONFIG).write_h5ad(folder / "screen.h5ad")
    main(
        ["train", "additive", "--data", f"{folder}/screen.h5ad", "--split", "none", "--out", f"{folder}/run"]
    )
    main(["predict", f"{folder}/run", "--all-pairs", "--cells", "30", "--out", f"{folder}/p.h5ad", "--quiet"])
    return folder


def measured(folder: Path) -> set[str]:
    return set(anndata.read_h5ad(folder / "screen.h5ad", backed="r").obs["perturbation"])


def test_predict_all_pairs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", f"{folder}/run", "--all-pairs", "--cells", "3", "--out", f"{tmp_path}/p.h5ad"])
    predicted = set(anndata.read_h5ad(tmp_path / "p.h5ad").obs["perturbation"]) - {"control"}
    singles = [name for name in measured(folder) if "+" not in name and name != "control"]
    assert len(singles) == 5
    assert len(predicted) == 10 - sum(set(x.split("+")) <= set(singles) for x in measured(folder) if "+" in x)
    assert not predicted & measured(folder)
    assert f"{len(predicted)} pairs were not measured" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["effect", "synergy", "buffering"])
def test_rank_all_pairs(folder: Path, tmp_path: Path, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--by", by, "--out", f"{tmp_path}/r.csv", *DRAWS]
    main(["rank", f"{folder}/run", "--all-pairs", *out, "--top", "2"])
    table = pd.read_csv(tmp_path / "r.csv")
    columns = ["rank", "condition", "score", "low", "high", "draws"]
    assert list(table)[:6] == columns
    assert list(table)[-4:] == ["genes_changed", "up", "down", "warning"]
    assert ("residual" in table) == (by != "effect")
    assert not set(table["condition"]) & measured(folder)
    assert table["score"].is_monotonic_decreasing
    shown = capsys.readouterr().out
    assert table["condition"][1] in shown
    assert table["condition"][2] not in shown
    assert f"{len(table)} of {len(table)} candidates ranked by {by}" in shown


def test_rank_towards_a_condition_of_the_screen(folder: Path, tmp_path: Path) -> None:
    single = sorted(name for name in measured(folder) if "+" not in name)[0]
    main(
        ["rank", f"{folder}/run", "--all-pairs", "--by", "similarity", "--target", f"{folder}/screen.h5ad"]
        + ["--where", f"perturbation={single}", "--out", f"{tmp_path}/r.csv", "--draws", "3", "--cells", "64"]
    )
    table = pd.read_csv(tmp_path / "r.csv")
    assert table["covered"].max() <= 1
    assert table["score"].between(-1, 1).all()


def test_rank_a_list_and_a_file_of_cells(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["rank", f"{folder}/run", "--all-pairs", "--out", f"{tmp_path}/all.csv", *DRAWS])
    first, second = pd.read_csv(tmp_path / "all.csv")["condition"][:2]
    (tmp_path / "list.txt").write_text(f"{first}\n\n")
    orphan = next(x for i in range(1, 6) if (x := f"TF0{i}+TF06") not in measured(folder))
    main(
        ["rank", f"{folder}/run", "--perturbations", f"@{tmp_path}/list.txt", second, orphan]
        + ["--out", f"{tmp_path}/some.csv", *DRAWS]
    )
    some = pd.read_csv(tmp_path / "some.csv")
    assert set(some["condition"][:2]) == {first, second}
    assert some["condition"][2] == orphan
    assert "left out" in some["warning"][2]
    assert f"1 of 3 ({orphan})" in capsys.readouterr().err
    main(
        ["rank", f"{folder}/p.h5ad", "--data", f"{folder}/screen.h5ad", "--all-pairs", "--by", "synergy"]
        + ["--out", f"{tmp_path}/file.csv", *DRAWS]
    )
    assert set(pd.read_csv(tmp_path / "file.csv")["condition"]) == set(
        pd.read_csv(tmp_path / "all.csv")["condition"]
    )


def test_mistakes_end_in_one_message(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ["--out", tmp_path / "r.csv", *DRAWS]
    run, everything = folder / "run", "--all-pairs"
    assert "NOPE" in refused("rank", run, "--perturbations", "NOPE+TF01", *out)
    assert "either --all-pairs" in refused("rank", run, *out)
    assert "either --all-pairs" in refused("rank", run, everything, "--perturbations", "TF01", *out)
    assert "Similarity without a target" in refused("rank", run, everything, "--by", "similarity", *out)
    assert "combinations" in refused("rank", run, "--perturbations", "TF01", "--by", "synergy", *out)
    (tmp_path / "up.txt").write_text("NOGENE\n")
    target = ["--by", "similarity", "--target", tmp_path / "up.txt"]
    assert "no gene" in refused("rank", run, everything, *target, *out)
    assert "--where" in refused("rank", run, everything, "--where", "a=b", *out)
    assert "at least 3" in refused(
        "rank", run, everything, "--out", tmp_path / "r.csv", "--draws", "2", "--cells", "8"
    )
    assert "--data" in refused("rank", folder / "p.h5ad", everything, *out)
    assert "as in training" in refused("rank", run, everything, "--perturbation-key", "x", *out)
    assert "Cannot read nothing.txt" in refused("rank", run, "--perturbations", "@nothing.txt", *out)
    assert "one of --pert" in refused("predict", run, everything, "--part", "test", "--out", tmp_path / "p")
    (tmp_path / "up.txt").unlink()
    assert not list(tmp_path.iterdir())


def test_a_screen_without_combinations(tmp_path: Path, refused: Callable[..., str]) -> None:
    singles = simulate.Simulation(cells=100, genes=40, singles=4, doubles=0, truth_cells=32)
    simulate.simulate(singles).write_h5ad(tmp_path / "s.h5ad")
    main(["train", "additive", "--data", f"{tmp_path}/s.h5ad", "--split", "none", "--out", f"{tmp_path}/run"])
    for command in ("predict", "rank"):
        message = refused(command, tmp_path / "run", "--all-pairs", "--out", tmp_path / "o")
        assert "without combinations" in message
