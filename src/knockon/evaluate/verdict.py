"""What was found about predictions of the same test conditions, and the folder that it is written to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from knockon.data.splits import Split
from knockon.evaluate import tables
from knockon.evaluate.flags import COLUMNS
from knockon.evaluate.strata import stratify
from knockon.evaluate.suites import Asked, chosen
from knockon.evaluate.suites.systema import systematic_variation
from knockon.evaluate.summary import summarize
from knockon.evaluate.truth import Truth
from knockon.files import write_json, write_text
from knockon.record import EVALUATORS, versions


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """Scores of predictions and anchors, and what they are scores of.

    Parameters
    ----------
    scores
        Long, with the columns ``model, condition, metric, value``, the anchors among the models.
    truth, split
        What was scored against, and what was held out.
    suite
        Which metrics.
    flags
        What ``flags.check`` raised, with a column ``model`` in front; None where nobody looked.
    notes
        What was done to align each prediction, by model.
    """

    scores: pd.DataFrame
    truth: Truth
    split: Split
    suite: Asked
    flags: pd.DataFrame | None = None
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def summary(self) -> pd.DataFrame:
        """Means over conditions between their anchors; see ``summarize``."""
        return summarize(self.scores)

    def write(self, folder: Path) -> pd.DataFrame:
        """Write all tables and ``about.json``, and return the summary."""
        summary = tables.write(self.scores, folder)
        write_text(folder / "strata.csv", stratify(self.scores, self.truth).to_csv(index=False))
        if self.flags is not None:
            table = self.flags.reindex(columns=["model", *COLUMNS])
            write_text(folder / "flags.csv", table.to_csv(index=False))
        write_json(folder / "about.json", self.about())
        return summary

    def about(self) -> dict[str, object]:
        """Describe the screen, the split and every convention, as plain values."""
        screen, suites = self.truth.source, chosen(self.suite)
        return {
            "screen": {
                "digest": screen.digest,
                "perturbations": len(screen.spec().perturbations),
                "units": screen.units,
                "genes": len(screen.genes),
                "cells": screen.num_cells,
                "control_cells": sum(len(screen.rows[label]) for label in screen.controls),
                "conditions": len(screen.conditions),
                "covariates": {c.name: list(c.levels) for c in screen.covariates},
            },
            "split": {
                "kind": self.split.kind,
                "seed": self.split.seed,
                **{part: len(getattr(self.split, part)) for part in ("train", "validation", "test")},
            },
            "systematic_variation": systematic_variation(self.truth),
            "suites": [suite.name for suite in suites],
            "metrics": {
                metric.name: {"better": metric.direction, "about": metric.about, "how": metric.how}
                for suite in suites
                for metric in suite.metrics
            },
            "notes": {
                "screen": list(self.truth.notes),
                **{name: list(notes) for name, notes in self.notes.items() if notes},
            },
            "versions": versions(*EVALUATORS),
        }
