"""Models whose cells are moved towards the mean of ripple in the end."""

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from knockon.dynamics.discrepancy import energy_distance
from knockon.model import Model
from knockon.models.ripple import Config
from knockon.types import CellSets, Condition, Noise, Spec

log = logging.getLogger("knockon")

WEIGHTS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Weights of the mean of ripple that are tried."""
SHARES = (0.0, 0.5, 1.0)
"""Shares of what the network learned that are tried."""


class PulledModel(Model):
    """Makes cells, and moves them towards where ripple expects their mean, as counts.

    The weight of that mean, against the one of the cells that were made, is chosen on validation conditions
    whose parts were measured; without any it is 1. Cells of a set are moved together, so that they depend on
    each other and a few of them vary too little.

    A model that adds what it learns to what it knew may let the ``share`` of it be chosen likewise.

    Parameters
    ----------
    anchored
        Whether the model needs ripple for more than that.
    pulled
        Whether cells are moved at all.
    shrunk
        Whether the share is chosen after training, and a half where there is nothing to choose by; else it
        is 1.
    """

    deep: ClassVar[bool] = True
    """Whether the cells that are made have a depth of their own; see ``ripple.pull``."""

    weight: Float[Tensor, ""]
    share: Float[Tensor, ""]

    def __init__(self, spec: Spec, *, anchored: bool, pulled: bool, shrunk: bool = False) -> None:
        super().__init__(spec)
        self.pulled = pulled
        self.shrunk = shrunk
        self.register_buffer("share", torch.ones(()))
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
        if not self._moves():
            return made
        moved = self._moved(self.to_log1p(made), condition, float(self.weight), noise)
        return self.from_log1p(moved, made, noise)

    @final
    def choose(self, validation: Sequence[CellSets], seed: int) -> None:
        """Choose weight and share that bring cells nearest to measured ones, by energy distance.

        Conditions of which ripple must guess a part do not tell how far it can be trusted with the others.
        """
        weights = WEIGHTS if self._moves() else (float(self.weight),)
        shares = SHARES if self.shrunk else (float(self.share),)
        if self.ripple is not None:
            validation = [one for one in validation if bool(self.ripple.measures(one.condition))]
        if len(weights) * len(shares) == 1:
            return
        if not validation:
            self.share.fill_(0.5 if self.shrunk else 1.0)
            log.info("no validation condition can choose: %s", self._chosen())
            return
        errors = {}
        for share in shares:
            self.share.fill_(share)
            errors |= {(share, weight): error for weight, error in self._errors(validation, weights, seed)}
        share, weight = min(errors, key=lambda tried: errors[tried])
        self.share.fill_(share)
        self.weight.fill_(weight)
        log.info("chosen by validation conditions (%d): %s", len(validation), self._chosen())

    def _chosen(self) -> str:
        taken = {0.0: "nothing", 0.5: "half", 1.0: "all"}[float(self.share)]
        weight = f"weight {float(self.weight):g} for the mean of ripple"
        return ", ".join([f"{taken} of what was learned"] * self.shrunk + [weight] * self.pulled)

    def _errors(
        self, validation: Sequence[CellSets], weights: Sequence[float], seed: int
    ) -> Iterator[tuple[float, float]]:
        """Energy distance of the same cells, moved by each weight."""
        noise = Noise(torch.Generator(self.weight.device).manual_seed(seed))
        made = [self.to_log1p(self.make(one.control, one.condition, noise)) for one in validation]
        targets = [self.to_log1p(one.target) for one in validation]
        for weight in weights:
            noise = Noise(torch.Generator(self.weight.device).manual_seed(seed))
            moved = [
                self._moved(cells, one.condition, weight, noise)
                for cells, one in zip(made, validation, strict=True)
            ]
            distances = [energy_distance(x, y) for x, y in zip(moved, targets, strict=True)]
            yield weight, float(torch.cat(distances).mean())

    def _moves(self) -> bool:
        return self.ripple is not None and self.pulled and bool(self.weight)

    def _moved(
        self, cells: Float[Tensor, "sets cells genes"], condition: Condition, weight: float, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        if self.ripple is None or not self.pulled:
            return cells
        return self.ripple.pull(cells, condition, weight, noise, deep=self.deep)
