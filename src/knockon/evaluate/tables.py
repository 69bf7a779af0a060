"""Scores as files, and as the table that a terminal shows."""

from pathlib import Path

import pandas as pd
from rich.markup import escape
from rich.table import Table

from knockon.evaluate.suites import METRICS
from knockon.evaluate.summary import BASELINES, CEILING, FLOOR, paired, summarize
from knockon.files import write_text

LONG = ["model", "condition", "metric", "value"]
"""Columns of ``scores.csv``."""


def write(scores: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Write ``scores.csv``, ``summary.csv`` and ``paired.csv``, and return the summary."""
    summary = summarize(scores)
    found = {"scores": scores[LONG], "summary": summary, "paired": paired(scores)}
    for name, table in found.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    return summary


def render(summary: pd.DataFrame) -> Table:
    """One line for each metric and one column for each model, the floor first and the ceiling last.

    The best model of a metric is in bold; anchors are no models. Beside the mean of a model that is no
    baseline stands its calibrated score, and at the end the conventions of the metric.
    """
    lines = summary.set_index(["metric", "model"])
    named = list(dict.fromkeys(summary["model"]))
    models = [name for name in named if name not in (FLOOR, CEILING)]
    simple = [name for name in models if name in BASELINES]
    others = [name for name in models if name not in BASELINES]
    columns = [name for name in (FLOOR, *simple, *others, CEILING) if name in named]
    table = Table(
        title="means over the test conditions; floor on the left, ceiling on the right; "
        "in parentheses, 0 is the best simple baseline and 1 a replicate"
    )
    table.add_column("metric", no_wrap=True)
    for name in columns:
        kind = {FLOOR: "floor", CEILING: ""}.get(name, "baseline" if name in BASELINES else "")
        table.add_column(f"{escape(name)}\n[dim]{kind}[/dim]", justify="right", no_wrap=True)
    found = set(summary["metric"])
    shown = [metric for metric in METRICS if metric.name in found]
    if any(metric.how for metric in shown):
        table.add_column("[dim]how[/dim]")
    for metric in shown:
        line = lines.loc[metric.name]
        ranked = line["mean"].reindex(models).sort_values(ascending=metric.direction == "lower").dropna()
        best = ranked.index[0] if len(ranked) else None
        cells = [_cell(line, name, bold=name == best) for name in columns]
        arrow = "↑" if metric.direction == "higher" else "↓"
        table.add_row(f"{metric.name} {arrow}", *cells, f"[dim]{metric.how}[/dim]")
    return table


def _cell(line: pd.DataFrame, name: str, *, bold: bool) -> str:
    """Write a mean, and for models the calibrated score."""
    if name not in line.index:
        return ""
    mean, calibrated = line.loc[name, "mean"], line.loc[name, "calibrated"]
    text = f"{mean:.4f}" if abs(mean) < 0.1 else f"{mean:.3f}"
    text = f"[bold]{text}[/bold]" if bold else text
    if name in (*BASELINES, CEILING) or pd.isna(calibrated):
        return text
    return f"{text} [dim]({calibrated:.2f})[/dim]"
