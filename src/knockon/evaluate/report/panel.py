"""What picture and page of a comparison share: colors of models, and the scale of a metric's panel."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from knockon.evaluate.summary import BASELINES, CEILING


@dataclass(frozen=True)
class Color:
    """A color on light and on dark paper."""

    light: str
    dark: str


ROOM = Color("#2b8a3e", "#69c779")
"""Of the room between floor and ceiling."""
GRAYS = (
    Color("#6b7280", "#9aa3af"),
    Color("#8d99a8", "#78828f"),
    Color("#4b5563", "#bcc4ce"),
    Color("#5f6670", "#aab2bc"),
)
"""Of the simple baselines."""
COLORS = (
    Color("#0072b2", "#4da3e0"),
    Color("#d55e00", "#f0813a"),
    Color("#8e5bd0", "#b58cf0"),
    Color("#b8860b", "#e6b422"),
    Color("#cc4f8f", "#f08cc0"),
    Color("#0b8f86", "#35c4b5"),
    Color("#7a4a21", "#c99a6b"),
    Color("#3b3fb0", "#8f95f5"),
)
"""Of all other models; told apart with color-blind eyes too, by hue, lightness and (on the page) symbol."""


def colors(models: Sequence[str]) -> dict[str, Color]:
    """Give every model its color, the same wherever it is drawn."""
    others = [model for model in models if model not in (*BASELINES, CEILING)]
    found = {model: COLORS[i % len(COLORS)] for i, model in enumerate(others)}
    found |= {name: gray for name, gray in zip(BASELINES, GRAYS, strict=True) if name in models}
    return found | ({CEILING: ROOM} if CEILING in models else {})


def limits(lines: pd.DataFrame, sign: int) -> tuple[float, float]:
    """Worst and best value to show: all, but not what lies further below the floor than the ceiling above.

    Parameters
    ----------
    lines
        Of one metric: ``mean, low, high, floor, ceiling``.
    sign
        -1 where lower is better, else 1.
    """
    shown = sign * lines[["mean", "low", "high", "floor", "ceiling"]].to_numpy(float)
    worst, best = (np.nanmin(shown), np.nanmax(shown)) if np.isfinite(shown).any() else (0.0, 1.0)
    floor, ceiling = anchor(lines, "floor"), anchor(lines, "ceiling")
    room = sign * (ceiling - floor)
    worst = max(worst, sign * floor - room) if room > 0 else worst
    margin = 0.06 * (best - worst) or 0.5
    return float(sign * (worst - margin)), float(sign * (best + margin))


def anchor(lines: pd.DataFrame, name: str) -> float:
    """Find the floor or the ceiling of a metric; NaN where there is none."""
    values = lines[name].to_numpy(float)
    return float(next(iter(values[np.isfinite(values)]), np.nan))
