"""Several files as one screen: genes aligned by name, cells one file after another, values left on disk."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from jaxtyping import Int

from knockon.data.conventions import Columns
from knockon.data.formats import Stored, load
from knockon.data.manifest import Genes, Input
from knockon.data.recognize import Design, read_covariates, recognize
from knockon.data.screen import refuse_duplicates
from knockon.data.values import BLOCK, OnDisk
from knockon.files import digest
from knockon.types import UserError

BYTES = 8
"""Bytes of a stored value in memory: its number and its gene."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Joined:
    """Cells of several files, in their order.

    Parameters
    ----------
    paths
        The files.
    parts
        What they hold; the values are on disk.
    genes
        Names, in the order of the first file.
    obs
        Of all cells, as far as all files have a column.
    columns
        How to read it.
    design
        What was done to each cell.
    notes
        What was done to join them, one line each.
    """

    paths: tuple[Path, ...]
    parts: tuple[Stored, ...]
    genes: tuple[str, ...]
    obs: pd.DataFrame
    columns: Columns
    design: Design
    notes: tuple[str, ...]

    @property
    def values(self) -> int:
        """Stored values of all files, about; of a dense matrix, what its first cells lead to expect."""
        return sum(int(_lengths(part).sum()) for part in self.parts)

    def blocks(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Part the cells of each file into blocks of about so many bytes.

        Yields
        ------
        tuple
            The number of the file, and the rows of it from begin to end.
        """
        for number, part in enumerate(self.parts):
            weight = np.cumsum(_lengths(part) * (BYTES if _is_sparse(part) else 4 * BYTES))
            cuts = np.flatnonzero(np.diff(weight // max(1, most), prepend=0)).tolist()
            ends = sorted({*cuts, len(weight)} - {0})
            yield from ((number, start, stop) for start, stop in pairwise([0, *ends]))

    def read(self, number: int, start: int, stop: int) -> sp.csr_matrix:
        """Values of some cells of a file, with the genes in the common order."""
        part = self.parts[number]
        block = part.values[start:stop]
        block.check_format(full_check=True)  # nothing else stands between a damaged index and memory
        if part.genes == self.genes:
            return block
        place = {gene: i for i, gene in enumerate(part.genes)}
        block = block[:, [place[gene] for gene in self.genes]]
        block.sort_indices()
        return block


def open_inputs(paths: Sequence[Path], columns: Columns, *, genes: Genes, plate_key: str | None) -> Joined:
    """Open files and find what was done to their cells; values stay where they are.

    Raises
    ------
    UserError
        If there is no file, one cannot be read, the files differ in genes or lack a column that is asked
        for, or what was done to the cells is not clear.
    """
    if not paths:
        raise UserError("No files", expected="one or many .h5ad or .zarr", mend="name them: prepare DATA...")
    parts = tuple(load(path, layer=columns.layer, backed=True) for path in paths)
    for part in parts:
        refuse_duplicates(part.genes)
    kept = _genes(paths, parts, genes)
    plates = _plates(paths)
    tables = [part.obs for part in parts]
    if plate_key is not None:
        _refuse_taken(plate_key, paths, tables)
        tables = [table.assign(**{plate_key: plate}) for table, plate in zip(tables, plates, strict=True)]
    obs, notes = _stacked(tables, plates)
    told = columns
    if plate_key is not None:
        found, _ = read_covariates(obs, columns.covariate_keys, [])
        told = replace(columns, covariate_keys=(*(covariate.name for covariate in found), plate_key))
    if len(kept) < max(len(part.genes) for part in parts):
        notes.append(f"{len(kept)} genes that all files have are kept")
    design = recognize(obs, kept, told)
    return Joined(
        paths=tuple(paths), parts=parts, genes=kept, obs=obs, columns=told, design=design, notes=tuple(notes)
    )


def marked(path: Path) -> Input:
    """Name, size and digest of an input; a folder counts as all its files."""
    if not path.is_dir():
        return Input(name=path.name, size=path.stat().st_size, digest=digest(path))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in files]
    size = sum(file.stat().st_size for file in files)
    return Input(name=path.name, size=size, digest=hashlib.sha256("".join(lines).encode()).hexdigest())


def _is_sparse(part: Stored) -> bool:
    return isinstance(part.values, OnDisk) and hasattr(part.values.data, "format")


def _lengths(part: Stored) -> Int[np.ndarray, "cells"]:
    """Count the stored values of each cell."""
    if isinstance(part.values, OnDisk) and _is_sparse(part):
        return np.diff(part.values.data.group["indptr"][:])
    cells = len(part.obs)
    first = min(cells, BLOCK // 16)
    return np.full(cells, max(1, -(-part.values[:first].nnz // max(1, first))))


def _genes(paths: Sequence[Path], parts: Sequence[Stored], wanted: Genes) -> tuple[str, ...]:
    shared = set(parts[0].genes).intersection(*(part.genes for part in parts))
    every = set().union(*(part.genes for part in parts))
    if wanted == "same" and len(shared) < len(every):
        counts = [
            f"{path.name} ({len(part.genes)}, lacks {len(every) - len(part.genes)})"
            for path, part in zip(paths, parts, strict=True)
        ]
        raise UserError(
            f"The files differ in their genes: {len(every)} in all, {len(shared)} in every file",
            offenders=counts,
            expected="the same genes in every file, in any order",
            mend="keep those that all files have with --genes shared",
        )
    kept = tuple(gene for gene in parts[0].genes if gene in shared)
    if not kept:
        raise UserError("The files share no gene", offenders=[path.name for path in paths])
    return kept


def _plates(paths: Sequence[Path]) -> list[str]:
    """Name each file by its stem, numbered where two have the same."""
    stems = [path.stem for path in paths]
    return [
        stem if stems.count(stem) == 1 else f"{stem}.{stems[: i + 1].count(stem)}"
        for i, stem in enumerate(stems)
    ]


def _refuse_taken(key: str, paths: Sequence[Path], tables: Sequence[pd.DataFrame]) -> None:
    taken = [path.name for path, table in zip(paths, tables, strict=True) if key in table.columns]
    if taken:
        raise UserError(
            f"obs has a column {key!r} already",
            offenders=taken,
            expected="a new name for the column with the names of the files",
            mend=f"choose another --plate-key, or use the column with --covariate-keys {key}",
        )


def _stacked(tables: Sequence[pd.DataFrame], plates: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Tables one below the other; of columns, those that all have."""
    if len(tables) == 1:
        return tables[0], []
    names = [str(name) for name in tables[0].columns if all(name in table.columns for table in tables)]
    lost = sorted({str(name) for table in tables for name in table.columns} - set(names))
    notes = [f"columns of obs that not all files have are left out: {', '.join(lost)}"] if lost else []
    columns = {name: _column([cast(pd.Series, table[name]) for table in tables]) for name in names}
    index = [table.index.astype(str) for table in tables]
    cells = pd.Index(np.concatenate([part.to_numpy(dtype=object) for part in index]))
    if not cells.is_unique and all(part.is_unique for part in index):
        cells = pd.Index(
            [f"{name}-{plate}" for part, plate in zip(index, plates, strict=True) for name in part]
        )
        notes.append(f"names of cells occur in several files; -{plates[0]} and so on is appended to them")
    return pd.DataFrame(columns, index=cells), notes


def _column(parts: Sequence[pd.Series]) -> pd.api.extensions.ExtensionArray:
    """One column of several tables; text becomes categories, which take little memory."""
    if len({part.dtype for part in parts}) == 1 and pd.api.types.is_numeric_dtype(parts[0].dtype):
        return pd.concat(parts, ignore_index=True).array
    texts = [part.astype("string").astype("category") for part in parts]
    levels = sorted(set().union(*(part.cat.categories for part in texts)))
    codes = [part.cat.set_categories(levels).cat.codes.to_numpy() for part in texts]
    return pd.Categorical.from_codes(np.concatenate(codes), categories=levels)
