"""What the commands share: how they are made, what they read, and how they print."""

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from knockon import devices
from knockon.data.conventions import Columns
from knockon.data.screen import Screen, read
from knockon.evaluate.prediction import Reading
from knockon.types import Units, UserError

log = logging.getLogger("knockon")
Data = Positional[Annotated[Path, arg(metavar="DATA")]]
Folder = Positional[Annotated[Path, arg(metavar="FOLDER")]]
Flat = arg(name="")  # the fields of a group become options of the command, without a prefix


class Command(ABC):
    """What every command is."""

    @property
    def patience(self) -> float | None:
        """Minutes that processes under torchrun wait for each other; None where one must work alone."""
        return None

    @abstractmethod
    def run(self) -> None:
        """Do the work."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """How a prediction is to be read: a ``Reading``, apart from the options of the screen beside it."""

    pred_perturbation_key: str | None = None
    """Column of the prediction's obs with what was predicted; recognized without it."""
    pred_layer: str | None = None
    """Layer of the prediction with the values; X without it."""
    pred_units: Units | None = None
    """Scale of the predicted values; what the file declares, or what they look like, without it."""
    pred_total: float | None = None
    """Sum that predicted counts were normalized to before log1p, such as 10000."""

    @property
    def reading(self) -> Reading:
        """The same in the words of ``knockon.evaluate.prediction``."""
        return Reading(
            perturbation_key=self.pred_perturbation_key,
            layer=self.pred_layer,
            units=self.pred_units,
            total=self.pred_total,
        )


def read_screen(path: Path, columns: Columns) -> Screen:
    """Read a screen and say what was recognized."""
    screen = read(path, columns)
    for note in screen.notes:
        log.info(note)
    return screen


def listed(texts: Sequence[str]) -> list[str]:
    """Replace each ``@FILE`` among texts by the lines of that file.

    Raises
    ------
    UserError
        If a file cannot be read or has no line.
    """
    found: list[str] = []
    for text in texts:
        if not text.startswith("@"):
            found.append(text)
            continue
        try:
            lines = [line.strip() for line in Path(text[1:]).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"Cannot read {text[1:]} ({error})", expected="one condition in each line"
            ) from error
        if not any(lines):
            raise UserError(f"{text[1:]} is empty", expected="one condition in each line")
        found += [line for line in lines if line]
    return found


def assignments(texts: Sequence[str], option: str) -> dict[str, str]:
    """Read ``name=value`` texts.

    Parameters
    ----------
    option
        Named in errors, such as ``--weights``.

    Raises
    ------
    UserError
        If a text has another form, or a name comes twice.
    """
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, value) in zip(texts, pairs, strict=True) if not (name and value)]
    if wrong:
        raise UserError(f"{option} without a value", offenders=wrong, expected="name=value")
    names = [name.strip() for name, *_ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{option} names something twice", offenders=twice, expected="each name once")
    return {name: value.strip() for name, (*_, value) in zip(names, pairs, strict=True)}


def show(table: Table) -> None:
    """Print a table, in the first process; into a pipe, as wide as it is."""
    if devices.is_first():
        Console(width=None if sys.stdout.isatty() else 200).print(table)


def say(line: str) -> None:
    """Print a line as it is, in the first process."""
    if devices.is_first():
        Console(highlight=False).print(line, markup=False, soft_wrap=True)
