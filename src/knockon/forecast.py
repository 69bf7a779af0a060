"""What a training run will take on this machine: memory, time and disk, from a few of its steps."""

import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from knockon.data.memory import free_memory, written
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.limits import LESS
from knockon.model import Recipe
from knockon.record import LOG
from knockon.train import Options, train
from knockon.watch import Stage, Stopwatch


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take, and what there is.

    Parameters
    ----------
    preparation, steps, validation, checkpoints
        Seconds: of everything before the first step and after the last, and of all parts of training, those
        of earlier stages included. Where training may end early (``patience``), these are of its full length.
    each
        Seconds of one step, of the last stage.
    memory, free_memory
        Peak resident memory of the process in bytes, and what the machine has for it.
    device_memory, free_device_memory
        Peak of what torch allocates on the GPU in bytes, and what is free there for it; 0 without one.
    disk, free_disk
        Bytes of the run folder while its largest file is written anew, and what is free there.
    """

    preparation: float
    steps: float
    validation: float
    checkpoints: float
    each: float
    memory: int
    free_memory: int
    device_memory: int
    free_device_memory: int
    disk: int
    free_disk: int

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.preparation + self.steps + self.validation + self.checkpoints

    @property
    def lacking(self) -> tuple[str, ...]:
        """What does not suffice, and what to do about it, one line each."""
        less = f"lower {LESS['train']}"
        wants = (
            ("memory", self.memory, self.free_memory, less),
            ("memory on the GPU", self.device_memory, self.free_device_memory, f"{less}, or --device cpu"),
            ("disk", self.disk, self.free_disk, "choose another --out, or free some space"),
        )
        return tuple(
            f"{name} does not suffice ({written(wanted)} of {written(there)}): {mend}"
            for name, wanted, there, mend in wants
            if wanted > there
        )

    def lines(self) -> Iterator[str]:
        """Write it for a person."""
        parts = [
            f"preparation {_span(self.preparation)}",
            f"steps {_span(self.steps)} ({self.each:.3g} s each)",
            f"validation {_span(self.validation)}",
            f"checkpoints {_span(self.checkpoints)}",
        ]
        yield f"time: {_span(self.total)} ({', '.join(parts)})"
        yield f"memory: {written(self.memory)} at the peak, of {written(self.free_memory)}"
        if self.device_memory:
            yield f"memory on the GPU: {written(self.device_memory)} of {written(self.free_device_memory)}"
        yield f"disk: {written(self.disk)} of {written(self.free_disk)}"


def forecast(  # noqa: PLR0913 - what train takes
    recipe: Recipe,
    screen: Screen,
    split: Split,
    *,
    out: str | Path,
    options: Options = Options(),
    start: str | Path | None = None,
    began: float | None = None,
) -> Forecast:
    """Measure the begin of a run in a temporary folder, from its preparation to its end after a few steps.

    All that takes memory occurs in it: a validation and a checkpoint, where any is due, an earlier stage, and
    what a model chooses after training. So the peak of this process so far is that of the run, if the process
    did nothing else. Steps take as long as they do now, beside all else that the machine does.

    Parameters
    ----------
    recipe, screen, split, options, start
        See ``train``.
    out
        The run folder; nothing is written there.
    began
        ``time.monotonic()`` when the work began, where the run counts what came before, such as reading.

    Raises
    ------
    UserError
        As ``train`` would.
    """
    began = time.monotonic() if began is None else began
    free = free_memory() + psutil.Process().memory_info().rss  # what it has already is part of the peak
    watch = Stopwatch()
    on_gpu = torch.cuda.is_available() and options.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="knockon-") as folder:
        run = Path(folder) / "run"
        train(recipe, screen, split, out=run, options=options, start=start, watch=watch)
        disk = _written(run, watch.stages)
    lasted = time.monotonic() - began
    return Forecast(
        preparation=lasted - sum(stage.measured for stage in watch.stages),
        steps=sum(stage.whole("step") for stage in watch.stages),
        validation=sum(stage.whole("validation") for stage in watch.stages),
        checkpoints=sum(stage.whole("checkpoint") for stage in watch.stages),
        each=watch.stages[-1].usual("step") if watch.stages else 0.0,
        memory=peak_memory(),
        free_memory=free,
        device_memory=torch.cuda.max_memory_allocated() if on_gpu else 0,
        free_device_memory=torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() if on_gpu else 0,
        disk=disk,
        free_disk=shutil.disk_usage(_existing(Path(out))).free,
    )


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # the portable number can be that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _written(run: Path, stages: Sequence[Stage]) -> int:
    """Bytes of a run folder whose log has all its lines, while its largest file is written anew."""
    sizes = {path: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    logs = sum(size for path, size in sizes.items() if path.name == LOG)
    lines = sum(len(path.read_text().splitlines()) for path in sizes if path.name == LOG)
    wanted = sum(
        stage.training.steps // max(1, stage.training.log_every) + stage.times("validation")
        for stage in stages
    )
    rest = [size for path, size in sizes.items() if path.name != LOG]
    return int(sum(rest) + max(rest) + logs / max(1, lines) * wanted)


def _existing(path: Path) -> Path:
    """Find the folder that a path will lie in, as far as there is one."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _span(seconds: float) -> str:
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"
