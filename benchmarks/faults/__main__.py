"""Disturb knockon in every way that is known to happen, and look whether anything is lost.

    python -m benchmarks.faults [--kills 100] [--only kills disk ...] [--write]

Every command runs once undisturbed. Then it is killed (-9, the whole process group) at random moments until
it has finished; or its disk is full, its memory is exhausted, a bit of its input is flipped. What it writes
in the end must be what the undisturbed run wrote, or it must have ended with one message that names the file.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from benchmarks.faults import commands, single
from benchmarks.faults.kills import Toll, torment
from benchmarks.measure import commit, machine

RESULTS = Path(__file__).parents[1] / "RESULTS.md"


def kills(base: Path, work: Path, options: argparse.Namespace) -> str:
    """Kills over all commands, each so often."""
    random = np.random.default_rng(options.seed)
    chosen = [one for one in commands.COMMANDS if not options.commands or one.name in options.commands]
    shares = np.diff(np.linspace(0, options.kills, len(chosen) + 1).round().astype(int))
    tolls = []
    for command, share in zip(chosen, shares, strict=True):
        tolls.append(torment(command, base, work, kills=int(share), random=random))
        print(tolls[-1], flush=True)
    return render(tolls)


COUNTS = {
    "kills": "kills",
    "asides": "after which a temporary file lay there",
    "finished": "times finished",
    "different": "different from undisturbed",
    "broken": "half-written files",
    "left": "temporary files in the end",
}


def render(tolls: list[Toll]) -> str:
    """Kills as a table."""
    lines = [
        "| command | seconds undisturbed | " + " | ".join(COUNTS.values()) + " |",
        "| --- |" + " ---: |" * 7,
    ]
    for toll in tolls:
        values = [str(getattr(toll, name)) for name in COUNTS]
        lines.append(f"| {toll.command} | {toll.seconds:.2f} | " + " | ".join(values) + " |")
    totals = [str(sum(getattr(toll, name) for toll in tolls)) for name in COUNTS]
    return "\n".join([*lines, "| all |  | " + " | ".join(totals) + " |"])


PARTS: Mapping[str, Callable[[Path, Path, argparse.Namespace], str]] = {"kills": kills, **single.PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="over all commands")
    parser.add_argument("--flips", type=int, default=20, help="bits of each file, one after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--commands", nargs="+", help="of those that are killed")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/RESULTS.md")
    options = parser.parse_args()
    told = f"commit {commit()}, {datetime.now(UTC).date()}, load average {os.getloadavg()[0]:.1f} before"
    with tempfile.TemporaryDirectory(prefix="knockon-faults-") as folder:
        base, work = Path(folder) / "base", Path(folder) / "work"
        work.mkdir()
        commands.prepare(base)
        parts = [PARTS[name](base, work, options) for name in options.only]
    command = shlex.join(["python", "-m", "benchmarks.faults", *sys.argv[1:]])
    text = (
        f"\n## faults\n\n`{command}`: {told}.\n\n{machine(torch.device('cpu'))}\n\n"
        + "\n\n".join(parts)
        + "\n"
    )
    print(text)
    if options.write:
        with RESULTS.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
