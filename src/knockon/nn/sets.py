"""Autoencoder of a set of tokens: pooled by learned queries, unpooled by the queries that are asked for."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from knockon.nn.attention import split_heads
from knockon.nn.blocks import Heads, xavier

EPSILON = 1e-8
"""Of all layer norms here."""


@dataclass(frozen=True, kw_only=True)
class SetArchitecture:
    """Sizes of the autoencoder."""

    width: int = 128
    """Width of tokens; a multiple of both numbers of heads."""
    layers: int = 2
    """Blocks of the encoder, and of the decoder."""
    heads: int = 4
    """Heads of the attention among latent tokens."""
    cross_heads: int = 1
    """Heads of the attention between genes and latent tokens."""
    latents: int = 128
    """Latent tokens of a cell."""
    latent_width: int = 16
    """Numbers of a latent token."""


def norm(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
    """Layer norm without weights."""
    return functional.layer_norm(x, x.shape[-1:], eps=EPSILON)


class GatedMaps(nn.Module):
    """``W (silu(A x) * B x)`` with 8/3 of the width between, rounded up to a multiple of 4 [shazeer2020]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * math.ceil((8 * dim // 3) / 4)
        self.inputs = xavier(nn.Linear(dim, 2 * hidden, bias=False), 2)
        self.out = xavier(nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Map each token."""
        gate, value = self.inputs(x).chunk(2, dim=-1)
        return self.out(functional.silu(gate) * value)


class SelfAttention(nn.Module):
    """Softmax attention among the tokens of each cell."""

    def __init__(self, dim: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = xavier(nn.Linear(dim, 3 * dim, bias=bias), 3)
        self.out = xavier(nn.Linear(dim, dim, bias=bias))

    def forward(self, x: Float[Tensor, "cells tokens dim"]) -> Float[Tensor, "cells tokens dim"]:
        """Attend."""
        queries, keys, values = split_heads(self.inputs(x), 3, self.heads)
        context = functional.scaled_dot_product_attention(queries, keys, values)
        return self.out(context.transpose(1, 2).flatten(-2))


class SelfBlock(nn.Module):
    """Attention among tokens, then maps of each, both of what a norm leaves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.maps_norm = (nn.LayerNorm(dim, eps=EPSILON) for _ in range(2))
        self.attention = SelfAttention(dim, heads, bias=False)
        self.maps = GatedMaps(dim)

    def forward(self, x: Float[Tensor, "cells tokens dim"]) -> Float[Tensor, "cells tokens dim"]:
        """Advance."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.maps(self.maps_norm(x))


class CrossBlock(nn.Module):
    """Queries attend to a set, then maps of each query [lee2019, set transformer].

    In the order of the set nothing changes, and in the order of the queries the answer is permuted.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.set_norm, self.query_norm, self.maps_norm = (nn.LayerNorm(dim, eps=EPSILON) for _ in range(3))
        self.key_value = xavier(nn.Linear(dim, 2 * dim, bias=False), 2)
        self.query = xavier(nn.Linear(dim, dim, bias=False))
        self.out = xavier(nn.Linear(dim, dim, bias=False))
        self.maps = GatedMaps(dim)

    def project(self, tokens: Float[Tensor, "cells tokens dim"]) -> Heads:
        """Keys and values of the set."""
        return split_heads(self.key_value(self.set_norm(tokens)), 2, self.heads)

    def attend(
        self,
        queries: Float[Tensor, "#cells queries dim"],
        tokens: Heads,
        raised: Float[Tensor, "cells tokens"] | None = None,
    ) -> Float[Tensor, "cells queries dim"]:
        """Attention alone; ``tokens`` is what ``project`` made, ``raised`` is added to their logits."""
        keys, values = tokens
        (asked,) = split_heads(self.query(self.query_norm(queries)), 1, self.heads)
        asked = asked.expand(len(keys), -1, -1, -1)
        bias = None if raised is None else raised[:, None, None].to(asked.dtype)
        context = functional.scaled_dot_product_attention(asked, keys, values, bias)
        return self.out(context.transpose(1, 2).flatten(-2))

    def forward(
        self,
        queries: Float[Tensor, "#cells queries dim"],
        tokens: Heads,
        raised: Float[Tensor, "cells tokens"] | None = None,
    ) -> Float[Tensor, "cells queries dim"]:
        """Add what attention finds to the queries as they came, then the maps."""
        x = queries + self.attend(queries, tokens, raised)
        return x + self.maps(self.maps_norm(x))


class SetEncoder(nn.Module):
    """Tokens of a cell to latent tokens, whatever the order of the tokens."""

    def __init__(self, config: SetArchitecture, outputs: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.latents, config.width))
        self.pool = CrossBlock(config.width, config.cross_heads)
        self.blocks = nn.ModuleList(SelfBlock(config.width, config.heads) for _ in range(config.layers))
        self.out = xavier(nn.Linear(config.width, outputs, bias=False))

    def forward(
        self, tokens: Float[Tensor, "cells tokens dim"], raised: Float[Tensor, "cells tokens"] | None
    ) -> Float[Tensor, "cells latents outputs"]:
        """Encode."""
        x = self.pool(self.queries[None], self.pool.project(tokens), raised)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class SetDecoder(nn.Module):
    """Latent tokens to whatever is asked for: one vector for each query.

    It reads every latent token through a norm, so that shifting or scaling one changes nothing.
    """

    TILE, CPU_TILE = 2**14, 2**12
    """Queries times cells that are alive at once; on a CPU as many as stay in cache."""

    def __init__(self, config: SetArchitecture) -> None:
        super().__init__()
        self.inputs = xavier(nn.Linear(config.latent_width, config.width, bias=False))
        self.blocks = nn.ModuleList(SelfBlock(config.width, config.heads) for _ in range(config.layers))
        self.unpool = CrossBlock(config.width, config.cross_heads)

    def prepare(self, latents: Float[Tensor, "cells latents latent"]) -> Heads:
        """Keys and values of the latent tokens, which serve all queries."""
        x = self.inputs(norm(latents))
        for block in self.blocks:
            x = block(x)
        return self.unpool.project(x)

    def forward(
        self,
        latents: Float[Tensor, "cells latents latent"],
        queries: Float[Tensor, "#cells queries dim"],
        head: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "cells queries outputs"]:
        """Answer some queries at a time; a backward pass answers them again instead of keeping the vectors.

        Parameters
        ----------
        head
            Makes the few numbers that are kept of each answer.
        """
        tokens = self.prepare(latents)

        def answer(part: Tensor, *tokens: Tensor) -> Tensor:
            return head(self.unpool(part, tokens))

        tile = self.CPU_TILE if latents.device.type == "cpu" else self.TILE
        size = max(1, tile // max(1, len(latents)))
        if queries.shape[1] <= size:
            return answer(queries, *tokens)
        parts = queries.split(size, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([answer(part, *tokens) for part in parts], dim=1)
        return torch.cat([checkpoint(answer, part, *tokens, use_reentrant=False) for part in parts], dim=1)
