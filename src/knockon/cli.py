"""The commands. Each is a dataclass whose fields are its options, and whose ``run`` does the work."""

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from knockon import devices, limits, models
from knockon.commands.common import Command, Data, Flat, Folder, Predicted, read_screen, say, show
from knockon.commands.compare import Compare
from knockon.commands.export import Export
from knockon.commands.generation import Embed, Generate, Predict
from knockon.commands.prepare import Prepare
from knockon.commands.rank import Rank
from knockon.data import arrays, inspect, simulate, splits
from knockon.data.conventions import Columns
from knockon.data.h5ad import write_h5ad
from knockon.evaluate import flags, scores, suites, tables
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.prediction import read
from knockon.evaluate.report import page
from knockon.forecast import forecast
from knockon.interrupt import Ended, ended_by_sigterm
from knockon.model import ModelConfig, Recipe, Training
from knockon.train import Options, train
from knockon.types import UserError

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Say what is in a file, what is wrong with it, and how to mend it."""

    data: Data
    """A screen: .h5ad, .zarr, or a store of `knockon prepare`."""
    verify: bool = False
    """Read every file of a store and name those that are not as they were written, instead."""
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Print the report; exit status 2 where a fault keeps the file from being used."""
        if self.verify:
            report = inspect.verify(self.data, quiet=False)
        else:
            report = inspect.inspect(self.data, self.columns)
        for line in report.lines():
            say(line)
        if report.faults:
            sys.exit(2)


@dataclass(frozen=True, kw_only=True)
class Simulate(Command):
    """Write a simulated screen whose true responses are known."""

    out: Positional[Annotated[Path, arg(metavar="OUT.h5ad")]]
    """The .h5ad to write."""
    preset: Literal["tiny", "demo", "norman", "contexts", "interaction"] = "demo"
    """Size and kind of the screen."""
    seed: int = 0
    """Seed of the network, the design and the cells."""
    cells: int | None = None
    """Cells in all; the preset's without it."""
    genes: int | None = None
    """Genes of the panel."""
    singles: int | None = None
    """Single perturbations."""
    doubles: int | None = None
    """Pairs of them."""

    def run(self) -> None:
        """Simulate and write."""
        asked = {name: getattr(self, name) for name in ("cells", "genes", "singles", "doubles")}
        told = {name: value for name, value in asked.items() if value is not None}
        config = dataclasses.replace(getattr(simulate, self.preset)(), seed=self.seed, **told)
        adata = simulate.simulate(config)
        write_h5ad(adata, self.out)
        say(f"{self.out}: {adata.n_obs:,} cells x {adata.n_vars:,} genes")


@dataclass(frozen=True, kw_only=True)
class Split(Command):
    """Decide which conditions are held out, and write it down."""

    data: Data
    """A screen: .h5ad, .zarr, or a store of `knockon prepare`."""
    kind: splits.Kind = "additive"
    """Doubles of measured singles; the first 15 of them with their singles; genes; contexts; any; nothing."""
    out: Path
    """The .json to write."""
    seed: int = 42
    """Seed of the choice."""
    fraction: float | None = None
    """Share of doubles, genes or conditions that is held out; .3, or .1 of the genes, or all of a context."""
    holdout: tuple[str, ...] = ()
    """The perturbations (unseen) or contexts (context) to hold out; drawn by the seed without it."""
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Split, look for leaks, and write."""
        screen = read_screen(self.data, self.columns)
        split = splits.make(self.kind, screen, seed=self.seed, fraction=self.fraction, holdout=self.holdout)
        for leak in splits.audit(split, screen):
            log.warning("Leak: %s", leak)
        split.write(self.out)
        counts = ", ".join(f"{len(getattr(split, part))} {part}" for part in ("train", "validation", "test"))
        say(f"{self.out}: {counts} conditions")


RECOMMENDED = "ripple"
"""The model that is trained where none is named."""


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train one model."""

    name: Positional[Annotated[str, arg(metavar="MODEL")]]
    """The model, `ripple` without one; `knockon train` alone lists them."""
    data: Path
    """A screen: .h5ad, .zarr, or a store of `knockon prepare`."""
    out: Path
    """The run folder to write, or to continue."""
    split: str = "additive"
    """A kind of split, or a .json of `knockon split`, or one written by hand."""
    preset: str = "default"
    """Where the options of model and training start from."""
    model: ModelConfig
    """What the model is; its preset without options."""
    train: Training
    """How it is trained; its preset without options."""
    start: Annotated[Path | None, arg(name="from")] = None
    """Run folder whose weights training begins with, of the same model; what has another name is new."""
    options: Annotated[Options, Flat] = Options(quiet=False)
    columns: Annotated[Columns, Flat] = Columns()
    dry_run: bool = False
    """Train a few steps in a temporary folder, and say what memory, time and disk all of it would take."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Train":
        """Read the options, which depend on the model and the preset that are named among them."""
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("name", nargs="?")
        first.add_argument("--preset", default="default")
        if not arguments:
            raise UserError(
                "Nothing to train",
                expected="one of " + ", ".join(models.names()),
                mend=f"name it first, or begin with --data for {RECOMMENDED}",
            )
        if arguments[0].startswith("-"):
            arguments = [RECOMMENDED, *arguments]
        known, _ = first.parse_known_args([*arguments[:1], *_option(arguments, "--preset")])
        recipe = models.recipe(known.name, known.preset)
        defaults = [
            (name, type(value), dataclasses.field(default=value))
            for name, value in (("model", recipe.model), ("train", recipe.train))
        ]
        kind = dataclasses.make_dataclass("Train", defaults, bases=(cls,), frozen=True, kw_only=True)
        kind.__doc__ = f"Train {known.name}, from its preset {known.preset}."
        return tyro.cli(kind, args=arguments, prog="knockon train")

    @property
    def patience(self) -> float | None:
        """As it was asked for; what a run would take is measured in one process."""
        return None if self.dry_run else self.options.timeout

    def run(self) -> None:
        """Train, or say what that would take."""
        began = time.monotonic()
        screen = read_screen(self.data, self.columns)
        split = splits.make(self.split, screen)
        recipe = Recipe(model=self.model, train=self.train)
        if self.dry_run:
            found = forecast(
                recipe, screen, split, out=self.out, options=self.options, start=self.start, began=began
            )
            for line in found.lines():
                say(line)
            for line in found.lacking:
                log.warning(line)
            return
        run = train(recipe, screen, split, out=self.out, options=self.options, start=self.start)
        say(f"{self.out}: {self.name} after {run.record.steps} steps in {run.record.seconds:.0f} s")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Score predicted cells against real ones, between a floor and a ceiling."""

    pred: Path
    """Predicted cells, whoever made them: .h5ad or .zarr."""
    real: Path
    """The screen: .h5ad, .zarr, or a store of `knockon prepare`."""
    split: str | None = None
    """A kind of split, or a .json; its test conditions are scored. Without it, all predicted ones are."""
    out: Path | None = None
    """Folder for the tables; without it, means are only printed."""
    suite: tuple[suites.Name, ...] = ("core",)
    """Which metrics, by which conventions; several may be named."""
    seed: int = 0
    """Seed of the halves of the ceiling and of the baselines' cells."""
    cluster: str | None = None
    """Dask cluster that computes statistics of a store, such as tcp://10.0.0.1:8786; threads without it."""
    predicted: Annotated[Predicted, Flat] = Predicted()
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Score, print and write."""
        if self.out and (self.out / "runs").exists():
            raise UserError(
                "The folder holds a comparison, which the scores of one prediction would replace",
                offenders=[self.out],
                mend="choose another --out",
            )
        screen = read_screen(self.real, self.columns)
        found = read(self.pred, screen, self.predicted.reading)
        split = splits.make(self.split, screen) if self.split else found.split(screen)
        with arrays.computing(self.cluster):
            pairs = Pairs.of(found, screen, split)
            verdict = scores.judge(pairs, split, self.suite, seed=self.seed, out=self.out)
        show(tables.render(verdict.write(self.out) if self.out else verdict.summary))
        for line in flags.describe(verdict.flags) if verdict.flags is not None else ():
            say(f"flag {line}")


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write one HTML file about a comparison."""

    folder: Folder
    """Folder of a comparison."""
    out: Path
    """The .html to write."""

    def run(self) -> None:
        """Write."""
        page.write(self.folder, self.out)
        say(f"{self.out}")


COMMANDS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "simulate": Simulate,
    "prepare": Prepare,
    "split": Split,
    "train": Train,
    "predict": Predict,
    "rank": Rank,
    "generate": Generate,
    "embed": Embed,
    "evaluate": Evaluate,
    "compare": Compare,
    "export": Export,
    "report": Report,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake ends in one message and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(logging.INFO)
    try:
        with ended_by_sigterm():
            command = _parsed(arguments)
            with devices.side_by_side(command.patience):
                command.run()
    except UserError as error:
        _refuse(error)
    except KeyboardInterrupt as error:
        number, note = (error.number, error.note) if isinstance(error, Ended) else (signal.SIGINT, "")
        _tell(f"\nknockon: {note or 'stopped'}; the same command continues where it left off")
        sys.exit(128 + number)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except limits.ERRORS as error:
        explained = limits.explained(error, arguments[0])
        if explained is None:
            raise
        _refuse(explained)


def _refuse(error: UserError) -> NoReturn:
    _tell(f"knockon: {error}")
    sys.exit(2)


def _tell(text: str) -> None:
    console = Console(stderr=True, highlight=False)
    devices.tell(lambda: console.print(text, markup=False, soft_wrap=True))


def _parsed(arguments: list[str]) -> Command:
    """Read the arguments; of several processes that cannot, one says so."""
    if devices.asked() == 1:
        return _command(arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return _command(arguments)
    except SystemExit:
        devices.tell(lambda: print(said.getvalue(), file=sys.stderr))
        raise


def _command(arguments: list[str]) -> Command:
    if not arguments or arguments[0] in ("-h", "--help"):
        say("usage: knockon COMMAND [options]        (knockon COMMAND --help)\n")
        for name, kind in COMMANDS.items():
            say(f"  {name:<10} {(kind.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise UserError(f"There is no command {name!r}", expected="one of " + ", ".join(COMMANDS))
    if name == "train":
        return Train.parse(rest)
    return tyro.cli(COMMANDS[name], args=rest, prog=f"knockon {name}")


def _option(arguments: Sequence[str], name: str) -> list[str]:
    """One option with its value, in either spelling, or nothing."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return [argument]
        if argument == name:
            return list(arguments[i : i + 2])
    return []
