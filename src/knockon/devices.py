"""Processes that work side by side on one run, as ``torchrun`` starts them, and what they tell each other.

The first of them writes all files and prints. Where there is one process only, nothing here does anything.
"""

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.loggers.logger import Logger
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from knockon import files
from knockon.types import UserError

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Strategy = Literal["ddp", "fsdp"]
"""What each of several processes holds: the whole model, or a share of it."""
GRACE = timedelta(seconds=5)
"""How long a process that ends waits until another one has said why."""
SILENCE = re.compile("gloo|time(d )?out|connection|socket|peer|pipe", re.IGNORECASE)
"""What gloo says of processes that do not answer; its errors have no type of their own."""

log = logging.getLogger("knockon")


class Lost(UserError):  # noqa: N818 (not the program's error)
    """A process waited in vain for another one."""


def asked() -> int:
    """Count the processes that ``torchrun`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def processes() -> int:
    """Count the processes that work together."""
    return dist.get_world_size() if _joined() else 1


def neighbors() -> int:
    """Count those of them on this machine, this one included."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _joined() else 1


def place() -> int:
    """Place of this process among them, counted from 0."""
    return dist.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return place() == 0


def join(minutes: float) -> None:
    """Work together with the other processes that ``torchrun`` has started; alone, do nothing.

    Parameters
    ----------
    minutes
        How long processes wait for each other before they take one for lost.
    """
    if asked() == 1 or _joined():
        return
    backend, local = "gloo", int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    if not is_first():
        log.setLevel(logging.CRITICAL)


@contextmanager
def side_by_side(minutes: float | None) -> Iterator[None]:
    """Do something together with the other processes, if there are any.

    Parameters
    ----------
    minutes
        As in ``join``; None refuses to work in more than one process.

    Raises
    ------
    Lost
        If another process ended or does not answer.
    """
    if minutes is None and asked() > 1:
        raise UserError(
            f"A command that runs in one process only was started in {asked()}",
            expected="train, predict or generate under torchrun",
            mend="start it without torchrun",
        )
    try:
        join(minutes or 0)
        yield
        if _joined():
            dist.destroy_process_group()
    except RuntimeError as error:
        if asked() == 1 or not (isinstance(error, dist.DistError) or SILENCE.search(str(error))):
            raise
        raise Lost(
            f"One of {asked()} processes ended or did not answer ({str(error).splitlines()[0]})",
            expected="all of them until the end",
            mend="the same command continues from the last checkpoint",
        ) from error


def tell(say: Callable[[], None]) -> None:
    """Let one process say why all of them end; the others wait until it has."""
    if asked() == 1:
        return say()
    if not _joined() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return say() if os.environ["RANK"] == "0" else None  # there is no store yet
    key = "knockon/ended/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        # A connection of its own, because that of the group may be what broke.
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=GRACE)
        if store.add(key, 1) > 1:
            return store.wait([key + "/told"], GRACE)
    except RuntimeError:
        return say()
    say()
    return store.set(key + "/told", "")


def on_first(do: Callable[[], T]) -> T:
    """Let the first process do something while the others wait; all get what came of it.

    Raises
    ------
    UserError
        In all of them, where the first one did.
    """
    if processes() == 1:
        return do()
    found: list[object] = [None, None]
    if is_first():
        try:
            found[0] = do()
        except UserError as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[1], UserError):
        raise found[1]
    return found[0]  # pyright: ignore[reportReturnType]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder that all processes of this one work in.

    Raises
    ------
    UserError
        As for ``files.alone``, in all processes.
    """
    with ExitStack() as held:
        on_first(lambda: held.enter_context(files.alone(folder)))
        yield


def share(items: Sequence[T]) -> Sequence[T]:
    """Take this process's share of some items; every item is in one share."""
    return items[place() :: processes()]


def batches(each: int) -> range:
    """Numbers of the batches of a step that are this process's, where each process has so many."""
    return range(place() * each, (place() + 1) * each)


def joined_on_first(own: Sequence[T]) -> list[T]:
    """Give the first process what came of all shares, in the order of the items; others get nothing."""
    if processes() == 1:
        return list(own)
    parts = [None] * processes() if is_first() else None
    dist.gather_object(list(own), parts)
    missing = object()
    rounds = zip_longest(*(parts or ()), fillvalue=missing)
    return [item for items in rounds for item in items if item is not missing]  # pyright: ignore[reportReturnType]


def highest(number: int) -> int:
    """Highest of the numbers of all processes."""
    if processes() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean of named numbers over some parts and over all processes, which must have as many parts each."""
    means = {name: sum(float(part[name].detach()) for part in parts) / len(parts) for name in parts[0]}
    if processes() == 1:
        return means
    summed = torch.tensor(list(means.values()), dtype=torch.float64)
    dist.all_reduce(summed)
    return dict(zip(means, (summed / processes()).tolist(), strict=True))


def fabric(
    device: str,
    *,
    strategy: Strategy = "ddp",
    precision: Literal["float32", "bf16"] = "float32",
    loggers: Sequence[Logger] = (),
) -> Fabric:
    """Make the engine of training.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda``.
    strategy
        What each of several processes holds: the whole model (ddp), or a share of it (fsdp).
    precision
        Of matrix products.

    Raises
    ------
    UserError
        If one process alone is to hold a share.
    """
    here, engine, plugin = 1, "auto", None
    if processes() > 1:
        here, plugin = neighbors(), TorchElasticEnvironment()
        engine = _copies() if strategy == "ddp" else _shares()
    elif strategy == "fsdp":
        raise UserError(
            "--strategy fsdp in one process", expected="several, of torchrun", mend="leave it out"
        )
    made = Fabric(
        accelerator=device,
        devices=here,
        num_nodes=processes() // here,
        strategy=engine,
        plugins=plugin,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        loggers=list(loggers) if is_first() else [],
    )
    made.launch()
    return made


def spread(fabric: Fabric, model: M, *, average: bool) -> tuple[_FabricModule, M | None]:
    """Prepare a model for training by its ``loss``, and an average of its weights where one is wanted.

    Returns
    -------
    tuple
        What holds the model, or a copy of it where processes are to hold a share each; and the average.
    """
    mean = copy.deepcopy(model).requires_grad_(requires_grad=False) if average else None
    if isinstance(fabric.strategy, ModelParallelStrategy):
        model = copy.deepcopy(model)
        if mean is not None:
            fully_shard(mean, mesh=fabric.strategy.device_mesh["data_parallel"])
    module = fabric.setup_module(model)
    module.mark_forward_method("loss")
    return module, mean


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put tensors together of which each process holds a share; the others are given back."""
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in tensors.items()}


def whole_model(model: M, place: M) -> M:
    """Give a model back, or put one together of which each process holds a share, in place of another one."""
    state = model.state_dict()
    if not any(isinstance(x, DTensor) for x in state.values()):
        return model
    place.load_state_dict(whole(state))
    return place


def laid(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take this process's share of whole tensors, of those whose like is held in shares."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        other = like[name]
        if isinstance(other, DTensor) and other.shape == tensor.shape:
            found[name] = distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return found


def resolve(name: str) -> str:
    """Turn ``auto`` into the accelerator, where there is one.

    Raises
    ------
    UserError
        If more processes than accelerators are on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = neighbors()
    if name == "cuda" and here > max(1, torch.cuda.device_count()):
        raise UserError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs",
            expected="one process for each GPU",
            mend=f"torchrun --nproc-per-node={torch.cuda.device_count()}, or --device cpu",
        )
    return name


def _copies() -> DDPStrategy:
    # Some steps leave parameters out. Buffers are statistics, which training does not change.
    known = signature(DistributedDataParallel).parameters
    follow = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    still: dict[str, Any] = {follow: False}
    return DDPStrategy(find_unused_parameters=True, **still)


def _shares() -> ModelParallelStrategy:
    def share(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        fully_shard(model, mesh=mesh["data_parallel"])
        register_fsdp_forward_method(model, "loss")
        return model

    return ModelParallelStrategy(share, data_parallel_size=processes(), tensor_parallel_size=1)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
