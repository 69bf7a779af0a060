"""What will be asked for next, made while something else is done."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
DEPTH = 2
"""Steps that are made in advance."""


class Ahead(Generic[T]):
    """Calls a function of the step for the next steps too, in a thread of its own.

    Parameters
    ----------
    make
        Its value may depend on nothing but the step, so that it does not matter when it is called.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make, self._waiting = make, dict[int, Future[T]]()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __call__(self, step: int) -> T:
        """Give the value of a step, and begin with those that follow it."""
        wanted = range(step, step + 1 + DEPTH)
        for other in set(self._waiting) - set(wanted):
            self._waiting.pop(other).cancel()
        for number in wanted:
            if number not in self._waiting:
                self._waiting[number] = self._pool.submit(self._make, number)
        return self._waiting.pop(step).result()
