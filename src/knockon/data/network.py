"""A gene regulatory network: what a simulated cell expresses, given what was done to it.

Regulators (the perturbed genes among them) drive programs through Hill curves, programs feed back on
regulators, and both move genes within a limited range. Nothing here knows of pairs: that doubles
buffer, mask or enhance each other follows from thresholds, saturation and gates.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Int
from scipy.special import expit

ROUNDS = 40
"""Rounds of the fixed point; the loop gain of 0.6 leaves less than 1e-5 of the first step."""
DAMPING = 0.7
"""Share of the way to the new activity in each round."""
LOOP_GAIN = 0.6
"""Bound on how much a change of the programs comes back to them through the regulators."""
STATES = 3
"""Dimensions of the continuous state of a cell, without its cell cycle."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes and strengths that a network is drawn with; every share lies in [0, 1]."""

    genes: int
    """Genes of the panel; the first ones are the regulators."""
    regulators: int
    """Regulators, at most ``genes``."""
    perturbed: int
    """The first regulators, which the screen perturbs."""
    programs: int
    """Programs that regulators act through."""
    cell_types: int = 1
    """Cell types, which differ in base expression and in how close a program is to its threshold."""
    null_share: float = 0.35
    """Share of the perturbed regulators that act on nothing."""
    effect: float = 0.5
    """Standard deviation of a program's loadings: log fold change of a gene at activity 1."""
    interaction: float = 1.5
    """Hill coefficient of every response; towards 0 all effects add up in log expression."""
    gate_share: float = 0.3
    """Share of the programs that need two groups of regulators at once (AND)."""
    abundance_spread: float = 2.2
    """Standard deviation of the log of base expression over genes."""
    state_spread: float = 0.4
    """Log-scale effect of a unit of cell state on the genes that it moves, and on drives."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """Weights of the network; log scale is natural, and 0 is the untreated cell of average state."""

    interaction: float
    base: Float[np.ndarray, "genes"]
    """Log of a gene's share of the panel in the average untreated cell; the shares sum to 1."""
    types: Float[np.ndarray, "types genes"]
    """Log-scale difference of each cell type from ``base``."""
    type_drive: Float[np.ndarray, "types programs"]
    """What the cell type adds to each program's drive."""
    states: Float[np.ndarray, "features genes"]
    """Loadings of the cell state and of the cosine and sine of the cell cycle."""
    state_drive: Float[np.ndarray, "states programs"]
    """What the cell state adds to each program's drive."""
    inputs: Float[np.ndarray, "2 regulators programs"]
    """Weights of the regulators in the two factors of each program."""
    threshold: Float[np.ndarray, "programs"]
    """Drive of half activity: where it is high inputs enhance each other, where it is low they buffer."""
    gain: Float[np.ndarray, "programs"]
    """Activity of a program for each unit of the product of its two factors."""
    feedback: Float[np.ndarray, "programs regulators"]
    """Log fold change of a regulator at activity 1 of a program."""
    loadings: Float[np.ndarray, "programs genes"]
    """Log fold change of a gene at activity 1 of a program."""
    direct: sp.csr_matrix
    """Regulators x genes: log fold change of a gene for each log unit of the regulator."""
    reach: Float[np.ndarray, "genes"]
    """Largest log fold change that regulation can give a gene."""

    @property
    def active(self) -> Bool[np.ndarray, "regulators"]:
        """Regulators that act on anything but themselves."""
        return np.asarray(self.inputs.any((0, 2)))

    def respond(
        self, first: Float[np.ndarray, "cells programs"], second: Float[np.ndarray, "cells programs"]
    ) -> Float[np.ndarray, "cells programs"]:
        """Activity of each program: a product of two Hill curves in its inputs, 0 without drive.

        A program without a gate has no second input, so that its second factor is a constant.
        """
        return self.gain * (_hills(self.interaction, self.threshold, first, second) - self._rest)

    @property
    def _rest(self) -> Float[np.ndarray, "programs"]:
        nothing = np.zeros_like(self.threshold)
        return _hills(self.interaction, self.threshold, nothing, nothing)

    def settle(
        self, push: Float[np.ndarray, "cells regulators"], drive: Float[np.ndarray, "cells programs"]
    ) -> tuple[Float[np.ndarray, "cells regulators"], Float[np.ndarray, "cells programs"]]:
        """Log fold changes of the regulators and activities of the programs at steady state.

        Parameters
        ----------
        push
            Log fold change of each regulator by the perturbation alone.
        drive
            What cell state and cell type add to the drive of each program.
        """
        activity = np.zeros_like(drive)
        for _ in range(ROUNDS):
            regulators = push + activity @ self.feedback
            goal = self.respond(regulators @ self.inputs[0] + drive, regulators @ self.inputs[1])
            activity += DAMPING * (goal - activity)
        return push + activity @ self.feedback, activity

    def log_abundance(
        self,
        push: Float[np.ndarray, "cells regulators"],
        state: Float[np.ndarray, "cells states"],
        phase: Float[np.ndarray, "cells"],
        cell_type: Int[np.ndarray, "cells"],
    ) -> Float[np.ndarray, "cells genes"]:
        """Log of the abundance of each gene in each cell at steady state, as in ``base``.

        Parameters
        ----------
        push
            See ``settle``.
        state, phase
            Position of the cell: standard normal, and the angle in its cell cycle.
        cell_type
            Index of the cell type.
        """
        drive = state @ self.state_drive + self.type_drive[cell_type]
        regulators, activity = self.settle(push, drive)
        pull = activity @ self.loadings + regulators @ self.direct
        bend = self.interaction / self.reach
        out = np.tanh(pull * bend, out=pull) / bend
        out += np.column_stack([state, np.cos(phase), np.sin(phase)]).astype(np.float32) @ self.states
        out += (self.base + self.types)[cell_type]
        out[:, : push.shape[1]] += regulators
        return out


def draw_network(shape: Shape, rng: np.random.Generator) -> Network:
    """Draw a network; every array is float32."""
    # Below 1e-3 the responses are straight lines in float32 anyway, and 0 would divide by 0.
    interaction = max(shape.interaction, 1e-3)
    potency = rng.lognormal(0.0, 0.5, shape.regulators)
    silent = rng.permutation(shape.perturbed)[: round(shape.null_share * shape.perturbed)]
    potency[silent] = 0.0
    base = rng.normal(0.0, shape.abundance_spread, shape.genes)
    # Perturbed genes are well seen and not dominant, so that their own change shows.
    base[: shape.regulators] = 0.3 * base[: shape.regulators] + 1.5
    base -= np.log(np.exp(base).sum())
    inputs = _inputs(shape, potency, rng)
    threshold = rng.uniform(-0.5, 2.5, shape.programs)
    gain, steepest = _gain(interaction, threshold, inputs[1].any(0))
    weights = {
        "base": base,
        "types": _types(shape, rng),
        "type_drive": rng.normal(0.0, 0.8, (shape.cell_types, shape.programs)) * (shape.cell_types > 1),
        "states": _states(shape, rng),
        "state_drive": rng.normal(0.0, 0.75 * shape.state_spread, (STATES, shape.programs)),
        "inputs": inputs,
        "threshold": threshold,
        "gain": gain,
        "feedback": _feedback(shape, steepest[:, None] * np.abs(inputs).sum(0).T, rng),
        "loadings": _sparse_normal((shape.programs, shape.genes), 0.12, shape.effect, rng),
        "reach": rng.uniform(2.0, 5.0, shape.genes),
    }
    direct = potency[:, None] * _sparse_normal((shape.regulators, shape.genes), 0.02, 0.4, rng)
    return Network(
        interaction=interaction,
        direct=sp.csr_matrix(direct.astype(np.float32)),
        **{name: value.astype(np.float32) for name, value in weights.items()},
    )


def _hills(
    steepness: float,
    threshold: Float[np.ndarray, "programs"],
    first: Float[np.ndarray, "*cells programs"],
    second: Float[np.ndarray, "*cells programs"],
) -> Float[np.ndarray, "*cells programs"]:
    """Multiply two Hill curves x**n / (x**n + k**n), given log x, log k and n."""
    return expit(steepness * (first - threshold)) * expit(steepness * (second - threshold))


def _gain(
    steepness: float, threshold: Float[np.ndarray, "programs"], gated: Bool[np.ndarray, "programs"]
) -> tuple[Float[np.ndarray, "programs"], Float[np.ndarray, "programs"]]:
    """Scale programs so that a drive of 2, up or down, gives an activity of at most 2 per factor.

    Returns the gains, and the steepest slope of activity on drive.
    """
    drive = np.full_like(threshold, 2.0)
    nothing = np.zeros_like(threshold)
    levels = [_hills(steepness, threshold, x, np.where(gated, x, 0.0)) for x in (-drive, nothing, drive)]
    gain = np.where(gated, 2 * drive, drive) / np.maximum(levels[2] - levels[1], levels[1] - levels[0])
    other = np.where(gated, 1.0, expit(-steepness * threshold))
    return gain, gain * other * steepness / 4


def _sparse_normal(
    size: tuple[int, int], share: float, spread: float, rng: np.random.Generator
) -> Float[np.ndarray, "rows columns"]:
    return rng.normal(0.0, spread, size) * (rng.random(size) < share)


def _inputs(
    shape: Shape, potency: Float[np.ndarray, "regulators"], rng: np.random.Generator
) -> Float[np.ndarray, "2 regulators programs"]:
    """Each regulator acts on two to four programs, mostly upwards; on one side of a gate."""
    inputs = np.zeros((2, shape.regulators, shape.programs))
    gated = rng.random(shape.programs) < shape.gate_share
    for regulator in range(shape.regulators):
        size = min(int(rng.integers(2, 5)), shape.programs)
        chosen = rng.choice(shape.programs, size, replace=False)
        side = np.where(gated[chosen], rng.integers(0, 2, size), 0)
        sign = np.where(rng.random(size) < 0.7, 1.0, -1.0)
        inputs[side, regulator, chosen] = sign * rng.uniform(0.4, 1.0, size) * potency[regulator]
    return inputs


def _feedback(
    shape: Shape, steepest: Float[np.ndarray, "programs regulators"], rng: np.random.Generator
) -> Float[np.ndarray, "programs regulators"]:
    """Sparse feedback, scaled down until the fixed point is unique even where slopes are steepest."""
    feedback = _sparse_normal((shape.programs, shape.regulators), 0.1, 0.3, rng)
    loop = np.linalg.norm(np.abs(feedback) @ steepest.T, 2)
    return feedback * min(1.0, LOOP_GAIN / max(loop, 1e-9))


def _types(shape: Shape, rng: np.random.Generator) -> Float[np.ndarray, "types genes"]:
    """Cell types differ in a quarter of the genes; a single type is the base itself."""
    return _sparse_normal((shape.cell_types, shape.genes), 0.25, 1.0, rng) * (shape.cell_types > 1)


def _states(shape: Shape, rng: np.random.Generator) -> Float[np.ndarray, "features genes"]:
    """Three state axes move a fifth of the genes each, and the cycle a tenth."""
    axes = _sparse_normal((STATES, shape.genes), 0.2, shape.state_spread, rng)
    # Two groups of cycle genes with opposite peaks, as in S and G2/M phase.
    peak = rng.choice([0.0, 0.8 * np.pi], shape.genes) + rng.normal(0.0, 0.3, shape.genes)
    height = 2 * np.abs(_sparse_normal((1, shape.genes), 0.1, shape.state_spread, rng))
    return np.concatenate([axes, height * np.cos(peak), height * np.sin(peak)])
