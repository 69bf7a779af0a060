"""Velocity of latent tokens: a transformer in which time and condition modulate every block."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from knockon.nn.blocks import TimeEncoder, linear, modulate, zero
from knockon.nn.sets import EPSILON, GatedMaps, SelfAttention


@dataclass(frozen=True, kw_only=True)
class LatentArchitecture:
    """Sizes of the velocity network."""

    width: int = 256
    """Width of a token; even, and a multiple of ``heads``."""
    layers: int = 8
    """Blocks."""
    heads: int = 8
    """Heads of the attention among latent tokens."""


class LatentBlock(nn.Module):
    """Attention, then maps, both added through gates that begin at zero [peebles2023, adaLN-Zero]."""

    def __init__(self, config: LatentArchitecture) -> None:
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, bias=True)
        self.maps = GatedMaps(config.width)
        self.modulation = zero(nn.Linear(config.width, 6 * config.width))

    def forward(
        self, x: Float[Tensor, "cells latents dim"], told: Float[Tensor, "sets #set_cells dim"]
    ) -> Float[Tensor, "cells latents dim"]:
        """Advance; ``told`` is what the modulation is made of."""
        shift, scale, gate, *rest = spread(self.modulation(told), len(x)).to(x.dtype).chunk(6, dim=-1)
        x = torch.addcmul(x, gate, self.attention(modulate(x, shift, scale, EPSILON)))
        shift, scale, gate = rest
        return torch.addcmul(x, gate, self.maps(modulate(x, shift, scale, EPSILON)))


class LatentTransformer(nn.Module):
    """Velocity of the latent tokens of cells; zero at the beginning.

    Parameters
    ----------
    latents, latent_width
        Tokens of a cell, and numbers of a token.
    """

    places: Float[Tensor, "latents dim"]
    """Fixed sines and cosines that tell the tokens apart."""

    def __init__(self, config: LatentArchitecture, latents: int, latent_width: int) -> None:
        super().__init__()
        dim = config.width
        self.inputs = linear(latent_width, dim)
        self.register_buffer("places", _places(latents, dim), persistent=False)
        self.time = TimeEncoder(dim, 1.0)
        for layer in (self.time.maps[0], self.time.maps[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.02)
        self.blocks = nn.ModuleList(LatentBlock(config) for _ in range(config.layers))
        self.modulation = zero(nn.Linear(dim, 2 * dim))
        self.out = zero(nn.Linear(dim, latent_width))

    def forward(
        self, z: Float[Tensor, "sets cells latents latent"], told: Float[Tensor, "sets #cells dim"]
    ) -> Float[Tensor, "sets cells latents latent"]:
        """Return the velocity.

        Parameters
        ----------
        told
            Encoded time and condition, summed; one for a set, or one for each of its cells.
        """
        told = functional.silu(told)
        x = self.inputs(z.flatten(0, 1)) + self.places.to(z.dtype)
        for block in self.blocks:
            x = block(x, told)
        shift, scale = spread(self.modulation(told), len(x)).to(x.dtype).chunk(2, dim=-1)
        return self.out(modulate(x, shift, scale, EPSILON)).view(z.shape)


def spread(told: Float[Tensor, "sets #set_cells dim"], cells: int) -> Float[Tensor, "cells 1 dim"]:
    """Give each cell what is told to it or to its set."""
    sets, _, dim = told.shape
    return told.expand(sets, cells // sets, dim).reshape(cells, 1, dim)


def _places(latents: int, dim: int) -> Float[Tensor, "latents dim"]:
    half = dim // 2
    frequencies = 10_000 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(latents, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
