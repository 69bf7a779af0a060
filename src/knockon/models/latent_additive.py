"""Latent additive: effects that add up in a learned space, decoded together with the control cell."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from knockon.data.screen import Screen
from knockon.data.vectors import present
from knockon.model import Losses, Model, ModelConfig, Recipe, Training
from knockon.types import CellSets, Condition, Noise, Spec, Units


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Sizes of the networks."""

    width: int = 128
    """Width of the hidden layers."""
    layers: int = 2
    """Hidden layers of each network."""
    latent: int = 32
    """Size of the space in which effects add up."""
    dropout: float = 0.1
    """Fraction of hidden units that are dropped in training."""

    def build(self, spec: Spec) -> "LatentAdditive":
        """Make the model."""
        return LatentAdditive(self, spec)


class LatentAdditive(Model):
    """The latent additive model of [perturbench2024], from its equations.

    A control cell x under perturbations p becomes ``softplus(D(E_x(x) + E_p(p), covariates))``, where
    D, E_x and E_p are multilayer perceptrons, and is trained by squared error against a randomly
    paired cell of the condition.

    p has one entry for each perturbation: 1 where it was given or, where the screen has doses, the
    dose relative to the highest in training, on a ``log1p`` scale. Where perturbations have vectors, p is
    their sum with those entries as weights, and they are known unseen. A covariate level
    that training conditions lack is encoded as zeros.
    """

    units: ClassVar[Units] = "log1p"
    highest: Float[Tensor, "codes"]
    """Highest dose of each perturbation in training; 0 where it has none."""
    vectors: Float[Tensor, "codes width"]
    known: Bool[Tensor, "codes"]
    levels: Bool[Tensor, "levels"]
    """Which covariate levels, one covariate after the other, training conditions have."""

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        codes, genes = len(spec.perturbations) + 1, len(spec.genes)
        vectors = _entries(spec)
        levels = sum(len(covariate.levels) for covariate in spec.covariates)
        self.register_buffer("vectors", torch.from_numpy(np.pad(vectors, ((1, 0), (0, 0)))).float())
        self.register_buffer("highest", torch.zeros(codes))
        self.register_buffer("known", torch.zeros(codes, dtype=torch.bool))
        self.register_buffer("levels", torch.zeros(levels, dtype=torch.bool))
        hidden = [config.width] * config.layers
        self.encode_cell = Perceptron([genes, *hidden, config.latent], config.dropout)
        self.encode_perturbation = Perceptron([vectors.shape[1], *hidden, config.latent], config.dropout)
        self.decode = Perceptron([config.latent + levels, *hidden, genes], config.dropout)

    def fit_statistics(self, train: Screen) -> None:
        """Note which perturbations, doses and covariate levels there are to learn from."""
        seen = self.spec.encode(train.conditions).to(self.known.device)
        self.levels = self._one_hot(seen).any(0)
        self.highest = self.highest.scatter_reduce(
            0, seen.perturbation.flatten(), seen.dose.flatten(), reduce="amax"
        )
        self.known.zero_()
        if self.spec.vectors is not None:
            self.known[1:] = torch.from_numpy(present(self.spec.vectors))
        self.known[seen.perturbation] = True
        self.known[0] = True

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether each perturbation was trained on, or has a vector."""
        return self.known[condition.perturbation].all(1)

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Squared error against the paired target cell; cells of a batch are paired at random."""
        predicted = self._respond(batch.control, batch.condition, rng if self.training else None)
        return {"total": (predicted - batch.target).square().mean()}

    def sample(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Answer each control cell; nothing is drawn."""
        return self._respond(control, condition, None)

    def _respond(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, rng: torch.Generator | None
    ) -> Float[Tensor, "sets cells genes"]:
        """Predicted cells, with dropout where a generator for it is given."""
        effect = self.encode_perturbation(self._perturbation(condition), rng).unsqueeze(1)
        covariates = (self._one_hot(condition) & self.levels).to(control.dtype)
        covariates = covariates.unsqueeze(1).expand(-1, control.shape[1], -1)
        state = torch.cat([self.encode_cell(control, rng) + effect, covariates], dim=-1)
        return softplus(self.decode(state, rng))

    def _perturbation(self, condition: Condition) -> Float[Tensor, "sets width"]:
        highest = self.highest[condition.perturbation]
        relative = condition.dose.log1p() / highest.log1p()
        amount = torch.where((condition.dose > 0) & (highest > 0), relative, 1.0)
        return (amount.unsqueeze(-1) * self.vectors[condition.perturbation]).sum(1)

    def _one_hot(self, condition: Condition) -> Bool[Tensor, "sets levels"]:
        """Covariate levels as zeros and ones, one covariate after the other."""
        parts = [
            one_hot(column, len(covariate.levels)).bool()
            for column, covariate in zip(condition.covariates.T, self.spec.covariates, strict=True)
        ]
        nothing = torch.zeros(len(condition), 0, dtype=torch.bool, device=condition.covariates.device)
        return torch.cat([nothing, *parts], dim=1)


def _entries(spec: Spec) -> Float[np.ndarray, "perturbations width"]:
    """Vectors of perturbations; one that has none has an entry of its own instead."""
    own = np.eye(len(spec.perturbations))
    if spec.vectors is None:
        return own
    known = present(spec.vectors)
    return np.concatenate([np.where(known[:, None], spec.vectors, 0), own[:, ~known]], axis=1)


class Perceptron(nn.Module):
    """Linear layers with rectifiers between them, and dropout that draws from a given generator."""

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(widths))
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "*batch i"], rng: torch.Generator | None) -> Float[Tensor, "*batch o"]:
        """Apply the layers; without a generator nothing is dropped."""
        for index, layer in enumerate(self.layers):
            if index:
                x = drop(x.relu(), self.dropout, rng)
            x = layer(x)
        return x


def drop(
    x: Float[Tensor, "*shape"], probability: float, rng: torch.Generator | None
) -> Float[Tensor, "*shape"]:
    """Set entries to 0 at random and scale up the others, so that the expectation stays."""
    if rng is None or not probability:
        return x
    kept = torch.rand(x.shape, generator=rng, device=x.device) >= probability
    return x * kept / (1 - probability)


def default() -> Recipe:
    """PerturBench's sizes."""
    return Recipe(model=Config(), train=Training(steps=2000, sets=8, cells=32, lr=1e-3))


def small() -> Recipe:
    """Small enough for tests."""
    return Recipe(model=Config(width=32, latent=16), train=Training(steps=200, sets=4, cells=16, lr=3e-3))
