from dataclasses import replace

import numpy as np
import pytest
import torch

from knockon import models
from knockon.data import simulate
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.generate import Given, generate
from knockon.model import Model
from knockon.predict import Refusal
from knockon.types import Label, Spec, UserError


@pytest.fixture(scope="module")
def screen() -> Screen:
    """Drugs at doses, in two cell types."""
    config = simulate.Simulation(
        cells=300, genes=30, singles=0, doubles=0, drugs=3, doses=(0.1, 1.0), cell_types=2, truth_cells=32
    )
    return Screen.from_anndata(simulate.simulate(config), columns=Columns(layer="counts"))


@pytest.fixture(scope="module")
def model(screen: Screen) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.recipe("scldm", "small").model.build(screen.spec())
    held_out = screen.conditions[-1].perturbations
    model.fit_statistics(screen.select([x for x in screen.labels if x.perturbations != held_out]))
    return model.eval()


def test_classes_are_given_by_name(screen: Screen) -> None:
    spec, label = screen.spec(), screen.conditions[0]
    level = spec.covariates[0].levels[1]
    whole = Given.of({"cell_type": level, "perturbation": label.perturbation}, spec)
    assert whole.label == Label(label.perturbations, label.doses, (level,))
    assert whole.classes == (True, True)
    part = Given.of({"cell_type": level}, spec)
    assert part.classes == (False, True)
    assert part.texts(spec) == {"perturbation": "any", "cell_type": level}
    nothing_done = Given.of({"perturbation": "control"}, spec)
    assert nothing_done.classes == (True, False)
    assert nothing_done.texts(spec) == {"perturbation": "control", "cell_type": "any"}


def test_what_cannot_be_given_is_refused_by_name(screen: Screen, model: Model) -> None:
    spec = screen.spec()
    with pytest.raises(UserError, match=r"celltype.*one of perturbation, cell_type"):
        Given.of({"celltype": "B"}, spec)
    with pytest.raises(UserError, match="context within the perturbation"):
        Given.of({"perturbation": f"{screen.conditions[0]}"}, spec)
    with pytest.raises(UserError, match=r"Unknown cell_type.*nowhere"):
        generate(model, Given.of({"cell_type": "nowhere"}, spec))
    with pytest.raises(UserError, match="without its dose: drug1"):
        Given.of({"perturbation": "drug1"}, replace(spec, perturbations=("drug1",), dose_unit="uM"))
    with pytest.raises(UserError, match=r"Unknown perturbation.*NOPE"):
        generate(model, Given.of({"perturbation": "NOPE"}, spec))
    with pytest.raises(Refusal, match="no basis"):
        generate(model, Given.of({"perturbation": screen.conditions[-1].perturbation}, spec))
    with pytest.raises(UserError, match="at least 1"):
        generate(model, Given.of({}, spec), cells=0)
    with pytest.raises(UserError, match="no_effect cannot generate cells without control cells"):
        generate(models.recipe("no_effect").model.build(spec), Given.of({}, spec))


def test_cells_are_counts_and_say_what_they_are_of(screen: Screen, model: Model) -> None:
    spec, label = screen.spec(), screen.conditions[0]
    cells = generate(model, Given.of({"perturbation": label.perturbation}, spec), cells=5)
    assert cells.X.dtype == np.float32
    assert np.array_equal(cells.X.data, np.rint(cells.X.data))
    assert list(cells.var_names) == list(screen.genes)
    assert list(cells.obs) == ["perturbation", "cell_type", "dose"]
    (row,) = cells.obs.drop_duplicates().to_numpy().tolist()
    assert row == [label.perturbation, "any", f"{label.doses[0]:g}"]
    (row,) = generate(model, Given.of({}, spec), cells=2).obs.drop_duplicates().to_numpy().tolist()
    assert row == ["any", "any", "any"]
    (row,) = generate(model, given_control(spec), cells=2).obs.drop_duplicates().to_numpy().tolist()
    assert row == ["control", spec.covariates[0].levels[0], ""]


def given_control(spec: Spec) -> Given:
    return Given.of({"perturbation": "control", "cell_type": spec.covariates[0].levels[0]}, spec)


def test_cells_depend_on_the_seed_and_on_what_is_given_alone(
    screen: Screen, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knockon.generate.CHUNK", 4)
    advanced: list[int] = []
    given = given_control(screen.spec())
    many = generate(model, given, cells=11, seed=1, advance=lambda: advanced.append(1))
    assert len(advanced) == 3
    few = generate(model, given, cells=8, seed=1)
    assert (many[:8].X != few.X).nnz == 0
    assert (generate(model, given, cells=8, seed=2).X != few.X).nnz
    assert (generate(model, Given.of({}, screen.spec()), cells=8, seed=1).X != few.X).nnz
