"""Attention: the difference of two softmax maps, and the one over the neighbors in a graph.

All attention over genes is fused: no map of genes x genes is ever stored.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.nn.blocks import Attention, Heads, dropout, xavier

CACHED_GENES = 1024
"""Genes up to which the maps of one cell are worth making on a CPU."""

Reference = Literal["state", "control"]
"""Where the second source of a map comes from: the state itself, or the control cell."""


class DifferentialAttention(Attention):
    """``(A1 - lambda A2) V`` of every head, normalized: attention from which a second map is subtracted.

    Values, and whatever is not named here, come from the normalized state. A reference to the ``state``
    gives both sets of keys; a reference to the ``control`` cell gives queries and keys of the second
    map, which thereby does not depend on the state.

    ``(A1 - lambda A2) V = A1 V - lambda (A2 V)``, so two fused attentions are exact [ye2024, eq. 1].

    Parameters
    ----------
    depth
        Number of the layer, from 0; deeper layers begin with a larger lambda [ye2024, eq. 3].
    """

    def __init__(self, dim: int, heads: int, *, depth: int, reference: Reference) -> None:
        super().__init__()
        self.heads, self.reference = heads, reference
        self.initial = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.from_state = nn.Linear(dim, 3 * dim, bias=False)
        self.from_reference = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.lambdas = nn.Parameter(0.1 * torch.randn(4, dim // heads))
        self.scale = nn.Parameter(torch.ones(dim // heads))
        for linear, parts in ((self.from_state, 3), (self.from_reference, 2), (self.out, 1)):
            xavier(linear, parts)

    def weight(self) -> Float[Tensor, ""]:
        """Return lambda, the weight of the second map."""
        q1, k1, q2, k2 = self.lambdas
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.initial

    def project(self, reference: Float[Tensor, "cells genes dim"]) -> Heads:
        """Project the reference: both keys, or queries and keys of the second map."""
        return split_heads(self.from_reference(reference), 2, self.heads)

    def both(self, state: Float[Tensor, "cells genes dim"], reference: Heads) -> Heads:
        """Project the state: queries and keys of the first map, those of the second, and values."""
        first, second, values = split_heads(self.from_state(state), 3, self.heads)
        if self.reference == "state":
            return first, reference[0], second, reference[1], values
        return first, second, *reference, values

    def context(
        self, state: Float[Tensor, "cells genes dim"], reference: Heads
    ) -> Float[Tensor, "cells heads genes head"]:
        """Compute ``(A1 - lambda A2) V`` of each head."""
        q1, k1, q2, k2, values = self.both(state, reference)
        return difference(q1, k1, q2, k2, values, self.weight())

    def normalize(
        self, context: Float[Tensor, "cells heads genes head"]
    ) -> Float[Tensor, "cells heads genes head"]:
        """Bring every head to the same size, which the difference of two maps leaves open."""
        scale = (1 - self.initial) * self.scale
        return functional.rms_norm(context, scale.shape, scale.to(context.dtype), eps=1e-5)

    def forward(
        self, state: Float[Tensor, "cells genes dim"], reference: Heads
    ) -> Float[Tensor, "cells genes dim"]:
        """Attend; ``reference`` is what ``project`` made."""
        normed = self.normalize(self.context(state, reference))
        return self.out(normed.transpose(1, 2).flatten(-2))


class SoftmaxAttention(Attention):
    """Ordinary attention with the interface of the differential one, for the ablation.

    With the reference ``state``, keys come from the reference; with ``control``, keys and values.
    """

    def __init__(self, dim: int, heads: int, *, reference: Reference) -> None:
        super().__init__()
        self.heads = heads
        self.parts = (2, 1) if reference == "state" else (1, 2)
        self.from_state = nn.Linear(dim, self.parts[0] * dim, bias=False)
        self.from_reference = nn.Linear(dim, self.parts[1] * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        for linear, parts in ((self.from_state, self.parts[0]), (self.from_reference, self.parts[1])):
            xavier(linear, parts)
        xavier(self.out)

    def project(self, reference: Float[Tensor, "cells genes dim"]) -> Heads:
        """Project the reference: keys, or keys and values."""
        return split_heads(self.from_reference(reference), self.parts[1], self.heads)

    def forward(
        self,
        state: Float[Tensor, "cells genes dim"],
        reference: Heads,
    ) -> Float[Tensor, "cells genes dim"]:
        """Attend; ``reference`` is what ``project`` made."""
        own = split_heads(self.from_state(state), self.parts[0], self.heads)
        queries, keys, values = own[0], reference[0], (own if len(own) > 1 else reference)[1]
        context = functional.scaled_dot_product_attention(queries, keys, values)
        return self.out(context.transpose(1, 2).flatten(-2))


class NeighborAttention(nn.Module):
    """Attention of tokens to their neighbors in a graph, over a list of edges.

    Equal to dense attention with all other tokens masked, at the cost of the edges alone; hubs with
    many neighbors cost nothing to the others.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        tokens: Float[Tensor, "rows dim"],
        memory: Float[Tensor, "vocabulary dim"],
        edges: tuple[Int[Tensor, "edges"], Int[Tensor, "edges"]],
        rate: float,
        rng: torch.Generator | None,
    ) -> Float[Tensor, "rows dim"]:
        """Attend along edges from a row of ``tokens`` to a row of ``memory``; every row has one.

        Parameters
        ----------
        rate, rng
            Dropout of the attention weights; see ``dropout``.
        """
        row, column = edges
        queries = self.query(tokens).unflatten(-1, (self.heads, -1))
        keys, values = self.key_value(memory).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        logits = (queries.index_select(0, row) * keys.index_select(0, column)).sum(-1)
        weights = segment_softmax(logits / math.sqrt(queries.shape[-1]), row, len(tokens))
        weights = dropout(weights, rate, rng)
        weighted = weights[..., None].to(values.dtype) * values.index_select(0, column)
        return self.out(torch.zeros_like(queries).index_add(0, row, weighted).flatten(-2))


def difference(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, values: Tensor, weight: Float[Tensor, ""]
) -> Float[Tensor, "cells heads genes head"]:
    """``(A1 - weight A2) values``, where A1 and A2 are softmax maps; all are cells x heads x genes x head.

    ``A1 V - weight (A2 V)``: two fused attentions, exactly. Their CPU kernel is slow in bfloat16, where
    matrix products are fast; there, both maps of one cell at a time are made while they fit into cache.
    """
    on_cpu = values.device.type == "cpu" and values.dtype == torch.bfloat16
    if on_cpu and values.shape[-2] <= CACHED_GENES and not torch.compiler.is_compiling():
        return CellByCell.apply(q1, k1, q2, k2, values, weight)
    plus = functional.scaled_dot_product_attention(q1, k1, values)
    minus = functional.scaled_dot_product_attention(q2, k2, values)
    return torch.addcmul(plus, minus, -weight.to(minus.dtype))


class CellByCell(torch.autograd.Function):
    """``difference`` with the maps of one cell at a time, which the backward pass makes again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """Attend, one cell after the other."""
        q1, k1, q2, k2, values, weight = inputs
        ctx.save_for_backward(*inputs)
        result = torch.empty_like(values)
        for cell in range(len(values)):
            plus, minus = _map(q1[cell], k1[cell]), _map(q2[cell], k2[cell])
            torch.matmul(plus.sub_(minus.mul_(weight.to(minus.dtype))), values[cell], out=result[cell])
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Differentiate, one cell after the other."""
        q1, k1, q2, k2, values, weight = ctx.saved_tensors
        towards = [torch.empty_like(x) for x in (q1, k1, q2, k2, values)]
        towards_weight = torch.zeros_like(weight)
        factor = weight.to(values.dtype)
        for cell, gradient in enumerate(gradients[0]):
            plus, minus = _map(q1[cell], k1[cell]), _map(q2[cell], k2[cell])
            towards[4][cell] = (plus - factor * minus).mT @ gradient
            of_map = gradient @ values[cell].mT
            towards_weight -= (of_map * minus).sum(dtype=weight.dtype)
            for slot, (made, share) in enumerate(((plus, 1), (minus, -factor))):
                queries, keys = ((q1, k1), (q2, k2))[slot]
                logits = torch.ops.aten._softmax_backward_data(of_map, made, -1, made.dtype)
                logits *= share / math.sqrt(queries.shape[-1])
                towards[2 * slot][cell] = logits @ keys[cell]
                towards[2 * slot + 1][cell] = logits.mT @ queries[cell]
        return *towards, towards_weight


def _map(queries: Float[Tensor, "heads genes head"], keys: Float[Tensor, "heads genes head"]) -> Tensor:
    return torch.softmax((queries / math.sqrt(queries.shape[-1])) @ keys.mT, dim=-1)


def segment_softmax(
    logits: Float[Tensor, "edges heads"], segment: Int[Tensor, "edges"], segments: int
) -> Float[Tensor, "edges heads"]:
    """Softmax over the edges of each segment, at least in float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    index = segment[:, None].expand_as(logits)
    highest = logits.new_full((segments, logits.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, index, logits.detach(), "amax")
    raised = (logits - highest.index_select(0, segment)).exp()
    total = logits.new_zeros(segments, logits.shape[1]).index_add(0, segment, raised)
    return raised / total.index_select(0, segment)


def split_heads(packed: Float[Tensor, "cells genes packed"], parts: int, heads: int) -> Heads:
    """Cut stacked projections into their parts, and each part into consecutive heads."""
    return packed.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
