"""Cells in the latent space of a model: for a later stage that learns from it, and for other programs."""

from collections.abc import Callable

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knockon.data.screen import Screen
from knockon.data.values import blocks
from knockon.model import Model, device_of, name_of
from knockon.predict import described

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
    device, made = device_of(model), []
    for start in range(0, len(rows), CHUNK):
        cells = torch.from_numpy(screen.gather(rows[start : start + CHUNK])).to(device)
        made.append(model.embed(cells).float().cpu())
        advance()
    return torch.cat(made)


@torch.no_grad()
def refuse_without_embedding(model: Model) -> None:
    """Refuse a model that has no embedding, as ``Model.embed`` does: it is asked for an empty cell."""
    model.embed(torch.zeros(1, len(model.spec.genes), device=device_of(model)))


def annotated(
    model: Model,
    screen: Screen,
    obs: pd.DataFrame | None = None,
    *,
    advance: Callable[[], None] = lambda: None,
) -> anndata.AnnData:
    """Embed the cells of all conditions of a screen, in the order of its matrix.

    Parameters
    ----------
    model, screen, advance
        See ``embed``.
    obs
        What is known of these cells; what was done to them, without it.

    Returns
    -------
    AnnData
        The cells as they are in the screen; ``obsm["X_" + model]`` has their latents in float32.
    """
    unsorted = np.concatenate(list(screen.rows.values()))
    order = np.argsort(unsorted)
    rows, matrix = unsorted[order], screen.matrix
    latents = embed(model, screen, rows, advance=advance)
    if obs is None:
        labels = [label for label, found in screen.rows.items() for _ in found]
        dosed = screen.dose_unit is not None
        obs = described([labels[i] for i in order], screen.covariates, dosed=dosed)
        obs.index = pd.Index(screen.names_of(rows))
    whole = isinstance(matrix, sp.csr_matrix) and len(rows) == len(screen.cells)
    values = matrix if whole else sp.vstack(list(blocks(matrix, rows)), format="csr")
    adata = anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=pd.Index(screen.genes)))
    adata.obsm[f"X_{name_of(model)}"] = latents.numpy()
    return adata


def table(model: Model, screen: Screen) -> Float[Tensor, "rows dim"]:
    """Embed the cells of all conditions of a screen, in a table with a row for every row of its matrix."""
    rows = np.sort(np.concatenate(list(screen.rows.values())))
    made = embed(model, screen, rows)
    whole = made.new_zeros(len(screen.cells), made.shape[1])
    whole[torch.from_numpy(rows)] = made
    return whole
