"""scDFM: conditional flow matching over gene tokens [scdfm2026].

One example is a control cell and a perturbed cell, paired at random. A network learns the velocity
that carries noise to perturbed cells, given the control cell and the condition; see docs/models/scdfm.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from knockon.data import graph
from knockon.data.arrays import Moments
from knockon.dynamics import discrepancy, flow, solve
from knockon.model import Losses, ModelConfig, Recipe, Training
from knockon.models._pulled import PulledModel
from knockon.models._released_scdfm import from_released
from knockon.nn.normal_scores import NormalScores
from knockon.nn.pad import Architecture, Known, PADTransformer
from knockon.types import CellSets, Condition, Label, Noise, Spec, UserError

__all__ = ["SCDFM", "Config", "Pairs", "default", "from_released", "paper", "small"]

if TYPE_CHECKING:
    from knockon.data.screen import Screen

RANKED_CELLS, RANKED_VALUES = 2**13, 2**25
"""Training cells whose ranks make normal scores, and values of all genes in them, at most."""


@dataclass(frozen=True, kw_only=True)
class Config(Architecture, ModelConfig):
    """scDFM: its network (``Architecture``), its objective and its way of sampling."""

    at_generation: ClassVar[tuple[str, ...]] = (
        "solver", "points", "dropout_in_generation", "chunk",
    )  # fmt: skip

    source: Literal["gaussian", "poisson"] = "gaussian"
    """Where paths start: standard noise, or ``log1p`` of Poisson counts around the control cell."""
    poisson_total: float = 1e4
    """Counts of a Poisson start."""
    normal_scores: bool = True
    """Paths are of the normal scores of genes, not of log1p values: zeros and long tails are Gaussian there,
    and end among the values that were measured (not in the paper)."""
    gaussian_base: bool = True
    """The network adds to the best velocity between Gaussians of each gene's mean and variance in
    training cells, so that it need not learn these (not in the paper)."""
    anchored_base: bool = True
    """The mean of that Gaussian is the one that ripple expects, in training as if the condition had not been
    measured, so that the network learns the shape of populations and what is missing (not in the paper)."""
    shrunk: bool = True
    """Of what the network adds to that Gaussian, generation takes a share (0, a half, all) that is chosen on
    validation conditions; a half without any (not in the paper)."""
    pulled: bool = True
    """In the end, cells are moved towards the mean that ripple expects, by a weight that is chosen on
    validation conditions (not in the paper)."""
    mmd: float = 0.5
    """Weight of the maximum mean discrepancy; 0 is the paper's ablation."""
    genes_per_step: int = 1000
    """Genes drawn for each training step; all of them where the panel has no more."""
    gene_graph: bool = True
    """Ablation: without it, the encoding of a gene knows nothing of its neighbors."""
    graph_neighbors: int = 30
    """Genes that each gene selects by absolute correlation."""
    graph_negative: bool = True
    """Keep edges of negative correlation wherever one end selected them."""
    graph_second_log: bool = False
    """Take the logarithm once more before correlating, as the released program does."""
    graph_cells: int = 20_000
    """Training cells to correlate at most, drawn at random; 0 takes all."""
    solver: solve.Method = "rk4_38"
    """Rule of the steps of generation."""
    points: int = 20
    """Times from 0 to 1, both included, between which steps are taken."""
    dropout_in_generation: bool = False
    """Dropout while cells are generated, as in the released program."""
    skip_constant: bool = True
    """Genes with the same value in all training cells are neither trained nor generated, but kept at it."""
    chunk: int = 65_536
    """Values (cells x genes) generated at once; it sets the memory of generation and nothing else."""

    def build(self, spec: Spec) -> "SCDFM":
        """Make the model.

        Raises
        ------
        UserError
            If generation would take no step.
        """
        if self.points < 2:
            raise UserError("points of scdfm", offenders=[self.points], expected="at least 2")
        return SCDFM(self, spec)


def default() -> Recipe:
    """Return what is best for some hundred genes on two CPU cores, in minutes.

    Larger screens on a GPU deserve a wider network and more genes per step.
    """
    return Recipe(
        model=Config(
            width=64, layers=2, heads=1, genes_per_step=160, solver="midpoint", points=3
        ),
        train=Training(
            steps=300, sets=4, cells=16, lr=3e-4, final_lr=1e-5, warmup=50, clip=1.0, ema=0.99,
            optimizer="adamw", weight_decay=0.01,
        ),
    )  # fmt: skip


def paper() -> Recipe:
    """Return what was published and released: 60 million parameters, 48 pairs, 200,000 steps.

    The paper ran two such batches at once (96 pairs, half as many steps): ``sets=2, steps=100_000``.
    """
    return Recipe(
        model=Config(
            width=512,
            layers=4,
            heads=8,
            dropout=0.1,
            time_scale=1.0,
            zero_init=False,
            normed_keys=False,
            residual_adapter=False,
            source="gaussian",
            normal_scores=False,
            gaussian_base=False,
            anchored_base=False,
            shrunk=False,
            pulled=False,
            mmd=0.5,
            genes_per_step=1000,
            graph_neighbors=30,
            graph_negative=True,
            graph_second_log=True,
            graph_cells=0,
            solver="rk4_38",
            points=20,
            dropout_in_generation=True,
            skip_constant=False,
        ),
        train=Training(steps=200_000, sets=1, cells=48, with_replacement=True, lr=5e-5, final_lr=1e-6),
    )


def small() -> Recipe:
    """Return a model for tests: some seconds on one core."""
    return Recipe(
        model=Config(width=32, layers=1, heads=2, graph_neighbors=5, solver="midpoint", points=9),
        train=Training(steps=150, sets=4, cells=16, lr=3e-3, final_lr=1e-4, warmup=10, clip=1.0, ema=0.95),
    )


class SCDFM(PulledModel):
    """Flow matching over gene tokens; the cells of a set depend on each other only by being ``pulled``."""

    units = "log1p"
    deep = False

    trained: Bool[Tensor, "codes"]
    level: Float[Tensor, "genes"]
    """Mean of each gene over training cells, log1p, at which those that never vary stay."""
    source_moments: Float[Tensor, "mean_and_std genes"]
    """Of the Gaussian at t = 0, in the coordinates of paths."""
    data_moments: Float[Tensor, "mean_and_std genes"]
    """Of the Gaussian at t = 1; its mean counts only where a condition has none of its own."""
    generated: Int[Tensor, "generated"]

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(
            spec,
            anchored=config.gaussian_base and config.anchored_base,
            pulled=config.pulled,
            shrunk=config.gaussian_base and config.shrunk,
        )
        self.config = config
        self.network = PADTransformer(spec, config)
        genes = len(spec.genes)
        self.scores = NormalScores(genes) if config.normal_scores else None
        self.register_buffer("trained", torch.zeros(len(spec.perturbations) + 1, dtype=torch.bool))
        self.register_buffer("level", torch.zeros(genes))
        self.register_buffer("source_moments", torch.stack([torch.zeros(genes), torch.ones(genes)]))
        self.register_buffer("data_moments", torch.stack([torch.zeros(genes), torch.ones(genes)]))
        self.register_buffer("generated", torch.arange(genes))

    def fit_statistics(self, train: "Screen") -> None:
        """Note the perturbations; fit moments, scores and the graph of genes."""
        config = self.config
        self.trained[self.spec.encode(train.conditions).perturbation.unique()] = True
        moments = _stacked(train.pooled(train.conditions))
        self.level.copy_(moments[0])
        if self.scores is not None:
            self.scores.fit(_drawn(train, train.conditions, self._most()))
            if config.anchored_base:
                self.data_moments[1] = self.scores.spread
        else:
            self.data_moments.copy_(moments)
        if config.source == "poisson":
            self.source_moments.copy_(self._starting(train))
        if self.ripple is not None:
            self.ripple.fit_statistics(train)
        if config.skip_constant:
            varying = _stacked(train.pooled(train.labels))[1].nonzero().flatten()
            self.generated = varying.to(self.generated.device)
        if config.gene_graph:
            cells = np.concatenate([train.rows[label] for label in (*train.controls, *train.conditions)])
            if 0 < config.graph_cells < len(cells):
                cells = np.random.default_rng(0).choice(cells, config.graph_cells, replace=False)
            correlations = graph.correlation(train.matrix, cells, second_log=config.graph_second_log)
            edges = graph.neighbors(correlations, config.graph_neighbors, negative=config.graph_negative)
            self.network.genes.connect(edges)

    def _most(self) -> int:
        return min(RANKED_CELLS, RANKED_VALUES // len(self.level))

    def _starting(self, train: "Screen") -> Float[Tensor, "mean_and_std genes"]:
        """Moments of states at t = 0 beside control cells."""
        control = np.concatenate(_drawn(train, train.controls, self._most()))
        shown = torch.from_numpy(control).to(self.level.device)[None]
        noise = Noise(torch.Generator(shown.device).manual_seed(0))
        starts = self.start(shown, noise, torch.arange(len(self.level), device=shown.device))[0]
        return torch.stack([starts.mean(0), starts.std(0)])

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Perturbations seen in training, genes of the panel, and those with a vector."""
        return (self.trained | self.network.conditions.based())[condition.perturbation].all(dim=-1)

    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Flow matching at random times, and the discrepancy of where its velocities lead."""
        genes = self.generated
        if self.config.genes_per_step < len(genes):
            drawn = torch.randperm(len(genes), generator=rng, device=rng.device)
            genes = genes[drawn[: self.config.genes_per_step].to(genes.device)]
        noise, control, x1 = Noise(rng), batch.control[..., genes], batch.target[..., genes]
        if self.scores is not None:
            x1 = self.scores(x1, noise, genes)
        t = torch.rand(x1.shape[:2], generator=rng, device=x1.device)
        pairs = Pairs(self.start(control, noise, genes), x1, control, t)
        return self.objective(genes, pairs, batch.condition, rng)

    def objective(
        self,
        genes: Int[Tensor, "genes"],
        pairs: "Pairs",
        condition: Condition,
        rng: torch.Generator | None = None,
    ) -> Losses:
        """Losses of paths between given states; ``rng`` switches dropout on."""
        x0, x1, control, t = pairs
        x_t = flow.interpolate(x0, x1, t)
        g, p = self.network.encode(genes, condition, rng)
        known = self.network.know(g, control.flatten(0, 1), p.repeat_interleave(x1.shape[1], 0), rng)
        mean = self.mean(condition)[:, genes].repeat_interleave(x1.shape[1], 0)
        v = self.velocity(genes, x_t.flatten(0, 1), t.flatten(), known, rng, mean=mean).view_as(x1)
        with torch.autocast(x1.device.type, enabled=False):
            matching = functional.mse_loss(v, flow.velocity(x0, x1))
            losses = {"total": matching, "flow": matching}
            if self.config.mmd and x1.shape[1] > 1:
                losses["mmd"] = discrepancy.mmd(flow.endpoint(x_t, v, t), x1).mean()
                losses["total"] = matching + self.config.mmd * losses["mmd"]
        return losses

    def velocity(  # noqa: PLR0913 - what a velocity depends on
        self,
        genes: Int[Tensor, "genes"],
        x_t: Float[Tensor, "cells genes"],
        t: Float[Tensor, "cells"],
        known: Known,
        rng: torch.Generator | None = None,
        *,
        mean: Float[Tensor, "cells genes"] | None = None,
        share: float = 1.0,
    ) -> Float[Tensor, "cells genes"]:
        """Velocity of cells: the network's, on top of the Gaussian one where the configuration says so.

        ``mean`` is that of the Gaussian at t = 1; without it, the mean of all training perturbations. Of what
        the network adds to it, a ``share`` is taken.
        """
        if not self.config.gaussian_base:
            return self.network(x_t, t, known, rng)
        (m0, s0), (m1, s1) = self.source_moments[:, genes], self.data_moments[:, genes]
        base, spread = flow.gaussian_velocity(x_t, t, (m0, s0), (m1 if mean is None else mean, s1))
        return base + share * spread * self.network(x_t, t, known, rng) if share else base

    def mean(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Mean of the Gaussian that paths are expected to end in."""
        if self.ripple is None or not self.config.anchored_base:
            return self.data_moments[0].expand(len(condition), -1)
        with torch.autocast(self.level.device.type, enabled=False):
            mean = self.ripple.expect(condition, held_out=self.training)
            return mean if self.scores is None else self.scores.center(mean)

    def start(
        self, control: Float[Tensor, "sets cells genes"], noise: Noise, genes: Int[Tensor, "genes"]
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw states at t = 0, beside the control cells of some genes."""
        if self.config.source == "gaussian":
            return noise.normal(control)
        rates = control.expm1().clamp_min(0)
        rates = rates * (self.config.poisson_total / rates.sum(-1, keepdim=True).clamp_min(1e-8))
        drawn = noise.poisson(rates).log1p()
        return drawn if self.scores is None else self.scores(drawn, noise, genes)

    def make(
        self,
        control: Float[Tensor, "sets cells genes"],
        condition: Condition,
        noise: Noise,
    ) -> Float[Tensor, "sets cells genes"]:
        """Follow the velocity from each start; all genes at once, some cells at a time."""
        several = len(noise.generators) > 1
        if several and self.config.dropout_in_generation:  # dropout is of each set's own generator, too
            parts = zip(control.split(1), range(len(condition)), noise.generators, strict=True)
            return torch.cat([self.make(x, condition[i : i + 1], Noise(rng)) for x, i, rng in parts])
        genes, cells = self.generated, control.shape[1]
        starts = self.start(control[..., genes], noise, genes).flatten(0, 1)
        shown = control[..., genes].flatten(0, 1)
        times = torch.linspace(0, 1, self.config.points, device=control.device, dtype=control.dtype)
        rng = noise.generators[0] if self.config.dropout_in_generation else None
        g, p = self.network.encode(genes, condition, rng)
        p, mean = (x.repeat_interleave(cells, 0) for x in (p, self.mean(condition)[:, genes]))
        parts = []
        for rows in torch.arange(len(p), device=p.device).split(max(1, self.config.chunk // len(genes))):
            known = self.network.know(g, shown[rows], p[rows], rng)
            parts.append(self._follow(genes, Start(starts[rows], mean[rows], known), times, rng))
        made = torch.cat(parts).unflatten(0, control.shape[:2])
        whole = self.level.to(control.dtype).expand(control.shape).clone()
        whole[..., genes] = made.clamp_min(0) if self.scores is None else self.scores.inverse(made, genes)
        return whole

    def _follow(
        self,
        genes: Int[Tensor, "genes"],
        start: "Start",
        times: Float[Tensor, "points"],
        rng: torch.Generator | None,
    ) -> Float[Tensor, "cells genes"]:
        """Carry states from t = 0 to t = 1."""
        share = float(self.share)

        def field(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(genes, x, t.expand(len(x)), start.known, rng, mean=start.mean, share=share)

        return solve.integrate(field, start.x, times, self.config.solver)


class Start(NamedTuple):
    """Cells at t = 0, the mean that each is expected to end around, and what the network knows of each."""

    x: Float[Tensor, "cells genes"]
    mean: Float[Tensor, "cells genes"]
    known: Known


class Pairs(NamedTuple):
    """Both ends of paths, the control cells beside them, and times."""

    x0: Float[Tensor, "sets cells genes"]
    x1: Float[Tensor, "sets cells genes"]
    control: Float[Tensor, "sets cells genes"]
    t: Float[Tensor, "sets cells"]


def _drawn(train: "Screen", labels: Sequence[Label], most: int) -> list[Float[np.ndarray, "_ genes"]]:
    """About so many cells: the same share of each condition, two at least, or some conditions only."""
    rng = np.random.default_rng(0)
    rows = [train.rows[labels[i]] for i in rng.permutation(len(labels))[: max(1, most // 2)]]
    share = min(1.0, most / sum(map(len, rows)))
    drawn = (
        rng.choice(some, min(len(some), max(2, round(share * len(some)))), replace=False) for some in rows
    )
    return [train.gather(np.sort(some)) for some in drawn]


def _stacked(found: Moments) -> Float[Tensor, "mean_and_std genes"]:
    return torch.from_numpy(np.stack([found.mean, found.std]).astype(np.float32))
