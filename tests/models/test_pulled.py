"""Cells that are pulled towards the mean of ripple, by a weight that measured cells choose."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.data.screen import Screen
from knockon.model import Losses
from knockon.models._pulled import PulledModel
from knockon.types import CellSets, Condition, Label, Noise, Spec

AB = Label.of(["A", "B"])


class Repeated(PulledModel):
    """Makes the same cells, whatever is asked."""

    units = "log1p"

    def __init__(self, spec: Spec, cells: Float[Tensor, "cells genes"], **switches: bool) -> None:
        super().__init__(spec, **({"anchored": False, "pulled": True} | switches))
        self.cells = cells

    def fit_statistics(self, train: Screen) -> None:
        if self.ripple is not None:
            self.ripple.fit_statistics(train)

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        return torch.ones(len(condition), dtype=torch.bool)

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
    rates = {"": 2.0, "A": 4.0, "B": 4.0, "C": 3.0, "AB": 1.0}
    return make_screen(
        {Label.of(list(k)): np.log1p(draw.poisson(rate, size=(120, 20))) for k, rate in rates.items()}
    )


def chosen(screen: Screen, cells: Tensor, labels: Sequence[Label] = (AB,), **switches: bool) -> float:
    model = Repeated(screen.spec(), cells, **switches)
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
    model = Learned(screen.spec(), scale * right, pulled=pulled, shrunk=True)
    model.fit_statistics(screen.select([label for label in screen.labels if label != AB]))
    model.choose(sets_of(screen, model, [AB]), 0)
    assert (float(model.share), float(model.weight)) == (share, 0.0 if pulled else 1.0)
    taken = {0.0: "nothing", 0.5: "half", 1.0: "all"}[share]
    told = f"{taken} of what was learned" + ", weight 0 for the mean of ripple" * pulled
    assert caplog.messages == [f"chosen by validation conditions (1): {told}"]
    without = Learned(screen.spec(), scale * right, pulled=pulled, shrunk=True)
    without.choose([], 0)
    assert float(without.share) == 0.5
    assert "no validation condition can choose: half of what was learned" in caplog.text
    whole = Learned(screen.spec(), scale * right, pulled=pulled)
    whole.fit_statistics(screen)
    whole.choose(sets_of(screen, whole, [AB]), 0)
    assert float(whole.share) == 1.0
