"""What a comparison found, to look at: a picture, and one HTML file that opens without a network."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from inspect import getdoc
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from knockon.evaluate.metrics import METRICS
from knockon.evaluate.scores import BASELINES, CEILING, SUMMARY
from knockon.files import write_text, written_aside
from knockon.types import UserError

COLUMNS = 4
"""Panels in a row of the picture."""
GRAY, COLORS = "#8a8f98", ("#2f7ed8", "#e0803a", "#7a5bd0", "#c94f7c", "#1f9e89", "#b58900", "#5c7f2b")
"""Of simple baselines, and of all other models; legible on light and on dark paper."""
ROOM = "#3fa34d"
"""Of the room between floor and ceiling."""


@dataclass(frozen=True)
class Theme:
    """Colors of the paper and what is written on it."""

    paper: str
    ink: str
    faint: str


LIGHT = Theme(paper="#ffffff", ink="#1c2024", faint="#d5d9df")
STAND_IN = Theme(paper="none", ink="#010203", faint="#040506")
"""Colors that stand for those of the page, and are replaced by its CSS variables."""


def write(folder: str | Path, out: str | Path) -> None:
    """Write one HTML file about a comparison: all that is in it is inside the file.

    Parameters
    ----------
    folder
        With ``scores.csv`` and ``summary.csv``.
    out
        The ``.html`` to write.

    Raises
    ------
    UserError
        If the folder holds no comparison, or the file cannot be written.
    """
    scores, summary = _read(Path(folder))
    template = resources.files("knockon.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(template).render(
        title=Path(folder).resolve().name,
        conditions=scores["condition"].nunique(),
        picture=Markup(_svg(summary)),
        metrics=_explained(summary),
        leaders=_leaders(summary),
        tables=_by_condition(scores),
    )
    write_text(Path(out), page)


def picture(folder: str | Path, out: str | Path) -> None:
    """Draw the scores of a comparison between floor and ceiling.

    One panel for each metric, in its own unit; better is to the right, also where lower is better.
    Points are means over conditions, lines their 95 % bootstrap intervals. A model far below the
    floor is an arrow at the edge.

    Parameters
    ----------
    folder
        With ``summary.csv``.
    out
        The ``.png``, ``.svg`` or ``.pdf`` to write.

    Raises
    ------
    UserError
        If the folder holds no comparison, or the file cannot be written.
    """
    _, summary = _read(Path(folder))
    with written_aside(Path(out)) as aside:
        _draw(summary, LIGHT).savefig(aside, dpi=160, facecolor=LIGHT.paper)


def _read(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    wanted = {"scores.csv": ("model", "condition", "metric", "value"), "summary.csv": SUMMARY}
    tables = []
    for name, columns in wanted.items():
        try:
            table = pd.read_csv(folder / name, keep_default_na=False, na_values=[""])
            tables.append(table.loc[:, list(columns)].astype({"model": str, "metric": str}))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"Cannot read {folder / name} ({str(error).splitlines()[0]})",
                expected=f"a table with the columns {', '.join(columns)}",
                mend="give the folder that knockon compare or evaluate wrote",
            ) from error
    return tables[0], tables[1]


# ---- the picture -----------------------------------------------------------------------------------


def _draw(summary: pd.DataFrame, theme: Theme) -> Figure:
    metrics, models = _metrics(summary), _models(summary)
    rows = -(-(len(metrics) + 1) // COLUMNS)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
    figure = Figure(figsize=(12, rows * (0.8 + 0.24 * len(models))), layout=layout)
    panels = list(figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat)
    for axes, name in zip(panels, metrics, strict=False):
        lines = summary[summary["metric"] == name].set_index("model").reindex(models)
        _panel(axes, lines, theme, is_higher_better=_higher(name))
        axes.set_title(name, loc="left", fontsize=9.5, color=theme.ink, parse_math=False)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes in panels[: len(metrics) : COLUMNS]:
        axes.set_yticks(range(len(models)), models, color=theme.ink, fontsize=9)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
    _legend(panels[-1], theme)
    return figure


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
    for text in legend.get_texts():
        text.set_color(theme.ink)


def _svg(summary: pd.DataFrame) -> str:
    """Draw in the colors of the page, for both of its themes."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "knockon", "font.family": "sans-serif"}):
        figure = _draw(summary, STAND_IN)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace(STAND_IN.ink, "var(--ink)").replace(STAND_IN.faint, "var(--faint)")


# ---- the tables ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One score of the leaderboard, as text and as a place between floor (0) and ceiling (100)."""

    mean: str
    interval: str
    calibrated: str
    place: float
    is_best: bool


def _leaders(summary: pd.DataFrame) -> list[tuple[str, float, list[Cell]]]:
    """Models from best to worst mean rank over metrics, with a cell for each metric."""
    metrics, models = _metrics(summary), _models(summary)
    means = summary.pivot(index="model", columns="metric", values="mean").loc[models, metrics]
    better = means * [1 if _higher(name) else -1 for name in metrics]
    ranks = better.rank(ascending=False)
    lines = {(line["model"], line["metric"]): line for line in summary.to_dict("records")}
    order = ranks.mean(axis=1).sort_values(kind="stable")
    return [
        (
            str(model),
            rank,
            [
                _cell(lines[model, name], is_best=bool(better.loc[model, name] == better[name].max()))
                if (model, name) in lines
                else Cell("", "", "", 0.0, is_best=False)
                for name in metrics
            ],
        )
        for model, rank in order.items()
    ]


def _cell(line: Mapping[str, float], *, is_best: bool) -> Cell:
    room = line["ceiling"] - line["floor"]
    place = (line["mean"] - line["floor"]) / room if room else np.nan
    interval = f"{_number(line['low'])} – {_number(line['high'])}" if np.isfinite(line["low"]) else ""
    place = float(np.clip(np.nan_to_num(place), 0, 1)) * 100
    return Cell(_number(line["mean"]), interval, _number(line["calibrated"]), place, is_best=is_best)


def _by_condition(scores: pd.DataFrame) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """For each metric, its models and the values of each condition."""
    tables = []
    for name in _metrics(scores):
        part = scores[scores["metric"] == name]
        wide = part.pivot(index="condition", columns="model", values="value")
        wide = wide.reindex(columns=[model for model in scores["model"].unique() if model in wide])
        rows = [
            (str(label), [_number(value) for value in row])
            for label, row in zip(wide.index, wide.to_numpy(), strict=True)
        ]
        tables.append((name, list(wide.columns), rows))
    return tables


def _explained(summary: pd.DataFrame) -> list[tuple[str, str, str, str, str]]:
    """Name, direction, first line of documentation, floor and ceiling of each metric."""
    about = {metric.name: (getdoc(metric.function) or "").splitlines()[0] for metric in METRICS}
    anchors = summary.groupby("metric")[["floor", "ceiling"]].median()
    return [
        (
            name,
            "higher" if _higher(name) else "lower",
            about.get(name, "").replace("``", ""),
            _number(anchors.loc[name, "floor"]),
            _number(anchors.loc[name, "ceiling"]),
        )
        for name in _metrics(summary)
    ]


def _metrics(table: pd.DataFrame) -> list[str]:
    return list(table["metric"].unique())


def _models(summary: pd.DataFrame) -> list[str]:
    return [model for model in summary["model"].unique() if model != CEILING]


def _higher(name: str) -> bool:
    return any(metric.name == name and metric.direction == "higher" for metric in METRICS)


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else ""
