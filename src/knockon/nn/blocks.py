"""Parts of networks over gene tokens that know nothing of perturbations."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

VALUE_LIMIT = 512.0
"""Expression values above it are read as it."""

Heads = tuple[Float[Tensor, "cells heads genes head"], ...]
"""Projections of all cells, cut into heads."""


def dropout(x: Tensor, rate: float, rng: torch.Generator | None) -> Tensor:
    """Zero entries at random and scale up the rest; nothing happens without a generator.

    Whether there is dropout is thus said by the caller and not by the mode of a module, and it can be
    repeated.
    """
    if rng is None or rate == 0:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - rate, generator=rng) / (1 - rate)


def xavier(linear: nn.Linear, parts: int = 1) -> nn.Linear:
    """Draw each of the stacked maps of a layer on its own, and set the bias to zero."""
    for weight in linear.weight.chunk(parts):
        nn.init.xavier_uniform_(weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Make a linear map with the initialization that all maps here share."""
    return xavier(nn.Linear(inputs, outputs))


def zero(layer: nn.Linear) -> nn.Linear:
    """Let a map begin at zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class FeedForward(nn.Sequential):
    """Two maps with four times the width between them.

    Without gradients, a CPU makes some tokens at a time: the wide values then stay in cache, and need no
    fresh memory.
    """

    TILE = 512

    def __init__(self, dim: int) -> None:
        super().__init__(linear(dim, 4 * dim), nn.GELU(approximate="tanh"), linear(4 * dim, dim))

    def forward(
        self,
        input: Float[Tensor, "*shape dim"],  # noqa: A002 (as the base class has it)
    ) -> Float[Tensor, "*shape dim"]:
        """Map each token."""
        if torch.is_grad_enabled() or input.device.type != "cpu":
            return super().forward(input)
        tiles = input.flatten(0, -2).split(self.TILE)
        return torch.cat([nn.Sequential.forward(self, tile) for tile in tiles]).view(input.shape)


class ValueEncoder(nn.Module):
    """Expression values to vectors, each value alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = linear(1, dim)
        self.second = linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Encode; the first map is a product in the precision of the values, whatever autocast says."""
        values = values.clamp_max(VALUE_LIMIT)[..., None]
        hidden = torch.addcmul(self.first.bias, values, self.first.weight[:, 0])
        return self.norm(self.second(functional.relu(hidden)))


class TimeEncoder(nn.Module):
    """Time in [0, 1] to vectors, by cosines and sines of falling frequency.

    Parameters
    ----------
    scale
        Times are multiplied by it. With 1, the features of t = 0 and t = 1 are nearly the same.
    """

    def __init__(self, dim: int, scale: float, features: int = 256) -> None:
        super().__init__()
        self.scale, self.features = scale, features
        self.maps = nn.Sequential(linear(features, dim), nn.SiLU(), linear(dim, dim))

    def waves(self, t: Float[Tensor, "cells"]) -> Float[Tensor, "cells features"]:
        """Compute all cosines, then all sines."""
        half = self.features // 2
        exponents = torch.arange(half, dtype=t.dtype, device=t.device) / half
        angles = self.scale * t[:, None] * torch.exp(-math.log(10_000) * exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: Float[Tensor, "cells"]) -> Float[Tensor, "cells dim"]:
        """Encode."""
        return self.maps(self.waves(t))


class Amount(nn.Module):
    """Scales and shifts an encoding by a map of ``log1p`` of an amount; an amount of 0 does not.

    What is amounted is thereby bound to how much: a sum of encodings tells both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.maps = nn.Sequential(linear(1, dim), nn.SiLU(), linear(dim, 2 * dim))

    def forward(
        self, encoded: Float[Tensor, "*#shape dim"], amount: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape dim"]:
        """Apply amounts, not negative: doses, or counts."""
        scale, shift = self.maps(amount.log1p()[..., None]).chunk(2, dim=-1)
        return torch.where((amount > 0)[..., None], torch.addcmul(shift, encoded, 1 + scale), encoded)


class Attention(nn.Module, ABC):
    """Attention in which part of the projections comes from a reference."""

    @abstractmethod
    def project(self, reference: Float[Tensor, "cells genes dim"]) -> Heads:
        """Project the reference; the result serves as long as the reference stays the same."""

    @abstractmethod
    def forward(
        self, state: Float[Tensor, "cells genes dim"], reference: Heads
    ) -> Float[Tensor, "cells genes dim"]:
        """Attend; ``reference`` is what ``project`` made."""


class Block(nn.Module):
    """Attention, then a feed-forward map, both added to the state through gates that time sets.

    Parameters
    ----------
    zero
        Begin with gates of zero, so that the block changes nothing [peebles2023, adaLN-Zero].
    normed_keys
        Take the reference from the normalized state where there is none, not from the raw one.
    """

    def __init__(self, dim: int, attention: Attention, *, zero: bool, normed_keys: bool) -> None:
        super().__init__()
        self.attention = attention
        self.normed_keys = normed_keys
        self.maps = FeedForward(dim)
        self.modulation = linear(dim, 6 * dim)
        if zero:
            nn.init.zeros_(self.modulation.weight)

    def forward(
        self,
        state: Float[Tensor, "cells genes dim"],
        time: Float[Tensor, "cells dim"],
        reference: Heads | None = None,
    ) -> Float[Tensor, "cells genes dim"]:
        """Advance the state; without a reference it refers to itself."""
        modulation = self.modulation(functional.silu(time))[:, None].to(state.dtype)
        shift, scale, gate, shift_maps, scale_maps, gate_maps = modulation.chunk(6, dim=-1)
        normed = modulate(state, shift, scale)
        if reference is None:
            reference = self.attention.project(normed if self.normed_keys else state)
        state = torch.addcmul(state, gate, self.attention(normed, reference))
        return torch.addcmul(state, gate_maps, self.maps(modulate(state, shift_maps, scale_maps)))


def modulate(state: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute ``LN(state) (1 + scale) + shift``, with a norm that has no weights of its own."""
    return torch.addcmul(shift, functional.layer_norm(state, state.shape[-1:], eps=eps), 1 + scale)


class GeneModulation(nn.Module):
    """Adds to the state of each gene its normalized self, scaled and shifted as the gene's encoding says.

    Parameters
    ----------
    zero
        Begin with gates of zero. (All three at zero would have no gradient.)
    """

    def __init__(self, dim: int, *, zero: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.modulation = linear(dim, 3 * dim)
        if zero:
            nn.init.zeros_(self.modulation.weight[dim : 2 * dim])

    def project(
        self, genes: Float[Tensor, "genes dim"]
    ) -> tuple[Float[Tensor, "genes dim"], Float[Tensor, "genes dim"]]:
        """Fold gate, scale, shift and the norm's own weights into a slope and an offset of each gene."""
        shift, gate, scale = self.modulation(functional.silu(genes)).chunk(3, dim=-1)
        return gate * scale * self.norm.weight, gate * torch.addcmul(shift, self.norm.bias, scale)

    def forward(
        self,
        state: Float[Tensor, "cells genes dim"],
        genes: tuple[Float[Tensor, "genes dim"], Float[Tensor, "genes dim"]],
    ) -> Float[Tensor, "cells genes dim"]:
        """Modulate; ``genes`` is what ``project`` made."""
        slope, offset = genes
        normed = functional.layer_norm(state, state.shape[-1:], eps=self.norm.eps)
        return torch.addcmul(state + offset.to(state.dtype), normed, slope.to(state.dtype))


class Joined(nn.Module):
    """A map of ``[state; other]``, cut in two so that the other's part is computed only where it changes."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        whole = xavier(nn.Linear(2 * dim, outputs))
        self.weight, self.bias = whole.weight, whole.bias

    def project(self, other: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape outputs"]:
        """Compute the other's part, with the bias."""
        return functional.linear(other, self.weight[:, other.shape[-1] :], self.bias)

    def forward(
        self, state: Float[Tensor, "cells genes dim"], other: Float[Tensor, "#cells #genes outputs"]
    ) -> Float[Tensor, "cells genes outputs"]:
        """Compute the whole map; ``other`` is what ``project`` made."""
        return functional.linear(state, self.weight[:, : state.shape[-1]]) + other
