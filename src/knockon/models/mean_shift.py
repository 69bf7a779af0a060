"""Mean shift: every perturbation does what perturbations do on average."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.baseline import MeanModel, MeasuredEffects
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Nothing to choose."""

    def build(self, spec: Spec) -> "MeanShift":
        """Make the model."""
        return MeanShift(spec)


class MeanShift(MeanModel):
    """Adds the mean effect of the training conditions of the same context, all weighted alike.

    In a context without training conditions, the mean over those of all contexts is added. With one
    context this is the "perturbed mean" of the field: the mean over training conditions of their means.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.effects = MeasuredEffects(spec)

    def fit_effects(self, train: Screen) -> None:
        """Measure the training conditions."""
        self.effects.fit(train, self.spec)

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Average the effects measured in the context."""
        return self.effects(self.effects.average(condition))

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Answer every condition: the perturbation makes no difference."""
        return torch.ones_like(condition.perturbation[:, 0], dtype=torch.bool)


def default() -> Recipe:
    """Fitted in seconds; nothing is trained."""
    return Recipe(model=Config())
