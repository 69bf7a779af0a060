"""Processes side by side. What starts two of them costs seconds, and is among the slow tests."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from knockon import devices, models
from knockon.checkpoint import CHECKPOINT
from knockon.cli import main
from knockon.data import simulate, splits
from knockon.data.sampler import Sampler
from knockon.data.screen import Screen
from knockon.files import digest, read_json, write_json
from knockon.model import Recipe
from knockon.record import LOG, RECORD, WEIGHTS, Record
from knockon.run import Run
from knockon.train import train
from knockon.types import CellSets, Condition, UserError

SHORT = ("--train.steps", "8", "--train.checkpoint-every", "3", "--train.log-every", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    main(["simulate", str(path), "--preset", "tiny"])
    return path


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes of this machine."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    told = [*start, "knockon", *map(str, arguments)]
    return subprocess.run(told, capture_output=True, text=True, check=False, timeout=300)


@contextmanager
def started(*commands: list[str | Path]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a process for each command, side by side, as torchrun does, but leave them to themselves."""
    store, size = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), str(len(commands))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": size}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "knockon", *map(str, command)],
            env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": size},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, command in enumerate(commands)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def training(data: Path, out: Path, *more: str, model: str = "perturbdiff") -> list[str | Path]:
    asked = ["train", model, "--preset", "small", "--data", data, "--split", "additive", "--out", out]
    return [*asked, *SHORT, *more]


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


def same(one: Path, other: Path) -> None:
    """Two runs have the same weights and the same log, but for rounding."""
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    logs = [[json.loads(line) for line in (x / LOG).read_text().splitlines()] for x in (one, other)]
    assert [list(line) for line in logs[0]] == [list(line) for line in logs[1]]
    assert [list(x.values()) for x in logs[0]] == [pytest.approx(list(x.values()), 1e-3) for x in logs[1]]


# ---- one process ------------------------------------------------------------------------------


def test_alone_nothing_is_shared() -> None:
    assert devices.asked() == devices.processes() == 1
    assert devices.is_first()
    assert devices.share([1, 2, 3]) == devices.joined_on_first([1, 2, 3]) == [1, 2, 3]
    assert list(devices.batches(2)) == [0, 1]
    assert devices.on_first(lambda: 3) == 3
    assert devices.mean([{"a": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}]) == {"a": 1.5}


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen.from_anndata(simulate.simulate(simulate.tiny()))
    split = splits.additive(screen)
    start = models.recipe("latent_additive", "small")
    still = dataclasses.replace(start.model, dropout=0.0)  # nothing is drawn in its loss

    def trained(out: str, **changes: int) -> dict[str, Tensor]:
        changes = {"steps": 5, "sets": 3, "cells": 8} | changes
        recipe = Recipe(model=still, train=dataclasses.replace(start.train, clip=0.1, **changes))
        return weights(train(recipe, screen, split, out=tmp_path / out).folder)

    found, plain = trained("parts", accumulate=2), trained("plain")
    original = Sampler.batch

    def both(self: Sampler, step: int, number: int = 0) -> CellSets:
        assert number == 0
        parts = [original(self, step, i) for i in (0, 1)]
        condition = {
            field.name: torch.cat([getattr(part.condition, field.name) for part in parts])
            for field in dataclasses.fields(Condition)
        }
        return CellSets(
            target=torch.cat([part.target for part in parts]),
            control=torch.cat([part.control for part in parts]),
            condition=Condition(**condition),
        )

    monkeypatch.setattr(Sampler, "batch", both)
    wanted = trained("whole")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in wanted.items())


def test_a_record_of_before_is_read(tmp_path: Path) -> None:
    screen = Screen.from_anndata(simulate.simulate(simulate.tiny()))
    run = train("mean_shift", screen, splits.additive(screen), out=tmp_path / "run")
    plain = read_json(run.folder / RECORD)
    assert plain.pop("processes") == 1
    del plain["checksum"]
    del plain["train"]["accumulate"]
    write_json(run.folder / RECORD, plain)
    assert Record.read(run.folder) == run.record


def test_what_runs_alone_is_not_started_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"started in 2.*train, predict or generate"):
        main_of_one()


def main_of_one() -> None:
    with devices.side_by_side(None):
        raise AssertionError


# ---- two processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("perturbdiff", ["--model.dropout-per", "batch"]),  # some steps leave parameters out
        ("scdfm", ["--model.dropout", "0.1"]),
        ("latent_additive", ["--train.accumulate", "2"]),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(
    data: Path, tmp_path: Path, model: str, more: list[str]
) -> None:
    more = [*more, "--train.validate-every", "4", "--train.validate-cells", "16"]
    ended = torchrun(*training(data, tmp_path / "two", *more, model=model))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("after 8 steps") == ended.stderr.count("X holds") == 1
    each = 2 if "--train.accumulate" in more else 1
    alone = [*more, "--train.accumulate", str(2 * each)]
    main([str(x) for x in training(data, tmp_path / "one", *alone, model=model)])
    same(tmp_path / "two", tmp_path / "one")
    assert Record.read(tmp_path / "two").processes == 2
    main([str(x) for x in training(data, tmp_path / "half", *more, model=model)])
    pairs = zip(weights(tmp_path / "half").values(), weights(tmp_path / "one").values(), strict=True)
    assert not all(torch.allclose(x, y, atol=1e-4) for x, y in pairs)
    if model == "latent_additive":
        return
    # Prediction shares the conditions, and makes the same cells, but for rounding by several threads.
    for starts, name in ((torchrun, "two"), (lambda *x: main([str(y) for y in x]), "one")):
        asked = ["predict", tmp_path / "two", "--part", "test", "--cells", "100"]
        starts(*asked, "--out", tmp_path / f"{name}.h5ad")
    one, two = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    np.testing.assert_allclose(one.X.toarray(), two.X.toarray(), rtol=1e-5, atol=1e-6)
    assert one.obs.equals(two.obs)


@pytest.mark.slow
def test_generation_shares_the_cells(data: Path, tmp_path: Path) -> None:
    ended = torchrun(*training(data, tmp_path / "run", "--layer", "counts", model="scldm"))
    assert ended.returncode == 0, ended.stderr
    asked = ["generate", str(tmp_path / "run"), "--cells", "600", "--out"]
    assert torchrun(*asked, tmp_path / "two.h5ad").returncode == 0
    main([*asked, str(tmp_path / "one.h5ad")])
    one, two = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    assert (one.X != two.X).nnz == 0
    assert one.obs.equals(two.obs)
    assert len(two) == 600


LONG = ("--train.steps", "40", "--timeout", ".1")


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert torchrun(*training(data, folder, *LONG)).returncode == 0
    return folder


def until_logged(log: Path) -> None:
    """Wait until some steps are done."""
    end = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert time.monotonic() < end
        time.sleep(0.02)


def lose(command: list[str | Path], fault: signal.Signals) -> None:
    """Send a signal to one of two processes in the midst of training."""
    log = Path(command[command.index("--out") + 1]) / LOG
    with started(command, command) as (survivor, lost):
        until_logged(log)
        lost.send_signal(fault)
        _, said = survivor.communicate(timeout=180)
    assert survivor.returncode == 2
    assert said.count("knockon: One of 2 processes ended or did not answer") == 1
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_others_and_nothing_is_lost(
    data: Path, whole: Path, tmp_path: Path, strategy: str
) -> None:
    command = training(data, tmp_path / "run", *LONG, "--strategy", strategy)
    lose(command, signal.SIGKILL)
    assert not Record.read(tmp_path / "run").finished
    resumed = torchrun(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("Continuing") == 1
    assert digest(tmp_path / "run" / WEIGHTS) == digest(whole / WEIGHTS)
    assert (tmp_path / "run" / LOG).read_text() == (whole / LOG).read_text()
    assert Run.load(tmp_path / "run").record.processes == 2


@pytest.mark.slow
def test_a_run_continues_with_other_processes_on_as_many_batches(
    data: Path, whole: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    command = training(data, tmp_path, *LONG)
    lose(command, signal.SIGSTOP)
    said = refused(*command)
    assert "differs from this one: batches" in said
    assert "processes x --train.accumulate = 2" in said
    main([str(x) for x in (*command, "--train.accumulate", "2")])
    same(tmp_path, whole)


@pytest.mark.slow
def test_an_end_that_one_process_is_asked_for_is_that_of_all(data: Path, tmp_path: Path) -> None:
    command = training(data, tmp_path, "--train.steps", "100000")
    with started(command, command) as processes:
        until_logged(tmp_path / LOG)
        processes[1].send_signal(signal.SIGTERM)
        said = "".join(process.communicate(timeout=180)[1] for process in processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    assert said.count("stopped at step") == said.count("continues where it left off") == 1
    assert (tmp_path / CHECKPOINT).exists()


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_message(data: Path, tmp_path: Path) -> None:
    mistakes = {
        "Unrecognized options: --nope": training(data, tmp_path / "x", "--nope"),
        "runs in one process only": training(data, tmp_path / "x", "--dry-run"),
    }
    for message, command in mistakes.items():
        ended = torchrun(*command)
        assert ended.returncode
        assert ended.stderr.count(message) == 1, ended.stderr
    right, wrong = (training(x, tmp_path / "x", "--timeout", "1") for x in (data, Path("nope.h5ad")))
    for pair in ((right, wrong), (wrong, right)):
        with started(*pair) as processes:
            said = [process.communicate(timeout=180)[1] for process in processes]
        assert [process.returncode for process in processes] == [2, 2]
        assert "".join(said).count("knockon: ") == "".join(said).count("No such file: nope.h5ad") == 1, said
