"""What changes with the steps of training: the learning rate, the averaging of weights, the seed."""

import math

import numpy as np

from knockon.model import Training


def learning_rate(step: int, training: Training) -> float:
    """Learning rate of an update, counted from 0: a linear rise, a plateau, then constant or a half cosine.

    The cosine reaches its end at update ``steps``, which is one after the last.
    """
    if step < training.warmup:
        share = step / training.warmup
        begin = (1 - share) * training.warmup_from or 1 / training.warmup
        return training.lr * (share + begin)
    begin = training.warmup + int(training.plateau * training.steps)
    if training.schedule == "constant" or step < begin:
        return training.lr
    progress = (step - begin) / max(1, training.steps - begin)
    if training.schedule == "root":
        return training.lr + (training.final_lr - training.lr) * math.sqrt(min(1.0, progress))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    if training.schedule == "floored_cosine":
        return max(training.final_lr, training.lr * cosine)
    return training.final_lr + (training.lr - training.final_lr) * cosine


def decay(step: int, training: Training) -> float:
    """Share of the averaged weights that update ``step``, counted from 0, keeps; 1 leaves them alone."""
    averaged = step - training.ema_start
    if step % training.ema_every:
        return 1.0
    if averaged < 0:
        return 0.0
    if training.ema_ramp == "rational":
        return min(training.ema, (1 + averaged) / (10 + averaged))
    if training.ema_ramp == "power":
        return min(training.ema, 1 - (1 + averaged) ** (-2 / 3))
    return training.ema if averaged else 0.0


def seed_of(seed: int, step: int, batch: int) -> int:
    """Seed of the noise of one of a step's batches; each of them has its own."""
    return int(np.random.SeedSequence([seed, step, batch]).generate_state(1, np.uint64)[0] >> 1)
