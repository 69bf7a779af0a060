"""How good a model is on validation conditions, by which training chooses weights and stops.

What a trained model generates can be corrected by training conditions, and chosen by those of validation.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from knockon import devices
from knockon.data.sampler import Sampler
from knockon.data.screen import Screen
from knockon.data.split_file import Split
from knockon.dynamics.discrepancy import energy_distance
from knockon.model import Model, Training, device_of
from knockon.nn.counts import normalized
from knockon.predict import draw
from knockon.types import CellSets, Label, Spec

CONDITIONS = 8
"""Conditions that a validation generates at most; the first of the split's."""
CORRECTED, CORRECTED_VALUES = 32, 2**25
"""Training conditions that a correction looks at, drawn at random, and values in all, at most."""
CELLS = 64
"""Cells of a condition that a correction or a choice looks at, at most."""
MOST = 4096
"""Real cells of a condition that generated ones are compared with, at most."""
BATCHES = 8
"""Batches that a validation by the loss takes."""


Score = Callable[[Model], float]
"""Scores a model on validation conditions; lower is better."""


def score_by(
    screen: Screen, spec: Spec, labels: tuple[Label, ...], training: Training, device: torch.device
) -> Score:
    """Make the score that a training asks for; what it needs of the screen is made once.

    Cells are generated as they are before ``finish`` corrects and chooses.
    """
    if training.validate_by == "cells" or not labels:
        return lambda model: _distance_to(model, screen, labels, training)
    sampler = Sampler(
        screen, spec, conditions=labels, sets=training.sets, cells=training.cells, seed=training.seed,
        device=device, by_cells=training.by_cells,
    )  # fmt: skip
    return lambda model: _loss_on(model, sampler, torch.Generator(device).manual_seed(training.seed))


@torch.no_grad()
def finish(model: Model, screen: Screen, split: Split, seed: int) -> None:
    """Let a trained model correct what it generates, and choose what is left to choose.

    By cells of training conditions (control cells, where there are no others), and of validation conditions.
    """
    labels = split.train or screen.controls
    drawn = np.random.default_rng(seed).permutation(len(labels))[:CORRECTED]  # in order, contexts alternate
    few = max(2, min(CELLS, CORRECTED_VALUES // (CORRECTED * len(screen.genes))))
    model.eval().correct(_sets(model, screen, [labels[i] for i in drawn], seed, few), seed)
    some = [label for label in split.validation if len(screen.rows[label]) > 1][:CONDITIONS]
    model.choose(list(_sets(model, screen, some, seed, CELLS)), seed)


def _sets(model: Model, screen: Screen, labels: Sequence[Label], seed: int, cells: int) -> Iterator[CellSets]:
    """Draw cells of each condition, so many at most, and as many control cells."""
    rng, device = np.random.default_rng(seed), device_of(model)
    for label in labels:
        target = rng.permutation(screen.rows[label])[:cells]
        control = rng.choice(screen.control_rows(label), len(target))
        both = (torch.from_numpy(screen.gather(rows))[None].to(device) for rows in (control, target))
        condition = model.spec.encode([label]).to(device)
        yield CellSets(control=next(both), target=next(both), condition=condition)


def _distance_to(model: Model, screen: Screen, labels: tuple[Label, ...], training: Training) -> float:
    """Mean energy distance between generated and real cells of validation conditions.

    Counts are compared as log1p of counts per 10,000. Of large conditions a part is drawn, always the same.
    Processes share the conditions.
    """
    distances = []
    for label in devices.share(labels[:CONDITIONS]):
        ((drawn, _),) = draw(model, screen, [label], cells=training.validate_cells, seed=training.seed)
        rows = screen.rows[label]
        if len(rows) > MOST:
            rows = np.random.default_rng(training.seed).choice(rows, MOST, replace=False)
        both = drawn, torch.from_numpy(screen.gather(rows)).to(drawn.device)
        if model.units == "counts":
            both = tuple(normalized(x) for x in both)
        distances.append(float(energy_distance(both[0], both[1])))
    distances = devices.joined_on_first(distances)
    return devices.on_first(lambda: float(np.mean(distances)))


@torch.no_grad()
def _loss_on(model: Model, sampler: Sampler, rng: torch.Generator) -> float:
    """Mean loss on cells of validation conditions, with the same draws each time and without dropout."""
    model.eval()  # in training, models may take conditions for ones that training has
    losses = [float(model.loss(sampler.batch(i), rng)["total"]) for i in range(BATCHES)]
    return devices.on_first(lambda: float(np.mean(losses)))  # processes must not differ in the last bit
