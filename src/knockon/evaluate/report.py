"""What a comparison found, to look at: a picture, and one HTML file that opens without a network."""

from collections.abc import Hashable
from importlib import resources
from pathlib import Path
from types import ModuleType

import jinja2
import pandas as pd
from markupsafe import Markup

from knockon.evaluate.metrics import Metric
from knockon.evaluate.suites import METRICS
from knockon.evaluate.summary import CEILING, SUMMARY
from knockon.files import write_text, written_aside
from knockon.types import UserError


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
    environment.filters["number"] = _number
    page = environment.from_string(template).render(
        title=Path(folder).resolve().name,
        conditions=scores["condition"].nunique(),
        picture=Markup(_drawing().inline_svg(summary)),
        metrics=_explained(summary),
        leaders=_leaders(summary),
        tables=_by_condition(scores),
    )
    write_text(Path(out), page)


def picture(folder: str | Path, out: str | Path) -> None:
    """Draw the scores of a comparison between floor and ceiling; see ``picture.draw``.

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
        _drawing().draw(summary).savefig(aside, dpi=160)


def _drawing() -> ModuleType:
    try:
        from knockon.evaluate import picture  # noqa: PLC0415 - slow to import, and not always installed
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", mend="pip install 'knockon[report]'") from error
    return picture


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


def _leaders(summary: pd.DataFrame) -> list[tuple[str, float, dict[Hashable, dict[str, object]]]]:
    """Models from best to worst mean rank over metrics, each with its lines of the summary by metric.

    A line has besides: ``place`` between floor (0) and ceiling (100), and ``is_best``.
    """
    table = pd.DataFrame(summary.loc[summary["model"] != CEILING])
    sign = 1 - 2 * table["metric"].isin([m.name for m in METRICS if m.direction == "lower"])
    better = sign * table["mean"]
    room = pd.Series(sign * (table["ceiling"] - table["floor"]))
    place = 100 * (better - sign * table["floor"]) / room.where(room > 0)
    by_metric = better.groupby(table["metric"])
    table = table.assign(
        place=place.clip(0, 100).fillna(0),
        is_best=better == by_metric.transform("max"),
        rank=by_metric.rank(ascending=False),
    )
    order = pd.Series(table.groupby("model", sort=False)["rank"].mean()).sort_values(kind="stable")
    lines = {model: part.set_index("metric").to_dict("index") for model, part in table.groupby("model")}
    return [(str(model), rank, lines[model]) for model, rank in order.items()]


def _by_condition(scores: pd.DataFrame) -> list[tuple[str, list[str], list[tuple[str, list[float]]]]]:
    """For each metric: its models, and their values for each condition."""
    tables = []
    for name, part in scores.groupby("metric", sort=False):
        wide = part.pivot_table(index="condition", columns="model", values="value", sort=False)
        rows = [(str(label), list(values)) for label, values in zip(wide.index, wide.to_numpy(), strict=True)]
        tables.append((str(name), [str(model) for model in wide.columns], rows))
    return tables


def _explained(summary: pd.DataFrame) -> list[tuple[Metric, str, dict[Hashable, object]]]:
    """Each metric with the first line of its documentation, and its anchors."""
    anchors = summary.drop_duplicates("metric").set_index("metric").to_dict("index")
    return [(metric, metric.about, anchors[metric.name]) for metric in METRICS if metric.name in anchors]


def _number(value: float) -> str:
    return f"{value:.3g}" if pd.notna(value) else ""
