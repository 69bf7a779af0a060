"""The command that makes a store of files that are larger than memory: prepare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from knockon.commands.common import Command, Flat, log, say
from knockon.data.build import prepare
from knockon.data.conventions import Columns


@dataclass(frozen=True, kw_only=True)
class Prepare(Command):
    """Write one or many files as a store that is trained from without being read into memory."""

    data: Positional[Annotated[tuple[Path, ...], arg(metavar="DATA...")]]
    """Screens, such as the plates of one: .h5ad or .zarr."""
    out: Path
    """Folder to write; the same command continues what was interrupted. scanpy opens it as a .zarr."""
    genes: Literal["same", "shared"] = "same"
    """Refuse files that differ in their genes, or keep the genes that all have."""
    plate_key: str | None = None
    """Name of a covariate to add, which tells the file that each cell is from; none without it."""
    memory: str = "2GB"
    """What values take at most while they are sorted; names and obs come besides."""
    seed: int = 0
    """Seed of the order of cells within a condition."""
    quiet: bool = False
    """Show no progress bar."""
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Prepare, or continue to."""
        screen = prepare(
            self.data, self.out, columns=self.columns, genes=self.genes, plate_key=self.plate_key,
            memory=self.memory, seed=self.seed, quiet=self.quiet,
        )  # fmt: skip
        for note in screen.notes:
            log.info(note)
        counts = f"{screen.num_cells:,} cells x {len(screen.genes):,} genes"
        say(f"{self.out}: {counts}, {len(screen.conditions):,} conditions")
