"""What will be asked for next, made while something else is done."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
DEPTH = 2
"""Steps that are made in advance."""


class Ahead(Generic[T]):
    """Calls a function of the step, and of a number, for the next steps too, in a thread of its own.

    Parameters
    ----------
    make
        Its value may depend on nothing but these two, so that it does not matter when it is called.
    """

    def __init__(self, make: Callable[[int, int], T]) -> None:
        self._make, self._waiting = make, dict[tuple[int, int], Future[T]]()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __call__(self, step: int, number: int = 0) -> T:
        """Give the value of a step, and begin with those that follow it."""
        wanted = [(later, number) for later in range(step, step + 1 + DEPTH)]
        for other in [key for key in self._waiting if key[1] == number and key not in wanted]:
            self._waiting.pop(other).cancel()
        for key in wanted:
            if key not in self._waiting:
                self._waiting[key] = self._pool.submit(self._make, *key)
        return self._waiting.pop(wanted[0]).result()
