"""The picture of a comparison: every model between floor and ceiling, one panel for each metric."""

import io
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from knockon.evaluate.suites import METRICS
from knockon.evaluate.summary import BASELINES, CEILING

COLUMNS = 4
"""Panels in a row."""
GRAY, COLORS = "#8a8f98", ("#2f7ed8", "#e0803a", "#7a5bd0", "#c94f7c", "#1f9e89", "#b58900", "#5c7f2b")
"""Of simple baselines, and of all other models; legible on light and on dark paper."""
ROOM = "#3fa34d"
"""Of the room between floor and ceiling."""


@dataclass(frozen=True)
class Theme:
    """Colors of the paper and of what is written on it."""

    paper: str
    ink: str
    faint: str


LIGHT = Theme(paper="#ffffff", ink="#1c2024", faint="#d5d9df")
STAND_IN = Theme(paper="none", ink="#010203", faint="#040506")
"""Colors that stand for those of a page, and are replaced by its CSS variables."""


def draw(summary: pd.DataFrame, theme: Theme = LIGHT) -> Figure:
    """Draw a summary.

    Each metric keeps its own unit, and better is to the right, also where lower is better. Points are
    means over conditions, lines their 95 % bootstrap intervals. A model further below the floor than the
    ceiling is above it is an arrow at the edge.
    """
    metrics = list(summary["metric"].unique())
    models = [model for model in summary["model"].unique() if model != CEILING]
    rows = -(-(len(metrics) + 1) // COLUMNS)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
    figure = Figure(figsize=(12, rows * (0.8 + 0.24 * len(models))), layout=layout)
    panels = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
    for axes, name in zip(panels, metrics, strict=False):
        lines = summary[summary["metric"] == name].set_index("model").reindex(models)
        _panel(axes, lines, theme, is_higher_better=_is_higher_better(name))
        axes.set_title(name, loc="left", fontsize=9.5, color=theme.ink, parse_math=False)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes in panels[: len(metrics) : COLUMNS]:
        axes.set_yticks(range(len(models)), models, color=theme.ink, fontsize=9)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
    _legend(panels[-1], theme)
    return figure


def inline_svg(summary: pd.DataFrame) -> str:
    """Draw as an element of a page, in its CSS variables ``--ink`` and ``--faint``; names are escaped."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "knockon", "font.family": "sans-serif"}):
        figure = draw(summary, STAND_IN)
        about = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # nothing that differs from day to day
        figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace(STAND_IN.ink, "var(--ink)").replace(STAND_IN.faint, "var(--faint)")


def _panel(axes: Axes, lines: pd.DataFrame, theme: Theme, *, is_higher_better: bool) -> None:
    """Draw one metric: a line for each model, between floor and ceiling, better to the right."""
    floor, ceiling = (_anchor(lines, name) for name in ("floor", "ceiling"))
    if (ceiling > floor) == is_higher_better and np.isfinite([floor, ceiling]).all():
        axes.axvspan(floor, ceiling, color=ROOM, alpha=0.1, linewidth=0)
    axes.axvline(ceiling, color=ROOM, linewidth=1.5)
    axes.axvline(floor, color=GRAY, linewidth=1, linestyle=(0, (3, 2)))
    left, right = _limits(lines, floor, ceiling, is_higher_better=is_higher_better)
    colors = _colors(list(lines.index))
    low, high, middle = (lines[name].to_numpy(float) for name in ("low", "high", "mean"))
    for row, color in enumerate(colors):
        at = min(max(middle[row], min(left, right)), max(left, right))
        axes.plot([low[row], high[row]], [row, row], color=color, linewidth=2, solid_capstyle="round")
        axes.plot([at], [row], "o" if at == middle[row] else "<", color=color, markersize=6, clip_on=False)
    axes.set_xlim(left, right)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_facecolor("none")
    axes.tick_params(colors=theme.ink, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)


def _anchor(lines: pd.DataFrame, name: str) -> float:
    values = lines[name].to_numpy(float)
    return float(next(iter(values[np.isfinite(values)]), np.nan))


def _limits(
    lines: pd.DataFrame, floor: float, ceiling: float, *, is_higher_better: bool
) -> tuple[float, float]:
    """Worst and best value to show: all, but not what lies further below the floor than the ceiling above."""
    sign = 1 if is_higher_better else -1
    shown = sign * lines[["mean", "low", "high", "floor", "ceiling"]].to_numpy(float)
    worst, best = (np.nanmin(shown), np.nanmax(shown)) if np.isfinite(shown).any() else (0.0, 1.0)
    room = sign * (ceiling - floor)
    worst = max(worst, sign * floor - room) if room > 0 else worst
    margin = 0.06 * (best - worst) or 0.5
    return float(sign * (worst - margin)), float(sign * (best + margin))


def _colors(models: list[str]) -> list[str]:
    """Gray for the simple baselines, a color for each other model."""
    others = [model for model in models if model not in BASELINES]
    return [COLORS[others.index(m) % len(COLORS)] if m in others else GRAY for m in models]


def _legend(axes: Axes, theme: Theme) -> None:
    handles = [
        Line2D([], [], color=GRAY, linewidth=1, linestyle=(0, (3, 2)), label="floor: no effect"),
        Line2D([], [], color=ROOM, linewidth=1.5, label="ceiling: a second experiment"),
        Line2D([], [], color=GRAY, marker="o", linewidth=2, label="mean over conditions, 95 % interval"),
    ]
    legend = axes.legend(handles=handles, loc="center left", frameon=False, fontsize=8.5, handlelength=2.4)
    legend.set_title("better is to the right  →")
    legend.get_title().set(fontsize=8.5, fontweight="bold")
    legend.set_alignment("left")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_color(theme.ink)


def _is_higher_better(name: str) -> bool:
    return any(metric.name == name and metric.direction == "higher" for metric in METRICS)
