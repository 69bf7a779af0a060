"""The picture of a comparison: every model between floor and ceiling, one panel for each metric."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from knockon.evaluate.report.panel import GRAYS, ROOM, anchor, colors, limits
from knockon.evaluate.suites import METRICS
from knockon.evaluate.summary import CEILING

COLUMNS = 4
"""Panels in a row."""
INK, FAINT = "#1c2024", "#d5d9df"


def draw(summary: pd.DataFrame) -> Figure:
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
        _panel(axes, lines, is_higher_better=_is_higher_better(name))
        axes.set_title(name, loc="left", fontsize=9.5, color=INK, parse_math=False)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes in panels[: len(metrics) : COLUMNS]:
        axes.set_yticks(range(len(models)), models, color=INK, fontsize=9)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
    _legend(panels[-1])
    return figure


def _panel(axes: Axes, lines: pd.DataFrame, *, is_higher_better: bool) -> None:
    """Draw one metric: a line for each model, between floor and ceiling, better to the right."""
    floor, ceiling = (anchor(lines, name) for name in ("floor", "ceiling"))
    if (ceiling > floor) == is_higher_better and np.isfinite([floor, ceiling]).all():
        axes.axvspan(floor, ceiling, color=ROOM.light, alpha=0.1, linewidth=0)
    axes.axvline(ceiling, color=ROOM.light, linewidth=1.5)
    axes.axvline(floor, color=GRAYS[0].light, linewidth=1, linestyle=(0, (3, 2)))
    left, right = limits(lines, 1 if is_higher_better else -1)
    own = colors(list(lines.index))
    low, high, middle = (lines[name].to_numpy(float) for name in ("low", "high", "mean"))
    for row, color in enumerate(own[model].light for model in lines.index):
        at = min(max(middle[row], min(left, right)), max(left, right))
        axes.plot([low[row], high[row]], [row, row], color=color, linewidth=2, solid_capstyle="round")
        axes.plot([at], [row], "o" if at == middle[row] else "<", color=color, markersize=6, clip_on=False)
    axes.set_xlim(left, right)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_facecolor("none")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    gray = GRAYS[0].light
    handles = [
        Line2D([], [], color=gray, linewidth=1, linestyle=(0, (3, 2)), label="floor: no effect"),
        Line2D([], [], color=ROOM.light, linewidth=1.5, label="ceiling: a second experiment"),
        Line2D([], [], color=gray, marker="o", linewidth=2, label="mean over conditions, 95 % interval"),
    ]
    legend = axes.legend(handles=handles, loc="center left", frameon=False, fontsize=8.5, handlelength=2.4)
    legend.set_title("better is to the right  →")
    legend.get_title().set(fontsize=8.5, fontweight="bold")
    legend.set_alignment("left")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_color(INK)


def _is_higher_better(name: str) -> bool:
    return any(metric.name == name and metric.direction == "higher" for metric in METRICS)
