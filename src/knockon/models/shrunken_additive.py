"""Shrunken additive: the sum of the parts times one factor, since combinations fall short of it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.baseline import MeanModel
from knockon.data.arrays import Moments
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.models import additive
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What to do where a part was never measured."""

    missing: Literal["refuse", "mean", "zero"] = "refuse"
    """A part that was never measured alone: refuse it, or take the mean effect, or none."""

    def build(self, spec: Spec) -> "ShrunkenAdditive":
        """Make the model."""
        return ShrunkenAdditive(self, spec)


class ShrunkenAdditive(MeanModel):
    """The additive baseline with its sums shrunk by the factor that fits measured combinations best.

    The factor is the least-squares slope of the effects of training combinations on the sums of their
    measured parts, over all genes, between 0 and 1: noise in the parts and saturation both make it smaller.
    Without such combinations it is the share of the squared effects of singles that is not the noise of
    their means. What was measured itself (in this context or another) is not shrunk.
    """

    factor: Float[Tensor, ""]

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.additive = additive.Config(missing=config.missing).build(spec)
        self.register_buffer("factor", torch.ones(()))

    def fit_effects(self, train: Screen) -> None:
        """Measure the training conditions, and fit the factor."""
        self.additive.fit_effects(train)
        effects = self.additive.effects
        asked = effects.measured
        slots = (asked.perturbation > 0).sum(1)
        single = effects.single(asked)
        whole = ((single > 0).any(-1) | (asked.perturbation == 0)).all(-1) & (slots > 1)
        if whole.any():
            sums, found = effects(single[whole].sum(1)), effects.effect[whole]
            slope = (sums * found).sum() / sums.square().sum().clamp_min(1e-12)
        else:
            alone = slots == 1
            slope = 1 - _noise(train, alone) / effects.effect[alone].square().sum().clamp_min(1e-12)
        self.factor.copy_(torch.as_tensor(slope).clamp(0, 1))

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Shrink the sum over the parts."""
        exact = (self.additive.effects.exact(condition) > 0).any(-1, keepdim=True)
        found = self.additive.effect(condition)
        return torch.where(exact, found, self.factor * found)

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """As the additive baseline does."""
        return self.additive.knows(condition)


def _noise(train: Screen, alone: Bool[Tensor, "rows"]) -> float:
    """Expect the squared length of the noise of measured effects, of all these conditions together."""
    found = train.moments
    some = [label for label, single in zip(train.conditions, alone.tolist(), strict=True) if single]
    return sum(_doubt(found[label]) + _doubt(train.control_moments(label)) for label in some)


def _doubt(found: Moments) -> float:
    """Expect the squared length of the noise of a mean over cells; a single cell tells nothing of it."""
    return float(np.square(found.std).sum() / found.cells)


def default() -> Recipe:
    """Fitted in seconds; nothing is trained."""
    return Recipe(model=Config())
