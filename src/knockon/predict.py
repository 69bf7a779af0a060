"""From a run and conditions to cells: an AnnData with named genes, declared units and its origin."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knockon import devices
from knockon.data.screen import Screen
from knockon.model import Model, device_of, name_of
from knockon.types import Covariate, Label, Noise, UserError

CHUNK = 256
"""Cells that a model generates at once."""


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

    A condition's cells depend on the model, the seed and the condition, and (but for rounding) not on what
    else is asked for. Control cells are used equally often. Processes that work together
    share the conditions.

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
        ``dose`` where the screen has doses, and ``control_cell``. Only the first process has the
        predicted cells.

    Raises
    ------
    Refusal
        If the model has no basis to predict a condition.
    """
    if not labels:
        raise UserError("No condition to predict", mend="name some, or choose a part that the split has")
    refuse_few(cells)
    refuse_unknown(model, labels)
    made = []
    for group in devices.share(list(groups(labels, cells))):
        made.append([])
        for drawn, rows in draw(model, screen, group, cells=cells, seed=seed):
            made[-1].append((sp.csr_matrix(drawn.cpu().numpy()), rows))
            advance()
    return _assemble(screen, labels, [one for group in devices.joined_on_first(made) for one in group])


def refuse_few(cells: int) -> None:
    """Refuse to generate no cells."""
    if cells < 1:
        raise UserError(f"{cells} cells per condition", expected="at least 1", mend="set --cells")


def unknown(model: Model, labels: Sequence[Label]) -> list[Label]:
    """List the conditions that a fitted model has no basis to predict."""
    known = model.knows(model.spec.encode(labels).to(device_of(model))).tolist() if labels else []
    return [label for label, is_known in zip(labels, known, strict=True) if not is_known]


def refuse_unknown(model: Model, labels: Sequence[Label]) -> None:
    """Refuse, by name, conditions that a fitted model has no basis to predict."""
    refused = unknown(model, labels)
    if refused:
        raise Refusal(
            f"{name_of(model)} has no basis to predict some conditions",
            offenders=refused,
            expected="perturbations that it was trained on, or that have a vector or a gene in the panel",
            mend="leave them out, or choose a model that knows them (knockon compare has --fallback; some"
            " models let the mean effect stand in: knockon train ... --model.missing mean)",
        )


def all_pairs(model: Model, screen: Screen) -> list[Label]:
    """Pair perturbations that a screen has alone, as far as no cell of it got both, in every context.

    A perturbation given at several doses takes part at each of them, and is not paired with itself.

    Parameters
    ----------
    model
        It must take two perturbations at once.
    screen
        With all its conditions: a pair that is held out was measured, and is no candidate.

    Raises
    ------
    UserError
        If the model takes one perturbation only, or no pair is left.
    """
    if model.spec.slots < 2:
        raise UserError(
            f"{name_of(model)} was trained on a screen without combinations, and takes one perturbation",
            expected="a run on a screen in which some cells got two",
            mend='name single perturbations with --perturbations "A" "B"',
        )
    alone = sorted({label.everywhere for label in screen.conditions if len(label.perturbations) == 1})
    pairs = [
        Label.of(a.perturbations + b.perturbations, a.doses + b.doses, control.covariates)
        for a, b in combinations(alone, 2)
        for control in screen.controls
        if a.perturbations != b.perturbations
    ]
    found = [pair for pair in pairs if pair not in screen.rows]
    if not found:
        raise UserError(
            "No pair is left to predict",
            expected=f"pairs of {len(alone)} perturbations measured alone that were not measured together",
            mend='name conditions with --perturbations "A+B"',
        )
    return found


@torch.inference_mode()
def draw(
    model: Model, screen: Screen, labels: Sequence[Label], *, cells: int, seed: int
) -> list[tuple[Float[Tensor, "cells genes"], Int[np.ndarray, "cells"]]]:
    """Generate cells of some conditions side by side, and name the control cells that they came from.

    What is drawn for a condition does not depend on the others.

    Returns
    -------
    list
        For each condition, its cells and the rows of their control cells.
    """
    model.eval()
    device = device_of(model)
    randoms = [np.random.default_rng(words_of(seed, str(label))) for label in labels]
    rows = np.stack(
        [_balanced(screen.control_rows(x), cells, r) for x, r in zip(labels, randoms, strict=True)]
    )
    noise = Noise(*(torch.Generator(device).manual_seed(int(r.integers(2**62))) for r in randoms))
    condition = model.spec.encode(labels).to(device)
    made = []
    for chunk in np.array_split(rows, -(-cells // CHUNK), axis=1):
        control = torch.from_numpy(screen.gather(chunk.ravel())).to(device).unflatten(0, chunk.shape)
        made.append(model.sample(control, condition, noise).float())
    return list(zip(torch.cat(made, dim=1), rows, strict=True))


def groups(labels: Sequence[Label], cells: int) -> Iterator[Sequence[Label]]:
    """Part conditions into those that are generated side by side: many of few cells, or one of many."""
    at_once = max(1, CHUNK // cells)
    for start in range(0, len(labels), at_once):
        yield labels[start : start + at_once]


def words_of(seed: int, condition: str) -> list[int]:
    """Words to seed a generator with, which differ for each seed and condition."""
    text = hashlib.sha256(condition.encode()).digest()
    return [seed, int.from_bytes(text[:8], "little")]


def described(labels: Sequence[Label], covariates: Sequence[Covariate], *, dosed: bool) -> pd.DataFrame:
    """Columns of ``obs`` that say what was done to cells, in which context and at which dose."""
    columns = {"perturbation": [label.perturbation for label in labels]}
    columns |= {c.name: [label.covariates[i] for label in labels] for i, c in enumerate(covariates)}
    if dosed:
        columns["dose"] = ["+".join(f"{dose:g}" for dose in label.doses) for label in labels]
    return pd.DataFrame({name: pd.Categorical(texts) for name, texts in columns.items()})


def _balanced(
    rows: Int[np.ndarray, "controls"], cells: int, random: np.random.Generator
) -> Int[np.ndarray, "cells"]:
    """Draw rows so that none is used more than once oftener than another, in random order."""
    rounds = [random.permutation(rows) for _ in range(-(-cells // len(rows)))]
    return np.concatenate(rounds)[:cells]


def _assemble(
    screen: Screen,
    labels: Sequence[Label],
    sets: Sequence[tuple[sp.csr_matrix, Int[np.ndarray, "cells"]]],
) -> anndata.AnnData:
    """Predicted cells, where there are any, and below them the control cells of their contexts."""
    controls = np.unique(np.concatenate([screen.control_rows(label) for label in labels]))
    names = np.array(screen.names_of(controls), dtype=object)
    kinds = [label for label, (_, rows) in zip(labels, sets, strict=bool(sets)) for _ in rows]
    context = np.empty(len(controls), dtype=object)
    for label in screen.controls:
        context[np.isin(controls, screen.rows[label])] = label
    kinds += context.tolist()
    origin = np.concatenate([*(rows for _, rows in sets), controls])
    num_predicted = len(origin) - len(controls)
    obs = described(kinds, screen.covariates, dosed=screen.dose_unit is not None)
    obs.index = pd.Index([*(f"predicted_{i}" for i in range(num_predicted)), *names])
    obs.insert(1, "control", np.array([label.is_control for label in kinds]))
    obs["control_cell"] = names[np.searchsorted(controls, origin)]
    blocks = [cells for cells, _ in sets]
    matrix = sp.vstack([*blocks, screen.matrix[controls]], format="csr", dtype=np.float32)
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=pd.Index(screen.genes)))
