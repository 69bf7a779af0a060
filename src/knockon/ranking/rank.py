"""Which condition shall be measured next: candidates ranked by what a model predicts of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from knockon.data.splits import singles
from knockon.ranking.novelty import Experience
from knockon.ranking.source import Draws, OfRun, Source
from knockon.ranking.targets import State, Target
from knockon.run import Run
from knockon.types import Label, UserError

log = logging.getLogger("knockon")

By = Literal["effect", "synergy", "buffering", "similarity"]
"""What candidates are ranked by."""
Drawn = Float[np.ndarray, "draws genes"]
"""Predicted change of the mean against control in each draw, in natural log1p units."""

CHANGED = 0.25
"""Change of the mean of log1p from which a gene counts as changed: a factor of 1.3 where it is abundant."""
SINGLES = 4
"""Times as many cells are drawn of each part of a combination as of the combination."""
NAMED = 3
"""Genes that are named in either direction."""
LEVEL = 0.95
"""Confidence of intervals."""


def square(change: Drawn) -> float:
    """Squared length of the expected change, without the part that the noise of the draws adds.

    The mean of the products of different draws, whose errors are independent: unbiased, and so negative at
    times where there is no effect (a U-statistic [hoeffding1948]).
    """
    draws = len(change)
    return float((np.square(change.sum(0)).sum() - np.square(change).sum()) / (draws * (draws - 1)))


def length(squared: float) -> float:
    """Length of a change whose unbiased square is given; 0 where nothing is left above the noise."""
    return float(np.sqrt(max(squared, 0.0)))


def excess(change: Drawn, expected: Drawn) -> float:
    """By how much a combination's change is longer than additive, along the additive expectation.

    With d the change of the combination and s the sum of those of its parts, <d - s, s> / |s|: a part of
    (k - 1) |s|, where k = <d, s> / <s, s> is the ``scale`` of the combination on the sum (in the way of
    the regression on singles of [norman2019]). Positive for synergy, negative for buffering, in natural log1p
    units. Unlike k, it is small where the parts do next to nothing.

    Parameters
    ----------
    change
        Of the combination.
    expected
        Sum over its parts, drawn independently of it, or the same in every draw.
    """
    mean = expected.mean(0)
    size = float(np.linalg.norm(mean))
    return (float(change.mean(0) @ mean) - square(expected)) / size if size else 0.0


def scale(change: Drawn, expected: Drawn) -> float:
    """Coefficient of a combination's change on the sum of its parts; NaN where these show no change.

    1 is additive, more is synergy, less is buffering.
    """
    squared = square(expected)
    return float(change.mean(0) @ expected.mean(0)) / squared if squared > 0 else np.nan


def cosine(change: Drawn, direction: Float[np.ndarray, "genes"]) -> float:
    """Cosine between the change and the way to a target, from -1 to 1; noise draws it to 0.

    0 without any change.
    """
    mean = change.mean(0)
    size = float(np.linalg.norm(mean) * np.linalg.norm(direction))
    return float(mean @ direction) / size if size else 0.0


def covered(change: Drawn, direction: Float[np.ndarray, "genes"]) -> float:
    """Share of the squared distance from control to a target that a change covers.

    1 - |d - t|^2 / |t|^2, without the noise of the draws: 1 arrives, 0 stays as far as control, below 0 leads
    away.
    """
    whole = float(direction @ direction)
    return 1 - square(change - direction) / whole if whole else np.nan


def interval(estimate: Callable[..., float], *drawn: Drawn) -> tuple[float, float, float]:
    """Estimate, and a 95 % interval between draws: jackknife and t distribution [tukey1958].

    Parameters
    ----------
    estimate
        Smooth function of draws, however many.
    drawn
        Its arguments, with equally many draws; the jackknife leaves one out of each at a time.

    Returns
    -------
    tuple
        Estimate, low, high.
    """
    draws = len(drawn[0])
    value = estimate(*drawn)
    without = np.array([estimate(*(np.delete(x, i, 0) for x in drawn)) for i in range(draws)])
    error = np.sqrt((draws - 1) / draws * np.square(without - without.mean()).sum())
    reach = float(stats.t.ppf((1 + LEVEL) / 2, draws - 1) * error)
    return value, value - reach, value + reach


@dataclass(frozen=True, kw_only=True, eq=False)
class _Question:
    """What is asked of every candidate."""

    source: Source
    by: By
    target: Target | None
    known: Experience

    @property
    def of_combinations(self) -> bool:
        return self.by in ("synergy", "buffering")

    def parts(self, label: Label) -> list[Label]:
        """List what is drawn beside a candidate."""
        return singles(label) if self.of_combinations else []

    def answer(self, label: Label, change: Drawn, parts: Mapping[Label, Drawn]) -> dict[str, object]:
        """Score one candidate and describe it."""
        expected = np.sum([parts[part] for part in self.parts(label)], axis=0) if parts else change
        value, details = self._score(label, change, expected)
        mean, effect = change.mean(0), length(square(change))
        warnings = self.known.warnings(label, effect)
        if parts and details["residual"] > details["expected"]:
            warnings.append("mostly unlike the sum of its parts")
        ends = {"up": np.argsort(-mean, kind="stable"), "down": np.argsort(mean, kind="stable")}
        genes = self.source.measured.genes
        return {
            "condition": str(label),
            **dict(zip(("score", "low", "high"), value, strict=True)),
            "draws": len(change),
            **({} if self.by == "effect" else {"effect": effect}),
            **details,
            "genes_changed": int((np.abs(mean) > CHANGED).sum()),
            **{
                name: " ".join(f"{genes[i]}{mean[i]:+.2f}" for i in order[:NAMED] if abs(mean[i]) > CHANGED)
                for name, order in ends.items()
            },
            "warning": "; ".join(warnings),
        }

    def _score(
        self, label: Label, change: Drawn, expected: Drawn
    ) -> tuple[tuple[float, ...], dict[str, float]]:
        """Score with its interval, and what is told besides."""
        if self.by == "effect":
            # the interval is that of the square, which is smooth at 0
            return tuple(length(x) for x in interval(square, change)), {}
        if self.target is not None:
            way, part = self.target.direction(self.source.control(label)), change[:, self.target.places]
            reached = {"covered": covered(part, way)} if self.target.of_cells else {}
            return interval(lambda x: cosine(x, way), part), reached
        sign = 1 if self.by == "synergy" else -1
        return interval(lambda d, s: sign * excess(d, s), change, expected), {
            "expected": length(square(expected)),
            "scale": scale(change, expected),
            "residual": length(square(change - expected)),
        }


def rank(
    source: Run | Source,
    candidates: Sequence[str | Label] | None = None,
    *,
    by: By = "effect",
    target: State | None = None,
    draws: Draws = Draws(),
    advance: Callable[[], None] = lambda: None,
) -> pd.DataFrame:
    """Rank conditions by what a model predicts of them.

    Every candidate is drawn several times, and each draw gives a change of the mean against the real control
    cells in natural log1p units, over all genes of the panel. By

    - ``effect``: the length of the change (``square``), without what the noise of drawing adds;
    - ``synergy``: how much longer the change is than the sum of those of its parts, along that sum
      (``excess``);
    - ``buffering``: how much shorter;
    - ``similarity``: the cosine with the way from control to a target (``cosine``).

    The parts are what the same model says of each perturbation alone, so that what it shrinks or smooths is
    not taken for an interaction; measured effects serve where it can say nothing.

    Parameters
    ----------
    source
        A run, or cells that were predicted (``knockon.ranking.source.OfFile``).
    candidates
        Such as ``"A+B"``; all pairs without it (see ``knockon.predict.all_pairs``).
    target
        For similarity: weights of genes, or cells.
    draws
        How often and how much is drawn.
    advance
        Called after each candidate, for a progress bar.

    Returns
    -------
    DataFrame
        A row for each candidate, best first: ``rank`` (equal scores share one), ``condition``, ``score``,
        ``low`` and ``high`` (95 % between draws: the noise of generating cells, not the error of the model),
        ``draws``, ``effect``; for combinations ``expected`` (length of the sum of parts), ``scale`` and
        ``residual`` (length of the change that is not in the sum, whatever its direction); for target cells
        ``covered``; ``genes_changed`` (by more than 0.25), the three genes that go ``up`` and ``down`` most,
        and ``warning``, what of it is unlike training. What the model has no basis to predict stands last,
        without rank.

    Raises
    ------
    UserError
        If no candidate can be predicted, or the question does not fit the candidates.
    """
    source = source if isinstance(source, Source) else OfRun(source)
    aligned = _aligned(source, by, target)
    known = Experience.of(source.measured, source.with_vectors)
    question = _Question(source=source, by=by, target=aligned, known=known)
    labels = source.candidates() if candidates is None else source.resolve(candidates)
    labels = _checked(list(dict.fromkeys(labels)), question)
    parts = list(dict.fromkeys(part for label in labels for part in question.parts(label)))
    lacking = set(source.unknown([*labels, *parts]))
    # every single is a part of many pairs, so its noise is kept smaller than theirs
    finer = replace(draws, cells=SINGLES * draws.cells)
    drawn = dict(source.draw([part for part in parts if part not in lacking], finer))
    drawn |= {part: source.observed(part, draws) for part in lacking & set(parts) & set(source.measured.rows)}
    without = {x for x in labels if x in lacking or any(part not in drawn for part in question.parts(x))}
    left_out, asked = ([x for x in labels if (x in without) == refused] for refused in (True, False))
    if not asked:
        raise UserError(
            "The model has no basis to predict any of the candidates",
            offenders=left_out,
            expected="perturbations that it was trained on, or has a vector of",
            mend="rank others, or with another model",
        )
    if left_out:
        named = ", ".join(map(str, left_out[:3])) + (" ..." if len(left_out) > 3 else "")
        log.warning(
            "Left out, without a basis to predict them: %d of %d (%s)", len(left_out), len(labels), named
        )
    rows = []
    for label, change in source.draw(asked, draws):
        rows.append(question.answer(label, change, drawn))
        advance()
    rows += [{"condition": str(x), "warning": "left out: no basis to predict it"} for x in left_out]
    table = pd.DataFrame(rows)
    order = pd.Series(table["score"]).rank(method="min", ascending=False)
    table.insert(0, "rank", order.astype("Int64"))
    return table.sort_values("rank", kind="stable", ignore_index=True)


def _aligned(source: Source, by: By, target: State | None) -> Target | None:
    if (by == "similarity") != (target is not None):
        raise UserError(
            "Similarity without a target" if target is None else f"A target, and a ranking by {by}",
            expected="a target if, and only if, candidates are ranked by similarity",
            mend="--by similarity --target FILE",
        )
    if target is None:
        return None
    aligned = Target.align(target, source.measured, source.total)
    for note in aligned.notes:
        log.info(note)
    return aligned


def _checked(labels: list[Label], question: _Question) -> list[Label]:
    """Refuse candidates that are no answer to the question."""
    fewest = 2 if question.of_combinations else 1
    wrong = [label for label in labels if len(label.perturbations) < fewest]
    if wrong:
        raise UserError(
            f"Candidates that cannot be ranked by {question.by}",
            offenders=wrong,
            expected="combinations of perturbations" if fewest == 2 else "perturbed conditions",
            mend="leave them out",
        )
    return labels
