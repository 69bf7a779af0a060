"""Fixed-step solvers of ``dx/dt = f(x, t)``, each a Butcher tableau.

An explicit Runge-Kutta step from t to t + s with coefficients a, b, c evaluates
``k_i = f(x + s sum_j a_ij k_j, t + c_i s)`` and moves to ``x + s sum_i b_i k_i``
[hairer1993, II.1].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

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
