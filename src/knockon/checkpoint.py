"""What a training run leaves on the way: a checkpoint to resume from, and a log."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from knockon.files import write_text, written_aside
from knockon.model import Model, Training
from knockon.types import UserError

CHECKPOINT = Path("checkpoint") / "state.safetensors"


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
            self.best = {name: tensor.clone() for name, tensor in self.predictor.state_dict().items()}

    def exhausted(self, training: Training) -> bool:
        """Whether validation has not improved for too long."""
        return bool(training.patience) and self.stale >= training.patience

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        numbers = {"step": self.step, "best_score": self.best_score, "stale": self.stale}
        with written_aside(path) as aside:
            safetensors.torch.save_file(tensors, aside, metadata={"numbers": json.dumps(numbers)})

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "best": {}, "optimizer": {}}
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["numbers"])
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part, _, rest = name.partition(".")
                    parts[part][rest] = file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"Cannot read the checkpoint {path} ({error})", mend="remove the run folder and train again"
            ) from error
        self.model.load_state_dict(parts["model"])
        if self.average is not None:
            self.average.load_state_dict(parts["average"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.best = parts["best"]
        self.step, self.best_score, self.stale = numbers["step"], numbers["best_score"], numbers["stale"]


class Journal:
    """``log.jsonl``: one line for each logged step, none of a step that will be done again."""

    def __init__(self, path: Path, step: int) -> None:
        """Drop what an earlier process logged after the step that training continues from."""
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, **values: float) -> None:
        """Append a line.

        Raises
        ------
        UserError
            If a value is not finite.
        """
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"Training diverged at step {step}: not a finite number",
                offenders=wrong,
                mend="lower --train.lr, or bound the gradient with --train.clip",
            )
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
