"""The command that trains, predicts and scores several models: compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from knockon.commands.common import Command, Flat, read_screen, say, show
from knockon.compare import compare, compare_all, name_of
from knockon.data import splits
from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.evaluate import tables
from knockon.evaluate.report import page
from knockon.jobs import Unfinished
from knockon.train import Options
from knockon.trial import Comparison
from knockon.types import UserError


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Train, predict and score several models, and print one table."""

    data: Path
    """A screen: .h5ad, .zarr, or a store of `knockon prepare`."""
    out: Path
    """Folder of the comparison; running it again does only what is missing."""
    split: tuple[str, ...] = ("additive",)
    """Kinds of split, or .json files; each of several is compared in a folder of its own."""
    seeds: tuple[int, ...] = ()
    """Several in the place of --seed; each is compared in a folder of its own."""
    comparison: Annotated[Comparison, Flat] = Comparison()
    options: Annotated[Options, Flat] = Options(quiet=False)
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Compare, print and report; where some models failed, on the others."""
        if not self.split:
            raise UserError("--split without any", expected="a kind of split or a .json file, or several")
        screen = read_screen(self.data, self.columns)
        held_out = {Path(text).stem: splits.make(text, screen) for text in self.split}
        if len(held_out) < len(self.split):
            raise UserError("Splits of one name", offenders=self.split, mend="name the files differently")
        seeds = tuple(dict.fromkeys(self.seeds)) or (self.comparison.seed,)
        names, compared = [""], self._compare
        if len(held_out) * len(seeds) > 1:
            names = [name_of(name, seed) for name in held_out for seed in seeds]
            compared = self._compare_all
        try:
            compared(screen, held_out, seeds)
        except Unfinished as error:
            for name, summary in error.done.items():
                if name:
                    say(f"{name}:")
                show(tables.render(summary))
                _report(self.out / name)
            raise
        for name in names:
            _report(self.out / name)

    def _compare(self, screen: Screen, held_out: Mapping[str, splits.Split], seeds: Sequence[int]) -> None:
        (split,), (seed,) = held_out.values(), seeds
        how = replace(self.comparison, seed=seed)
        show(tables.render(compare(screen, split, out=self.out, comparison=how, options=self.options)))

    def _compare_all(
        self, screen: Screen, held_out: Mapping[str, splits.Split], seeds: Sequence[int]
    ) -> None:
        found = compare_all(
            screen, held_out, seeds, out=self.out, comparison=self.comparison, options=self.options
        )
        for name, summary in found.items():
            say(f"{name}, means over {len(seeds)} seeds:")
            show(tables.render(summary))


def _report(folder: Path) -> None:
    for draw, path in ((page.write, folder / "report.html"), (page.picture, folder / "scores.png")):
        draw(folder, path)
        say(str(path))
