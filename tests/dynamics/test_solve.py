import math
from typing import get_args

import numpy as np
import pytest
import torch

from knockon.dynamics import solve
from knockon.types import UserError

METHODS = get_args(solve.Method)


def error(method: solve.Method, steps: int) -> float:
    """Of dx/dt = cos(t) x, whose solution is exp(sin t)."""
    times = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
    end = solve.integrate(lambda x, t: torch.cos(t) * x, torch.ones(1, dtype=torch.float64), times, method)
    return abs(end.item() - math.exp(math.sin(2)))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence(method):
    steps = np.array([20, 40, 80, 160])
    slope, _ = np.polyfit(np.log(steps), np.log([error(method, n) for n in steps]), 1)
    assert -slope == pytest.approx(solve.TABLEAUS[method].order, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_tableaus_are_consistent(method):
    rule = solve.TABLEAUS[method]
    assert sum(rule.weights) == pytest.approx(1)
    assert [sum(stage) for stage in rule.stages] == pytest.approx(list(rule.nodes))


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_counted(method):
    calls = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return x

    solve.integrate(field, torch.ones(2), torch.linspace(0, 1, 20), method)
    assert len(calls) == solve.evaluations(method, 20)


def test_the_paper_needs_76_evaluations():
    assert solve.evaluations("rk4_38", 20) == 76


def test_the_trajectory_begins_at_the_start_and_ends_at_the_end(rng):
    x, times = torch.randn(3, 4, generator=rng), torch.tensor([0.0, 0.2, 1.0])
    path = solve.trajectory(lambda x, t: -x * t, x, times, "heun")
    assert path.shape == (3, 3, 4)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], solve.integrate(lambda x, t: -x * t, x, times, "heun"))


def test_there_and_back_again(rng):
    x, times = (
        torch.randn(5, generator=rng, dtype=torch.float64),
        torch.linspace(0, 1, 50, dtype=torch.float64),
    )
    there = solve.integrate(lambda x, t: x.sin() + t, x, times, "rk4")
    torch.testing.assert_close(solve.integrate(lambda x, t: x.sin() + t, there, times.flip(0), "rk4"), x)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-7])
def test_chosen_steps_keep_the_error_near_the_tolerance(tolerance):
    """A rotation that speeds up: dx/dt = 2 t J x, solved by turning through t^2."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    calls = []

    def field(state, t):
        calls.append(float(t))
        return 2 * t * state @ turn

    found = solve.adaptive(field, x, 0.0, 3.0, tolerance)
    truth = x @ torch.linalg.matrix_exp(9 * turn)
    assert (found - truth).abs().max() < 100 * tolerance
    assert calls[0] == 0
    assert len(calls) < 1000


@pytest.mark.parametrize(
    "field",
    [lambda x, t: x * torch.nan, lambda x, t: 100 * x**2, lambda x, t: x / (0.5 - t) ** 2],
    ids=["not finite", "bursts", "a pole"],
)
def test_what_cannot_be_solved_is_told(field):
    with pytest.raises(UserError, match="cannot be solved"):
        solve.adaptive(field, torch.ones(3, dtype=torch.float64), 0.0, 1.0)


def test_a_constant_field_is_solved_exactly_in_few_steps():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = solve.adaptive(lambda state, t: torch.ones_like(state), x, 0.0, 1.0)
    torch.testing.assert_close(found, x + 1)
