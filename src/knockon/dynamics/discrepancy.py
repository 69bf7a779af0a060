"""How far two samples are from being drawn from one distribution.

All are computed in the precision of their inputs, so call them outside of autocast.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Squared bandwidths of the kernels, in units of the median squared distance."""


def squared_distances(
    x: Float[Tensor, "*sets cells genes"], y: Float[Tensor, "*sets others genes"]
) -> Float[Tensor, "*sets cells others"]:
    """Squared Euclidean distances between the rows of two samples.

    Both are centered first: the product form subtracts large numbers, and what the samples share would
    only cost digits.
    """
    center = y.detach().mean(dim=-2, keepdim=True)
    x, y = x - center, y - center
    cross = x @ y.transpose(-1, -2)
    return (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * cross).clamp_min(0)


def off_diagonal(square: Float[Tensor, "*sets cells cells"]) -> Float[Tensor, "*sets pairs"]:
    """All entries of square matrices but their diagonals."""
    cells = square.shape[-1]
    shifted = square.flatten(-2)[..., 1:].unflatten(-1, (cells - 1, cells + 1))
    return shifted[..., :-1].flatten(-2)


def median_bandwidths(
    y: Float[Tensor, "*sets cells genes"], factors: tuple[float, ...] = FACTORS
) -> Float[Tensor, "*sets kernels"]:
    """Bandwidths around the median distance between cells of a sample.

    The median is the lower one of the two middle values. It is a constant: no gradient flows through it.
    """
    pairs = off_diagonal(squared_distances(y.detach(), y.detach()))
    median = pairs.median(dim=-1).values.clamp_min(1e-12)
    return (median[..., None] * median.new_tensor(factors)).sqrt()


def mmd_per_kernel(
    x: Float[Tensor, "*sets cells genes"],
    y: Float[Tensor, "*sets others genes"],
    bandwidths: Float[Tensor, "*sets kernels"],
) -> Float[Tensor, "*sets kernels"]:
    """Unbiased squared maximum mean discrepancy under Gaussian kernels [gretton2012, eq. 3].

    May be negative. Both samples need at least two cells.
    """
    scale = (2 * bandwidths.square() + 1e-12)[..., None]
    within_x = off_diagonal(squared_distances(x, x))[..., None, :]
    within_y = off_diagonal(squared_distances(y, y))[..., None, :]
    between = squared_distances(x, y).flatten(-2)[..., None, :]
    terms = [torch.exp(-distances / scale).mean(-1) for distances in (within_x, within_y, between)]
    return terms[0] + terms[1] - 2 * terms[2]


def mmd(
    x: Float[Tensor, "*sets cells genes"],
    y: Float[Tensor, "*sets others genes"],
    factors: tuple[float, ...] = FACTORS,
) -> Float[Tensor, "*sets"]:
    """Mean over the kernels of ``mmd_per_kernel``, with bandwidths from the second sample."""
    return mmd_per_kernel(x, y, median_bandwidths(y, factors)).mean(-1)


def energy_distance(
    x: Float[Tensor, "*sets cells genes"],
    y: Float[Tensor, "*sets others genes"],
    *,
    unbiased: bool = True,
    real: tuple[Bool[Tensor, "*sets cells"], Bool[Tensor, "*sets others"]] | None = None,
    floor: float = 0.0,
) -> Float[Tensor, "*sets"]:
    """Squared energy distance ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` [szekely2013, eq. 2.1].

    Parameters
    ----------
    unbiased
        Leave out the distance of each cell to itself. The estimate may then be negative, and a sample of
        one cell has no distance within. With it, the estimate is never negative but too large.
    real
        Cells of each sample that count; all without it.
    floor
        Squared distances below it count as it, those of a cell to itself included.
    """
    if real is None:
        real = x.new_ones(x.shape[:-1], dtype=torch.bool), y.new_ones(y.shape[:-1], dtype=torch.bool)
    weights = [mask.to(x.dtype) for mask in real]
    between = _mean(_distances(x, y, floor), weights[0], weights[1])
    within = [
        _mean_within(_distances(z, z, floor), w, unbiased=unbiased, floor=floor)
        for z, w in zip((x, y), weights, strict=True)
    ]
    return 2 * between - within[0] - within[1]


def _mean(square: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weighted mean of the entries."""
    total = (rows[..., None, :] @ square @ columns[..., None])[..., 0, 0]
    return total / (rows.sum(-1) * columns.sum(-1)).clamp_min(1)


def _mean_within(square: Tensor, weights: Tensor, *, unbiased: bool, floor: float) -> Tensor:
    """Mean over pairs of a sample; a cell is as far from itself as the floor, whatever rounding says."""
    count = weights.sum(-1)
    whole = (weights[..., None, :] @ square @ weights[..., None])[..., 0, 0]
    apart = whole - (square.diagonal(dim1=-2, dim2=-1) * weights.square()).sum(-1)
    if unbiased:
        return apart / (count * (count - 1)).clamp_min(1)
    return (apart + count * floor**0.5) / count.square().clamp_min(1)


def _distances(x: Tensor, y: Tensor, floor: float = 0.0) -> Tensor:
    """Euclidean distances; where they vanish, the gradient is zero instead of infinite."""
    squared = squared_distances(x, y)
    if floor:
        return squared.clamp_min(floor).sqrt()
    apart = squared > 1e-12
    return torch.where(apart, squared, 1.0).sqrt() * apart
