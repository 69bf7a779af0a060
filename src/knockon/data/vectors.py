"""Tables of fixed vectors by perturbation: gene embeddings, fingerprints, anything that has a name."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from knockon.types import UserError

log = logging.getLogger("knockon")


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


def stacked(
    vectors: Mapping[str, Float[np.ndarray, "width"]], names: Sequence[str], asked: Collection[str]
) -> Float[np.ndarray, "perturbations width"]:
    """Put vectors side by side in the order of ``names``, NaN where there is none, and say what is missing.

    Parameters
    ----------
    names
        All perturbations.
    asked
        Those that should have a vector.

    Raises
    ------
    UserError
        If none of these has one, or the vectors differ in length.
    """
    widths = {np.shape(vector) for vector in vectors.values()}
    if len(widths) > 1:
        raise UserError("Vectors of different lengths", expected="one length for all")
    missing = sorted(name for name in asked if name not in vectors)
    if asked and len(missing) == len(asked):
        raise UserError(
            "No perturbation of the screen has a vector",
            offenders=missing,
            expected="the names that the screen has, such as gene symbols",
            mend="rename the rows of the table of --vectors, or leave it out",
        )
    log.info("vectors: %d of %d perturbations of the screen have one", len(asked) - len(missing), len(asked))
    if missing:
        named = ", ".join(missing[:10]) + f" and {len(missing) - 10} more" * (len(missing) > 10)
        log.warning("without a vector, known by their own cells alone: %s", named)
    (width,) = widths
    none = np.full(width, np.nan)
    return np.stack([np.asarray(vectors.get(name, none), np.float32) for name in names])


def present(vectors: Float[np.ndarray, "perturbations width"]) -> Bool[np.ndarray, "perturbations"]:
    """Tell which perturbations have a vector."""
    return np.array([np.isfinite(vector).all() for vector in vectors], dtype=bool)
