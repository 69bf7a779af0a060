"""No effect: the control cells as they are. The floor under every other model."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.baseline import MeanModel
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Nothing to choose."""

    def build(self, spec: Spec) -> "NoEffect":
        """Make the model."""
        return NoEffect(spec)


class NoEffect(MeanModel):
    """Answers every condition with the control cells, unchanged."""

    def fit_effects(self, train: Screen) -> None:
        """Learn nothing: there is no effect."""

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Return zeros."""
        return self.dispersion.mean.new_zeros(len(condition), len(self.spec.genes))

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Answer every condition."""
        return torch.ones_like(condition.perturbation[:, 0], dtype=torch.bool)


def default() -> Recipe:
    """Fitted in seconds; nothing is trained."""
    return Recipe(model=Config())
