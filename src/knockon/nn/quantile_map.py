"""Quantile mapping: generated values take the place of measured ones of the same rank [gudmundsson2012]."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from knockon.nn.normal_scores import Ranks
from knockon.types import Noise


class QuantileMap(nn.Module):
    """Gives each gene of generated cells the distribution that it has in measured ones.

    One increasing map for each gene, the same for all conditions, so that a gene stays high where it is high.
    Where many generated cells share a value, 0 above all, each draws its rank among them at random. Until it
    is fitted it changes nothing.

    Parameters
    ----------
    genes
        Size of the panel.
    """

    fitted: Bool[Tensor, ""]

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.generated, self.measured = Ranks(genes), Ranks(genes)
        self.register_buffer("fitted", torch.tensor(False))  # noqa: FBT003 (a value and no switch)

    def fit(
        self,
        generated: Sequence[Float[np.ndarray, "_ genes"]],
        measured: Sequence[Float[np.ndarray, "_ genes"]],
    ) -> None:
        """Learn both distributions.

        Parameters
        ----------
        generated, measured
            Cells of each condition, as many of the one kind as of the other; not negative.
        """
        self.generated.fit(generated)
        self.measured.fit(measured)
        self.fitted.fill_(value=True)

    def forward(
        self, cells: Float[Tensor, "sets cells genes"], noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Map generated cells.

        Parameters
        ----------
        cells
            In the units of those it was fitted to.
        noise
            Breaks ties.

        Returns
        -------
        Tensor
            In those units; counts may come to lie between whole ones.
        """
        return self.measured.inverse(self.generated(cells, noise)) if self.fitted else cells
