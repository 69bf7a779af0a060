"""What a comparison found, to look at: a picture, and one HTML file that opens without a network."""

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, resources
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from knockon.data import formats
from knockon.evaluate.report import panel, portrait
from knockon.evaluate.report.findings import Findings, RunCard, of_ours, sign
from knockon.evaluate.report.payload import payload
from knockon.evaluate.summary import BASELINES, CEILING
from knockon.files import write_text, written_aside
from knockon.types import UserError

FILES = resources.files("knockon.evaluate.report")


def write(folder: str | Path, out: str | Path) -> None:
    """Write one HTML file about a comparison or an evaluation: all that is in it is inside the file.

    Parameters
    ----------
    folder
        With ``scores.csv`` and ``summary.csv``; other files that knockon writes there are shown too.
    out
        The ``.html`` to write.

    Raises
    ------
    UserError
        If the folder holds no comparison, a file in it is damaged, or the page cannot be written.
    """
    found = Findings.read(Path(folder))
    jinja2, plotly = _installed("jinja2"), _installed("plotly.offline")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    with _of(Path(folder)):
        data = payload(found, portrait.read(Path(folder)))
        colors = panel.colors([*found.models, CEILING])
        page = environment.from_string(_text("page.html")).render(
            title=Path(folder).resolve().name,
            found=found,
            colors={name: f"--light:{color.light};--dark:{color.dark}" for name, color in colors.items()},
            panels=[_panel(found, name) for name in found.metrics],
            families=list(dict.fromkeys(map(found.family, found.metrics))),
            simple=BASELINES,
            strata=_strata(found.strata),
            runs=[_card(run) for run in found.runs],
            command=_command(found),
            data=_embedded(json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")),
            style=_embedded(_text("page.css")),
            script=_embedded(_text("page.js") + _text("plots.js")),
            plotly=_embedded(plotly.get_plotlyjs()),
        )
    write_text(Path(out), page)


@contextmanager
def _of(folder: Path) -> Iterator[None]:
    """Blame the files of a folder where they hold what nobody can draw, such as a text for a number."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # an error of any kind, also of the template
        raise UserError(
            f"No report can be made of what about.json, run.json and log.jsonl in {folder} say ({error})",
            expected="what knockon compare or evaluate wrote",
            mend="give that command again",
        ) from error


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
    found = Findings.read(Path(folder))
    with written_aside(Path(out)) as aside:
        _installed("knockon.evaluate.report.picture").draw(found.summary).savefig(aside, dpi=160)


def number(value: object) -> str:
    """Write three digits, as all tables of the page do; nothing for what is missing."""
    if not isinstance(value, Real) or math.isnan(float(value)):
        return ""
    size = abs(float(value))
    if isinstance(value, Integral) or size >= 1000 or size == 0:
        text = f"{value or 0:,.0f}"
    else:
        text = f"{value:#.3g}".rstrip(".") if size >= 1e-4 else f"{value:.1e}"
    return text.replace("-", "\N{MINUS SIGN}")


def _panel(found: Findings, metric: str) -> dict[str, Any]:
    """Place a metric's anchors and models on its strip: percent from the left, better to the right."""
    table = found.summary.loc[found.summary["metric"] == metric]
    floor, ceiling = panel.anchor(table, "floor"), panel.anchor(table, "ceiling")
    left, right = panel.limits(table, sign(metric) or 1)
    tests = _by_model(found.paired, metric)
    best = (sign(metric) * table.loc[table["model"] != CEILING, "mean"]).max()

    def place(value: float) -> float | None:
        return None if pd.isna(value) else round(min(max(100 * (value - left) / (right - left), 0), 100), 2)

    lines = {
        model: line
        | {f"{name}_at": place(line[name]) for name in ("mean", "low", "high")}
        | {"off": place(line["mean"]) == 0, "best": sign(metric) * line["mean"] == best}
        | {"test": tests.get(model)}
        for model, line in _by_model(found.summary, metric).items()
    }
    return {
        "name": metric,
        "family": found.family(metric),
        "sign": sign(metric),
        "about": getattr(of_ours(metric), "about", ""),
        "how": getattr(of_ours(metric), "how", ""),
        "perfect": getattr(of_ours(metric), "best", None),
        "floor": floor,
        "ceiling": ceiling,
        "floor_at": place(floor),
        "ceiling_at": place(ceiling),
        "lines": lines,
    }


def _by_model(table: pd.DataFrame, metric: str) -> dict[str, dict[str, Any]]:
    """Lines of a metric, by model."""
    part = table.loc[table["metric"] == metric].set_index("model", drop=False)
    return {str(model): {str(key): value for key, value in line.items()} for model, line in part.iterrows()}


def _strata(strata: pd.DataFrame) -> list[dict[str, Any]]:
    """Tabulate each kind of stratum: lines of a model and metric, a column for each stratum."""
    tables = []
    for by in strata["by"].unique():
        part = strata.loc[strata["by"] == by]
        counts = part.groupby("stratum", sort=False)["conditions"].max()
        wide = part.pivot_table(index=["metric", "model"], columns="stratum", values="mean", sort=False)
        lines = zip(wide.index.tolist(), wide[list(counts.index)].to_numpy().tolist(), strict=True)
        rows = [(metric, model, values) for (metric, model), values in lines]
        tables.append({"by": str(by), "columns": counts.to_dict(), "rows": rows})
    return tables


def _card(run: RunCard) -> dict[str, Any]:
    """Choose what to show of a run."""
    record = run.record
    return {
        "name": run.name,
        "numbers": run.numbers,
        "steps": record.get("steps"),
        "seconds": record.get("seconds"),
        "device": record.get("device", ""),
        "settings": {part: record.get(part) or {} for part in ("config", "train")},
        "versions": record.get("versions", {}),
        "digests": {"screen": record.get("screen", ""), **record.get("files", {})},
    }


def _command(found: Findings) -> str:
    """Write the command that makes a comparison again; none where the folder does not tell all of it."""
    runs = [run for run in found.runs if "/" not in run.name]
    made = [_prediction(found.folder, run.name) for run in runs]
    cells = {int(note.get("cells", 0)) for note in made}
    if not runs or len(cells) > 1 or 0 in cells or any(note.get("fallback") for note in made):
        return ""
    record = runs[0].record
    prepared = record.get("preparation") or {}
    if record.get("vectors") or prepared.get("genes"):
        return ""  # a table of vectors and a panel of genes are known by what came of them only
    training = [run.record.get("train") or {} for run in runs]
    steps = {train["steps"] for train in training if train.get("steps")}
    asked = {
        **record.get("columns", {}),
        "total": prepared.get("total"),
        "split": str(found.folder / "runs" / runs[0].name / "split.json"),
        "models": [run.name.replace("-", ":") for run in runs],
        "suite": found.about.get("suites"),
        "cells": cells.pop(),
        "steps": steps.pop() if len(steps) == 1 else None,  # where they differ, each had its own
        "seed": training[0].get("seed"),
    }
    words = ["knockon", "compare", "--data", record.get("source") or "SCREEN.h5ad"]
    for key, value in asked.items():
        if value not in (None, False, []):
            values = map(str, value) if isinstance(value, list) else [str(value)]
            words += [f"--{key.replace('_', '-')}", *values]
    return shlex.join([*words, "--out", "AGAIN"])


def _prediction(folder: Path, name: str) -> Mapping[str, Any]:
    """Read what the prediction of a run says of itself; nothing where it was not kept."""
    path = folder / "predictions" / f"{name}.h5ad"
    return formats.read_about(path) if path.exists() else {}


def _text(name: str) -> str:
    return FILES.joinpath(name).read_text(encoding="utf-8")


def _embedded(text: str) -> Any:
    """Text as it is inside of a script or a style, which it cannot end."""
    safe = re.sub("<(?=/script|/style|!--)", r"\\x3c", text, flags=re.IGNORECASE)
    return _installed("markupsafe").Markup(safe)


def _installed(name: str) -> ModuleType:
    """Import what not everyone has installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", mend="pip install 'knockon[report]'") from error
