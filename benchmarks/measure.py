"""Time, peak memory and the machine they were measured on."""

import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from knockon.forecast import peak_memory

GIB = 2**30


@dataclass(frozen=True)
class Sample:
    """What one run of a task took: seconds on the clock, and of all processor cores together."""

    clock: float
    processor: float


@dataclass(frozen=True)
class Ratio:
    """How many times faster one task is than another: the median over rounds, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def in_turns(
    tasks: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
) -> dict[str, list[Sample]]:
    """Run each task once per round, after one round that does not count.

    The tasks take turns, so that whatever else the machine does meanwhile falls on all of them. On a GPU
    each starts with an empty cache, for two that fill it would not fit side by side, and warms up first.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            if device.type == "cuda":
                torch.cuda.empty_cache()
                task()
                torch.cuda.synchronize(device)
            clock, processor = time.perf_counter(), time.process_time()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                samples[name].append(Sample(time.perf_counter() - clock, time.process_time() - processor))
    return samples


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Each round's times set against each other."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds))


def peak_in_child(task: Callable[..., object], *arguments: object) -> int:
    """Peak memory in bytes of a fresh process that does nothing but the task.

    Resident memory, or what torch allocated on the GPU where the task uses one.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_watched, task, arguments).result()


def timed_in_child(task: Callable[..., object], *arguments: object, repeats: int) -> tuple[list[Sample], int]:
    """Times of a task in a fresh process, and the peak memory of that process in bytes.

    The first time is that of a user's command: it includes imports and what is compiled when it is first
    called. As many follow as are asked for.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_timed, task, arguments, repeats).result()


def _timed(
    task: Callable[..., object], arguments: tuple[object, ...], repeats: int
) -> tuple[list[Sample], int]:
    samples = []
    for _ in range(repeats + 1):
        clock, processor = time.perf_counter(), time.process_time()
        task(*arguments)
        samples.append(Sample(time.perf_counter() - clock, time.process_time() - processor))
    return samples, peak_memory()


def growth_in_child(prepare: Callable[..., Callable[[], object]], *arguments: object) -> int:
    """Bytes by which a fresh process grows while it runs the task that ``prepare`` makes in it.

    Resident memory at the highest, less what was resident before.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_grown, prepare, arguments).result()


def _grown(prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> int:
    task = prepare(*arguments)
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # the peak begins anew at what is resident now
    before = peak_memory()
    task()
    return peak_memory() - before


def _watched(task: Callable[..., object], arguments: tuple[object, ...]) -> int:
    task(*arguments)
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_memory()


def machine(device: torch.device) -> str:
    """Processor, threads, accelerator and the version of torch, in one line."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor() or platform.machine()
    parts = [f"{processor}, {torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    return ", ".join(parts)


def commit() -> str:
    """Commit of the repository, marked where what is measured differs from it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
