"""What the page of a report draws from: plain values and arrays in few bytes."""

import base64
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Num

from knockon.evaluate.report import panel
from knockon.evaluate.report.findings import Findings, RunCard, of_ours, sign
from knockon.evaluate.report.portrait import Portrait, Scene, Side
from knockon.evaluate.summary import BASELINES, CEILING

MISSING = -32768
"""Stands for NaN."""
POINTS = 400
"""Of a training curve."""


def payload(found: Findings, album: tuple[Scene, Mapping[str, Portrait]] | None) -> dict[str, object]:
    """Gather what the page draws from, as plain values that fit into JSON."""
    colors = panel.colors([*found.models, CEILING])
    return {
        "models": [
            {"name": name, "color": [colors[name].light, colors[name].dark], "simple": name in BASELINES}
            for name in found.models
        ],
        "room": [panel.ROOM.light, panel.ROOM.dark],
        "ceiling": CEILING,
        "favorite": found.favorite,
        "metrics": [
            {
                "name": name,
                "sign": sign(name),
                "family": found.family(name),
                "about": getattr(of_ours(name), "about", ""),
                "baseline": found.baselines.get(name),
            }
            for name in found.metrics
        ],
        "conditions": found.conditions,
        "scores": _scores(found.scores, found.conditions),
        "curves": [_curve(run) for run in found.runs if len(run.log) > 1],
        "portraits": album and _portraits(found, *album),
    }


def _scores(scores: pd.DataFrame, conditions: Sequence[str]) -> dict[str, dict[str, list[float | None]]]:
    """Values of each metric and model, in the order of conditions."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for metric, of_metric in scores.dropna(subset="value").groupby("metric", sort=False):
        for model, part in of_metric.groupby("model", sort=False):
            values = dict(zip(part["condition"], part["value"], strict=True))
            if not values.keys().isdisjoint(conditions):
                told = [_short(values.get(name, math.nan)) for name in conditions]
                found.setdefault(str(metric), {})[str(model)] = told
    return found


def _short(value: float) -> float | None:
    """Five digits, which is more than anybody reads."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _curve(run: RunCard) -> dict[str, object]:
    """Losses of a run by step, thinned; not the learning rate."""
    log = [line for line in run.log if isinstance(line.get("step"), int)]
    log = log[:: max(1, -(-len(log) // POINTS))]
    names = dict.fromkeys(key for line in log for key in line if key not in ("step", "lr"))
    values = {name: [_short(line.get(name, math.nan)) for line in log] for name in names}
    return {
        "name": run.name,
        "model": run.name.split("/")[0],
        "step": [line["step"] for line in log],
        "values": values,
    }


def _portraits(found: Findings, scene: Scene, portraits: Mapping[str, Portrait]) -> dict[str, object]:
    return {
        "genes": scene.genes,
        "conditions": scene.conditions,
        "effect": [_short(value) for value in scene.effect.tolist()],
        "shown": encode(scene.shown),
        "level": encode(scene.level),
        "change": encode(scene.change),
        "expected": encode(scene.expected),
        "real": _side(scene.real),
        "control": _side(scene.control),
        "models": {
            name: _portrait(portraits[name], scene.conditions) for name in found.models if name in portraits
        },
    }


def _portrait(portrait: Portrait, conditions: Sequence[str]) -> dict[str, object]:
    """Arrays of a model, with a row for each condition of the scene; those that it lacks are missing."""
    rows = [conditions.index(name) for name in portrait.conditions]

    def whole(array: Num[np.ndarray, "conditions *shape"]) -> Num[np.ndarray, "all *shape"]:
        filled = np.full(
            (len(conditions), *array.shape[1:]), np.nan if array.dtype.kind == "f" else 0, array.dtype
        )
        filled[rows] = array
        return filled

    side = Side(**{name: whole(getattr(portrait.cells, name)) for name in Side.__dataclass_fields__})
    own = {
        name: encode(whole(getattr(portrait, name)))
        for name in ("change", "own", "own_level", "own_real", "own_change")
    }
    return own | _side(side)


def _side(side: Side) -> dict[str, object]:
    arrays = {name: encode(getattr(side, name)) for name in ("zeros", "quantiles", "spots", "center")}
    return {"cells": [int(count) for count in side.cells], **arrays}


def encode(array: Num[np.ndarray, "*shape"]) -> dict[str, object]:
    """Pack an array into base64 text: whole numbers as they are, others in 16 bits of one step for all.

    The step is 1/32767 of the largest absolute value, so that a value is off by half of it at most.
    """
    if array.dtype.kind in "iu":
        return {"shape": array.shape, "step": 0, "data": _text(array.astype("<u4"))}
    finite = np.isfinite(array)
    step = float(np.abs(array[finite]).max(initial=0.0)) / 32767 or 1.0
    packed = np.where(finite, np.rint(np.where(finite, array, 0.0) / step), MISSING)
    return {"shape": array.shape, "step": step, "data": _text(packed.astype("<i2"))}


def _text(array: Num[np.ndarray, "*shape"]) -> str:
    return base64.b64encode(array.tobytes()).decode("ascii")
