"""Run the benchmarks and append what they measured to `benchmarks/RESULTS.md`.

    python -m benchmarks.run [--only scdfm memory] [-- options of that benchmark]

Figures are written as measured. None of them is a test.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import memory, scdfm
from benchmarks.measure import commit

RESULTS = Path(__file__).parent / "RESULTS.md"
BENCHMARKS: Mapping[str, Callable[[Sequence[str]], str]] = {"scdfm": scdfm.main, "memory": memory.main}


def section(name: str, arguments: Sequence[str], text: str) -> str:
    """What was measured, of which commit, when and by which command."""
    command = " ".join(["python -m", f"benchmarks.{name}", *arguments])
    today = datetime.now(UTC).date()
    return f"## {name}, {today}, commit {commit()}\n\n`{command}`\n\n{text}\n"


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
        text = BENCHMARKS[name](passed)
        with RESULTS.open("a") as file:
            file.write("\n" + section(name, passed, text))


if __name__ == "__main__":
    main()
