"""scLDM as its specification reads, without a saving: what knockon's is timed against.

Written from ../shared/specs/scldm.md, with the names of a released checkpoint. Every cell carries the ids of
all genes and looks up their rows; cells are filled up to one length with padding that attention sees; scores
of attention are stored; the maps of all genes of all cells are made at once, and kept for the backward pass;
the frozen autoencoder encodes the cells of every batch again; sampling solves a doubled batch, of which one
half is not guided, and decodes both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 1e-8


@dataclass(frozen=True)
class Given:
    """What is read of cells: all genes with their counts, and those with counts, filled up."""

    genes: Int[Tensor, "cells genes"]
    counts: Float[Tensor, "cells genes"]
    genes_subset: Int[Tensor, "cells tokens"]
    counts_subset: Float[Tensor, "cells tokens"]
    library_size: Float[Tensor, "cells 1"]

    @classmethod
    def of(cls, counts: Float[Tensor, "cells genes"], tokens: int) -> "Given":
        ids = torch.arange(1, counts.shape[1] + 1).repeat(len(counts), 1)
        subset = [torch.zeros(len(counts), tokens, dtype=x.dtype) for x in (ids, counts)]
        for cell, row in enumerate(counts):
            (place,) = row.nonzero(as_tuple=True)
            for filled, values in zip(subset, (ids, counts), strict=True):
                filled[cell, : len(place)] = values[cell, place]
        return cls(ids, counts, subset[0], subset[1], counts.sum(1, keepdim=True))


class Attend(nn.Module):
    """Softmax attention whose scores are kept; ``FUSED`` replaces it by a kernel that keeps none."""

    FUSED = False

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.FUSED:
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scores = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        return (scores @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.attend = Attend(heads)

    def forward(self, x: Float[Tensor, "cells tokens dim"]) -> Float[Tensor, "cells tokens dim"]:
        return self.c_proj(self.attend(*self.c_attn(x).chunk(3, dim=-1)))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_attn_q = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.c_proj = nn.Linear(dim, dim, bias=False)
        self.attend = Attend(heads)

    def forward(self, q: Tensor, x: Tensor) -> Tensor:
        return self.c_proj(self.attend(self.c_attn_q(q), *self.c_attn(x).chunk(2, dim=-1)))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * math.ceil((8 * dim // 3) / 4)
        self.w1, self.w2 = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.c_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(functional.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(dim, eps=EPSILON) for _ in range(2))
        self.attn, self.mlp = SelfAttention(dim, heads, bias=False), MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    def __init__(self, dim: int, heads: int, points: int = 0) -> None:
        super().__init__()
        self.ln_1, self.ln_1q, self.ln_2 = (nn.LayerNorm(dim, eps=EPSILON) for _ in range(3))
        self.attn, self.mlp = CrossAttention(dim, heads), MLP(dim)
        self.inducing_points = nn.Parameter(torch.randn(points, dim)) if points else None

    def forward(self, x: Tensor, q: Tensor | None = None) -> Tensor:
        if q is None:
            q = self.inducing_points.repeat(len(x), 1, 1)
        h = q + self.attn(self.ln_1q(q), self.ln_1(x))
        return h + self.mlp(self.ln_2(h))


def plain_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=EPSILON, elementwise_affine=False)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of both networks."""

    genes: int
    width: int
    latents: int
    latent_width: int
    layers: int
    heads: int
    cross_heads: int
    flow_width: int
    flow_layers: int
    flow_heads: int
    tables: Mapping[str, int]
    """Values of each class of labels."""


class Encoder(nn.Module):
    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.ca_layer = CrossBlock(n.width, n.cross_heads, n.latents)
        self.pos_embed = nn.Parameter(torch.zeros(1, n.latents, n.width), requires_grad=False)
        self.encoder_layers = nn.ModuleList(Block(n.width, n.heads) for _ in range(n.layers))
        self.encoder_latent_input = nn.Sequential(
            nn.Linear(n.width, n.latent_width, bias=False), plain_norm(n.latent_width)
        )

    def forward(self, x: Float[Tensor, "cells tokens dim"]) -> Float[Tensor, "cells latents latent"]:
        x = self.ca_layer(x) + self.pos_embed
        for layer in self.encoder_layers:
            x = layer(x)
        return self.encoder_latent_input(x)


class Decoder(nn.Module):
    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.decoder_latent_input = nn.Sequential(
            plain_norm(n.latent_width), nn.Linear(n.latent_width, n.width, bias=False)
        )
        self.decoder_layers = nn.ModuleList(Block(n.width, n.heads) for _ in range(n.layers))
        self.decoder_cross_attention = CrossBlock(n.width, n.cross_heads)

    def forward(self, z: Tensor, q: Float[Tensor, "cells genes dim"]) -> Float[Tensor, "cells genes dim"]:
        x = self.decoder_latent_input(z)
        for layer in self.decoder_layers:
            x = layer(x)
        return self.decoder_cross_attention(x, q)


class LiteralAutoencoder(nn.Module):
    """Stage one."""

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        self.input_layer = nn.ModuleDict({"gene_embedding": nn.Embedding(n.genes + 1, n.width)})
        self.encoder, self.decoder = Encoder(n), Decoder(n)
        theta = nn.Embedding(n.genes + 1, 1)
        nn.init.ones_(theta.weight)
        self.decoder_head = nn.ModuleDict({"params": nn.Linear(n.width, 1), "theta": theta})

    def encode(self, given: Given) -> Float[Tensor, "cells latents latent"]:
        rows = self.input_layer["gene_embedding"](given.genes_subset)
        return self.encoder(rows * given.counts_subset[..., None].log1p())

    def decode(
        self, z: Tensor, genes: Int[Tensor, "cells genes"], library_size: Float[Tensor, "cells 1"]
    ) -> tuple[Float[Tensor, "cells genes"], Float[Tensor, "cells genes"]]:
        h = self.decoder(z, self.input_layer["gene_embedding"](genes))
        mu = library_size * self.decoder_head["params"](h)[..., 0].softmax(-1)
        return mu, self.decoder_head["theta"](genes)[..., 0].exp()

    def loss(self, given: Given) -> Float[Tensor, ""]:
        mu, theta = self.decode(self.encode(given), given.genes, given.library_size)
        return -log_likelihood(given.counts, mu, theta).sum(1).mean()


def log_likelihood(x: Tensor, mu: Tensor, theta: Tensor) -> Float[Tensor, "cells genes"]:
    log_total = torch.log(theta + mu + EPSILON)
    return (
        theta * (torch.log(theta + EPSILON) - log_total)
        + x * (torch.log(mu + EPSILON) - log_total)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


class FlowBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = plain_norm(dim)
        self.attn, self.mlp = SelfAttention(dim, heads, bias=True), MLP(dim)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Float[Tensor, "cells 1 dim"]) -> Tensor:
        a1, b1, g1, a2, b2, g2 = self.adaln_modulation(c).chunk(6, dim=-1)
        x = x + g1 * self.attn((1 + a1) * self.norm(x) + b1)
        return x + g2 * self.mlp((1 + a2) * self.norm(x) + b2)


class Final(nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.linear = plain_norm(dim), nn.Linear(dim, outputs)
        self.adaln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln_modulation(c).chunk(2, dim=-1)
        return self.linear((1 + scale) * self.norm(x) + shift)


class TimeEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Float[Tensor, "cells"]) -> Float[Tensor, "cells dim"]:
        angles = t[:, None] * 10_000 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LiteralFlow(nn.Module):
    """Stage two: velocity of latent tokens under labels, of which the last of each class is none."""

    pos_embed: Float[Tensor, "1 latents dim"]

    def __init__(self, n: Sizes) -> None:
        super().__init__()
        dim = n.flow_width
        self.input_proj, self.t_embedder = nn.Linear(n.latent_width, dim), TimeEmbedder(dim)
        self.class_embeddings = nn.ModuleDict({k: nn.Embedding(v + 1, dim) for k, v in n.tables.items()})
        self.blocks = nn.ModuleList(FlowBlock(dim, n.flow_heads) for _ in range(n.flow_layers))
        self.final_layer = Final(dim, n.latent_width)
        angles = torch.arange(n.latents)[:, None] * 10_000 ** (-torch.arange(dim // 2) / (dim // 2))
        self.register_buffer("pos_embed", torch.cat([angles.sin(), angles.cos()], dim=1)[None])

    def forward(
        self,
        x: Float[Tensor, "cells latents latent"],
        t: Float[Tensor, "cells"],
        labels: Mapping[str, Tensor],
    ) -> Float[Tensor, "cells latents latent"]:
        told = [self.class_embeddings[name](value) for name, value in labels.items()]
        c = (self.t_embedder(t) + sum(told))[:, None]
        x = self.input_proj(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)

    def hide(self, labels: Mapping[str, Tensor], hidden: Bool[Tensor, "cells"]) -> Mapping[str, Tensor]:
        """Replace the labels of some cells by none."""
        return {
            name: torch.where(hidden, self.class_embeddings[name].num_embeddings - 1, value)
            for name, value in labels.items()
        }

    def loss(
        self, x1: Tensor, x0: Tensor, t: Tensor, labels: Mapping[str, Tensor], hidden: Tensor
    ) -> Float[Tensor, ""]:
        x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * x1
        error = self(x_t, t, self.hide(labels, hidden)) - (x1 - x0)
        return (error**2).mean((1, 2)).mean()

    def guided(
        self,
        x: Float[Tensor, "doubled latents latent"],
        t: Tensor,
        labels: Mapping[str, Tensor],
        weight: float,
    ) -> Float[Tensor, "doubled latents latent"]:
        """Velocity of both halves without labels, and with them of the second, which is guided by it."""
        cells = len(x) // 2
        none = {name: value.repeat(2) for name, value in labels.items()}
        free = self(x, t, self.hide(none, torch.ones(len(x), dtype=torch.bool, device=x.device)))
        told = self(x[cells:], t[cells:], labels)
        return torch.cat([free[:cells], free[cells:] + weight * (told - free[cells:])])

    @torch.no_grad()
    def generate(
        self, noise: Tensor, labels: Mapping[str, Tensor], *, steps: int, weight: float = 1.0
    ) -> Float[Tensor, "doubled latents latent"]:
        """Solve from noise to latents by Heun's method, both halves from the same noise; keep all states."""
        states = [torch.cat([noise, noise])]
        for start, stop in pairwise(torch.linspace(0, 1, steps + 1, device=noise.device, dtype=noise.dtype)):
            x, step = states[-1], stop - start
            first = self.guided(x, start.expand(len(x)), labels, weight)
            second = self.guided(x + step * first, stop.expand(len(x)), labels, weight)
            states.append(x + step * (first + second) / 2)
        return torch.stack(states)[-1]


@torch.no_grad()
def draw(
    autoencoder: LiteralAutoencoder, z: Tensor, library_size: Float[Tensor, "cells 1"]
) -> Float[Tensor, "cells genes"]:
    """Draw counts of all genes of all cells."""
    rows = autoencoder.input_layer["gene_embedding"].num_embeddings
    genes = torch.arange(1, rows, device=z.device).repeat(len(z), 1)
    mu, theta = autoencoder.decode(z, genes, library_size)
    return torch.poisson(torch.distributions.Gamma(theta, theta / (mu + EPSILON)).sample())
