"""Which metrics: the suites. Every convention is named in the module of each suite."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from knockon.data.screen import Screen
from knockon.evaluate import metrics
from knockon.evaluate.metrics import Metric
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import num_cells
from knockon.evaluate.suites import (
    cell_eval,
    de,
    distribution,
    generation,
    interaction,
    scdfm_2025,
    systema,
    vcc_2026,
)
from knockon.types import UserError

log = logging.getLogger("knockon")
Name = Literal[
    "core", "de", "generation", "distribution", "interaction", "systema", "scdfm-2025", "cell-eval", "vcc2026"
]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A choice of metrics, and how what they look at is gathered.

    Parameters
    ----------
    name
        On the command line.
    metrics
        In the order of tables.
    gather
        Pairs and ``cells`` in, an object with all fields that the metrics need out.
    cells
        Most cells of a condition and side that enter distances between cells.
    halved
        Whether as many cells are looked at as a half of the real cells has, on which its numbers depend.
    counted
        Whether it needs a screen in counts.
    """

    name: str
    metrics: tuple[Metric, ...]
    gather: Callable[[Pairs, int], object]
    cells: int = 256
    halved: bool = False
    counted: bool = False


Asked = Suite | str | Sequence[str]
"""A suite, its name, or the names of several."""
ALL = "all conditions"
"""Written as the condition of a value that is of all conditions at once."""


def suite_named(name: str) -> Suite:
    """Find a suite.

    Raises
    ------
    UserError
        If there is none of this name.
    """
    for suite in SUITES:
        if suite.name == name:
            return suite
    raise UserError(
        f"Unknown suite {name}", expected="one of " + ", ".join(s.name for s in SUITES), mend="--suite core"
    )


def score(pairs: Pairs, suite: Asked = "core") -> pd.DataFrame:
    """Score every condition with every metric of a suite, or of several.

    Deterministic: the cells that are drawn depend only on the condition.

    Returns
    -------
    DataFrame
        Long, with the columns ``condition, metric, value``. The condition of a value that is of all of them
        at once is ``ALL``. A value that the real cells cannot give is left out.
    """
    labels = [str(label) for label in pairs.truth.labels]
    found: dict[str, Float[np.ndarray, "*conditions"]] = {}
    if any(asked.halved for asked in chosen(suite)):
        _warn_of_few(pairs)
    for asked in chosen(suite):
        evidence = asked.gather(pairs, asked.cells)
        found |= {metric.name: metric(evidence) for metric in asked.metrics if metric.name not in found}
    tables = [
        pd.DataFrame({"condition": labels if values.ndim else [ALL], "metric": name, "value": values.ravel()})
        for name, values in found.items()
    ]
    return pd.concat(tables).dropna(ignore_index=True)


def chosen(suite: Asked) -> tuple[Suite, ...]:
    """Find the suites that are asked for.

    Raises
    ------
    UserError
        If none is asked for, or there is none of a name.
    """
    asked = [suite] if isinstance(suite, str | Suite) else suite
    if not asked:
        raise UserError("--suite without any", expected="one or more of " + ", ".join(s.name for s in SUITES))
    return tuple(suite_named(one) if isinstance(one, str) else one for one in asked)


def refuse_unfit(suite: Asked, screen: Screen) -> None:
    """Refuse suites that cannot score a screen, before anything is trained on it.

    Raises
    ------
    UserError
        If there is none of a name, or one needs counts and the screen has none.
    """
    for asked in chosen(suite):
        if asked.counted and screen.units != "counts":
            raise UserError(
                f"The suite {asked.name} scores counts, and the screen is in log1p",
                expected="counts, on both sides",
                mend="read the screen with --layer counts, if it has such a layer",
            )


def silent(suite: Asked, scores: pd.DataFrame) -> list[str]:
    """Say of each suite without any value that it has none."""
    found = set(scores["metric"])
    return [
        f"the suite {asked.name} has no value: the real cells of these conditions cannot give one "
        "(too few cells, or nothing of what it looks for)"
        for asked in chosen(suite)
        if not any(metric.name in found for metric in asked.metrics)
    ]


def _warn_of_few(pairs: Pairs) -> None:
    """Say so where fewer cells are predicted than a replicate has."""
    wanted = np.minimum(pairs.truth.half, Suite.cells).tolist()
    few = sum(num_cells(x) < count for x, count in zip(pairs.cells, wanted, strict=True))
    if few:
        log.warning(
            "%d of %d conditions have fewer predicted cells than the anchors, on which distances between "
            "populations and the genes that are called depend: predict %d cells of each",
            *(few, len(wanted), max(wanted)),
        )


SUITES = (
    Suite(name="core", metrics=metrics.METRICS, gather=metrics.gather),
    Suite(name="de", metrics=de.METRICS, gather=de.gather, halved=True),
    Suite(name="generation", metrics=generation.METRICS, gather=generation.gather, halved=True),
    Suite(name="distribution", metrics=distribution.METRICS, gather=distribution.gather, halved=True),
    Suite(name="interaction", metrics=interaction.METRICS, gather=interaction.gather),
    Suite(name="systema", metrics=systema.METRICS, gather=systema.gather),
    Suite(name="scdfm-2025", metrics=scdfm_2025.METRICS, gather=scdfm_2025.gather),
    Suite(name="cell-eval", metrics=cell_eval.METRICS, gather=cell_eval.gather),
    Suite(name="vcc2026", metrics=vcc_2026.METRICS, gather=vcc_2026.gather, counted=True),
)
METRICS = tuple({metric.name: metric for suite in SUITES for metric in suite.metrics}.values())
"""Of all suites, each once: a name means one thing, whatever the suite."""


def metric_named(name: str) -> Metric:
    """Find a metric; names are those of tables, so there is one."""
    return next(metric for metric in METRICS if metric.name == name)
