"""Arrays of a prepared screen, as zarr lays them out: written whole shards at a time, read chunk by chunk.

A chunk is what is read and checked at least, a shard is a file of many chunks. zarr reads them too, and every
other program that knows its format; here a window of a few cells is read some thirty times faster than there,
which is what training from a disk needs.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import google_crc32c
import numpy as np
import scipy.sparse as sp
import zarr
from jaxtyping import Int, UInt
from numcodecs import Blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from knockon.types import UserError

CHUNK = 2**14
"""Values that are read and checked together."""
SHARD = 2**22
"""Values in a file."""
NAMES = 2**16
"""Names, or values of a column of ``obs``, that are read together."""
_BLOSC = Blosc()
_CHECK = 4
"""Bytes of a checksum."""


def codecs(kind: np.dtype) -> list[BloscCodec | Crc32cCodec]:
    """Name what a chunk goes through when it is written; a checksum comes last."""
    squeeze = BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=max(1, kind.itemsize))
    return [squeeze, Crc32cCodec()]


def create(group: zarr.Group, name: str, *, length: int, kind: str, sizes: "Sizes") -> zarr.Array:
    """Make an array of numbers in a group of zarr, without values yet."""
    found = np.dtype(kind)
    return group.create_array(
        name,
        shape=(length,),
        dtype=found,
        chunks=(sizes.chunk,),
        shards=(sizes.shard,),
        compressors=codecs(found),
        config={"write_empty_chunks": True},  # so that a shard that is not there was not written
    )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How values are parted into files."""

    chunk: int = CHUNK
    """Values that are read and checked together."""
    shard: int = SHARD
    """Values in a file; whole chunks."""

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.shard < 1 or self.shard % self.chunk:
            raise UserError(
                f"Files of {self.shard} values in chunks of {self.chunk}", expected="whole chunks"
            )


def number_kind(values: int) -> str:
    """Choose the kind of row pointers and genes of so many values: one for both, as scipy has it."""
    return "<i4" if values < 2**31 else "<i8"


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """An array of numbers that stays on disk.

    Parameters
    ----------
    folder
        Of the array.
    kind
        Of its numbers.
    length
        Numbers in all.
    sizes
        How they are parted into files.
    """

    folder: Path
    kind: np.dtype
    length: int
    sizes: Sizes

    def read(self, spans: Int[np.ndarray, "spans 2"]) -> np.ndarray:
        """Read what lies in some spans from begin to end, one after another.

        Raises
        ------
        UserError
            If a file is missing or damaged.
        """
        wanted = np.empty(int((spans[:, 1] - spans[:, 0]).sum()), self.kind)
        chunk, held, filled = np.empty(0, self.kind), -1, 0
        for start, stop in spans.tolist():
            place = start
            while place < stop:
                number, inside = divmod(place, self.sizes.chunk)
                if number != held:
                    chunk, held = self._chunk(number), number
                count = min(stop - place, self.sizes.chunk - inside)
                wanted[filled : filled + count] = chunk[inside : inside + count]
                place, filled = place + count, filled + count
        return wanted

    def whole(self) -> np.ndarray:
        """Read everything."""
        return self.read(np.array([[0, self.length]]))

    def fits(self, start: int, stop: int) -> bool:
        """Whether values from one to another are there, and all checksums fit."""
        try:
            self.read(np.array([[start, stop]]))
        except UserError:
            return False
        return True

    def _chunk(self, number: int) -> np.ndarray:
        shard, place = divmod(number, self.sizes.shard // self.sizes.chunk)
        path = self.folder / "c" / str(shard)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        try:
            about = os.fstat(file)
            index = _index(path, self.sizes.shard // self.sizes.chunk, about.st_size, about.st_mtime_ns)
            start, size = index[place].tolist()
            if start + size > about.st_size:
                raise ValueError("a chunk beyond the end of the file")
            content = _checked(os.pread(file, size, start), path)
            values = np.frombuffer(_BLOSC.decode(content), self.kind)
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError, OverflowError) as error:
            raise damaged(path, str(error)) from error
        finally:
            os.close(file)
        if len(values) != self.sizes.chunk:
            raise damaged(path, f"a chunk of {len(values)} values")
        return values


@lru_cache(maxsize=4096)
def _index(path: Path, chunks: int, size: int, changed: int) -> UInt[np.ndarray, "chunks 2"]:  # noqa: ARG001
    """Where the chunks of a shard lie in its file, and how many bytes each has; remembered while it stays."""
    with path.open("rb") as file:
        file.seek(max(0, size - 16 * chunks - _CHECK))
        content = _checked(file.read(), path)
    return np.frombuffer(content, "<u8").reshape(chunks, 2)


def _checked(content: bytes, path: Path) -> bytes:
    """Take off the checksum that stands at the end."""
    body, sum_ = content[:-_CHECK], content[-_CHECK:]
    if google_crc32c.value(body) != int.from_bytes(sum_, "little"):
        raise damaged(path, "its checksum does not fit")
    return body


def damaged(path: Path, reason: str) -> UserError:
    """Name a file of a store that cannot be used."""
    return UserError(
        f"{path} is damaged ({reason})",
        expected="the file that knockon prepare wrote",
        mend="see what else is damaged with: knockon inspect STORE --verify; "
        "then copy it again, or remove it and prepare it again",
    )


class Sheet:
    """Cells x genes on disk, as rows of stored values: what ``OnDisk`` reads rows of.

    Parameters
    ----------
    folder
        Of the matrix: a group with ``data``, ``indices`` and ``indptr``.
    shape
        Cells and genes.
    values
        Stored ones.
    sizes
        How they are parted into files.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, int], values: int, sizes: Sizes) -> None:
        self.shape, self.folder = shape, folder
        self._data = Chunked(folder=folder / "data", kind=np.dtype("<f4"), length=values, sizes=sizes)
        number = np.dtype(number_kind(values))
        self._indices = Chunked(folder=folder / "indices", kind=number, length=values, sizes=sizes)
        pointers = Chunked(folder=folder / "indptr", kind=number, length=shape[0] + 1, sizes=sizes)
        pointers.read(np.array([[shape[0], shape[0] + 1]]))  # before there is room made for all
        self.ends = pointers.whole()
        if self.ends[0] != 0 or self.ends[-1] != values or (np.diff(self.ends) < 0).any():
            raise damaged(pointers.folder, "rows that do not follow each other")

    def __reduce__(self) -> tuple[object, ...]:
        """Travel to another process as the place of the values, and when they were written."""
        folder = self.folder.resolve()
        return _sheet, (folder, self.shape, self._data.length, self._data.sizes, _written(folder))

    def __getitem__(self, rows: slice | Int[np.ndarray, "cells"]) -> sp.csr_matrix:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(self.shape[0]))
        ends = np.concatenate([[0], np.cumsum(self.ends[rows + 1] - self.ends[rows])])
        breaks = np.flatnonzero(np.diff(rows) != 1)  # rows that lie together are one span
        first, last = np.r_[rows[:1], rows[breaks + 1]], np.r_[rows[breaks], rows[-1:]]
        spans = np.stack([self.ends[first], self.ends[last + 1]], axis=1)
        indices = self._indices.read(spans)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.shape[1]:
            raise damaged(self.folder / "indices", "genes that are not there")  # nothing else guards memory
        return sp.csr_matrix((self._data.read(spans), indices, ends), (len(rows), self.shape[1]))

    @property
    def size(self) -> int:
        """Bytes that all values take in memory."""
        return (4 + self.ends.itemsize) * (self._data.length + len(self.ends))


def _sheet(folder: Path, shape: tuple[int, int], values: int, sizes: Sizes, when: int) -> Sheet:
    """Open values in a process that they travel to.

    Raises
    ------
    UserError
        If others lie there by now.
    """
    if _written(folder) != when:
        raise UserError(f"{folder.parent} was prepared anew meanwhile", mend="give the command again")
    return _opened(folder, shape, values, sizes, when)


@lru_cache(maxsize=4)
def _opened(folder: Path, shape: tuple[int, int], values: int, sizes: Sizes, _: int) -> Sheet:
    """Open values once, until they are written anew."""
    return Sheet(folder, shape=shape, values=values, sizes=sizes)


def _written(folder: Path) -> int:
    """When the values of a store were finished, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in (folder / "indptr" / "c").iterdir())


class Names(Sequence[str]):
    """Names of cells that stay on disk until somebody asks for them.

    Parameters
    ----------
    folder
        Of the array.
    length
        Names in all.
    """

    def __init__(self, folder: Path, length: int) -> None:
        self._folder, self._length = folder, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._length, NAMES):
            yield from self[start : start + NAMES]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = self.take(np.arange(self._length)[index].reshape(-1))
        return found if isinstance(index, slice) else found[0]

    def take(self, rows: Int[np.ndarray, "cells"]) -> list[str]:
        """Read the names of some cells, in the order of the rows.

        Raises
        ------
        UserError
            If a file is missing or damaged.
        """
        found = np.empty(len(rows), dtype=object)
        try:
            names = zarr.open_array(self._folder, mode="r")
            for number in np.unique(rows // NAMES):
                some = rows // NAMES == number
                read = np.asarray(names[number * NAMES : (number + 1) * NAMES], dtype=object)
                found[some] = read[rows[some] % NAMES]
        except Exception as error:  # damage shows itself as an error of any kind
            raise damaged(self._folder, str(error)) from error
        return found.tolist()
