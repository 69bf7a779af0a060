"""The files that screens lie in: ``.h5ad`` and ``.zarr``, of which only what is needed is read."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem, sparse_dataset

from knockon.data.values import BLOCK, Matrix, OnDisk, compressed
from knockon.types import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """What a screen needs of a file.

    Parameters
    ----------
    obs
        One row for each cell, with its name as index.
    genes
        Names.
    values
        ``X`` or a layer.
    """

    obs: pd.DataFrame
    genes: tuple[str, ...]
    values: Matrix


def load(path: Path, *, layer: str | None = None, backed: bool = False, option: str = "--layer") -> Stored:
    """Read the tables and one matrix of a file; other layers and embeddings are left alone.

    Parameters
    ----------
    path
        A file ending in ``.h5ad``, or a folder ending in ``.zarr``.
    layer
        Instead of ``X``.
    backed
        Leave the matrix on disk.
    option
        That chooses the layer, to be named in errors.

    Raises
    ------
    UserError
        If the file is missing, damaged or something else, or lacks the layer.
    """
    store = _open(path)
    with _damage_told(path):
        obs, var = _table(store, "obs"), _table(store, "var")
        layers, has_x = list(store["layers"]) if "layers" in store else [], "X" in store
    choose_layer(layer, layers, has_x=has_x, option=option)
    with _damage_told(path):
        element = store["X"] if layer is None else store[f"layers/{layer}"]
        values = _lazy(element, path) if backed else _memory(element)
        shape = cast(tuple[int, int], values.shape)
        if shape != (len(obs), len(var)):
            raise ValueError(f"{shape[0]} x {shape[1]} values for {len(obs)} cells x {len(var)} genes")
    return Stored(obs=obs, genes=tuple(var.index.astype(str)), values=values)


def read_obs(path: Path) -> pd.DataFrame:
    """Read what a file says of its cells, and nothing else.

    Raises
    ------
    UserError
        If the file is missing, damaged or something else.
    """
    store = _open(path)
    with _damage_told(path):
        return _table(store, "obs")


def read_about(path: Path) -> Mapping[str, object]:
    """Read what knockon noted in a file that it wrote; nothing where somebody else wrote it.

    Raises
    ------
    UserError
        If the file is missing, damaged or something else.
    """
    store = _open(path)
    with _damage_told(path):
        noted = store.get("uns/knockon")
        return about(read_elem(noted) if isinstance(noted, h5py.Group | zarr.Group) else None)


def about(noted: object) -> Mapping[str, object]:
    """``uns["knockon"]``, whatever a stranger may have put there."""
    return noted if isinstance(noted, Mapping) else {}


def _table(store: Any, name: str) -> pd.DataFrame:
    found = read_elem(store[name])
    if not isinstance(found, pd.DataFrame):
        raise TypeError(f"{name} is a {type(found).__name__} and no table")
    return found


def choose_layer(layer: str | None, layers: Collection[str], *, has_x: bool, option: str = "--layer") -> None:
    """Refuse a layer that is not there, or ``X`` where it is missing."""
    if layer is not None and layer not in layers:
        raise UserError(
            "Missing layer",
            offenders=[layer],
            expected=f"one of {', '.join(layers) or 'none: the file has only X'}",
            mend=f"{option} NAME, or nothing for X",
        )
    if layer is None and not has_x:
        there = ", ".join(layers) or "none: the file has no values at all"
        raise UserError("The file has no X", expected=f"a layer of {there}", mend=f"{option} NAME")


def _open(path: Path) -> Any:
    if not path.exists():
        raise UserError(
            "No such file", offenders=[path], expected="cells in .h5ad or .zarr", mend="check the path"
        )
    with _damage_told(path):
        if path.is_dir():
            stay_inside(path)
            return zarr.open_group(path, mode="r")
        file = h5py.File(path, "r")
        _refuse_links(file, path)
        return file


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Name the file whatever goes wrong while it is read: damage shows itself as an error of any kind."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def stay_inside(folder: Path) -> None:
    """Refuse links that lead out of a folder: a stranger's store could name any file of this machine.

    Raises
    ------
    UserError
        If there is one.
    """
    root = folder.resolve()
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(where, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):  # also of a ring
                raise _leads_out(folder, path.relative_to(folder))


def _refuse_links(file: h5py.File, path: Path) -> None:
    """Refuse parts of an HDF5 file that lie in other files, for the same reason."""
    seen, groups = set[h5py.Group](), [cast(h5py.Group, file["/"])]
    while groups:
        group = groups.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise _leads_out(path, f"{group.name}/{name}")
            found = group.get(name)
            if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
                raise _leads_out(path, found.name)
            if isinstance(found, h5py.Group) and found not in seen:
                seen.add(found)
                groups.append(found)


def _leads_out(path: Path, part: object) -> UserError:
    return UserError(
        f"{path} leads out of it, to another file",
        offenders=[part],
        expected="all that belongs to it inside",
        mend="ask for the whole file",
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, MemoryError):  # of a large file, or of a damaged one that calls itself large
        return UserError(
            f"Cannot read {path} into memory ({reason})",
            expected="a file that fits into what this machine has left",
            mend="read it where there is more, or look whether the file is damaged",
        )
    return UserError(
        f"Cannot read {path} ({reason})",
        expected="a whole .h5ad or .zarr file, as anndata writes it",
        mend="download or write it again",
    )


def _lazy(element: Any, path: Path) -> OnDisk:
    if isinstance(element, h5py.Dataset | zarr.Array):
        return OnDisk(data=element)
    data = sparse_dataset(element)
    if data.format != "csr":
        raise UserError(
            f"{path} stores genes together, so that a few cells cannot be read from disk",
            expected="a matrix in CSR format for reading with backed",
            mend="leave out backed, or write it again: adata.X = adata.X.tocsr()",
        )
    rows = element["indptr"].shape[0] - 1
    if rows != data.shape[0]:
        raise ValueError(f"its indptr is of {rows} cells and its shape of {data.shape[0]}")
    return OnDisk(data=data)


def _memory(element: Any) -> sp.csr_matrix:
    """Sparse float32; a dense matrix is never whole in memory."""
    kind = (element if hasattr(element, "dtype") else element["data"]).dtype
    if kind.kind not in "biuf":
        raise ValueError(f"values of type {kind} and no numbers")
    if not isinstance(element, h5py.Dataset | zarr.Array):
        matrix: Any = read_elem(element)
        if sp.issparse(matrix):
            matrix.check_format(full_check=True)  # nothing else stands between a damaged index and memory
        return compressed(matrix)
    starts = range(0, element.shape[0], BLOCK)
    parts = [compressed(np.asarray(element[start : start + BLOCK])) for start in starts]
    return (
        compressed(sp.vstack(parts, format="csr"))
        if parts
        else sp.csr_matrix(element.shape, dtype=np.float32)
    )
