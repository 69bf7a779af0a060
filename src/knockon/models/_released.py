"""What the readers of released weights share."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

Weights = Mapping[str, np.ndarray]
"""Arrays by their released names."""


def tensors(weights: Weights) -> dict[str, Tensor]:
    """Copy arrays to tensors."""
    return {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}


def renamed(
    released: Mapping[str, Tensor], names: tuple[tuple[str, str], ...], old: str, new: str
) -> Iterator[tuple[str, Tensor]]:
    """Give weights and biases of layers their names here; a layer or a bias that is not there is left out.

    Parameters
    ----------
    names
        Released name of each layer, and its name here.
    old, new
        What stands before the names, there and here.
    """
    for theirs, ours in names:
        for kind in ("weight", "bias"):
            if f"{old}{theirs}.{kind}" in released:
                yield f"{new}{ours}.{kind}", released[f"{old}{theirs}.{kind}"]
