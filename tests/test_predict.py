import numpy as np
import pytest
import scipy.sparse as sp

from knockon import models
from knockon.data import simulate
from knockon.data.screen import Screen
from knockon.model import Model
from knockon.predict import Refusal, all_pairs, generate
from knockon.types import Label, Spec, UserError


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()))


@pytest.fixture(scope="module")
def no_effect(screen: Screen) -> Model:
    model = models.recipe("no_effect").model.build(screen.spec())
    model.fit_statistics(screen)
    return model


def test_cells_name_their_origin(screen: Screen, no_effect: Model) -> None:
    labels = screen.conditions[:2]
    predicted = generate(no_effect, screen, labels, cells=7)
    cells = predicted[~predicted.obs["control"]]
    assert list(cells.obs["perturbation"]) == [label.perturbation for label in labels for _ in range(7)]
    origin = predicted[cells.obs["control_cell"]]
    assert (cells.X != origin.X).nnz == 0  # no effect: the very same cells
    assert list(predicted.var_names) == list(screen.genes)
    assert predicted.X.dtype == np.float32


def test_control_cells_are_used_equally_often(screen: Screen, no_effect: Model) -> None:
    (control,) = screen.controls
    count = len(screen.rows[control])
    predicted = generate(no_effect, screen, screen.conditions[:1], cells=2 * count + 3)
    used = predicted.obs["control_cell"][~predicted.obs["control"]].value_counts()
    assert set(used) == {2, 3}
    assert len(used) == count


def test_a_condition_does_not_depend_on_the_others(screen: Screen) -> None:
    model = models.recipe("scdfm", "small").model
    network = model.build(screen.spec())
    network.fit_statistics(screen)
    a, b, c = screen.conditions[:3]
    together = generate(network, screen, [a, b, c], cells=5, seed=1)
    alone = generate(network, screen, [b], cells=5, seed=1)
    assert (together[5:10].X != alone[:5].X).nnz == 0
    other = generate(network, screen, [b], cells=5, seed=2)
    assert (alone[:5].X != other[:5].X).nnz


def test_what_a_model_does_not_know_is_refused_by_name(screen: Screen) -> None:
    double = next(label for label in screen.conditions if len(label.perturbations) == 2)
    without = screen.select(
        [
            *screen.controls,
            *(x for x in screen.conditions if not set(x.perturbations) & set(double.perturbations)),
        ]
    )
    model = models.recipe("additive").model.build(screen.spec())
    model.fit_statistics(without)
    with pytest.raises(Refusal, match=str(double).replace("+", r"\+")):
        generate(model, screen, [double])


def test_no_cells_is_a_message(screen: Screen, no_effect: Model) -> None:
    with pytest.raises(UserError, match="at least 1"):
        generate(no_effect, screen, screen.conditions[:1], cells=0)
    with pytest.raises(UserError, match="Unknown perturbation"):
        generate(no_effect, screen, [Label.of(["NOPE"])])


def test_all_pairs_are_those_that_were_not_measured(screen: Screen, no_effect: Model) -> None:
    pairs = all_pairs(no_effect, screen)
    singles = {x.perturbations[0] for x in screen.conditions if len(x.perturbations) == 1}
    doubles = {x for x in screen.conditions if len(x.perturbations) == 2}
    assert len(pairs) == len(set(pairs)) == len(singles) * (len(singles) - 1) // 2 - len(doubles)
    assert not doubles & set(pairs)


def test_all_pairs_with_doses_and_contexts(no_effect: Model) -> None:
    labels = [Label((), (), (context,)) for context in "xy"]
    labels += [Label.of(["A"], [dose], [context]) for dose in (1.0, 10.0) for context in "xy"]
    labels += [Label.of(["B"], [2.0], ["x"]), Label.of(["A", "B"], [1.0, 2.0], ["x"])]
    screen = Screen(
        matrix=sp.csr_matrix((len(labels), 2), dtype=np.float32),
        genes=("g1", "g2"),
        cells=[str(label) for label in labels],
        rows={label: np.array([i]) for i, label in enumerate(labels)},
    )
    found = all_pairs(no_effect, screen)
    assert sorted(map(str, found)) == ["A@1+B@2 | y", "A@10+B@2 | x", "A@10+B@2 | y"]
    with pytest.raises(UserError, match="No pair"):
        all_pairs(no_effect, screen.select(labels[:4]))


def test_all_pairs_need_a_model_of_two(screen: Screen) -> None:
    alone = [label for label in screen.conditions if len(label.perturbations) == 1]
    model = models.recipe("no_effect").model.build(Spec(genes=screen.genes, perturbations=("A", "B")))
    with pytest.raises(UserError, match="without combinations"):
        all_pairs(model, screen.select([*screen.controls, *alone]))
