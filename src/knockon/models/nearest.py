"""Nearest: a perturbation does what its nearest measured neighbors do."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from knockon.baseline import MeanModel, MeasuredEffects, first_found
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.models._embedding import Neighbors
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """How many neighbors count, and how much the nearer ones more."""

    neighbors: int = 5
    """Measured single perturbations that stand in for one that was not measured."""
    temperature: float = 0.1
    """Cosine distance over which the weight of a neighbor falls to a third; large makes them equal."""
    components: int = 10
    """Principal components in the embedding that tells neighbors."""

    def build(self, spec: Spec) -> "Nearest":
        """Make the model."""
        return Nearest(self, spec)


class Nearest(MeanModel):
    """Mean effect of the nearest measured conditions; "matching mean" on doubles [systema2025].

    A condition that was measured in training (in this context, or else in others) is answered with
    its measured effect. Any other is answered with the mean over its parts, and a part with the first
    of these that exists:

    1. its measured single effect, at its dose by linear interpolation in the logarithm of the dose;
    2. the mean effect of the measured combinations that hold it;
    3. the weighted mean of the nearest measured singles, by the cosine distance of their vectors:
       ``Spec.vectors``, or for genes of the panel the principal components of training expression.
    """

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.effects = MeasuredEffects(spec)
        self.neighbors = Neighbors(spec, config.neighbors, config.temperature, config.components)

    def fit_effects(self, train: Screen) -> None:
        """Measure the training conditions, and rank the neighbors of every perturbation."""
        self.effects.fit(train, self.spec)
        self.neighbors.fit(train)

    def _parts(self, condition: Condition) -> Float[Tensor, "sets slots rows"]:
        similar = self.neighbors.weigh(self.effects, condition)
        return first_found(self.effects.single(condition), self.effects.containing(condition), similar)

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Take the effect of the very condition, or else the mean over its parts."""
        parts = self._parts(condition).sum(1) / (condition.perturbation > 0).sum(1, keepdim=True).clamp_min(1)
        return self.effects(first_found(self.effects.exact(condition), parts))

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether the condition was measured, or each of its parts has something to stand in for it."""
        found = (self._parts(condition) > 0).any(-1)
        exact = (self.effects.exact(condition) > 0).any(-1)
        return exact | (found | (condition.perturbation == 0)).all(-1)


def default() -> Recipe:
    """Five neighbors; nothing is trained."""
    return Recipe(model=Config())
