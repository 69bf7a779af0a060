"""The contract of a model, and how one is saved and loaded.

A model is one file in ``knockon.models``: a frozen ``Config`` whose ``build(spec)`` makes it, a
``Model`` with ``fit_statistics``, ``knows``, ``loss`` and ``sample``, and presets: functions without
arguments (``default``, and where they make sense ``paper`` and ``small``) that return a ``Recipe``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_type_hints

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from knockon.types import CellSets, Condition, Noise, Spec, Units, UserError

if TYPE_CHECKING:
    from knockon.data.screen import Screen

Losses = dict[str, Tensor]
"""Named scalar losses; ``total`` is the one that is minimized, the others are its parts."""


class Model(nn.Module, ABC):
    """Predicts cells under a condition from control cells.

    Whatever is learned from data without gradients (means, gene graphs, library sizes) lives in
    buffers, so that a checkpoint is complete. Nothing draws from the global random state.
    """

    units: ClassVar[Units]
    """The scale that the model reads and writes; the data layer obeys."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def learns_controls(self) -> bool:
        """Whether control cells are trained on as well, as cells to which nothing was done."""
        return False

    def entries(self) -> dict[str, tuple[Sequence[str] | None, ...]]:
        """Names along the dimensions of parameters that belong to genes, perturbations or levels.

        For each such parameter, one sequence for each dimension, or None where entries have no names.
        Training that begins with another run's weights keeps the entries of the same name. Without names, it
        can only begin with a run on the same genes, perturbations and contexts.
        """
        return {}

    @abstractmethod
    def fit_statistics(self, train: "Screen") -> None:
        """Learn what needs no gradient, from training cells (controls included) only.

        A baseline does all its work here.
        """

    @abstractmethod
    def knows(self, condition: Condition) -> Bool[Tensor, "sets"]:
        """Whether the model has a basis to predict each condition; the others are refused by name."""

    @abstractmethod
    def loss(self, batch: CellSets, rng: torch.Generator) -> Losses:
        """Scalar losses of a batch, with ``total`` among them."""

    @abstractmethod
    def sample(
        self, control: Float[Tensor, "sets cells genes"], condition: Condition, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw one cell under the condition for each control cell, in the model's units.

        A set's cells may depend on each other only if the model says so; sets never do.
        """


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained; each preset has its own."""

    steps: int = 0
    """Optimizer steps; 0 for a model that has nothing to train."""
    seed: int = 0
    """Seed of the weights, the batches and the noise."""
    sets: int = 1
    """Sets (conditions) in a batch."""
    cells: int = 48
    """Cells of a set."""
    with_replacement: bool = False
    """Draw a set's cells with replacement; otherwise only where a condition has fewer cells than a set."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with its decoupled weight decay."""
    lr: float = 1e-3
    """Highest learning rate."""
    final_lr: float = 0.0
    """Learning rate at the last step of a cosine schedule."""
    schedule: Literal["constant", "cosine", "floored_cosine"] = "cosine"
    """Shape of the learning rate after the warm-up; a floored one falls to 0, but not below
    ``final_lr``."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    plateau: float = 0.0
    """Share of all steps that the learning rate stays at its highest after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    weight_decay: float = 0.0
    """Weight decay; in Adam's gradient, or decoupled in AdamW."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    ema: float = 0.0
    """Decay of the moving average of weights that predictions use; 0 uses the weights themselves."""
    ema_every: int = 1
    """Steps between updates of that average, the first after the first step."""
    ema_ramp: bool = True
    """Let the decay grow with the steps, so that the average soon forgets the first weights. Without it, the
    first update copies the weights."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of matrix products; weights and reductions stay in float32."""
    compile: bool = False
    """Compile the model (slow to start, faster afterwards)."""
    validate_every: int = 0
    """Steps between scores on validation conditions; 0 never validates and keeps the last weights."""
    validate_cells: int = 64
    """Generated cells per validation condition."""
    patience: int = 0
    """Validations without improvement before training stops; 0 never stops early."""
    checkpoint_every: int = 500
    """Steps between checkpoints to resume from."""
    log_every: int = 10
    """Steps between lines of ``log.jsonl``."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """Everything that makes one model differ from another of its kind."""

    @abstractmethod
    def build(self, spec: Spec) -> Model:
        """Make the model, with weights drawn from torch's global generator (the caller forks it)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how it is trained: what a preset returns."""

    model: ModelConfig
    train: Training = field(default_factory=Training)


def save_weights(model: Model, path: Path) -> None:
    """Write all parameters and buffers, without anything that could execute when it is read."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path)


def load_weights(model: Model, path: Path) -> None:
    """Fill a freshly built model; statistics take the shape that they were saved with.

    Raises
    ------
    UserError
        If the file is damaged or belongs to another model.
    """
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"Cannot read the weights in {path} ({error})",
            expected="the file that training wrote",
            mend="train again, or restore the run folder",
        ) from error
    for name, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            saved = state.get(f"{name}.{key}" if name else key)
            if saved is not None and saved.shape != buffer.shape:
                setattr(module, key, saved.new_empty(saved.shape, dtype=buffer.dtype))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {path} do not fit the configuration beside them",
            offenders=[str(error).splitlines()[1].strip() if "\n" in str(error) else error],
            expected="a run folder that nobody edited",
        ) from error


def model_class(config: ModelConfig) -> type[Model]:
    """Name the class that a configuration builds, known before there is any data to build it for."""
    return get_type_hints(type(config).build)["return"]
