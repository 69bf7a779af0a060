"""The way to a dask cluster: the only place that knows its package."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from knockon.types import UserError

T = TypeVar("T")


def client(address: str, *, everywhere: bool) -> Any:
    """Connect to the scheduler of a dask cluster; the connection is a context that ends with its block.

    Parameters
    ----------
    address
        Such as ``tcp://10.0.0.1:8786``.
    everywhere
        Let the cluster do all work of dask in this process, not only what is given to the connection.

    Raises
    ------
    UserError
        If no cluster answers, or dask's package for clusters is not installed.
    """
    try:
        from distributed import Client  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError(
            "--cluster needs dask's package for clusters",
            expected="the extra cluster",
            mend="pip install 'knockon[cluster]'",
        ) from error
    try:
        if everywhere:  # one that fails to connect would stay the default
            Client(address, timeout=10, set_as_default=False).close()
        return Client(address, timeout=10, set_as_default=everywhere)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No dask cluster answers at {address} ({str(error).splitlines()[0]})",
            expected="the address of a dask scheduler, such as tcp://10.0.0.1:8786",
            mend="start one with dask scheduler, and workers with dask worker ADDRESS --nthreads 1",
        ) from error


def do(address: str, work: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Let the workers of a cluster make calls, each one at a time, and yield what comes of them as it comes.

    Parameters
    ----------
    calls
        Arguments of each.

    Raises
    ------
    UserError
        If the cluster cannot be reached or has workers of several threads.
    """
    with client(address, everywhere=False) as connected:
        if any(threads > 1 for threads in connected.nthreads().values()):
            raise UserError(
                f"Workers of {address} do several jobs in one process",
                expected="workers of one thread, since training draws from a generator of its process",
                mend="start them with dask worker ADDRESS --nthreads 1",
            )
        given = [connected.submit(work, *call, pure=False) for call in calls]
        for ended in sys.modules["distributed"].as_completed(given, loop=connected.loop):
            yield ended.result()


def limit() -> int:
    """Return the bytes that this process may have as a worker of a cluster; elsewhere there is no limit."""
    package = sys.modules.get("distributed")
    if package is None:
        return sys.maxsize
    try:
        return package.get_worker().memory_manager.memory_limit or sys.maxsize
    except ValueError:  # no worker
        return sys.maxsize


def killed() -> tuple[type[Exception], ...]:
    """Name the errors that tell of a killed worker."""
    package = sys.modules.get("distributed")
    return () if package is None else (package.KilledWorker,)
