"""Progress bars for long work, silent where nobody watches."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from knockon import devices


@contextmanager
def bar(
    description: str, *, total: int, start: int = 0, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Show a bar on the terminal while something advances towards ``total``.

    Nothing is shown where ``quiet`` is set or the error stream is not a terminal; of several processes, the
    first one shows it.

    Yields
    ------
    Callable
        ``advance(text="")`` for each step done; the text (such as the loss) stands beside the bar.
    """
    console = Console(stderr=True)
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=quiet or not console.is_terminal or not devices.is_first(),
    )
    with _logging_above(display):
        task = display.add_task(description, total=total, completed=start, text="", rate="")

        def advance(text: str = "") -> None:
            speed = display.tasks[0].finished_speed or display.tasks[0].speed
            rate = f"{speed:.1f}/s" if speed else ""
            display.update(task, advance=1, rate=rate, text=text or display.tasks[0].fields["text"])

        yield advance


@contextmanager
def _logging_above(display: Progress) -> Iterator[None]:
    """Show a bar; what is logged meanwhile appears above it and not in the midst of it."""
    usual = sys.stderr
    with display:
        streaming = [one for one in logging.root.handlers if isinstance(one, logging.StreamHandler)]
        moved = [handler for handler in streaming if handler.stream is usual]
        for handler in moved:
            handler.setStream(sys.stderr)
        try:
            yield
        finally:
            for handler in moved:
                handler.setStream(usual)
