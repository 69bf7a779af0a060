"""The straight path between a source and data, along which flow matching learns a velocity.

``t = 0`` is the source (noise) and ``t = 1`` is data. ``t`` has one entry for each cell and is spread
over the genes here.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def interpolate(
    x0: Float[Tensor, "*cells genes"], x1: Float[Tensor, "*cells genes"], t: Float[Tensor, "*cells"]
) -> Float[Tensor, "*cells genes"]:
    """State at time t, ``(1 - t) x0 + t x1`` [lipman2023, eq. 22 with sigma_min = 0]."""
    return torch.lerp(x0, x1, t[..., None])


def velocity(
    x0: Float[Tensor, "*cells genes"], x1: Float[Tensor, "*cells genes"]
) -> Float[Tensor, "*cells genes"]:
    """Velocity of the path, the same at all times."""
    return x1 - x0


def endpoint(
    x_t: Float[Tensor, "*cells genes"], v: Float[Tensor, "*cells genes"], t: Float[Tensor, "*cells"]
) -> Float[Tensor, "*cells genes"]:
    """Where a straight line from x_t arrives at t = 1: an estimate of the data from one evaluation."""
    return x_t + (1 - t[..., None]) * v


def gaussian_velocity(
    x_t: Float[Tensor, "*cells genes"],
    t: Float[Tensor, "*cells"],
    source: tuple[Float[Tensor, "*#cells genes"], Float[Tensor, "genes"]],
    data: tuple[Float[Tensor, "*#cells genes"], Float[Tensor, "genes"]],
) -> tuple[Float[Tensor, "*cells genes"], Float[Tensor, "*cells genes"]]:
    """Best velocity if every gene were an independent Gaussian in the source and in the data.

    With means m and deviations s, it is ``E[x1 - x0 | x_t]`` for independent x0 and x1. Its flow maps
    one Gaussian onto the other. A network that adds to it starts from these marginals.

    Parameters
    ----------
    source, data
        Mean and standard deviation of each gene at t = 0 and at t = 1; means may differ between cells.

    Returns
    -------
    velocity
    spread
        Standard deviation of ``x1 - x0`` around it, the scale of what is left to learn.
    """
    t = t[..., None]
    (m0, s0), (m1, s1) = source, data
    variance = ((1 - t) * s0).square() + (t * s1).square()
    slope = (t * s1.square() - (1 - t) * s0.square()) / variance.clamp_min(1e-12)
    drift = m1 - m0 + slope * (x_t - torch.lerp(m0, m1, t))
    return drift, s0 * s1 / variance.clamp_min(1e-12).sqrt()
