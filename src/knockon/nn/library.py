"""Library sizes: how many counts a cell of a condition has."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knockon.nn.conditions import ConditionTable
from knockon.types import Condition, Label, Noise, Spec


class LibrarySizes(ConditionTable):
    """Log-normal library sizes of each training condition, and of what is asked for by what is nearest.

    That is the very condition; else the same perturbations in any context; else the context, whatever was
    done; else all training cells. There is always an answer.
    """

    moments: Float[Tensor, "rows 3"]
    """Cells of each condition, and the sums of the logarithm of their sizes and of its square."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.register_buffer("moments", torch.zeros(0, 3, dtype=torch.float64))

    def fit(self, sizes: Mapping[Label, Float[np.ndarray, "_"]], spec: Spec) -> None:
        """Learn from the sizes of training cells; empty cells do not count."""
        self.remember(sizes, spec)
        logs = [np.log(found[found > 0].astype(np.float64)) for found in sizes.values()]
        moments = [[len(x), x.sum(), np.square(x).sum()] for x in logs]
        self.moments = torch.tensor(moments, dtype=torch.float64, device=self.moments.device)

    def parameters_of(
        self, condition: Condition, given: Bool[Tensor, "sets classes"]
    ) -> tuple[Float[Tensor, "sets"], Float[Tensor, "sets"]]:
        """Mean and deviation of the log of the size; ``given`` says which classes of a condition count.

        The deviation is that of the cells themselves (divided by their number, not by one less).
        """
        done = condition.same_treatment(self.measured)
        here = (condition.covariates[:, None] == self.covariates) | ~given[:, None, 1:]
        done, here = done | ~given[:, :1], here.all(-1)
        count, mean, square = self._pooled(torch.ones_like(done))
        for found in (here, done, done & here):
            n, m, s = self._pooled(found)
            count, mean, square = (
                torch.where(n > 0, new, old)
                for new, old in zip((n, m, s), (count, mean, square), strict=True)
            )
        return mean, (square - mean.square()).clamp_min(0).sqrt()

    def forward(
        self,
        condition: Condition,
        given: Bool[Tensor, "sets classes"],
        noise: Noise,
        like: Float[Tensor, "sets cells"],
    ) -> Float[Tensor, "sets cells"]:
        """Draw sizes, as many as ``like`` has entries."""
        mean, spread = (x.to(like.dtype)[:, None] for x in self.parameters_of(condition, given))
        return (mean + spread * noise.normal(like)).exp()

    def _pooled(self, found: Bool[Tensor, "sets rows"]) -> tuple[Tensor, Tensor, Tensor]:
        count, total, squares = (found.to(self.moments.dtype) @ self.moments).unbind(-1)
        return count, total / count.clamp_min(1), squares / count.clamp_min(1)
