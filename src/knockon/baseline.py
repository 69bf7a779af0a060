"""What the baselines share: measured effects, and a predicted mean told as dispersed cells."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knockon.data.screen import Screen
from knockon.model import Losses, Model
from knockon.nn.conditions import ConditionTable
from knockon.nn.counts import Dispersion
from knockon.types import CellSets, Condition, Label, Noise, Spec, Units, UserError

BLOCK = 512
"""Cells that are held dense at a time."""


class MeanModel(Model, ABC):
    """A baseline: the mean of the control cells plus an effect, in log1p units.

    Its cells are real control cells, moved to that mean (see ``Dispersion``): a repeated mean vector
    would make every test of differential expression absurdly certain. There is nothing to train.
    """

    units: ClassVar[Units] = "log1p"
    contexts: Int[Tensor, "contexts covs"]
    """Covariates of each population of control cells."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.dispersion = Dispersion(len(spec.genes))
        self.register_buffer("contexts", torch.zeros(0, len(spec.covariates), dtype=torch.long))

    @abstractmethod
    def fit_effects(self, train: Screen) -> None:
        """Learn the effects from training cells."""

    @abstractmethod
    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Predicted change of the mean, in log1p units; its value where nothing was done is ignored."""

    @final
    def fit_statistics(self, train: Screen) -> None:
        """Learn the control cells of each context, then the effects."""
        self.fit_controls(train)
        self.fit_effects(train)

    @final
    def fit_controls(self, train: Screen) -> None:
        """Learn the control cells of each context: the same for all baselines."""
        controls = train.controls
        if not controls:
            raise UserError("The training part has no control cells", mend="name them with --control")
        self.contexts = self.spec.encode(controls).covariates.to(self.contexts.device)
        self.dispersion.fit(
            (_blocks(train, train.rows[control]) for control in controls),
            _blocks(train, train.every),
        )

    @final
    def mean(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Predicted mean of the cells under each condition, log1p, not below 0.

        In a context without control cells, the control cells of all contexts stand in.
        """
        base = self.dispersion.mean[self._population(condition)]
        treated = (condition.perturbation > 0).any(-1, keepdim=True)
        return torch.where(treated, base + self.effect(condition), base).clamp_min(0)

    @final
    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:  # noqa: ARG002 (nothing is drawn)
        """Squared error of the mean, for reports: there is no parameter to learn."""
        return {"total": (self.mean(batch.condition) - batch.target.mean(1)).square().mean()}

    @final
    def sample(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Move each control cell so that the control population would have the predicted mean."""
        return self.dispersion(control, self.mean(condition), self._population(condition), noise)

    def _population(self, condition: Condition) -> Int[Tensor, "sets"]:
        same = _same_context(condition.covariates, self.contexts)
        return torch.where(same.any(1), same.int().argmax(1), len(self.contexts))


class MeasuredEffects(ConditionTable):
    """A table of the effect of every training condition, one row for each.

    An effect is the mean of the condition's cells minus the mean of the control cells of the same
    context. What a baseline predicts is a weighted sum of rows, so the methods that find rows return
    *weights*: they are positive and sum to 1, or are all 0 where nothing is found. Wherever a
    condition was measured in the context that is asked for, only that context counts; elsewhere the
    mean over all contexts that have it does.
    """

    effect: Float[Tensor, "rows genes"]

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.register_buffer("effect", torch.zeros(0, len(spec.genes)))

    def fit(self, train: Screen, spec: Spec) -> None:
        """Fill the table from training cells."""
        effects = effects_of(train)
        self.remember(effects, spec)
        table = np.array(list(effects.values()), dtype=np.float32).reshape(-1, len(spec.genes))
        self.effect = torch.from_numpy(table).to(self.effect.device)

    def forward(self, weights: Float[Tensor, "*sets rows"]) -> Float[Tensor, "*sets genes"]:
        """Weighted sum of the measured effects."""
        return weights @ self.effect

    def average(
        self, condition: Condition, without: Bool[Tensor, "sets rows"] | None = None
    ) -> Float[Tensor, "sets rows"]:
        """Weigh all measured conditions of the context alike, but those ``without``."""
        every = torch.ones(len(condition), len(self.effect), dtype=torch.bool, device=self.effect.device)
        return _share(self._nearby(_but(every, without), condition.covariates))

    def exact(
        self, condition: Condition, without: Bool[Tensor, "sets rows"] | None = None
    ) -> Float[Tensor, "sets rows"]:
        """Find the very same perturbations at the very same doses, in rows but those ``without``."""
        same = condition.same_treatment(self.measured)
        return _share(self._nearby(_but(same, without), condition.covariates))

    def single(
        self, condition: Condition, without: Bool[Tensor, "sets rows"] | None = None
    ) -> Float[Tensor, "sets slots rows"]:
        """Find the perturbation of each slot on its own, interpolated in the logarithm of the dose.

        Outside the measured doses the nearest of them serves. Rows ``without`` do not count.
        """
        rows, dose = self.perturbation[:, 0], self.dose[:, 0]
        alone = (self.perturbation[:, 1:] == 0).all(1) & (rows > 0)
        same = alone & (condition.perturbation.unsqueeze(-1) == rows)
        same = _but(same, None if without is None else without.unsqueeze(1))
        return _between(self._nearby(same, condition.covariates), dose, condition.dose)

    def containing(self, condition: Condition) -> Float[Tensor, "sets slots rows"]:
        """Find all measured conditions that hold the perturbation of each slot, whatever else they hold."""
        asked = condition.perturbation[:, :, None, None]
        same = ((asked == self.perturbation) & (asked > 0)).any(-1)
        return _share(self._nearby(same, condition.covariates))

    def _nearby(
        self, found: Bool[Tensor, "sets *slots rows"], covariates: Int[Tensor, "sets covs"]
    ) -> Bool[Tensor, "sets *slots rows"]:
        """Restrict to the asked context, where it has any of the rows."""
        here = _same_context(covariates, self.covariates)
        here = found & here.reshape(len(here), *(1,) * (found.ndim - 2), here.shape[1])
        return torch.where(here.any(-1, keepdim=True), here, found)


def effects_of(train: Screen) -> dict[Label, Float[np.ndarray, "genes"]]:
    """Mean of each condition minus the mean of the control cells of its context, as float64."""
    if not train.conditions:
        raise UserError("The training part has no perturbed cells", mend="train on more conditions")
    means = train.means()
    sizes = [len(train.rows[label]) for label in train.controls]
    pooled = np.average([means[label] for label in train.controls], axis=0, weights=sizes)
    return {label: means[label] - means.get(label.control(), pooled) for label in train.conditions}


def first_found(*choices: Float[Tensor, "*sets rows"]) -> Float[Tensor, "*sets rows"]:
    """Take the first choice that has any weight, for each query."""
    chosen = choices[-1]
    for weights in reversed(choices[:-1]):
        chosen = torch.where((weights > 0).any(-1, keepdim=True), weights, chosen)
    return chosen


def _blocks(screen: Screen, rows: Int[np.ndarray, "cells"]) -> Iterator[Float[np.ndarray, "_ genes"]]:
    for start in range(0, len(rows), BLOCK):
        yield screen.gather(rows[start : start + BLOCK])


def _same_context(
    asked: Int[Tensor, "sets covs"], known: Int[Tensor, "rows covs"]
) -> Bool[Tensor, "sets rows"]:
    return (asked[:, None] == known[None]).all(-1)


def _but(
    found: Bool[Tensor, "sets *slots rows"], without: Bool[Tensor, "sets *one rows"] | None
) -> Bool[Tensor, "sets *slots rows"]:
    return found if without is None else found & ~without


def _share(found: Bool[Tensor, "*sets rows"]) -> Float[Tensor, "*sets rows"]:
    """Equal weights of what was found."""
    return found / found.sum(-1, keepdim=True).clamp_min(1)


def _between(
    found: Bool[Tensor, "sets slots rows"],
    measured: Float[Tensor, "rows"],
    asked: Float[Tensor, "sets slots"],
) -> Float[Tensor, "sets slots rows"]:
    """Weights of the doses just below and just above the one that is asked for."""
    tiny = torch.finfo(measured.dtype).tiny
    x, at = measured.clamp_min(tiny).log(), asked.clamp_min(tiny).log().unsqueeze(-1)
    below = torch.where(found & (x <= at), x, -torch.inf).amax(-1, keepdim=True)
    above = torch.where(found & (x >= at), x, torch.inf).amin(-1, keepdim=True)
    below, above = torch.where(below.isinf(), above, below), torch.where(above.isinf(), below, above)
    upward = torch.where(above > below, (at - below) / (above - below), 0.0)
    return _share(found & (x == below)) * (1 - upward) + _share(found & (x == above)) * upward
