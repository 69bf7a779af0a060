"""Vectors of genes and of perturbations, as the linear and the nearest baseline need them."""

import numpy as np
from jaxtyping import Bool, Float

from knockon.data.screen import Screen
from knockon.types import Spec


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
    given = spec.vectors.astype(np.float64)
    spread = given.std(axis=0)
    standard = (given - given.mean(axis=0)) / np.where(spread > 0, spread, 1)
    return _scores(standard, dim), np.ones(len(given), dtype=bool)


def _scores(
    values: Float[np.ndarray, "observations variables"], dim: int
) -> Float[np.ndarray, "observations components"]:
    """Principal component scores; each component's sign makes its largest entry positive."""
    u, s, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    scores = (u * s)[:, : min(dim, int((s > 1e-10 * s.max(initial=0)).sum()))]
    largest = np.abs(scores).argmax(axis=0)
    return scores * np.sign(scores[largest, np.arange(scores.shape[1])])
