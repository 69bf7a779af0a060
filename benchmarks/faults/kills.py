"""Kill -9 at random moments, again and again, until a command has finished; then look at what it wrote."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.faults.commands import Command, contents, fresh, is_broken, leftovers
from benchmarks.faults.process import Child, finish

IN_A_ROW = 4
"""Kills at most before a command is left alone to finish."""


@dataclass
class Toll:
    """What came of the kills of one command."""

    command: str
    seconds: float
    kills: int = 0
    finished: int = 0
    """Times that it came to its end, and was compared."""
    asides: int = 0
    """Kills after which a temporary file lay there, of this process or of one that was killed before."""
    different: int = 0
    left: int = 0
    """Temporary files that were still there in the end."""
    broken: int = 0
    """Files that were visible and half-written at the moment of a kill."""


def torment(command: Command, base: Path, work: Path, *, kills: int, random: np.random.Generator) -> Toll:
    """Kill a command so often at moments that are uniform over its duration."""
    out, log = work / "out", work / "log"
    fresh(out)
    toll = Toll(command.name, finish(command.at(base, out), log).seconds)
    wanted = contents(out, command.loose)
    while toll.kills < kills:
        fresh(out)
        for _ in range(min(IN_A_ROW, kills - toll.kills)):
            child = Child.start(command.at(base, out), log)
            ended = child.kill_after(random.uniform(0, toll.seconds))
            if ended is not None:
                break
            toll.kills += 1
            toll.asides += bool(leftovers(out))
            toll.broken += is_broken(out)
        finish(command.at(base, out), log)
        toll.finished += 1
        toll.different += contents(out, command.loose) != wanted
        toll.left += len(leftovers(out))
    return toll
