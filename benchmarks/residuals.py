"""Does a model predict what two perturbations do beyond the sum of what each does alone?

The residual of a double is its mean less the sum of its singles (with control counted once), and is known of
a simulated screen. Predicted and true residual are correlated over genes, for each held-out double, in two
ways. `measured` subtracts the means of the measured singles from both sides: what a model adds to the
additive prediction that anybody can make. Both sides then share the noise of these means, so that no effect
at all scores above 0. `true` subtracts the true singles from both sides, and shares no noise; but a model
that only shrinks every effect scores above 0, where effects saturate.
"""

from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from jaxtyping import Float

from knockon.data.screen import Screen
from knockon.data.splits import Split, singles
from knockon.evaluate.metrics import pearson
from knockon.evaluate.summary import CEILING, interval
from knockon.types import CONTROL, Label

WAYS = ("measured", "true")

Mean = Float[np.ndarray, "genes"]


def correlations(
    predicted: Mapping[Label, Mean], measured: Mapping[Label, Mean], truth: pd.DataFrame
) -> pd.DataFrame:
    """Correlate the residuals of doubles.

    Parameters
    ----------
    predicted
        Means of the predicted cells of each double.
    measured
        Means of the real cells of each single, and of control.
    truth
        Expectations of all of them, by their names.

    Returns
    -------
    DataFrame
        ``condition, measured, true``; 0 where there is no residual.
    """
    rows = []
    for label, mean in predicted.items():
        parts = singles(label)
        true = truth.loc[str(label)].to_numpy()
        sums = (
            sum(measured[part] for part in parts) - measured[label.control()],
            truth.loc[[str(part) for part in parts]].to_numpy().sum(0) - truth.loc[CONTROL].to_numpy(),
        )
        found = (pearson((mean - total)[None], (true - total)[None])[0] for total in sums)
        rows.append((str(label), *found))
    return pd.DataFrame.from_records(rows, columns=["condition", *WAYS])


def of_fold(folder: Path, screen: Screen, split: Split, truth: pd.DataFrame) -> pd.DataFrame:
    """Correlate for all predictions in a folder, and for the real cells, which are the ceiling."""
    measured, tables = screen.means(), []
    for path in sorted((folder / "predictions").glob("*.h5ad")):
        adata = anndata.read_h5ad(path)
        texts = adata.obs["perturbation"].astype(str).to_numpy()
        cells = {label: adata.X[texts == label.perturbation] for label in split.test}
        means = {label: np.asarray(some.mean(axis=0)).ravel() for label, some in cells.items()}
        tables.append(correlations(means, measured, truth).assign(model=path.stem))
    real = {label: measured[label] for label in split.test}
    return pd.concat([*tables, correlations(real, measured, truth).assign(model=CEILING)], ignore_index=True)


def averaged(table: pd.DataFrame) -> pd.DataFrame:
    """Average each way over doubles: mean and 95 % bootstrap interval of each model."""
    rows = []
    for model, part in table.groupby("model", sort=False):
        for way in WAYS:
            values = part[way].to_numpy()
            rows.append((model, way, values.mean(), *interval(values, np.random.default_rng(0))))
    found = pd.DataFrame.from_records(rows, columns=["model", "way", "mean", "low", "high"])
    return found.set_index(["model", "way"])
