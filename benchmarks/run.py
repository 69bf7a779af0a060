"""Run the benchmarks and append what they measured to `benchmarks/RESULTS.md`.

    python -m benchmarks.run [--only scdfm memory] [-- options of that benchmark]

Figures are written as measured. None of them is a test.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    counts,
    curves,
    evaluation,
    forecast,
    memory,
    perturbdiff,
    pretraining,
    quality,
    scdfm,
    scldm,
    store,
)
from benchmarks.measure import commit

RESULTS = Path(__file__).parent / "RESULTS.md"
BENCHMARKS: Mapping[str, Callable[[Sequence[str]], str]] = {
    "scdfm": scdfm.main,
    "perturbdiff": perturbdiff.main,
    "scldm": scldm.main,
    "counts": counts.main,
    "evaluation": evaluation.main,
    "memory": memory.main,
    "store": store.main,
    "forecast": forecast.main,
    "curves": curves.main,
    "pretraining": pretraining.main,
    "quality": quality.main,
}


def measure(name: str, arguments: Sequence[str]) -> str:
    """Run one benchmark; say of which commit, when, by which command and beside how much other work."""
    state = f"commit {commit()}, {datetime.now(UTC).date()}, load average {os.getloadavg()[0]:.1f} before"
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *arguments])
    text = BENCHMARKS[name](arguments)
    return f"\n## {name}\n\n`{command}`: {state}.\n\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), default=tuple(BENCHMARKS))
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, passed = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    if passed and len(options.only) != 1:
        parser.error("options after -- belong to one benchmark; name it with --only")
    for name in options.only:
        text = measure(name, passed)
        with RESULTS.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
