"""Encoders of what a model is told: genes with their neighbors, perturbations, doses, covariates."""

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knockon.nn.attention import NeighborAttention
from knockon.nn.blocks import Amount, dropout, linear
from knockon.types import Condition, Label, Spec

NOTHING = 0
"""Token that fills the slots of a condition with fewer perturbations than slots."""


class GeneEncoder(nn.Module):
    """Names of genes to vectors, each from its own row of a table and those of its neighbors in a graph.

    Token 0 stands for no gene, token i + 1 for the i-th gene. A token without neighbors sees itself.

    Parameters
    ----------
    genes
        Number of genes.
    dropout
        Rate on attention weights and on both sums.
    """

    HEADS = 8
    """Of the attention to neighbors, whatever the heads of the other attentions."""

    offsets: Int[Tensor, "tokens_and_one"]
    neighbors: Int[Tensor, "edges"]

    def __init__(self, genes: int, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.rate = dropout
        self.table = nn.Embedding(genes + 1, dim)
        self.table_norm = nn.LayerNorm(dim)
        self.query_norm = nn.LayerNorm(dim)
        self.attention = NeighborAttention(dim, self.HEADS)
        self.maps_norm = nn.LayerNorm(dim)
        self.maps = nn.ModuleList([linear(dim, 4 * dim), linear(4 * dim, dim)])
        self.register_buffer("offsets", torch.arange(genes + 2))
        self.register_buffer("neighbors", torch.arange(genes + 1))

    def connect(self, graph: sp.csr_matrix) -> None:
        """Take the graph of the genes; every gene is its own neighbor in it."""
        offsets = np.concatenate([[0], graph.indptr.astype(np.int64) + 1])
        neighbors = np.concatenate([[NOTHING], graph.indices.astype(np.int64) + 1])
        self.offsets = torch.from_numpy(offsets).to(self.offsets.device)
        self.neighbors = torch.from_numpy(neighbors).to(self.neighbors.device)

    def edges(self, tokens: Int[Tensor, "rows"]) -> tuple[Int[Tensor, "edges"], Int[Tensor, "edges"]]:
        """Edges from the rows of ``tokens`` to rows of the table."""
        begin, end = self.offsets[tokens], self.offsets[tokens + 1]
        counts = end - begin
        row = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), counts)
        skipped = begin - (counts.cumsum(0) - counts)
        return row, self.neighbors[torch.arange(len(row), device=tokens.device) + skipped[row]]

    def memory(self) -> Float[Tensor, "tokens dim"]:
        """Normalize the table: what tokens attend to."""
        return self.table_norm(self.table.weight)

    def forward(
        self, tokens: Int[Tensor, "rows"], rng: torch.Generator | None = None
    ) -> Float[Tensor, "rows dim"]:
        """Encode tokens, each on its own; ``rng`` switches dropout on."""
        memory = self.memory()
        x = memory.index_select(0, tokens)
        attended = self.attention(self.query_norm(x), memory, self.edges(tokens), self.rate, rng)
        x = x + dropout(attended, self.rate, rng)
        hidden = dropout(functional.gelu(self.maps[0](self.maps_norm(x))), self.rate, rng)
        return x + dropout(self.maps[1](hidden), self.rate, rng)


class Rows(nn.Module):
    """A learned vector for each code, normalized or as it is."""

    def __init__(self, codes: int, dim: int, *, normed: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(codes, dim)
        self.norm = nn.LayerNorm(dim) if normed else nn.Identity()

    def forward(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Look up."""
        return self.norm(self.table(codes))


class Projection(nn.Module):
    """A learned projection of a fixed vector for each code, of zeros for code 0.

    A code whose vector has gaps has a learned row instead, so that it is known where it was trained.
    """

    vectors: Float[Tensor, "codes width"]
    known: Bool[Tensor, "codes"]

    def __init__(
        self, vectors: Float[np.ndarray, "perturbations width"], dim: int, *, normed: bool = True
    ) -> None:
        super().__init__()
        padded = torch.zeros(len(vectors) + 1, vectors.shape[1])
        padded[1:] = torch.from_numpy(vectors)
        self.register_buffer("known", padded.isfinite().all(dim=1), persistent=False)
        self.register_buffer("vectors", torch.where(self.known[:, None], padded, 0), persistent=False)
        self.map = linear(vectors.shape[1], dim)
        self.rows = None if self.known.all() else nn.Embedding(len(padded), dim)
        self.norm = nn.LayerNorm(dim) if normed else nn.Identity()

    def forward(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Look up and project."""
        found = self.map(self.vectors[codes])
        if self.rows is not None:
            found = torch.where(self.known[codes][..., None], found, self.rows(codes))
        return self.norm(found)


class ConditionEncoder(nn.Module):
    """A condition to one vector, whatever the order of its perturbations.

    A condition is the mean of its perturbations. Where it has fewer than ``SLOTS``, the encoding of
    nothing fills up: a single is half a gene and half nothing.

    A perturbation that is a gene of the panel has the encoding of that gene. Any other has a row of its
    own. Where the spec has vectors, a projection of the vector takes the place of the row, and is added
    for genes too. A dose d scales and shifts the encoding by a map of log1p(d). Each covariate adds a
    row that begins at zero, so that a level that was never trained changes nothing.
    """

    SLOTS = 2

    token: Int[Tensor, "codes"]
    is_gene: Bool[Tensor, "codes"]

    def __init__(self, spec: Spec, dim: int) -> None:
        super().__init__()
        position = {gene: index + 1 for index, gene in enumerate(spec.genes)}
        tokens = [position.get(name, NOTHING) for name in spec.perturbations]
        self.register_buffer("token", torch.tensor([NOTHING, *tokens]), persistent=False)
        is_gene = [any(tokens), *(token != NOTHING for token in tokens)]
        self.register_buffer("is_gene", torch.tensor(is_gene), persistent=False)
        self.own: Rows | Projection | None = None
        if spec.vectors is not None:
            self.own = Projection(spec.vectors, dim)
        elif not all(is_gene):
            self.own = Rows(len(is_gene), dim)
        self.dose = None if spec.dose_unit is None else Amount(dim)
        tables = [nn.Embedding(len(covariate.levels), dim) for covariate in spec.covariates]
        for table in tables:
            nn.init.zeros_(table.weight)
        self.covariates = nn.ModuleList(tables)

    def based(self) -> Bool[Tensor, "codes"]:
        """Perturbations that can be encoded without having been trained on."""
        if isinstance(self.own, Projection):
            return self.is_gene | self.own.known
        return self.is_gene

    def encode(
        self,
        codes: Int[Tensor, "*shape"],
        dose: Float[Tensor, "*shape"],
        genes: Float[Tensor, "*shape dim"],
    ) -> Float[Tensor, "*shape dim"]:
        """Encode perturbations; ``genes`` are the encodings of their tokens."""
        encoded = genes
        if self.own is not None:
            own, is_gene = self.own(codes), self.is_gene[codes][..., None]
            added = own * self.own.known[codes][..., None] if isinstance(self.own, Projection) else 0
            encoded = torch.where(is_gene, genes + added, own)
        return encoded if self.dose is None else self.dose(encoded, dose)

    def forward(
        self, condition: Condition, genes: Float[Tensor, "sets slots dim"], nothing: Float[Tensor, "dim"]
    ) -> Float[Tensor, "sets dim"]:
        """Encode conditions.

        Parameters
        ----------
        genes
            Gene encodings of the tokens of all slots.
        nothing
            Gene encoding of the token of nothing.
        """
        codes = condition.perturbation
        given = (codes != 0)[..., None]
        encoded = self.encode(codes, condition.dose.to(genes.dtype), genes)
        empty = self.encode(codes.new_zeros(1), genes.new_zeros(1), nothing[None])
        count = given.sum(-2)
        filled = (self.SLOTS - count).clamp_min(0) * empty
        mean = ((encoded * given).sum(-2) + filled) / count.clamp_min(self.SLOTS)
        return mean + sum(
            table(level)
            for table, level in zip(self.covariates, condition.covariates.unbind(-1), strict=True)
        )


class ConditionTable(nn.Module):
    """Conditions that were measured, one in each row; what is known of them stands beside, row by row."""

    perturbation: Int[Tensor, "rows slots"]
    dose: Float[Tensor, "rows slots"]
    covariates: Int[Tensor, "rows covs"]

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.register_buffer("perturbation", torch.zeros(0, spec.slots, dtype=torch.long))
        self.register_buffer("dose", torch.zeros(0, spec.slots))
        self.register_buffer("covariates", torch.zeros(0, len(spec.covariates), dtype=torch.long))

    def remember(self, labels: Iterable[Label], spec: Spec) -> None:
        """Fill the rows, each with its perturbations in the order of ``Condition.ordered``."""
        rows = spec.encode(tuple(labels)).to(self.dose.device).ordered(spec.slots)
        self.perturbation, self.dose, self.covariates = rows.perturbation, rows.dose, rows.covariates

    @property
    def measured(self) -> Condition:
        """The rows."""
        return Condition(perturbation=self.perturbation, dose=self.dose, covariates=self.covariates)


class Branches(nn.Module):
    """A condition to vectors: one of what was done, and one of each covariate.

    What was done is the sum of its perturbations, each with its dose; a row of its own stands for nothing.
    Where the spec has vectors, projections of them take the place of the rows.

    Parameters
    ----------
    dim
        Width of a branch.
    """

    trained: Bool[Tensor, "codes"]

    def __init__(self, spec: Spec, dim: int) -> None:
        super().__init__()
        codes = len(spec.perturbations) + 1
        self.own: Rows | Projection = Rows(codes, dim, normed=False)
        if spec.vectors is not None:
            self.own = Projection(spec.vectors, dim, normed=False)
        self.dose = None if spec.dose_unit is None else Amount(dim)
        self.covariates = nn.ModuleList(Level(len(c.levels), dim) for c in spec.covariates)
        self.register_buffer("trained", torch.ones(codes, dtype=torch.bool))

    def fit(self, trained: Condition) -> None:
        """Note what training will have seen."""
        self.trained.zero_()[trained.perturbation.unique()] = True
        for level, codes in zip(self.covariates, trained.covariates.unbind(-1), strict=True):
            assert isinstance(level, Level)
            level.trained.zero_()[codes.unique()] = True

    def entries(self, spec: Spec) -> dict[str, tuple[Sequence[str] | None, ...]]:
        """Names along the dimensions of parameters that belong to perturbations and levels."""
        names = (("", *spec.perturbations), None)
        found: dict[str, tuple[Sequence[str] | None, ...]]
        found = {"own.table.weight": names, "own.rows.weight": names}
        for i, covariate in enumerate(spec.covariates):
            levels = [f"{covariate.name} {level}" for level in covariate.levels]
            found[f"covariates.{i}.table.weight"] = (levels, None)
        return found

    def knows(self, codes: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Whether a perturbation was trained or has a vector."""
        known = self.trained
        if isinstance(self.own, Projection):
            known = known | self.own.known
        return known[codes] | (codes == NOTHING)

    def branches(self, condition: Condition) -> list[Float[Tensor, "sets dim"]]:
        """Encode what was done, then each covariate."""
        codes = condition.perturbation
        encoded = self.own(codes)
        if self.dose is not None:
            encoded = self.dose(encoded, condition.dose.to(encoded.dtype))
        given = (codes != NOTHING)[..., None]
        nothing = self.own(codes.new_zeros(1))
        done = torch.where(given.any(-2), (encoded * given).sum(-2), nothing)
        levels = [
            level(codes)
            for level, codes in zip(self.covariates, condition.covariates.unbind(-1), strict=True)
        ]
        return [done, *levels]


class BranchEncoder(Branches):
    """A condition to one vector: its branches, joined by a map.

    Parameters
    ----------
    width
        Width of the result.
    """

    def __init__(self, spec: Spec, dim: int, width: int) -> None:
        super().__init__(spec, dim)
        self.join = linear((1 + len(spec.covariates)) * dim, width)

    def entries(self, spec: Spec) -> dict[str, tuple[Sequence[str] | None, ...]]:
        """Names of perturbations, levels and branches."""
        branches = ("what was done", *(covariate.name for covariate in spec.covariates))
        width = self.join.in_features // len(branches)
        joined = (None, [f"{branch} {i}" for branch in branches for i in range(width)])
        return {**super().entries(spec), "join.weight": joined}

    def forward(self, condition: Condition) -> Float[Tensor, "sets width"]:
        """Encode conditions."""
        return self.join(torch.cat(self.branches(condition), dim=-1))


class ClassEncoder(Branches):
    """A condition to one vector: the sum of its branches, of which any may be hidden from a cell.

    A vector for each branch stands for what is hidden. The branches are the classes of guidance.
    """

    def __init__(self, spec: Spec, dim: int) -> None:
        super().__init__(spec, dim)
        self.hidden = nn.Parameter(torch.empty(1 + len(spec.covariates), dim))
        for name, parameter in self.named_parameters():
            if name == "hidden" or name.endswith(("table.weight", "rows.weight")):
                nn.init.normal_(parameter, std=0.02)

    def entries(self, spec: Spec) -> dict[str, tuple[Sequence[str] | None, ...]]:
        """Names of perturbations, levels and classes."""
        return {**super().entries(spec), "hidden": (spec.classes, None)}

    def forward(
        self, condition: Condition, given: Bool[Tensor, "sets cells classes"]
    ) -> Float[Tensor, "sets cells dim"]:
        """Encode conditions, of which each cell is told what ``given`` says."""
        known = torch.stack(self.branches(condition), dim=1)[:, None]
        return torch.where(given[..., None], known, self.hidden.to(known.dtype)).sum(-2)


class Level(nn.Module):
    """A learned vector for each level of a covariate; a level never trained has the mean of the others."""

    trained: Bool[Tensor, "levels"]

    def __init__(self, levels: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(levels, dim)
        self.register_buffer("trained", torch.ones(levels, dtype=torch.bool))

    def forward(self, codes: Int[Tensor, "sets"]) -> Float[Tensor, "sets dim"]:
        """Look up."""
        weight = self.trained.to(self.table.weight.dtype)
        mean = weight @ self.table.weight / weight.sum().clamp_min(1)
        return torch.where(self.trained[codes, None], self.table(codes), mean)
