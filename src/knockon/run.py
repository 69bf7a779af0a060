"""A run folder: a trained model with everything that is needed to use it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anndata
import numpy as np
import pandas as pd
import torch

from knockon import devices
from knockon.data import conventions, prepare, splits
from knockon.data.manifest import is_store
from knockon.data.screen import Screen, read
from knockon.data.splits import Part, Split
from knockon.embed import annotated, refuse_without_embedding
from knockon.files import digest
from knockon.generate import Given, generate
from knockon.model import Model, changed, device_of, fill
from knockon.predict import generate as predict
from knockon.record import RECORD, SPLIT, Record, stored, versions
from knockon.types import Label, UserError

Kind = TypeVar("Kind", bound="Trained")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained model in its folder, without the screen that it was trained on.

    It is enough to embed cells of any screen, and to generate cells without control cells.

    Parameters
    ----------
    folder
        Where it lies.
    model
        Fitted, on its device.
    record
        How it came about.
    changes
        Fields of its configuration that have other values than in the record, and these values.
    """

    folder: Path
    model: Model
    record: Record
    changes: Mapping[str, object] = field(default_factory=dict)

    def change(self: Kind, changes: Mapping[str, object]) -> Kind:
        """Give fields of the model's configuration that only concern generation other values.

        Parameters
        ----------
        changes
            Values by the names of fields, or texts of values: ``{"steps": 50, "solver": "rk4"}``.

        Returns
        -------
        Run
            Another one, with the same weights; predictions note what was changed.

        Raises
        ------
        UserError
            If a field is unknown or concerns training, or a value does not fit.
        """
        whole = {**self.changes, **changes}
        if not whole:
            return self
        config = changed(self.record.config, whole)
        with torch.random.fork_rng(devices=[]):
            model = config.build(self.model.spec)
        fill(model, self.model.state_dict())
        found = {name: getattr(config, name) for name in whole}
        return dataclasses.replace(self, model=model.to(device_of(self.model)).eval(), changes=found)

    def weigh(self: Kind, weights: Mapping[str, float]) -> Kind:
        """Set the weights of guidance by the names of classes; 1, the plain condition, where none is named.

        Raises
        ------
        UserError
            If the model has no such weights, or a class is unknown.
        """
        if not weights:
            return self
        if "weights" not in self.record.config.at_generation:
            raise UserError(
                f"{self.record.model} has no weights of classes", expected="scldm", mend="leave them out"
            )
        classes = self.model.spec.classes
        unknown = [name for name in weights if name not in classes]
        if unknown:
            raise UserError(
                "Weights of unknown classes", offenders=unknown, expected="some of " + ", ".join(classes)
            )
        return self.change({"weights": tuple(float(weights.get(name, 1.0)) for name in classes)})

    def generate(
        self,
        conditions: Mapping[str, str] | None = None,
        *,
        cells: int = 256,
        seed: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> anndata.AnnData:
        """Generate cells without control cells, under any part of a condition.

        Parameters
        ----------
        conditions
            Such as ``{"perturbation": "A+B", "cell_type": "CD4"}``; what is not named is anything.
        cells
            How many.
        seed
            Seed of the noise.
        advance
            Called after each chunk of cells, for a progress bar.

        Returns
        -------
        AnnData
            See ``knockon.generate.generate``; ``uns["knockon"]`` tells where it is from.
        """
        given = Given.of(conditions or {}, self.model.spec)
        made = generate(self.model, given, cells=cells, seed=seed, advance=advance)
        return self._sign(made, {"cells": cells, "seed": seed, "given": given.texts(self.model.spec)})

    def embed(
        self,
        screen: Screen,
        *,
        obs: pd.DataFrame | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> anndata.AnnData:
        """Embed the cells of a screen, prepared or not, whose genes include those of the model.

        Parameters
        ----------
        screen
            It need not be the one that the model was trained on.
        obs
            What is known of its cells, in its order; what was done to them, without it.
        advance
            Called after each chunk of cells, for a progress bar.

        Returns
        -------
        AnnData
            See ``knockon.embed.annotated``; ``uns["knockon"]`` tells where it is from.
        """
        refuse_without_embedding(self.model)
        embedded = annotated(self.model, self.prepared(screen), obs, advance=advance)
        return self._sign(embedded, {"embedded": screen.digest})

    def prepared(self, screen: Screen) -> Screen:
        """Bring any screen into the units and to the genes of the model.

        Raises
        ------
        UserError
            If it lacks a gene, or cannot be brought to the units.
        """
        genes = self.model.spec.genes
        chosen = None if screen.genes == genes else genes
        return prepare.apply(screen, dataclasses.replace(self.record.preparation, genes=chosen))

    def _sign(self, adata: anndata.AnnData, about: Mapping[str, object]) -> anndata.AnnData:
        """Note in cells where they are from, and on which scale they are."""
        spec = self.model.spec
        adata.uns["knockon"] = {
            "model": self.record.model,
            "run": digest(self.folder / RECORD),
            "screen": self.record.screen,
            "changed": " ".join(f"{name}={_text(value)}" for name, value in self.changes.items()),
            "panel": self.record.preparation.genes is not None,
            "share": self.record.preparation.share,
            "units": spec.units,
            "total": -1.0 if spec.total is None else spec.total,
            "versions": versions(),
            **about,
        }
        if spec.units == "log1p":
            adata.uns["log1p"] = {"base": float(np.e)}
        return adata


@dataclass(frozen=True, kw_only=True, eq=False)
class Run(Trained):
    """A trained model in its folder, with the screen that it was trained on.

    Parameters
    ----------
    folder, model, record, changes
        See ``Trained``.
    split
        What was held out.
    screen
        The prepared screen, whose control cells predictions start from.
    """

    split: Split
    screen: Screen

    @classmethod
    def load(
        cls, folder: str | Path, *, screen: Screen | str | Path | None = None, device: str = "cpu"
    ) -> "Run":
        """Load a run folder, also a stranger's: none of its content is executed.

        Parameters
        ----------
        screen
            The screen that the run was trained on, unprepared, or its file; by default it is read again
            from where it was.
        device
            ``cpu``, ``cuda`` or ``auto``.

        Raises
        ------
        UserError
            If the folder is unfinished or was edited, or the screen is another one.
        """
        folder = Path(folder)
        record, model = stored(folder)
        if not isinstance(screen, Screen):
            screen = _read_screen(record, folder, screen)
        if screen.digest != record.screen:
            raise UserError(
                f"The run in {folder} was trained on another screen",
                expected=f"digest {record.screen[:8]}, found {screen.digest[:8]}",
                mend="give the screen that it was trained on with --data",
            )
        return cls(
            folder=folder,
            model=model.to(devices.resolve(device)).eval(),
            record=record,
            split=splits.read(folder / SPLIT, screen),
            screen=prepare.apply(screen, record.preparation),
        )

    def predict(
        self,
        conditions: Sequence[str | Label] | Part = "test",
        *,
        cells: int = 256,
        seed: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> anndata.AnnData:
        """Generate cells of conditions that are named, or of a part of the split.

        Parameters
        ----------
        conditions
            Such as ``"A+B"`` (in every context, where there are covariates) or a ``Label``.
        cells
            Cells of each condition.
        seed
            Seed of the control cells and the noise.
        advance
            Called after each condition, for a progress bar.

        Returns
        -------
        AnnData
            See ``generate``; ``uns["knockon"]`` tells where it is from.
        """
        labels = self.resolve(conditions)
        predicted = predict(self.model, self.screen, labels, cells=cells, seed=seed, advance=advance)
        held = {"split": self.split.kind, "split_digest": self.record.files[SPLIT]}
        return self._sign(predicted, {"cells": cells, "seed": seed, **held})

    def resolve(self, conditions: Sequence[str | Label] | Part) -> list[Label]:
        """Conditions as labels; a perturbation without context is meant in every context."""
        if isinstance(conditions, str):
            return list(getattr(self.split, conditions))
        found: list[Label] = []
        for condition in conditions:
            label = condition if isinstance(condition, Label) else self._parse(condition)
            if label.covariates or not self.screen.covariates:
                found.append(label)
            else:
                contexts = [control.covariates for control in self.screen.controls]
                found += [Label(label.perturbations, label.doses, context) for context in contexts]
        return found

    def _parse(self, text: str) -> Label:
        return conventions.parse(text, known=self.model.spec.perturbations)


def trained(folder: str | Path, *, device: str = "cpu") -> Trained:
    """Load a run folder without its screen; see ``Run.load``."""
    folder = Path(folder)
    record, model = stored(folder)
    return Trained(folder=folder, model=model.to(devices.resolve(device)).eval(), record=record)


def _text(value: object) -> str:
    """Write a value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read_screen(record: Record, folder: Path, told: str | Path | None) -> Screen:
    path = Path(told or record.source)
    if told is None and not (record.source and path.exists()):
        raise UserError(
            f"The screen of the run in {folder} is not where it was ({record.source or 'made in memory'})",
            mend="say where it is with --data, or in Python with screen=",
        )
    columns = record.columns
    if is_store(path):  # it was told once how its files are read
        columns = conventions.Columns(layer=columns.layer, units=columns.units)
    return read(path, columns)
