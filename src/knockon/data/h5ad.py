"""Cells written as ``.h5ad``, whole or not at all, also on a full disk, with checksums of the values."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import scipy.sparse as sp
from anndata.experimental import write_dispatched

from knockon.files import written_aside
from knockon.types import UserError

CHECKED = {"fletcher32": True}
"""A filter of HDF5 itself: whoever reads a damaged value is told so."""


def write_h5ad(adata: anndata.AnnData, path: Path) -> None:
    """Write cells as ``AnnData.write_h5ad`` does, and checksums of numbers beside them.

    Columns of texts become categories, in place.

    Raises
    ------
    UserError
        If the folder cannot be written to, or the disk is full; nothing is left behind then.
    """
    adata.strings_to_categoricals()
    with written_aside(path) as aside, aside.open("w+b", buffering=0) as file:
        sink = _Sink(file)
        with h5py.File(sink, "w") as store:
            write_dispatched(store, "/", adata, _checked)
        if sink.failure is not None:
            raise sink.failure


def read_h5ad(path: Path) -> anndata.AnnData:
    """Read cells that ``write_h5ad`` wrote, whole.

    Raises
    ------
    UserError
        If the file is damaged or something else.
    """
    try:
        return anndata.read_h5ad(path)
    except MemoryError:
        raise
    except Exception as error:  # damage shows itself as an error of any kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Cannot read {path} ({reason})",
            expected="cells as they were written",
            mend="remove the file, and give the same command again",
        ) from error


def _checked(
    write_func: Callable[..., None],
    store: Any,
    elem_name: str,
    elem: Any,
    *,
    iospec: object,  # noqa: ARG001 - as anndata calls it
    dataset_kwargs: Mapping[str, Any],
) -> None:
    """Write one element; numbers can have a checksum, texts and single values cannot."""
    array = elem.data if sp.issparse(elem) else elem
    numbers = (
        isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.size > 0 and array.ndim > 0
    )
    if elem is not None:
        write_func(store, elem_name, elem, dataset_kwargs={**dataset_kwargs, **(CHECKED if numbers else {})})


class _Sink:
    """A file that takes everything, and keeps its first failure until it is asked.

    HDF5 cannot close a file that it could not write to: it complains without end, and takes the process down.
    So it is told that all went well; what it reads back of what was lost is zeros.
    """

    def __init__(self, file: io.FileIO) -> None:
        self.file = file
        self.failure: OSError | None = None
        self.seek, self.tell, self.read = file.seek, file.tell, file.read

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while len(left) and self.failure is None:
            try:
                left = left[self.file.write(left) :]
            except OSError as error:
                self.failure = error
        self.file.seek(len(left), io.SEEK_CUR)
        return size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        got = self.file.readinto(view)
        if self.failure is not None:
            view[got:] = bytes(len(view) - got)
        return len(view)

    def truncate(self, size: int) -> None:
        try:
            self.file.truncate(size)
        except OSError as error:
            self.failure = self.failure or error

    def flush(self) -> None:
        """Nothing waits: the file has no buffer."""
