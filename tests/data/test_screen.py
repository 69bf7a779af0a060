import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.types import Covariate, Label, UserError

from .screens import DOUBLES, GENES, adata, log1p


def make(conditions, columns=None, **obs):
    return Screen.from_anndata(adata(conditions, **obs), columns=columns or Columns())


@pytest.fixture
def plain():
    return adata(DOUBLES)


def test_rows_of_each_condition_are_found_once(plain):
    screen = Screen.from_anndata(plain)
    assert screen.labels[0] == Label()
    assert screen.num_cells == plain.n_obs
    assert Label.of(["B", "C"]) in screen.rows
    for label, rows in screen.rows.items():
        wanted = (
            plain[plain.obs["perturbation"].map(lambda t: Label.of(t.split("+"))) == label]
            if not label.is_control
            else plain[plain.obs["perturbation"] == "control"]
        )
        assert (screen.cells_of(label) == wanted.X.toarray()).all()
        assert [screen.cells[i] for i in rows] == list(wanted.obs_names)


@pytest.mark.parametrize(
    ("key", "conditions", "expected"),
    [
        ("condition", {"ctrl": 9, "A+ctrl": 9, "ctrl+A": 9, "B+A": 9}, {"control", "A", "A+B"}),
        ("target_gene", {"non-targeting": 9, "A": 9}, {"control", "A"}),
        ("perturbation", {"control": 9, "A": 9, "B": 9, "A_B": 9, "B_A": 9}, {"control", "A", "B", "A+B"}),
        ("drug", {"DMSO": 9, "x@10uM": 9, "x@10nM": 9}, {"control", "x@10", "x@0.01"}),
    ],
)
def test_common_conventions_are_recognized_and_said(key, conditions, expected):
    screen = make(conditions, key=key)
    assert {str(label) for label in screen.labels} == expected
    assert any(f"obs['{key}']" in note for note in screen.notes)


def test_spellings_of_one_condition_become_one():
    screen = make({"ctrl": 9, "A+ctrl": 9, "ctrl+A": 5, "B+A": 4, "A+B": 3}, key="condition")
    assert len(screen.rows[Label.of(["A"])]) == 14
    assert len(screen.rows[Label.of(["A", "B"])]) == 7


def test_gene_names_with_underscores_stay_whole():
    data = adata({"control": 9, "HLA_A": 9, "HLA_A_B": 9, "B": 9})
    assert {str(label) for label in Screen.from_anndata(data).labels} == {"control", "HLA_A", "B", "B+HLA_A"}


def test_doses_travel_with_their_drugs():
    obs = {"dose_val": ["0"] * 9 + ["0.1+1"] * 9 + ["2+3"] * 9 + ["1"] * 9}
    screen = make({"control": 9, "z+a": 9, "a+z": 9, "z": 9}, **obs)
    assert {str(label) for label in screen.conditions} == {"a@1+z@0.1", "a@2+z@3", "z@1"}


def test_a_dose_unit_is_kept_and_micromolar_preferred():
    obs = {"dose_value": [0.0] * 9 + [10.0] * 9 + [100.0] * 9, "dose_unit": ["nM"] * 27}
    screen = make({"control": 9, "x": 18}, **obs)
    assert screen.dose_unit == "uM"
    assert {str(label) for label in screen.conditions} == {"x@0.01", "x@0.1"}


def test_a_missing_dose_is_not_zero():
    with pytest.raises(UserError, match=r"without a dose.*: y"):
        make({"DMSO": 9, "x": 18, "y": 9}, dose=[np.nan] * 9 + [1.0] * 9 + [2.0] * 9 + [np.nan] * 9)


def test_a_constant_dose_column_means_nothing():
    screen = make({"ctrl": 9, "A+ctrl": 9}, dose_val=["1"] * 9 + ["1+1"] * 9)
    assert screen.conditions == (Label.of(["A"]),)


def test_units_of_doses_may_not_be_mixed():
    with pytest.raises(UserError, match="several units"):
        make({"DMSO": 9, "x@1uM": 9, "x@3ng/ml": 9})


def test_contexts_are_recognized_or_named():
    screen = make({"control": 12, "A": 12}, cell_type=["T", "B"] * 12, donor=["1", "2", "3"] * 8)
    assert screen.covariates == (Covariate("cell_type", ("B", "T")),)
    assert Label.of(["A"], covariates=["T"]) in screen.rows
    told = Screen.from_anndata(
        adata({"control": 12, "A": 12}, cell_type=["T", "B"] * 12, donor=["1", "2", "3"] * 8),
        columns=Columns(covariate_keys=("donor", "cell_type")),
    )
    assert [c.name for c in told.covariates] == ["donor", "cell_type"]
    assert Label.of(["A"], covariates=["1", "T"]) in told.rows
    assert make({"control": 12, "A": 12}, cell_type=["T"] * 24).covariates == ()


def test_a_boolean_column_marks_the_controls():
    screen = make({"mystery": 9, "A": 9, "A+mystery": 5}, control=[True] * 9 + [False] * 14)
    assert {str(label): len(rows) for label, rows in screen.rows.items()} == {"control": 9, "A": 14}


@pytest.mark.parametrize(
    ("conditions", "columns", "match"),
    [
        ({"A": 9, "B": 9}, Columns(), r"No control cells.*A \(9 cells\).*--control"),
        ({"A": 9, "B": 9}, Columns(control="C"), "No control cells: C"),
        ({"control": 9, "DMSO": 9, "A": 9}, Columns(), "Several values could be the control: DMSO, control"),
        (
            {"control": 9, "A": 9},
            Columns(perturbation_key="perturbaton"),
            "Unknown column: perturbaton.*perturbation",
        ),
        ({"control": 9, "A": 9}, Columns(covariate_keys=("cell",)), "Unknown column: cell"),
        ({"control": 9, "A": 9}, Columns(dose_key="dos"), "Unknown column: dos"),
        ({"control": 9, "A": 9}, Columns(layer="raw"), "Missing layer: raw.*only X"),
        ({"control": 9, "A+": 9}, Columns(), "empty condition"),
        ({"control": 9, "": 9}, Columns(), "says nothing for 9 cells"),
        ({"control": 9, "A": 9}, Columns(control="A"), "'control' and is not the control"),
    ],
)
def test_what_cannot_be_read_is_explained(conditions, columns, match):
    with pytest.raises(UserError, match=match):
        make(conditions, columns)


def test_missing_perturbations_are_counted():
    data = adata({"control": 9, "A": 9})
    data.obs.loc["cell3", "perturbation"] = np.nan
    with pytest.raises(UserError, match=r"says nothing for 1 cells: cell3.*notna"):
        Screen.from_anndata(data)


def test_a_control_column_that_tears_a_perturbation_is_refused():
    with pytest.raises(UserError, match="only a part of the cells"):
        make({"x": 9, "A": 9}, control=[True] * 5 + [False] * 13)


def test_duplicate_genes_are_named():
    data = adata({"control": 9, "A": 9})
    data.var_names = ["G0", "G0", *GENES[2:]]
    with pytest.raises(UserError, match="Duplicate genes: G0"):
        Screen.from_anndata(data)


def test_a_condition_with_one_cell_is_noted():
    screen = make({"control": 9, "A": 1, "B": 9})
    assert any("one cell: A" in note for note in screen.notes)


def test_selection_reaches_no_other_condition(plain):
    screen = Screen.from_anndata(plain)
    some = screen.select([Label.of(["A"]), Label()])
    assert some.labels == (Label(), Label.of(["A"]))
    assert some.matrix is screen.matrix
    assert some.digest == screen.digest
    assert set(some.means()) == set(some.labels)
    assert some.spec().perturbations == screen.spec().perturbations == ("A", "B", "C", "D", "E")


def test_a_spec_knows_names_and_slots(plain):
    spec = Screen.from_anndata(plain).spec()
    assert spec.slots == 2
    assert spec.units == "counts"
    assert spec.vectors is None
    vectors = {name: np.full(3, i, dtype=np.float32) for i, name in enumerate("ABCDEF")}
    spec = Screen.from_anndata(plain).spec(vectors)
    assert spec.perturbations == tuple("ABCDEF")
    assert spec.vectors.shape == (6, 3)
    spec = Screen.from_anndata(plain).spec({name: vectors[name] for name in "ABCDF"})
    assert spec.perturbations == tuple("ABCDEF")
    assert np.isnan(spec.vectors).all(1).tolist() == [False] * 4 + [True, False]
    with pytest.raises(UserError, match="different lengths"):
        Screen.from_anndata(plain).spec(vectors | {"F": np.zeros(2)})


def test_controls_of_the_same_context_or_of_all():
    kinds = ["T"] * 6 + ["B"] * 6 + ["T"] * 6 + ["N"] * 6
    screen = make({"control": 12, "A": 12}, cell_type=kinds)
    assert (screen.control_rows(Label.of(["A"], covariates=["T"])) == np.arange(6)).all()
    assert len(screen.control_rows(Label.of(["A"], covariates=["N"]))) == 12


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_files_and_layouts_hold_the_same_screen(tmp_path, plain, ending, layout):
    expected = Screen.from_anndata(plain)
    change = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": lambda x: x.toarray()}[layout]
    plain.layers["scaled"] = change(sp.csr_matrix(log1p(plain.X.toarray())))
    plain.X = change(plain.X)
    path = tmp_path / f"screen.{ending}"
    getattr(plain, f"write_{ending}")(path)
    rows = np.array([7, 3, 3, 50])
    for backed in (False, True)[: 1 if layout == "csc" else 2]:
        screen = Screen.read(path, backed=backed)
        assert screen.digest == expected.digest
        assert screen.notes == expected.notes
        assert (screen.gather(rows) == expected.gather(rows)).all()
        for label, mean in expected.means().items():
            np.testing.assert_allclose(screen.means()[label], mean)
        other = Screen.read(path, layer="scaled", backed=backed)
        assert (other.units, other.total) == ("log1p", 1e4)
        assert other.digest == expected.digest
    if layout == "csc":
        with pytest.raises(UserError, match="CSR"):
            Screen.read(path, backed=True)


def test_a_backed_object_stays_on_disk(tmp_path, plain):
    plain.write_h5ad(tmp_path / "a.h5ad")
    data = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    screen = Screen.from_anndata(data)
    assert not isinstance(screen.matrix, sp.csr_matrix)
    assert (screen.gather(np.arange(5)) == plain.X[:5].toarray()).all()


def test_damaged_files_are_refused(tmp_path, plain):
    plain.write_h5ad(tmp_path / "whole.h5ad")
    content = (tmp_path / "whole.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.h5ad").write_text("perturbation,A\n")
    for name in ("cut.h5ad", "text.h5ad"):
        with pytest.raises(UserError, match=f"Cannot read .*{name}"):
            Screen.read(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        Screen.read(tmp_path / "none.h5ad")


def test_the_digest_knows_names_and_design(plain):
    digest = Screen.from_anndata(plain).digest
    renamed = plain.copy()
    renamed.obs_names = [f"other{i}" for i in range(plain.n_obs)]
    moved = plain.copy()
    moved.obs.loc["cell0", "perturbation"] = "A"
    assert len({digest, Screen.from_anndata(renamed).digest, Screen.from_anndata(moved).digest}) == 3


@pytest.mark.parametrize(
    ("name", "conditions", "doubles"), [("norman19", 33, 15), ("papalexi21", 25, 0), ("kang18", 7, 0)]
)
def test_real_screens(shared, name, conditions, doubles):
    screen = Screen.read(shared / "data" / f"{name}.h5ad")
    assert len(screen.conditions) == conditions
    assert sum(len(label.perturbations) == 2 for label in screen.conditions) == doubles
    assert screen.units == "log1p"
    assert screen.total is None


def test_real_counts(shared):
    for name, layer in (("norman19", "counts_approx"), ("papalexi21", "counts")):
        screen = Screen.read(shared / "data" / f"{name}.h5ad", layer=layer, units="counts")
        assert screen.units == "counts"
        with pytest.raises(UserError, match="whole numbers"):
            Screen.read(shared / "data" / f"{name}.h5ad", layer=layer, units="log1p")
        with pytest.raises(UserError, match="fractions"):
            Screen.read(shared / "data" / f"{name}.h5ad", units="counts")
