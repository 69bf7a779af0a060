"""From a run and conditions to cells: an AnnData with named genes, declared units and its origin."""

import hashlib
from collections.abc import Callable, Sequence

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knockon.data.screen import Screen
from knockon.model import Model
from knockon.types import Label, UserError

CHUNK = 256
"""Cells that a model generates at once; part of the definition of a seeded prediction."""


class Refusal(UserError):  # noqa: N818 (not the program's error)
    """A model was asked for conditions that it has no basis to predict."""


def generate(
    model: Model,
    screen: Screen,
    labels: Sequence[Label],
    *,
    cells: int = 256,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> anndata.AnnData:
    """Generate cells of some conditions from control cells.

    A condition's cells depend on the model, the seed and the condition, and not on what else is asked
    for. Control cells are used equally often.

    Parameters
    ----------
    model
        Fitted.
    screen
        Gives the control cells; prepared as the model's training screen was.
    labels
        Conditions, with a level for each covariate of the screen.
    cells
        Cells of each condition.
    advance
        Called after each condition, for a progress bar.

    Returns
    -------
    AnnData
        The predicted cells, then all control cells of their contexts, as they were measured. ``X`` is
        float32 CSR in the model's units; ``obs`` has ``perturbation``, ``control``, the covariates,
        ``dose`` where the screen has doses, and ``control_cell``.

    Raises
    ------
    Refusal
        If the model has no basis to predict a condition.
    """
    if cells < 1:
        raise UserError(f"{cells} cells per condition", expected="at least 1", mend="set --cells")
    known = model.knows(model.spec.encode(labels).to(_device(model))).tolist()
    refused = [label for label, is_known in zip(labels, known, strict=True) if not is_known]
    if refused:
        name = type(model).__module__.rpartition(".")[2]
        raise Refusal(
            f"{name} has no basis to predict some conditions",
            offenders=refused,
            expected="perturbations that it was trained on, or that have a vector or a gene in the panel",
            mend="leave them out, or choose a model or a fallback that knows them (docs/models)",
        )
    blocks, used = [], []
    for label in labels:
        drawn, rows = draw(model, screen, label, cells=cells, seed=seed)
        blocks.append(sp.csr_matrix(drawn.cpu().numpy()))
        used.append(rows)
        advance()
    return _assemble(screen, labels, blocks, used)


@torch.inference_mode()
def draw(
    model: Model, screen: Screen, label: Label, *, cells: int, seed: int
) -> tuple[Float[Tensor, "cells genes"], Int[np.ndarray, "cells"]]:
    """Generate cells of one condition, and name the rows of the control cells that they came from."""
    model.eval()
    device = _device(model)
    random = np.random.default_rng(_seed(seed, label))
    rows = _balanced(screen.control_rows(label), cells, random)
    rng = torch.Generator(device).manual_seed(int(random.integers(2**62)))
    condition = model.spec.encode([label]).to(device)
    chunks = [
        model.sample(torch.from_numpy(screen.gather(chunk)).to(device)[None], condition, rng)[0].float()
        for chunk in np.split(rows, range(CHUNK, cells, CHUNK))
    ]
    return torch.cat(chunks), rows


def _device(model: Model) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _seed(seed: int, label: Label) -> list[int]:
    """Words that differ for each seed and condition."""
    text = hashlib.sha256(str(label).encode()).digest()
    return [seed, int.from_bytes(text[:8], "little")]


def _balanced(
    rows: Int[np.ndarray, "controls"], cells: int, random: np.random.Generator
) -> Int[np.ndarray, "cells"]:
    """Draw rows so that none is used more than once oftener than another, in random order."""
    rounds = [random.permutation(rows) for _ in range(-(-cells // len(rows)))]
    return np.concatenate(rounds)[:cells]


def _assemble(
    screen: Screen,
    labels: Sequence[Label],
    blocks: Sequence[sp.csr_matrix],
    used: Sequence[Int[np.ndarray, "cells"]],
) -> anndata.AnnData:
    """Predicted cells and, below them, the control cells of their contexts."""
    context = {row: label for label in screen.controls for row in screen.rows[label].tolist()}
    controls = np.unique(np.concatenate([screen.control_rows(label) for label in labels]))
    names = np.asarray(screen.cells, dtype=object)
    kinds = [label for label, rows in zip(labels, used, strict=True) for _ in rows]
    kinds += [context[row] for row in controls.tolist()]
    origin = np.concatenate([*used, controls])
    num_predicted = len(origin) - len(controls)
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical([label.perturbation for label in kinds]),
            "control": [label.is_control for label in kinds],
            **{
                covariate.name: pd.Categorical([label.covariates[i] for label in kinds])
                for i, covariate in enumerate(screen.covariates)
            },
            "control_cell": names[origin],
        },
        index=pd.Index([*(f"predicted_{i}" for i in range(num_predicted)), *names[controls]]),
    )
    if screen.dose_unit is not None:
        obs["dose"] = pd.Categorical(["+".join(f"{dose:g}" for dose in label.doses) for label in kinds])
    matrix = sp.vstack([*blocks, sp.csr_matrix(screen.gather(controls))], format="csr", dtype=np.float32)
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(screen.genes)))
