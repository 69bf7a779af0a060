import re

import h5py
import numpy as np
import pandas as pd
import pytest

from knockon.data.conventions import Columns
from knockon.data.inspect import inspect

from .screens import DOUBLES, GENES, adata, counts, log1p

GOOD = {"control": 12, "A": 12, "B": 12, "A+B": 12}


def column(values, name="perturbation", **more):
    data = adata({"x": len(values)}, **more)
    data.obs[name] = values
    if name != "perturbation":
        del data.obs["perturbation"]
    return data


def valued(change, layer=None):
    data = adata(GOOD)
    values = change(data.X.toarray()).astype(np.float32)
    if layer:
        data.layers[layer] = values
    else:
        data.X = values
    return data


def genes(names):
    data = adata(GOOD)
    data.var_names = names
    return data


def missing_some():
    data = adata(GOOD)
    data.obs.loc[["cell1", "cell20"], "perturbation"] = np.nan
    return data


ZOO = {
    "no perturbation column": (column(["A"] * 20, "what"), Columns(), "No column of obs says"),
    "no control": (adata({"A": 12, "B": 12}), Columns(), "No control cells.*--control VALUE"),
    "two controls": (
        adata({"control": 12, "DMSO": 12, "A": 12}),
        Columns(),
        "Several values could be the control",
    ),
    "wrong control": (adata(GOOD), Columns(control="NT"), "No control cells: NT"),
    "wrong column": (adata(GOOD), Columns(perturbation_key="pertubation"), "did you mean perturbation"),
    "wrong covariate": (
        adata(GOOD),
        Columns(covariate_keys=("donor",)),
        "Unknown column: donor.*--covariate-keys",
    ),
    "wrong dose": (adata(GOOD), Columns(dose_key="uM"), "Unknown column: uM.*--dose-key"),
    "missing layer": (
        valued(lambda x: x, "raw"),
        Columns(layer="counts"),
        "Missing layer: counts.*one of raw",
    ),
    "missing labels": (missing_some(), Columns(), "says nothing for 2 cells: cell1, cell20.*notna"),
    "empty label": (adata({"control": 12, "": 12}), Columns(), "says nothing for 12 cells"),
    "empty part": (adata({"control": 12, "A+": 12}), Columns(), "empty condition: 'A\\+'"),
    "torn control": (adata({"x": 12, "A": 12}, control=[True] * 3 + [False] * 21), Columns(), "only a part"),
    "missing context": (
        adata(GOOD, cell_type=[None, "T", "B"] * 16),
        Columns(),
        r"obs\['cell_type'\] says nothing",
    ),
    "unreadable dose": (
        adata(GOOD, dose=["much"] * 48),
        Columns(dose_key="dose"),
        "dose that cannot be read",
    ),
    "dose of another size": (adata(GOOD, dose=["1+2+3"] * 48), Columns(), "dose that cannot be read"),
    "mixed dose units": (adata({"DMSO": 12, "x@1uM": 12, "x@1g/l": 12}), Columns(), "several units"),
    "negative": (valued(lambda x: x - 1), Columns(), "Negative values"),
    "not finite": (valued(lambda x: np.where(x == 2, np.nan, x)), Columns(), "not finite"),
    "normalized only": (valued(lambda x: x * 1.7 + 30), Columns(), "neither counts nor log1p.*sc.pp.log1p"),
    "mixed scales": (
        valued(lambda x: np.vstack([x[:24], log1p(x[24:])])),
        Columns(),
        "Some cells hold counts",
    ),
    "all zero": (valued(lambda x: x * 0), Columns(), "All values are zero"),
    "declared log1p": (adata(GOOD), Columns(units="log1p"), "whole numbers.*--units counts"),
    "declared counts": (valued(log1p), Columns(units="counts"), "fractions.*--units log1p"),
    "duplicate genes": (
        genes(["G1", "G1", *GENES[2:]]),
        Columns(),
        "Duplicate genes: G1.*var_names_make_unique",
    ),
}


@pytest.mark.parametrize("animal", ZOO)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_fault_is_found_with_its_mend(tmp_path, animal):
    data, columns, match = ZOO[animal]
    data.copy().write_h5ad(tmp_path / "x.h5ad")
    report = inspect(tmp_path / "x.h5ad", columns)
    assert len(report.faults) == 1
    text = "\n".join(report.lines())
    assert re.search(match, text)
    assert "To mend it" in text
    assert "1 fault" in text


def test_all_faults_are_listed_together(tmp_path):
    data = valued(lambda x: np.where(x == 2, np.nan, x - 1))
    data.obs["cell_type"] = [None, "T", "B"] * 16
    data.obs.loc["cell1", "perturbation"] = np.nan
    data.write_h5ad(tmp_path / "x.h5ad")
    text = "\n".join(inspect(tmp_path / "x.h5ad", Columns(layer=None, dose_key="d")).lines())
    for part in (
        "perturbation'] says nothing",
        "cell_type'] says nothing",
        "Unknown column: d",
        "not finite",
        "Negative",
    ):
        assert part in text
    assert "5 faults" in text


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "no obs", "no X"])
def test_files_that_cannot_be_opened(tmp_path, damage):
    path = tmp_path / "x.h5ad"
    if damage != "missing":
        adata(GOOD).write_h5ad(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "text":
        path.write_text("A,B")
    elif damage.startswith("no "):
        with h5py.File(path, "a") as file:
            del file[damage[3:]]
    report = inspect(path)
    assert len(report.faults) == 1
    assert report.facts == ()


def test_remarks_do_not_keep_a_file_from_being_used(tmp_path):
    names = [f"ENSG{i:05}" for i in range(38)] + ["gene", "GENE"]
    data = genes(names)
    data.obs["perturbation"] = pd.Categorical(data.obs["perturbation"], categories=[*GOOD, "a", "never"])
    data.obs.loc["cell30", "perturbation"] = "a"
    data.obs["cell_type"] = ["T"] * 40 + ["B"] * 8
    data.write_h5ad(tmp_path / "x.h5ad")
    report = inspect(tmp_path / "x.h5ad")
    text = "\n".join(report.lines())
    assert report.faults == ()
    for part in (
        "Genes that differ only in capitals",
        "knows values that no cell has",
        "fewer than 10 cells",
        "no control cells in their context",
        "Perturbations that differ only in capitals: A, a",
        "Ensembl numbers",
        "Nothing keeps this file",
    ):
        assert part in text


def test_facts_of_a_good_file(tmp_path):
    adata(DOUBLES).write_h5ad(tmp_path / "x.h5ad")
    facts = dict(inspect(tmp_path / "x.h5ad").facts)
    assert facts["cells"] == "185"
    assert facts["control cells"] == "30"
    assert facts["single perturbations"] == "4"
    assert facts["combinations"] == "5, of which 4 have all their singles"
    assert facts["values"].startswith("counts")


@pytest.mark.parametrize("name", ["norman19", "papalexi21", "kang18"])
def test_real_screens_have_no_fault(shared, name):
    assert inspect(shared / "data" / f"{name}.h5ad").faults == ()


def test_counts_of_the_zoo_are_whole():
    assert len(ZOO) >= 20
    assert (counts(5) == np.rint(counts(5))).all()
