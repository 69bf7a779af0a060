"""scDFM as its description reads, equation by equation and without a single saving.

Every cell of a batch encodes the same genes against the whole vocabulary again, both attention maps are
stored and subtracted, nothing is kept between two evaluations of a solver, and the discrepancy builds
twelve kernel matrices. That is what the description says and what the released program costs, so it is
what `benchmarks/scdfm.py` holds knockon's model against. It shares no code with that model: the two are
independent witnesses of the same mathematics.

Parameters carry the names of the released checkpoint, so `load_state_dict` reads one as it is. Token ids:
0..3 are special (3 is `control`), then the genes in sorted order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

TABLE_ROWS = 6000
GENE_ENCODER_HEADS = 8
DROPOUT = 0.1

Velocity = Callable[[Float[Tensor, ""], Float[Tensor, "cells genes"]], Float[Tensor, "cells genes"]]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a prediction starts from; all cells carry the same genes and the same condition."""

    gene_ids: Int[Tensor, "cells genes"]
    control: Float[Tensor, "cells genes"]
    perturbation: Int[Tensor, "cells slots"]
    """Tokens of genes, or rows of the drug table."""


class MaskedCrossAttention(nn.Module):
    """One pre-norm layer in which tokens read their neighbors in the gene graph."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = nn.MultiheadAttention(dim, GENE_ENCODER_HEADS, DROPOUT, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(
        self,
        tokens: Float[Tensor, "cells tokens dim"],
        memory: Float[Tensor, "cells vocabulary dim"],
        forbidden: Bool[Tensor, "tokens vocabulary"],
    ) -> Float[Tensor, "cells tokens dim"]:
        read, _ = self.cross_attn(self.norm1(tokens), memory, memory, attn_mask=forbidden, need_weights=False)
        tokens = tokens + self.dropout(read)
        hidden = self.dropout(functional.gelu(self.linear1(self.norm2(tokens))))
        return tokens + self.dropout(self.linear2(hidden))


class GeneEncoder(nn.Module):
    def __init__(self, dim: int, table_rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(table_rows, dim)
        self.enc_norm = nn.LayerNorm(dim)
        self.perturbation_interaction = MaskedCrossAttention(dim)

    def forward(
        self, ids: Int[Tensor, "cells tokens"], forbidden: Bool[Tensor, "vocabulary vocabulary"]
    ) -> Float[Tensor, "cells tokens dim"]:
        """Encode tokens; all cells carry the same ids, so the first one's rows of the mask serve all."""
        vocabulary = torch.arange(len(forbidden), device=ids.device).expand(len(ids), -1)
        memory = self.enc_norm(self.embedding(vocabulary))
        tokens = self.enc_norm(self.embedding(ids))
        return self.perturbation_interaction(tokens, memory, forbidden[ids[0]])


class ValueEncoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(1, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, values: Float[Tensor, "*cells"]) -> Float[Tensor, "*cells dim"]:
        hidden = functional.relu(self.linear1(values.clamp(max=512)[..., None]))
        return self.dropout(self.norm(self.linear2(hidden)))


class TimeEncoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Float[Tensor, "cells"]) -> Float[Tensor, "cells dim"]:
        frequencies = 10000.0 ** (-torch.arange(128, device=t.device, dtype=t.dtype) / 128)
        angles = t[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class DrugEncoder(nn.Module):
    def __init__(self, dim: int, table_rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(table_rows, dim)
        self.enc_norm = nn.LayerNorm(dim)

    def forward(self, ids: Int[Tensor, "cells slots"]) -> Float[Tensor, "cells slots dim"]:
        return self.enc_norm(self.embedding(ids))


class GeneModulation(nn.Module):
    """Shift, gate and scale of each gene token, from its encoding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))

    def forward(
        self, x: Float[Tensor, "cells genes dim"], genes: Float[Tensor, "cells genes dim"]
    ) -> Float[Tensor, "cells genes dim"]:
        shift, gate, scale = self.adaLN_modulation(genes).chunk(3, dim=-1)
        return x + gate * (self.norm(x) * scale + shift)


def lambda_init(layer: int) -> float:
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class DifferentialAttention(nn.Module):
    """Difference of two attention maps over one set of values.

    The first block of a layer takes both keys from the reference; the second takes the whole second map
    from it (`reference_queries`).
    """

    def __init__(self, dim: int, heads: int, layer: int, *, reference_queries: bool) -> None:
        super().__init__()
        self.heads, self.lambda_init, self.reference_queries = heads, lambda_init(layer), reference_queries
        self.q_proj_1 = nn.Linear(dim, dim, bias=False)
        self.k_proj_1 = nn.Linear(dim, dim, bias=False)
        self.q_proj_2 = nn.Linear(dim, dim, bias=False)
        self.k_proj_2 = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.lambda_q1 = nn.Parameter(0.1 * torch.randn(dim // heads))
        self.lambda_k1 = nn.Parameter(0.1 * torch.randn(dim // heads))
        self.lambda_q2 = nn.Parameter(0.1 * torch.randn(dim // heads))
        self.lambda_k2 = nn.Parameter(0.1 * torch.randn(dim // heads))
        self.subln = nn.RMSNorm(dim // heads, eps=1e-5)

    def forward(
        self, q: Float[Tensor, "cells genes dim"], reference: Float[Tensor, "cells genes dim"]
    ) -> Float[Tensor, "cells genes dim"]:
        if self.reference_queries:
            map1 = self.map(self.q_proj_1(q), self.k_proj_1(q))
            map2 = self.map(self.q_proj_2(reference), self.k_proj_2(reference))
        else:
            map1 = self.map(self.q_proj_1(q), self.k_proj_1(reference))
            map2 = self.map(self.q_proj_2(q), self.k_proj_2(reference))
        context = (map1 - self.strength() * map2) @ self.split(self.v_proj(q))
        context = (1 - self.lambda_init) * self.subln(context.to(self.subln.weight.dtype))
        return self.out_proj(context.transpose(1, 2).flatten(2))

    def strength(self) -> Float[Tensor, ""]:
        """Weight of the second map."""
        first = (self.lambda_q1 * self.lambda_k1).sum().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().exp()
        return first - second + self.lambda_init

    def map(
        self, q: Float[Tensor, "cells genes dim"], k: Float[Tensor, "cells genes dim"]
    ) -> Float[Tensor, "cells heads genes genes"]:
        q, k = self.split(q), self.split(k)
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)

    def split(self, x: Float[Tensor, "cells genes dim"]) -> Float[Tensor, "cells heads genes width"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class BlockMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "cells genes dim"]) -> Float[Tensor, "cells genes dim"]:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class DifferentialBlock(nn.Module):
    """Attention and MLP, both modulated by time."""

    def __init__(self, dim: int, heads: int, layer: int, *, reference_queries: bool) -> None:
        super().__init__()
        self.attn = DifferentialAttention(dim, heads, layer, reference_queries=reference_queries)
        self.mlp = BlockMLP(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        y: Float[Tensor, "cells genes dim"],
        reference: Float[Tensor, "cells genes dim"],
        time: Float[Tensor, "cells dim"],
    ) -> Float[Tensor, "cells genes dim"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
        y = y + gate1 * self.attn(self.norm(y) * (1 + scale1) + shift1, reference)
        return y + gate2 * self.mlp(self.norm(y) * (1 + scale2) + shift2)


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, layer: int) -> None:
        super().__init__()
        self.diff_self_attn = DifferentialBlock(dim, heads, layer, reference_queries=False)
        self.diff_cross_attn = DifferentialBlock(dim, heads, layer, reference_queries=True)

    def forward(
        self,
        x: Float[Tensor, "cells genes dim"],
        control: Float[Tensor, "cells genes dim"],
        time: Float[Tensor, "cells dim"],
    ) -> Float[Tensor, "cells genes dim"]:
        return self.diff_cross_attn(self.diff_self_attn(x, x, time), control, time)


class Head(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(2 * dim, dim), nn.LeakyReLU(), nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, 1)
        )

    def forward(self, x: Float[Tensor, "cells genes doubled"]) -> Float[Tensor, "cells genes"]:
        return self.fc(x)[..., 0]


def adapter(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2 * dim, dim), nn.LeakyReLU(), nn.Dropout(DROPOUT), nn.Linear(dim, dim), nn.LeakyReLU()
    )


class LiteralScDFM(nn.Module):
    """The network of scDFM; `forbidden` is True where a token may not read another.

    Parameters
    ----------
    dim, heads, layers
        Width, heads of the differential attentions, layers.
    forbidden
        Mask over the vocabulary, special tokens first; not part of the weights.
    table_rows
        Rows of both embedding tables, at least the vocabulary.
    drugs
        Whether conditions are rows of the drug table instead of tokens of genes.
    """

    def __init__(
        self,
        forbidden: Bool[Tensor, "vocabulary vocabulary"],
        *,
        dim: int = 512,
        heads: int = 8,
        layers: int = 4,
        table_rows: int = TABLE_ROWS,
        drugs: bool = False,
    ) -> None:
        super().__init__()
        self.drugs = drugs
        self.register_buffer("forbidden", forbidden, persistent=False)
        self.encoder = GeneEncoder(dim, table_rows)
        self.value_encoder_1 = ValueEncoder(dim)
        self.value_encoder_2 = ValueEncoder(dim)
        self.fusion_layer = nn.Sequential(
            nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim)
        )
        self.t_embedder = TimeEncoder(dim)
        self.perturbation_embedder = DrugEncoder(dim, table_rows)
        self.gene_adaLN = nn.ModuleList(GeneModulation(dim) for _ in range(layers))
        self.adapter_layer = nn.ModuleList(adapter(dim) for _ in range(layers))
        self.blocks = nn.ModuleList(Layer(dim, heads, i) for i in range(layers))
        self.final_layer = Head(dim)
        self.p_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.p_mask_embed = nn.Parameter(torch.zeros(dim))
        self.apply(initialize)

    def forward(
        self, given: Given, x_t: Float[Tensor, "cells genes"], t: Float[Tensor, "cells"]
    ) -> Float[Tensor, "cells genes"]:
        """Velocity of every gene."""
        p = self.condition(given.perturbation)[:, None].expand(-1, x_t.shape[1], -1)
        genes = self.encoder(given.gene_ids, self.forbidden)
        time = self.t_embedder(t)
        control = self.value_encoder_2(given.control) + genes
        x = self.fusion_layer(torch.cat([self.value_encoder_1(x_t) + genes, control], dim=-1))
        for modulate, adapt, block in zip(self.gene_adaLN, self.adapter_layer, self.blocks, strict=True):
            x = adapt(torch.cat([modulate(x, genes), p], dim=-1))
            x = block(x, control, time)
        return self.final_layer(torch.cat([x, p], dim=-1))

    def condition(self, perturbation: Int[Tensor, "cells slots"]) -> Float[Tensor, "cells dim"]:
        if self.drugs:
            return self.perturbation_embedder(perturbation).mean(dim=1)
        return self.encoder(perturbation, self.forbidden).mean(dim=1)


def initialize(module: nn.Module) -> None:
    """Xavier weights and zero biases in every linear map, modulations and head included."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def kernel_discrepancies(
    x: Float[Tensor, "cells genes"], y: Float[Tensor, "cells genes"]
) -> Float[Tensor, "4"]:
    """Unbiased squared maximum mean discrepancy under four Gaussian kernels, bandwidths from ``y``."""
    xx, yy, xy = torch.cdist(x, x) ** 2, torch.cdist(y, y) ** 2, torch.cdist(x, y) ** 2
    different = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    lower_median = (torch.cdist(y, y) ** 2)[different].median().detach().clamp_min(1e-12)
    values = []
    for factor in (0.5, 1.0, 2.0, 4.0):
        spread = 2 * factor * lower_median + 1e-12
        within = torch.exp(-xx / spread)[different].mean() + torch.exp(-yy / spread)[different].mean()
        values.append(within - 2 * torch.exp(-xy / spread).mean())
    return torch.stack(values)


def loss(
    network: LiteralScDFM,
    given: Given,
    x0: Float[Tensor, "cells genes"],
    x1: Float[Tensor, "cells genes"],
    t: Float[Tensor, "cells"],
    gamma: float = 0.5,
) -> dict[str, Tensor]:
    """Flow matching from noise to target, plus ``gamma`` times the discrepancy of the endpoints."""
    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
    velocity = network(given, x_t, t)
    cfm = ((velocity - (x1 - x0)) ** 2).mean()
    x1_hat = x_t + (1 - t[:, None]) * velocity
    per_kernel = kernel_discrepancies(x1_hat, x1)
    mmd = per_kernel.mean()
    total = cfm + gamma * mmd
    return {"total": total, "cfm": cfm, "mmd": mmd, "mmd_per_kernel": per_kernel, "x1_hat": x1_hat}


def rk4_step(
    velocity: Velocity, t: Float[Tensor, ""], x: Float[Tensor, "cells genes"], step: Float[Tensor, ""]
) -> Float[Tensor, "cells genes"]:
    """One step of the 3/8 rule of order four."""
    k1 = velocity(t, x)
    k2 = velocity(t + step / 3, x + step * k1 / 3)
    k3 = velocity(t + 2 * step / 3, x + step * (k2 - k1 / 3))
    k4 = velocity(t + step, x + step * (k1 - k2 + k3))
    return x + step * (k1 + 3 * k2 + 3 * k3 + k4) / 8


def euler_step(
    velocity: Velocity, t: Float[Tensor, ""], x: Float[Tensor, "cells genes"], step: Float[Tensor, ""]
) -> Float[Tensor, "cells genes"]:
    return x + step * velocity(t, x)


@torch.no_grad()
def trajectory(
    network: LiteralScDFM,
    given: Given,
    noise: Float[Tensor, "cells genes"],
    *,
    points: int = 20,
    step: Callable[..., Tensor] = rk4_step,
) -> Sequence[Float[Tensor, "cells genes"]]:
    """States on a grid of equal steps from noise (t = 0) to data (t = 1); clamp the last one at 0."""

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return network(given, x, t.expand(len(x)))

    states = [noise]
    for start, end in pairwise(torch.linspace(0, 1, points, device=noise.device, dtype=noise.dtype)):
        states.append(step(velocity, start, states[-1], end - start))
    return states
