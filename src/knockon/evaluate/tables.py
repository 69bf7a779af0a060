"""Scores as files, and as the table that a terminal shows."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.table import Table

from knockon.evaluate.suites import METRICS
from knockon.evaluate.summary import BASELINES, CEILING, FLOOR, summarize
from knockon.files import write_text

LONG = ["model", "condition", "metric", "value"]
"""Columns of ``scores.csv``."""


def write(scores: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write ``scores.csv`` and ``summary.csv``, and return the summary."""
    summary = summarize(scores)
    write_text(folder / "scores.csv", scores[LONG].to_csv(index=False))
    write_text(folder / "summary.csv", summary.to_csv(index=False))
    return summary


def render(summary: pd.DataFrame) -> Table:
    """One line for each metric and one column for each model, the floor first and the ceiling last.

    The best model of a metric is in bold; anchors are no models.
    """
    wide = summary.pivot_table(index="metric", columns="model", values="mean", sort=False)
    models = [name for name in wide.columns if name not in (FLOOR, CEILING)]
    table = Table(title="means over the test conditions; floor on the left, ceiling on the right")
    table.add_column("metric")
    for name in _present((FLOOR, *models, CEILING), wide):
        kind = {FLOOR: "floor", CEILING: ""}.get(name, "baseline" if name in BASELINES else "")
        table.add_column(f"{name}\n[dim]{kind}[/dim]", justify="right")
    for metric in (metric for metric in METRICS if metric.name in wide.index):
        line = wide.loc[metric.name]
        ranked = line[models].sort_values(ascending=metric.direction == "lower").dropna()
        best = ranked.index[0] if len(ranked) else None
        cells = [_number(line[name], bold=name == best) for name in _present((FLOOR, *models, CEILING), wide)]
        table.add_row(f"{metric.name} {'↑' if metric.direction == 'higher' else '↓'}", *cells)
    return table


def _present(names: Sequence[str], wide: pd.DataFrame) -> list[str]:
    return [name for name in names if name in wide.columns]


def _number(value: float, *, bold: bool) -> str:
    text = "" if pd.isna(value) else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
    return f"[bold]{text}[/bold]" if bold else text
