"""What a simulated screen does to its cells: its configuration, and what each condition pushes."""

import string
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from knockon.data.network import Shape
from knockon.types import CONTROL, UserError

SLOTS = 2
"""Perturbations that one cell can carry."""
GUIDES = 3
"""Guides of a perturbed gene, each with its own strength."""


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
    interaction: float = 1.5
    """Steepness of the responses: 0 lets perturbations add up in log expression."""
    gate_share: float = 0.3
    """Share of the programs that need two groups of regulators at once."""
    control_share: float = 0.1
    """Share of the cells that are control cells."""
    unevenness: float = 0.3
    """Standard deviation of the log of the number of cells of a condition."""
    depth: float = 12_000.0
    """Median library size: counts of a cell over all genes, those outside the panel included."""
    depth_spread: float = 0.45
    """Standard deviation of the log of the library size."""
    panel_share: float = 0.03
    """Share of a library that falls on the panel."""
    abundance_spread: float = 2.2
    """Standard deviation of the log of base expression over genes."""
    dispersion: float = 0.1
    """Dispersion of the counts of highly expressed genes; rare genes have more."""
    state_spread: float = 0.4
    """How strongly cell state and cell cycle show in the genes that they move."""
    total: float = 10_000.0
    """What the counts of a cell are normalized to before log1p."""
    truth_cells: int = 2_048
    """Points of the integral over cells that gives the truth; rounded up to a power of two."""
    seed: int = 0
    """Seed of everything drawn."""

    def __post_init__(self) -> None:
        perturbed = self.singles + self.orphans
        pairs = perturbed * (perturbed - 1) // 2 - self.orphans * (self.orphans - 1) // 2
        if not 0 < self.penetrance <= 1:
            raise UserError(f"Penetrance is {self.penetrance}", expected="a probability above 0")
        if self.drugs > len(string.ascii_uppercase) or min(self.doses, default=0) <= 0:
            raise UserError(
                f"{self.drugs} drugs at doses {self.doses}",
                expected=f"at most {len(string.ascii_uppercase)} drugs at positive doses",
            )
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
            programs=min(3 + self.regulators // 8, 30),
            cell_types=self.cell_types,
            null_share=self.null_share,
            effect=self.effect,
            interaction=self.interaction,
            gate_share=self.gate_share,
            abundance_spread=self.abundance_spread,
            state_spread=self.state_spread,
        )


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


def gene_names(config: Simulation) -> list[str]:
    """Names of the panel, regulators first."""
    width = len(str(config.genes))
    regulators = [f"TF{number:0{width}d}" for number in range(1, config.regulators + 1)]
    others = range(config.regulators + 1, config.genes + 1)
    return regulators + [f"GENE{number:0{width}d}" for number in others]


def draw_design(
    config: Simulation, active: Bool[np.ndarray, "regulators"], rng: np.random.Generator
) -> Design:
    """Choose doubles, drugs and guides for a network in which these regulators act on anything."""
    sign = 1.0 if config.mode == "activation" else -1.0
    genes = gene_names(config)[: config.singles + config.orphans]
    drugs = _draw_drugs(config, rng)
    treatments: list[tuple[str, ...]] = [(), *((gene,) for gene in genes[: config.singles])]
    treatments += [(genes[i], genes[j]) for i, j in _draw_doubles(config, active, rng)]
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


def _draw_doubles(
    config: Simulation, active: Bool[np.ndarray, "regulators"], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Pairs of perturbed genes; every orphan has one, and none has two orphans.

    Like people who design screens, prefer genes that do something.
    """
    pairs = [
        pair for pair in combinations(range(config.singles + config.orphans), 2) if pair[0] < config.singles
    ]
    weight = np.array([4.0 if active[one] and active[two] else 1.0 for one, two in pairs])
    order = [pairs[i] for i in np.argsort(rng.exponential(1.0, len(pairs)) / weight)]
    first = {second: (one, second) for one, second in reversed(order) if second >= config.singles}
    rest = [pair for pair in order if pair not in first.values() and pair[1] < config.singles]
    return sorted([*first.values(), *rest][: config.doubles])


def _draw_drugs(config: Simulation, rng: np.random.Generator) -> dict[str, Float[np.ndarray, "regulators"]]:
    """Each drug moves three regulators, mostly downwards, along a Hill curve in its dose."""
    free = np.arange(config.singles + config.orphans, config.regulators)
    drugs = {}
    for letter in string.ascii_uppercase[: config.drugs]:
        targets = rng.choice(free, 3, replace=False)
        effect = np.where(rng.random(3) < 0.7, -1.0, 1.0) * config.strength * rng.uniform(0.6, 1.2, 3)
        half, slope = np.exp(rng.uniform(*np.log([config.doses[0], config.doses[-1]]))), rng.uniform(1, 2)
        for dose in config.doses:
            push = np.zeros(config.regulators)
            push[targets] = effect * dose**slope / (dose**slope + half**slope)
            drugs[f"drug{letter}@{dose:g}uM"] = push
    return drugs
