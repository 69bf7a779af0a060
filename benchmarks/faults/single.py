"""Faults one by one: a full disk, exhausted memory, flipped bits, a loss that is no number, signals."""

import argparse
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.faults.commands import (
    COMMANDS,
    TRAINING,
    Command,
    contents,
    fresh,
    is_broken,
    leftovers,
    visible,
)
from benchmarks.faults.process import Child, Exit, finish, limit_files, limit_memory, run
from knockon.checkpoint import CHECKPOINT, PREVIOUS

SHARES = (0.05, 0.4, 0.9)
"""Of the space that a command needs, what there is."""
MEBIBYTES = (1, 3, 10, 40)
"""Address space beyond what the imports use."""
PAGE = 4096
"""Bytes that a file system in memory hands out at least."""
OURS = "knockon: "
"""How a message begins."""


def disk(base: Path, work: Path, _: argparse.Namespace) -> str:
    """Give every command a disk that is too small, then a larger one."""
    rows = []
    for command in COMMANDS:
        whole = _undisturbed(command, base, work)
        wanted = contents(whole, command.loose)
        size = sum(path.stat().st_size for path in visible(whole))
        told, left, broken, same = Counter[str](), 0, 0, 0
        for share in SHARES:
            with _Disk(work / "disk", max(2 * PAGE, int(share * size))) as small:
                ended = run(command.at(base, small.folder), work / "log", small.limit)
                told[_verdict(ended, str(small.folder))] += 1
                left += len(leftovers(small.folder))
                broken += is_broken(small.folder)
                small.grow()
                finish(command.at(base, small.folder), work / "log")
                same += contents(small.folder, command.loose) == wanted
        rows.append((command.name, _counted(told), left, broken, f"{same} of {len(SHARES)}"))
    head = (
        "full disk",
        "ended with",
        "temporary files",
        "half-written files",
        "identical once there is space",
    )
    return _table(head, rows)


def memory(base: Path, work: Path, _: argparse.Namespace) -> str:
    """Limit the address space of commands that compute, then leave it alone."""
    rows = []
    for command in COMMANDS:
        wanted = contents(_undisturbed(command, base, work), command.loose)
        told, same = Counter[str](), 0
        for mebibytes in MEBIBYTES:
            out = fresh(work / "out")
            ended = run(command.at(base, out), work / "log", limit_memory(mebibytes))
            told[_verdict(ended, "emory")] += 1
            finish(command.at(base, out), work / "log")
            same += contents(out, command.loose) == wanted
        rows.append((command.name, _counted(told), f"{same} of {len(MEBIBYTES)}"))
    return _table(("exhausted memory", "ended with", "identical with more"), rows)


def bits(base: Path, work: Path, options: argparse.Namespace) -> str:
    """Flip bits of files that commands read, one at a time."""
    predict = next(one for one in COMMANDS if one.name == "predict")
    evaluate = next(one for one in COMMANDS if one.name == "evaluate")
    train = next(one for one in COMMANDS if one.name == "train latent_additive")
    report = next(one for one in COMMANDS if one.name == "report")
    stored = next(one for one in COMMANDS if one.name == "train from a store")
    largest = max(visible(base / "store"), key=lambda path: path.stat().st_size)
    rows = []
    for path, command in (
        ("store/knockon.json", stored),
        (str(largest.relative_to(base)), stored),
        *(
            (f"run/{name}", predict)
            for name in ("weights.safetensors", "run.json", "spec.json", "split.json")
        ),
        ("screen.h5ad", predict),
        ("split.json", train),
        ("pred.h5ad", evaluate),
        ("scores/scores.csv", report),
        ("scores/portraits/truth.npz", report),
    ):
        wanted = contents(_undisturbed(command, base, work), command.loose)
        told = Counter[str]()
        for at in np.random.default_rng(options.seed).random(options.flips):
            with _flipped(base / path, at):
                out = fresh(work / "out")
                ended = run(command.at(base, out), work / "log")
                if ended.status == 0:
                    told[
                        "identical" if contents(out, command.loose) == wanted else "DIFFERENT, UNNOTICED"
                    ] += 1
                else:
                    told[_verdict(ended, f"{base / path}")] += 1
        rows.append((path, command.name, _counted(told)))
    rows.append(_checkpoint_bits(base, work, options, train))
    return _table(("a flipped bit in", "read by", "ended with"), rows)


def _checkpoint_bits(base: Path, work: Path, options: argparse.Namespace, train: Command) -> tuple[str, ...]:
    wanted = contents(_undisturbed(train, base, work), train.loose)
    told = Counter[str]()
    for at in np.random.default_rng(options.seed).random(options.flips):
        out = _killed(train, base, work)
        with _flipped(next(out.rglob(CHECKPOINT.name)), at):
            ended = run(train.at(base, out), work / "log")
        named = CHECKPOINT.name in ended.message and ended.status == 0
        same = contents(out, train.loose) == wanted
        told["named, continued from the one before, identical" if named and same else "DIFFERENT"] += 1
        if not (named and same):
            print(ended, flush=True)
    return "run/checkpoint/state.safetensors", train.name, _counted(told)


def _killed(train: Command, base: Path, work: Path) -> Path:
    """Kill training when there are two checkpoints; again, where the last was just being put in its place."""
    while True:
        out = fresh(work / "out")
        child = Child.start(train.at(base, out), work / "log")
        child.until(lambda out=out: bool([*out.rglob(PREVIOUS)]))
        child.kill_after(0)
        if [*out.rglob(CHECKPOINT.name)]:
            return out


def other(base: Path, work: Path, _: argparse.Namespace) -> str:
    """Let a loss become no number, and ask training to end."""
    line = f"train latent_additive --data {base}/screen.h5ad --out {work}/out/run {TRAINING}"
    rows = []
    fresh(work / "out")
    ended = run([*line.split(), "--train.lr", "1e30", "--train.checkpoint-every", "1"], work / "log")
    kept = not (work / "out/run/weights.safetensors").exists()
    rows.append(("a loss that is no number", _verdict(ended, "step"), f"no weights were written: {kept}"))
    train = next(one for one in COMMANDS if one.name == "train latent_additive")
    whole = _undisturbed(train, base, work)
    wanted = contents(whole)
    for number in (signal.SIGTERM, signal.SIGINT):
        out = fresh(work / "out")
        child = Child.start(train.at(base, out), work / "log")
        log = out / "run" / "log.jsonl"
        child.until(lambda log=log: log.exists() and bool(log.stat().st_size))
        ended = child.kill_after(0, number)
        finish(train.at(base, out), work / "log")
        same = contents(out) == wanted
        told = (
            "killed" if ended is None else f"status {ended.status}: {ended.message.strip().splitlines()[-1]}"
        )
        rows.append((number.name, told, f"identical when continued: {same}"))
    return _table(("fault", "ended with", "and then"), rows)


def _verdict(ended: Exit, named: str) -> str:
    """Put an end into words."""
    if ended.status == 0:
        return "success"
    clean = OURS in ended.message and "Traceback" not in ended.message and ended.status == 2
    if clean:
        return "message" if named in ended.message else "message that does not name it"
    print(f"-- status {ended.status}:\n{ended.message[-3000:]}", flush=True)
    return f"STATUS {ended.status}"


def _undisturbed(command: Command, base: Path, work: Path) -> Path:
    out = fresh(work / "whole")
    finish(command.at(base, out), work / "log")
    return out


class _Disk:
    """A small file system in memory; without the rights to mount one, a limit to the size of each file."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = fresh(folder)
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        self.mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
        self.limit: Callable[[], None] = (lambda: None) if self.mounted else limit_files(size)

    def grow(self) -> None:
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(self.folder)], check=True)

    def __enter__(self) -> "_Disk":
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


class _flipped:  # noqa: N801 (reads as what it does)
    """One bit of a file is another, as long as it lasts."""

    def __init__(self, path: Path, at: float) -> None:
        self.path, self.before = path, path.read_bytes()
        changed = bytearray(self.before)
        place = int(at * 8 * len(changed))
        changed[place // 8] ^= 1 << place % 8
        self.after = bytes(changed)

    def __enter__(self) -> None:
        self.path.write_bytes(self.after)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.before)


def _counted(told: Counter[str]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in told.most_common())


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(value) for value in line) + " |" for line in lines)


PARTS: Mapping[str, Callable[[Path, Path, argparse.Namespace], str]] = {
    "disk": disk,
    "memory": memory,
    "bits": bits,
    "other": other,
}
