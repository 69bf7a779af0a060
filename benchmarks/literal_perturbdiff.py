"""PerturbDiff as its specification reads, without a saving: what knockon's is timed against.

Written from ../shared/specs/perturbdiff.md, with the names of a released checkpoint. Everything is computed
for every cell, also what is constant in a set; the control stream has its own head, which nothing reads; the
passes of guidance run one after the other; the energy distance is computed once more for the log.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

STEPS = 1000


@dataclass(frozen=True)
class Given:
    """What is known of every cell: a control cell, and labels."""

    control: Float[Tensor, "sets cells genes"]
    labels: Int[Tensor, "sets cells 3"]
    """Perturbation (0 is none), cell type, batch."""


class CovEncoder(nn.Module):
    def __init__(self, genes: int, tables: Sequence[int], branch: int) -> None:
        super().__init__()
        self.pert_encoder, self.celltype_encoder, self.batch_encoder = (
            nn.Embedding(rows, branch) for rows in tables
        )
        self.transform = nn.Linear(3 * branch, genes)

    def forward(self, labels: Int[Tensor, "sets cells 3"]) -> Float[Tensor, "sets cells genes"]:
        tables = (self.pert_encoder, self.celltype_encoder, self.batch_encoder)
        parts = [table(labels[..., i]) for i, table in enumerate(tables)]
        return self.transform(torch.cat(parts, dim=-1))


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, z: Float[Tensor, "sets cells dim"]) -> Float[Tensor, "sets cells dim"]:
        q, k, v = self.qkv(z).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


def modulation(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Inner(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(2 * dim, heads)
        self.adaLN_modulation, self.control_adaLN_modulation = modulation(dim, 6), modulation(dim, 6)
        self.mlp, self.control_mlp = MLP(dim), MLP(dim)

    def forward(self, h: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        cells, control = self.adaLN_modulation(c).chunk(6, -1), self.control_adaLN_modulation(c).chunk(6, -1)
        z = torch.cat([modulate(h, *cells[:2]), modulate(u, *control[:2])], dim=-1)
        dh, du = self.attn(z).chunk(2, dim=-1)
        h_new = h + cells[2] * dh + cells[5] * self.mlp(modulate(h, *cells[3:5]))
        return h_new, u + control[2] * du + control[5] * self.control_mlp(modulate(u, *control[3:5]))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.block = Inner(dim, heads)

    def forward(self, h: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(h, u, c)


class Head(nn.Module):
    def __init__(self, dim: int, genes: int) -> None:
        super().__init__()
        self.adaLN_modulation, self.linear = modulation(dim, 2), nn.Linear(dim, genes)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return functional.relu(self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, dim=-1))))


class TimeEncoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Int[Tensor, "sets"]) -> Float[Tensor, "sets 1 dim"]:
        angles = t[:, None] * 10_000 ** (-torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))[:, None]


class Labelled(nn.Module):
    """A map and the vector that stands in where there is nothing to map."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.emb, self.null_emb = nn.Linear(inputs, dim), nn.Embedding(1, dim)


class Denoiser(nn.Module):
    def __init__(self, genes: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.x_embedder, self.x_control_embedder = nn.Linear(2 * genes, dim), nn.Linear(2 * genes, dim)
        self.gene_embedding = nn.ModuleDict({"null_emb": nn.Embedding(1, dim)})
        self.t_embedder, self.class_embedding = TimeEncoder(dim), Labelled(genes, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.final_layer, self.control_final_layer = Head(dim, genes), Head(dim, genes)

    def forward(
        self, x: Tensor, estimate: Tensor, control: Tensor, t: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Clean cells, and control cells that nothing reads; without labels the condition is hidden."""
        of = self.class_embedding
        y = of.null_emb.weight[None] if labels is None else of.emb(functional.silu(labels))
        c = (self.t_embedder(t) + y).expand(*x.shape[:2], -1)
        token = self.gene_embedding["null_emb"].weight[0]
        h = self.x_embedder(torch.cat([x, estimate], dim=-1)) + token
        u = self.x_control_embedder(torch.cat([control, torch.zeros_like(control)], dim=-1)) + token
        for block in self.blocks:
            h, u = block(h, u, c)
        return self.final_layer(h, c), self.control_final_layer(u, c)


class LiteralPerturbDiff(nn.Module):
    def __init__(
        self,
        *,
        genes: int,
        tables: Sequence[int],
        dim: int = 512,
        heads: int = 8,
        layers: int = 8,
        branch: int = 128,
    ) -> None:
        super().__init__()
        self.cov_encoder = CovEncoder(genes, tables, branch)
        self.model = Denoiser(genes, dim, heads, layers)

    def loss(
        self, given: Given, clean: Tensor, t: Tensor, noise: Tensor, *, shown: bool
    ) -> Float[Tensor, ""]:
        """One training step, with or without self-conditioning."""
        bar = alpha_bars()[t].to(clean.device)[:, None, None]
        x = (bar.sqrt() * clean + (1 - bar).sqrt() * noise).float()
        labels, estimate = self.cov_encoder(given.labels), torch.zeros_like(x)
        if shown:
            with torch.no_grad():
                estimate, _ = self.model(x, estimate, given.control, t, labels)
        found, _ = self.model(x, estimate, given.control, t, labels)
        energy_distance(clean, found)  # for the log
        return ((found - clean) ** 2).mean((1, 2)).mean() + energy_distance(clean, found).mean()

    @torch.no_grad()
    def generate(self, given: Given, x: Tensor, *, visited: int, guidance: float) -> Tensor:
        """Undo the last steps one by one, with two passes each."""
        bars, estimate = alpha_bars().tolist(), torch.zeros_like(x)
        labels = self.cov_encoder(given.labels)
        for step in range(visited - 1, -1, -1):
            t = torch.full((len(x),), step, device=x.device)
            found, _ = self.model(x, estimate, given.control, t, labels)
            null, _ = self.model(x, estimate, given.control, t, None)
            found = (1 + guidance) * found - guidance * null
            estimate = torch.where(found < 1e-4, 0, found)
            bar, before = bars[step], bars[step - 1] if step else 1.0
            epsilon = (x / math.sqrt(bar) - estimate) / math.sqrt(1 / bar - 1)
            x = math.sqrt(before) * estimate + math.sqrt(1 - before) * epsilon
        return x


def alpha_bars() -> Float[Tensor, "steps"]:
    return (1 - torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)).cumprod(0)


def energy_distance(
    x: Float[Tensor, "sets cells genes"], y: Float[Tensor, "sets cells genes"]
) -> Float[Tensor, "sets"]:
    """Half the energy distance, every cell with itself included."""

    def mean(a: Tensor, b: Tensor) -> Tensor:
        square = a.square().sum(-1)[:, :, None] - 2 * a @ b.mT + b.square().sum(-1)[:, None]
        return square.clamp_min(1e-8).sqrt().mean((1, 2))

    return mean(x, y) - mean(x, x) / 2 - mean(y, y) / 2
