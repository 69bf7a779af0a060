"""Predictions as others take them: the Virtual Cell Challenge of 2026, for one.

What it takes: raw whole counts of one context, the genes of its panel in their order, ``obs["target"]`` with
the perturbed gene or ``non-targeting``, 400 cells of each target, and at most a million counts in a cell. The
real control cells of the context are below the predicted ones, because the package that scores wants them
on both sides (it subtracts the real ones, whatever a file says).

Its checks are run on what is to be written: the values and limits are refused by them, in their words. What
the package does not enforce (the number of cells and genes, names that are no genes) is said.
"""

import logging
import zlib
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Int

from knockon.data.arrays import totals
from knockon.data.screen import Screen
from knockon.evaluate.counting import drawn
from knockon.evaluate.populations import num_cells
from knockon.evaluate.prediction import Prediction
from knockon.evaluate.suites.bridges import KEY, quiet
from knockon.evaluate.suites.vcc_2026 import config
from knockon.types import CONTROL, Label, UserError

log = logging.getLogger("knockon")

TARGET, UNTARGETED = "target", "non-targeting"
CELLS, GENES = 400, 18_533
"""Of each target, and of the panel, in the challenge."""


def vcc2026(found: Prediction, screen: Screen, *, seed: int = 0) -> anndata.AnnData:
    """Bring predicted cells into the form of the challenge.

    Parameters
    ----------
    found
        Predicted cells of one context. Values in log1p become counts that are drawn by the library sizes of
        the control cells that they came from (see ``counting``) or, where the file does not tell those, of
        control cells drawn at random, which is said.
    screen
        Gives the panel and the control cells of the context, in counts. Its perturbed cells are not looked
        at: for a new context there are none.
    seed
        Of what is drawn.

    Raises
    ------
    UserError
        If genes are missing, there are several contexts, the screen is not in counts, or the package refuses
        the cells.
    """
    if screen.units != "counts":
        raise UserError(
            "The screen is in log1p", expected="counts of control cells", mend="choose --layer counts"
        )
    labels = _labels(found)
    columns = _columns(found, screen)
    control = screen.control_rows(labels[0])
    cells = [sp.csr_matrix(found.matrix[found.rows[label]][:, columns]) for label in labels]
    if found.units == "log1p":
        cells = _counted(cells, labels, found, screen, seed)
    _say(cells, labels, screen)
    blocks = [*cells, sp.csr_matrix(screen.matrix[control])]
    names = [label.perturbation for label in (*labels, labels[0].control())]
    made = anndata.AnnData(
        sp.vstack(blocks, format="csr", dtype=np.float64),
        obs=_obs(names, blocks, labels[0], screen),
        var=pd.DataFrame(index=pd.Index(screen.genes)),
        uns={"knockon": {"model": found.model, "units": "counts"}},
    )
    _refuse(made)
    made.X = sp.csr_matrix(made.X, dtype=np.int32)
    return made


def _labels(found: Prediction) -> list[Label]:
    """Find the predicted conditions, which must be of one context."""
    labels = [label for label in found.rows if not label.is_control]
    if not labels:
        raise UserError("The prediction has control cells only", expected="cells of perturbations")
    contexts = sorted({" | ".join(label.covariates) for label in labels})
    if len(contexts) > 1:
        raise UserError(
            "The prediction is of several contexts",
            offenders=contexts,
            expected="one context in a file",
            mend="predict, and export, each context on its own",
        )
    return labels


def _columns(found: Prediction, screen: Screen) -> Int[np.ndarray, "genes"]:
    """Place of each gene of the panel."""
    place = {gene: i for i, gene in enumerate(found.genes)}
    missing = [gene for gene in screen.genes if gene not in place]
    if missing:
        raise UserError(
            f"The prediction lacks {len(missing):,} of the panel's {len(screen.genes):,} genes",
            offenders=missing,
            expected="all genes of the screen: the challenge takes no others, and no fewer",
            mend="train on all genes, without --genes",
        )
    return np.array([place[gene] for gene in screen.genes])


def _counted(
    cells: Sequence[sp.csr_matrix], labels: Sequence[Label], found: Prediction, screen: Screen, seed: int
) -> list[sp.csr_matrix]:
    """Draw counts for cells in log1p."""
    origins = found.origins(screen)
    if origins is None:
        log.info("the prediction does not tell its control cells: library sizes are those of random ones")
    counts = []
    for label, some in zip(labels, cells, strict=True):
        rng = np.random.default_rng([seed, zlib.crc32(str(label).encode())])
        rows = screen.control_rows(label)
        rows = rng.choice(rows, num_cells(some)) if origins is None else origins[found.rows[label]]
        counts.append(drawn(some, totals(screen.matrix, rows), rng))
    log.info("values in log1p became counts: of the size of control cells, rounded at random")
    return counts


def _say(cells: Sequence[sp.csr_matrix], labels: Sequence[Label], screen: Screen) -> None:
    """Say in what the file is not what the challenge asks for, though its package would score it."""
    sizes = sorted({num_cells(some) for some in cells})
    if sizes != [CELLS]:
        log.warning("the challenge takes %d cells of each target; here are %s", CELLS, _range(sizes))
    if len(screen.genes) != GENES:
        log.warning("the panel of the challenge has %d genes; this one has %d", GENES, len(screen.genes))
    panel = set(screen.genes)
    others = [label.perturbation for label in labels if label.perturbation not in panel]
    if others:
        log.warning("%d targets are no genes of the panel, such as %s", len(others), others[0])


def _range(sizes: Sequence[int]) -> str:
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _obs(names: Sequence[str], blocks: Sequence[sp.csr_matrix], label: Label, screen: Screen) -> pd.DataFrame:
    """Columns of the challenge, and those by which knockon reads the file again."""
    texts = np.repeat(names, [num_cells(block) for block in blocks])
    obs = pd.DataFrame({TARGET: pd.Categorical(np.where(texts == CONTROL, UNTARGETED, texts))})
    obs[KEY] = pd.Categorical(texts)
    for covariate, level in zip(screen.covariates, label.covariates, strict=True):
        obs[covariate.name] = pd.Categorical([level] * len(obs))
    obs.index = pd.Index([f"cell{i}" for i in range(len(obs))])
    return obs


def _refuse(made: anndata.AnnData) -> None:
    """Let the package that scores check values and limits; genes are the panel's by construction."""
    settings = config(set(), key=TARGET, control=UNTARGETED)
    from cell_eval2 import norm  # noqa: PLC0415 (an extra, there or ``config`` had refused)

    try:
        with quiet("cell_eval2"):
            norm.validate_input_type(made, settings.input_type)
            norm.check_scale_limit(made, settings.input_type, settings.max_counts_per_cell)
    except ValueError as error:
        raise UserError(
            f"cell-eval2 refuses these cells ({' '.join(str(error).split())})",
            expected="raw whole counts, none negative, at most a million in a cell",
        ) from error
