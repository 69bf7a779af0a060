"""Screens with a known truth: cells drawn from a regulatory network, and what each condition expects.

The truth is not an average over the cells of the file. It is the expectation of the model itself over
cell states, guides that failed, library sizes and count noise, so a prediction can be scored free of noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.special import ndtri

from knockon.data.design import SLOTS, Design, Simulation, draw_design, gene_names
from knockon.data.expectation import CountModel, LogMean, fill_cube
from knockon.data.network import STATES, Network, draw_network
from knockon.types import CONTROL, UserError

LATENTS = STATES + 1 + SLOTS
"""Uniform numbers that make a cell: its state, its place in the cycle, the guide in each slot."""
LEVELS = 16
"""Different values that the dispersion of genes takes."""
CHUNK = 1_000_000
"""Values of a dense block of cells x genes (a few copies of it are alive at once)."""


def tiny() -> Simulation:
    """Return a screen for tests: few genes, strong effects, about 40 cells a condition; 0.2 s."""
    return Simulation(
        cells=800,
        genes=80,
        singles=8,
        doubles=8,
        strength=2.2,
        effect=0.9,
        null_share=0.15,
        penetrance=0.95,
        panel_share=0.025,
        abundance_spread=1.0,
        truth_cells=1_024,
    )


def demo() -> Simulation:
    """Return a screen to try things on: about 120 cells a condition; a few seconds."""
    return Simulation()


def norman() -> Simulation:
    """Return a screen of the size of Norman et al. 2019; 1 to 2 minutes, 1.4 GiB."""
    return Simulation(
        cells=91_000,
        genes=5_000,
        singles=105,
        doubles=131,
        panel_share=0.2,
        abundance_spread=2.6,
        effect=0.8,
        state_spread=0.25,
        control_share=0.08,
        truth_cells=512,
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
    """Return a screen in which many doubles are far from the sum of their singles."""
    return Simulation(
        singles=16,
        doubles=60,
        strength=2.0,
        penetrance=0.95,
        null_share=0.1,
        effect=0.7,
        interaction=2.5,
        gate_share=0.6,
    )


PRESETS = (tiny, demo, norman, contexts, interaction)
"""All presets, named as their functions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """All that was drawn before any cell."""

    config: Simulation
    network: Network
    design: Design
    dispersion: Float[np.ndarray, "levels"]
    """The values that dispersion takes."""
    level: Int[np.ndarray, "genes"]
    """Which of them each gene has."""

    def log_shares(
        self, conditions: Int[np.ndarray, "cells"], uniform: Float[np.ndarray, "cells latents"]
    ) -> Float[np.ndarray, "cells genes"]:
        """Log of each gene's share of the library of cells, each made of ``LATENTS`` uniform numbers."""
        efficacy = self.design.efficacy(conditions, uniform[:, STATES + 1 :])
        push = np.einsum("cs,csr->cr", efficacy, self.design.push[conditions], optimize=True)
        return self.network.log_abundance(
            push.astype(np.float32),
            ndtri(uniform[:, :STATES]).astype(np.float32),
            (2 * np.pi * uniform[:, STATES]).astype(np.float32),
            self.design.types[conditions],
        ) + np.float32(np.log(self.config.panel_share))


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
    screen = ad.AnnData(
        X=_log1p(counts, config.total / library),
        obs=_obs(world, conditions, uniform, library),
        var=pd.DataFrame(index=pd.Index(gene_names(config))),
        layers={"counts": counts},
        uns={"simulation": dict(_plain(world))},
    )
    screen.varm["truth_log1p"], screen.varm["truth"] = _expect(world)
    return screen


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


def _draw_world(config: Simulation, rng: np.random.Generator) -> World:
    network = draw_network(config.shape, rng)
    # Rare genes are noisier than the Poisson part of their variance explains; so are single genes.
    mean = np.exp(network.base) * config.panel_share * config.depth
    wanted = (config.dispersion + 0.08 / np.sqrt(mean)) * rng.lognormal(0.0, 0.4, config.genes)
    wanted = wanted.clip(0.05, 5.0)
    dispersion = np.geomspace(wanted.min(), wanted.max(), LEVELS)
    return World(
        config=config,
        network=network,
        design=draw_design(config, network.active, rng),
        dispersion=dispersion,
        level=np.abs(np.log(wanted)[:, None] - np.log(dispersion)).argmin(1),
    )


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
    """Draw negative binomial counts, as gamma mixtures of Poisson counts; float32."""
    config = world.config
    shape = (1 / world.dispersion[world.level]).astype(np.float32)
    blocks = []
    for rows in _chunks(config.cells, config.genes):
        rate = np.exp(world.log_shares(conditions[rows], uniform[rows]))
        rate *= library[rows, None].astype(np.float32)
        rate *= rng.standard_gamma(np.broadcast_to(shape, rate.shape), dtype=np.float32) / shape
        blocks.append(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    return sp.csr_matrix(sp.vstack(blocks, format="csr"))


def _log1p(counts: sp.csr_matrix, scale: Float[np.ndarray, "cells"]) -> sp.csr_matrix:
    values = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr))).astype(np.float32)
    return sp.csr_matrix((values, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)


def _expect(
    world: World,
) -> tuple[Float[np.ndarray, "genes conditions"], Float[np.ndarray, "genes conditions"]]:
    """Compute the expectation of ``X`` and of counts per ``total``, as float32."""
    config = world.config
    model = CountModel(depth=config.depth, spread=config.depth_spread, total=config.total)
    log_mean = LogMean.tabulate(model, world.dispersion)
    uniform = fill_cube(config.truth_cells, LATENTS)
    logged = np.zeros((config.conditions, config.genes))
    plain = np.zeros_like(logged)
    for condition in range(config.conditions):
        for rows in _chunks(len(uniform), config.genes):
            part = uniform[rows]
            log_share = world.log_shares(np.full(len(part), condition), part)
            logged[condition] += log_mean.at(log_share, world.level).sum(0)
            plain[condition] += np.exp(log_share).sum(0) * config.total
    return (logged.T / len(uniform)).astype(np.float32), (plain.T / len(uniform)).astype(np.float32)


def _obs(
    world: World,
    conditions: Int[np.ndarray, "cells"],
    uniform: Float[np.ndarray, "cells latents"],
    library: Float[np.ndarray, "cells"],
) -> pd.DataFrame:
    design = world.design
    names = np.array(design.names)[conditions]
    efficacy = design.efficacy(conditions, uniform[:, STATES + 1 :])
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(names),
            "control": names == CONTROL,
            "n_counts": library.astype(np.int32),
            "acting": (efficacy > 0).sum(1),
        },
        index=pd.Index([f"cell{number}" for number in range(1, len(names) + 1)]),
    )
    if world.config.cell_types > 1:
        obs["cell_type"] = pd.Categorical([f"type{code + 1}" for code in design.types[conditions]])
    return obs


def _plain(world: World) -> Mapping[str, object]:
    """Describe the simulation in values that an .h5ad holds."""
    names = list(world.design.names)
    if world.config.cell_types > 1:
        names = [f"{name} | type{code + 1}" for name, code in zip(names, world.design.types, strict=True)]
    doses = np.array(world.config.doses)
    return asdict(world.config) | {"doses": doses, "conditions": np.array(names, dtype=object)}
