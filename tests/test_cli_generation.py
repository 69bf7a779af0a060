"""The commands that put cells through a trained model, as a user gives them."""

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from knockon.cli import main
from knockon.data import simulate
from knockon.run import Run, trained

DATA = simulate.Simulation(
    cells=400, genes=30, singles=0, doubles=0, drugs=3, doses=(0.1, 1.0), cell_types=2, truth_cells=32
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen of drugs in two cell types, both stages of scLDM, and a baseline."""
    folder = tmp_path_factory.mktemp("generation")
    simulate.simulate(DATA).write_h5ad(folder / "screen.h5ad")
    data = ["--data", f"{folder}/screen.h5ad", "--layer", "counts", "--split", "random", "--quiet"]
    small = ["--preset", "small", "--train.steps", "3"]
    main(["train", "scldm-vae", *data, *small, "--out", f"{folder}/vae"])
    main(["train", "scldm", *data, *small, "--model.vae", f"{folder}/vae", "--out", f"{folder}/flow"])
    main(["train", "mean-shift", *data, "--out", f"{folder}/baseline"])
    return folder


def trained_condition(folder: Path) -> tuple[str, str]:
    """A perturbation and a cell type that were trained on."""
    label = Run.load(folder / "flow").split.train[0]
    return label.perturbation, label.covariates[0]


# ---- embed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["vae", "flow"])
def test_embed_keeps_cells_and_adds_latents(folder: Path, tmp_path: Path, run: str) -> None:
    scanpy = pytest.importorskip("scanpy")
    main(
        ["embed", f"{folder}/{run}", f"{folder}/screen.h5ad", "--layer", "counts"]
        + ["--out", f"{tmp_path}/l.h5ad"]
    )
    embedded, screen = (scanpy.read_h5ad(path) for path in (tmp_path / "l.h5ad", folder / "screen.h5ad"))
    assert embedded.obs.equals(screen.obs)
    assert sp.issparse(embedded.X)
    assert (screen.layers["counts"] != embedded.X).nnz == 0
    model = {"vae": "scldm_vae", "flow": "scldm"}[run]
    latents = embedded.obsm[f"X_{model}"]
    assert (latents.shape, latents.dtype) == ((screen.n_obs, 32), np.float32)
    about = embedded.uns["knockon"]
    assert (about["model"], about["units"]) == (model, "counts")
    assert len(about["run"]) == 64


def test_embed_reads_the_training_screen_as_training_did(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["embed", f"{folder}/vae", f"{folder}/screen.h5ad", "--out", f"{tmp_path}/l.h5ad", "--score"])
    said = capsys.readouterr()
    assert "is read as in training" in said.err
    assert all(word in said.out for word in ("floor", "test,", "train,", "pcc_means", "nll"))
    table = anndata.read_h5ad(tmp_path / "l.h5ad").uns["knockon"]["reconstruction"]
    assert list(table["model"]) == ["scldm_vae", "floor"] * (len(table) // 2)
    assert {"train", "test"} <= set(table["part"])
    assert table["cells"][::2].sum() == DATA.cells
    assert table.notna().all(axis=None)


def test_embed_another_screen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """Cells without labels, genes in another order and one more; what was trained on is elsewhere."""
    adata = anndata.read_h5ad(folder / "screen.h5ad")
    counts = adata.layers["counts"][:50, ::-1]
    more = sp.hstack([sp.csr_matrix(np.ones((50, 1))), counts], format="csr")
    other = anndata.AnnData(more.astype(np.float32), obs=adata.obs[[]][:50].copy())
    other.var_names = ["NEW", *adata.var_names[::-1]]
    other.write_h5ad(tmp_path / "other.h5ad")
    command = ["embed", f"{folder}/vae", f"{tmp_path}/other.h5ad", "--unlabelled"]
    command += ["--out", f"{tmp_path}/l.h5ad", "--quiet"]
    main([*command, "--score"])
    said = capsys.readouterr()
    assert "1 genes that the run does not know are left out" in said.err
    embedded = anndata.read_h5ad(tmp_path / "l.h5ad")
    assert list(embedded.var_names) == list(adata.var_names)
    assert (adata.layers["counts"][:50] != embedded.X).nnz == 0
    assert list(embedded.uns["knockon"]["reconstruction"]["part"]) == ["all", "all"]
    other[:, 3:].copy().write_h5ad(tmp_path / "few.h5ad")
    missing = refused("embed", folder / "vae", tmp_path / "few.h5ad", "--unlabelled", "--out", tmp_path / "x")
    assert adata.var_names[-1] in missing
    assert "lacks genes" in missing


def test_what_embed_refuses(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ["--out", tmp_path / "l.h5ad"]
    message = refused("embed", folder / "baseline", folder / "screen.h5ad", *out)
    assert "mean_shift has no embedding of cells" in message
    with_x = ["--perturbation-key", "perturbation"]
    assert "counts" in refused("embed", folder / "vae", folder / "screen.h5ad", *with_x, *out)
    scored = ["--score", "--trained-on", tmp_path / "gone.h5ad", *out]
    assert "--trained-on" in refused("embed", folder / "vae", folder / "screen.h5ad", *scored)
    assert not list(tmp_path.iterdir())


# ---- generate --------------------------------------------------------------------------------------


def test_generate_needs_no_screen(folder: Path, tmp_path: Path) -> None:
    done, level = trained_condition(folder)
    hidden = (folder / "screen.h5ad").rename(folder / "away.h5ad")
    try:
        command = ["generate", f"{folder}/flow", "--cells", "6", "--quiet", "--out"]
        main([*command, f"{tmp_path}/any.h5ad"])
        main([*command, f"{tmp_path}/part.h5ad", "--conditions", f"cell_type={level}"])
        main([*command, f"{tmp_path}/g.h5ad", "--conditions", f"cell_type={level}", f"perturbation={done}"])
    finally:
        hidden.rename(folder / "screen.h5ad")
    opened, part, given = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("any", "part", "g"))
    for cells in (opened, part, given):
        assert cells.n_obs == 6
        assert np.array_equal(cells.X.data, np.rint(cells.X.data))
        assert list(cells.obs) == ["perturbation", "cell_type", "dose"]
    assert set(opened.obs["perturbation"]) == set(opened.obs["dose"]) == {"any"}
    assert set(part.obs["cell_type"]) == {level}
    assert set(given.obs["perturbation"]) == {done}
    about = given.uns["knockon"]
    assert about["given"] == {"perturbation": done, "cell_type": level}
    assert about["model"] == "scldm"
    assert about["changed"] == ""
    assert about["seed"] == 0


def test_what_generate_refuses(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    flow, out = ["generate", folder / "flow", "--out", tmp_path / "g.h5ad"], ["--out", tmp_path / "g.h5ad"]
    assert "without control cells" in refused("generate", folder / "baseline", *out)
    assert "one of perturbation, cell_type" in refused(*flow, "--conditions", "celltype=x")
    assert "Unknown cell_type: nowhere" in refused(*flow, "--conditions", "cell_type=nowhere")
    assert "Unknown perturbation: NOPE" in refused(*flow, "--conditions", "perturbation=NOPE")
    assert "name=value" in refused(*flow, "--conditions", "cell_type")
    assert "twice" in refused(*flow, "--conditions", "cell_type=a", "cell_type=b")
    assert "--cells" in refused(*flow, "--cells", "0")
    assert not list(tmp_path.iterdir())


# ---- what changes in generation --------------------------------------------------------------------


def test_weights_and_options_change_cells_and_are_noted(folder: Path, tmp_path: Path) -> None:
    done, level = trained_condition(folder)
    command = ["generate", f"{folder}/flow", "--conditions", f"cell_type={level}", f"perturbation={done}"]
    command += ["--cells", "6", "--quiet", "--set", "counts=means"]
    main([*command, "--out", f"{tmp_path}/plain.h5ad"])
    main([*command, "--weights", "cell_type=5", "--out", f"{tmp_path}/weighed.h5ad"])
    main([*command, "solver=rk4", "steps=3", "--out", f"{tmp_path}/solved.h5ad"])
    plain, weighed, solved = (
        anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("plain", "weighed", "solved")
    )
    assert not np.array_equal(plain.X.data, np.rint(plain.X.data))
    assert (plain.X != weighed.X).nnz
    assert (plain.X != solved.X).nnz
    assert plain.uns["knockon"]["changed"] == "counts=means"
    assert weighed.uns["knockon"]["changed"] == "counts=means weights=1.0,5.0"
    assert solved.uns["knockon"]["changed"] == "counts=means solver=rk4 steps=3"


def test_predict_takes_the_same_changes(folder: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    done, level = trained_condition(folder)
    command = ["predict", f"{folder}/flow", "--perturbations", f"{done} | {level}", "--cells", "4", "--quiet"]
    main(
        [*command, "--set", "guidance=additive", "--weights", "perturbation=2", "--out", f"{tmp_path}/p.h5ad"]
    )
    assert anndata.read_h5ad(tmp_path / "p.h5ad").uns["knockon"]["changed"] == (
        "guidance=additive weights=2.0,1.0"
    )
    (tmp_path / "p.h5ad").unlink()
    out = ["--out", tmp_path / "p.h5ad"]
    unknown = refused(*command, *out, "--set", "width=64")
    assert "width" in unknown
    assert "guidance, weights, solver" in unknown
    assert "steps" in refused(*command, *out, "--set", "steps=many")
    assert "at least one" in refused(*command, *out, "--set", "steps=0")
    assert "some of perturbation, cell_type" in refused(*command, *out, "--weights", "celltype=2")
    assert "--weights perturbation" in refused(*command, *out, "--weights", "perturbation=high")
    assert "one of the two" in refused(*command, *out, "--weights", "cell_type=2", "--set", "weights=1,2")
    baseline = ["predict", folder / "baseline", "--perturbations", done, *out]
    assert "no weights of classes" in refused(*baseline, "--weights", "cell_type=2")
    assert "no change" in refused(*baseline, "--set", "steps=5")
    assert not list(tmp_path.iterdir())


def test_a_changed_run_is_another_one_with_the_same_weights(folder: Path) -> None:
    run = Run.load(folder / "flow")
    other = run.change({"steps": 2, "solver": "euler"}).change({"steps": "3"})
    assert isinstance(other, Run)
    assert other.changes == {"steps": 3, "solver": "euler"}
    assert other.model.config.steps == 3
    assert run.model.config.steps == 5
    assert not run.changes
    weights = run.model.state_dict()
    assert all((tensor == weights[name]).all() for name, tensor in other.model.state_dict().items())
    first, again = (x.predict(run.split.test[:1], cells=3) for x in (run, run.change({"steps": 5})))
    assert (first.X != again.X).nnz == 0
    assert trained(folder / "flow").weigh({}).weigh({"cell_type": 2}).changes == {"weights": (1.0, 2.0)}
