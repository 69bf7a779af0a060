from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from knockon.cli import main
from knockon.evaluate import export
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.prediction import read
from knockon.models.mean_shift import Config as MeanShift
from knockon.predict import generate
from knockon.types import UserError

from .suites.toy import GENES, TARGETS, known, log1p, with_control
from .suites.toy_pairs import reality, split_of, world


@pytest.fixture(scope="module")
def screen():
    return reality(counts=True).source


@pytest.fixture(scope="module")
def predicted() -> anndata.AnnData:
    """Cells in log1p that tell their control cells, as knockon predicts them."""
    truth = reality(counts=True)
    model = MeanShift().build(truth.screen.spec())
    model.fit_statistics(truth.screen)
    found = generate(model, truth.screen, truth.labels, cells=20)
    found.uns["knockon"] = {"units": "log1p", "total": truth.screen.total, "model": "mean_shift"}
    return found


@pytest.mark.filterwarnings("ignore")  # of the package, which is called by itself here
def test_values_in_log1p_become_counts_that_the_package_scores(predicted, screen, tmp_path, caplog):
    from cell_eval2 import EvalConfig, aggregate_metrics, compute_metrics  # noqa: PLC0415 (some seconds)

    with caplog.at_level("INFO"):
        made = export.vcc2026(read(predicted, screen), screen)
    assert made.X.dtype == np.int32
    assert list(made.var_names) == GENES
    assert set(made.obs["target"]) == {*TARGETS, "non-targeting"}
    assert (made.obs["target"].value_counts()[TARGETS] == 20).all()
    control = made[made.obs["target"] == "non-targeting"].X.toarray()
    np.testing.assert_array_equal(control, screen.cells_of(screen.controls[0]))
    sizes, own = (np.asarray(x.sum(1)).ravel() for x in (made[: 12 * 20].X, control))
    assert abs(np.median(sizes) / np.median(own) - 1) < 0.15
    for said in ("400 cells of each target; here are 20", "18533 genes; this one has 500", "became counts"):
        assert said in caplog.text
    made.write_h5ad(tmp_path / "pred.h5ad")
    real = known(world().real)
    real.obs["target"] = real.obs["perturbation"].astype(str).replace("control", "non-targeting").to_numpy()
    real.write_h5ad(tmp_path / "real.h5ad")
    preset = EvalConfig.from_preset("vcc2026").to_dict()
    settings = EvalConfig.from_dict(preset | {"device": "cpu", "de": preset["de"] | {"backend": "pdex"}})
    found = compute_metrics(tmp_path / "pred.h5ad", tmp_path / "real.h5ad", config=settings)
    assert aggregate_metrics(found)["mean"].is_finite().all()


def test_expectations_of_each_target_stay(predicted, screen):
    found = read(predicted, screen)
    made = export.vcc2026(found, screen)
    for target in TARGETS[:3]:
        counts = made[made.obs["target"] == target].X.toarray().astype(float)
        values = np.expm1(predicted[predicted.obs["perturbation"] == target].X.toarray())
        shares = values / values.sum(1, keepdims=True)
        expected = shares * counts.sum(1, keepdims=True)
        assert np.abs(counts - expected).max() < 2  # rounding, of the gene and of the total
        assert abs((counts - expected).mean()) < 0.01


def test_counts_are_written_as_they_are_and_read_again(screen, tmp_path):
    counts = world().predictions["half"]
    made = export.vcc2026(read(counts[:, ::-1].copy(), screen), screen)
    one, two = (side[side.obs["perturbation"] == "G3"].X.toarray() for side in (made, counts))
    np.testing.assert_array_equal(one, two)
    made.write_h5ad(tmp_path / "x.h5ad")
    again = Pairs.of(tmp_path / "x.h5ad", screen, split_of(screen))
    assert again.counts is not None
    assert (again.counts[0] != Pairs.of(counts, screen, split_of(screen)).counts[0]).nnz == 0


def test_a_seed_decides_and_foreign_cells_get_library_sizes_of_random_control_cells(screen, caplog):
    foreign = read(log1p(world().predictions["half"]), screen)
    with caplog.at_level("INFO"):
        one, two, other = (export.vcc2026(foreign, screen, seed=seed).X for seed in (0, 0, 1))
    assert "library sizes are those of random ones" in caplog.text
    assert (one != two).nnz == 0
    assert (one != other).nnz > 0


def test_targets_that_the_screen_has_not_measured_can_be_exported(screen):
    new = world().predictions["half"][:160].copy()
    new.obs["perturbation"] = np.repeat(["G100", "G101"], 80)
    controls = screen.select(screen.controls)
    assert set(export.vcc2026(read(new, controls), controls).obs["target"]) == {
        "G100",
        "G101",
        "non-targeting",
    }


def test_what_the_challenge_would_refuse_is_refused(make, screen):
    counts = world().predictions["half"]
    with pytest.raises(UserError, match="lacks 1 of the panel's 500 genes: G7"):
        export.vcc2026(read(counts[:, [gene != "G7" for gene in GENES]].copy(), screen), screen)
    huge = counts.copy()
    huge.X = sp.csr_matrix(counts.X * 1000.0)
    with pytest.raises(UserError, match=r"cell-eval2 refuses these cells .*exceeds max_counts_per_cell"):
        export.vcc2026(read(huge, screen), screen)
    logged = reality().source
    with pytest.raises(UserError, match=r"screen is in log1p.*--layer counts"):
        export.vcc2026(read(log1p(counts), logged), logged)
    with pytest.raises(UserError, match="control cells only"):
        export.vcc2026(read(with_control(counts, world().real)[:300].copy(), screen), screen)
    contexts = make.cells(["control", "A", "B"], contexts=["T", "B"])
    contexts.X = np.rint(np.expm1(contexts.X.toarray()))
    several = make.screen(contexts, ("cell_type",))
    with pytest.raises(UserError, match="several contexts: B, T"):
        export.vcc2026(read(contexts, several), several)


def test_the_command_writes_and_refuses(tmp_path: Path, predicted, refused, capsys):
    world().real.write_h5ad(tmp_path / "screen.h5ad")
    predicted.write_h5ad(tmp_path / "pred.h5ad")
    arguments = ["export", f"{tmp_path}/pred.h5ad", "--real", f"{tmp_path}/screen.h5ad"]
    main([*arguments, "--out", f"{tmp_path}/x.h5ad"])
    assert "540 cells of 12 targets and control x 500 genes" in capsys.readouterr().out
    assert anndata.read_h5ad(tmp_path / "x.h5ad").n_obs == 540
    moved = predicted.copy()
    moved.layers["made"], moved.X = moved.X, sp.csr_matrix(moved.shape)
    moved.obs = moved.obs.rename(columns={"perturbation": "asked"}).assign(perturbation="control")
    moved.write_h5ad(tmp_path / "moved.h5ad")
    total = f"{np.median(np.expm1(sp.csr_matrix(moved.layers['made']).toarray()).sum(axis=1)):.6g}"
    told = ["--pred-layer", "made", "--pred-perturbation-key", "asked", "--pred-units", "log1p"]
    main(
        [
            "export",
            f"{tmp_path}/moved.h5ad",
            *arguments[2:],
            *told,
            "--pred-total",
            total,
            "--out",
            f"{tmp_path}/z.h5ad",
        ]
    )
    one, two = (anndata.read_h5ad(tmp_path / name) for name in ("x.h5ad", "z.h5ad"))
    assert (one.X != two.X).nnz == 0
    assert (one.obs == two.obs).all(axis=None)
    log1p(world().real).write_h5ad(tmp_path / "screen.h5ad")
    assert "screen is in log1p" in refused(*arguments, "--out", tmp_path / "y.h5ad")
    assert not (tmp_path / "y.h5ad").exists()
