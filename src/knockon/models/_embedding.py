"""Vectors of genes and of perturbations, and which perturbations are near each other by them."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from knockon.baseline import MeasuredEffects
from knockon.data.screen import Screen
from knockon.data.vectors import present
from knockon.types import Condition, Spec


def embed_genes(train: Screen, dim: int) -> Float[np.ndarray, "genes components"]:
    """First principal component scores of the genes over the mean expression of training conditions.

    Genes are the observations and conditions (controls among them) the centered variables, as in
    [ahlmann-eltze2025]. There are fewer components than ``dim`` where the screen is small.
    """
    means = np.stack(list(train.means().values()), axis=1)
    return _scores(means, dim)


def embed_perturbations(
    spec: Spec, genes: Float[np.ndarray, "genes components"]
) -> tuple[Float[np.ndarray, "perturbations width"], Bool[np.ndarray, "perturbations"]]:
    """Vector of each perturbation, 0 where it has none, and whether it has one.

    With ``Spec.vectors``: their standardized columns, reduced to as many principal components as the
    genes have. Without: the vector of the gene of the panel that bears the perturbation's name.
    """
    dim = genes.shape[1]
    if spec.vectors is None:
        index = {gene: i for i, gene in enumerate(spec.genes)}
        known = np.array([name in index for name in spec.perturbations])
        vectors = [genes[index[name]] if name in index else np.zeros(dim) for name in spec.perturbations]
        return np.array(vectors).reshape(-1, dim), known
    known = present(spec.vectors)
    given = spec.vectors[known].astype(np.float64)
    spread = given.std(axis=0)
    scores = _scores((given - given.mean(axis=0)) / np.where(spread > 0, spread, 1), dim)
    vectors = np.zeros((len(known), scores.shape[1]))
    vectors[known] = scores
    return vectors, known


def _scores(
    values: Float[np.ndarray, "observations variables"], dim: int
) -> Float[np.ndarray, "observations components"]:
    """Principal component scores; each component's sign makes its largest entry positive."""
    u, s, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    scores = (u * s)[:, : min(dim, int((s > 1e-10 * s.max(initial=0)).sum()))]
    largest = np.abs(scores).argmax(axis=0)
    return scores * np.sign(scores[largest, np.arange(scores.shape[1])])


class Neighbors(nn.Module):
    """The measured single perturbations that are nearest to each perturbation, by their vectors.

    Parameters
    ----------
    number
        Neighbors that count.
    temperature
        Cosine distance over which the weight of a neighbor falls to a third.
    components
        See ``embed_genes``.
    """

    codes: Int[Tensor, "codes neighbors"]
    """Codes of the neighbors, a perturbation itself among them where it was measured alone."""
    closeness: Float[Tensor, "codes neighbors"]
    """Weights, which sum to 1; 0 where a perturbation has no vector."""

    def __init__(self, spec: Spec, number: int, temperature: float, components: int) -> None:
        super().__init__()
        self.spec, self.number, self.temperature, self.components = spec, number, temperature, components
        every = len(spec.perturbations) + 1
        self.register_buffer("codes", torch.zeros(every, 0, dtype=torch.long))
        self.register_buffer("closeness", torch.zeros(every, 0))

    def fit(self, train: Screen) -> None:
        """Rank the neighbors of every perturbation."""
        vectors, known = embed_perturbations(self.spec, embed_genes(train, self.components))
        singles = {label.perturbations[0] for label in train.conditions if len(label.perturbations) == 1}
        measured = np.array([name in singles for name in self.spec.perturbations], dtype=bool) & known
        neighbors, closeness = self._rank(vectors, np.flatnonzero(measured))
        device = self.codes.device
        # code 0, nothing, has no neighbors; code i + 1 is the i-th perturbation
        self.codes = torch.from_numpy(np.pad(neighbors + 1, ((1, 0), (0, 0)))).to(device)
        closeness = np.pad(closeness * known[:, None], ((1, 0), (0, 0)))
        self.closeness = torch.from_numpy(closeness.astype(np.float32)).to(device)

    def weigh(
        self,
        effects: MeasuredEffects,
        condition: Condition,
        without: Bool[Tensor, "sets rows"] | None = None,
    ) -> Float[Tensor, "sets slots rows"]:
        """Weigh the measured effects of each perturbation's neighbors, at its dose.

        Parameters
        ----------
        without
            Rows that do not count.
        """
        near, weight = self.codes[condition.perturbation], self.closeness[condition.perturbation]
        alike = Condition(
            perturbation=near.flatten(1),
            dose=condition.dose.repeat_interleave(near.shape[-1], dim=1),
            covariates=condition.covariates,
        )
        single = effects.single(alike, without).unflatten(1, near.shape[1:])
        return (single * weight.unsqueeze(-1)).sum(2)

    def _rank(
        self, vectors: Float[np.ndarray, "perturbations width"], measured: Int[np.ndarray, "singles"]
    ) -> tuple[Int[np.ndarray, "perturbations k"], Float[np.ndarray, "perturbations k"]]:
        """Nearest measured perturbations of each perturbation, and their weights."""
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(length > 0, length, 1)
        distance = 1 - unit @ unit[measured].T
        order = distance.argsort(axis=1, kind="stable")[:, : self.number]
        nearest = np.take_along_axis(distance, order, axis=1)
        weight = np.exp(-(nearest - nearest.min(axis=1, keepdims=True, initial=2)) / self.temperature)
        return measured[order], weight / weight.sum(axis=1, keepdims=True)
