"""A state to be reached, given as cells or as a signature, and its direction from control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from jaxtyping import Float, Int

from knockon.data import prepare
from knockon.data.conventions import Columns
from knockon.data.formats import load
from knockon.data.prepare import Preparation
from knockon.data.screen import Screen
from knockon.types import UserError

State = Mapping[str, float] | AnnData
"""Weights of genes (a signature), or cells in counts or log1p."""
LISTS = ".txt", ".grp", ".lst"
"""Endings of lists of genes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """A target among the genes of a screen.

    Parameters
    ----------
    places
        Its genes, as columns of the screen.
    values
        Their mean in log1p over the target cells, or their weights.
    of_cells
        Which of the two.
    notes
        What was left out, to be printed.
    """

    places: Int[np.ndarray, "shared"]
    values: Float[np.ndarray, "shared"]
    of_cells: bool
    notes: tuple[str, ...] = ()

    @classmethod
    def align(cls, state: State, screen: Screen, total: float | None) -> "Target":
        """Find a target among the genes of a screen in log1p.

        Parameters
        ----------
        state
            The target.
        screen
            Gives the order of genes.
        total
            Sum that all counts of a cell were normalized to before ``log1p``, None where nobody knows.

        Raises
        ------
        UserError
            If no gene is shared, or cells cannot be brought to the scale of the screen.
        """
        of_cells = isinstance(state, AnnData)
        names = tuple(state.var_names.astype(str)) if isinstance(state, AnnData) else tuple(state)
        place = {gene: i for i, gene in enumerate(screen.genes)}
        shared = [name for name in names if name in place]
        if not shared:
            raise UserError(
                "The target shares no gene with the screen",
                offenders=names,
                expected=f"names such as {', '.join(screen.genes[:3])}",
                mend="write genes as the screen does",
            )
        mean = _mean(state, total) if isinstance(state, AnnData) else state
        values = np.array([mean[name] for name in shared], dtype=np.float64)
        if not of_cells and not values.any():
            raise UserError("All genes that the target shares have weight 0", expected="some other weight")
        left_out = len(names) - len(shared)
        note = f"{left_out} of {len(names)} genes of the target are not in the screen and left out"
        return cls(
            places=np.array([place[name] for name in shared]),
            values=values,
            of_cells=of_cells,
            notes=(note,) if left_out else (),
        )

    def direction(self, control: Float[np.ndarray, "genes"]) -> Float[np.ndarray, "shared"]:
        """Way from control to the target, in log1p; of a signature, its weights."""
        return self.values - control[self.places] if self.of_cells else self.values


def read(files: Sequence[Path], where: Mapping[str, str] = {}) -> State:
    """Read a target from what the command line names.

    Parameters
    ----------
    files
        Cells (.h5ad, .zarr), a table of ``gene,weight`` (.csv, .tsv), or one or two lists of genes (.txt, a
        gene a line): those that go up, then those that go down.
    where
        Columns of ``obs`` and the value that the target cells have in them.

    Raises
    ------
    UserError
        If a file is missing or is none of these, or no cell is left.
    """
    kinds = {file.suffix for file in files}
    if len(files) in (1, 2) and kinds <= set(LISTS) and not where:
        up, *down = (_list(file) for file in files)
        return _signed(up, *down)
    if len(files) == 1 and kinds <= {".csv", ".tsv"} and not where:
        return _table(files[0])
    if len(files) == 1 and kinds <= {".h5ad", ".zarr"}:
        return _cells(files[0], where)
    raise UserError(
        "This is no target",
        offenders=files,
        expected="cells (.h5ad), a table of gene,weight (.csv), or lists of genes that go up and down (.txt)",
        mend="give one file, or two lists, to --target; --where goes with cells",
    )


def _signed(up: Sequence[str], down: Sequence[str] = ()) -> dict[str, float]:
    both = sorted(set(up) & set(down))
    if both:
        raise UserError("Genes that are to go up and down", offenders=both, expected="each in one list")
    return dict.fromkeys(up, 1.0) | dict.fromkeys(down, -1.0)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {file} ({error})", expected="a text file") from error


def _list(file: Path) -> list[str]:
    genes = _text(file).split()
    if not genes:
        raise UserError(f"{file} is empty", expected="a gene a line")
    return genes


def _table(file: Path) -> dict[str, float]:
    """Read weights of genes; the first line is a heading unless it has a weight."""
    mark = "\t" if file.suffix == ".tsv" else ","
    lines = [line.split(mark) for line in _text(file).splitlines() if line.strip()]
    lines = lines[0 if lines and _has_weight(lines[0]) else 1 :]
    genes = [line[0].strip() for line in lines]
    try:
        weights = [float(line[1]) for line in lines]
    except (IndexError, ValueError) as error:
        raise UserError(
            f"{file} has a line without a weight ({error})",
            expected="a gene and its weight in each line but a heading",
        ) from error
    twice = sorted({gene for gene in genes if genes.count(gene) > 1})
    if twice or not genes or not np.isfinite(weights).all():
        raise UserError(
            f"{file} is no signature", offenders=twice, expected="each gene once, with a finite weight"
        )
    return dict(zip(genes, weights, strict=True))


def _has_weight(line: Sequence[str]) -> bool:
    try:
        float(line[1])
    except (IndexError, ValueError):
        return False
    return True


def _cells(file: Path, where: Mapping[str, str]) -> AnnData:
    stored = load(file)
    kept = np.ones(len(stored.obs), dtype=bool)
    for column, value in where.items():
        if column not in stored.obs:
            raise UserError(
                f"{file} has no column of this name",
                offenders=[column],
                expected="one of " + ", ".join(map(str, stored.obs.columns)),
                mend="change --where",
            )
        found = stored.obs[column].astype(str).to_numpy()
        if value not in found:
            raise UserError(
                f"No cell has {column}={value}",
                expected="one of " + ", ".join(sorted(set(found))[:10]),
                mend="change --where",
            )
        kept &= found == value
    if not kept.any():
        raise UserError("No cell fulfills all of --where", mend="ask for less")
    rows = np.flatnonzero(kept)
    return AnnData(
        stored.values[rows], obs=stored.obs.iloc[rows], var=pd.DataFrame(index=pd.Index(stored.genes))
    )


def _mean(cells: AnnData, total: float | None) -> dict[str, float]:
    """Mean over target cells, in log1p of counts per ``total``."""
    found = Screen.from_anndata(cells, columns=Columns(unlabelled=True, covariate_keys=()))
    if found.units == "counts":
        if total is None:
            raise UserError(
                "The target cells are counts, and nobody knows what the screen's were normalized to",
                expected="log1p values, as the screen has them",
                mend="normalize the target cells as the screen was",
            )
        found = prepare.apply(found, Preparation(units="log1p", total=total))
    elif found.total and total and abs(found.total / total - 1) > 0.02:
        raise UserError(
            f"The target cells are log1p of counts per {found.total:g}",
            expected=f"counts per {total:g}, as the screen",
            mend="give counts, or normalize the target cells as the screen was",
        )
    (mean,) = found.means().values()
    return dict(zip(found.genes, mean.tolist(), strict=True))
