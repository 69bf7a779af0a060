"""Expression values: in memory or on disk, judged by what they are, never converted silently."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import scipy.sparse as sp
import zarr
from anndata.io import sparse_dataset
from jaxtyping import Bool, Float, Int

from knockon.types import Units, UserError

LARGEST_LOG1P = 15.0
"""No ``log1p`` of a count reaches this: it would be three million molecules of one gene."""
EXPRESSED = 10
"""Genes that a cell must express before the look of its values says something."""
BLOCK = 4096
"""Cells that are looked at together, so that no second copy of the values is ever in memory."""
CLOSE = 4
"""Rows that are read for one that is wanted at most: a long read costs less than many short ones."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnDisk:
    """Values that stay in their file; rows are read, and prepared, when they are asked for.

    Parameters
    ----------
    data
        Anything that gives rows for sorted row numbers: an ``h5py`` or ``zarr`` array, or a sparse
        dataset of anndata.
    total
        Sum that counts are normalized to before ``log1p``; None leaves values as they are.
    genes
        Columns that are kept after that; None keeps all.
    """

    data: Any
    total: float | None = None
    genes: Int[np.ndarray, "genes"] | None = None
    of_panel: bool = False
    """Whether the total is that of the chosen genes, as where they were chosen first."""

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        cells, genes = self.data.shape
        return cells, genes if self.genes is None else len(self.genes)

    def __getitem__(self, rows: slice | Int[np.ndarray, "cells"]) -> sp.csr_matrix:
        if isinstance(rows, slice):
            return self._prepared(self._read(rows))
        needed, places = np.unique(rows, return_inverse=True)
        return self._prepared(self._stored(needed))[places]

    def _stored(self, rows: Int[np.ndarray, "cells"]) -> sp.csr_matrix:
        """Rows in their order; where they lie close together, what is between them is read, too."""
        if not len(rows) or rows[-1] - rows[0] >= CLOSE * len(rows):
            return self._read(rows)
        parts = []
        for start in range(int(rows[0]), int(rows[-1]) + 1, BLOCK):
            some = rows[slice(*np.searchsorted(rows, [start, start + BLOCK]))] - start
            if len(some):
                parts.append(self._read(slice(start, start + int(some[-1]) + 1))[some])
        return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))

    def _read(self, rows: slice | Int[np.ndarray, "cells"]) -> sp.csr_matrix:
        """Rows as they lie there.

        Raises
        ------
        UserError
            If the file is damaged.
        """
        try:
            block = self.data[rows]
            if sp.issparse(block):
                block.check_format(full_check=True)  # else a damaged index reaches beyond the memory
            return compressed(block)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # damage shows itself as an error of any kind
            raise UserError(
                f"Cannot read cells from {_place(self.data)[0]} ({error})",
                expected="values as they were written",
                mend="download or write the file again",
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the place of the values, where they are opened again."""
        how = {"total": self.total, "genes": self.genes, "of_panel": self.of_panel}
        return _opened, (_place(self.data), how)

    def _prepared(self, block: sp.csr_matrix) -> sp.csr_matrix:
        if self.genes is not None and self.of_panel:
            block = block[:, self.genes]
        if self.total is not None:
            block = log1p(block, self.total)
        return block if self.genes is None or self.of_panel else block[:, self.genes]

    def normalized(self, total: float) -> "OnDisk":
        """Bring counts to a common total and take ``log1p``, whenever rows are read."""
        return replace(self, total=total, of_panel=self.genes is not None)

    def panel(self, places: Int[np.ndarray, "genes"]) -> "OnDisk":
        """Only some columns."""
        return replace(self, genes=places if self.genes is None else self.genes[places])


def _place(data: Any) -> Any:
    """File of values on disk, whatever the folder that one works in, and where in it they are.

    The values of a store know that themselves.
    """
    element = getattr(data, "group", data)
    if isinstance(element, h5py.Group | h5py.Dataset):
        return str(Path(element.file.filename).resolve()), str(element.name)
    if isinstance(element, zarr.Group | zarr.Array):
        root = Path(element.store.root)  # pyright: ignore[reportAttributeAccessIssue]
        return str(root.resolve()), element.path
    return data


def state_of(path: Path) -> tuple[int, int]:
    """Tell a file or a folder from what took its place."""
    state = path.stat()
    return state.st_ino, state.st_mtime_ns


def _opened(place: Any, how: dict[str, Any]) -> OnDisk:
    return OnDisk(data=_element(*place) if isinstance(place, tuple) else place, **how)


_OPEN: dict[str, tuple[tuple[int, int], Any, dict[str, Any]]] = {}
"""Files that other processes named: their states, what they are read by, and values that were read of."""
MOST = 4
"""How many of them stay open."""


def _element(path: str, name: str) -> Any:
    """Open values once in a process, since every block travels there alone.

    What was written over is closed before it is opened again: HDF5 would take the rest from the old file.
    """
    state, known = state_of(Path(path)), _OPEN.pop(path, None)
    if known is not None and known[0] != state:
        if isinstance(known[1], h5py.File):
            known[1].close()
        known = None
    if known is None:
        store = zarr.open_group(path, mode="r") if Path(path).is_dir() else h5py.File(path, "r")
        known = state, store, dict[str, Any]()
    _OPEN[path] = known
    while len(_OPEN) > MOST:
        _OPEN.pop(next(iter(_OPEN)), None)
    _, store, elements = known
    if name not in elements:
        found: Any = store[name]
        elements[name] = found if isinstance(found, h5py.Dataset | zarr.Array) else sparse_dataset(found)
    return elements[name]


Matrix = sp.csr_matrix | OnDisk
"""Cells x genes."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Units of values, and the total that counts were normalized to where the values tell."""

    units: Units
    total: float | None = None


def compressed(values: Any) -> sp.csr_matrix:
    """Values of any layout as sparse rows of float32 with sorted indices; copies only where it must."""
    matrix = sp.csr_matrix(values, dtype=np.float32)
    matrix.sum_duplicates()
    return matrix


def blocks(matrix: Matrix, rows: Int[np.ndarray, "cells"] | None = None) -> Iterator[sp.csr_matrix]:
    """Rows in a few at a time: all of them, or those that are named."""
    count, _ = cast(tuple[int, int], matrix.shape)
    for start in range(0, count if rows is None else len(rows), BLOCK):
        stop = start + BLOCK
        yield matrix[start:stop] if rows is None else matrix[rows[start:stop]]


def log1p(counts: sp.csr_matrix, total: float) -> sp.csr_matrix:
    """Natural logarithm of 1 + counts per ``total`` of each cell; cells without counts stay empty."""
    sums = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    factors = np.divide(total, sums, out=np.zeros_like(sums), where=sums > 0)
    data = counts.data * np.repeat(factors, np.diff(counts.indptr)).astype(np.float32)
    return sp.csr_matrix((np.log1p(data, out=data), counts.indices, counts.indptr), counts.shape)


@dataclass(kw_only=True, eq=False)
class Survey:
    """What the values look like; grows with every block of cells that is looked at."""

    nonfinite: list[float] = field(default_factory=list)
    """Values that are not finite."""
    negative: list[float] = field(default_factory=list)
    largest: float = 0.0
    stored: int = 0
    """Values that are not zero."""
    whole: int = 0
    """Cells with whole numbers only, of those that express at least ten genes."""
    fractional: int = 0
    """The other cells, whatever they express."""
    totals: list[Float[np.ndarray, "_"]] = field(default_factory=list)
    """Sum of each cell once ``log1p`` is undone; means nothing for counts."""

    def see(self, block: sp.csr_matrix) -> None:
        """Take a block of cells into account."""
        values = block.data
        finite = np.isfinite(values)
        self.nonfinite += values[~finite].tolist()
        self.negative += values[values < 0].tolist()
        self.largest = max(self.largest, float(values.max(initial=0, where=finite)))
        self.stored += int(np.count_nonzero(values))
        whole, fractional = kinds(block)
        self.fractional += int(fractional.sum())
        self.whole += int(whole.sum())
        self.totals.append(_row_sums(block, np.expm1(np.clip(values, 0, LARGEST_LOG1P))))


def kinds(block: sp.csr_matrix) -> tuple[Bool[np.ndarray, "cells"], Bool[np.ndarray, "cells"]]:
    """Tell cells of whole numbers only, of those that express at least ten genes, and cells of fractions."""
    fractional = _row_sums(block, np.isfinite(block.data) & (block.data != np.rint(block.data))) > 0
    return ~fractional & (np.diff(block.indptr) >= EXPRESSED), fractional


def survey(matrix: Matrix) -> Survey:
    """Look at all values once, a few cells at a time."""
    found = Survey()
    for block in blocks(matrix):
        found.see(block)
    return found


def scale(found: Survey, declared: Units | None = None, *, options: str = "--") -> Scale:
    """Judge the units of values by what all of them look like.

    Parameters
    ----------
    found
        Of all cells.
    declared
        What the user says; a contradiction is an error.
    options
        What the options that mend it begin with, such as ``--pred-``.

    Raises
    ------
    UserError
        For negative or non-finite values, for values that are neither counts nor ``log1p`` or some
        of each, and for values that contradict what was declared.
    """
    for what, values in (
        ("Values that are not finite", found.nonfinite),
        ("Negative values", found.negative),
    ):
        if values:
            raise UserError(
                what,
                offenders=values,
                expected="counts, or log1p of normalized counts",
                mend=f"choose the layer that holds them with {options}layer",
            )
    if found.largest == 0:
        raise UserError("All values are zero", expected="expression", mend=f"choose another {options}layer")
    if found.fractional and found.whole:
        raise UserError(
            f"Some cells hold counts ({found.whole}) and others fractions ({found.fractional})",
            expected="one scale for all cells",
            mend=f"bring all cells to one scale, or choose another {options}layer",
        )
    small = found.largest < LARGEST_LOG1P
    units: Units | None = "log1p" if found.fractional and small else None if found.fractional else "counts"
    if units is None or declared not in (None, units):
        raise _contradiction(units, declared, found.largest, options)
    return Scale(units=units, total=_common(found.totals) if units == "log1p" else None)


def _row_sums(block: sp.csr_matrix, values: np.ndarray) -> Float[np.ndarray, "cells"]:
    part = sp.csr_matrix((values, block.indices, block.indptr), block.shape)
    return np.asarray(part.sum(axis=1, dtype=np.float64)).ravel()


def _common(totals: Sequence[Float[np.ndarray, "_"]]) -> float | None:
    """Find the total that nearly all cells share; there is none where genes were removed afterwards."""
    sums = np.concatenate(totals)
    middle = float(np.median(sums))
    shared = np.abs(sums - middle) <= 0.01 * middle
    return float(f"{middle:.4g}") if shared.mean() > 0.99 else None


def _contradiction(found: Units | None, declared: Units | None, largest: float, options: str) -> UserError:
    what = {
        "counts": "whole numbers, so counts",
        "log1p": "fractions, as log1p of normalized counts is",
        None: "neither counts nor log1p",
    }[found]
    return UserError(
        f"The values are {what} (largest {largest:g})",
        expected=declared or f"whole numbers (counts), or values below {LARGEST_LOG1P:g} (log1p)",
        mend=f"choose another {options}layer, or declare {options}units {found}"
        if found
        else f"choose another {options}layer, or take the logarithm: sc.pp.log1p(adata)",
    )
