"""What lies in the folder of a comparison or an evaluation, checked, and what it says in words."""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from knockon.evaluate.metrics import Metric
from knockon.evaluate.suites import ALL, METRICS, SUITES
from knockon.evaluate.summary import BASELINES, CEILING, PAIRED, SUMMARY
from knockon.files import read_json
from knockon.record import LOG, RECORD, WEIGHTS
from knockon.types import UserError

SCORES = ("model", "condition", "metric", "value")
TABLES = {"scores": SCORES, "summary": SUMMARY}
OPTIONAL = {
    "paired": PAIRED,
    "strata": ("model", "metric", "by", "stratum", "conditions", "mean"),
    "flags": ("model", "flag", "condition", "value", "limit", "message"),
}
LEVEL = 0.05
"""Of the paired tests that the headline counts."""
FAVORITES = ("pearson_delta", "mse")
"""Metrics that stand for the others where one has to, the first that there is."""


@dataclass(frozen=True)
class RunCard:
    """What a run says of itself: its folder's name, its record, its log, and the numbers in its weights."""

    name: str
    record: dict[str, Any]
    log: list[dict[str, float]]
    numbers: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """Tables of a folder.

    Parameters
    ----------
    folder
        Where they are from.
    scores, summary, paired, strata, flags
        As in the files of these names; empty with the right columns where there is no such file. Flags are
        None there, for nobody looked.
    about
        ``about.json``, or nothing.
    runs
        By name.
    """

    folder: Path
    scores: pd.DataFrame
    summary: pd.DataFrame
    paired: pd.DataFrame
    strata: pd.DataFrame
    flags: pd.DataFrame | None
    about: dict[str, Any]
    runs: tuple[RunCard, ...]

    @classmethod
    def read(cls, folder: Path) -> "Findings":
        """Read a folder.

        Raises
        ------
        UserError
            If it holds no comparison, or a file in it is damaged.
        """
        found = {name: _table(folder / f"{name}.csv", columns) for name, columns in TABLES.items()}
        for name, columns in OPTIONAL.items():
            path = folder / f"{name}.csv"
            found[name] = _table(path, columns) if path.exists() else pd.DataFrame(columns=pd.Index(columns))
        about = read_json(folder / "about.json") if (folder / "about.json").exists() else {}
        flags = found.pop("flags") if (folder / "flags.csv").exists() else None
        found.pop("flags", None)
        named = set(found["summary"]["model"])
        records = sorted(folder.glob(f"runs/**/{RECORD}"))
        runs = tuple(_run(path.parent, folder / "runs", named) for path in records)
        return cls(folder=folder, about=about, runs=runs, flags=flags, **found)

    @cached_property
    def models(self) -> list[str]:
        """All but the ceiling, from best to worst mean rank; baselines before equals, unranked ones last."""
        named = [name for name in dict.fromkeys(self.summary["model"]) if name != CEILING]
        return sorted(named, key=lambda name: (self.ranks.get(name, float("inf")), name not in BASELINES))

    @cached_property
    def metrics(self) -> list[str]:
        """In the order of the tables."""
        return [str(name) for name in dict.fromkeys(self.summary["metric"])]

    @cached_property
    def conditions(self) -> list[str]:
        """Those that have scores of their own."""
        return [str(name) for name in dict.fromkeys(self.scores["condition"]) if name != ALL]

    @cached_property
    def ranks(self) -> dict[str, float]:
        """Mean rank of each model over the metrics that it is judged by."""
        table = self.summary.loc[(self.summary["model"] != CEILING) & self._is_judged(self.summary)]
        better = table["mean"] * table["metric"].map(sign)
        ranks = (
            pd.Series(better.groupby(table["metric"]).rank(ascending=False)).groupby(table["model"]).mean()
        )
        return {str(name): float(rank) for name, rank in ranks.items()}

    @cached_property
    def calibrated(self) -> dict[str, float]:
        """Median over those metrics of the calibrated score of each model, where any has room."""
        known = self.summary.loc[self._is_judged(self.summary)].dropna(subset="calibrated")
        medians = known.groupby("model")["calibrated"].median()
        return {str(name): float(value) for name, value in medians.items()}

    @cached_property
    def basis(self) -> tuple[str, list[str]]:
        """Name the suite that models are judged by, and its metrics: one suite, so that nothing counts twice.

        It is the first that was asked for; where the folder names none, no suite and all metrics. Those that
        repeat what others print, which have a prefix, judge only where there is nothing else.
        """
        ours = [name for name in self.metrics if sign(name)]
        plain = [name for name in ours if ":" not in name] or ours
        for asked in self.about.get("suites") or []:
            members = {metric.name for suite in SUITES if suite.name == asked for metric in suite.metrics}
            if found := [name for name in plain if name in members]:
                return str(asked), found
        return "", plain

    @property
    def judges(self) -> str:
        """The basis in words."""
        return _many(len(self.basis[1]), "metric") + self._of_suite

    @property
    def _of_suite(self) -> str:
        return f" of {self.basis[0]}" if self.basis[0] else ""

    def _is_judged(self, table: pd.DataFrame) -> pd.Series:
        return pd.Series(table["metric"]).isin(self.basis[1])

    @cached_property
    def baselines(self) -> dict[str, str]:
        """Name the best simple baseline of each metric: that of the paired test, where there is one."""
        simple = self.summary.loc[self.summary["model"].isin(BASELINES)].dropna(subset="mean")
        tested = self.paired.set_index("metric")["baseline"].to_dict()
        found = {}
        for name in filter(sign, self.metrics):
            means = simple.loc[simple["metric"] == name].set_index("model")["mean"].to_dict()
            if name in tested:
                found[name] = str(tested[name])
            elif means:
                found[name] = str((max if sign(name) > 0 else min)(means, key=means.__getitem__))
        return found

    def wins(self, model: str) -> tuple[int, int]:
        """Count the metrics in which a model is ahead of the best simple baseline, and all that have one.

        Over the conditions that both have, where the paired test says so, and else by their means.
        """
        means = self.summary.set_index(["model", "metric"])["mean"].to_dict()
        tests = self.paired.loc[self.paired["model"] == model].set_index("metric")["difference"].to_dict()
        gains = [
            tests.get(name, sign(name) * (means[model, name] - means.get((best, name), math.nan)))
            for name, best in self.baselines.items()
            if name in self.basis[1] and (model, name) in means
        ]
        return sum(gain > 0 for gain in gains), len(gains)

    def proven(self, model: str) -> tuple[int, int]:
        """Count the metrics in which the paired test puts a model ahead of that baseline, and behind it."""
        own = self.paired[(self.paired["model"] == model) & self._is_judged(self.paired)]
        sure = own[own["p"] < LEVEL]
        return int((sure["difference"] > 0).sum()), int((sure["difference"] < 0).sum())

    @property
    def raised(self) -> list[dict[str, Any]]:
        """Flags as lines, those of the simple baselines last: that they are raised there is no news."""
        if self.flags is None:
            return []
        lines = [{str(key): value for key, value in line.items()} for _, line in self.flags.iterrows()]
        return sorted(lines, key=lambda line: line["model"] in BASELINES)

    @property
    def favorite(self) -> str:
        """Name the metric that stands for the others where one has to."""
        return next((name for name in FAVORITES if name in self.metrics), self.metrics[0])

    @property
    def notes(self) -> dict[str, list[str]]:
        """What was noted when cells were read and aligned, by whose; a plain list is the screen's."""
        noted = self.about.get("notes") or {}
        by_name = noted if isinstance(noted, dict) else {"screen": noted}
        listed = {name: [some] if isinstance(some, str) else some for name, some in by_name.items()}
        return {name: list(map(str, some)) for name, some in listed.items() if some}

    def told(self, part: str) -> dict[str, Any]:
        """Give a part of ``about.json``; nothing where it has none."""
        found = self.about.get(part)
        return found if isinstance(found, dict) else {}

    def family(self, metric: str) -> str:
        """Name the suite that a metric is of: one that was asked for, if it is of several."""
        asked = self.about.get("suites") or []
        found = [suite.name for suite in SUITES if any(one.name == metric for one in suite.metrics)]
        return next((name for name in found if name in asked), found[0] if found else "other")

    # ---- in words ----------------------------------------------------------------------------------

    def question(self) -> str:
        """Say what was asked."""
        many = len(self.conditions)
        simple = sum(name in BASELINES for name in self.models)
        told = f" ({simple} of them simple baselines)" if simple else ""
        text = f"{_many(len(self.models), 'model')}{told} predicted {_many(many, 'held-out condition')}"
        screen, split = self.told("screen"), self.told("split")
        if screen:
            text += f" of a screen of {screen.get('cells', 0):,} cells and {screen.get('genes', 0):,} genes"
        if split:
            text += f" (split: {split.get('kind')}, seed {split.get('seed')})"
        return text + "."

    def answer(self) -> str:
        """Say what to take away: who leads, by how much over the baselines, and how far from the ceiling."""
        others = [name for name in self.models if name not in BASELINES]
        if not others:
            return f"Only simple baselines were compared; {self.models[0]} ranks first."
        best = others[0]
        leads = f"{best} ranks first: it"
        if best != self.models[0]:
            leads = (
                f"The simple baseline {self.models[0]} ranks first. Of the others, {best} comes closest: it"
            )
        won, of = self.wins(best)
        if not of:
            return f"{best} ranks first. There is no simple baseline to compare it with."
        text = f"{leads} beats the best simple baseline in {won} of {_many(of, 'metric')}{self._of_suite}"
        ahead, behind = self.proven(best)
        text += f" ({ahead} of them beyond chance)" if ahead else ""
        text += f", is behind beyond chance in {behind}," if behind else ""
        reach = self.calibrated.get(best)
        if reach is None:
            return text + "."
        if reach <= 0:
            return text + " and does not get past it in the median metric."
        return text + f" and gets {reach:.0%} of the way from it to a replicate in the median metric."

    def caution(self) -> str:
        """Say what limits the answer."""
        parts = []
        if len(self.conditions) < 6:
            parts.append(
                f"With {_many(len(self.conditions), 'condition')} no paired test can reach p < .05: "
                "read differences as hints."
            )
        raised = 0 if self.flags is None else int((~self.flags["model"].isin(BASELINES)).sum())
        if raised:  # those of a baseline are what it is
            parts.append(f"{_many(raised, 'flag')} raised: read them before believing a score.")
        return " ".join(parts)


def sign(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 of a metric that is not ours."""
    known = of_ours(metric)
    return 0 if known is None else 1 if known.direction == "higher" else -1


def of_ours(metric: str) -> Metric | None:
    """Find a metric by its name."""
    return next((one for one in METRICS if one.name == metric), None)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


NUMBERS = ("value", "mean", "low", "high", "floor", "ceiling", "calibrated", "difference", "p", "limit")
"""Columns that hold numbers or nothing."""


def _table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    texts = [name for name in ("model", "condition", "metric", "stratum") if name in columns]
    numbers = [name for name in NUMBERS if name in columns]
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(texts, "str"))
        return table.loc[:, list(columns)].astype(dict.fromkeys(numbers, float))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"Cannot read {path} ({str(error).splitlines()[0]})",
            expected=f"a table with the columns {', '.join(columns)}",
            mend="give the folder that knockon compare or evaluate wrote",
        ) from error


def _run(folder: Path, runs: Path, named: Collection[str]) -> RunCard:
    """Read a run; the weights of one that is not among the models that are scored may be damaged."""
    record, place = read_json(folder / RECORD), folder.relative_to(runs)
    return RunCard(
        name=str(place),
        record=record,
        log=_log(folder / LOG),
        numbers=_numbers(folder / WEIGHTS) if place.parts[0] in named else None,
    )


def _log(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read {path} ({error})", expected="one JSON object on each line") from error


def _numbers(path: Path) -> int | None:
    """Count the numbers of a file of weights by its head alone."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot read {path} ({error})", mend="restore the file, or train again") from error
