"""What a training run leaves on the way: a checkpoint to resume from, and a log."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from knockon import devices
from knockon.files import unwritable, write_text, written_aside
from knockon.model import Model, Training
from knockon.types import UserError

CHECKPOINT = Path("checkpoint") / "state.safetensors"
PREVIOUS = "previous.safetensors"
"""The checkpoint before the last, beside it."""

log = logging.getLogger("knockon")


@dataclass(eq=False)
class State:
    """All that changes during training, and so all that resuming needs."""

    model: Model
    average: Model | None
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = math.inf
    score: float = math.inf
    stale: int = 0

    @property
    def predictor(self) -> Model:
        """The model that predictions come from."""
        return self.average or self.model

    def judge(self, score: float) -> None:
        """Note a validation score, the lower the better, and keep the weights if it is the best so far."""
        self.score, self.stale = score, self.stale + 1
        if score < self.best_score:
            self.best_score, self.stale = score, 0
            best = devices.whole(self.predictor.state_dict())
            self.best = {name: tensor.clone() for name, tensor in best.items()}

    def exhausted(self, training: Training) -> bool:
        """Whether validation has not improved for too long."""
        return bool(training.patience) and self.stale >= training.patience

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all; all processes call this, and the first one writes."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        tensors = devices.whole(tensors)
        self.refuse_nonfinite(path.parent.parent)
        devices.on_first(lambda: self._write(path, tensors))

    def refuse_nonfinite(self, folder: Path) -> None:
        """Refuse weights that are no numbers: nothing that follows from them would be one.

        Raises
        ------
        UserError
            If a parameter is not finite.
        """
        models = [self.model] if self.average is None else [self.model, self.average]
        named = [pair for model in models for pair in devices.whole(dict(model.named_parameters())).items()]
        marks = [parameter.isfinite().all() for _, parameter in named]
        if marks and not bool(torch.stack(marks).all()):
            wrong = [name for (name, _), mark in zip(named, marks, strict=True) if not mark]
            told = f"lr {self.optimizer.param_groups[0]['lr']:g}, weights not finite such as {wrong[0]}"
            raise diverged(folder, self.step, told)

    def resume(self, path: Path) -> bool:
        """Continue from a checkpoint, or where it is damaged from the one before.

        Returns
        -------
        bool
            Whether there was one.

        Raises
        ------
        UserError
            If there is one, and none can be read.
        """
        there = [one for one in (path, path.with_name(PREVIOUS)) if one.exists()]
        trouble: UserError | None = None
        for one in there:
            try:
                numbers, parts = _read(one)
            except UserError as error:
                trouble = trouble or error
                continue
            if trouble is not None:
                log.warning("%s Step %d, of %s, is continued from instead.", trouble, numbers["step"], one)
            self._take(numbers, parts)
            return True
        if trouble is not None:
            raise trouble
        return False

    def _take(self, numbers: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
        self.model.load_state_dict(devices.laid(parts["model"], self.model.state_dict()))
        if self.average is not None:
            self.average.load_state_dict(devices.laid(parts["average"], self.average.state_dict()))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        places = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        for index, found in moments.items():
            like = {key: places[index] for key in found}  # noqa: C420 (fromkeys gives away its type)
            moments[index] = devices.laid(found, like)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.best = parts["best"]
        self.step, self.best_score, self.stale = numbers["step"], numbers["best_score"], numbers["stale"]

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        numbers = json.dumps({"step": self.step, "best_score": self.best_score, "stale": self.stale})
        with written_aside(path) as aside:
            metadata = {"numbers": numbers, "sha256": _checksum(tensors, numbers)}
            safetensors.torch.save_file(tensors, aside, metadata=metadata)
            if path.exists():
                path.replace(path.with_name(PREVIOUS))


def diverged(folder: Path, step: int, what: str) -> UserError:
    """Say that training lost itself, where, and from where it could go on."""
    kept = folder / CHECKPOINT
    safe = f"{kept} is from before" if kept.exists() else "there is no checkpoint from before"
    return UserError(
        f"Training diverged by step {step} ({what}); {safe}",
        expected="finite numbers",
        mend="lower --train.lr, bound the gradient with --train.clip, or rise more slowly with"
        " --train.warmup, in another --out",
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read a checkpoint that is as it was written.

    Raises
    ------
    UserError
        If it is not.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "best": {}, "optimizer": {}}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if _checksum(tensors, metadata["numbers"]) != metadata["sha256"]:
            raise ValueError("its checksum is another")
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        return json.loads(metadata["numbers"]), parts
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Cannot read the checkpoint {path} ({error})",
            expected="the file that training wrote",
            mend=f"restore it, or remove {path.parent} to train from the beginning",
        ) from error


def _checksum(tensors: Mapping[str, Tensor], numbers: str) -> str:
    """SHA-256 of all that a checkpoint says, as hexadecimal text."""
    marks = hashlib.sha256(numbers.encode())
    for name, tensor in sorted(tensors.items()):
        marks.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        marks.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return marks.hexdigest()


class Journal:
    """``log.jsonl``: one line for each logged step, none of a step that will be done again."""

    def __init__(self, path: Path, step: int) -> None:
        """Drop what an earlier process logged after the step that training continues from.

        Raises
        ------
        UserError
            If a line is damaged that will not be written again.
        """
        self.path = path
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        kept: list[str] = []
        for at, line in enumerate(lines):
            done = _step(line)
            if done is None and at < len(lines) - 1:  # the last one may have been cut off
                raise UserError(
                    f"Cannot read line {at + 1} of {path}",
                    expected='a JSON object with a "step"',
                    mend="remove the line",
                )
            if done is not None and done <= step:
                kept.append(line)
        devices.on_first(lambda: write_text(path, "".join(f"{line}\n" for line in kept)))

    def write(self, step: int, **values: float) -> None:
        """Append a line, in the first process.

        Raises
        ------
        UserError
            If a value is not finite, or the disk is full.
        """
        if not all(map(math.isfinite, values.values())):
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise diverged(self.path.parent, step, told)
        if not devices.is_first():
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from error


def _step(line: str) -> int | None:
    """Step that a line of the log is of; None where it does not tell."""
    with suppress(ValueError, KeyError, TypeError):
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else None
    return None
