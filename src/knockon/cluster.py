"""The way to a dask cluster: the only place that knows its package."""

from typing import Any

from knockon.types import UserError


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
        return Client(address, timeout=10, set_as_default=everywhere)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No dask cluster answers at {address} ({str(error).splitlines()[0]})",
            expected="the address of a dask scheduler, such as tcp://10.0.0.1:8786",
            mend="start one with dask scheduler, and workers with dask worker ADDRESS --nthreads 1",
        ) from error
