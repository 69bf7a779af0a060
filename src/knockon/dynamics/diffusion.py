"""Diffusion in discrete steps: clean data drown in Gaussian noise, and are recovered step by step.

Steps are counted from the data: step 0 is nearly clean, the last is nearly noise, and step -1 stands for
clean data. This is the border at which knockon's time (``t = 0`` noise, ``t = 1`` data) turns around.
At each step a share of the variance is still signal, ``alpha_bar`` [ho2020, section 2].
"""

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["linear", "cosine", "power_cosine"]
"""How noise is spread over the steps."""
Rule = Literal["ddim", "ddpm"]
"""How a step is undone: [song2021, eq. 12], or a draw from the posterior with variance beta [ho2020]."""
Span = Literal["strided", "truncated"]
"""Which steps a sampler visits: some, evenly over all; or every one of the last ones, from pure noise."""


def betas(kind: Kind, steps: int) -> Float[Tensor, "steps"]:
    """Share of the variance that each step replaces by noise, in float64.

    ``linear`` rises from 1e-4 to 0.02 for 1,000 steps, and inversely to their number [ho2020].
    ``cosine`` has ``alpha_bar = cos^2`` [nichol2021, eq. 17]; ``power_cosine`` is its 0.3rd power. None is
    above 0.999.
    """
    if kind == "linear":
        scale = 1000 / steps
        return torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64).clamp_max(0.999)
    angle = (torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2
    kept = angle.cos().square() ** (0.3 if kind == "power_cosine" else 1.0)
    return (1 - kept[1:] / kept[:-1]).clamp_max(0.999)


def alpha_bars(kind: Kind, steps: int) -> Float[Tensor, "steps_and_one"]:
    """Share of the variance that is signal at each step, in float64; the last entry, at -1, is 1."""
    kept = (1 - betas(kind, steps)).cumprod(0)
    return torch.cat([kept, kept.new_ones(1)])


def steps_of(span: Span, steps: int, visited: int) -> list[int]:
    """Return the steps that a sampler visits, noisiest first.

    ``truncated`` begins with noise of full strength at a step that expects less, as the released
    PerturbDiff does; ``strided`` begins at the last step.
    """
    if span == "truncated":
        return list(range(visited - 1, -1, -1))
    return torch.linspace(steps - 1, 0, visited).round().int().unique().flip(0).tolist()


class Move(NamedTuple):
    """From the signal share of one step to that of a cleaner one."""

    now: Float[Tensor, "#sets"]
    to: Float[Tensor, "#sets"]


def moves(bars: Float[Tensor, "steps_and_one"], visited: list[int]) -> list[Move]:
    """Return the moves between visited steps, and from the last of them to clean data."""
    return [Move(bars[now : now + 1], bars[to : to + 1] if to >= 0 else bars[-1:]) for now, to in
            pairwise([*visited, -1])]  # fmt: skip


def noised(
    clean: Float[Tensor, "sets cells genes"],
    noise: Float[Tensor, "sets cells genes"],
    alpha_bar: Float[Tensor, "sets"],
) -> Float[Tensor, "sets cells genes"]:
    """State of data at a step of each set [ho2020, eq. 4]."""
    signal, strength = _like(clean, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return signal * clean + strength * noise


def ddim(
    x: Float[Tensor, "sets cells genes"],
    clean: Float[Tensor, "sets cells genes"],
    move: Move,
    *,
    eta: float = 0.0,
    noise: Float[Tensor, "sets cells genes"] | None = None,
) -> Float[Tensor, "sets cells genes"]:
    """Move to a cleaner state, given an estimate of the clean data [song2021, eq. 12 and 16].

    Parameters
    ----------
    eta
        Share of fresh noise: 0 is deterministic, 1 as random as the posterior.
    noise
        Standard; needed unless ``eta`` is 0.
    """
    now, to = move
    sigma = eta * ((1 - to) / (1 - now) * (1 - now / to)).sqrt()
    bar, rest, kept, left, spread = _like(
        x, now.sqrt(), (1 - now).sqrt(), to.sqrt(), (1 - to - sigma.square()).sqrt(), sigma
    )
    moved = kept * clean + left * ((x - bar * clean) / rest)
    return moved if noise is None else moved + spread * noise


def ddpm(
    x: Float[Tensor, "sets cells genes"],
    clean: Float[Tensor, "sets cells genes"],
    move: Move,
    *,
    noise: Float[Tensor, "sets cells genes"],
) -> Float[Tensor, "sets cells genes"]:
    """Draw the cleaner state from the posterior, with the larger variance [ho2020, eq. 7 and section 3.2].

    No noise is added to clean data.
    """
    now, to = move
    beta = 1 - now / to
    spread = torch.where(to < 1, beta, 0).sqrt()
    of_clean, of_x = beta * to.sqrt() / (1 - now), (1 - to) * (now / to).sqrt() / (1 - now)
    of_clean, of_x, spread = _like(x, of_clean, of_x, spread)
    return of_clean * clean + of_x * x + spread * noise


def _like(x: Tensor, *coefficients: Float[Tensor, "#sets"]) -> list[Tensor]:
    """Coefficients in the precision of the states, spread over cells and genes."""
    return [c.to(x.dtype)[:, None, None] for c in coefficients]
