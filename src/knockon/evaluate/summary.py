"""From conditions to one line per model: means between anchors, intervals, and paired tests."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import wilcoxon

from knockon.evaluate.suites import ALL, metric_named
from knockon.types import UserError

FLOOR, CEILING = "no_effect", "ceiling"
BASELINES = (FLOOR, "mean_shift", "additive", "shrunken_additive")
"""Simple baselines, the best of which is where calibrated scores begin and what paired tests refer to."""
DRAWS = 2000
"""Bootstrap samples of an interval."""
SUMMARY = ("model", "metric", "mean", "low", "high", "floor", "ceiling", "calibrated")
"""Columns of a summary."""
PAIRED = ("model", "metric", "baseline", "conditions", "difference", "low", "high", "p")
"""Columns of a table of paired tests."""
CALIBRATED = ("model", "group", "calibrated", "low", "high", "metrics", "conditions")
"""Columns of a table of calibrated scores."""


def summarize(
    scores: pd.DataFrame,
    *,
    floor: str = FLOOR,
    baselines: Sequence[str] = BASELINES,
    ceiling: str = CEILING,
    seed: int = 0,
) -> pd.DataFrame:
    """Average over conditions, with intervals and between anchors.

    Parameters
    ----------
    scores
        Long, with the columns ``model, condition, metric, value``, the anchors among the models.
    floor, baselines, ceiling
        Their names; those that are absent give empty values.
    seed
        Of the bootstrap. Models share its samples of conditions.

    Returns
    -------
    DataFrame
        ``model, metric, mean, low, high, floor, ceiling, calibrated``. ``low`` and ``high`` bound the 95 %
        bootstrap interval over conditions, empty for fewer than two. ``calibrated`` is 0 for the best
        baseline that has all conditions and 1 for the ceiling, whatever the metric's direction; empty
        where the ceiling is not better than that baseline, since the metric has no room to measure then.
        It is of the conditions that model, baseline and ceiling share: halves may be too small for a
        score that whole conditions have.

    Raises
    ------
    UserError
        If there is nothing to summarize, because the real cells could give none of the scores.
    """
    refuse_empty(scores)
    rows = []
    for one in _by_metric(scores, ceiling):
        means = {model: values.mean() for model, values in one.values.items()}
        best = one.best(baselines)
        anchored = means.get(floor, np.nan), means.get(ceiling, np.nan)
        for model, values in one.values.items():
            calibrated = np.nan if best is None else one.calibrated(model, best, ceiling)
            bounds = interval(values.to_numpy(), np.random.default_rng(seed))
            rows.append((model, one.metric, means[model], *bounds, *anchored, calibrated))
    return _in_order_of_models(pd.DataFrame.from_records(rows, columns=SUMMARY), scores)


def paired(
    scores: pd.DataFrame, *, baselines: Sequence[str] = BASELINES, ceiling: str = CEILING, seed: int = 0
) -> pd.DataFrame:
    """Compare each model with the best simple baseline, condition by condition.

    Parameters
    ----------
    scores
        As for ``summarize``. Values that are of all conditions at once cannot be paired and are left out.
    baselines, ceiling
        Their names. The best baseline is that of the mean, of those that have all conditions.
    seed
        Of the bootstrap.

    Returns
    -------
    DataFrame
        ``model, metric, baseline, conditions, difference, low, high, p``. ``difference`` is the mean over
        the conditions that both have, positive where the model is *better* whatever the metric's direction;
        ``low`` and ``high`` bound its 95 % bootstrap interval; ``p`` is that of the two-sided signed-rank
        test [wilcoxon1945], exact for few conditions and not corrected for the number of metrics. With n
        conditions it cannot be below 2^(1 - n): five conditions cannot show a difference at the level .05.
    """
    rows = []
    for one in _by_metric(scores.loc[scores["condition"] != ALL], ceiling):
        best = one.best(baselines)
        for model, values in one.values.items():
            if best is None or model in (best, ceiling):
                continue
            both = pd.concat([values, one.values[best]], axis=1, join="inner").to_numpy()
            gain = one.sign * (both[:, 0] - both[:, 1])
            bounds = interval(gain, np.random.default_rng(seed))
            rows.append((model, one.metric, best, len(gain), gain.mean(), *bounds, _signed_rank(gain)))
    return _in_order_of_models(pd.DataFrame.from_records(rows, columns=PAIRED), scores)


def calibrate(
    scores: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    *,
    baselines: Sequence[str] = BASELINES,
    ceiling: str = CEILING,
    seed: int = 0,
) -> pd.DataFrame:
    """Average calibrated scores over metrics, with intervals over conditions.

    Parameters
    ----------
    scores
        As for ``summarize``. Values that are of all conditions at once cannot be drawn and are left out.
    groups
        Metrics that are averaged, by a name for them; a group may be a single one.
    baselines, ceiling
        Their names. The best baseline of each metric is that of the mean, of those that have all conditions.
    seed
        Of the bootstrap. Models and metrics share its samples of conditions.

    Returns
    -------
    DataFrame
        ``model, group, calibrated, low, high, metrics, conditions``. ``calibrated`` is 0 for the best
        baseline and 1 for the ceiling; ``low`` and ``high`` bound its 95 % bootstrap interval, empty for
        fewer than two conditions. A sample of conditions in which the ceiling is not better than the baseline
        counts as infinitely good or bad, by the sign of the model's difference from the baseline, so that an
        interval above 0 always says that the model is better. Only metrics count (``metrics`` of them) whose
        ceiling is better than the baseline beyond such an interval: by the others, the baseline cannot be
        told from a replicate. A group without any has empty scores.
    """
    drawn = scores.loc[scores["condition"] != ALL]
    conditions = pd.Index(drawn["condition"].unique())
    count = len(conditions)
    # the first row takes each condition once: it is the sample itself
    weights = np.ones((1 + DRAWS, count))
    weights[1:] = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    placed = {
        (model, one.metric): shares
        for one in _by_metric(drawn, ceiling)
        for model, shares in one.shares(baselines, ceiling, conditions, weights)
    }
    rows = []
    for model in drawn["model"].unique():
        having = drawn.loc[drawn["model"] == model].dropna(subset="value")
        for group, metrics in groups.items():
            found = [placed[model, metric] for metric in metrics if (model, metric) in placed]
            with np.errstate(invalid="ignore"):  # metrics may be infinitely good and bad at once
                mean = np.mean(found, axis=0) if found else np.full(1 + DRAWS, np.nan)
            known = having.loc[having["metric"].isin(metrics), "condition"].nunique()
            bounds = _bounds(mean[1:]) if found and known > 1 else (np.nan, np.nan)
            rows.append((model, group, mean[0], *bounds, len(found), known))
    return pd.DataFrame.from_records(rows, columns=CALIBRATED)


def refuse_empty(scores: pd.DataFrame) -> None:
    """Refuse scores without any value.

    Raises
    ------
    UserError
        If the real cells could give none of the scores.
    """
    if scores["value"].count() == 0:
        raise UserError(
            "The real cells of the test conditions can give none of the scores that were asked for",
            expected="conditions and numbers of cells that a metric is defined for, see docs/evaluation.md",
            mend="choose another --suite, or --suite core beside it",
        )


@dataclass(frozen=True)
class _OfOneMetric:
    """Values of each model by condition; ``sign`` is -1 where lower is better."""

    metric: str
    sign: int
    values: dict[str, pd.Series]

    def best(self, baselines: Sequence[str]) -> str | None:
        """Name the baseline with the best mean, of those that have as many conditions as any model has."""
        most = max(map(len, self.values.values()))
        whole = [name for name in baselines if name in self.values and len(self.values[name]) == most]
        return max(whole, key=lambda name: self.sign * self.values[name].mean(), default=None)

    def calibrated(self, model: str, start: str, end: str) -> float:
        """Place a model between two others, by the conditions that all three have; NaN where none is room."""
        if end not in self.values:
            return np.nan
        three = pd.concat([self.values[name] for name in (model, start, end)], axis=1, join="inner")
        at, zero, one = three.to_numpy().mean(axis=0) if len(three) else (np.nan,) * 3
        room = self.sign * (one - zero)
        return float(self.sign * (at - zero) / room) if room > 0 else np.nan

    def shares(
        self,
        baselines: Sequence[str],
        ceiling: str,
        conditions: pd.Index,
        weights: Float[np.ndarray, "samples conditions"],
    ) -> Iterator[tuple[str, Float[np.ndarray, "samples"]]]:
        """Calibrate each model in each sample; nothing where the metric has no clear room."""
        best = self.best(baselines)
        if best is None or ceiling not in self.values:
            return
        for model in dict.fromkeys((ceiling, *self.values)):
            names = (model, best, ceiling)
            three = pd.concat([self.values[name] for name in names], axis=1, join="inner")
            drawn = weights[:, conditions.get_indexer(three.index)]
            with np.errstate(invalid="ignore"):  # a sample may have none of these conditions
                at, zero, one = (drawn @ three.to_numpy() / drawn.sum(1, keepdims=True)).T
            gain, room = self.sign * (at - zero), self.sign * (one - zero)
            if model == ceiling and not (room[0] > 0 and _bounds(room[1:])[0] > 0):
                return
            yield model, _share(gain, room)


def _share(
    gain: Float[np.ndarray, "samples"], room: Float[np.ndarray, "samples"]
) -> Float[np.ndarray, "samples"]:
    """Divide, where there is room; elsewhere infinite with the sign of the gain, and 0 without any."""
    endless = np.where(gain == 0, 0.0, np.copysign(np.inf, gain) + 0 * gain)  # unknown stays unknown
    return np.where(room > 0, gain / np.where(room > 0, room, 1.0), endless)


def _bounds(values: Float[np.ndarray, "samples"]) -> tuple[float, float]:
    """Bound 95 % of the samples by two of them, which may be infinite."""
    low, high = np.nanquantile(values, (0.025, 0.975), method="inverted_cdf")
    return float(low), float(high)


def _by_metric(scores: pd.DataFrame, ceiling: str) -> Iterator[_OfOneMetric]:
    for name, part in scores.dropna(subset="value").groupby("metric", sort=False):
        sign = 1 if metric_named(str(name)).direction == "higher" else -1
        # halves may tell by chance what whole conditions cannot: the ceiling keeps to the others' conditions
        others = part.loc[part["model"] != ceiling, "condition"]
        known = part[part["condition"].isin(others)] if len(others) else part
        models = known.set_index("condition").groupby("model", sort=False)["value"]
        yield _OfOneMetric(str(name), sign, {str(model): pd.Series(values) for model, values in models})


def _signed_rank(gain: Float[np.ndarray, "conditions"]) -> float:
    """Two-sided p-value; 1 where nothing differs."""
    return float(np.asarray(wilcoxon(gain))[1]) if np.any(gain) else 1.0


def interval(values: Float[np.ndarray, "conditions"], rng: np.random.Generator) -> tuple[float, float]:
    """Bound the mean by its 95 % bootstrap interval; NaN for fewer than two values."""
    count = len(values)
    if count < 2:
        return np.nan, np.nan
    means = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) @ values / count
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _in_order_of_models(table: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    place = {model: i for i, model in enumerate(dict.fromkeys(scores["model"]))}
    return table.sort_values("model", key=lambda names: names.map(place), kind="stable", ignore_index=True)
