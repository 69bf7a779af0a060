import torch

from knockon.dynamics import flow, solve


def test_the_path_joins_its_ends(rng):
    x0, x1 = torch.randn(2, 5, 7, generator=rng, dtype=torch.float64)
    for time, end in ((0.0, x0), (1.0, x1)):
        torch.testing.assert_close(flow.interpolate(x0, x1, torch.full((5,), time, dtype=torch.float64)), end)


def test_the_velocity_is_the_derivative_of_the_path(rng):
    x0, x1 = torch.randn(2, 5, 7, generator=rng, dtype=torch.float64)
    t = torch.rand(5, generator=rng, dtype=torch.float64)
    later, earlier = (flow.interpolate(x0, x1, t + step) for step in (1e-4, -1e-4))
    torch.testing.assert_close((later - earlier) / 2e-4, flow.velocity(x0, x1))


def test_the_endpoint_of_the_true_velocity_is_the_data(rng):
    x0, x1 = torch.randn(2, 3, 4, 7, generator=rng)
    t = torch.rand(3, 4, generator=rng)
    x_t = flow.interpolate(x0, x1, t)
    torch.testing.assert_close(flow.endpoint(x_t, flow.velocity(x0, x1), t), x1, rtol=1e-5, atol=1e-5)


def gaussians(rng: torch.Generator, cells: int) -> tuple:
    source = tuple(torch.tensor([[0.0, -1.0, 2.0], [1.0, 0.5, 0.0]], dtype=torch.float64))
    data = tuple(torch.tensor([[3.0, 0.5, 2.0], [0.2, 2.0, 0.0]], dtype=torch.float64))
    x0, x1 = (m + s * torch.randn(cells, 3, generator=rng, dtype=torch.float64) for m, s in (source, data))
    return source, data, x0, x1


def test_gaussian_velocity_is_the_best_linear_guess(rng):
    source, data, x0, x1 = gaussians(rng, 100_000)
    for time in (0.0, 0.3, 1.0):
        t = torch.full((len(x0),), time, dtype=torch.float64)
        x_t = flow.interpolate(x0, x1, t)
        guess, spread = flow.gaussian_velocity(x_t, t, source, data)
        rest = flow.velocity(x0, x1) - guess
        torch.testing.assert_close(rest.mean(0), torch.zeros(3).double(), rtol=0, atol=0.03)
        torch.testing.assert_close(
            (rest * (x_t - x_t.mean(0))).mean(0), torch.zeros(3).double(), rtol=0, atol=0.03
        )
        torch.testing.assert_close(rest.std(0), spread[0], rtol=0.02, atol=1e-6)


def test_gaussian_velocity_carries_one_gaussian_onto_the_other(rng):
    source, data, x0, _ = gaussians(rng, 50)

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return flow.gaussian_velocity(x, t.expand(len(x)), source, data)[0]

    end = solve.integrate(field, x0, torch.linspace(0, 1, 101, dtype=torch.float64), "rk4")
    score = (x0 - source[0]) / source[1].clamp_min(1e-9)
    torch.testing.assert_close(end, data[0] + data[1] * score, rtol=1e-6, atol=1e-6)
