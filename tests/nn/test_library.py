import numpy as np
import pytest
import torch

from knockon.nn.library import LibrarySizes
from knockon.types import Covariate, Label, Noise, Spec

SPEC = Spec(
    genes=("a", "b"),
    perturbations=("A", "B", "C"),
    covariates=(Covariate("type", ("x", "y", "z")),),
    slots=2,
    units="counts",
)
SIZES = {
    Label.of([], covariates=["x"]): np.array([100.0, 100, 0]),
    Label.of(["A"], covariates=["x"]): np.array([10.0, 20]),
    Label.of(["A", "B"], covariates=["x"]): np.array([5.0]),
    Label.of(["B"], covariates=["y"]): np.array([1000.0, 2000, 4000]),
}
EVERY = np.log(np.concatenate([sizes[sizes > 0] for sizes in SIZES.values()]))


@pytest.fixture
def sizes():
    fitted = LibrarySizes(SPEC)
    fitted.fit(SIZES, SPEC)
    return fitted


@pytest.mark.parametrize(
    ("names", "level", "given", "logs"),
    [
        (["A"], "x", (True, True), np.log([10, 20])),
        (["B", "A"], "x", (True, True), np.log([5])),
        (["A"], "y", (True, True), np.log([10, 20])),
        (["C"], "y", (True, True), np.log([1000, 2000, 4000])),
        (["C"], "z", (True, True), EVERY),
        (["A"], "y", (False, True), np.log([1000, 2000, 4000])),
        (["A"], "y", (True, False), np.log([10, 20])),
        (["A"], "y", (False, False), EVERY),
        ([], "x", (True, True), np.log([100, 100])),
    ],
    ids=["condition", "order of slots", "perturbation elsewhere", "context", "anything", "only a context",
         "only a perturbation", "nothing given", "control, empty cells left out"],
)  # fmt: skip
def test_the_nearest_that_was_measured_answers(sizes, names, level, given, logs):
    condition = SPEC.encode([Label.of(names, covariates=[level])])
    mean, spread = sizes.parameters_of(condition, torch.tensor([given]))
    assert float(mean) == pytest.approx(logs.mean())
    assert float(spread) == pytest.approx(logs.std(), abs=1e-6)


def test_sizes_are_drawn_and_never_one(sizes):
    condition = SPEC.encode([Label.of(["B"], covariates=["y"])])
    noise = Noise(torch.Generator().manual_seed(0))
    drawn = sizes(condition, torch.ones(1, 2, dtype=torch.bool), noise, torch.zeros(1, 4000))
    logs = np.log([1000, 2000, 4000])
    assert float(drawn.log().mean()) == pytest.approx(logs.mean(), abs=0.05)
    assert float(drawn.log().std()) == pytest.approx(logs.std(), abs=0.05)
