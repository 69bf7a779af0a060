"""The commands that put cells through a trained model: predict, generate, embed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from tyro.conf import arg

from knockon import devices
from knockon.commands.common import (
    Command,
    Data,
    Flat,
    Folder,
    assignments,
    listed,
    log,
    read_screen,
    say,
    show,
)
from knockon.data.conventions import Columns
from knockon.data.formats import read_obs
from knockon.data.h5ad import write_h5ad
from knockon.data.screen import Screen
from knockon.embed import CHUNK as EMBEDDED_AT_ONCE
from knockon.embed import refuse_without_embedding
from knockon.evaluate import reconstruction
from knockon.files import from_text, write_text
from knockon.predict import CHUNK, all_pairs, unknown
from knockon.progress import bar
from knockon.run import Run, Trained, trained
from knockon.types import Label, UserError
from knockon.uncertainty import FITS, errors

Kind = TypeVar("Kind", bound=Trained)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a trained model does differently in generation."""

    weights: tuple[str, ...] = ()
    """Weights of guidance by class, such as perturbation=1.5 cell_type=2; 1 for the others."""
    assigned: Annotated[tuple[str, ...], arg(name="set")] = ()
    """Options of the model that only concern generation, such as steps=50 solver=rk4."""

    def apply(self, run: Kind) -> Kind:
        """Change a run."""
        assigned = assignments(self.assigned, "--set")
        weights = assignments(self.weights, "--weights")
        if weights and "weights" in assigned:
            raise UserError("--weights and --set weights", expected="one of the two")
        numbers = {name: from_text(float, text, where=f"--weights {name}") for name, text in weights.items()}
        return run.change(assigned).weigh(numbers)


@dataclass(frozen=True, kw_only=True)
class Predict(Command):
    """Generate cells of conditions and write them as .h5ad."""

    folder: Folder
    """A run folder."""
    out: Path
    """The .h5ad to write."""
    perturbations: tuple[str, ...] = ()
    """Such as "A+B" "C"; in every context unless written as "A+B | B cells"; @FILE has one in each line."""
    all_pairs: bool = False
    """All pairs of perturbations that the screen has alone and not together."""
    part: Literal["train", "validation", "test"] | None = None
    """A part of the run's split instead."""
    cells: int = 256
    """Cells of each condition."""
    seed: int = 0
    """Seed of the control cells and the noise."""
    errors: Path | None = None
    """A .csv to write besides: how far off the mean of each gene may be, as standard errors and intervals
    that should hold 95 % of the true means; of ripple, and of models that are pulled to its mean."""
    changes: Annotated[Changes, Flat] = Changes()
    data: Path | None = None
    """The screen, where it is not where it was in training."""
    device: str = "auto"
    """cpu, cuda or auto."""
    timeout: float = 30.0
    """Minutes that processes under torchrun wait for each other before they take one for lost."""
    quiet: bool = False
    """Show no progress bar."""

    @property
    def patience(self) -> float | None:
        """As it was asked for."""
        return self.timeout

    def run(self) -> None:
        """Predict and write."""
        if sum((bool(self.perturbations), self.all_pairs, self.part is not None)) != 1:
            raise UserError(
                "Nothing or two things to predict",
                expected="one of --perturbations, --all-pairs and --part",
                mend='--perturbations "A+B" or --part test',
            )
        run = self.changes.apply(Run.load(self.folder, screen=self.data, device=self.device))
        labels = self._pairs(run) if self.all_pairs else run.resolve(self.part or listed(self.perturbations))
        if self.errors is not None:
            with bar("fitting again", total=FITS, quiet=self.quiet) as advance:
                found = errors(run, labels, seed=self.seed, advance=advance)
            text, path = found.to_csv(index=False), self.errors
            devices.on_first(lambda: write_text(path, text))
            share = found["standard_error"].notna().mean()
            say(f"{self.errors}: {share:.0%} of the means have a standard error")
        with bar("predicting", total=_own(len(labels)), quiet=self.quiet) as advance:
            predicted = run.predict(labels, cells=self.cells, seed=self.seed, advance=advance)
        devices.on_first(lambda: write_h5ad(predicted, self.out))
        made = int((~predicted.obs["control"]).sum())
        say(f"{self.out}: {made:,} predicted cells, and {predicted.n_obs - made:,} control cells")

    def _pairs(self, run: Run) -> list[Label]:
        """Find all pairs that were not measured; those without a basis are left out, and named."""
        pairs = all_pairs(run.model, run.screen)
        left_out = set(unknown(run.model, pairs))
        if left_out and len(left_out) < len(pairs):
            named = ", ".join(map(str, sorted(left_out)[:3])) + (" ..." if len(left_out) > 3 else "")
            told = (len(left_out), len(pairs), named)
            log.warning("Left out, without a basis to predict them: %d of %d (%s)", *told)
            pairs = [pair for pair in pairs if pair not in left_out]
        say(f"{len(pairs)} pairs were not measured")
        return pairs


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Generate cells without control cells, under any part of a condition, and write them as .h5ad."""

    folder: Folder
    """A run folder."""
    out: Path
    """The .h5ad to write."""
    conditions: tuple[str, ...] = ()
    """Such as "perturbation=A+B" "cell_type=B cells"; what is not named is anything."""
    cells: int = 256
    """How many."""
    seed: int = 0
    """Seed of the noise."""
    changes: Annotated[Changes, Flat] = Changes()
    device: str = "auto"
    """cpu, cuda or auto."""
    timeout: float = 30.0
    """Minutes that processes under torchrun wait for each other before they take one for lost."""
    quiet: bool = False
    """Show no progress bar."""

    @property
    def patience(self) -> float | None:
        """As it was asked for."""
        return self.timeout

    def run(self) -> None:
        """Generate and write."""
        given = assignments(self.conditions, "--conditions")
        run = self.changes.apply(trained(self.folder, device=self.device))
        with bar("generating", total=_own(-(-self.cells // CHUNK)), quiet=self.quiet) as advance:
            made = run.generate(given, cells=self.cells, seed=self.seed, advance=advance)
        devices.on_first(lambda: write_h5ad(made, self.out))
        of = ", ".join(f"{name} {value}" for name, value in made.uns["knockon"]["given"].items())
        say(f"{self.out}: {made.n_obs:,} cells of {of}")


@dataclass(frozen=True, kw_only=True)
class Embed(Command):
    """Place the cells of any screen in the latent space of a model, and write them as .h5ad."""

    folder: Folder
    """A run folder."""
    data: Data
    """A screen with the genes of the run: .h5ad, .zarr, or a store of `knockon prepare`."""
    out: Path
    """The .h5ad to write."""
    score: bool = False
    """Score how well the latents tell the cells, beside a floor that knows only their library sizes."""
    trained_on: Path | None = None
    """For the floor, the screen that the run was trained on, where it is not where it was."""
    seed: int = 0
    """Seed of the counts that are drawn for the score."""
    device: str = "auto"
    """cpu, cuda or auto."""
    quiet: bool = False
    """Show no progress bar."""
    columns: Annotated[Columns, Flat] = Columns()

    def run(self) -> None:
        """Embed and write."""
        run = trained(self.folder, device=self.device)
        refuse_without_embedding(run.model)
        screen = read_screen(self.data, self._columns(run))
        left_out = len(set(screen.genes) - set(run.model.spec.genes))
        if left_out:
            log.info("%d genes that the run does not know are left out", left_out)
        scored = self._with_own_screen(run, screen) if self.score else None
        screen, obs = run.prepared(screen), read_obs(self.data)
        with bar("embedding", total=-(-len(obs) // EMBEDDED_AT_ONCE), quiet=self.quiet) as advance:
            embedded = run.embed(screen, obs=obs, advance=advance)
        if scored is not None:
            parts = reconstruction.parts(scored, screen)
            blocks = sum(reconstruction.num_blocks(rows) for rows in parts.values())
            with bar("scoring", total=blocks, quiet=self.quiet) as advance:
                table = reconstruction.score_parts(scored, screen, parts, seed=self.seed, advance=advance)
            embedded.uns["knockon"]["reconstruction"] = table
            show(reconstruction.render(table))
        write_h5ad(embedded, self.out)
        (latents,) = embedded.obsm.values()
        say(f"{self.out}: {embedded.n_obs:,} cells x {latents.shape[1]:,} latents")

    def _columns(self, run: Trained) -> Columns:
        """How the data are read: as in training, where they are the very file and nothing else is said."""
        source = run.record.source
        if self.columns != Columns() or not source or self.data.resolve() != Path(source).resolve():
            return self.columns
        log.info("%s is read as in training", self.data)
        return run.record.columns

    def _with_own_screen(self, run: Trained, screen: Screen) -> Run:
        """Find the run's training cells, which the floor is fitted to."""
        if screen.digest == run.record.screen and self.trained_on is None:
            return Run.load(self.folder, screen=screen, device=self.device)
        own = self.trained_on or Path(run.record.source)
        if not (self.trained_on or run.record.source) or not own.exists():
            raise UserError(
                "The screen that the run was trained on is not where it was, and --score needs its floor",
                offenders=[run.record.source or "made in memory"],
                mend="say where it is with --trained-on, or leave out --score",
            )
        return Run.load(self.folder, screen=own, device=self.device)


def _own(number: int) -> int:
    """How many of so many things the first process does."""
    return -(-number // devices.processes())
