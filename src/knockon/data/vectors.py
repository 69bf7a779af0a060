"""Tables of fixed vectors by perturbation: gene embeddings, fingerprints, anything that has a name."""

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from knockon.types import UserError


def read_vectors(path: str | Path) -> dict[str, Float[np.ndarray, "width"]]:
    """Read a ``.csv`` or ``.tsv`` with a header, names in the first column and numbers in the others.

    Raises
    ------
    UserError
        If the file cannot be read, a name stands twice, or a value is no finite number.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, index_col=0, sep="\t" if path.suffix == ".tsv" else ",")
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read the vectors in {path} ({error})", expected="a .csv with names in its first column"
        ) from error
    names = [str(name) for name in table.index]
    twice = sorted({name for name in names if names.count(name) > 1}) if table.index.has_duplicates else []
    if twice:
        raise UserError(f"Names that {path} has twice", offenders=twice, expected="one vector for each name")
    numbers = table.apply(pd.to_numeric, errors="coerce").to_numpy(np.float32)
    wrong = [name for name, row in zip(names, numbers, strict=True) if not np.isfinite(row).all()]
    if wrong or not numbers.size:
        raise UserError(
            f"Vectors in {path} that are not finite numbers", offenders=wrong, expected="numbers only"
        )
    return dict(zip(names, numbers, strict=True))
