from dataclasses import replace

import pytest

from knockon import watch
from knockon.model import Training
from knockon.watch import BRIEF, LEAST, SAVED, VALIDATED, Stopwatch, Watch

ASKED = Training(steps=1000, validate_every=100, checkpoint_every=50, patience=3)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


def train(stopwatch: Stopwatch, clock: Clock, *, step: float, validation: float = 7.0) -> Training:
    """A training whose first step takes 3 s more, and whose checkpoints take 1 s."""
    training = stopwatch.begins(ASKED)
    validate = stopwatch.timed("validation", clock.passes)
    save = stopwatch.timed("checkpoint", clock.passes)
    done = 0
    while stopwatch.goes_on() and done < training.steps:
        clock.passes(step + 3 * (done == 0))
        done += 1
        if done % training.validate_every == 0:
            validate(validation)
        if done % training.checkpoint_every == 0:
            save(1.0)
    return replace(training, steps=done)


def test_what_was_measured_is_carried_over_to_the_whole(clock: Clock) -> None:
    stopwatch = Stopwatch()
    done = train(stopwatch, clock, step=0.5, validation=2.0)
    (stage,) = stopwatch.stages
    assert done.steps == LEAST + 2  # the first two do not count
    assert stage.measured == pytest.approx(clock.now)
    assert stage.whole("step") == pytest.approx(1000 * 0.5 + 3)
    assert stage.whole("validation") == pytest.approx(10 * 2)
    assert stage.whole("checkpoint") == pytest.approx(20 * 1)


def test_slow_steps_are_few_and_quick_ones_many(clock: Clock) -> None:
    assert train(Stopwatch(), clock, step=60.0).steps == LEAST
    quick = train(Stopwatch(), clock, step=0.01, validation=0.0)
    assert LEAST < quick.steps < BRIEF / 0.01


def test_what_is_due_late_is_seen_early_and_what_is_never_due_is_not() -> None:
    soon = Stopwatch().begins(ASKED)
    assert (soon.validate_every, soon.checkpoint_every, soon.patience) == (VALIDATED, SAVED, 0)
    assert replace(soon, validate_every=100, checkpoint_every=50, patience=3) == ASKED
    never = Stopwatch().begins(replace(ASKED, validate_every=0, checkpoint_every=2000))
    assert (never.validate_every, never.checkpoint_every) == (0, 0)
    once = Stopwatch().begins(replace(ASKED, checkpoint_every=501))
    assert once.checkpoint_every == LEAST


def test_a_training_without_validation_conditions_takes_no_time_for_them(clock: Clock) -> None:
    stopwatch = Stopwatch()
    stopwatch.begins(ASKED)
    assert stopwatch.stages[0].whole("validation") == 0
    assert stopwatch.stages[0].usual("step") == 0


def test_a_plain_watch_lets_everything_pass() -> None:
    plain = Watch()
    assert plain.begins(ASKED) is ASKED
    assert plain.timed("checkpoint", abs)(-1) == 1
    assert plain.goes_on()
