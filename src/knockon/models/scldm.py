"""scLDM: a flow in the latent space of an autoencoder of counts, guided by several conditions [palla2025].

The second stage: ``scldm_vae`` is the first. Cells are latent tokens; a transformer learns the velocity from
noise to them under what was done and each covariate, any of which may be hidden. See docs/models/scldm.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.data import prepare
from knockon.data.arrays import totals
from knockon.dynamics import flow, solve
from knockon.model import Losses, Model, ModelConfig, Names, Recipe, Training, copy_named
from knockon.models import scldm_vae
from knockon.models._pulled import PulledModel
from knockon.models._released_scldm import from_released
from knockon.nn.conditions import ClassEncoder
from knockon.nn.counts import normalized, rounded
from knockon.nn.latent import LatentArchitecture, LatentTransformer
from knockon.nn.library import LibrarySizes
from knockon.nn.quantile_map import QuantileMap
from knockon.types import CellSets, Condition, Noise, Spec, UserError

__all__ = ["Config", "LatentFlow", "default", "from_released", "paper", "small"]

if TYPE_CHECKING:
    from knockon.data.screen import Screen


@dataclass(frozen=True, kw_only=True)
class Config(LatentArchitecture, ModelConfig):
    """The flow: its network (``LatentArchitecture``), its autoencoder, conditions and way of sampling."""

    at_generation: ClassVar[tuple[str, ...]] = (
        "guidance", "weights", "solver", "steps", "tolerance", "counts", "library",
    )  # fmt: skip

    vae: str = ""
    """Run folder of the autoencoder; without one it is trained first, into ``stage_one`` of the folder."""
    autoencoder: scldm_vae.Config = field(default_factory=scldm_vae.Config)
    """What the autoencoder is, where none is given."""
    stage_one: Training = field(default_factory=lambda: scldm_vae.default().train)
    """How the autoencoder is trained, where none is given; its seed is that of the second stage."""
    hide: Literal["each", "all", "all_but_one"] = "each"
    """What training hides from a cell: each class at random, so that any part of a condition can be asked for
    (not in the paper); all classes at once; or all but one, and that one at random."""
    hidden: float = 0.2
    """Probability of hiding."""
    left_per: Literal["cell", "batch"] = "cell"
    """With ``all_but_one``, the class that is left is drawn for each cell, or once for a batch."""
    guidance: Literal["joint", "additive"] = "joint"
    """Velocities are moved from the unconditioned one towards the one that knows all classes, or by the sum
    of what each class changes alone."""
    weights: tuple[float, ...] = ()
    """Weight of what was done and of each covariate; 1, the plain condition, without. With ``joint``, the
    mean of those that are given counts."""
    solver: Literal["euler", "midpoint", "heun", "rk4", "rk4_38", "dopri5"] = "heun"
    """How the flow is solved; ``dopri5`` chooses steps, which cells that are generated together share."""
    steps: int = 10
    """Steps of the others."""
    tolerance: float = 1e-5
    """Of ``dopri5``, absolute and relative."""
    counts: Literal["sampled", "means"] = "sampled"
    """Counts are drawn from the negative binomial, or are its means."""
    library: Literal["control", "condition"] = "control"
    """Library sizes are those of the control cells beside (not in the paper), or log-normal ones of the
    condition or what is nearest to it; cells without control cells have the latter."""
    quantile_mapped: bool = True
    """Drawn counts are given the distribution that each gene has over training cells, by ranks among cells
    that are generated of the same conditions (not in the paper)."""
    pulled: bool = True
    """Cells of a condition are moved towards the mean that ripple expects in the end, by a weight that is
    chosen on validation conditions (not in the paper); cells without control cells are not."""

    def build(self, spec: Spec) -> "LatentFlow":
        """Make the model.

        Raises
        ------
        UserError
            If options contradict each other.
        """
        classes = 1 + len(spec.covariates)
        for wrong, expected in (
            (self.width % (2 * self.heads), f"width ({self.width}) to be a multiple of heads, and even"),
            (not 0 <= self.hidden < 1, "hidden to be at least 0 and below 1"),
            (self.steps < 1 or self.tolerance <= 0, "at least one of steps, and a tolerance above 0"),
            (len(self.weights) not in (0, classes), f"no weights, or one for each of the {classes} classes"),
            (
                classes > 1 and self.guidance == "additive" and self.hide == "all",
                "a run trained with hide=each or all_but_one for additive guidance: no class was shown alone",
            ),
            (
                classes > 1 and self.guidance == "joint" and self.hide == "all_but_one",
                "guidance=additive after hide=all_but_one: classes were never shown together",
            ),
            (
                not self.hidden and any(weight != 1 for weight in self.weights),
                "weights of 1 where nothing was hidden in training (hidden=0)",
            ),
        ):
            if wrong:
                raise UserError("Options of scldm that do not fit together", expected=expected)
        return LatentFlow(self, spec)

    def earlier(self) -> Path | Recipe:
        """Name the autoencoder."""
        return Path(self.vae) if self.vae else Recipe(model=self.autoencoder, train=self.stage_one)

    def after(self, earlier: ModelConfig) -> "Config":
        """Note what the autoencoder is."""
        if not isinstance(earlier, scldm_vae.Config):
            raise UserError(f"{self.vae} is no autoencoder", expected="a run of scldm_vae")
        makers = (Config, *(lambda p=p: p().model for p in (default, paper, small)))
        if self.autoencoder not in (earlier, *(make().autoencoder for make in makers)):
            raise UserError(
                "Options of the autoencoder beside a finished one",
                expected=f"none: {self.vae} is taken as it is",
                mend="leave out --model.autoencoder options, or leave out --model.vae",
            )
        return replace(self, autoencoder=earlier, vae=str(Path(self.vae).resolve()))


def default() -> Recipe:
    """Return what is best for some hundred genes on two CPU cores, in minutes."""
    first = scldm_vae.default()
    assert isinstance(first.model, scldm_vae.Config)
    return Recipe(
        model=Config(width=128, layers=4, heads=4, autoencoder=first.model, stage_one=first.train),
        train=Training(
            steps=2000, sets=16, cells=16, lr=1e-3, final_lr=1e-4, warmup=100, clip=10.0, ema=0.999,
            optimizer="adamw",
        ),
    )  # fmt: skip


def paper() -> Recipe:
    """Return what was released for perturbations: 10 million parameters, conditions hidden together.

    The average of the weights is used for sampling; the released program keeps one and samples without it.
    """
    first = scldm_vae.paper()
    assert isinstance(first.model, scldm_vae.Config)
    return Recipe(
        model=Config(
            autoencoder=first.model, stage_one=first.train, hide="all", hidden=0.8, left_per="batch",
            solver="dopri5", library="condition", quantile_mapped=False, pulled=False,
        ),
        train=Training(
            steps=56_500, sets=128, cells=1, by_cells=True, lr=5e-4, final_lr=5e-5, warmup=5_650,
            warmup_from=0.01, clip=10.0, optimizer="adamw", ema=0.9999, ema_every=10, ema_start=10_000,
            ema_ramp="power",
        ),
    )  # fmt: skip


def small() -> Recipe:
    """Return a model for tests: some seconds on one core."""
    first = scldm_vae.small()
    assert isinstance(first.model, scldm_vae.Config)
    return Recipe(
        model=Config(width=16, layers=1, heads=2, autoencoder=first.model, stage_one=first.train, steps=5),
        train=Training(steps=100, sets=4, cells=16, lr=3e-3, warmup=10, clip=10.0, ema=0.95),
    )


class LatentFlow(PulledModel):
    """A flow of latent tokens; its autoencoder is frozen, and a part of it."""

    units = "counts"

    total: Float[Tensor, ""]
    """Sum that the counts of a cell are brought to where cells are moved, the median of training cells."""

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec, anchored=False, pulled=config.pulled)
        self.config = config
        self.autoencoder = config.autoencoder.build(spec).requires_grad_(requires_grad=False)
        shape = config.autoencoder.latents, config.autoencoder.latent_width
        self.network = LatentTransformer(config, *shape)
        self.conditions = ClassEncoder(spec, config.width)
        self.sizes = LibrarySizes(spec)
        self.quantile_map = QuantileMap(len(spec.genes)) if config.quantile_mapped else None
        self.register_buffer("total", torch.ones(()))

    def fit_statistics(self, train: "Screen") -> None:
        """Learn library sizes, and note which perturbations and contexts training will have seen."""
        if self.ripple is not None and not train.conditions:
            self.weight.zero_()  # there is nothing to expect a mean from
        elif self.ripple is not None:
            logarithms = prepare.fit(train, units="log1p")
            self.total.fill_(logarithms.total or 1.0)
            self.ripple.fit_statistics(prepare.apply(train, logarithms))
        self.conditions.fit(self.spec.encode(train.labels))
        every = train.every
        sums = totals(train.matrix, every)
        sizes = {label: sums[np.searchsorted(every, rows)] for label, rows in train.rows.items()}
        self.sizes.fit(sizes, self.spec)

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Perturbations that were trained, and those with a vector."""
        return self.conditions.knows(condition.perturbation).all(dim=-1)

    @property
    def learns_controls(self) -> bool:
        """Control cells are cells to which nothing was done."""
        return True

    @property
    def learns_embedded(self) -> bool:
        """The autoencoder does not change any more."""
        return True

    def take(self, earlier: Model) -> None:
        """Take the autoencoder of the first stage, gene by gene."""
        copy_named(self.autoencoder, earlier)

    def entries(self) -> dict[str, Names]:
        """Names of genes, perturbations and levels."""
        found = {f"autoencoder.{key}": names for key, names in self.autoencoder.entries().items()}
        return found | {
            f"conditions.{key}": names for key, names in self.conditions.entries(self.spec).items()
        }

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Squared error of the velocity at a random time."""
        data = batch.embedded
        if data is None:
            data = self.embed(batch.target.flatten(0, 1)).unflatten(0, batch.target.shape[:2])
        x1 = data.unflatten(-1, self.shape)
        x0 = torch.randn(x1.shape, generator=rng, device=x1.device, dtype=x1.dtype)
        t = torch.rand(x1.shape[:2], generator=rng, device=x1.device, dtype=x1.dtype)
        errors = self.errors(x0, x1, t, batch.condition, self._hide(x1.shape[:2], rng))
        counted = torch.ones_like(errors) if batch.real is None else batch.real.to(errors.dtype)
        return {"total": (errors * counted).sum() / counted.sum().clamp_min(1)}

    def errors(
        self,
        x0: Float[Tensor, "sets cells latents latent"],
        x1: Float[Tensor, "sets cells latents latent"],
        t: Float[Tensor, "sets cells"],
        condition: Condition,
        given: Bool[Tensor, "sets cells classes"],
    ) -> Float[Tensor, "sets cells"]:
        """Squared error of the velocity on the way from noise to latents, a mean over their entries."""
        state = flow.interpolate(x0.flatten(2), x1.flatten(2), t).view(x1.shape)
        told = self.conditions(condition, given) + self.tell(t)
        wanted = flow.velocity(x0, x1)
        return (self.network(state, told) - wanted).square().mean(dim=(-2, -1))

    @property
    def shape(self) -> tuple[int, int]:
        """Latent tokens of a cell, and numbers of each."""
        return self.config.autoencoder.latents, self.config.autoencoder.latent_width

    def tell(self, t: Float[Tensor, "sets cells"]) -> Float[Tensor, "sets cells dim"]:
        """Encode times."""
        return self.network.time(t.flatten()).unflatten(0, t.shape)

    @torch.no_grad()
    def embed(self, cells: Float[Tensor, "cells genes"]) -> Float[Tensor, "cells dim"]:
        """Latent tokens of cells, side by side."""
        return self.autoencoder.embed(cells)

    def to_log1p(self, cells: Float[Tensor, "sets cells genes"]) -> Float[Tensor, "sets cells genes"]:
        """Normalize counts."""
        return normalized(cells, self.total)

    def from_log1p(
        self,
        moved: Float[Tensor, "sets cells genes"],
        made: Float[Tensor, "sets cells genes"],
        noise: Noise,
    ) -> Float[Tensor, "sets cells genes"]:
        """Scale to the library sizes that the cells were made with; sizes change by what was lost and found.

        Drawn counts stay counts, rounded at random.
        """
        counts = moved.expm1() * made.sum(-1, keepdim=True) / self.total
        return rounded(counts, noise) if self.config.counts == "sampled" else counts

    def correct(self, training: Iterable[CellSets], seed: int) -> None:
        """Compare counts that are drawn of training conditions with those of their cells, gene by gene."""
        if self.quantile_map is None:
            return
        noise = Noise(torch.Generator(self.total.device).manual_seed(seed))
        drawn, measured = [], []
        for one in training:
            latents, sizes = self._beside(one.control, one.condition, noise)
            drawn.append(self.autoencoder.draw(latents, sizes, noise)[0].cpu().numpy())
            measured.append(one.target[0].cpu().numpy())
        self.quantile_map.fit(drawn, measured)

    def make(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw cells; of control cells, only their library sizes are used, if at all."""
        return self._emit(*self._beside(control, condition, noise), noise)

    def generate(
        self, condition: Condition, given: Bool[Tensor, "sets classes"], cells: int, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw cells under the classes that are given; without any, cells of no condition in particular."""
        part = given.any(1) & ~given.all(1)
        if (self.config.hide == "all" and part.any()) or (not self.config.hidden and not given.all()):
            raise UserError(
                "Training never left a part of a condition open",
                expected="all classes, or none of them where they were hidden together",
                mend="name all of " + ", ".join(self.spec.classes) + ", or train with --model.hide each",
            )
        like = self.network.places.new_zeros(len(given), cells)
        return self._emit(*self._latents(condition, given, like, None, noise), noise)

    def flow(
        self,
        z: Float[Tensor, "sets cells latents latent"],
        condition: Condition,
        given: Bool[Tensor, "sets classes"],
    ) -> Float[Tensor, "sets cells latents latent"]:
        """Move noise to latents."""
        velocity = self.field(condition, given)
        if self.config.solver == "dopri5":
            return solve.adaptive(velocity, z, 0.0, 1.0, self.config.tolerance)
        times = torch.linspace(0, 1, self.config.steps + 1, device=z.device, dtype=z.dtype)
        return solve.integrate(velocity, z, times, self.config.solver)

    def field(self, condition: Condition, given: Bool[Tensor, "sets classes"]) -> solve.Field:
        """Guided velocity; its passes are computed side by side, and none that changes nothing."""
        told, shares = self.passes(given)
        encoded = self.conditions(condition, told.transpose(0, 1)).transpose(0, 1).flatten(0, 1)[:, None]

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            found = self.network(z.repeat(len(shares), 1, 1, 1), encoded + self.tell(t.expand(1, 1)))
            return (shares[..., None, None, None] * found.unflatten(0, shares.shape)).sum(0)

        return velocity

    def passes(
        self, given: Bool[Tensor, "sets classes"]
    ) -> tuple[Bool[Tensor, "passes sets classes"], Float[Tensor, "passes sets"]]:
        """Classes that each pass of the network is told, and the share of its velocity; shares sum to 1."""
        classes = given.shape[1]
        known = given.to(self.conditions.hidden.dtype)
        weights = known * known.new_tensor(self.config.weights or (1.0,) * classes)
        if self.config.guidance == "joint":
            told = given[None]
            shares = (weights.sum(-1) / known.sum(-1).clamp_min(1))[None]
        else:
            told = given & torch.eye(classes, dtype=torch.bool, device=given.device)[:, None]
            shares = weights.T
        told = torch.cat([told, torch.zeros_like(told[:1])])
        shares = torch.cat([shares, 1 - shares.sum(0, keepdim=True)])
        used = shares.ne(0).any(1)
        return told[used], shares[used]

    def _beside(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> tuple[Float[Tensor, "sets cells latents latent"], Float[Tensor, "sets cells"]]:
        """Generate latents and library sizes of whole conditions, for each control cell one."""
        classes = 1 + len(self.spec.covariates)
        given = torch.ones(len(control), classes, dtype=torch.bool, device=control.device)
        sizes = control.sum(-1) if self.config.library == "control" else None
        return self._latents(condition, given, control[..., 0], sizes, noise)

    def _latents(
        self,
        condition: Condition,
        given: Bool[Tensor, "sets classes"],
        like: Float[Tensor, "sets cells"],
        sizes: Float[Tensor, "sets cells"] | None,
        noise: Noise,
    ) -> tuple[Float[Tensor, "sets cells latents latent"], Float[Tensor, "sets cells"]]:
        """Generate latents, and library sizes where none are given."""
        z = noise.normal(like.new_zeros(*like.shape, *self.shape))
        drawn = self.sizes(condition, given, noise, like) if sizes is None else sizes
        z = self.flow(z, condition, given)
        if not z.isfinite().all():
            raise UserError(
                "The flow leads to values that are not finite",
                expected="weights of guidance near 1, or a run that has learned",
                mend="lower the weights (--weights, or --model.weights of training), or take more steps",
            )
        return z, drawn

    def _emit(
        self,
        z: Float[Tensor, "sets cells latents latent"],
        sizes: Float[Tensor, "sets cells"],
        noise: Noise,
    ) -> Float[Tensor, "sets cells genes"]:
        """Make counts of latents, mapped to measured ones where they are drawn."""
        if self.config.counts == "means":
            return self.autoencoder.draw(z, sizes, None)
        counts = self.autoencoder.draw(z, sizes, noise)
        return counts if self.quantile_map is None else rounded(self.quantile_map(counts, noise), noise)

    def _hide(self, shape: torch.Size, rng: torch.Generator) -> Bool[Tensor, "sets cells classes"]:
        """Draw what each cell is told."""
        classes, config = 1 + len(self.spec.covariates), self.config
        coins = torch.rand(*shape, classes, generator=rng, device=rng.device) >= config.hidden
        if config.hide == "each":
            return coins
        if config.hide == "all":
            return coins[..., :1].expand_as(coins)
        drawn = shape if config.left_per == "cell" else (1, 1)
        left = torch.randint(classes, drawn, generator=rng, device=rng.device)
        return (torch.arange(classes, device=rng.device) == left[..., None]) & coins[..., :1]
