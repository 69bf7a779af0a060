"""Models whose cells are moved towards the mean of ripple in the end."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from knockon.dynamics.discrepancy import energy_distance
from knockon.model import Model
from knockon.models.ripple import Config
from knockon.types import CellSets, Condition, Noise, Spec

WEIGHTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Weights of the mean of ripple that are tried."""


class PulledModel(Model):
    """Makes cells, and moves them towards where ripple expects their mean, as counts.

    The weight of that mean, against the one of the cells that were made, is chosen on validation conditions
    whose parts were measured; without any it is 1. Cells of a set are moved together, so that they depend on
    each other and a few of them vary too little.

    Parameters
    ----------
    anchored
        Whether the model needs ripple for more than that.
    pulled
        Whether cells are moved at all.
    """

    weight: Float[Tensor, ""]

    def __init__(self, spec: Spec, *, anchored: bool, pulled: bool) -> None:
        super().__init__(spec)
        self.pulled = pulled
        self.ripple = Config(missing="mean").build(spec) if anchored or pulled else None
        self.register_buffer("weight", torch.ones(()))

    @abstractmethod
    def make(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Make one cell under the condition for each control cell."""

    def to_log1p(self, cells: Float[Tensor, "sets cells genes"]) -> Float[Tensor, "sets cells genes"]:
        """Bring cells from the units of the model to those of ripple."""
        return cells

    def from_log1p(
        self,
        moved: Float[Tensor, "sets cells genes"],
        made: Float[Tensor, "sets cells genes"],
        noise: Noise,
    ) -> Float[Tensor, "sets cells genes"]:
        """Bring moved cells to the units of the model.

        Parameters
        ----------
        moved
            As ripple moved them.
        made
            The same cells as they were made, in the units of the model.
        """
        return moved

    @final
    def sample(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Make cells and move them."""
        made = self.make(control, condition, noise)
        if self.ripple is None or not self.pulled or not self.weight:
            return made
        moved = self.ripple.pull(self.to_log1p(made), condition, float(self.weight), noise)
        return self.from_log1p(moved, made, noise)

    @final
    def choose(self, validation: Sequence[CellSets], seed: int) -> None:
        """Choose the weight that brings cells nearest to measured ones, by energy distance.

        Conditions of which ripple must guess a part do not tell how far it can be trusted with the others.
        """
        if self.ripple is None or not self.pulled or not self.weight:
            return
        validation = [one for one in validation if bool(self.ripple.measures(one.condition))]
        if not validation:
            return
        noise = Noise(torch.Generator(self.weight.device).manual_seed(seed))
        made = [self.to_log1p(self.make(one.control, one.condition, noise)) for one in validation]
        targets = [self.to_log1p(one.target) for one in validation]
        errors = []
        for weight in WEIGHTS:
            noise = Noise(torch.Generator(self.weight.device).manual_seed(seed))
            pairs = zip(made, validation, strict=True)
            moved = [self.ripple.pull(cells, one.condition, weight, noise) for cells, one in pairs]
            distances = [energy_distance(x, y) for x, y in zip(moved, targets, strict=True)]
            errors.append(float(torch.cat(distances).mean()))
        self.weight.fill_(WEIGHTS[errors.index(min(errors))])
