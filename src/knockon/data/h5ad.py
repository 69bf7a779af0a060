"""Cells written as ``.h5ad``, whole or not at all, also where the disk is full, with checksums of the values."""

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


def _checked(  # noqa: PLR0913 - as anndata calls it
    write: Callable[..., None],
    store: h5py.Group,
    name: str,
    value: Any,
    *,
    dataset_kwargs: Mapping[str, Any],
    iospec: object,
) -> None:
    """Write one element; what has a fixed size can have a checksum."""
    if value is None:
        return
    array = value.data if sp.issparse(value) else value
    fixed = isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.size > 0 and array.ndim > 0
    write(store, name, value, dataset_kwargs={**dataset_kwargs, **(CHECKED if fixed else {})})


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
