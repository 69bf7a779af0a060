"""The package cell-eval2 itself, with its preset ``vcc2026``, on our aligned counts.

Conventions are the package's (0.20): bulk profiles are log1p of summed counts per 50,000; differential
expression by Mann-Whitney of counts per million, fold changes of arithmetic means, genes above 5 per million
in control; the target genes of all scored conditions leave the discrimination score; where a prediction is
degenerate it gets the worst value. Ours: both sides in raw counts, with the real control cells of the
context below them, contexts scored one by one (see ``bridges``), on the CPU with pdex. A condition whose
name is no gene of the panel (a combination, a drug) is declared to have no target gene; if there is none,
the settings are the preset's to the letter.

A prediction in log1p that tells its control cells is scored in counts that are drawn (see ``counting``): so
baselines have scores, too. Ceilings are the scores of raw halves, as the package's own replicate is, but
our halves share the real control cells.

The six metrics of the challenge, and the two unbiased errors behind the third: ``expr_mse_unbiased`` and
``expr_mse_unbiased_capped`` are per condition, their ratio ``expr_mse_unbiased_capped_norm`` is one of sums
over conditions, left out where the real effects are no larger than their noise. ``de_wilcoxon_sig_jaccard``
does not see signs. ``de_wilcoxon_lfc_nmae`` is left out for conditions of fewer than 10 really significant
genes.
"""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from knockon.evaluate.counting import counts
from knockon.evaluate.metrics import Metric
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.suites.bridges import KEY, Column, Table, by_context, column, joined, quiet, side
from knockon.types import CONTROL, UserError

if TYPE_CHECKING:
    from cell_eval2 import EvalConfig

HIGHER = (
    "pds_cosine",
    "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard",
)
LOWER = (
    "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_lfc_nmae",
    "expr_mse_unbiased_capped",
    "expr_mse_unbiased",
)
TOGETHER = "expr_mse_unbiased_capped_norm"
"""The one value that is of all conditions."""
REAL = "expr_distance_unbiased"
"""What the ratio is over: the squared real effect, less its noise."""


def gather(pairs: Pairs, cells: int) -> Table:  # noqa: ARG001 (the package takes all cells)
    """Let the package score each context.

    Raises
    ------
    UserError
        If the package or the counts are missing, or the package refuses them.
    """
    predicted = counts(pairs)
    parts = [(places, _scored(pairs, predicted, places)) for places in by_context(pairs.truth.labels)]
    return Table(values=joined(parts, len(pairs.truth.labels)))


def _scored(pairs: Pairs, predicted: tuple[sp.csr_matrix, ...], places: np.ndarray) -> dict[str, Column]:
    """Scores of the conditions of one context."""
    truth = pairs.truth
    assert truth.counts is not None  # or there would be no predicted counts
    labels = [truth.labels[i] for i in places]
    control = truth.counted(truth.source.control_rows(labels[0]))
    both = [
        side(labels, [source[i] for i in places], control, truth.screen.genes)
        for source in (predicted, truth.counts)
    ]
    names = [label.perturbation for label in labels]
    settings = config({name for name in names if name not in set(truth.screen.genes)})
    package = _package()
    with quiet("cell_eval2", "pdex"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            long = package.compute_metrics(*both, config=settings)
        except ValueError as error:
            raise UserError(
                f"cell-eval2 refuses to score ({' '.join(str(error).split())})",
                expected="raw counts as its preset vcc2026 takes them",
            ) from error
    found = pd.DataFrame(long.to_dict(as_series=False))
    wide = found.pivot(index="perturbation", columns="metric", values="value")
    alone = [name for name in (*HIGHER, *LOWER) if name != TOGETHER]
    wide = wide.reindex(index=names, columns=[*alone, REAL])  # what no condition has is in no line of theirs
    values: dict[str, Column] = {name: wide[name].to_numpy(float) for name in alone}
    if len(names) < 2:  # the package would say 1: without a rival, anything is told apart
        values["pds_cosine"] = np.full(len(names), np.nan)
    # the package refuses this ratio where the real effects are no larger than their noise
    measurable = wide[REAL].sum() > 0
    overall = package.aggregate_metrics(long) if measurable else None
    ratio = np.nan if overall is None else dict(overall.select("metric", "mean").iter_rows())[TOGETHER]
    return values | {TOGETHER: np.array(ratio)}


def config(targetless: set[str], key: str = KEY, control: str = CONTROL) -> "EvalConfig":
    """Give the settings of the preset, on the CPU.

    Parameters
    ----------
    targetless
        Conditions that are no gene of the panel.
    key, control
        The column of ``obs`` that names conditions, and what it calls control cells.
    """
    preset = _package().EvalConfig.from_preset("vcc2026")
    return replace(
        preset,
        pert_col=key,
        control=control,
        device="cpu",
        num_threads=1,
        de=replace(preset.de, backend="pdex"),
        target_gene_map=dict.fromkeys(sorted(targetless)) or None,
    )


def _package():  # noqa: ANN202 (a module)
    try:
        import cell_eval2  # noqa: PLC0415 (an extra, and some seconds)
    except ModuleNotFoundError as error:
        raise UserError(
            "The suite vcc2026 needs the package cell-eval2", mend="pip install 'knockon[eval]'"
        ) from error
    return cell_eval2


def _metric(name: str) -> Metric:
    how = "package cell-eval2 0.20, preset vcc2026, counts (drawn where a prediction is log1p)"
    how += ", sign-blind" if name == "de_wilcoxon_sig_jaccard" else ""
    picked = column(name, f"{name} as the package cell-eval2 computes it.")
    higher = name in HIGHER
    return Metric(f"vcc2026:{name}", picked, "higher" if higher else "lower", float(higher), "none", how)


METRICS = tuple(_metric(name) for name in (*HIGHER, *LOWER))
