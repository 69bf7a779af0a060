"""The command that writes predictions as others take them: export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from knockon.commands.common import Command, Flat, Predicted, log, read_screen, say
from knockon.data.conventions import Columns
from knockon.data.h5ad import write_h5ad
from knockon.evaluate import export
from knockon.evaluate.prediction import read


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write predicted cells as the Virtual Cell Challenge takes them."""

    pred: Positional[Annotated[Path, arg(metavar="PRED")]]
    """Predicted cells of one context: .h5ad or .zarr."""
    real: Path
    """The screen in counts, for its panel and its control cells; --layer names its counts."""
    out: Path
    """The .h5ad to write."""
    format: Literal["vcc2026"] = "vcc2026"
    """For whom: the challenge of 2026, in raw counts."""
    seed: int = 0
    """Seed of the counts that are drawn for values in log1p."""
    predicted: Annotated[Predicted, Flat] = Predicted()
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Convert, check and write."""
        screen = read_screen(self.real, self.columns)
        found = read(self.pred, screen, self.predicted.reading)
        for note in found.notes:
            log.info(note)
        made = export.vcc2026(found, screen, seed=self.seed)
        write_h5ad(made, self.out)
        targets = made.obs[export.TARGET].nunique() - 1
        say(f"{self.out}: {made.n_obs:,} cells of {targets} targets and control x {made.n_vars:,} genes")
