"""How much memory there is, and how amounts of it are written."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

from knockon import cluster, devices
from knockon.types import UserError

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kKMGT]?i?)B?")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit and use of a control group, and page cache in ``memory.stat``: of version 2, and of version 1."""


def bytes_of(text: str, *, option: str = "--memory") -> int:
    """Read an amount such as ``2GB`` (thousands) or ``512MiB`` (1024s); a number alone is bytes.

    Raises
    ------
    UserError
        If it is none.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"] == "i":
        raise UserError(
            f"{option} is {text!r}", expected="an amount of memory", mend=f"write it as in {option} 2GB"
        )
    unit = match["unit"].upper()
    return int(float(match["number"]) * (1024 if unit.endswith("I") else 1000) ** _POWERS[unit.rstrip("I")])


def written(amount: float) -> str:
    """Write bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:  # else three digits would round to 1000
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.0f} TB" if amount >= 999.5 else f"{amount:.3g} TB"


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process could still have: the least of what the machine and its control groups leave.

    Page cache counts as free, for the system gives it up when memory is asked for; see ``memory.stat`` in
    the kernel's documentation of both versions of control groups.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` lie.
    """
    return max(0, min(psutil.virtual_memory().available, *_left(root)))


def own_memory() -> int:
    """Return the share of ``free_memory`` that is this process's, beside others of ``torchrun`` or dask."""
    return min(free_memory() // devices.neighbors(), cluster.limit())


def _left(root: Path) -> Iterator[int]:
    """Yield what the control group of this process leaves, and each of those that it is part of."""
    yield sys.maxsize
    told = root / "proc" / "self" / "cgroup"
    for line in told.read_text().splitlines() if told.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, used, cache = FILES[bool(controllers)]
        within = PurePosixPath(path.lstrip("/"))
        for folder in (base / part for part in (within, *within.parents)):
            with suppress(OSError, ValueError):  # no such folder from inside a container, or no limit
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                numbers = [int((folder / name).read_text()) for name in (limit, used)]
                yield numbers[0] - numbers[1] + int(stat.get(cache, 0))
