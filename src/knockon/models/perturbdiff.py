"""PerturbDiff: diffusion on whole sets of cells [perturbdiff2026].

The datum is a set of cells of one condition, beside a set of control cells. A transformer whose tokens are
cells estimates the clean set from a noised one; the loss is the energy distance between both sets, and a
small squared error. See docs/models/perturbdiff.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.data.graph import one_count
from knockon.dynamics import diffusion
from knockon.dynamics.discrepancy import energy_distance
from knockon.model import Losses, ModelConfig, Names, Recipe, Training
from knockon.models._pulled import PulledModel
from knockon.models._released_perturbdiff import from_released
from knockon.nn.conditions import BranchEncoder
from knockon.nn.counts import single_counts, soften, whole_counts
from knockon.nn.joint import Architecture, Hidden, JointTransformer, Parts, Real, hide
from knockon.types import CellSets, Condition, Noise, Spec, UserError

__all__ = ["Config", "PerturbDiff", "default", "from_released", "paper", "small"]

if TYPE_CHECKING:
    from knockon.data.screen import Screen

FLOOR = 1e-8
"""Squared distances of the released program's energy distance are at least this."""


@dataclass(frozen=True, kw_only=True)
class Config(Architecture, ModelConfig):
    """PerturbDiff: its network (``Architecture``), its diffusion, its objective and its way of sampling."""

    at_generation: ClassVar[tuple[str, ...]] = (
        "set_size", "span", "visited", "rule", "eta", "guidance", "own_estimates", "cutoff", "whole_counts",
        "shrinkage",
    )  # fmt: skip

    branch: int = 128
    """Width of the encodings of perturbation and covariates, before they are joined."""
    condition_through_genes: bool = False
    """The joined condition has as many entries as there are genes, as in the released program."""
    residual: bool = True
    """The network adds to the control cell beside each cell, so that it begins at no effect (not in the
    paper)."""
    anchored: bool = True
    """With ``residual``, the cells of ripple stand in the place of control cells, in training as if their
    condition had not been measured; the network then begins there (not in the paper)."""
    pulled: bool = True
    """With ``residual``, cells are moved towards the mean that ripple expects in the end, by a weight that is
    chosen on validation conditions (not in the paper)."""
    shrunk: bool = True
    """With ``residual``, generation changes a share of all values (none, half, all) of the cells it adds to,
    drawn at random; the share is chosen on validation conditions with that weight, and is a half where
    nothing can choose (not in the paper)."""
    scale: float = 10.0
    """log1p values are divided by it."""
    steps: int = 1000
    """Steps of the diffusion."""
    schedule: diffusion.Kind = "linear"
    """How noise is spread over the steps."""
    self_conditioning: float = 0.5
    """Share of training in which the network is shown an earlier estimate of its own."""
    condition_dropout: float = 0.1
    """Share of training in which the condition is hidden; guidance needs it."""
    control_dropout: float = 0.0
    """Share of training in which control cells are hidden; with 1 they are in generation, too."""
    dropout_per: Literal["set", "batch"] = "set"
    """What is hidden, and what is shown, is decided for each set, or for all of a batch at once."""
    energy: float = 1.0
    """Weight of half the energy distance between the true and the estimated set."""
    mse: float = 1.0
    """Weight of the squared error, a mean over genes."""
    unbiased_energy: bool = True
    """Leave out the distance of a cell to itself."""
    masked: bool = True
    """Copies that fill up a set count neither in attention nor in the loss; in the paper they do."""
    learn_controls: bool = False
    """Train on control cells as well, as cells to which nothing was done."""
    marginal: bool = False
    """Learn the cells of every context, whatever was done to them, for a later run to begin with: what was
    done is hidden."""
    set_size: int = 64
    """Cells that are generated as one set."""
    span: diffusion.Span = "strided"
    """``strided``: ``visited`` steps over all; ``truncated``: the last ``visited`` steps, from noise of full
    strength, as in the released program."""
    visited: int = 20
    """Steps that are visited in generation."""
    rule: diffusion.Rule = "ddim"
    """How a step is undone."""
    eta: float = 0.0
    """Fresh noise in DDIM: 0 is none."""
    guidance: float = 0.0
    """Weight w of guidance, ``(1 + w)`` conditioned minus ``w`` unconditioned estimate; 0 halves the cost."""
    own_estimates: bool = True
    """Each pass of guidance is shown its own earlier estimate, as in training; in the released program both
    see the guided one, with small values cut."""
    cutoff: float = 1e-4
    """Estimates below it, in units of log1p over ``scale``, become zero at every step."""
    whole_counts: bool = True
    """Values below a single count become none or one at the end, at random (not in the paper)."""
    shrinkage: float = 0.05
    """With ``residual``, counts by which changes are shrunk towards none at the end (not in the paper)."""

    def build(self, spec: Spec) -> "PerturbDiff":
        """Make the model.

        Raises
        ------
        UserError
            If options contradict each other.
        """
        for wrong, expected in (
            (not 0 < self.visited <= self.steps, f"visited between 1 and steps ({self.steps})"),
            (self.width % self.heads > 0, f"width ({self.width}) to be a multiple of heads ({self.heads})"),
            (not 0 <= self.eta <= 1, "eta between 0 and 1"),
            (self.set_size < 1, "set_size of at least 1"),
            (self.guidance != 0 and not self.condition_dropout, "condition_dropout above 0 for guidance"),
        ):
            if wrong:
                raise UserError("Options of perturbdiff that do not fit together", expected=expected)
        return PerturbDiff(self, spec)


def default() -> Recipe:
    """Return what is best for some hundred genes on two CPU cores, in minutes."""
    return Recipe(
        model=Config(width=128, layers=4, heads=4, branch=64, learn_controls=True),
        train=Training(
            steps=800, sets=8, cells=32, lr=1e-3, final_lr=1e-5, warmup=100, clip=1.0, ema=0.99,
            optimizer="adamw", weight_decay=0.01,
        ),
    )  # fmt: skip


def paper() -> Recipe:
    """Return what was released: 104 million parameters at 2,000 genes, 8 sets of 256 cells, 200,000 steps.

    For screens of small groups (Replogle) the authors took ``sets=4, cells=32`` and a rate of 2e-3.
    """
    return Recipe(
        model=Config(
            maps_see_attention=False, condition_through_genes=True, residual=False, anchored=False,
            pulled=False, shrunk=False, condition_dropout=0.5, dropout_per="batch", unbiased_energy=False,
            masked=False, set_size=256, span="truncated", visited=100, guidance=1.0, own_estimates=False,
            whole_counts=False, shrinkage=0.0,
        ),
        train=Training(
            steps=200_000, sets=8, cells=256, lr=2e-4, final_lr=2e-5, warmup=200, plateau=0.1, clip=1.0,
            schedule="floored_cosine", ema=0.99, ema_every=10, ema_ramp="none",
            optimizer="adamw", betas=(0.9, 0.98), weight_decay=0.01,
        ),
    )  # fmt: skip


def marginal() -> Recipe:
    """Return what learns the cells of screens without labels, to fine-tune from with ``--from``."""
    recipe = default()
    assert isinstance(recipe.model, Config)
    model = replace(recipe.model, marginal=True, control_dropout=1.0, residual=False)
    return replace(recipe, model=model)


def small() -> Recipe:
    """Return a model for tests: some seconds on one core."""
    return Recipe(
        model=Config(width=32, layers=2, heads=2, branch=16, steps=50, visited=5, set_size=16),
        train=Training(steps=150, sets=4, cells=16, lr=3e-3, final_lr=1e-4, warmup=10, clip=1.0, ema=0.95),
    )


class PerturbDiff(PulledModel):
    """Diffusion whose datum is a set: the cells of a set depend on each other, sets never do."""

    units = "log1p"

    bars: Float[Tensor, "steps_and_one"]
    """Share of signal at each step; the last entry stands for clean data."""
    one_count: Float[Tensor, ""]
    """Value of a single count in a typical training cell, log1p."""

    def __init__(self, config: Config, spec: Spec) -> None:
        wanted = not config.marginal and config.residual
        switches = {name: wanted and getattr(config, name) for name in ("anchored", "pulled")}
        super().__init__(spec, **switches, shrunk=wanted and config.shrunk and config.control_dropout < 1)
        self.config = config
        width = len(spec.genes) if config.condition_through_genes else config.width
        self.conditions = BranchEncoder(spec, config.branch, width)
        self.condition = nn.Linear(width, config.width)
        nn.init.xavier_uniform_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        self.hidden = nn.Parameter(torch.randn(config.width))
        self.network = JointTransformer(len(spec.genes), config)
        if config.residual:
            nn.init.zeros_(self.network.head.weight)
        self.register_buffer("bars", diffusion.alpha_bars(config.schedule, config.steps), persistent=False)
        self.register_buffer("one_count", torch.ones(()))

    def fit_statistics(self, train: "Screen") -> None:
        """Note which perturbations and contexts training will have seen, and the value of a count."""
        learned = train.labels if self.learns_controls else train.conditions
        self.conditions.fit(self.spec.encode(learned))
        if self.ripple is not None:
            self.ripple.fit_statistics(train)
            if self.config.anchored:
                self.ripple.prepare()
        self.one_count.fill_(one_count(train.matrix, train.every))

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Perturbations that were trained, and those with a vector."""
        return self.conditions.knows(condition.perturbation).all(dim=-1) | self.config.marginal

    @property
    def learns_controls(self) -> bool:
        """As the configuration says."""
        return self.config.learn_controls

    def entries(self) -> dict[str, Names]:
        """Names of genes, perturbations and levels."""
        genes = self.spec.genes
        found = {f"network.{key}": names for key, names in self.network.entries(genes).items()}
        found |= {f"conditions.{key}": names for key, names in self.conditions.entries(self.spec).items()}
        if self.config.condition_through_genes:
            found |= {"conditions.join.weight": (genes, None), "conditions.join.bias": (genes,)}
            found["condition.weight"] = (None, genes)
        return found

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Estimate each set from its noised self at a random step."""
        batch = batch.trimmed() if self.config.masked else replace(batch, real=None)
        clean = batch.target / self.config.scale
        steps = torch.randint(self.config.steps, (len(clean),), generator=rng, device=clean.device)
        noise = torch.randn(clean.shape, generator=rng, device=clean.device, dtype=clean.dtype)
        hidden = self._hide(len(clean), rng)
        control = self.beside(batch.control, batch.condition, Noise(rng))
        x = diffusion.noised(clean, noise, self.bars[steps])
        estimate = self.denoise(x, control, self.encode(batch.condition), steps, hidden, batch.real)
        return self.objective(estimate, clean, batch.real)

    def objective(
        self,
        estimate: Float[Tensor, "sets cells genes"],
        clean: Float[Tensor, "sets cells genes"],
        real: Real = None,
    ) -> Losses:
        """Squared error, and half the energy distance between sets."""
        with torch.autocast(clean.device.type, enabled=False):
            estimate = estimate.to(clean.dtype)
            counted = clean.new_ones(clean.shape[:2]) if real is None else real.to(clean.dtype)
            errors = (estimate - clean).square().mean(-1)
            mse = ((errors * counted).sum(1) / counted.sum(1).clamp_min(1)).mean()
            mask = None if real is None else (real, real)
            unbiased = self.config.unbiased_energy
            floor = 0.0 if unbiased else FLOOR
            energy = energy_distance(clean, estimate, unbiased=unbiased, real=mask, floor=floor).mean() / 2
        total = self.config.mse * mse + self.config.energy * energy
        return {"total": total, "mse": mse, "energy": energy}

    @torch.no_grad()
    def beside(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Cells as they stand beside cells, in the network's scale: control cells, or those of ripple."""
        if self.config.anchored and self.ripple is not None:
            start = self.ripple.held_out if self.training else self.ripple.sample
            control = start(control, condition, noise)
        return control / self.config.scale

    def encode(self, condition: Condition) -> Float[Tensor, "sets 1 dim"]:
        """Encode conditions; one vector for all cells of a set."""
        if self.config.marginal:
            condition = replace(condition, perturbation=torch.zeros_like(condition.perturbation))
        return self.condition(functional.silu(self.conditions(condition)))[:, None]

    def denoise(
        self,
        x: Float[Tensor, "sets cells genes"],
        control: Float[Tensor, "sets cells genes"],
        encoded: Float[Tensor, "sets #cells dim"],
        steps: Int[Tensor, "sets"],
        hidden: Hidden,
        real: Real = None,
    ) -> Float[Tensor, "sets cells genes"]:
        """Estimate clean sets in training, where some are shown an earlier estimate."""
        control = torch.where(hidden.control[:, None, None], 0, control)
        encoded = torch.where(hidden.condition[:, None, None], self.hidden.to(encoded.dtype), encoded)
        told = encoded + self.tell(steps, x)
        base = self.network.embed_control(control)
        earlier = None
        if len(hidden.shown):
            some = hidden.shown
            with torch.no_grad():
                first = self.estimate(
                    x[some], None, control[some], base[some], told[some], None if real is None else real[some]
                )
            earlier = torch.zeros_like(x).index_copy(0, some, first.to(x.dtype))
        return self.estimate(x, earlier, control, base, told, real)

    def estimate(
        self,
        x: Float[Tensor, "sets cells genes"],
        earlier: Float[Tensor, "sets cells genes"] | None,
        control: Float[Tensor, "sets cells genes"],
        base: Float[Tensor, "sets cells dim"],
        told: Float[Tensor, "sets #cells dim"],
        real: Real = None,
    ) -> Float[Tensor, "sets cells genes"]:
        """Clean sets, not negative; ``base`` is the embedded control, ``told`` time and condition."""
        found = self.network(x, earlier, base, told, real)
        return functional.relu(found + control if self.config.residual else found)

    def tell(self, steps: Int[Tensor, "sets"], like: Tensor) -> Float[Tensor, "sets 1 dim"]:
        """Encode steps."""
        return self.network.time(steps.to(like.dtype))[:, None]

    def make(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Denoise sets of ``set_size`` cells, which are parts of the sets that are asked for."""
        parts = Parts.of(control.shape[1], self.config.set_size)
        shown = self.beside(control, condition, noise) * (self.config.control_dropout < 1)
        start, share = shown * self.config.scale, float(self.share)
        if not share:
            return start

        def fresh() -> Tensor:
            return parts.cut(noise.normal(control))

        encoded = self.encode(condition).repeat_interleave(parts.number, dim=0)
        real = parts.real(len(control), control.device) if self.config.masked else None
        *_, (made, _) = self.chain(fresh(), parts.cut(shown), encoded, fresh, real)
        made = parts.join(made) * self.config.scale
        one_count = single_counts(control, self.one_count)
        if self.config.residual and self.config.shrinkage:
            made = soften(made, start, one_count, self.config.shrinkage)
        if self.config.whole_counts:
            made = whole_counts(made, one_count, noise)
        return made if share == 1 else torch.where(noise.uniform(made) < share, made, start)

    def chain(
        self,
        x: Float[Tensor, "sets cells genes"],
        control: Float[Tensor, "sets cells genes"],
        encoded: Float[Tensor, "sets #cells dim"],
        fresh: Callable[[], Tensor],
        real: Real = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Undo the noise step by step; both passes of guidance are computed side by side.

        Parameters
        ----------
        x, control
            Noise, and control cells, both in the scale of the network.
        encoded
            What ``encode`` made.
        fresh
            Draws noise, for the rules that add some.

        Yields
        ------
        tuple
            At every visited step, the estimate of the clean sets and the state after the step.
        """
        config, bars = self.config, self.bars
        guided, sets = config.guidance != 0, len(x)
        visited = diffusion.steps_of(config.span, config.steps, config.visited)
        base = self.network.embed_control(control)
        if guided:
            nothing = self.hidden.to(encoded.dtype).expand_as(encoded)
            encoded = torch.cat([encoded, nothing])
            control, base = (torch.cat([z, z]) for z in (control, base))
            real = None if real is None else torch.cat([real, real])
        times = self.tell(torch.tensor(visited, device=x.device), x)
        earlier = None
        for time, move in zip(times, diffusion.moves(bars, visited), strict=True):
            shown = torch.cat([x, x]) if guided else x
            found = self.estimate(shown, earlier, control, base, encoded + time, real)
            clean = self.guide(*found.split(sets)) if guided else found
            clean = self.cut(clean)
            earlier = found if config.own_estimates else torch.cat([clean, clean]) if guided else clean
            if config.rule == "ddpm":
                x = diffusion.ddpm(x, clean, move, noise=fresh())
            else:
                x = diffusion.ddim(x, clean, move, eta=config.eta, noise=fresh() if config.eta else None)
            yield clean, x

    def guide(self, conditioned: Tensor, unconditioned: Tensor) -> Tensor:
        """Move the estimate away from the one that knows no condition [ho2022]."""
        return (1 + self.config.guidance) * conditioned - self.config.guidance * unconditioned

    def cut(self, estimate: Tensor) -> Tensor:
        """Set small and negative values to zero."""
        return torch.where(estimate < self.config.cutoff, 0, estimate)

    def _hide(self, sets: int, rng: torch.Generator) -> Hidden:
        """Draw what is hidden and shown. Sets come in random order, so the first ones are as good as any."""
        config, device = self.config, rng.device
        coins = np.random.default_rng(rng.initial_seed())  # the host's, so that nobody waits for the device
        if config.dropout_per == "batch":
            control, condition, shown = coins.random(3)
            hidden = bool(condition < config.condition_dropout), bool(control < config.control_dropout)
            everything = sets if shown >= 1 - config.self_conditioning else 0
            return hide(sets, condition=hidden[0], control=hidden[1], shown=everything, device=device)
        control, condition = torch.rand(2, sets, generator=rng, device=device)
        return Hidden(
            condition=condition < config.condition_dropout,
            control=control < config.control_dropout,
            shown=torch.arange(int(sets * config.self_conditioning + coins.random()), device=device),
        )
