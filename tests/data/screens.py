"""Small screens in memory, made for one test each."""

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = tuple(f"G{i}" for i in range(40))
DOUBLES = {
    "control": 30,
    "A": 20,
    "B": 20,
    "C": 20,
    "D": 20,
    "A+B": 15,
    "C+B": 15,
    "D+A": 15,
    "C+D": 15,
    "A+E": 15,
}


def counts(cells: int, genes: int = len(GENES), *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 2.0, size=genes), size=(cells, genes)).astype(np.float32)


def log1p(values: np.ndarray, total: float = 1e4) -> np.ndarray:
    return np.log1p(values / values.sum(axis=1, keepdims=True) * total).astype(np.float32)


def adata(conditions: dict[str, int], *, key: str = "perturbation", **obs: list) -> anndata.AnnData:
    """Counts of cells under conditions, so many of each."""
    names = [name for name, number in conditions.items() for _ in range(number)]
    table = pd.DataFrame({key: names, **obs}, index=[f"cell{i}" for i in range(len(names))])
    values = sp.csr_matrix(counts(len(names)))
    return anndata.AnnData(values, obs=table, var=pd.DataFrame(index=list(GENES)))
