"""Solvers of ``dx/dt = f(x, t)``: with fixed steps, each a Butcher tableau, and one that chooses its steps.

An explicit Runge-Kutta step from t to t + s with coefficients a, b, c evaluates
``k_i = f(x + s sum_j a_ij k_j, t + c_i s)`` and moves to ``x + s sum_i b_i k_i``
[hairer1993, II.1].
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from knockon.types import UserError

Method = Literal["euler", "midpoint", "heun", "rk4", "rk4_38"]
"""``rk4`` is the classical rule of order 4, ``rk4_38`` the 3/8 rule of the same order."""

Field = Callable[[Tensor, Tensor], Tensor]
"""Velocity of a state at a time, a scalar tensor."""


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method, and its order of convergence."""

    order: int
    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS = MappingProxyType[Method, Tableau](
    {
        "euler": Tableau(1, (0,), ((),), (1,)),
        "midpoint": Tableau(2, (0, 1 / 2), ((), (1 / 2,)), (0, 1)),
        "heun": Tableau(2, (0, 1), ((), (1,)), (1 / 2, 1 / 2)),
        "rk4": Tableau(
            4, (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        ),
        "rk4_38": Tableau(
            4, (0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
        ),
    }
)
assert set(TABLEAUS) == set(get_args(Method))


def evaluations(method: Method, points: int) -> int:
    """Count evaluations of the field along a grid of so many points."""
    return len(TABLEAUS[method].nodes) * (points - 1)


def integrate(
    field: Field, x: Float[Tensor, "*shape"], times: Float[Tensor, "points"], method: Method
) -> Float[Tensor, "*shape"]:
    """Return the state at the last time, from the state at the first one.

    Parameters
    ----------
    times
        Grid, in the order of travel; it may run backwards.
    """
    for state in _states(field, x, times, method):
        x = state
    return x


def trajectory(
    field: Field, x: Float[Tensor, "*shape"], times: Float[Tensor, "points"], method: Method
) -> Float[Tensor, "points *shape"]:
    """Return the states at all times of the grid, the first one included."""
    return torch.stack([x, *_states(field, x, times, method)])


def _states(field: Field, x: Tensor, times: Tensor, method: Method) -> Iterator[Tensor]:
    rule = TABLEAUS[method]
    for start, stop in pairwise(times):
        step = stop - start
        slopes: list[Tensor] = []
        for node, stage in zip(rule.nodes, rule.stages, strict=True):
            slopes.append(field(_move(x, step, stage, slopes), start + node * step))
        x = _move(x, step, rule.weights, slopes)
        yield x


def _move(x: Tensor, step: Tensor, coefficients: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    for coefficient, slope in zip(coefficients, slopes, strict=True):
        if coefficient:
            x = x + (step * coefficient) * slope
    return x


NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Coefficients of Dormand and Prince's method of order 5; the last stage is the new state [dormand1980]."""
FIFTH = (*STAGES[-1], 0)
FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
"""Weights of both methods, of order 5 and 4."""
MIDDLE = (
    6025192743 / 30085553152, 0, 51252292925 / 65400821598, -2691868925 / 45128329728,
    187940372067 / 1594534317056, -1776094331 / 19743644256, 11237099 / 235043384,
)  # fmt: skip
"""Weights of the state in the middle of a step, in units of half the step [shampine1986]."""
MOST_STEPS = 10_000
"""Steps after which solving is given up."""
ERROR_SHARE = 2 / 3
"""Of the difference between both methods, what counts as the error, as in the released program of scLDM."""


def adaptive(
    field: Field, x: Float[Tensor, "*shape"], start: float, stop: float, tolerance: float = 1e-5
) -> Float[Tensor, "*shape"]:
    """Return the state at ``stop``, by Dormand and Prince's method with steps that bound the error.

    The last step passes ``stop``, and the state there is interpolated. The error is one of the whole state,
    so whatever is solved together shares its steps.

    Parameters
    ----------
    start, stop
        In the order of travel, forwards.
    tolerance
        Of each entry, absolute and relative to its size.

    Raises
    ------
    UserError
        If the steps become too small or too many, or the field is not finite.
    """
    slope = field(x, x.new_tensor(start))
    t, step, tried = start, _first_step(field, x, slope, start, tolerance), 0
    while True:
        slopes = [slope]
        for node, stage in zip(NODES, STAGES, strict=True):
            slopes.append(field(_move(x, x.new_tensor(step), stage, slopes), x.new_tensor(t + node * step)))
        new = _move(x, x.new_tensor(step), FIFTH, slopes)
        weights = tuple(ERROR_SHARE * (a - b) for a, b in zip(FIFTH, FOURTH, strict=True))
        error = _move(torch.zeros_like(x), x.new_tensor(step), weights, slopes)
        ratio = _size(error, torch.maximum(x.abs(), new.abs()), tolerance)
        tried += 1
        if not math.isfinite(ratio) or t + step == t or tried > MOST_STEPS:
            raise UserError(
                f"The flow cannot be solved to {tolerance:g}: stuck at t = {t:.3g} after {tried} steps",
                expected="a smooth and finite velocity",
                mend="lower the weights of guidance, or choose a solver with fixed steps",
            )
        if ratio <= 1 and t + step >= stop:
            middle = _move(x, x.new_tensor(step / 2), MIDDLE, slopes)
            return _quartic((stop - t) / step, step, (x, middle, new), (slope, slopes[-1]))
        if ratio <= 1:
            x, slope, t = new, slopes[-1], t + step
        lowest = 1.0 if ratio < 1 else 0.2
        step *= 10.0 if ratio == 0 else min(10.0, max(0.9 * ratio**-0.2, lowest))


def _size(x: Tensor, scale: Tensor, tolerance: float) -> float:
    """Root mean square of entries in units of their tolerance."""
    return float((x / (tolerance + tolerance * scale)).square().mean().sqrt())


def _first_step(field: Field, x: Tensor, slope: Tensor, start: float, tolerance: float) -> float:
    """Guess a step from the sizes of the first two derivatives [hairer1993, II.4]."""
    state, first = _size(x, x.abs(), tolerance), _size(slope, x.abs(), tolerance)
    tiny = 0.01 * state / first if min(state, first) >= 1e-5 and math.isfinite(first) else 1e-6
    after = field(x + tiny * slope, x.new_tensor(start + tiny))
    second = _size(after - slope, x.abs(), tolerance) / tiny
    largest = max(first, second)
    guess = max(1e-6, 1e-3 * tiny) if largest <= 1e-15 else (0.01 / largest) ** 0.2
    return min(100 * tiny, guess)


def _quartic(at: float, step: float, states: tuple[Tensor, ...], slopes: tuple[Tensor, Tensor]) -> Tensor:
    """Polynomial through three states, evenly spread over a step, with these slopes at both ends."""
    x, middle, new = states
    first, last = (step * slope for slope in slopes)
    fourth = 2 * (last - first) - 8 * (new + x) + 16 * middle
    third = 5 * first - 3 * last + 18 * x + 14 * new - 32 * middle
    second = last - 4 * first - 11 * x - 5 * new + 16 * middle
    return x + at * (first + at * (second + at * (third + at * fourth)))
