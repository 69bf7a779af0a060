"""Screens with a known truth: cells drawn from a regulatory network, and what each condition expects.

The truth is not an average over the cells of the file. It is the expectation of the model itself over
cell states, guides that failed, library sizes and count noise, so a prediction can be scored free of noise.
"""

import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.interpolate import CubicSpline
from scipy.special import ndtri

from knockon.data.network import STATES, Network, Shape, draw_network
from knockon.types import CONTROL, UserError

SLOTS = 2
"""Perturbations that one cell can carry."""
GUIDES = 3
"""Guides of a perturbed gene, each with its own strength."""
LATENTS = STATES + 1 + SLOTS
"""Uniform numbers that make a cell: its state, its place in the cycle, the guide in each slot."""
LEVELS = 16
"""Different values that the dispersion of genes takes."""
CHUNK = 1_000_000
"""Values of a dense block of cells x genes (a few copies of it are alive at once)."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What to simulate. The network and the truth depend on everything but ``cells`` and its shares."""

    cells: int = 8_000
    """Cells of the whole screen."""
    genes: int = 500
    """Genes of the panel."""
    singles: int = 20
    """Genes perturbed alone."""
    doubles: int = 40
    """Pairs perturbed together, drawn among the singles."""
    orphans: int = 0
    """Genes perturbed in doubles but never alone."""
    drugs: int = 0
    """Drugs, each given at every dose."""
    doses: tuple[float, ...] = (0.1, 1.0, 10.0)
    """Doses of every drug, in uM."""
    cell_types: int = 1
    """Cell types; every condition is measured in each."""
    mode: Literal["activation", "knockdown"] = "activation"
    """Whether guides raise or lower their gene."""
    strength: float = 1.8
    """Log fold change of a gene under a perfect guide."""
    penetrance: float = 0.85
    """Probability that a guide acts at all in its cell."""
    null_share: float = 0.35
    """Share of the perturbed genes that change nothing but themselves."""
    effect: float = 0.5
    """Log fold change of genes by the programs of the network."""
    interaction: float = 1.0
    """Curvature of the responses: 0 lets perturbations add up in log expression."""
    control_share: float = 0.1
    """Share of the cells that are control cells."""
    unevenness: float = 0.3
    """Standard deviation of the log of the number of cells of a condition."""
    depth: float = 12_000
    """Median library size: counts of a cell over all genes, those outside the panel included."""
    depth_spread: float = 0.45
    """Standard deviation of the log of the library size."""
    panel_share: float = 0.1
    """Share of a library that falls on the panel."""
    abundance_spread: float = 1.7
    """Standard deviation of the log of base expression over genes."""
    dispersion: float = 0.15
    """Dispersion of the counts of highly expressed genes; rare genes have more."""
    state_spread: float = 0.4
    """How strongly cell state and cell cycle show in the genes that they move."""
    total: float = 10_000
    """What the counts of a cell are normalized to before log1p."""
    truth_cells: int = 1_024
    """Points of the integral over cells by which the truth is computed."""
    seed: int = 0
    """Seed of everything drawn."""

    def __post_init__(self) -> None:
        perturbed = self.singles + self.orphans
        pairs = perturbed * (perturbed - 1) // 2 - self.orphans * (self.orphans - 1) // 2
        if self.regulators > self.genes:
            raise UserError(
                f"{perturbed} perturbed genes do not fit a panel of {self.genes}",
                expected=f"at least {self.regulators} genes",
                mend="raise --genes or lower --singles",
            )
        if self.doubles > pairs or self.doubles < self.orphans:
            raise UserError(
                f"{self.doubles} doubles cannot be made",
                expected=f"{self.orphans} to {pairs} of {self.singles} singles and {self.orphans} orphans",
                mend="change --doubles or --singles",
            )
        if self.cells < 4 * self.conditions:
            raise UserError(
                f"{self.cells} cells are too few for {self.conditions} conditions",
                expected=f"at least {4 * self.conditions} cells",
                mend="raise --cells, or lower --singles and --doubles",
            )

    @property
    def regulators(self) -> int:
        """Regulators of the network, perturbed or not."""
        return self.singles + self.orphans + 4 + self.genes // 50

    @property
    def conditions(self) -> int:
        """Conditions of the screen, controls included."""
        per_type = 1 + self.singles + self.doubles + self.drugs * len(self.doses)
        return per_type * self.cell_types

    @property
    def shape(self) -> Shape:
        """Sizes and strengths of the network."""
        return Shape(
            genes=self.genes,
            regulators=self.regulators,
            perturbed=self.singles + self.orphans,
            programs=min(4 + self.regulators // 5, 40),
            cell_types=self.cell_types,
            null_share=self.null_share,
            effect=self.effect,
            interaction=self.interaction,
            abundance_spread=self.abundance_spread,
            state_spread=self.state_spread,
        )


def tiny() -> Simulation:
    """Return a screen for tests: few genes, strong effects, about 40 cells a condition; 0.3 s."""
    return Simulation(
        cells=800,
        genes=80,
        singles=8,
        doubles=8,
        strength=2.2,
        effect=0.9,
        null_share=0.15,
        penetrance=0.95,
        panel_share=0.05,
        abundance_spread=1.0,
        truth_cells=512,
    )


def demo() -> Simulation:
    """Return a screen to try things on: about 120 cells a condition; a few seconds."""
    return Simulation()


def norman() -> Simulation:
    """Return a screen of the size of Norman et al. 2019, 91,000 cells x 5,000 genes; 2 minutes, 2 GiB."""
    return Simulation(
        cells=91_000,
        genes=5_000,
        singles=105,
        doubles=131,
        panel_share=0.4,
        control_share=0.08,
        truth_cells=256,
    )


def contexts() -> Simulation:
    """Return a screen of six drugs at four doses in three cell types."""
    return Simulation(
        cells=9_000,
        genes=300,
        singles=0,
        doubles=0,
        drugs=6,
        doses=(0.1, 1.0, 10.0, 100.0),
        cell_types=3,
        control_share=0.12,
    )


def interaction() -> Simulation:
    """Return a screen of which many doubles are far from the sum of their singles."""
    return Simulation(singles=16, doubles=60, interaction=2.0, effect=0.8, null_share=0.1, strength=2.2)


PRESETS = (tiny, demo, norman, contexts, interaction)
"""All presets, named as their functions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Design:
    """What is done to the regulators in each condition, and in which cell type."""

    names: tuple[str, ...]
    """Perturbations, as in ``obs["perturbation"]``."""
    types: Int[np.ndarray, "conditions"]
    """Index of the cell type."""
    push: Float[np.ndarray, "conditions slots regulators"]
    """Log fold change of the regulators by what each slot holds, at full efficacy."""
    guides: Float[np.ndarray, "conditions slots guides"]
    """Efficacy of each guide in [0, 1]; all ones for a drug, zeros for an empty slot."""
    failure: Float[np.ndarray, "conditions slots"]
    """Probability that a slot does nothing in its cell."""

    def efficacy(
        self, conditions: Int[np.ndarray, "cells"], uniform: Float[np.ndarray, "cells slots"]
    ) -> Float[np.ndarray, "cells slots"]:
        """How well the perturbation in each slot works in each cell: 0 where its guide failed."""
        failure = self.failure[conditions]
        guide = ((uniform - failure) / (1 - failure) * GUIDES).astype(int).clip(0, GUIDES - 1)
        works = np.take_along_axis(self.guides[conditions], guide[..., None], axis=2)[..., 0]
        return np.where(uniform < failure, 0.0, works)


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """All that was drawn before any cell."""

    config: Simulation
    network: Network
    design: Design
    levels: Float[np.ndarray, "levels"]
    """The values that dispersion takes."""
    level: Int[np.ndarray, "genes"]
    """Which of them each gene has."""

    def log_shares(
        self, conditions: Int[np.ndarray, "cells"], uniform: Float[np.ndarray, "cells latents"]
    ) -> Float[np.ndarray, "cells genes"]:
        """Log of the share of each gene in the RNA of cells, each made of ``LATENTS`` uniform numbers."""
        efficacy = self.design.efficacy(conditions, uniform[:, STATES + 1 :])
        push = np.einsum("cs,csr->cr", efficacy, self.design.push[conditions], optimize=True)
        return self.network.log_shares(
            push.astype(np.float32),
            ndtri(uniform[:, :STATES]).astype(np.float32),
            (2 * np.pi * uniform[:, STATES]).astype(np.float32),
            self.design.types[conditions],
        )


def simulate(config: Simulation) -> ad.AnnData:
    """Draw a screen and compute its truth.

    ``X`` is log1p of counts per ``total`` (sparse), ``layers["counts"]`` the counts, ``obs`` has
    ``perturbation``, ``control``, ``n_counts`` (library size with the genes outside the panel),
    ``acting`` (how many of a cell's perturbations work in it) and, where there are several,
    ``cell_type``. For the truth see ``truth``.

    The same seed gives the same bits; another number of cells leaves the truth as it is.
    """
    world_seed, cell_seed = np.random.SeedSequence(config.seed).spawn(2)
    world = _draw_world(config, np.random.default_rng(world_seed))
    rng = np.random.default_rng(cell_seed)
    conditions = _assign(world, rng)
    library = np.exp(rng.normal(np.log(config.depth), config.depth_spread, config.cells)).round()
    uniform = rng.random((config.cells, LATENTS))
    counts = _draw_counts(world, conditions, uniform, library, rng)
    logged = counts.copy()
    logged.data = np.log1p(logged.data * np.repeat(config.total / library, np.diff(counts.indptr)))
    logged.data = logged.data.astype(np.float32)
    expected_log1p, expected = _truth(world)
    return ad.AnnData(
        X=logged,
        obs=_obs(world, conditions, uniform, library),
        var=pd.DataFrame(index=gene_names(config)),
        layers={"counts": counts},
        varm={"truth_log1p": expected_log1p, "truth": expected},
        uns={"simulation": _plain(world)},
    )


def truth(screen: ad.AnnData, *, logged: bool = True) -> pd.DataFrame:
    """Read the noise-free expectation of every condition of a simulated screen.

    Parameters
    ----------
    screen
        As ``simulate`` made it, or read from a file; a selection of genes or cells will do.
    logged
        The expectation of ``X``, which is not the logarithm of an expectation. If False, the
        expectation of the counts per ``total``.

    Returns
    -------
    Conditions x genes. A condition is named by its perturbation; where there are several cell types,
    by ``perturbation | cell type``.

    Raises
    ------
    UserError
        If the screen was not simulated.
    """
    key = "truth_log1p" if logged else "truth"
    if key not in screen.varm or "simulation" not in screen.uns:
        raise UserError(
            "The screen has no truth",
            expected="a screen that knockon simulated",
            mend="make one with knockon simulate",
        )
    names = [str(name) for name in screen.uns["simulation"]["conditions"]]
    values = np.asarray(screen.varm[key])
    return pd.DataFrame(values.T, index=pd.Index(names, name="condition"), columns=screen.var_names)


def gene_names(config: Simulation) -> list[str]:
    """Names of the panel, regulators first."""
    width = len(str(config.genes))
    regulators = [f"TF{number:0{width}d}" for number in range(1, config.regulators + 1)]
    others = range(config.regulators + 1, config.genes + 1)
    return regulators + [f"GENE{number:0{width}d}" for number in others]


def expected_log1p(
    mean: Float[np.ndarray, "..."], dispersion: Float[np.ndarray, "..."], scale: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Expectation of ``log1p(scale * count)`` for negative binomial counts; arguments broadcast.

    log(1 + x) is the integral over t > 0 of (exp(-t) - exp(-t (1 + x))) / t, and the expectation of the
    second term is the Laplace transform of the count, known in closed form. The trapezoidal rule in log
    t converges exponentially; this step gives about 1e-7.

    Parameters
    ----------
    mean
        Of the count.
    dispersion
        Positive; the variance of the count is ``mean + dispersion * mean**2``.
    scale
        What one count is worth.
    """
    step = 0.5
    total = np.zeros(np.broadcast_shapes(mean.shape, dispersion.shape, scale.shape))
    for log_t in np.arange(-26.0, 4.0, step):
        t = np.exp(log_t)
        log_transform = -np.log1p(dispersion * mean * -np.expm1(-scale * t)) / dispersion
        total -= step * np.exp(-t) * np.expm1(log_transform)
    return total


def _draw_world(config: Simulation, rng: np.random.Generator) -> World:
    network = draw_network(config.shape, rng)
    # Rare genes are noisier than the Poisson part of their variance explains; so are single genes.
    mean = np.exp(network.base) * config.panel_share * config.depth
    dispersion = (config.dispersion + 0.08 / np.sqrt(mean)) * rng.lognormal(0.0, 0.4, config.genes)
    dispersion = dispersion.clip(0.05, 5.0)
    levels = np.geomspace(dispersion.min(), dispersion.max(), LEVELS)
    level = np.abs(np.log(dispersion)[:, None] - np.log(levels)).argmin(1)
    return World(config=config, network=network, design=_draw_design(config, rng), levels=levels, level=level)


def _draw_design(config: Simulation, rng: np.random.Generator) -> Design:
    sign = 1.0 if config.mode == "activation" else -1.0
    genes = gene_names(config)[: config.singles + config.orphans]
    drugs = _draw_drugs(config, rng)
    treatments: list[tuple[str, ...]] = [(), *((gene,) for gene in genes[: config.singles])]
    treatments += [(genes[i], genes[j]) for i, j in _draw_doubles(config, rng)]
    efficacies = dict(zip(genes, rng.uniform(0.6, 1.0, (len(genes), GUIDES)), strict=True))
    treatments += [(drug,) for drug in drugs]
    push = np.zeros((len(treatments), SLOTS, config.regulators))
    guides = np.zeros((len(treatments), SLOTS, GUIDES))
    failure = np.zeros((len(treatments), SLOTS))
    for row, treatment in enumerate(treatments):
        for slot, name in enumerate(treatment):
            if name in drugs:
                push[row, slot] = drugs[name]
                guides[row, slot] = 1.0
            else:
                push[row, slot, genes.index(name)] = sign * config.strength
                guides[row, slot] = efficacies[name]
                failure[row, slot] = 1 - config.penetrance
    copies = config.cell_types
    return Design(
        names=tuple("+".join(treatment) or CONTROL for treatment in treatments) * copies,
        types=np.repeat(np.arange(copies), len(treatments)),
        push=np.tile(push, (copies, 1, 1)),
        guides=np.tile(guides, (copies, 1, 1)),
        failure=np.tile(failure, (copies, 1)),
    )


def _draw_doubles(config: Simulation, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs of perturbed genes; every orphan has one, and none has two orphans."""
    pairs = [
        pair for pair in combinations(range(config.singles + config.orphans), 2) if pair[0] < config.singles
    ]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    first = {second: (one, second) for one, second in reversed(order) if second >= config.singles}
    rest = [pair for pair in order if pair not in first.values() and pair[1] < config.singles]
    return sorted([*first.values(), *rest][: config.doubles])


def _draw_drugs(config: Simulation, rng: np.random.Generator) -> dict[str, Float[np.ndarray, "regulators"]]:
    """Each drug moves three regulators, mostly downwards, along a Hill curve in its dose."""
    free = np.arange(config.singles + config.orphans, config.regulators)
    drugs = {}
    for letters in list(string.ascii_uppercase)[: config.drugs]:
        targets = rng.choice(free, 3, replace=False)
        effect = np.where(rng.random(3) < 0.7, -1.0, 1.0) * config.strength * rng.uniform(0.6, 1.2, 3)
        half, slope = np.exp(rng.uniform(*np.log([config.doses[0], config.doses[-1]]))), rng.uniform(1, 2)
        for dose in config.doses:
            push = np.zeros(config.regulators)
            push[targets] = effect * dose**slope / (dose**slope + half**slope)
            drugs[f"drug{letters}@{dose:g}uM"] = push
    return drugs


def _assign(world: World, rng: np.random.Generator) -> Int[np.ndarray, "cells"]:
    """Condition of each cell, in random order; every condition has at least two cells."""
    config, design = world.config, world.design
    weight = np.exp(rng.normal(0.0, config.unevenness, config.conditions))
    control = np.array([name == CONTROL for name in design.names])
    if not control.all():
        weight[~control] *= (1 - config.control_share) / weight[~control].sum()
        weight[control] *= config.control_share / weight[control].sum()
    weight /= weight.sum()
    share = weight * (config.cells - 2 * config.conditions)
    sizes = 2 + share.astype(int)
    sizes[np.argsort(share.astype(int) - share)[: config.cells - sizes.sum()]] += 1
    return rng.permutation(np.repeat(np.arange(config.conditions), sizes))


def _chunks(cells: int, genes: int) -> Iterator[slice]:
    step = max(1, CHUNK // genes)
    for start in range(0, cells, step):
        yield slice(start, min(start + step, cells))


def _draw_counts(
    world: World,
    conditions: Int[np.ndarray, "cells"],
    uniform: Float[np.ndarray, "cells latents"],
    library: Float[np.ndarray, "cells"],
    rng: np.random.Generator,
) -> sp.csr_matrix:
    """Negative binomial counts, as gamma mixtures of Poisson counts; float32."""
    config = world.config
    shape = (1 / world.levels[world.level]).astype(np.float32)
    blocks = []
    for rows in _chunks(config.cells, config.genes):
        rate = np.exp(world.log_shares(conditions[rows], uniform[rows]))
        rate *= config.panel_share * library[rows, None].astype(np.float32)
        rate *= rng.standard_gamma(np.broadcast_to(shape, rate.shape), dtype=np.float32) / shape
        blocks.append(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    return sp.csr_matrix(sp.vstack(blocks, format="csr"))


def _truth(
    world: World,
) -> tuple[Float[np.ndarray, "genes conditions"], Float[np.ndarray, "genes conditions"]]:
    """Expectation of ``X`` and of counts per ``total``, as float32."""
    config = world.config
    grid, table = _log1p_table(world)
    table, offset = table.ravel(), (world.level * len(grid)).astype(np.int32)
    uniform = _lattice(config.truth_cells, LATENTS)
    logged = np.zeros((config.genes, config.conditions), np.float32)
    plain = np.zeros_like(logged)
    for condition in range(config.conditions):
        for rows in _chunks(config.truth_cells, config.genes):
            part = uniform[rows]
            log_share = world.log_shares(np.full(len(part), condition), part)
            log_share += np.float32(np.log(config.panel_share))
            plain[:, condition] += np.exp(log_share).sum(0) * config.total / config.truth_cells
            place = ((log_share - grid[0]) / (grid[1] - grid[0])).clip(0, len(grid) - 1.001)
            index = place.astype(np.int32)
            place -= index
            index += offset
            value = table[index] * (1 - place) + table[index + 1] * place
            logged[:, condition] += value.sum(0) / config.truth_cells
    return logged, plain


def _log1p_table(
    world: World,
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "levels points"]]:
    """Expectation of ``X`` over library sizes and counts, for each dispersion and log share of a gene."""
    config = world.config
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    library = config.depth * np.exp(config.depth_spread * nodes)
    coarse = np.arange(-21.0, 0.2, 0.2)
    mean = np.exp(coarse) * library[:, None, None]
    scale = config.total / library[:, None, None]
    value = expected_log1p(mean, world.levels[:, None], scale)
    value = np.tensordot(weights / weights.sum(), value, 1)
    grid = np.linspace(coarse[0], coarse[-1], 2_000)
    return grid.astype(np.float32), CubicSpline(coarse, value, axis=1)(grid).astype(np.float32)


def _lattice(points: int, dimensions: int) -> Float[np.ndarray, "points dimensions"]:
    """Evenly spread points of the unit cube: the additive recurrence of the generalized golden ratio."""
    ratio = 2.0
    for _ in range(60):
        ratio = (1 + ratio) ** (1 / (dimensions + 1))
    steps = ratio ** -np.arange(1.0, dimensions + 1)
    return (0.5 + np.arange(1, points + 1)[:, None] * steps) % 1


def _obs(
    world: World,
    conditions: Int[np.ndarray, "cells"],
    uniform: Float[np.ndarray, "cells latents"],
    library: Float[np.ndarray, "cells"],
) -> pd.DataFrame:
    design = world.design
    names = pd.Categorical(np.array(design.names)[conditions])
    obs = {"perturbation": names, "control": np.array(names == CONTROL)}
    if world.config.cell_types > 1:
        obs["cell_type"] = pd.Categorical([f"type{n + 1}" for n in design.types[conditions]])
    obs["n_counts"] = library.astype(np.int32)
    obs["acting"] = (design.efficacy(conditions, uniform[:, STATES + 1 :]) > 0).sum(1)
    return pd.DataFrame(obs, index=[f"cell{n}" for n in range(1, len(conditions) + 1)])


def _plain(world: World) -> dict[str, object]:
    """Describe the simulation in values that an .h5ad holds."""
    names = list(world.design.names)
    if world.config.cell_types > 1:
        names = [f"{name} | type{n + 1}" for name, n in zip(names, world.design.types, strict=True)]
    config = asdict(world.config) | {"doses": np.array(world.config.doses)}
    return config | {"conditions": np.array(names, dtype=object)}
