"""Which values of a screen find room in memory."""

import logging
from dataclasses import replace

import torch

from knockon.data.chunks import Sheet
from knockon.data.memory import bytes_of, own_memory, written
from knockon.data.screen import Screen
from knockon.data.values import OnDisk

log = logging.getLogger("knockon")


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
    free = own_memory()
    return min(free, torch.cuda.mem_get_info()[0]) if device.startswith("cuda") else free
