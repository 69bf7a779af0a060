"""Cells that are pulled towards the mean of ripple, by a weight that measured cells choose."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon import models
from knockon.data.screen import Screen
from knockon.model import Losses
from knockon.models._pulled import PulledConfig, PulledModel
from knockon.types import CellSets, Condition, Label, Noise, Spec, UserError

AB = Label.of(["A", "B"])
RATES = {"": 2.0, "A": 4.0, "B": 4.0, "C": 3.0, "AB": 1.0}


@dataclass(frozen=True, kw_only=True)
class Config(PulledConfig):
    """Of cells that are made already."""

    shrunk: bool = False

    def build(self, spec: Spec) -> "Repeated":
        return Repeated(self, spec, torch.zeros(1, len(spec.genes)))


class Repeated(PulledModel):
    """Makes the same cells, whatever is asked; knows A and B."""

    units = "log1p"

    def __init__(self, config: Config, spec: Spec, cells: Float[Tensor, "cells genes"]) -> None:
        super().__init__(config, spec, shrunk=config.shrunk)
        self.cells = cells

    def fit_statistics(self, train: Screen) -> None:
        if self.ripple is not None:
            self.ripple.fit_statistics(train)

    def based(self) -> Bool[Tensor, "codes"]:
        return torch.tensor([True, *(name in "AB" for name in self.spec.perturbations)])

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        raise NotImplementedError

    def make(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        return self.cells[: control.shape[1]].expand(len(condition), -1, -1)


@pytest.fixture
def screen(make_screen) -> Screen:
    """A and B together are far from the sum of both."""
    draw = np.random.default_rng(0)
    return make_screen(
        {Label.of(list(k)): np.log1p(draw.poisson(rate, size=(120, 20))) for k, rate in RATES.items()}
    )


def chosen(screen: Screen, cells: Tensor, labels: Sequence[Label] = (AB,), **switches: bool) -> float:
    model = Repeated(Config(**switches), screen.spec(), cells)
    model.fit_statistics(screen.select([label for label in screen.labels if label != AB]))
    model.choose(sets_of(screen, model, labels), 0)
    return float(model.weight)


def sets_of(screen: Screen, model: PulledModel, labels: Sequence[Label]) -> list[CellSets]:
    return [
        CellSets(
            target=torch.from_numpy(screen.cells_of(label))[None, 60:],
            control=torch.from_numpy(screen.cells_of(Label()))[None, :60],
            condition=model.spec.encode([label]),
        )
        for label in labels
    ]


def test_cells_that_are_right_stay_and_others_are_pulled(screen: Screen) -> None:
    right, wrong = (torch.from_numpy(screen.cells_of(label)) for label in (AB, Label.of(["A"])))
    assert chosen(screen, right) == 0.0
    assert chosen(screen, wrong, [Label.of(["C"])]) == 1.0


def test_without_validation_conditions_or_a_pull_nothing_is_chosen(screen: Screen) -> None:
    right = torch.from_numpy(screen.cells_of(AB))
    assert chosen(screen, right, []) == 1.0
    assert chosen(screen, right, pulled=False) == 1.0


class Learned(Repeated):
    """What it learned is wrong: cells at twice their values."""

    def make(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        return super().make(control, condition, noise) * (1 + self.share)


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.0), (0.5, 1.0), (2 / 3, 0.5)])
@pytest.mark.parametrize("pulled", [False, True])
def test_the_share_of_what_was_learned_is_chosen(
    screen: Screen, scale: float, share: float, pulled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "knockon")
    right = torch.from_numpy(screen.cells_of(AB))
    config, spec = Config(pulled=pulled, shrunk=True), screen.spec()
    model = Learned(config, spec, scale * right)
    model.fit_statistics(screen.select([label for label in screen.labels if label != AB]))
    model.choose(sets_of(screen, model, [AB]), 0)
    assert (float(model.share), float(model.weight)) == (share, 0.0 if pulled else 1.0)
    taken = {0.0: "nothing", 0.5: "half", 1.0: "all"}[share]
    told = f"{taken} of what was learned" + ", weight 0 for the mean of ripple" * pulled
    assert caplog.messages == [f"chosen by validation conditions (1): {told}"]
    without = Learned(config, spec, scale * right)
    without.choose([], 0)
    assert float(without.share) == 0.5
    assert "no validation condition can choose: half of what was learned" in caplog.text
    whole = Learned(Config(pulled=pulled), spec, scale * right)
    whole.fit_statistics(screen)
    whole.choose(sets_of(screen, whole, [AB]), 0)
    assert float(whole.share) == 1.0


# ---- perturbations that were never trained ---------------------------------------------------------

UNSEEN = [Label.of(["C"]), Label.of(["A", "C"]), Label.of(["A"]), Label()]


def test_what_was_never_trained_is_known_where_ripple_may_guess(screen: Screen) -> None:
    refusing, answering = Config(), Config().answering()
    for config, known in ((refusing, [False, False, True, True]), (answering, [True] * 4)):
        model = config.build(screen.spec())
        assert model.knows(model.spec.encode(UNSEEN)).tolist() == known


def test_nobody_guesses_where_cells_are_not_moved(screen: Screen) -> None:
    config = Config(pulled=False)
    assert config.answering() == config
    with pytest.raises(UserError, match="cells are not moved"):
        replace(config, missing="mean").build(screen.spec())
    for name in ("scdfm", "perturbdiff", "scldm"):
        paper = models.recipe(name, "paper").model
        assert paper.answering() == paper


@pytest.mark.parametrize("name", ["scdfm", "perturbdiff", "scldm"])
def test_cells_of_what_was_never_trained_have_the_mean_that_ripple_guesses(name: str, make_screen) -> None:
    """The network is told of the rest only, so that weights of what was never trained make no difference."""
    draw = np.random.default_rng(0)
    config = models.recipe(name, "small").model.answering()
    cells = {Label.of(list(k)): draw.poisson(rate, size=(60, 20)) for k, rate in RATES.items()}
    if name != "scldm":
        cells = {label: np.log1p(counts) for label, counts in cells.items()}
    screen = make_screen(cells)
    model = config.build(screen.spec())
    assert isinstance(model, PulledModel)
    model.fit_statistics(screen.select([Label.of(["A"]), Label.of(["B"]), AB, Label()]))
    model.eval()
    condition = model.spec.encode(UNSEEN[:2])
    assert model.knows(condition).all()
    model.guesses = False
    assert not model.knows(condition).any()
    control = torch.from_numpy(np.stack([cells[Label()]] * 2).astype(np.float32))

    def sampled() -> Tensor:
        noise = Noise(torch.Generator().manual_seed(0))
        with torch.no_grad():
            return model.sample(control, condition, noise)

    made = sampled()
    assert made.isfinite().all()
    if model.ripple is not None and name != "scldm":  # whose counts are nowhere near without training
        torch.testing.assert_close(made.mean(1), model.ripple.expect(condition), atol=0.1, rtol=0)
    code = model.spec.perturbations.index("C") + 1
    for key, weight in model.named_parameters():
        if key.endswith("own.table.weight"):
            weight.data[code] += 100
    assert torch.equal(sampled(), made)
