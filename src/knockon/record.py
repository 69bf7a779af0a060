"""The files of a run folder: what a run says of itself, and what its model needs; nothing that executes."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from knockon import models
from knockon.data.conventions import Columns
from knockon.data.prepare import Preparation
from knockon.files import digest, from_plain, read_json, write_json, written_aside
from knockon.model import Model, ModelConfig, Training, load_weights, save_weights
from knockon.types import Spec, UserError

WEIGHTS, VECTORS = "weights.safetensors", "vectors.safetensors"
RECORD, SPEC, SPLIT, LOG = "run.json", "spec.json", "split.json", "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What ``run.json`` says: how a run came about, so that it can be repeated and recognized."""

    model: str
    """Name of the model's file in ``knockon.models``."""
    config: ModelConfig
    train: Training
    source: str
    """The file of the screen; empty for a screen made in memory."""
    columns: Columns
    """How the file was read."""
    screen: str
    """Digest of the screen before preparation."""
    preparation: Preparation
    vectors: str = ""
    """SHA-256 of the table of perturbation vectors; empty without one."""
    begun: str = ""
    """SHA-256 of the record of the run whose weights training began with; empty without one."""
    stage: str = ""
    """SHA-256 of the record of the earlier stage, where a finished one was given."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the other files of the folder; without the weights until training has finished."""
    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    processes: int = 1
    """Processes that trained it side by side."""
    steps: int = 0
    """Steps done when training ended."""
    seconds: float = 0.0
    """Wall time of training with all that comes before its first step, without what was resumed."""

    def write(self, folder: Path) -> None:
        """Write ``run.json``, with a checksum of what it says."""
        plain = dataclasses.asdict(self)
        write_json(folder / RECORD, plain | {"checksum": _checksum(plain)})

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Read ``run.json``; everything in it is checked, nothing is executed."""
        plain = read_json(folder / RECORD)
        where = str(folder / RECORD)
        told = plain.pop("checksum", None)
        if told not in (None, _checksum(plain)):  # records of earlier versions have none
            raise UserError(
                f"{where} was changed after it was written",
                expected="a run folder that nobody edited",
                mend="restore the file, or train again",
            )
        plain.setdefault("processes", 1)  # an earlier version had one only, and no such option
        if isinstance(plain.get("train"), dict):
            plain["train"].setdefault("accumulate", 1)
        config = models.load(str(plain.get("model"))).Config
        hollow = dataclasses.make_dataclass(
            "Hollow", [(f.name, config if f.name == "config" else f.type) for f in dataclasses.fields(cls)]
        )
        filled = from_plain(hollow, plain, where=where)
        return cls(**{f.name: getattr(filled, f.name) for f in dataclasses.fields(cls)})

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return WEIGHTS in self.files

    def asked(self) -> dict[str, object]:
        """Keep what the user asked for and drop what came of it: equal for a run and its resumption.

        How the batches of a step are shared among processes makes no difference; their number does. Nor does
        it where the screen lies: it is known by its digest.
        """
        outcome = {"source", "files", "versions", "device", "processes", "steps", "seconds"}
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in outcome}
        return kept | {
            "train": kept["train"] | {"accumulate": 0},
            "batches": self.processes * self.train.accumulate if self.train.steps else 1,
        }


def _checksum(plain: Mapping[str, object]) -> str:
    """SHA-256 of what a record says, as hexadecimal text."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


EVALUATORS = ("scikit-learn", "cell-eval", "cell-eval2", "pdex", "illico")
"""Packages that scores depend on, most of them of an extra."""


def versions(*more: str) -> dict[str, str]:
    """Versions of what a result depends on, and of more packages where they are installed."""
    packages = ("knockon", "torch", "numpy", "scipy", "anndata", "scanpy", "lightning-fabric")
    found = {"python": sys.version.split()[0], **{name: version(name) for name in packages}}
    for name in more:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_spec(spec: Spec, folder: Path) -> None:
    """Write ``spec.json``, and ``vectors.safetensors`` where perturbations have vectors."""
    plain = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name != "vectors"}
    plain["covariates"] = [dataclasses.asdict(covariate) for covariate in spec.covariates]
    if spec.vectors is not None:
        with written_aside(folder / VECTORS) as aside:
            safetensors.numpy.save_file({"vectors": np.ascontiguousarray(spec.vectors, np.float32)}, aside)
    write_json(folder / SPEC, plain)


def read_spec(folder: Path) -> Spec:
    """Read what ``write_spec`` wrote."""
    plain = read_json(folder / SPEC) | {"vectors": None}
    spec = from_plain(Spec, plain, where=str(folder / SPEC))
    vectors = folder / VECTORS
    if not vectors.exists():
        return spec
    return dataclasses.replace(spec, vectors=safetensors.numpy.load_file(vectors)["vectors"])


def stored(folder: Path) -> tuple[Record, Model]:
    """Read a finished run's record and model, without its screen.

    Raises
    ------
    UserError
        If there is no such folder, or it is unfinished or was edited.
    """
    if not (folder / RECORD).exists():
        raise UserError(
            f"{folder} is no run folder: it has no {RECORD}", expected="one that knockon train wrote"
        )
    record = Record.read(folder)
    if not record.finished:
        raise UserError(f"The run in {folder} has not finished", mend="give the same train command again")
    _refuse_edited(record, folder)
    with torch.random.fork_rng(devices=[]):
        model = record.config.build(read_spec(folder))
    load_weights(model, folder / WEIGHTS)
    return record, model


def save_run(folder: Path, model: Model, record: Record) -> Record:
    """Write the weights and the finished record, in this order."""
    with written_aside(folder / WEIGHTS) as aside:
        save_weights(model, aside)
    record = dataclasses.replace(record, files={name: digest(folder / name) for name in _files(folder)})
    record.write(folder)
    return record


def _refuse_edited(record: Record, folder: Path) -> None:
    """Refuse a folder whose files are not those that its record knows."""
    for name in _files(folder):
        if not (folder / name).is_file() or digest(folder / name) != record.files.get(name):
            raise UserError(
                f"{folder / name} was changed or removed after training",
                expected="a run folder that nobody edited",
                mend="restore the file, or train again",
            )


def _files(folder: Path) -> list[str]:
    """Files that a finished run is made of, besides its record and its log."""
    return [SPEC, SPLIT, WEIGHTS] + [VECTORS] * (folder / VECTORS).exists()
