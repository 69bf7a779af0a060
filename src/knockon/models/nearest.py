"""Nearest: a perturbation does what its nearest measured neighbors do."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knockon.baseline import MeanModel, MeasuredEffects, first_found
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.models._embedding import embed_genes, embed_perturbations
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

    neighbors: Int[Tensor, "codes neighbors"]
    closeness: Float[Tensor, "codes neighbors"]

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.config = config
        self.effects = MeasuredEffects(spec)
        codes = len(spec.perturbations) + 1
        self.register_buffer("neighbors", torch.zeros(codes, 0, dtype=torch.long))
        self.register_buffer("closeness", torch.zeros(codes, 0))

    def fit_effects(self, train: Screen) -> None:
        """Measure the training conditions, and rank the neighbors of every perturbation."""
        self.effects.fit(train, self.spec)
        vectors, known = embed_perturbations(self.spec, embed_genes(train, self.config.components))
        singles = {label.perturbations[0] for label in train.conditions if len(label.perturbations) == 1}
        measured = np.array([name in singles for name in self.spec.perturbations], dtype=bool) & known
        neighbors, closeness = self._rank(vectors, np.flatnonzero(measured))
        device = self.neighbors.device
        # code 0, nothing, has no neighbors; code i + 1 is the i-th perturbation
        self.neighbors = torch.from_numpy(np.pad(neighbors + 1, ((1, 0), (0, 0)))).to(device)
        closeness = np.pad(closeness * known[:, None], ((1, 0), (0, 0)))
        self.closeness = torch.from_numpy(closeness.astype(np.float32)).to(device)

    def _rank(
        self, vectors: Float[np.ndarray, "perturbations width"], measured: Int[np.ndarray, "singles"]
    ) -> tuple[Int[np.ndarray, "perturbations k"], Float[np.ndarray, "perturbations k"]]:
        """Nearest measured perturbations of each perturbation, and their weights."""
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(length > 0, length, 1)
        distance = 1 - unit @ unit[measured].T
        order = distance.argsort(axis=1, kind="stable")[:, : self.config.neighbors]
        nearest = np.take_along_axis(distance, order, axis=1)
        weight = np.exp(-(nearest - nearest.min(axis=1, keepdims=True, initial=2)) / self.config.temperature)
        return measured[order], weight / weight.sum(axis=1, keepdims=True)

    def _parts(self, condition: Condition) -> Float[Tensor, "sets slots rows"]:
        near, weight = self.neighbors[condition.perturbation], self.closeness[condition.perturbation]
        alike = Condition(
            perturbation=near.flatten(1),
            dose=condition.dose.repeat_interleave(near.shape[-1], dim=1),
            covariates=condition.covariates,
        )
        similar = (self.effects.single(alike).unflatten(1, near.shape[1:]) * weight.unsqueeze(-1)).sum(2)
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
