import pytest
import torch

from knockon.dynamics import diffusion

PUBLISHED = {
    0: 0.9999,
    9: 0.9981,
    49: 0.971,
    99: 0.897,
    199: 0.659,
    299: 0.396,
    499: 0.0786,
    749: 0.00335,
    999: 4e-5,
}
"""Share of signal of the linear schedule of 1,000 steps, by step [spec of PerturbDiff, section 1.2]."""


def test_the_linear_schedule_is_the_published_one():
    bars = diffusion.alpha_bars("linear", 1000)
    assert bars.dtype == torch.float64
    for step, value in PUBLISHED.items():
        assert bars[step].item() == pytest.approx(value, rel=0.01)
    assert bars[-1] == 1


@pytest.mark.parametrize("kind", ["linear", "cosine", "power_cosine"])
@pytest.mark.parametrize("steps", [2, 10, 50, 1000])
def test_signal_only_falls(kind, steps):
    bars = diffusion.alpha_bars(kind, steps)[:-1]
    assert (bars > 0).all()
    assert (bars.diff() < 0).all()
    assert bars[0] < 1


def test_visited_steps():
    assert diffusion.steps_of("truncated", 1000, 4) == [3, 2, 1, 0]
    assert diffusion.steps_of("strided", 1000, 3) == [999, 500, 0]
    assert diffusion.steps_of("strided", 5, 5) == [4, 3, 2, 1, 0]
    assert diffusion.steps_of("strided", 5, 1) == [4]


def test_noised_data_keep_unit_variance(rng):
    clean, noise = torch.randn(2, 3, 20_000, 4, generator=rng)
    bars = diffusion.alpha_bars("linear", 1000)[torch.tensor([0, 400, 999])]
    x = diffusion.noised(clean, noise, bars)
    torch.testing.assert_close(x.var((1, 2)), torch.ones(3), rtol=0.03, atol=0)
    torch.testing.assert_close(x[0], clean[0], rtol=0, atol=0.06)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_true_clean_data_lead_back_to_themselves(rng, eta):
    """A chain that is told the truth ends in it; on the way its noise is as strong as it must be."""
    clean = torch.full((1, 5000, 4), 2.0)
    bars = diffusion.alpha_bars("linear", 1000)
    x = torch.randn(clean.shape, generator=rng)
    visited = diffusion.steps_of("strided", 1000, 10)
    for move in diffusion.moves(bars, visited):
        noise = torch.randn(clean.shape, generator=rng)
        x = diffusion.ddim(x, clean, move, eta=eta, noise=noise if eta else None)
        strength = (1 - move.to).sqrt().item()
        assert (x - move.to.sqrt().item() * clean).std().item() == pytest.approx(strength, abs=0.03)
    torch.testing.assert_close(x, clean)


def test_a_draw_from_the_posterior_is_ddim_with_all_noise_but_for_its_variance(rng):
    """Both have the mean of the posterior [song2021, section 4.1]."""
    clean, x = torch.randn(2, 1, 4, 3, generator=rng, dtype=torch.float64)
    bars = diffusion.alpha_bars("linear", 1000)
    none = torch.zeros_like(x)
    for step in (1, 100, 999):
        move = diffusion.Move(bars[step : step + 1], bars[step - 1 : step])
        torch.testing.assert_close(
            diffusion.ddpm(x, clean, move, noise=none), diffusion.ddim(x, clean, move, eta=1.0, noise=none)
        )
