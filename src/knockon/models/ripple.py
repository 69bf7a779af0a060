"""ripple: cells of the nearest measured populations, moved as counts to where a response surface says.

It makes nothing from noise. What a population looks like is known from those that were measured; what must be
predicted is where its genes go. See docs/models/ripple.md.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knockon.baseline import MeanModel
from knockon.data.graph import one_count
from knockon.dynamics.recount import move
from knockon.model import Losses, Model, ModelConfig, Recipe
from knockon.models import additive, response_surface, shrunken_additive
from knockon.nn.counts import single_counts
from knockon.nn.donors import Donors
from knockon.types import CellSets, Condition, Noise, Spec, UserError

if TYPE_CHECKING:
    from knockon.data.screen import Screen

DISPERSION = (0.05, 10.0)
"""Bounds of a gene's dispersion."""
CLOSE = 1e-9
"""Squared distance at which a population is the wanted one."""


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Where cells start, and where they go."""

    at_generation: ClassVar[tuple[str, ...]] = ("populations", "together", "still")

    anchor: Literal["response_surface", "additive", "shrunken_additive"] = "response_surface"
    """Which estimate of the mean cells are moved to."""
    missing: Literal["refuse", "mean"] = "refuse"
    """A perturbation that was never measured alone and has no vector: refuse it, or take the mean effect."""
    populations: int = 4
    """Measured populations of the context that cells come from: those whose means are nearest to the wanted
    one, the nearer the more cells. 0 starts from control cells."""
    kept: int = 128
    """Cells of each measured population that the model keeps, at most."""
    together: int = 32
    """Cells of a population that are moved together at least; together they have the wanted mean. Few of them
    take the noise out of the mean of a set, and let its cells repel each other; with a thousand, cells are
    nearly independent."""
    still: float = 0.3
    """Change of a gene's rate, in natural logarithm, up to which values are scaled; beyond, counts are drawn
    anew."""

    def build(self, spec: Spec) -> "Ripple":
        """Make the model.

        Raises
        ------
        UserError
            If it would keep no cells, or an option has no meaning.
        """
        for name, bound in {"kept": 1, "populations": 0, "together": 1, "still": 0}.items():
            value = getattr(self, name)
            if not value >= bound:
                raise UserError(f"{name} of ripple", offenders=[value], expected=f"at least {bound}")
        return Ripple(self, spec)


def default() -> Recipe:
    """Fitted in seconds, for screens of any size; nothing is trained by gradients."""
    return Recipe(model=Config())


class Ripple(Model):
    """Moves real cells; those of a set have the predicted mean together, so they depend on each other."""

    units = "log1p"

    mean: Float[Tensor, "populations genes"]
    """Mean of each measured population, log1p."""
    context: Int[Tensor, "populations covs"]
    dispersion: Float[Tensor, "genes"]
    """The variance of a count within a population is ``mean + dispersion * mean**2``."""
    one_count: Float[Tensor, ""]
    """Value of a single count in a typical training cell, log1p."""

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.config = config
        genes = len(spec.genes)
        self.anchor = _anchor(config, spec)
        self.donors = Donors(genes)
        # what follows is no part of the weights: only training needs it
        self._held: tuple[Donors, ...] = ()
        self._expected: Tensor | None = None
        self.register_buffer("mean", torch.zeros(0, genes))
        self.register_buffer("context", torch.zeros(0, len(spec.covariates), dtype=torch.long))
        self.register_buffer("dispersion", torch.ones(genes))
        self.register_buffer("one_count", torch.ones(()))

    def fit_statistics(self, train: "Screen") -> None:
        """Fit the anchor, and keep cells of every population, control cells among them."""
        self.anchor.fit_statistics(train)
        self._held, self._expected = (), None
        labels = (*train.conditions, *train.controls)
        means, device = train.means(), self.mean.device
        self.mean = torch.from_numpy(np.stack([means[x] for x in labels]).astype(np.float32)).to(device)
        self.context = self.spec.encode(labels).covariates.to(device)
        draw = np.random.default_rng(0)
        rows = [train.rows[label] for label in labels]
        most = self.config.kept
        some = [np.sort(draw.choice(r, most, replace=False)) if len(r) > most else r for r in rows]
        self.donors.fit(train.gather(chosen) for chosen in some)
        self.one_count.fill_(one_count(train.matrix, train.every))
        self.dispersion = self._disperse()

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """As the anchor does; control cells need nothing."""
        return self.anchor.knows(condition) | (condition.perturbation == 0).all(1)

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Squared error of the mean, for reports: there is no parameter to learn."""
        return self.anchor.loss(batch, rng)

    def sample(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw cells of the nearest populations and move them to the anchor; control cells set their number.

        Where nothing was done, the control cells come back.
        """
        return self._start(control, condition, noise, self.anchor.mean(condition), None)

    @torch.no_grad()
    def prepare(self) -> None:
        """Draw cells of every training condition as if it had not been measured, for ``held_out``."""
        assert isinstance(self.anchor, response_surface.ResponseSurface)
        labels, held = self.anchor.effects.measured, Donors(len(self.spec.genes))
        held.fit(self._as_if_unseen(labels[i : i + 1], i) for i in range(len(labels)))
        self._held = (held,)

    def held_out(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw cells of training conditions as if they had not been measured, for a model to learn from.

        Control cells come back where nothing was done. Needs ``prepare``.
        """
        assert isinstance(self.anchor, response_surface.ResponseSurface)
        held = self._held[0].to(control.device)
        rows = self.anchor.rows_of(condition).int().argmax(1).tolist()
        treated = (condition.perturbation > 0).any(1).tolist()
        drawn = [
            held.draw(row, control.shape[1], rng).to(control) if treated[i] else control[i]
            for i, (row, rng) in enumerate(zip(rows, noise.each(len(rows)), strict=True))
        ]
        return torch.stack(drawn)

    def measures(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether the anchor guesses nothing; others than the response surface are taken to guess."""
        if isinstance(self.anchor, response_surface.ResponseSurface):
            return self.anchor.measures(condition)
        return torch.zeros_like(condition.perturbation[:, 0], dtype=torch.bool)

    def expect(self, condition: Condition, *, held_out: bool = False) -> Float[Tensor, "sets genes"]:
        """Predict means, log1p; with ``held_out``, as if training conditions had not been measured."""
        mean = self.anchor.mean(condition)
        if not held_out:
            return mean
        assert isinstance(self.anchor, response_surface.ResponseSurface)
        if self._expected is None:
            asked = self.anchor.effects.measured
            parts = torch.arange(len(asked), device=mean.device).split(response_surface.BLOCK)
            with torch.no_grad():
                self._expected = torch.cat([self.anchor.held_out(asked[some]) for some in parts])
        rows = self.anchor.rows_of(condition)
        return torch.where(rows.any(1, keepdim=True), self._expected.to(mean)[rows.int().argmax(1)], mean)

    def pull(
        self,
        cells: Float[Tensor, "sets cells genes"],
        condition: Condition,
        weight: float,
        noise: Noise,
        *,
        deep: bool = True,
    ) -> Float[Tensor, "sets cells genes"]:
        """Move cells that another model made from their own mean towards the anchor's, as counts.

        Parameters
        ----------
        weight
            Between 0, which leaves them as they are, and 1.
        deep
            Whether cells have a depth of their own, so that the smallest value of each is a single count;
            else a single count is what it is in a typical cell.
        """
        if not weight:
            return cells
        mean = self.anchor.mean(condition)
        treated = (condition.perturbation > 0).any(1).tolist()
        moved = [
            self._move(cells[i], torch.lerp(cells[i].mean(0), mean[i], weight), rng, deep=deep)
            if treated[i]
            else cells[i]
            for i, rng in enumerate(noise.each(len(condition)))
        ]
        return torch.stack(moved)

    def _as_if_unseen(self, condition: Condition, seed: int) -> Float[np.ndarray, "cells genes"]:
        """Draw as many cells as are kept of a training condition, without them and what they tell."""
        itself = torch.zeros(1, len(self.donors), dtype=torch.bool, device=self.mean.device)
        itself[0, seed] = True
        noise = Noise(torch.Generator(self.mean.device).manual_seed(seed))
        control = self.mean.new_zeros(1, self.config.kept, len(self.spec.genes))
        mean = self.expect(condition, held_out=True)
        return self._start(control, condition, noise, mean, itself)[0].cpu().numpy()

    def _start(
        self,
        control: Float[Tensor, "sets cells genes"],
        condition: Condition,
        noise: Noise,
        mean: Float[Tensor, "sets genes"],
        without: Bool[Tensor, "sets populations"] | None,
    ) -> Float[Tensor, "sets cells genes"]:
        weights, mean = self._nearest(mean, condition, without), mean.to(control.dtype)
        treated = (condition.perturbation > 0).any(1).tolist()
        made = [
            self._draw(control[i], mean[i], weights[i], rng) if treated[i] else control[i]
            for i, rng in enumerate(noise.each(len(condition)))
        ]
        return torch.stack(made)

    def _nearest(
        self,
        mean: Float[Tensor, "sets genes"],
        condition: Condition,
        without: Bool[Tensor, "sets populations"] | None,
    ) -> Float[Tensor, "sets populations"]:
        """Share of the cells that come from each population, of the context where it has any."""
        squared = torch.cdist(mean, self.mean).square().clamp_min(CLOSE)
        here = (self.context == condition.covariates[:, None]).all(-1)
        if without is not None:
            squared = squared.masked_fill(without, torch.inf)
        squared = torch.where(here | ~here.any(1, keepdim=True), squared, torch.inf)
        number = min(self.config.populations, squared.shape[1])
        nearest, places = squared.topk(number, largest=False)
        weights = torch.zeros_like(squared).scatter_(1, places, 1 / nearest)
        return weights / weights.sum(1, keepdim=True).clamp_min(CLOSE)

    def _draw(
        self,
        control: Float[Tensor, "cells genes"],
        mean: Float[Tensor, "genes"],
        weights: Float[Tensor, "populations"],
        rng: torch.Generator,
    ) -> Float[Tensor, "cells genes"]:
        """Make one set."""
        cells = len(control)
        order = torch.randperm(cells, generator=rng, device=rng.device).to(control.device)
        if not weights.any():
            return self._move(control, mean, rng)[order]
        ends = (weights.cumsum(0) / weights.sum() * cells).round().long().tolist()
        made = []
        for population, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > begin:
                started = self.donors.draw(population, max(end - begin, self.config.together), rng).to(
                    control.dtype
                )
                made.append(self._move(started, mean, rng)[: end - begin])
        return torch.cat(made)[order]

    def _move(
        self,
        cells: Float[Tensor, "cells genes"],
        mean: Float[Tensor, "genes"],
        rng: torch.Generator,
        *,
        deep: bool = True,
    ) -> Float[Tensor, "cells genes"]:
        typical = self.one_count.to(cells.dtype).expand(len(cells), 1)
        unit = (single_counts(cells[None], self.one_count)[0] if deep else typical).expm1()
        return move(
            cells, mean, unit=unit, dispersion=self.dispersion, still=self.config.still, noise=Noise(rng)
        )

    def _disperse(self) -> Float[Tensor, "genes"]:
        """Estimate dispersions by the method of moments, from the kept cells of all populations together."""
        excess = squares = torch.zeros(len(self.spec.genes), dtype=torch.float64)
        for population in range(len(self.donors)):
            cells = self.donors.cells_of(population)
            if len(cells) < 2:
                continue
            unit = single_counts(cells[None], self.one_count)[0].expm1().double()
            size = cells.double().expm1()
            poisson = (size * unit).mean(0)
            excess = excess + len(cells) * (size.var(0) - poisson).cpu()
            squares = squares + len(cells) * size.mean(0).square().cpu()
        found = excess / squares.clamp_min(CLOSE)
        return found.clamp(*DISPERSION).float().to(self.dispersion.device)


def _anchor(config: Config, spec: Spec) -> MeanModel:
    if config.anchor == "additive":
        return additive.Config(missing=config.missing).build(spec)
    if config.anchor == "shrunken_additive":
        return shrunken_additive.Config(missing=config.missing).build(spec)
    return response_surface.Config(missing=config.missing).build(spec)
