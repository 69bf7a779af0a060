"""Files that other tools wrote, and files that are broken."""

import logging

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from knockon.cli import main
from knockon.data.screen import read as read_screen
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.prediction import Reading, read
from knockon.evaluate.scores import evaluate
from knockon.files import digest
from knockon.types import Label, UserError

# ---- columns ---------------------------------------------------------------------------------------


def by_text(found):
    return {str(label): len(rows) for label, rows in found.rows.items()}


@pytest.mark.parametrize(
    ("column", "spell"),
    [
        ("condition", {"A+B": "A+B", "B+C": "C+B", "D": "D+ctrl", "control": "ctrl"}),  # GEARS
        ("target_gene", {"A+B": "A_B", "B+C": "B_C", "D": "D", "control": "non-targeting"}),  # STATE
        ("perturbation", {"A+B": "A+B", "B+C": "B+C", "D": "ctrl+D", "control": "control"}),  # scPerturb
    ],
)
@pytest.mark.parametrize("kind", ["category", "string", "object"])
def test_the_columns_of_other_tools_are_recognized(make, screen, column, spell, kind):
    cells = make.cells(list(spell), cells=5)
    cells.obs = cells.obs.rename(columns={"perturbation": column})
    cells.obs[column] = cells.obs[column].map(spell).astype(kind)
    found = read(cells, screen)
    assert by_text(found) == dict.fromkeys(["A+B", "B+C", "D", "control"], 5)
    assert any(column in note for note in found.notes) == (column != "perturbation")


def test_a_column_can_be_told(make, screen):
    cells = make.cells(["A+B"])
    cells.obs = cells.obs.rename(columns={"perturbation": "what"})
    with pytest.raises(UserError, match=r"No column of obs.*--pred-perturbation-key"):
        read(cells, screen)
    assert by_text(read(cells, screen, Reading(perturbation_key="what"))) == {"A+B": 30}
    with pytest.raises(UserError, match=r"Unknown column: wha.*did you mean what.*--pred-perturbation-key"):
        read(cells, screen, Reading(perturbation_key="wha"))


def test_a_context_of_one_level_goes_without_saying(make):
    screen = make.screen(make.cells(["control", "A", "B", "A+B"], contexts=["T"]), ("cell_type",))
    found = read(make.cells(["A+B"]), screen)
    assert by_text(found) == {"A+B | T": 30}
    assert "taken to be cell_type T" in found.notes[0]


def test_controls_are_known_by_the_screens_own_name_and_by_a_column(make, screen):
    cells = make.cells(["control", "A+B"])
    cells.obs["perturbation"] = cells.obs["perturbation"].replace("control", "wild")
    assert "wild" in by_text(read(cells, screen))
    cells.obs["control"] = cells.obs["perturbation"] == "wild"
    assert by_text(read(cells, screen)) == {"control": 30, "A+B": 30}


# ---- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        *(sp.csr_matrix, sp.csc_matrix, sp.csr_array, lambda x: x.toarray()),
        *(lambda x: np.asarray(x.todense(), dtype=np.float64), lambda x: np.asfortranarray(x.toarray())),
    ],
)
def test_the_form_of_the_values_does_not_matter(tmp_path, screen, split, prediction, form):
    plain = Pairs.of(prediction, screen, split)
    prediction.X = form(prediction.X)
    prediction.write_h5ad(tmp_path / "p.h5ad")
    backed = anndata.read_h5ad(tmp_path / "p.h5ad", backed="r")
    for source in (prediction, tmp_path / "p.h5ad", backed):
        found = Pairs.of(source, screen, split)
        assert all((x != y).nnz == 0 for x, y in zip(found.cells, plain.cells, strict=True))


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int64", "float64"])
def test_integers_are_counts(make, dtype):
    cells = make.cells(["control", "A", "A+B"])
    cells.X = np.rint(np.expm1(cells.X.toarray())).astype(dtype)
    screen = make.screen(cells)
    found = read(cells[cells.obs["perturbation"] == "A+B"].copy(), screen)
    assert found.units == "counts"
    with pytest.raises(UserError, match=r"whole numbers, so counts.*--pred-units counts"):
        read(cells, screen, units="log1p")


def test_a_layer_can_be_told(tmp_path, screen, prediction):
    prediction.layers["log"] = prediction.X.copy()
    prediction.X = prediction.X * 100
    prediction.write_h5ad(tmp_path / "p.h5ad")
    for source in (prediction, tmp_path / "p.h5ad"):
        assert (read(source, screen, Reading(layer="log")).matrix != prediction.layers["log"]).nnz == 0
        with pytest.raises(UserError, match=r"neither counts nor log1p.*--pred-layer"):
            read(source, screen)
        with pytest.raises(UserError, match=r"Missing layer: lg.*one of log.*--pred-layer"):
            read(source, screen, Reading(layer="lg"))


def test_cells_on_mixed_scales_are_refused_by_name(screen, prediction):
    """Counts in a few cells and log1p in the others score better than either where a tool guesses."""
    values = prediction.X.toarray()
    values[[4, 7]] = np.rint(np.expm1(values[[4, 7]]))
    prediction.X = values
    with pytest.raises(UserError, match=r"cells hold counts \(2\) and others fractions \(58\): c4, c7"):
        read(prediction, screen)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1.0, r"Negative.*\(1\): -1 \(of G5 in c2\)"), (np.nan, r"not finite \(1\): nan \(of G5 in c2\)")],
)
def test_impossible_values_are_named_by_place(screen, prediction, value, message):
    values = prediction.X.toarray()
    values[2, 5] = value
    prediction.X = values
    with pytest.raises(UserError, match=message):
        read(prediction, screen)


def test_values_that_are_no_numbers_are_refused(screen, prediction):
    for values in (np.ma.array(prediction.X.toarray(), mask=False), prediction.X.toarray().astype(complex)):
        prediction.X = values
        with pytest.raises(UserError, match="values of the prediction are a"):
            read(prediction, screen)


@pytest.mark.parametrize(
    ("about", "message"),
    [({"units": "tpm"}, "tpm"), ({"units": "log1p", "total": "many"}, "many")],
)
def test_strange_declarations_are_refused(screen, split, prediction, about, message):
    prediction.uns["knockon"] = about
    with pytest.raises(UserError, match=message):
        Pairs.of(prediction, screen, split)


# ---- splits ----------------------------------------------------------------------------------------


def test_without_a_split_what_is_predicted_is_tested(screen, split, prediction, caplog):
    found = read(prediction, screen)
    implied = found.split(screen)
    assert set(implied.test) == set(split.test)
    assert set(implied.train) == set(split.train)
    with caplog.at_level(logging.INFO, "knockon"):
        table = evaluate(prediction, screen)
    assert "the 3 predicted conditions are tested, 4 are for training" in caplog.text
    assert len(table) == len(evaluate(prediction, screen, split))


def test_something_must_be_left_for_training_and_to_be_tested(make, screen):
    everything = make.cells([str(label) for label in screen.conditions], cells=4)
    with pytest.raises(UserError, match=r"holds all conditions.*--split"):
        read(everything, screen).split(screen)
    with pytest.raises(UserError, match=r"no condition of the screen: A\+D.*such as A, A\+B"):
        read(make.cells(["A+D"]), screen).split(screen)


def test_another_split_than_that_of_the_run_is_said(tmp_path, make, screen, split, prediction):
    split.write(tmp_path / "split.json")
    prediction.uns["knockon"] = {"split": "additive", "split_digest": digest(tmp_path / "split.json")}
    assert not any("another split" in note for note in Pairs.of(prediction, screen, split).notes)
    other = make.split(screen, lambda label: label == Label.of(["A", "B"]))
    assert "another split (additive)" in Pairs.of(prediction, screen, other).notes[-1]


# ---- broken files ----------------------------------------------------------------------------------


def edited(change):
    """Break a file as HDF5."""

    def spoil(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return spoil


def replaced(name, value):
    def change(file):
        del file[name]
        if value is not None:
            file[name] = value

    return edited(change)


def cells_with(change):
    """Write other cells."""

    def spoil(path):
        cells = change(anndata.read_h5ad(path))
        cells.write_h5ad(path)

    return spoil


def with_values(change):
    def changed(cells):
        cells.X = change(cells.X.toarray())
        return cells

    return cells_with(changed)


def with_obs(**columns):
    def changed(cells):
        cells.obs = cells.obs.assign(**columns)
        return cells

    return cells_with(changed)


def bytes_of(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def renamed(cells):
    cells.var_names = [f"{name}x" for name in cells.var_names]
    return cells


def huge(x):
    x[0, 0] = 3e38
    return x


def index_out_of_range(file):
    file["X/indices"][3] = 10_000


BROKEN = {
    "no file": lambda path: path.unlink(),
    "truncated": bytes_of(lambda data: data[: len(data) // 2]),
    "no hdf5": bytes_of(lambda _: b"perturbation,G0,G1\nA+B,1,2\n"),
    "empty": bytes_of(lambda _: b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "no obs": replaced("obs", None),
    "no var": replaced("var", None),
    "no X": replaced("X", None),
    "obs is an array": replaced("obs", np.arange(3)),
    "X is a number": replaced("X", 3.0),
    "X has one axis": replaced("X", np.arange(40.0)),
    "X has three axes": replaced("X", np.ones((60, 40, 2))),
    "X has other cells": replaced("X", np.ones((7, 40))),
    "X has texts": replaced("X", np.full((60, 40), b"1")),
    "an index out of range": edited(index_out_of_range),
    "row starts in disorder": edited(lambda file: file["X/indptr"].__setitem__(5, 2000)),
    "too few values": replaced("X/data", np.ones(9, dtype=np.float32)),
    "no encoding": edited(lambda file: file["X"].attrs.clear()),
    "nan": with_values(lambda x: np.where(x > 2, np.nan, x)),
    "infinite": with_values(lambda x: np.where(x > 2, np.inf, x)),
    "negative": with_values(lambda x: x - 1),
    "huge": with_values(huge),
    "all zero": with_values(np.zeros_like),
    "counts for log1p": with_values(lambda x: np.rint(np.expm1(x))),
    "wrong labels": with_obs(perturbation="nonsense"),
    "no labels": with_obs(perturbation=np.nan),
    "empty labels": with_obs(perturbation=""),
    "half a label": with_obs(perturbation="A+"),
    "only controls": with_obs(perturbation="control"),
    "labels are numbers": with_obs(perturbation=1.5),
    "no cells": cells_with(lambda cells: cells[:0].copy()),
    "no genes": cells_with(lambda cells: cells[:, :0].copy()),
    "other genes": cells_with(renamed),
}


SCORED = {
    "as it is": lambda path: None,
    "one cell": cells_with(lambda cells: cells[:1].copy()),
    "repeated names": cells_with(lambda cells: cells[np.repeat(np.arange(20), 3)].copy()),
    "a strange uns": edited(lambda file: file["uns"].__setitem__("knockon", 3)),
    "a gene that is always 0": with_values(lambda x: x * (np.arange(40) > 0)),
    "one value for all": with_values(lambda x: np.full_like(x, 0.5)),
}


@pytest.fixture
def files(tmp_path, make, prediction):
    make.cells(["control", "A", "B", "C", "D", "A+B", "B+C", "C+D"]).write_h5ad(tmp_path / "real.h5ad")
    prediction.write_h5ad(tmp_path / "p.h5ad")
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_a_broken_file_ends_in_one_message(files, refused, name):
    BROKEN[name](files / "p.h5ad")
    message = refused("evaluate", "--pred", files / "p.h5ad", "--real", files / "real.h5ad")
    assert "knockon: " in message
    assert message.count("knockon: ") == 1


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_a_strange_file_is_scored(files, capsys, name):
    SCORED[name](files / "p.h5ad")
    main(["evaluate", "--pred", str(files / "p.h5ad"), "--real", str(files / "real.h5ad")])
    assert "pearson_delta" in capsys.readouterr().out


def test_flipped_bytes_end_in_scores_or_in_one_message(files):
    """Damage anywhere: what is left is read, or refused. (Some makes HDF5 itself loop, and is not here.)"""
    whole, draw = (files / "p.h5ad").read_bytes(), np.random.default_rng(0)
    screen, ends = read_screen(files / "real.h5ad"), []
    for _ in range(40):
        data = bytearray(whole)
        for at in draw.integers(0, len(whole), int(draw.integers(1, 6))):
            data[at] = draw.integers(256)
        (files / "p.h5ad").write_bytes(bytes(data))
        try:
            found = read(files / "p.h5ad", screen)
            Pairs.of(found, screen, found.split(screen))
            ends.append("scored")
        except UserError:
            ends.append("refused")
    assert {"scored", "refused"} == set(ends)
