"""Training: the one loop, and the only ``.backward(`` of knockon."""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers.tensorboard import TensorBoardLogger
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer

from knockon import devices, models, transfer, validate
from knockon.checkpoint import CHECKPOINT, Journal, State
from knockon.data import arrays, prepare, splits
from knockon.data.memory import bytes_of
from knockon.data.room import settle
from knockon.data.sampler import Sampler
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.data.values import OnDisk
from knockon.data.vectors import read_vectors
from knockon.embed import table
from knockon.files import digest
from knockon.interrupt import Ended, wishes
from knockon.model import Losses, Model, ModelConfig, Recipe, Training, model_class, name_of
from knockon.predict import refuse_unknown
from knockon.progress import bar
from knockon.record import LOG, RECORD, SPLIT, Record, save_run, stored, versions, write_spec
from knockon.run import Run
from knockon.schedule import decay, learning_rate, seed_of
from knockon.types import CellSets, Label, UserError
from knockon.watch import Watch

STAGE_ONE = "stage_one"
"""Where in a run folder an earlier stage is trained that was not given."""

Objective = Callable[[CellSets, torch.Generator], Losses]

log = logging.getLogger("knockon")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything about a training run that is not the model's own."""

    genes: int | None = None
    """Most variable genes to keep, chosen on training cells, besides the perturbed ones; all without it."""
    total: float | None = None
    """Counts per cell to normalize to, where the screen holds counts; the training median without it."""
    vectors: Path | None = None
    """Table (.csv) with fixed vectors of perturbations; further names in it can be predicted unseen."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``auto``."""
    memory: str | None = None
    """Room for the values of a store, such as 4GB; a larger one is read from disk while the model works. A
    quarter of what is free, without it."""
    strategy: devices.Strategy = "ddp"
    """What each process under torchrun holds: the whole model (ddp), or a share of its weights, gradients,
    average and optimizer (fsdp), for a model that does not fit otherwise."""
    timeout: float = 30.0
    """Minutes that processes under torchrun wait for each other before they take one for lost."""
    cluster: str | None = None
    """Dask cluster, such as tcp://10.0.0.1:8786, whose workers compute statistics of a store, and do the jobs
    of a comparison; this machine without it. They must see the same folders."""
    tensorboard: bool = False
    """Log to ``tensorboard/`` in the run folder as well."""
    quiet: bool = True
    """Show no progress bar."""


def train(  # noqa: PLR0913 - each is one independent choice
    model: str | ModelConfig | Recipe,
    screen: Screen,
    split: Split | str = "additive",
    *,
    out: str | Path,
    options: Options = Options(),
    wanted: Sequence[Label] = (),
    start: str | Path | None = None,
    watch: Watch | None = None,
) -> Run:
    """Train a model and write its run folder; continue where an earlier run of the same stopped.

    Under ``torchrun``, all processes train one model together, on batches of their own.

    Parameters
    ----------
    model
        A name (its default preset), a configuration (its default training), or both.
    screen
        As it was read; it is prepared for the model, on training cells.
    split
        Or the kind of one.
    out
        The run folder. A finished run of the same is loaded and not trained again.
    wanted
        Conditions that the model must be able to predict.
    start
        Run folder whose weights training begins with, of the same model; what has another name is new.
    watch
        Looks on, and may end training early.

    Raises
    ------
    Refusal
        If the model has no basis to predict one of them; nothing was trained then.
    UserError
        If the folder holds another run, another command is at work in it, or training diverges.
    """
    devices.join(options.timeout)
    folder, watch = Path(out), watch or Watch()
    began = time.monotonic()
    recipe = _recipe(model)
    split = split if isinstance(split, Split) else splits.make(split, screen)
    stage, first = recipe.model.earlier(), None
    if start is not None and isinstance(stage, Recipe):
        raise UserError(
            "--from without the earlier stage that its weights belong to",
            expected="the very stage that the earlier run was trained after",
            mend=f"give it, such as --model.vae {start}/{STAGE_ONE}",
        )
    if isinstance(stage, Path):
        found, first = stored(stage)
        recipe = dataclasses.replace(recipe, model=recipe.model.after(found.config))
    screen = settle(screen, options.memory, device=devices.resolve(options.device))
    with arrays.computing(options.cluster, bytes_of(options.memory) if options.memory else None):
        network, prepared, record = _set_up(recipe, screen, split, options, first)
    if start is not None:
        for note in transfer.adopt(network, Path(start), record, split):
            log.info(note)
        record = dataclasses.replace(record, begun=digest(Path(start) / RECORD))
    if isinstance(stage, Path) and first is not None:
        network.take(first)
        record = dataclasses.replace(record, stage=digest(stage / RECORD))
        for note in transfer.leaks(stage, record, split):
            log.info(note)
    refuse_unknown(network, wanted)
    if _finished(record, folder, split, screen):
        return Run.load(folder, screen=screen, device=options.device)
    with devices.alone(folder):
        if _finished(record, folder, split, screen):  # by another command, until now
            return Run.load(folder, screen=screen, device=options.device)
        devices.on_first(lambda: _open(folder, split, network, record))
        if isinstance(stage, Recipe):
            log.info("the first stage is trained in %s", folder / STAGE_ONE)
            stage = dataclasses.replace(stage, train=_alike(stage.train, recipe.train))
            earlier = train(stage, screen, split, out=folder / STAGE_ONE, options=options, watch=watch)
            network.take(earlier.model)
        steps = _optimize(network, prepared, split, folder, watch.begins(recipe.train), options, watch)
        validate.finish(network, prepared, split, recipe.train.seed)
        record = dataclasses.replace(record, steps=steps, seconds=time.monotonic() - began)
        record = devices.on_first(lambda: save_run(folder, network, record))
    return Run(folder=folder, model=network.eval(), record=record, split=split, screen=prepared)


def _alike(stage: Training, training: Training) -> Training:
    """Let an earlier stage share what belongs to the command and not to a model."""
    return dataclasses.replace(stage, seed=training.seed, accumulate=training.accumulate)


def _recipe(model: str | ModelConfig | Recipe) -> Recipe:
    if isinstance(model, Recipe):
        return model
    if isinstance(model, str):
        return models.recipe(model)
    return Recipe(model=model, train=models.recipe(name_of(model)).train)


def _set_up(
    recipe: Recipe, screen: Screen, split: Split, options: Options, first: Model | None
) -> tuple[Model, Screen, Record]:
    """Prepare the screen, build the model and fit its statistics, on training cells only.

    The genes are those of the earlier stage, where there is one.

    A model without training steps chooses nothing on validation conditions and learns from them too; the
    preparation does not, so that it is the same for all models.
    """
    learned = split.train if recipe.train.steps else (*split.train, *split.validation)
    preparation = prepare.fit(
        splits.training(split, screen),
        units=model_class(recipe.model).units,
        genes=options.genes,
        total=options.total,
        panel=None if first is None else _panel(first, screen, options),
    )
    for note in preparation.notes:
        log.info(note)
    prepared = prepare.apply(screen, preparation)
    vectors = None if options.vectors is None else read_vectors(options.vectors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)  # noqa: TID251 (initialization draws from the global generator)
        network = recipe.model.build(prepared.spec(vectors))
    if not split.train and not network.learns_controls:
        raise UserError(
            "There is no perturbed cell to train on",
            expected="a screen with perturbations, or a model that learns from control cells",
            mend="for unlabelled cells, --preset marginal of perturbdiff",
        )
    network.fit_statistics(prepared.select((*learned, *screen.controls)))
    record = Record(
        model=name_of(recipe.model),
        config=recipe.model,
        train=recipe.train,
        source=screen.source,
        columns=screen.columns,
        screen=screen.digest,
        preparation=preparation,
        vectors="" if options.vectors is None else digest(options.vectors),
        versions=versions(),
        device=devices.resolve(options.device),
        processes=devices.processes(),
    )
    return network, prepared, record


def _panel(first: Model, screen: Screen, options: Options) -> tuple[str, ...]:
    """Genes of the screen that the earlier stage knows."""
    known = set(first.spec.genes)
    panel = tuple(gene for gene in screen.genes if gene in known)
    if options.genes is not None or not panel:
        raise UserError(
            "The earlier stage has its own genes" + ("" if panel else ", and the screen has none of them"),
            expected=f"a screen with some of its {len(known)}, and no --genes",
            mend="leave out --genes",
        )
    if len(panel) < len(screen.genes):
        log.info("%d genes that the earlier stage does not know are left out", len(screen.genes) - len(panel))
    return panel


def _open(folder: Path, split: Split, network: Model, record: Record) -> None:
    """Write what a run folder has before training, where it was not begun yet."""
    if not (folder / RECORD).exists():
        split.write(folder / SPLIT)
        write_spec(network.spec, folder)
        record.write(folder)


def _finished(record: Record, folder: Path, split: Split, screen: Screen) -> bool:
    """Whether the folder holds this very run, finished; one that was asked for differently is refused."""
    earlier = devices.on_first(lambda: Record.read(folder) if (folder / RECORD).exists() else None)
    if earlier is None:
        return False
    before, now = earlier.asked(), record.asked()
    different = [key for key in now if before[key] != now[key]]
    if "screen" not in different and splits.read(folder / SPLIT, screen) != split:
        different.append("split")
    if different:
        alike = f"processes x --train.accumulate = {before['batches']}, or "
        raise UserError(
            f"{folder} holds a run that differs from this one",
            offenders=different,
            expected="an empty folder, or the same command again to continue it",
            mend=alike * ("batches" in different) + "choose another --out, or remove the folder",
        )
    if earlier.finished:
        log.info("%s is finished already; it is used as it is", folder)
    return earlier.finished


def _optimize(  # noqa: PLR0913, PLR0917 - all that training depends on
    network: Model,
    screen: Screen,
    split: Split,
    folder: Path,
    training: Training,
    options: Options,
    watch: Watch,
) -> int:
    """Minimize the model's loss; leaves the chosen weights in ``network`` and returns the steps done."""
    if not training.steps:
        return 0
    fabric = _fabric(folder, training, options)
    module, average = devices.spread(fabric, network.to(fabric.device), average=bool(training.ema))
    state = _begin(cast(Model, module.module), average, folder, training)
    optimizer = cast(_FabricOptimizer, fabric.setup_optimizers(state.optimizer))
    journal = Journal(folder / LOG, state.step)
    objective = torch.compile(module.loss) if training.compile else module.loss
    sampler = _sampler(screen, network, split, training, fabric.device)
    validation = tuple(label for label in split.validation if len(screen.rows[label]) > 1)
    score = watch.timed(
        "validation", validate.score_by(screen, network.spec, validation, training, fabric.device)
    )
    with (
        torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else []),
        bar("training", total=training.steps, start=state.step, quiet=options.quiet) as advance,
        wishes() as wish,
    ):
        while watch.goes_on() and state.step < training.steps and not state.exhausted(training):
            # ---- one training step ------------------------------------------------------------
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, training)
            losses = _differentiate(fabric, module, objective, sampler, state.step, training)
            if training.clip:
                fabric.clip_gradients(module, optimizer, max_norm=training.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if state.average is not None:
                _follow(state.average, state.model, decay(state.step, training))
            state.step += 1
            asked = devices.highest(wish.number)  # decided once, so that all processes end at this step
            # -----------------------------------------------------------------------------------
            text = ""
            if _due(state.step, training.log_every) or state.step == training.steps:
                values = devices.mean(losses)
                journal.write(state.step, lr=learning_rate(state.step - 1, training), **values)
                fabric.log_dict(values, state.step)
                text = f"loss {values['total']:.4f}"
            if _due(state.step, training.validate_every) and validation:
                state.judge(score(devices.whole_model(state.predictor, network)))
                state.model.train()
                journal.write(state.step, validation=state.score)
            if _due(state.step, training.checkpoint_every, last=training.steps) or asked:
                watch.timed("checkpoint", state.save)(folder / CHECKPOINT)
            advance(text)
            if asked:
                raise Ended(asked, f"stopped at step {state.step} of {training.steps}")
    state.refuse_nonfinite(folder)
    network.load_state_dict(state.best or devices.whole(state.predictor.state_dict()))
    return state.step


def _fabric(folder: Path, training: Training, options: Options) -> Fabric:
    return devices.fabric(
        devices.resolve(options.device),
        strategy=options.strategy,
        precision=training.precision,
        loggers=[TensorBoardLogger(folder, name="tensorboard", version="")] if options.tensorboard else [],
    )


def _differentiate(
    fabric: Fabric,
    module: _FabricModule,
    objective: Objective,
    sampler: Sampler,
    step: int,
    training: Training,
) -> list[Losses]:
    """Leave the mean gradient of all batches of a step, and return the losses of this process's."""
    losses: list[Losses] = []
    for batch in devices.batches(training.accumulate):
        seed = seed_of(training.seed, step, batch)
        torch.manual_seed(seed)  # noqa: TID251 (dropout knows no other generator)
        rng = torch.Generator(fabric.device).manual_seed(seed)
        with fabric.no_backward_sync(module, enabled=len(losses) + 1 < training.accumulate):
            with fabric.autocast():
                losses.append(objective(sampler.batch(step, batch), rng))
            fabric.backward(losses[-1]["total"] / training.accumulate)
    return losses


def _begin(network: Model, average: Model | None, folder: Path, training: Training) -> State:
    """Start anew, or where the folder's checkpoint says."""
    state = State(network, average, _optimizer(network, training))
    if state.resume(folder / CHECKPOINT):
        if devices.on_first(lambda: state.step) != state.step:
            raise UserError(
                f"{folder} is not the same for all processes", expected="a folder that all machines see"
            )
        log.info("Continuing %s at step %d of %d", folder, state.step, training.steps)
    return state


def _sampler(
    screen: Screen, network: Model, split: Split, training: Training, device: torch.device
) -> Sampler:
    conditions = (*split.train, *screen.controls) if network.learns_controls else split.train
    resident = network.learns_embedded and not isinstance(
        screen.matrix, OnDisk
    )  # else each batch is embedded
    embedded = table(network, screen.select(conditions)) if resident else None
    sampler = Sampler(
        screen,
        network.spec,
        conditions=conditions,
        sets=training.sets,
        cells=training.cells,
        seed=training.seed,
        device=device,
        replace=training.with_replacement,
        by_cells=training.by_cells,
        embedded=embedded,
    )
    for note in sampler.notes:
        log.info(note)
    return sampler


def _due(step: int, every: int, last: int = 0) -> bool:
    return every > 0 and (step % every == 0 or step == last)


def _optimizer(network: Model, training: Training) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
    decayed, free = [], []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            plain = name == "bias" or isinstance(module, torch.nn.LayerNorm)
            (free if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": training.weight_decay}]
    groups += [{"params": free, "weight_decay": 0.0}] if free else []
    return kind(groups, lr=training.lr, betas=training.betas, fused=True)


@torch.no_grad()
def _follow(average: Model, network: Model, kept: float) -> None:
    """Move the averaged weights towards the current ones."""
    if kept == 1:
        return
    for mean, current in zip(average.parameters(), network.parameters(), strict=True):
        if current.requires_grad:
            mean.lerp_(current, 1 - kept)
