"""Real cells that a model keeps: some of every population that training measured."""

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Donors(nn.Module):
    """Cells of populations to start from, stored as sparse as they are.

    Parameters
    ----------
    genes
        Size of the panel.
    """

    ends: Int[Tensor, "populations_and_one"]
    """Where the cells of each population begin and end."""
    offsets: Int[Tensor, "cells_and_one"]
    gene: Int[Tensor, "values"]
    value: Float[Tensor, "values"]

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.genes = genes
        self.register_buffer("ends", torch.zeros(1, dtype=torch.long))
        self.register_buffer("offsets", torch.zeros(1, dtype=torch.long))
        self.register_buffer("gene", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("value", torch.zeros(0))

    def fit(self, populations: Iterable[Float[np.ndarray, "_ genes"]]) -> None:
        """Keep the cells of each population; only one population is dense at a time."""
        kept = [sp.csr_array(cells) for cells in populations]
        whole = sp.csr_array(sp.vstack(kept), dtype=np.float32)
        device = self.value.device
        sizes = [len(cells.indptr) - 1 for cells in kept]
        self.ends = torch.tensor([0, *sizes], device=device).cumsum(0)
        self.offsets = torch.from_numpy(whole.indptr.astype(np.int64)).to(device)
        self.gene = torch.from_numpy(whole.indices.astype(np.int32)).to(device)
        self.value = torch.from_numpy(whole.data).to(device)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def cells_of(self, population: int) -> Float[Tensor, "cells genes"]:
        """All kept cells of a population."""
        begin, end = self.ends[population : population + 2].tolist()
        return self._gather(torch.arange(begin, end, device=self.ends.device))

    def draw(self, population: int, number: int, rng: torch.Generator) -> Float[Tensor, "number genes"]:
        """Draw cells of a population, none of them more than once oftener than another."""
        begin, end = self.ends[population : population + 2].tolist()
        rounds = -(-number // (end - begin))
        order = [torch.randperm(end - begin, generator=rng, device=rng.device) for _ in range(rounds)]
        return self._gather(begin + torch.cat(order)[:number].to(self.ends.device))

    def _gather(self, cells: Int[Tensor, "number"]) -> Float[Tensor, "number genes"]:
        first, counts = self.offsets[cells], self.offsets[cells + 1] - self.offsets[cells]
        row = torch.repeat_interleave(torch.arange(len(cells), device=cells.device), counts)
        skipped = first - (counts.cumsum(0) - counts)
        source = torch.arange(len(row), device=cells.device) + skipped[row]
        dense = self.value.new_zeros(len(cells), self.genes)
        dense[row, self.gene[source].long()] = self.value[source]
        return dense
