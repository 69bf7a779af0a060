"""Ends that are asked for from outside: Ctrl-C, and the signal by which schedulers take a machine back."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Ended(KeyboardInterrupt):
    """Work ended because somebody asked for it.

    Parameters
    ----------
    number
        Of the signal.
    note
        How far it came, and how it goes on.
    """

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(note)
        self.number = number
        self.note = note


class Wish:
    """Whether an end was asked for, and by which signal."""

    number: int = 0

    def take(self, number: int, _: FrameType | None) -> None:
        """Note the first one; who asks again does not want to wait."""
        if self.number:
            raise Ended(number)
        self.number = number


@contextmanager
def wishes() -> Iterator[Wish]:
    """Turn a first Ctrl-C or SIGTERM into a wish, for work that can end well only at certain points."""
    wish = Wish()
    with _handled(wish.take, signal.SIGINT, signal.SIGTERM):
        yield wish


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end work as Ctrl-C does, so that temporary files are removed and something is said."""
    with _handled(_end, signal.SIGTERM):
        yield


def _end(number: int, _: FrameType | None) -> None:
    raise Ended(number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """Handle signals; only the main thread can, and elsewhere they are left as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
