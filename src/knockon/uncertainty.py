"""How far off predicted means are: a standard error of each gene, from refits and from what training missed.

*Refits*: the model is fitted again to cells that were drawn with replacement within each condition. The
spread of what it predicts is the part of the error that more cells would take away. *Misses*: training
conditions are predicted as if they had not been measured. What they are missed by, less the noise of their
own cells, is the part that more cells would leave: a share of the variance of the gene within conditions,
for half of which the misses of the gene itself stand, and a share of the squared change, since large changes
are missed by more. Both parts together make the error. See docs/uncertainty.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import norm
from torch import Tensor

from knockon.data.screen import Screen
from knockon.model import Model, name_of
from knockon.models._pulled import PulledModel
from knockon.models.response_surface import BLOCK, ResponseSurface
from knockon.models.ripple import Ripple
from knockon.predict import refuse_unknown
from knockon.run import Run
from knockon.types import Condition, Label, UserError

FITS = 10
"""How often a model is fitted again."""
INSIDE = 0.95
"""Share of true means that should lie between ``low`` and ``high``."""

Values = Float[np.ndarray, "conditions genes"]


def errors(
    run: Run,
    labels: Sequence[Label],
    *,
    fits: int = FITS,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Tell how far off the means of predicted conditions are, gene by gene.

    Parameters
    ----------
    run
        Of ``response_surface`` or ``ripple``, or of a model whose cells are moved to the mean of ripple.
    fits
        How often the model is fitted again.
    seed
        Of the cells that are drawn for it.
    advance
        Called after each fit, for a progress bar.

    Returns
    -------
    DataFrame
        One line for each condition and gene: ``condition, gene, control, mean, standard_error, low, high``,
        in log1p. The interval is meant to hold the true mean with a probability of .95. There is no
        standard error of what was only guessed, or where training could not tell.

    Raises
    ------
    UserError
        If the means of the model are not those of ``response_surface``.
    """
    anchor = anchor_of(run.model)
    if anchor is None:
        raise UserError(
            f"There are no standard errors of {name_of(run.model)}",
            expected="ripple, response_surface, or a log1p model that is wholly pulled to ripple",
            mend="knockon train ripple",
        )
    refuse_unknown(run.model, labels)
    learned = run.split.train if run.record.train.steps else (*run.split.train, *run.split.validation)
    train = run.screen.select((*learned, *run.screen.controls))
    found = standard_errors(anchor, train, labels, fits=fits, seed=seed, advance=advance)
    condition = _encoded(anchor, labels)
    with torch.no_grad():
        mean, control = _plain(anchor.mean(condition)), _controls(anchor, condition)
    wide = norm.ppf((1 + INSIDE) / 2) * found
    columns = {
        "control": control,
        "mean": mean,
        "standard_error": found,
        "low": (mean - wide).clip(min=0),
        "high": mean + wide,
    }
    genes = len(anchor.spec.genes)
    return pd.DataFrame(
        {
            "condition": np.repeat([str(label) for label in labels], genes),
            "gene": np.tile(np.array(anchor.spec.genes), len(labels)),
            **{name: values.ravel() for name, values in columns.items()},
        }
    )


def anchor_of(model: Model) -> ResponseSurface | None:
    """Find the response surface whose means a model's cells have, in its units; None where it has others."""
    if isinstance(model, PulledModel):
        moved = model.pulled and model.ripple is not None and model.weight == 1 and model.units == "log1p"
        found = model.ripple if moved else None
    else:
        found = model
    if isinstance(found, Ripple):
        found = found.anchor
    return found if isinstance(found, ResponseSurface) else None


@torch.no_grad()
def standard_errors(
    model: ResponseSurface,
    train: Screen,
    labels: Sequence[Label],
    *,
    fits: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Values:
    """Combine refits and misses; what was measured, as training conditions were, has refits alone.

    NaN where a part of a condition was guessed, or training has none like it to tell.

    Parameters
    ----------
    model
        Fitted to ``train``.
    """
    condition = _encoded(model, labels)
    known = model.rows_of(condition).any(1) | (condition.perturbation == 0).all(1)
    like = model.measures(condition) & (_combined(condition) | ~_combined(model.effects.measured).any())
    known, like = (mask.cpu().numpy()[:, None] for mask in (known, like))
    found = refits(model, train, labels, fits, seed, advance)
    return np.where(known, found, np.where(like, np.hypot(found, misses(model, train, labels)), np.nan))


@torch.no_grad()
def refits(
    model: ResponseSurface,
    train: Screen,
    labels: Sequence[Label],
    fits: int,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Values:
    """Find how much predictions differ between fits to cells that are drawn with replacement."""
    if fits < 2:
        raise UserError(f"{fits} fits", expected="at least 2, which can differ")
    draw, means = np.random.default_rng(seed), []
    for _ in range(fits):
        rows = {label: np.sort(draw.choice(some, len(some))) for label, some in train.rows.items()}
        again = model.config.build(model.spec)
        again.fit_statistics(replace(train, rows=rows))
        again.to(model.spread.device)
        means.append(_plain(again.mean(_encoded(again, labels))))
        advance()
    return np.stack(means).std(axis=0, ddof=1)


@torch.no_grad()
def misses(model: ResponseSurface, train: Screen, labels: Sequence[Label]) -> Values:
    """Expect by how much conditions are missed that are like those of training; a root mean square.

    NaN where no training condition can be predicted without itself.
    """
    asked = model.effects.measured
    rows = _combined(asked) if _combined(asked).any() else ~_combined(asked)
    parts = rows.nonzero().flatten().split(BLOCK)
    told = torch.cat([x[model.measures(asked[x], model.rows_of(asked[x]))] for x in parts])
    change = _plain(model.mean(_encoded(model, labels))) - _controls(model, _encoded(model, labels))
    if not len(told):
        return np.full(change.shape, np.nan)
    held = np.concatenate([_plain(model.held_out(asked[x])) for x in told.split(BLOCK)])
    cells = [train.moments[train.conditions[row]] for row in told.tolist()]
    squares = np.square(held - np.stack([one.mean for one in cells]))
    squares -= np.stack([np.square(one.std) / one.cells for one in cells])
    changes = np.square(held - _controls(model, asked[told]))
    within = np.square(_plain(model.spread))
    large, whole = changes > within, np.broadcast_to(within, changes.shape)
    of_within = _share(squares[~large], whole[~large])
    of_change = _share((squares - of_within * whole)[large], changes[large])
    own = (squares - of_change * changes).mean(axis=0).clip(min=0)
    return np.sqrt((own + of_within * within) / 2 + of_change * np.square(change))


def _share(part: Float[np.ndarray, "_"], whole: Float[np.ndarray, "_"]) -> float:
    return max(0.0, part.sum() / whole.sum()) if len(whole) else 0.0


def _combined(condition: Condition) -> Bool[Tensor, "sets"]:
    return (condition.perturbation > 0).sum(1) > 1


def _encoded(model: ResponseSurface, labels: Sequence[Label]) -> Condition:
    return model.spec.encode(labels).to(model.spread.device)


def _controls(model: ResponseSurface, condition: Condition) -> Values:
    """Means of the control cells of conditions, as the model knows them."""
    nothing = replace(condition, perturbation=torch.zeros_like(condition.perturbation))
    return _plain(model.mean(nothing))


def _plain(values: Tensor) -> Float[np.ndarray, "*shape"]:
    return values.double().cpu().numpy()
