"""Cells as sets of tokens, one for each gene and its count."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.nn.blocks import Amount, linear

CountEmbedding = Literal[
    "modulated", "log1p", "log1pzero", "anscombe", "sqrt", "proj", "projconcat", "softbin"
]
"""How a count c enters the token of a gene with the row e. ``modulated`` is ours: a map of the count scales
and shifts e. The others are published [scldm, section 1.3]. Four only scale e, by ``log1p(c)``; by the same,
but by -1 for none; by ``asinh(sqrt(c + 1))``; by ``sqrt(c + 1)``. A layer norm undoes what is only scaled, so
whoever reads the tokens through one cannot see how large a count is. Three add to it: ``e + w c + b``; a map
of e beside copies of ``log1p(c)``; e and a soft choice among learned bins."""
NO_GENE = 0
"""Token of no gene, which fills cells up; token i + 1 is the i-th gene."""


class Tokens(NamedTuple):
    """Genes and their counts, and by how much each token's share of attention is raised, as a logarithm."""

    genes: Int[Tensor, "#cells tokens"]
    counts: Float[Tensor, "cells tokens"]
    raised: Float[Tensor, "cells tokens"] | None
    """Minus infinity for a token that does not count; None where all count alike."""


def all_genes(counts: Float[Tensor, "cells genes"]) -> Tokens:
    """Make a token of every gene, whatever its count."""
    return Tokens(torch.arange(1, counts.shape[1] + 1, device=counts.device)[None], counts, None)


def expressed_genes(counts: Float[Tensor, "cells genes"], padded_to: int = 0) -> Tokens:
    """Make a token of every gene with a count, and a last one of no gene.

    The last one counts only in a cell that is empty. Padding that a softmax sees is the same key and value
    over and over; that is one token whose share is raised by the logarithm of their number, exactly.

    Parameters
    ----------
    padded_to
        Tokens that every cell is filled up to, seen by the softmax, as in the released program; 0 has none.
    """
    cell, gene = counts.nonzero(as_tuple=True)
    length = torch.bincount(cell, minlength=len(counts))
    most = int(length.max()) if len(counts) else 0
    place = torch.arange(len(cell), device=cell.device) - (length.cumsum(0) - length)[cell]
    genes = torch.full((len(counts), most + 1), NO_GENE, device=cell.device)
    genes[cell, place] = gene + 1
    values = counts.new_zeros(genes.shape)
    values[cell, place] = counts[cell, gene]
    raised = values.new_zeros(genes.shape).masked_fill(genes == NO_GENE, -torch.inf)
    last = (padded_to - length).clamp_min(0).to(values.dtype).log() if padded_to else values.new_zeros(())
    raised[:, -1] = torch.where(length == 0, last.clamp_min(0), last if padded_to else -torch.inf)
    return Tokens(genes, values, raised)


class CountEncoder(nn.Module):
    """Tokens to vectors: a row for each gene, and what its count does to it.

    Parameters
    ----------
    genes
        Size of the vocabulary.
    """

    BINS, HIDDEN = 10, 64
    """Bins of ``softbin``, and the width of the map that chooses among them."""

    def __init__(self, genes: int, dim: int, kind: CountEmbedding) -> None:
        super().__init__()
        assert kind in get_args(CountEmbedding)
        self.kind = kind
        self.table = nn.Embedding(genes + 1, dim)
        if kind == "proj":
            self.count = linear(1, dim)
        elif kind == "projconcat":
            self.mix = linear(2 * dim, dim)
        elif kind == "modulated":
            self.amount = Amount(dim)
        elif kind == "softbin":
            self.choice = nn.Sequential(linear(1, self.HIDDEN), nn.SiLU(), linear(self.HIDDEN, self.BINS))
            self.bins = nn.Parameter(torch.randn(self.BINS, dim))

    def forward(
        self, genes: Int[Tensor, "#cells tokens"], counts: Float[Tensor, "cells tokens"]
    ) -> Float[Tensor, "cells tokens dim"]:
        """Embed."""
        rows, c = self.table(genes), counts[..., None]
        if self.kind == "modulated":
            return self.amount(rows, counts)
        if self.kind == "proj":
            return rows + self.count(c)
        if self.kind == "projconcat":
            # The copies of one number need one column: the sum of the columns that they would meet.
            gene, count = self.mix.weight.chunk(2, dim=1)
            return functional.linear(rows, gene, self.mix.bias) + c.log1p() * count.sum(1)
        if self.kind == "softbin":
            return rows + self.choice(c).softmax(-1) @ self.bins
        return rows * self._factor(c)

    def _factor(self, c: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.kind == "log1p":
            return c.log1p()
        if self.kind == "log1pzero":
            return torch.where(c == 0, -1.0, c.log1p())
        root = (c + 1).sqrt()
        return root.asinh() if self.kind == "anscombe" else root
