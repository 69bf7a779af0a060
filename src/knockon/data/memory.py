"""How much memory there is, and what finds room in it."""

import logging
import re
from dataclasses import replace

import psutil
import torch

from knockon import devices
from knockon.data.chunks import Sheet
from knockon.data.screen import Screen
from knockon.data.values import OnDisk
from knockon.types import UserError

log = logging.getLogger("knockon")
_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kKMGT]?i?)B?")
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


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
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.3g} TB"


def settle(screen: Screen, memory: str | None = None, *, device: str = "cpu") -> Screen:
    """Load the values of a store where there is room for them; a larger one stays on disk.

    What is trained does not depend on it: the same cells are drawn either way.

    Parameters
    ----------
    screen
        Any; one that is no store stays as it is.
    memory
        Room for the values, such as ``4GB``; by default a quarter of what is free now, on the device too.
    device
        Where they would go.
    """
    sheet = screen.matrix.data if isinstance(screen.matrix, OnDisk) else None
    if not isinstance(sheet, Sheet):
        return screen
    room = _free(device) // 4 if memory is None else bytes_of(memory)
    fits = sheet.size <= room
    where = "are loaded" if fits else "stay on disk and are read while the model works"
    log.info("%s of values %s (--memory %s)", written(sheet.size), where, memory or written(room))
    return replace(screen, matrix=screen.matrix[:]) if fits else screen


def _free(device: str) -> int:
    free = psutil.virtual_memory().available // devices.neighbors()
    return min(free, torch.cuda.mem_get_info()[0]) if device.startswith("cuda") else free
