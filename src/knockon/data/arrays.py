"""Statistics of many cells, a block at a time: in turn, on threads where they are on disk, or on a cluster.

Blocks are merged in the same order wherever they are computed, so that the numbers are the same to the bit.
A ``dask.distributed.Client`` that is open does the work; without one, threads of this process do.
"""

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import dask.array as da
import dask.config
import numpy as np
import scipy.sparse as sp
import torch
from dask.base import compute
from dask.delayed import delayed
from dask.system import CPU_COUNT
from jaxtyping import Float, Int

from knockon import devices
from knockon.cluster import client
from knockon.data import values as expression
from knockon.data.memory import own_memory
from knockon.data.values import Matrix, OnDisk

SPAN = 8
"""Blocks that are merged where they are read, so that little is sent back and nothing waits for long."""
THREADS = 4
"""Most threads that read where nothing else is asked for: more only wait for each other at the file."""
PASSES = 4
"""Copies of a dense block of float64 that statistics make at most."""
ROOM = "knockon.room"
"""Where dask's configuration says what memory there is for blocks."""

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Rows = Int[np.ndarray, "cells"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Number of cells, and of each gene the mean and the sum of squared distances from it."""

    cells: int
    mean: Float[np.ndarray, "genes"]
    squares: Float[np.ndarray, "genes"]

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both together [chan1983]."""
        cells = self.cells + other.cells
        apart, share = other.mean - self.mean, other.cells / max(1, cells)
        squares = self.squares + other.squares + np.square(apart) * (self.cells * share)
        return Moments(cells=cells, mean=self.mean + apart * share, squares=squares)

    @property
    def std(self) -> Float[np.ndarray, "genes"]:
        """Sample standard deviation; a gene that does not vary has exactly 0, and so has a single cell."""
        found = np.sqrt(self.squares / max(1, self.cells - 1))
        return np.where(found > 1e-12 * np.maximum(1.0, np.abs(self.mean)), found, 0.0)


def computing(cluster: str | None = None, memory: int | None = None) -> AbstractContextManager[object]:
    """Say where statistics of what is on disk are computed in a ``with`` block, and what they may take.

    Parameters
    ----------
    cluster
        Address of the scheduler of a dask cluster, such as ``tcp://10.0.0.1:8786``, whose workers find the
        files of screens by the same paths; None for threads of this process.
    memory
        Bytes for the blocks that threads of this process work on; a quarter of what is free without it.

    Raises
    ------
    UserError
        If no cluster answers, or dask's package for clusters is not installed.
    """
    stack = ExitStack()
    if cluster is not None:
        stack.enter_context(client(cluster, everywhere=True))
    stack.enter_context(dask.config.set({ROOM: memory}))  # holds from here on, so nothing may fail after it
    return stack


def cells(matrix: Matrix, rows: Rows) -> da.Array:
    """Make a dask array of some rows, in sparse blocks that are read when they are computed."""
    genes = cast(tuple[int, int], matrix.shape)[1]
    read = delayed(functools.partial(_read, matrix), pure=False)
    meta = sp.csr_matrix((0, genes), dtype=np.float32)
    parts = [
        da.from_delayed(read(_brief(some)), (len(some), genes), dtype=np.float32, meta=meta)
        for some, _ in _cut(expression.BLOCK, rows, None)
    ]
    return da.concatenate(parts) if parts else da.from_array(meta)


def fold(
    function: Callable[..., T],
    merge: Callable[[T, T], T],
    matrix: Matrix,
    rows: Rows,
    beside: Int[np.ndarray, "cells"] | None = None,
    *,
    result: int = 0,
) -> T:
    """Merge what a function gives of each block of cells, in their order.

    Parameters
    ----------
    function
        Of a block and, where there is such, of what stands beside its cells. A cluster wants it, and all
        that it gives, to be picklable.
    merge
        Of two neighbors in that order; it may change the first of them.
    rows
        Of the cells; in the order of the file they are read fastest.
    beside
        A number for each of them.
    result
        Bytes of what the function gives, where these are many: fewer threads work then.
    """
    spans = _cut(SPAN * expression.BLOCK, rows, beside)
    task = functools.partial(_span, function, merge, matrix)
    if isinstance(matrix, sp.csr_matrix):
        return functools.reduce(merge, itertools.starmap(task, spans))
    return functools.reduce(merge, _computed(delayed(task, pure=False), matrix, spans, result))


def totals(matrix: Matrix, rows: Rows) -> Float[np.ndarray, "cells"]:
    """Sum of each of some rows."""
    return np.concatenate(fold(_totals, operator.iadd, matrix, rows))


def sums(matrix: Matrix, rows: Rows, total: float | None = None) -> Float[np.ndarray, "genes"]:
    """Sum over cells of each gene, once counts are brought to a total and to ``log1p`` where one is given."""
    return fold(functools.partial(_sums, total=total), operator.iadd, matrix, rows)


def moments(matrix: Matrix, groups: Mapping[K, Rows], *, second_log: bool = False) -> dict[K, Moments]:
    """Moments of groups of cells, all of them in one passage through the file.

    Parameters
    ----------
    groups
        Rows of each; none of them in two groups. A group without cells has none.
    second_log
        Take ``log1p`` of the values first, whatever they are.
    """
    if not groups:
        return {}
    rows = np.concatenate(list(groups.values()))
    codes = np.repeat(np.arange(len(groups), dtype=np.int32), [len(some) for some in groups.values()])
    if (rows[1:] < rows[:-1]).any():
        order = np.argsort(rows, kind="stable")
        rows, codes = rows[order], codes[order]
    function = functools.partial(_moments, second_log=second_log)
    found = fold(function, _both, matrix, rows, codes)
    return {key: found[code] for code, key in enumerate(groups) if code in found}


def _totals(block: sp.csr_matrix) -> list[np.ndarray]:
    return [np.asarray(block.sum(axis=1)).ravel()]


def _sums(block: sp.csr_matrix, *, total: float | None) -> Float[np.ndarray, "genes"]:
    values = block if total is None else expression.log1p(block, total)
    return np.bincount(values.indices, values.data, minlength=values.get_shape()[1])


def _moments(block: sp.csr_matrix, codes: np.ndarray, *, second_log: bool) -> dict[int, Moments]:
    """Moments of the groups that a block has cells of, at the cost of its values."""
    values = block.data.astype(np.float64)
    if second_log:
        values = np.log1p(np.maximum(values, 0.0))
    present, own, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    genes = block.get_shape()[1]
    place, length = np.repeat(own * genes, np.diff(block.indptr)) + block.indices, len(present) * genes
    count = np.repeat(sizes, genes)
    mean = np.bincount(place, values, length) / count
    # about the mean, because the mean of squares less the squared mean loses digits
    squares = np.bincount(place, np.square(values - mean[place]), length)
    squares += (count - np.bincount(place, minlength=length)) * np.square(mean)
    found = zip(sizes.tolist(), mean.reshape(-1, genes), squares.reshape(-1, genes), strict=True)
    return {
        int(code): Moments(cells=n, mean=m, squares=s) for code, (n, m, s) in zip(present, found, strict=True)
    }


def _both(first: dict[int, Moments], second: dict[int, Moments]) -> dict[int, Moments]:
    for code, found in second.items():
        first[code] = first[code] + found if code in first else found
    return first


def _cut(length: int, rows: Rows, beside: np.ndarray | None) -> Iterator[tuple[Rows, np.ndarray | None]]:
    for start in range(0, max(1, len(rows)), length):
        part = slice(start, start + length)
        yield rows[part], None if beside is None else beside[part]


def _span(
    function: Callable[..., T],
    merge: Callable[[T, T], T],
    matrix: Matrix,
    rows: Rows,
    beside: np.ndarray | None,
) -> T:
    """Merge the blocks of a span."""
    parts = (
        function(_read(matrix, _brief(some)), *(() if near is None else (near,)))
        for some, near in _cut(expression.BLOCK, rows, beside)
    )
    return functools.reduce(merge, parts)


def _read(matrix: Matrix, rows: slice | Rows) -> sp.csr_matrix:
    return matrix[rows]


def _brief(rows: Rows) -> slice | Rows:
    """Rows without a gap as a slice, which takes no memory in a graph and is read at once."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _computed(
    task: Any, matrix: OnDisk, spans: Iterator[tuple[Rows, np.ndarray | None]], result: int
) -> Iterator[Any]:
    """Compute tasks in their order, as many at a time as there are threads, so that no result waits."""
    with engine(matrix, result):
        while some := list(itertools.islice(spans, _width(matrix, result))):
            yield from compute(*(task(*span) for span in some))


def engine(matrix: Matrix, result: int = 0) -> AbstractContextManager[object]:
    """Let dask compute what is in memory here, and what is on disk on the cluster where there is one."""
    if isinstance(matrix, OnDisk) and _active():
        return nullcontext()
    return dask.config.set(scheduler="threads", num_workers=threads(matrix, result))


def threads(matrix: Matrix, result: int = 0) -> int:
    """Threads of this process that work on blocks at a time: as many as have room for dense ones.

    Each also holds a result and the one that is merged into it, in bytes; and there is one of all so far.
    Other processes of ``torchrun`` on this machine have their shares of its memory and cores.
    """
    asked = dask.config.get("num_workers", None)
    given = dask.config.get(ROOM, None)
    room = own_memory() // 4 if given is None else given
    block = PASSES * 8 * expression.BLOCK * cast(tuple[int, int], matrix.shape)[1]
    return asked or max(
        1, min(THREADS, CPU_COUNT // devices.neighbors(), (room - result) // (block + 2 * result))
    )


@contextmanager
def own_threads() -> Iterator[None]:
    """Keep the number of torch's threads: numba sets it for all that share its OpenMP when it begins."""
    number = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != number:
            torch.set_num_threads(number)


def _width(matrix: Matrix, result: int) -> int:
    """Spans that are computed at a time."""
    client = _active()
    return max(1, sum(client.nthreads().values())) if client else threads(matrix, result)


def _active() -> Any:
    """Find the client that is open; whoever opened one has imported its package.

    A worker's job has none: it would wait for workers that do such jobs themselves.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    with suppress(ValueError):
        distributed.get_worker()
        return None
    with suppress(ValueError):
        return distributed.default_client()
    return None
