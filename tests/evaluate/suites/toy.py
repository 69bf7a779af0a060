"""A toy screen on which the field's evaluators were run side by side, and five predictions of it.

12 perturbations of 80 cells and 300 controls, 500 genes. Each perturbation changes 40 random genes by
standard normal natural-log effects and knocks its own gene down by 3; counts are Gamma-Poisson. Base rates,
dispersion and seed are those that come nearest to the published table of such a run.
"""

from dataclasses import dataclass

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = [f"G{i}" for i in range(500)]
TARGETS = GENES[:12]
TRAINED = GENES[12]
"""One more perturbation, to train on: it is in no table."""
CELLS, CONTROLS, CHANGED = 80, 300, 40
RATE, SPREAD, DISPERSION, SEED = 4.5, 1.1, 1.15, 11
SCALES = {"replicate": 1.0, "half": 0.5, "no change": 0.0, "sign flip": -1.0}
"""Factors of the true effects."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Toy:
    """Counts of the screen, and of each prediction (without control cells)."""

    real: anndata.AnnData
    predictions: dict[str, anndata.AnnData]


def toy(seed: int = SEED) -> Toy:
    """Draw the screen and its predictions."""
    rng = np.random.default_rng(seed)
    base = RATE * np.exp(SPREAD * rng.normal(size=len(GENES)))
    effects = np.zeros((len(TARGETS) + 1, len(GENES)))
    for own, effect in enumerate(effects):
        effect[rng.choice(len(GENES), CHANGED, replace=False)] = rng.normal(size=CHANGED)
        effect[own] -= 3

    def cells(effect: np.ndarray, count: int) -> np.ndarray:
        gamma = rng.gamma(DISPERSION, 1 / DISPERSION, (count, len(GENES)))
        return rng.poisson(base * np.exp(effect) * gamma)

    control = cells(np.zeros(len(GENES)), CONTROLS)
    real = [cells(effect, CELLS) for effect in effects]
    predictions = {
        name: [cells(scale * effect, CELLS) for effect in effects[:-1]] for name, scale in SCALES.items()
    }
    pool = np.concatenate([cells(effect, CELLS) for effect in effects[:-1]])
    predictions["mean"] = [pool[rng.choice(len(pool), CELLS, replace=False)] for _ in TARGETS]
    return Toy(
        real=_adata(["control", *TARGETS, TRAINED], [control, *real]),
        predictions={name: _adata(TARGETS, found) for name, found in predictions.items()},
    )


def _adata(names: list[str], blocks: list[np.ndarray]) -> anndata.AnnData:
    labels = np.repeat(names, [len(block) for block in blocks])
    obs = pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(len(labels))])
    matrix = sp.csr_matrix(np.concatenate(blocks), dtype=np.float32)
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=GENES))


def log1p(adata: anndata.AnnData) -> anndata.AnnData:
    """Natural log1p of counts per 10,000, rounded to float32 as screens are."""
    found = adata.copy()
    counts = adata.X.toarray().astype(np.float64)
    values = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    found.X = sp.csr_matrix(values.astype(np.float32).astype(np.float64))
    return found


def with_control(prediction: anndata.AnnData, real: anndata.AnnData) -> anndata.AnnData:
    """A prediction as the field's evaluators take it: with the real control cells."""
    control = real[real.obs["perturbation"] == "control"]
    return anndata.concat([control, prediction], index_unique="-")


def known(real: anndata.AnnData) -> anndata.AnnData:
    """The screen as the field's evaluators take it: of the scored conditions and control."""
    return real[real.obs["perturbation"] != TRAINED].copy()
