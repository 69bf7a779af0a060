"""The contract of a model, and how one is saved and loaded.

A model is one file in ``knockon.models``: a frozen ``Config`` whose ``build(spec)`` makes it, a
``Model`` with ``fit_statistics``, ``knows``, ``loss`` and ``sample``, and presets: functions without
arguments (``default``, and where they make sense ``paper`` and ``small``) that return a ``Recipe``.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_type_hints

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from knockon.files import from_text, typed
from knockon.types import CellSets, Condition, Noise, Spec, Units, UserError

if TYPE_CHECKING:
    from knockon.data.screen import Screen

Names = tuple[Sequence[str] | None, ...]
"""Names of the entries along each dimension of a parameter; None where they have none."""
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

    @property
    def learns_embedded(self) -> bool:
        """Whether the loss reads what ``embed`` makes of the target cells, which is made only once then."""
        return False

    def entries(self) -> dict[str, Names]:
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

    def correct(self, training: Iterable[CellSets], seed: int) -> None:
        """Learn, after training, to correct what is generated, by measured cells of training conditions.

        Parameters
        ----------
        training
            Of some conditions one set each: control cells to start from, and measured cells beside them. They
            are drawn as they are asked for.
        seed
            Of all that is drawn.
        """

    def choose(self, validation: Sequence[CellSets], seed: int) -> None:
        """Choose, after training, what is left to choose by measured cells of validation conditions.

        Parameters
        ----------
        validation
            One set each: control cells to start from, and measured cells beside them, which may be more.
        """

    def embed(self, cells: Float[Tensor, "cells genes"]) -> Float[Tensor, "cells dim"]:
        """Place cells in the model's latent space, where it has one.

        Raises
        ------
        UserError
            If it has none.
        """
        raise UserError(f"{name_of(self)} has no embedding of cells", expected="scldm_vae or scldm")

    def generate(
        self, condition: Condition, given: Bool[Tensor, "sets classes"], cells: int, noise: Noise
    ) -> Float[Tensor, "sets cells genes"]:
        """Draw cells without control cells, under conditions of which only some classes may be given.

        Parameters
        ----------
        given
            Whether what was done, and each covariate, is given; the others are anything.

        Raises
        ------
        UserError
            If the model needs control cells.
        """
        raise UserError(
            f"{name_of(self)} cannot generate cells without control cells",
            expected="scldm",
            mend="knockon predict",
        )

    def take(self, earlier: "Model") -> None:
        """Take over what an earlier stage has learned (``ModelConfig.earlier``)."""
        raise NotImplementedError


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
    accumulate: int = 1
    """Batches whose gradients are averaged for one step, in each process."""
    by_cells: bool = False
    """Draw each set's condition as often as it has cells, instead of all alike."""
    with_replacement: bool = False
    """Draw a set's cells with replacement; otherwise only where a condition has fewer cells than a set."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with its decoupled weight decay."""
    lr: float = 1e-3
    """Highest learning rate."""
    final_lr: float = 0.0
    """Learning rate at the last step of a cosine schedule."""
    schedule: Literal["constant", "cosine", "floored_cosine", "root"] = "cosine"
    """Shape of the learning rate after the warm-up; a floored one falls to 0, but not below ``final_lr``, and
    ``root`` falls with the root of the steps."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly."""
    warmup_from: float = 0.0
    """Share of the highest learning rate that the rise begins at; with 0 it begins at one step's share."""
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
    ema_start: int = 0
    """Steps up to which the average is a copy."""
    ema_ramp: Literal["none", "rational", "power"] = "rational"
    """Let the decay grow with the n-th step of averaging, so that the average soon forgets the first weights:
    ``(1 + n) / (10 + n)``, or ``1 - (1 + n)^(-2/3)``. Without it, the first update copies the weights."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of matrix products; weights and reductions stay in float32."""
    compile: bool = False
    """Compile the model (slow to start, faster afterwards)."""
    validate_every: int = 0
    """Steps between scores on validation conditions; 0 never validates and keeps the last weights."""
    validate_by: Literal["cells", "loss"] = "cells"
    """The score: the energy distance of generated cells, or the loss on validation cells."""
    validate_cells: int = 64
    """Generated cells per validation condition."""
    patience: int = 0
    """Validations without improvement before training stops; 0 never stops early."""
    checkpoint_every: int = 500
    """Steps between checkpoints to resume from."""
    log_every: int = 10
    """Steps between lines of ``log.jsonl``."""

    def __post_init__(self) -> None:
        """Refuse batches of nothing."""
        for name in ("sets", "cells", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"--train.{name} {getattr(self, name)}", expected="at least 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """Everything that makes one model differ from another of its kind."""

    at_generation: ClassVar[tuple[str, ...]] = ()
    """Fields that only ``sample`` and ``generate`` read, so that they may change after training."""

    @abstractmethod
    def build(self, spec: Spec) -> Model:
        """Make the model, with weights drawn from torch's global generator (the caller forks it)."""

    @property
    def guesses(self) -> bool:
        """Whether there is an option ``missing``: what to do with what was never measured."""
        return "missing" in {f.name for f in fields(self)}

    def answering(self) -> "ModelConfig":
        """Let the mean effect stand in for what was never measured, where the model can be told so."""
        return replace(self, missing="mean") if self.guesses else self

    def earlier(self) -> "Path | Recipe | None":
        """Name the stage that comes before: its run folder, or how to train it; None for most models."""
        return None

    def after(self, earlier: "ModelConfig") -> "ModelConfig":
        """Adapt to the earlier stage that was found."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how it is trained: what a preset returns."""

    model: ModelConfig
    train: Training = field(default_factory=Training)


def save_weights(model: Model, path: Path) -> None:
    """Write all parameters and buffers, without anything that could execute when it is read."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, path)


def changed(config: ModelConfig, changes: Mapping[str, object]) -> ModelConfig:
    """Give fields that only concern generation other values.

    Parameters
    ----------
    changes
        Values by the names of fields, or texts of values.

    Raises
    ------
    UserError
        If a field is unknown or concerns training, or a value is of the wrong type.
    """
    name = name_of(config)
    refused = [key for key in changes if key not in config.at_generation]
    if refused:
        raise UserError(
            f"{name} has nothing of this name that can change after training",
            offenders=refused,
            expected="one of " + ", ".join(config.at_generation) if config.at_generation else "no change",
            mend="check the spelling; what training depends on is a --model option of knockon train",
        )
    hints = get_type_hints(type(config))
    found = {
        key: from_text(hints[key], value, where=key)
        if isinstance(value, str)
        else typed(hints[key], value, where=key)
        for key, value in changes.items()
    }
    return replace(config, **found)


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
    try:
        fill(model, state)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {path} do not fit the configuration beside them",
            offenders=[str(error).splitlines()[1].strip() if "\n" in str(error) else error],
            expected="a run folder of this version of knockon, that nobody edited",
        ) from error


def fill(model: Model, state: Mapping[str, Tensor]) -> None:
    """Copy all parameters and buffers; statistics take the shape that they have in ``state``."""
    for name, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            saved = state.get(f"{name}.{key}" if name else key)
            if saved is not None and saved.shape != buffer.shape:
                setattr(module, key, saved.new_empty(saved.shape, dtype=buffer.dtype))
    model.load_state_dict(state)


def device_of(model: Model) -> torch.device:
    """Where a model computes; a baseline may have nothing that lies anywhere."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@torch.no_grad()
def copy_named(model: Model, source: Model) -> tuple[int, list[str], list[str]]:
    """Copy parameters of the same name, entry by entry where entries have names (``Model.entries``).

    Returns
    -------
    tuple
        How many parameters were copied whole, and the names of those that were in part and not at all.
    """
    old, named = dict(source.named_parameters()), (source.entries(), model.entries())
    kept, partly, new = 0, [], []
    for key, parameter in model.named_parameters():
        known = None
        if key in old:
            known = _overlap(old[key], parameter, *(entries.get(key) for entries in named))
        if known is None:
            new.append(key)
            continue
        places, values = known
        parameter[places] = values.to(parameter.device)
        if values.numel() == parameter.numel():
            kept += 1
        else:
            shape = " x ".join(map(str, parameter.shape))
            partly.append(f"{key} ({' x '.join(map(str, values.shape))} of {shape})")
    return kept, partly, new


def name_of(model: Model | ModelConfig) -> str:
    """Name a model or its configuration as its file in ``knockon.models`` is called."""
    return type(model).__module__.rpartition(".")[2]


def model_class(config: ModelConfig) -> type[Model]:
    """Name the class that a configuration builds, known before there is any data to build it for."""
    return get_type_hints(type(config).build)["return"]


def _overlap(
    old: Tensor, new: Tensor, old_names: Names | None, new_names: Names | None
) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Places in the new tensor whose names the old one has, and its values there; None without any."""
    none: Names = (None,) * new.ndim
    if old.ndim != new.ndim:
        return None
    taken, put = [], []
    for size, length, before, now in zip(
        old.shape, new.shape, old_names or none, new_names or none, strict=True
    ):
        if before is None or now is None:
            if size != length:
                return None
            rows = list(range(length))
            taken.append(rows)
            put.append(rows)
            continue
        place = {entry: i for i, entry in enumerate(before)}
        common = [(place[entry], i) for i, entry in enumerate(now) if entry in place]
        if not common:
            return None
        taken.append([i for i, _ in common])
        put.append([i for _, i in common])
    return _grid(put), old[_grid(taken)]


def _grid(rows: list[list[int]]) -> tuple[Tensor, ...]:
    """Index that picks these entries along every dimension."""
    return torch.meshgrid(*(torch.tensor(x) for x in rows), indexing="ij")
