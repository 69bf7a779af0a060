"""Additive: a combination does what its parts do, summed. The baseline that is hard to beat on doubles."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.baseline import MeanModel, MeasuredEffects, first_found
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What to do where a part was never measured."""

    missing: Literal["refuse", "mean", "zero"] = "refuse"
    """A part that was never measured alone: refuse it, or take the mean effect, or none."""

    def build(self, spec: Spec) -> "Additive":
        """Make the model."""
        return Additive(self, spec)


class Additive(MeanModel):
    """Adds the effects of single perturbations [ahlmann-eltze2025, additive model].

    In this order, the first that was measured in training:

    1. the very condition in the same context;
    2. the mean of its effects in the other contexts that have it (so an unseen context is answered);
    3. the sum over its parts, each in the same context or else the mean over the contexts that have
       it, at its dose by linear interpolation in the logarithm of the dose.
    """

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.config = config
        self.effects = MeasuredEffects(spec)

    def fit_effects(self, train: Screen) -> None:
        """Measure the training conditions."""
        self.effects.fit(train, self.spec)

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Take the effect of the very condition, or else the sum over its parts."""
        parts = self.effects.single(condition)
        if self.config.missing == "mean":
            average = self.effects.average(condition).unsqueeze(1)
            parts = first_found(parts, average * (condition.perturbation > 0).unsqueeze(-1))
        return self.effects(first_found(self.effects.exact(condition), parts.sum(1)))

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether the condition or each of its parts was measured, or missing parts are filled in."""
        if self.config.missing != "refuse":
            return torch.ones_like(condition.perturbation[:, 0], dtype=torch.bool)
        measured = (self.effects.single(condition) > 0).any(-1)
        exact = (self.effects.exact(condition) > 0).any(-1)
        return exact | (measured | (condition.perturbation == 0)).all(-1)


def default() -> Recipe:
    """Fitted in seconds; nothing is trained."""
    return Recipe(model=Config())
