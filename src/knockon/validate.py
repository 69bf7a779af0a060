"""How good a model is on validation conditions, by which training chooses weights and stops."""

import numpy as np
import torch

from knockon.data.sampler import Sampler
from knockon.data.screen import Screen
from knockon.dynamics.discrepancy import energy_distance
from knockon.model import Model, Training
from knockon.predict import draw
from knockon.types import Label

CONDITIONS = 8
"""Conditions that a validation generates at most; the first of the split's."""
BATCHES = 8
"""Batches that a validation by the loss takes."""


def score(model: Model, screen: Screen, labels: tuple[Label, ...], training: Training) -> float:
    """Score on validation conditions; lower is better."""
    by = _loss_on if training.validate_by == "loss" else _distance_to
    return by(model, screen, labels, training)


def _distance_to(model: Model, screen: Screen, labels: tuple[Label, ...], training: Training) -> float:
    """Mean energy distance between generated and real cells of validation conditions.

    Counts are compared as log1p of counts per 10,000.
    """
    distances = []
    for label in labels[:CONDITIONS]:
        ((drawn, _),) = draw(model, screen, [label], cells=training.validate_cells, seed=training.seed)
        both = drawn, torch.from_numpy(screen.cells_of(label)).to(drawn.device)
        if model.units == "counts":
            both = tuple((1e4 * x / x.sum(-1, keepdim=True).clamp_min(1)).log1p() for x in both)
        distances.append(float(energy_distance(both[0], both[1])))
    return float(np.mean(distances))


@torch.no_grad()
def _loss_on(model: Model, screen: Screen, labels: tuple[Label, ...], training: Training) -> float:
    """Mean loss on cells of validation conditions, with the same draws each time."""
    device = next(model.parameters()).device
    sampler = Sampler(
        screen, model.spec, conditions=labels, sets=training.sets, cells=training.cells, seed=training.seed,
        device=device, by_cells=training.by_cells,
    )  # fmt: skip
    rng = torch.Generator(device).manual_seed(training.seed)
    return float(np.mean([float(model.loss(sampler.batch(i), rng)["total"]) for i in range(BATCHES)]))
