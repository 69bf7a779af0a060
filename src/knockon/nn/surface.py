"""A response surface: one smooth function of what is known of a gene, shared by all genes."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
"""Ridge penalties that are tried; no surface at all is tried beside them."""
FOLDS = 4
"""Parts that conditions are divided into, to choose the penalty by those left out."""
LINEAR = 0.1
"""Weight of the linear part among the features of the ridge."""
ROUNDING = 1e-5
"""Standard deviation up to which a feature counts as constant."""
BLOCK = 32_768
"""Rows whose cosines are held at a time."""


class Surface(nn.Module):
    """Ridge regression on random cosines of features [rahimi2007], and on the features themselves.

    Features, which are of order 1, are standardized and their size is taken on a logarithmic scale; one that
    did not vary among the examples makes no difference. The penalty is the one that predicts left-out groups
    best; where none predicts them better than zero does, the surface is zero.

    Parameters
    ----------
    features
        What is known of a gene under a condition.
    cosines
        Random ones.
    width
        Standard deviation of their frequencies: larger is more wrinkled.
    """

    center: Float[Tensor, "features"]
    scale: Float[Tensor, "features"]
    frequency: Float[Tensor, "features cosines"]
    phase: Float[Tensor, "cosines"]
    weight: Float[Tensor, "folds_and_whole terms"]
    """Of the surface without each fold, and of all of them."""

    def __init__(self, features: int, *, cosines: int = 600, width: float = 0.5) -> None:
        super().__init__()
        # every surface has the same cosines, whatever was drawn before it was made
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("frequency", width * torch.randn(features, cosines, generator=rng))
        self.register_buffer("phase", 2 * math.pi * torch.rand(cosines, generator=rng))
        self.register_buffer("weight", torch.zeros(FOLDS + 1, cosines + features + 1))

    def fit(
        self,
        features: Float[Tensor, "rows features"],
        target: Float[Tensor, "rows"],
        precision: Float[Tensor, "rows"],
        group: Int[Tensor, "rows"],
    ) -> None:
        """Learn from examples, which are independent between groups only.

        Parameters
        ----------
        precision
            Weight of each example.
        group
            What each example belongs to; group i is in fold ``i % FOLDS``.
        """
        self.weight = torch.zeros_like(self.weight)
        fold = group % FOLDS
        if len(group.unique()) < FOLDS:
            return
        self.center, scale = features.mean(0), features.std(0)
        # of what varies by rounding only nothing is known
        self.scale = torch.where(scale > ROUNDING * features.abs().amax(0).clamp_min(1), scale, torch.inf)
        precision = precision / precision.mean()
        terms = self.weight.shape[1]
        gram = torch.zeros(FOLDS, terms, terms, dtype=torch.float64)
        moment, square = torch.zeros(FOLDS, terms, dtype=torch.float64), torch.zeros(FOLDS).double()
        for part in range(FOLDS):
            rows = (fold == part).nonzero().flatten()
            for some in rows.split(BLOCK):
                x = self._terms(features[some])
                weighted = x * precision[some, None]
                gram[part] += (x.T @ weighted).double()
                moment[part] += (target[some] @ weighted).double()
                square[part] += (target[some].square() @ precision[some]).double()
        ridge = torch.eye(terms, dtype=torch.float64)
        best = square.sum()
        for penalty in PENALTIES:
            without = _solved(gram.sum(0) - gram + penalty * ridge, moment.sum(0) - moment)
            explained = 2 * (moment * without).sum(1) - torch.einsum("fi,fij,fj->f", without, gram, without)
            error = (square - explained).sum()
            if error < best and explained.mean() > explained.std() / math.sqrt(FOLDS):
                whole = _solved(gram.sum(0) + penalty * ridge, moment.sum(0))
                if whole.isfinite().all():
                    best, self.weight = error, torch.cat([without, whole[None]]).float()

    def forward(
        self, features: Float[Tensor, "*sets genes features"], fold: Int[Tensor, "*sets"] | None = None
    ) -> Float[Tensor, "*sets genes"]:
        """Evaluate the surface, or for each set the one that was fitted without a fold."""
        if not self.weight.any():
            return torch.zeros_like(features[..., 0])
        weight = self.weight[-1:] if fold is None else self.weight[:FOLDS]
        blocks = features.flatten(0, -2).split(BLOCK)
        found = torch.cat([self._terms(x) @ weight.T for x in blocks]).unflatten(0, features.shape[:-1])
        if fold is None:
            return found[..., 0]
        return found.take_along_dim((fold % FOLDS)[..., None, None], -1).squeeze(-1)

    def _terms(self, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows terms"]:
        z = (features - self.center) / self.scale
        z = z.sign() * z.abs().log1p()
        waves = math.sqrt(2 / len(self.phase)) * (z @ self.frequency + self.phase).cos()
        return torch.cat([waves, LINEAR * z, torch.ones_like(z[..., :1])], dim=-1)


def _solved(
    matrix: Float[Tensor, "*sets terms terms"], right: Float[Tensor, "*sets terms"]
) -> Float[Tensor, "*sets terms"]:
    """Solve with positive definite matrices; NaN where rounding has made one that is not.

    Not by `torch.linalg.solve`, whose LU of several large matrices is wrong on several threads of a CPU
    (https://github.com/pytorch/pytorch/issues/142815).
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    found = torch.cholesky_solve(right[..., None], factor).squeeze(-1)
    return torch.where(failed[..., None] > 0, torch.nan, found)
