"""Linear: the effect is bilinear in the embedding of the gene and that of the perturbation."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.baseline import MeanModel, effects_of
from knockon.data.screen import Screen
from knockon.model import ModelConfig, Recipe
from knockon.models._embedding import embed_genes, embed_perturbations
from knockon.types import Condition, Spec


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """Size and stiffness of the linear model."""

    components: int = 10
    """Principal components in the embeddings of genes and perturbations."""
    ridge: float = 0.1
    """Ridge penalty, the same on both sides."""

    def build(self, spec: Spec) -> "Linear":
        """Make the model."""
        return Linear(self, spec)


class Linear(MeanModel):
    """The linear model with embeddings of [ahlmann-eltze2025].

    The effect on all genes is ``G W p + b``. G holds the principal component scores of the genes over
    the mean expression of the training conditions. p is the sum of the vectors of a condition's
    perturbations (the source has singles only): the rows of G that bear their names or, where the
    spec has vectors, principal components of those. b is the mean over the fitted effects Y, controls
    with their effect of 0 and p = 0 among them, and with a ridge penalty r on either side

        ``W = (G'G + r I)^-1 G' (Y - b) P (P'P + r I)^-1``.

    Only perturbations that have a vector are fitted and known. Doses make no difference.
    """

    genes: Float[Tensor, "genes components"]
    perturbations: Float[Tensor, "codes width"]
    weight: Float[Tensor, "components width"]
    bias: Float[Tensor, "genes"]
    known: Bool[Tensor, "codes"]

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__(spec)
        self.config = config
        codes = len(spec.perturbations) + 1
        self.register_buffer("genes", torch.zeros(len(spec.genes), 0))
        self.register_buffer("perturbations", torch.zeros(codes, 0))
        self.register_buffer("weight", torch.zeros(0, 0))
        self.register_buffer("bias", torch.zeros(len(spec.genes)))
        self.register_buffer("known", torch.zeros(codes, dtype=torch.bool))

    def fit_effects(self, train: Screen) -> None:
        """Solve for W and b."""
        genes = embed_genes(train, self.config.components)
        vectors, known = embed_perturbations(self.spec, genes)
        vectors = np.concatenate([np.zeros((1, vectors.shape[1])), vectors])
        known = np.concatenate([[True], known])

        effects = {label: np.zeros(len(genes)) for label in train.controls} | effects_of(train)
        codes = self.spec.encode(tuple(effects)).perturbation.numpy()
        fitted = known[codes].all(axis=1)
        changes = np.array(list(effects.values()))[fitted].T
        bias = changes.mean(axis=1)
        weight = solve_bilinear(
            changes - bias[:, None], genes, vectors[codes[fitted]].sum(axis=1), self.config.ridge
        )
        device = self.bias.device
        self.genes, self.perturbations, self.weight, self.bias = (
            torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)
            for array in (genes, vectors, weight, bias)
        )
        self.known = torch.from_numpy(known).to(device)

    def effect(self, condition: Condition) -> Float[Tensor, "sets genes"]:
        """Evaluate the bilinear form."""
        p = self.perturbations[condition.perturbation].sum(1)
        return p @ self.weight.T @ self.genes.T + self.bias

    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether each perturbation has a vector."""
        return self.known[condition.perturbation].all(1)


def solve_bilinear(
    y: Float[np.ndarray, "genes conditions"],
    g: Float[np.ndarray, "genes components"],
    p: Float[np.ndarray, "conditions width"],
    ridge: float,
) -> Float[np.ndarray, "components width"]:
    """Ridge solution W of ``y = g W p'``, penalized on either side [ahlmann-eltze2025, methods]."""
    left = np.linalg.solve(g.T @ g + ridge * np.eye(g.shape[1]), g.T @ y @ p)
    return np.linalg.solve(p.T @ p + ridge * np.eye(p.shape[1]), left.T).T


def default() -> Recipe:
    """Ten components and a ridge of 0.1, as published; nothing is trained."""
    return Recipe(model=Config())
