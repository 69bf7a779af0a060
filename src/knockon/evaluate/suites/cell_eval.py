"""The package cell-eval itself on our aligned cells: its numbers, in our table, between our anchors.

Conventions are the package's (0.8.x, profile ``full``): means after log1p over all genes; signed effects;
discrimination 1 - rank / N over the scored conditions, ties in the order of names, without the gene that is
called as the condition is (so none for a combination); differential expression by pdex (Mann-Whitney,
geometric fold change), adjusted within each condition, significant below .05. Ours: both sides hold the
real control cells; values are declared log1p and never guessed; contexts are scored one by one (see
``bridges``); the per-condition results are read, not the package's summary, whose first line is a count. Of
doses and combinations, the whole text is the name.

A NaN of the package stays where the *real* cells cannot tell (no significant gene, numbers that do not vary)
and counts as 0 where the prediction is to blame. Discrimination is left out where one condition stands
alone. ``de_nsig_counts`` is no score and is left out. ``pearson_edistance`` needs all distances between
cells and is left out where they are too many (``MOST``); ``clustering_agreement`` says little of fewer than
some dozens of conditions. Ceilings but those of errors and correlations are of halves, so a little low.
"""

import warnings
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from knockon.evaluate.metrics import Metric, Noise
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import num_cells
from knockon.evaluate.suites.bridges import KEY, Column, Table, by_context, column, joined, quiet, side
from knockon.types import CONTROL, UserError

if TYPE_CHECKING:
    from cell_eval import MetricsEvaluator

ERRORS: Mapping[str, Noise] = {"mse": "square", "mae": "root", "mse_delta": "square", "mae_delta": "root"}
"""Lower is better, 0 is best."""
CHANCE = tuple(f"discrimination_score_{distance}" for distance in ("l1", "l2", "cosine"))
ENOUGH: Mapping[str, int] = {
    "de_sig_genes_recall": 1,
    "de_spearman_lfc_sig": 2,
    "de_direction_match": 1,
    "pr_auc": 1,
    "roc_auc": 1,
}
"""How many really significant genes a value needs."""
SETS = tuple(f"{kind}_at_{k}" for kind in ("overlap", "precision") for k in ("N", 50, 100, 200, 500))
SIGN_BLIND = (*SETS, "de_sig_genes_recall", "pr_auc", "roc_auc")
ALONE = ("pearson_delta", *CHANCE, *SETS, *ENOUGH)
"""One value for each condition, 1 is best."""
TOGETHER = ("de_spearman_sig", "pearson_edistance", "clustering_agreement")
"""One value for all conditions of a context, 1 is best."""
CORRELATIONS = ("pearson_delta", "de_spearman_lfc_sig", "de_spearman_sig")
"""Carried over from halves to whole conditions; for shares and areas no law does that (see ``de``)."""
FEWEST = 3
"""Conditions that a value of all of them needs."""
SLOW = ("pearson_edistance",)
MOST = 10**10
"""Squared number of control cells times genes, above which the slow one is left out: it takes minutes."""


def gather(pairs: Pairs, cells: int) -> Table:  # noqa: ARG001 (the package takes all cells)
    """Let the package score each context.

    Raises
    ------
    UserError
        If the package is missing.
    """
    parts = [(places, _scored(pairs, places)) for places in by_context(pairs.truth.labels)]
    return Table(values=joined(parts, len(pairs.truth.labels)))


def _scored(pairs: Pairs, places: np.ndarray) -> dict[str, Column]:
    """Scores of the conditions of one context."""
    truth = pairs.truth
    labels = [truth.labels[i] for i in places]
    control, genes = truth.population(labels[0].control()), truth.screen.genes
    predicted, real = (
        side(labels, [source[i] for i in places], control, genes) for source in (pairs.cells, truth.cells)
    )
    skipped = TOGETHER if len(labels) < FEWEST else SLOW * (num_cells(control) ** 2 * len(genes) > MOST)
    with TemporaryDirectory() as folder, quiet("cell_eval", "pdex"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = _evaluator()(
            adata_pred=predicted,
            adata_real=real,
            control_pert=CONTROL,
            pert_col=KEY,
            num_threads=1,
            outdir=folder,
            allow_discrete=True,  # so that the scale is taken as declared, whatever the values look like
            pdex_kwargs={"is_log1p": True},
        )
        results, _ = evaluator.compute(write_csv=False, skip_metrics=list(skipped), break_on_error=True)
    found = pd.DataFrame(results.to_dict(as_series=False)).set_index("perturbation")
    return _told(found.loc[[label.perturbation for label in labels]])


def _told(found: pd.DataFrame) -> dict[str, Column]:
    """Leave NaN only where the real cells cannot tell."""
    significant = found["de_nsig_counts_real"].to_numpy()
    values: dict[str, Column] = {name: found[name].to_numpy(float) for name in (*ERRORS, *ALONE)}
    for name in ALONE:
        told = significant >= ENOUGH.get(name, 0)
        values[name] = np.where(np.isnan(values[name]) & told, 0.0, values[name])
    if len(found) < 2:  # the package would say 1: without a rival, anything is told apart
        values |= {name: np.full(len(found), np.nan) for name in CHANCE}
    numbers = significant[significant > 0]  # the conditions that the package correlates over
    varied = len(numbers) > 0 and np.ptp(numbers) > 0
    for name in TOGETHER:
        known = name in found and (name != "de_spearman_sig" or varied)
        values[name] = np.array(np.nan_to_num(found[name].iloc[0]) if known else np.nan)
    return values


def _evaluator() -> "type[MetricsEvaluator]":
    try:
        from cell_eval import MetricsEvaluator  # noqa: PLC0415 (an extra, and some seconds)
    except ModuleNotFoundError as error:
        raise UserError(
            "The suite cell-eval needs the package cell-eval", mend="pip install 'knockon[eval]'"
        ) from error
    return MetricsEvaluator


def _metric(name: str) -> Metric:
    how = "package cell-eval 0.8" + (", sign-blind" if name in SIGN_BLIND else "")
    picked = column(name, f"{name} as the package cell-eval computes it.")
    if name in ERRORS:
        return Metric(f"cell-eval:{name}", picked, "lower", 0.0, ERRORS[name], how)
    noise = "reliability" if name in CORRELATIONS else "none"
    return Metric(f"cell-eval:{name}", picked, "higher", 1.0, noise, how)


METRICS = tuple(_metric(name) for name in (*ERRORS, *ALONE, *TOGETHER))
