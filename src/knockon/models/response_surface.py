"""Response surface: what genes do in general corrects what measured effects say of a new condition."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knockon.baseline import MeanModel, MeasuredEffects
from knockon.data.screen import Screen
from knockon.dynamics.shrinkage import denoise, slopes
from knockon.model import ModelConfig, Recipe
from knockon.models._embedding import Neighbors
from knockon.models._halves import share_by_halves
from knockon.nn.surface import Surface
from knockon.types import Condition, Spec, UserError

EXAMPLES = 400_000
"""Values (conditions x genes) that a surface is fitted to at most, of genes drawn at random."""
BLOCK = 64
"""Conditions whose features are held at a time while surfaces are fitted."""
ROUNDED = 1 - 1e-5
"""What is left of a mean square when the square of the mean is taken off, so that rounding leaves nothing."""
FEW = 0.05
"""Normalized counts that are added before a ratio of two expressions is taken."""


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """What is done to measured effects, and how a surface is shaped."""

    missing: Literal["refuse", "mean"] = "refuse"
    """A perturbation that was never measured alone and has no vector: refuse it, or let the mean over all
    measured effects stand in for those of its neighbors."""
    noise: float | None = None
    """Share of the variance of a mean, given its cells, that is taken out of measured effects as noise
    (``knockon.dynamics.shrinkage``): small effects of many genes look like noise. 0 takes out none; without
    it, the share is taken that lets half of the cells predict the other half best."""
    curved: bool = True
    """Correct by surfaces; without them, effects are carried over, averaged and added as they are."""
    neighbors: int = 6
    """Measured single perturbations that stand in for one that was not measured, at most."""
    temperature: float = 0.1
    """Cosine distance over which the weight of a neighbor falls to a third; large makes them equal."""
    components: int = 10
    """Principal components in the embedding that tells neighbors."""
    cosines: int = 600
    """Random features of a surface."""
    width: float = 0.5
    """Standard deviation of their frequencies."""

    def build(self, spec: Spec) -> "ResponseSurface":
        """Make the model.

        Raises
        ------
        UserError
            If an option has no meaning.
        """
        least = {"noise": 0, "neighbors": 0, "temperature": 1e-6, "components": 1, "cosines": 1, "width": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise UserError(
                    f"{name} of response_surface", offenders=[value], expected=f"at least {bound}"
                )
        return ResponseSurface(self, spec)


class ResponseSurface(MeanModel):
    """Simple estimates, corrected by surfaces that were fitted to what they miss in training.

    A condition that was measured in its context is answered with its effect. Any other begins with a
    simple estimate, and a smooth function of what is known of a gene (the same for all genes) adds what
    such estimates missed where training could tell:

    1. *carried*: measured in other contexts only; the mean over them, the more alike the control cells
       the more weight;
    2. *guessed*: a perturbation that was never measured alone; the mean over its nearest neighbors by
       their vectors and the mean over all effects, each times a factor;
    3. *combined*: several perturbations; the sum over them, each measured, carried or guessed.

    What is carried or combined is corrected by a surface, which learns from training conditions as if they
    had not been measured, and is zero where it does not better predict treatments that it was not fitted
    to. What is guessed is too far off for that: the factors are the slopes, between 0 and 1, of the effects
    of singles on what the others would have guessed. In a context of which training has no effect at all,
    only a surface corrects that predicts contexts that it was not fitted to. Effects are denoised.
    """

    treatment: Int[Tensor, "rows"]
    """Number of the treatment of each measured effect, the same in all contexts."""
    rows_in: Int[Tensor, "rows"]
    """Population of the control cells that each measured effect refers to."""
    apart: Float[Tensor, "populations populations"]
    """Expected squared difference between the effects of one treatment in two contexts."""
    doubt: Float[Tensor, "rows"]
    """Squared error of the measured effects."""
    spread: Float[Tensor, "genes"]
    """Standard deviation of a gene within conditions, log1p."""
    belief: Float[Tensor, "basis guesses"]
    """Factors of what neighbors guess and of the mean effect, without and with neighbors."""
    response: Float[Tensor, "mean_and_std genes"]
    """Over the measured effects."""

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.config = config
        self.effects = MeasuredEffects(spec)
        self.neighbors = Neighbors(spec, config.neighbors, config.temperature, config.components)
        shape = {"cosines": config.cosines, "width": config.width}
        self.carry = Surface(9, **shape)
        self.venture = Surface(9, **shape)
        self.combine = Surface(12, **shape)
        self.register_buffer("treatment", torch.zeros(0, dtype=torch.long))
        self.register_buffer("rows_in", torch.zeros(0, dtype=torch.long))
        self.register_buffer("apart", torch.zeros(0, 0))
        self.register_buffer("doubt", torch.zeros(0))
        self.register_buffer("spread", torch.zeros(len(spec.genes)))
        self.register_buffer("belief", torch.eye(2).flip(0))
        self.register_buffer("response", torch.zeros(2, len(spec.genes)))

    def fit_effects(self, train: Screen) -> None:
        """Measure and denoise the effects, and fit the surfaces."""
        self.effects.fit(train, self.spec)
        self.neighbors.fit(train)
        raw, asked = self.effects.effect, self.effects.measured
        self.rows_in = self._population(asked)
        # in the order of their size, so that folds have equally many combinations
        sizes = (asked.perturbation > 0).sum(1)
        treatments = sizes * len(sizes) + asked.same_treatment(asked).int().argmax(1)
        self.treatment = treatments.unique(return_inverse=True)[1]
        # the noise of control cells, which all effects share, cancels in the mean of a single
        rows = 1 / np.array([len(train.rows[label]) for label in train.conditions])
        found = train.moments.values()
        genes = np.average([np.square(x.std) for x in found], axis=0, weights=[x.cells for x in found])
        noise = share_by_halves(train, genes) if self.config.noise is None else self.config.noise
        if noise:
            clean = denoise(raw.double().numpy(), noise * rows, genes)
            self.effects.effect = torch.from_numpy(clean.astype(np.float32))
        found = self.effects.effect
        self.spread = torch.from_numpy(np.sqrt(genes).astype(np.float32))
        self.response = torch.stack([found.mean(0), found.std(0, correction=0)])
        self.doubt = torch.from_numpy(rows * genes.sum()).float()
        self.apart = self._compare_contexts(asked, raw)
        self.belief = self._believe(asked, raw)
        if self.config.curved:
            self._fit_surfaces(asked, raw)

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Estimate the effect by what is best known."""
        return self._respond(condition, None)

    def held_out(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Predict the mean of each condition of training, log1p, as if it had not been measured.

        By all other conditions, and by surfaces that it was no example of; a model that starts there learns
        what it will have to add. Where training has combinations, these are what is asked for, and singles
        are predicted as they were measured; so is what the others could only guess.
        """
        combined = (self.effects.perturbation > 0).sum(-1) > 1
        alone = (condition.perturbation > 0).sum(-1, keepdim=True) < 2
        without = self.rows_of(condition) & ~(alone & combined.any())
        without &= self.measures(condition, without)[:, None]
        base = self.dispersion.mean[self._population(condition)]
        return (base + self._respond(condition, without)).clamp_min(0)

    def measures(self, condition: Condition, without: "Without" = None) -> Bool[Tensor, "sets"]:
        """Whether the condition, or each of its parts, was measured in some context: nothing is guessed."""
        exact = self.effects.exact(condition, without).any(-1)
        single = self.effects.single(condition, without).any(-1)
        return exact | (single | (condition.perturbation == 0)).all(-1)

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether the condition, or each of its parts, was measured or has measured neighbors."""
        exact = self.effects.exact(condition).any(-1)
        single = self.effects.single(condition).any(-1)
        guessed = self.neighbors.weigh(self.effects, condition).any(-1) | (self.config.missing == "mean")
        return exact | (single | guessed | (condition.perturbation == 0)).all(-1)

    def _respond(self, condition: Condition, without: "Without") -> Float[Tensor, "sets genes"]:
        fold = None if without is None else self.treatment[without.int().argmax(1)]
        weights = self.effects.exact(condition, without)
        measured = (weights > 0).any(-1)
        whole = self._estimate(condition, weights, fold)
        if measured.all():
            return whole
        parts = self._parts(condition, without, fold)
        several = ((condition.perturbation > 0).sum(-1) > 1) & self._familiar(condition) & ~measured
        some, combined = several.nonzero().flatten(), parts.sum(1)
        if self.config.curved and len(some):
            about = self._about_parts(condition[some], parts[some])
            correction = self.combine(about, None if fold is None else fold[some])
            combined = combined.index_add(0, some, self._live(correction))
        return torch.where(measured[:, None], whole, combined)

    def _parts(
        self, condition: Condition, without: "Without", fold: Int[Tensor, "sets"] | None
    ) -> Float[Tensor, "sets slots genes"]:
        """Estimate the effect of each perturbation alone."""
        alone = self.effects.single(condition, without)
        missing = (alone == 0).all(-1) & (condition.perturbation > 0)
        found = torch.stack([self._estimate(condition, weights, fold) for weights in alone.unbind(1)], dim=1)
        if not missing.any():
            return found
        guesses, near = self._guesses(condition, without)
        guessed = (self.belief[near.long()].unsqueeze(-1) * guesses).sum(2)
        return torch.where(missing.unsqueeze(-1), guessed, found)

    def _guesses(
        self, condition: Condition, without: "Without"
    ) -> tuple[Float[Tensor, "sets slots guesses genes"], Bool[Tensor, "sets slots"]]:
        """Guess each effect by neighbors and by all effects, and say whether there are neighbors."""
        near = self.neighbors.weigh(self.effects, condition, without)
        average = self.effects.average(condition, without).unsqueeze(1).expand_as(near)
        weights = self._by_likeness(torch.stack([near, average], 2), self._population(condition))
        return self.effects(weights), near.any(-1)

    def _estimate(
        self,
        condition: Condition,
        weights: Float[Tensor, "sets rows"],
        fold: Int[Tensor, "sets"] | None,
    ) -> Float[Tensor, "sets genes"]:
        """Weigh measured effects, and correct them where they are of other contexts."""
        here = self._population(condition)
        corrected = ((weights > 0) & (self.rows_in != here[:, None])).any(-1)
        # what was measured here needs no weights but those between its doses
        weights = torch.where(corrected[:, None], self._by_likeness(weights, here), weights)
        plain = self.effects(weights)
        some = corrected.nonzero().flatten()
        if not (self.config.curved and len(some)):
            return plain
        about = self._about(here[some], weights[some])
        familiar = self.carry(about, None if fold is None else fold[some])
        correction = torch.where(self._familiar(condition[some])[:, None], familiar, self.venture(about))
        return plain.index_add(0, some, self._live(correction))

    def _familiar(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether training has effects in the context of each condition."""
        return (self._population(condition)[:, None] == self.rows_in).any(-1)

    def _by_likeness(
        self, weights: Float[Tensor, "sets *some rows"], here: Int[Tensor, "sets"]
    ) -> Float[Tensor, "sets *some rows"]:
        error = (self.doubt + self.apart[here][:, self.rows_in]).clamp_min(1e-9)
        scaled = weights / error.reshape(len(error), *(1,) * (weights.ndim - 2), -1)
        return scaled / scaled.sum(-1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny)

    def _about(
        self, here: Int[Tensor, "sets"], weights: Float[Tensor, "sets rows"]
    ) -> Float[Tensor, "sets genes features"]:
        """Say what is known of each gene where effects of other conditions are carried over."""
        estimate, square = weights @ self.effects.effect, weights @ self.effects.effect.square()
        control = self.dispersion.mean[here]
        there = weights @ self.dispersion.mean[self.rows_in]
        ratio = ((there + estimate).clamp_min(0).expm1() + FEW) / (there.expm1() + FEW)
        scaled = (control.expm1() * ratio).log1p() - control
        every = torch.ones_like(estimate)
        return torch.stack(
            [
                estimate,
                scaled,
                control,
                there - control,
                (ROUNDED * square - estimate.square()).clamp_min(0).sqrt(),
                self.response[0] * every,
                self.response[1] * every,
                self.spread * every,
                estimate.norm(dim=-1, keepdim=True) * every,
            ],
            dim=-1,
        )

    def _about_parts(
        self, condition: Condition, parts: Float[Tensor, "sets slots genes"]
    ) -> Float[Tensor, "sets genes features"]:
        """Say what is known of each gene where several effects come together."""
        present = (condition.perturbation > 0).unsqueeze(-1)
        total = parts.sum(1)
        size = parts.norm(dim=-1, keepdim=True)
        pairs = (total.square() - parts.square().sum(1)) / 2
        lengths = torch.where(present, size, torch.inf).amin(1), size.amax(1)
        agreement = pairs.sum(-1, keepdim=True) / (lengths[0] * lengths[1]).clamp_min(1e-6)
        every = torch.ones_like(total)
        return torch.stack(
            [
                total,
                pairs,
                torch.where(present, parts, torch.inf).amin(1),
                torch.where(present, parts, -torch.inf).amax(1),
                self.dispersion.mean[self._population(condition)],
                self.response[0] * every,
                self.response[1] * every,
                self.spread * every,
                total.norm(dim=-1, keepdim=True) * every,
                lengths[0] * every,
                lengths[1] * every,
                agreement * every,
            ],
            dim=-1,
        )

    def _believe(self, asked: Condition, raw: Float[Tensor, "rows genes"]) -> Float[Tensor, "basis guesses"]:
        """Fit the factors of what is guessed to singles, each guessed without its perturbation."""
        alone = ((asked.perturbation > 0).sum(1) == 1).nonzero().flatten()
        gram, moment = torch.zeros(2, 2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        for some in alone.split(BLOCK):
            touching = (asked.perturbation[some, :1, None] == asked.perturbation).any(-1)
            guesses, near = (x[:, 0] for x in self._guesses(asked[some], touching))
            counted = torch.stack([torch.ones_like(near), near])[:, :, None, None] * guesses
            counted[0, :, 0] = 0
            weight = 1 / raw[some].norm(dim=1).clamp_min(1e-9)  # few strong ones do not speak for all
            gram += torch.einsum("s,bsig,bsjg->bij", weight, counted, counted)
            moment += torch.einsum("s,bsig,sg->bi", weight, counted, raw[some])
        if not gram[0].any():
            return self.belief
        if not gram[1].any():
            gram[1], moment[1] = gram[0], moment[0]
        found = [slopes(*of) for of in zip(gram.numpy(), moment.numpy(), strict=True)]
        return torch.from_numpy(np.stack(found)).float()

    def _fit_surfaces(self, asked: Condition, raw: Float[Tensor, "rows genes"]) -> None:
        """Fit each surface to what its simple estimate misses of training conditions held out."""
        itself = self.rows_of(asked)
        slots = (asked.perturbation > 0).sum(1)

        def carried(some: Int[Tensor, "sets"]) -> Float[Tensor, "sets rows"]:
            return self.effects.exact(asked[some], itself[some])

        def added(some: Int[Tensor, "sets"]) -> Estimate:
            parts = self._parts(asked[some], itself[some], None)
            return parts.sum(1), self._about_parts(asked[some], parts)

        for surface, weigh, group in (
            (self.carry, carried, self.treatment),
            (self.venture, carried, self.rows_in),
        ):
            rows = (slots > 0).nonzero().flatten()
            found = torch.cat([(weigh(x) > 0).any(-1) for x in rows.split(BLOCK)])
            self._fit(surface, raw, rows[found], group, self._weighed(weigh))
        rows = (slots > 1).nonzero().flatten()
        measured = torch.cat([self.effects.single(asked[x], itself[x]).any(-1) for x in rows.split(BLOCK)])
        whole = (measured | (asked.perturbation[rows] == 0)).all(-1)
        self._fit(self.combine, raw, rows[whole], self.treatment, added)

    def _weighed(
        self, weigh: Callable[[Int[Tensor, "sets"]], Float[Tensor, "sets rows"]]
    ) -> Callable[[Int[Tensor, "sets"]], "Estimate"]:
        def estimate(some: Int[Tensor, "sets"]) -> Estimate:
            weights = self._by_likeness(weigh(some), self.rows_in[some])
            return self.effects(weights), self._about(self.rows_in[some], weights)

        return estimate

    def _fit(
        self,
        surface: Surface,
        raw: Float[Tensor, "rows genes"],
        rows: Int[Tensor, "some"],
        group: Int[Tensor, "rows"],
        estimate: Callable[[Int[Tensor, "sets"]], "Estimate"],
    ) -> None:
        """Fit a surface to what estimates of some measured effects miss."""
        live = (self.spread > 0).nonzero().flatten()
        if not (len(rows) and len(live)):
            return
        each = min(len(live), -(-EXAMPLES // len(rows)))
        rng = torch.Generator().manual_seed(0)
        features, target, noise = [], [], []
        for some in rows.split(BLOCK):
            genes = live.expand(len(some), -1)
            if each < len(live):
                genes = live[torch.rand(genes.shape, generator=rng).argsort(1)[:, :each].to(live.device)]
            plain, about = estimate(some)
            features.append(about.take_along_dim(genes[..., None], 1).flatten(0, 1))
            target.append((raw[some] - plain).take_along_dim(genes, 1).flatten())
            noise.append((self.doubt[some, None] * self.spread[genes].square()).flatten())
        doubt = torch.cat(noise) / self.spread.square().sum()
        precision = 1 / (doubt + doubt.median())
        surface.fit(torch.cat(features), torch.cat(target), precision, group[rows].repeat_interleave(each))

    def _live(self, correction: Float[Tensor, "sets genes"]) -> Float[Tensor, "sets genes"]:
        """Leave genes alone that no cell has."""
        return torch.where(self.spread > 0, correction, 0)

    def rows_of(self, condition: Condition) -> Bool[Tensor, "sets rows"]:
        """Find the row of each condition itself."""
        here = self._population(condition)[:, None] == self.rows_in
        return condition.same_treatment(self.effects.measured) & here

    def _compare_contexts(
        self, asked: Condition, raw: Float[Tensor, "rows genes"]
    ) -> Float[Tensor, "populations populations"]:
        """Learn by how much effects differ between contexts whose control cells differ by so much."""
        mean = self.dispersion.mean
        squared = torch.cdist(mean, mean).square()
        there = self.rows_in[:, None] != self.rows_in
        both = (asked.same_treatment(asked) & there).nonzero().unbind(1)
        pairs = zip(both[0].split(BLOCK), both[1].split(BLOCK), strict=True)
        differ = torch.cat(
            [(raw[x] - raw[y]).square().sum(1) - self.doubt[x] - self.doubt[y] for x, y in pairs]
        )
        beside = squared[self.rows_in[both[0]], self.rows_in[both[1]]]
        slope = (differ @ beside) / beside.square().sum().clamp_min(1e-12)
        return slope.clamp_min(0) * squared


Without = Bool[Tensor, "sets rows"] | None
"""Rows of measured effects that do not count for each set."""

Estimate = tuple[Float[Tensor, "sets genes"], Float[Tensor, "sets genes features"]]
"""What is expected of some training conditions, and what is known of each gene there."""


def default() -> Recipe:
    """Fitted in seconds; nothing is trained by gradients."""
    return Recipe(model=Config())
