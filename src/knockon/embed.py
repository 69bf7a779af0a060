"""Cells in the latent space of a model: for a later stage that learns from it, and for other programs."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knockon.data.screen import Screen
from knockon.model import Model

CHUNK = 256
"""Cells that are embedded at once."""


@torch.no_grad()
def embed(
    model: Model,
    screen: Screen,
    rows: Int[np.ndarray, "cells"],
    *,
    advance: Callable[[], None] = lambda: None,
) -> Float[Tensor, "cells dim"]:
    """Embed some cells of a screen, in float32 on the CPU.

    Parameters
    ----------
    model
        Fitted.
    screen
        Prepared as the model's training screen was.
    rows
        Row numbers in its matrix.
    advance
        Called after each chunk of ``CHUNK`` cells, for a progress bar.

    Raises
    ------
    UserError
        If the model has no embedding.
    """
    device, made = next(model.parameters()).device, []
    for start in range(0, len(rows), CHUNK):
        cells = torch.from_numpy(screen.gather(rows[start : start + CHUNK])).to(device)
        made.append(model.embed(cells).float().cpu())
        advance()
    return torch.cat(made)


def table(model: Model, screen: Screen) -> Float[Tensor, "rows dim"]:
    """Embed the cells of all conditions of a screen, in a table with a row for every row of its matrix."""
    rows = np.sort(np.concatenate(list(screen.rows.values())))
    made = embed(model, screen, rows)
    whole = made.new_zeros(len(screen.cells), made.shape[1])
    whole[torch.from_numpy(rows)] = made
    return whole
