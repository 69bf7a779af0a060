"""The command that ranks candidates for the next experiment."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

from knockon.commands.common import Command, Flat, assignments, listed, read_screen, say, show
from knockon.data.conventions import Columns
from knockon.files import write_text
from knockon.progress import bar
from knockon.ranking import targets
from knockon.ranking.rank import By, rank
from knockon.ranking.source import Draws, OfFile, OfRun, Source
from knockon.run import Run
from knockon.types import UserError


@dataclass(frozen=True, kw_only=True)
class Rank(Command):
    """Rank conditions that nobody has measured by what a model predicts of them."""

    source: Positional[Annotated[Path, arg(metavar="RUN|PRED.h5ad")]]
    """A run folder; or cells that knockon predict wrote, and --data."""
    out: Path
    """The .csv to write."""
    all_pairs: bool = False
    """Rank all pairs of perturbations that the screen has alone and not together; of a file, those in it."""
    perturbations: tuple[str, ...] = ()
    """Candidates instead, such as "A+B" "C+D", or @FILE with one in each line."""
    by: By = "effect"
    """Length of the change; longer or shorter than additive; direction towards --target."""
    target: tuple[Path, ...] = ()
    """Cells (.h5ad), weights of genes (.csv with gene,weight), or lists (.txt) of genes: up, then down."""
    where: tuple[str, ...] = ()
    """Which cells of --target, such as cell_type=CD4."""
    draws: Annotated[Draws, Flat] = Draws()
    top: int = 20
    """Lines to print; all are written."""
    data: Path | None = None
    """The screen: of a file of cells, and of a run where it is not where it was in training."""
    columns: Annotated[Columns, Flat] = Columns()
    device: str = "auto"
    """cpu, cuda or auto."""
    quiet: bool = False
    """Show no progress bar."""

    def run(self) -> None:
        """Rank, print the first and write all."""
        if bool(self.perturbations) == self.all_pairs:
            raise UserError(
                "Nothing or two things to rank",
                expected="either --all-pairs or --perturbations",
                mend='--all-pairs or --perturbations "A+B" "C+D"',
            )
        if self.where and not self.target:
            raise UserError("--where without --target", mend="name the file of the cells with --target")
        target = targets.read(self.target, assignments(self.where, "--where")) if self.target else None
        source = self._source()
        labels = source.candidates() if self.all_pairs else source.resolve(listed(self.perturbations))
        with bar("ranking", total=len(labels), quiet=self.quiet) as advance:
            table = rank(source, labels, by=self.by, target=target, draws=self.draws, advance=advance)
        write_text(self.out, table.to_csv(index=False, float_format="%.5g"))
        show(render(table.head(self.top), self.by))
        say(f"{self.out}: {int(table['rank'].notna().sum())} of {len(table)} candidates ranked by {self.by}")

    def _source(self) -> Source:
        if self.source.suffix != ".h5ad":
            if self.columns != Columns():
                raise UserError("Columns of a run's screen", expected="none: they are as in training")
            return OfRun(Run.load(self.source, screen=self.data, device=self.device))
        if self.data is None:
            raise UserError(
                "A file of cells without its screen",
                expected="the screen of the run that made them",
                mend="say where it is with --data",
            )
        return OfFile(self.source, read_screen(self.data, self.columns))


def render(table: pd.DataFrame, by: By) -> Table:
    """Candidates, the first first, as a terminal shows them."""
    title = {
        "effect": "length of the predicted change",
        "synergy": "predicted change beyond the sum of its parts",
        "buffering": "what the predicted change falls short of the sum of its parts",
        "similarity": "cosine of the predicted change with the way to the target",
    }[by]
    shown = Table(title=f"{title}; 95 % between draws")
    numbers = [name for name in ("effect", "expected", "scale", "residual", "covered") if name in table]
    for name in ("rank", "condition", "score", "low to high", *numbers, "genes", "up", "down", "warning"):
        text = name in ("condition", "up", "down", "warning")
        shown.add_column(name, justify="left" if text else "right", overflow="fold")
    for line in table.to_dict("records"):
        ranked = pd.notna(line["rank"])
        values = (f"{line[name]:.2f}" if ranked and pd.notna(line[name]) else "" for name in numbers)
        shown.add_row(
            str(line["rank"]) if ranked else "",
            escape(str(line["condition"])),
            f"{line['score']:.3f}" if ranked else "",
            f"{line['low']:.3f} to {line['high']:.3f}" if ranked else "",
            *values,
            f"{line['genes_changed']:.0f}" if ranked else "",
            *(escape(str(line[name])) if ranked else "" for name in ("up", "down")),
            escape(line["warning"]),
        )
    return shown
