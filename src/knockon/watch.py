"""Looking on while a model is trained: nothing by default, or the time that each part takes."""

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, ParamSpec, TypeVar

import torch

from knockon.model import Training

P = ParamSpec("P")
T = TypeVar("T")
Part = Literal["step", "validation", "checkpoint"]
COLD = 2
"""Steps that come before the usual ones: what is compiled or made at the first use is in them."""
VALIDATED, SAVED, LEAST = 3, 4, 8
"""Steps after which a stopwatch sees a validation and a checkpoint, where any is due, and the fewest. There
are two checkpoints where the training would have as many, since the one before the last is kept, and both
come after a validation, whose best weights are in them."""
BRIEF, ENOUGH = 4.0, 20.0
"""Seconds of steps, or of everything, after which a stopwatch has seen enough."""


class Watch:
    """Looks on while a model is trained; this one lets everything pass."""

    def begins(self, training: Training) -> Training:
        """See a stage begin; what is returned is trained."""
        return training

    def timed(self, part: Part, work: Callable[P, T]) -> Callable[P, T]:  # noqa: ARG002
        """Look on when a part is done that is no step."""
        return work

    def goes_on(self) -> bool:
        """Whether there shall be another step; asked before each, and after the last."""
        return True


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What was seen of a stage of training.

    Parameters
    ----------
    training
        As it was asked for.
    seconds
        Of each part seen, in order.
    """

    training: Training
    seconds: dict[Part, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def measured(self) -> float:
        """Seconds of everything seen."""
        return sum(sum(seen) for seen in self.seconds.values())

    def usual(self, part: Part) -> float:
        """Seconds of one such part: the mean, of steps that of warm ones; 0 where none was seen."""
        seen = self.seconds[part]
        warm = (seen[COLD:] or seen[-1:]) if part == "step" else seen
        return statistics.fmean(warm) if warm else 0.0

    def whole(self, part: Part) -> float:
        """Seconds of all such parts of what was asked for, with what the first steps take more."""
        if part != "step":
            return self.times(part) * self.usual(part)
        cold = self.seconds["step"][:COLD]
        return sum(cold) + max(0, self.training.steps - len(cold)) * self.usual("step")

    def times(self, part: Literal["validation", "checkpoint"]) -> int:
        """How often there is one; none where none was seen, since there is nothing to validate on."""
        training = self.training
        every = training.validate_every if part == "validation" else training.checkpoint_every
        return training.steps // every if every and self.seconds[part] else 0


class Stopwatch(Watch):
    """Measures the parts of a training, and lets it end when it has seen enough of each.

    A validation and a checkpoint come within the first steps, where the training that was asked for has any.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self._last: float | None = None
        self._beside = 0.0

    def begins(self, training: Training) -> Training:
        """Hasten what is due only after many steps."""
        self.stages.append(Stage(training=training))
        self._last = None
        saved = SAVED if 2 * training.checkpoint_every <= training.steps else LEAST
        soon = {
            name: min(every, first) if every <= training.steps else 0
            for name, every, first in (
                ("validate_every", training.validate_every, VALIDATED),
                ("checkpoint_every", training.checkpoint_every, saved),
            )
        }
        return dataclasses.replace(training, patience=0, **soon)

    def timed(self, part: Part, work: Callable[P, T]) -> Callable[P, T]:
        """Take the time of a part that is no step."""

        def measured(*args: P.args, **kwargs: P.kwargs) -> T:
            began = _now()
            done = work(*args, **kwargs)
            self.stages[-1].seconds[part].append(_now() - began)
            self._beside += self.stages[-1].seconds[part][-1]
            return done

        return measured

    def goes_on(self) -> bool:
        """Take the time of a step, and end after some of them, and some seconds."""
        now, stage = _now(), self.stages[-1]
        steps = stage.seconds["step"]
        if self._last is not None:
            steps.append(now - self._last - self._beside)
        self._last, self._beside = now, 0.0
        return len(steps) < LEAST or (sum(steps[COLD:]) < BRIEF and stage.measured < ENOUGH)


def _now() -> float:
    """Seconds on the clock, once the GPU has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
