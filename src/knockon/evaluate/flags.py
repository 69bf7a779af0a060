"""Flags against self-deception: what is wrong with a prediction although its scores may look well.

Each flag is a pure function of ``Evidence`` that gives one row for each condition that raises it, or one for
all. All look at the real test cells, and ``copies`` at training cells too. Each limit leaves room for the
sampling of finitely many cells: lengths and spreads of changes are unbiased (the variance of both means is
taken out of their squares), and where ratios are judged, the same ratio between two halves of the real cells
(of as many cells as were predicted, if those are fewer) widens the limit. So a replicate raises none.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Int
from scipy.spatial import KDTree

from knockon.data.values import blocks
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import exact, num_cells, num_distinct
from knockon.evaluate.sides import ENOUGH, HALVINGS, Evidence, Side, Values, contexts, gather
from knockon.evaluate.suites import ALL
from knockon.evaluate.truth import Truth
from knockon.types import Label

Raised = tuple[str, float, float, str]
"""Condition, value, limit and message."""

COLUMNS = ("flag", "condition", "value", "limit", "message")
"""Of the table of raised flags."""
CLEAR = 3.0
"""Standard errors by which a gene must change to be said to change."""
AWAY = -0.5
"""Cosine of predicted and real change below which one points away from the other."""
LEAST = 10
"""Genes without which nothing is said of their directions."""
JUDGED = 0.6
"""Ratio between halves of the real cells below which these are too noisy to judge a prediction by."""

SEARCHED = 2**18
"""Training cells that are searched for copies at a time."""


# ---- changes of the mean -----------------------------------------------------------------------------


def sign_flip(evidence: Evidence) -> Iterator[Raised]:
    """Genes that clearly change on both sides and nearly all in opposite directions, or changes that do."""
    changes = [side.of.mean - evidence.truth.control for side in (evidence.real, evidence.predicted)]
    clear = [
        np.abs(change) > CLEAR * np.sqrt(side.noise + evidence.control_noise + 1e-12)
        for change, side in zip(changes, (evidence.real, evidence.predicted), strict=True)
    ]
    both, limit = clear[0] & clear[1], 0.75
    wrong = (both & (changes[0] * changes[1] < 0)).sum(axis=1)
    rows = zip(evidence.names, wrong.tolist(), both.sum(axis=1).tolist(), _cosines(evidence), strict=True)
    for name, count, out_of, cosine in rows:
        if out_of >= LEAST and count > limit * out_of:
            yield (
                *(name, count / out_of, limit),
                f"of {out_of} genes that change in the predicted and in the real cells, {count} change in "
                "the wrong direction",
            )
        elif cosine < AWAY:
            yield (
                *(name, cosine, AWAY),
                f"the predicted change as a whole points away from the real one (cosine {cosine:.2f})",
            )


def _cosines(evidence: Evidence) -> list[float]:
    """Cosine of predicted and real change, all genes, less the noise of control that both share.

    NaN where either change is not twice its noise.
    """
    sides = evidence.predicted, evidence.real
    product = np.prod([side.of.mean - evidence.truth.control for side in sides], axis=0)
    inner = np.sum(product - evidence.control_noise, axis=1)
    squares = [evidence.strength(side) for side in sides]
    noises = [np.sum(side.noise + evidence.control_noise, axis=1) for side in sides]
    clear = (squares[0] > 2 * noises[0]) & (squares[1] > 2 * noises[1])
    lengths = np.sqrt(np.where(clear, squares[0] * squares[1], 1.0))
    return np.where(clear, inner / lengths, np.nan).tolist()


def collapse(evidence: Evidence) -> Iterator[Raised]:
    """Predicted conditions that differ from each other far less than the real ones do."""
    sides = evidence.predicted, evidence.real
    enough = (sides[1].count >= ENOUGH) & ((sides[0].count >= ENOUGH) | (sides[0].count == 1))
    context = np.array([contexts(evidence.truth).index(x.covariates) for x in evidence.truth.labels])
    groups = [np.flatnonzero(enough & (context == one)) for one in set(context[enough].tolist())]
    spare = sum(len(group) - 1 for group in groups)
    if spare == 0:
        return
    noises = [float(side.noise[enough].sum(axis=1).mean()) for side in sides]
    squares = [
        sum(np.square(side.of.mean[g] - side.of.mean[g].mean(axis=0)).sum() for g in groups) / spare - noise
        for side, noise in zip(sides, noises, strict=True)
    ]
    predicted, real = np.sqrt(np.maximum(squares, 0.0)).tolist()
    if squares[1] > noises[1] and predicted < 0.25 * real:
        message = f"all {enough.sum()} conditions alike (spread {_text(predicted)} of the real {_text(real)})"
        yield ALL, predicted, 0.25 * real, message


def scaled(evidence: Evidence) -> Iterator[Raised]:
    """Predicted changes that are far smaller or larger, all genes together, than the real ones."""

    def ratio(one: Side, other: Side) -> Values:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(evidence.strength(one) / evidence.strength(other))

    noise = sum(side.noise for side in (evidence.predicted, evidence.real)) + evidence.control_noise
    measured = evidence.strength(evidence.real) > 2 * np.sum(noise, axis=1)
    room = np.where(measured, evidence.room(ratio), 0.0)
    for name, value, limits in _outside(
        evidence.names, ratio(evidence.predicted, evidence.real), room, 2 / 3
    ):
        yield (
            *(name, value, limits[value > 1]),
            f"the predicted change is {_text(value)} times as large as the real one (all genes together)",
        )


def drifted_controls(evidence: Evidence) -> Iterator[Raised]:
    """Predicted control cells whose mean is not that of the real ones."""
    truth, present = evidence.truth, evidence.pairs.present
    genes = np.arange(len(truth.screen.genes)) if present is None else np.flatnonzero(present)
    strength, rng = evidence.strength(evidence.real), np.random.default_rng(0)
    for context in contexts(truth):
        drifted, real = (
            evidence.pairs.controls.get(context),
            truth.population(Label(covariates=context))[:, genes],
        )
        if drifted is None or num_cells(real) < 4:
            continue
        here = [label.covariates == context for label in truth.labels]
        typical = float(np.median(strength[here]))
        few, off = min(num_cells(drifted), num_cells(real) // 2), []
        for _ in range(HALVINGS):
            order = rng.permutation(num_cells(real))
            off.append(_apart(real[order[:few]], real[order[few:]]))
        limit = np.sqrt(max(typical / 16, 2 * max(off)))
        value = np.sqrt(max(_apart(drifted[:, genes], real), 0.0))
        if value > limit:
            where = f" of {' | '.join(context)}" if context else ""
            yield (
                *(str(truth.labels[here.index(True)].control()), value, limit),
                f"the control cells{where} in the prediction differ from the real ones by {_text(value)}, "
                f"where a real effect is {_text(np.sqrt(typical))}; scores refer to the real ones",
            )


def _apart(one: sp.csr_matrix, other: sp.csr_matrix) -> float:
    """Squared distance of the means of two populations, unbiased."""
    a, b = Side.make([one]), Side.make([other])
    return float((np.square(a.of.mean - b.of.mean) - a.noise - b.noise).sum())


def spikes(evidence: Evidence) -> Iterator[Raised]:
    """Genes that other conditions perturb, predicted to change as they never do without that."""
    truth = evidence.truth
    place = {gene: i for i, gene in enumerate(truth.screen.genes)}
    conditions = truth.screen.conditions
    own = np.zeros((len(conditions), len(place)), dtype=bool)
    for row, label in enumerate(conditions):
        own[row, [place[name] for name in label.perturbations if name in place]] = True
    genes = own.any(axis=0)
    if not genes.any() or genes.all():
        return
    change = np.abs(evidence.predicted.of.mean - truth.control)
    variance = np.maximum(evidence.real.of.variance, evidence.predicted.of.variance)
    error = np.sqrt(variance / evidence.predicted.count[:, None] + evidence.control_noise)
    for row, name in enumerate(evidence.names):
        here = truth.rivals[row] | (np.arange(len(conditions)) == truth.own[row])
        real = np.where(own[here], 0.0, np.abs(truth.candidates[here] - truth.control[row])).max(axis=0)
        limit = 2 * real + 5 * error[row] + 0.1
        ratio = change[row] / limit
        others = genes & ~own[truth.own[row]]
        usual = max(1.0, 2 * float(np.quantile(ratio[~genes], 0.95)))
        worst = int(np.argmax(np.where(others, ratio, 0.0)))
        if others.any() and ratio[worst] > usual:
            yield (
                *(name, float(change[row, worst]), float(usual * limit[worst])),
                f"{truth.screen.genes[worst]}, which only other conditions perturb, is predicted to change "
                f"by {_text(change[row, worst])}; without being perturbed it really changes by "
                f"{_text(real[worst])} at most",
            )


# ---- populations -------------------------------------------------------------------------------------


def repeated_cells(evidence: Evidence) -> Iterator[Raised]:
    """Exact copies among the predicted cells of a condition, more than among the real ones."""
    sides = zip(evidence.names, evidence.pairs.cells, evidence.truth.cells, strict=True)
    for name, predicted, real in sides:
        count, distinct = num_cells(predicted), num_distinct(predicted)
        usual = (1 - num_distinct(real) / num_cells(real)) * max(1.0, count / num_cells(real))
        limit, value = 0.1 + 2 * usual, 1 - distinct / count
        if value > limit:
            message = (
                f"all {count} predicted cells are one and the same, a repeated mean and no population"
                if distinct == 1
                else f"only {distinct} of {count} predicted cells are different from each other"
            )
            yield name, value, limit, message


def over_dispersion(evidence: Evidence) -> Iterator[Raised]:
    """Predicted cells that vary far more than real ones, in genes whose means are about right."""
    yield from (raised for raised in _dispersion(evidence) if raised[1] > 1)


def under_dispersion(evidence: Evidence) -> Iterator[Raised]:
    """Predicted cells that vary far less than real ones, in genes whose means are about right."""
    yield from (raised for raised in _dispersion(evidence) if raised[1] < 1)


def _dispersion(evidence: Evidence) -> Iterator[Raised]:
    room, found = evidence.room(_variances), _variances(evidence.predicted, evidence.real)
    for name, value, limits in _outside(evidence.names, found, room, 1 / 2):
        kind = "more" if value > 1 else "less"
        yield (
            *(name, value, limits[value > 1]),
            f"predicted cells vary {kind} than real ones ({_text(value)} times the variance, median gene)",
        )


def _variances(one: Side, other: Side) -> Values:
    """Median ratio of variances over genes that are expressed, with means that agree; NaN of few genes."""
    means = one.of.mean, other.of.mean
    alike = np.abs(means[0] - means[1]) <= 0.25 * np.maximum(*means)
    chosen = alike & (other.of.zeros < 0.9) & (other.of.variance > 0)
    ratios = one.of.variance / np.where(chosen, other.of.variance, 1.0)
    return np.array(
        [np.median(x[c]) if c.sum() >= 10 else np.nan for x, c in zip(ratios, chosen, strict=True)]
    )


def never_off(evidence: Evidence) -> Iterator[Raised]:
    """Genes that real cells do not all express, but (almost) all predicted cells do."""
    limit, count = 0.25, evidence.predicted.count[:, None]
    real, predicted = evidence.real.of.zeros, evidence.predicted.of.zeros
    partly = real >= np.maximum(0.1, 1 - 0.01 ** (1 / count))  # enough cells to see a zero, were there any
    never = partly & (predicted < real / 10)
    for name, on, out_of in zip(evidence.names, never.sum(1).tolist(), partly.sum(1).tolist(), strict=True):
        if out_of >= 5 and on > limit * out_of:
            yield (
                *(name, on / out_of, limit),
                f"{on} of {out_of} genes that are off in a part of the real cells are on in almost every "
                "predicted cell",
            )


# ---- training cells ----------------------------------------------------------------------------------


def copies(evidence: Evidence) -> Iterator[Raised]:
    """Measured cells given as a prediction, or a mean too near to that of one training condition."""
    yield from _copied_tests(evidence)
    yield from _copied_cells(evidence)
    yield from _copied_means(evidence)


def _copied_tests(evidence: Evidence) -> Iterator[Raised]:
    """Predicted cells that are the very cells they are scored against: the truth, handed in by mistake."""
    sides = zip(evidence.names, evidence.pairs.cells, evidence.truth.cells, strict=True)
    for name, predicted, real in sides:
        both, count = sp.csr_matrix(sp.vstack([predicted, real])), num_cells(predicted)
        shared = num_distinct(predicted) + num_distinct(real) - num_distinct(both)
        limit = 0.05 + 2 * (1 - num_distinct(real) / num_cells(real))
        if shared > limit * count:
            message = f"{shared} of {count} predicted cells are the very cells that they are scored against"
            yield name, shared / count, limit, message


def _copied_cells(evidence: Evidence) -> Iterator[Raised]:
    """Predicted cells that are training cells of some perturbation, but for rounding.

    Cells are told by their sums under 16 random weights of genes, in which no two cells come close by chance.
    """
    truth, limit = evidence.truth, 0.05
    weights = np.random.default_rng(0).normal(size=(len(truth.screen.genes), 16))
    marks = [cells @ weights for cells in (*evidence.pairs.cells, *truth.cells)]
    near = [1e-4 * (float(np.median(np.linalg.norm(some, axis=1))) + 1e-9) for some in marks]
    sources = _sources(truth, weights, marks, near)
    sides = zip(evidence.names, sources[: len(truth.labels)], sources[len(truth.labels) :], strict=True)
    for name, predicted, real in sides:
        found, count = predicted[predicted >= 0], len(predicted)
        usual = 2 * np.count_nonzero(real >= 0) / len(real)
        if len(found) > (limit + usual) * count:
            source = truth.train[np.bincount(found).argmax()]
            yield (
                *(name, len(found) / count, limit + usual),
                f"{len(found)} of {count} predicted cells are cells of the training data, mostly of {source}",
            )


def _sources(
    truth: Truth, weights: np.ndarray, marks: Sequence[np.ndarray], near: Sequence[float]
) -> list[Int[np.ndarray, "_"]]:
    """Training condition of the nearest training cell of each mark; -1 where none is near."""
    rows = np.concatenate([truth.screen.rows[label] for label in truth.train])
    origin = np.repeat(np.arange(len(truth.train)), [len(truth.screen.rows[x]) for x in truth.train])
    every, within = np.concatenate(marks), np.repeat(near, [len(some) for some in marks])
    source = np.full(len(every), -1)
    for start in range(0, len(rows), SEARCHED):
        some = blocks(truth.screen.matrix, rows[start : start + SEARCHED])
        tree = KDTree(np.concatenate([block @ weights for block in some]))
        distance, nearest = (np.asarray(x) for x in tree.query(every, distance_upper_bound=max(near)))
        found = distance < within
        source[found], within[found] = origin[start + nearest[found]], distance[found]
    return np.split(source, np.cumsum([len(some) for some in marks])[:-1])


def _copied_means(evidence: Evidence) -> Iterator[Raised]:
    """Means that are nearer to the measured mean of a training condition than its replicate would be.

    Squared distances over genes in units of their standard errors: 1 for a replicate, and less only for what
    has the very sampling noise of that measurement.
    """
    truth, limit = evidence.truth, 0.4
    known = [label for label in truth.train if len(truth.screen.rows[label]) >= ENOUGH]
    sides = {label: Side.make([exact(truth.screen.matrix[truth.screen.rows[label]])]) for label in known}
    for row, (name, label) in enumerate(zip(evidence.names, truth.labels, strict=True)):
        fit = evidence.predicted.count[row] >= ENOUGH
        rivals = [other for other in known if fit and other.covariates == label.covariates]
        ratios = [_nearness(evidence.predicted, row, sides[other]) for other in rivals]
        if ratios and min(ratios) < limit:
            nearest = rivals[int(np.argmin(ratios))]
            yield (
                *(name, min(ratios), limit),
                f"its mean is nearer to that of the training condition {nearest} than a second measurement "
                f"of {nearest} would be ({_text(min(ratios))} of the squared distance)",
            )


def _nearness(predicted: Side, row: int, training: Side) -> float:
    variance, count = training.of.variance[0], predicted.count[row]
    varies = (variance > 0) & (training.of.zeros[0] < 0.9)
    if varies.sum() < 10:
        return np.inf
    squares = np.square(predicted.of.mean[row] - training.of.mean[0])[varies]
    return float(np.mean(squares / (variance[varies] * (1 / count + 1 / training.count[0]))))


# ---- the tuple ---------------------------------------------------------------------------------------


def _outside(
    names: Sequence[str], found: Values, room: Values, limit: float
) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """Ratios that are below a limit or above its reciprocal, each widened by what a replicate may have."""
    for name, value, widened in zip(names, found.tolist(), (limit * room).tolist(), strict=True):
        if widened >= JUDGED * limit and np.isfinite(value) and not widened <= value <= 1 / widened:
            yield name, value, (widened, 1 / widened)


def _text(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"


FLAGS: tuple[Callable[[Evidence], Iterator[Raised]], ...] = (
    *(sign_flip, collapse, scaled, drifted_controls, spikes),
    *(repeated_cells, over_dispersion, under_dispersion, never_off, copies),
)
"""By the name of the function."""


def check(pairs: Pairs) -> pd.DataFrame:
    """Raise flags.

    Returns
    -------
    DataFrame
        ``flag, condition, value, limit, message``: one row for each flag and condition that raises it; the
        condition is ``suites.ALL`` where it is of the whole prediction, and the control for drifted ones.
    """
    evidence = gather(pairs)
    rows = [(getattr(flag, "__name__", ""), *raised) for flag in FLAGS for raised in flag(evidence)]
    return pd.DataFrame.from_records(rows, columns=COLUMNS)


def describe(raised: pd.DataFrame) -> list[str]:
    """One line for each flag: what it says, of the condition that is farthest beyond the limit."""
    lines = []
    for flag, rows in raised.groupby("flag", sort=False):
        beyond = np.abs(np.log(rows["value"].clip(1e-9) / rows["limit"].clip(1e-9)))
        worst = rows.loc[beyond.idxmax()]
        where = "" if worst["condition"] == ALL else f"{worst['condition']}: "
        many = f"{len(rows)} conditions, worst " if len(rows) > 1 else ""
        lines.append(f"{flag}: {many}{where}{worst['message']}")
    return lines
