import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from knockon import devices, files, models, validate
from knockon.checkpoint import CHECKPOINT
from knockon.cli import main
from knockon.data import simulate, splits
from knockon.data.screen import Screen
from knockon.data.splits import Split
from knockon.files import digest
from knockon.interrupt import Ended
from knockon.model import Losses, Model, Recipe, Training
from knockon.record import LOG, WEIGHTS
from knockon.run import Run
from knockon.train import Options, decay, learning_rate, train
from knockon.types import CellSets, UserError


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()))


@pytest.fixture(scope="module")
def split(screen: Screen) -> Split:
    return splits.additive(screen)


def recipe(name: str = "latent_additive", preset: str = "default", **changes: object) -> Recipe:
    """A short training with dropout, an average and validation: all that resuming could get wrong."""
    start = models.recipe(name, preset)
    short = {"steps": 6, "cells": 8, "ema": 0.9, "clip": 1.0, "log_every": 1, "checkpoint_every": 2}
    training = short | {"validate_every": 2, "validate_cells": 8} | changes
    return Recipe(
        model=dataclasses.replace(start.model, dropout=0.1),
        train=dataclasses.replace(start.train, **training),
    )


def test_learning_rate_follows_the_published_cosine() -> None:
    training = Training(steps=20, lr=5e-5, final_lr=1e-6)
    assert learning_rate(0, training) == pytest.approx(5e-5)
    assert learning_rate(10, training) == pytest.approx((5e-5 + 1e-6) / 2)
    assert learning_rate(20, training) == pytest.approx(1e-6)


def test_learning_rate_agrees_with_the_released_schedule(shared: Path) -> None:
    with np.load(shared / "parity" / "scdfm.npz") as parity:
        training = Training(
            steps=int(parity["schedule/steps"]),
            lr=float(parity["schedule/lr_max"]),
            final_lr=float(parity["schedule/lr_min"]),
        )
        rates = [learning_rate(step, training) for step in range(len(parity["schedule/lr"]))]
        np.testing.assert_allclose(rates, parity["schedule/lr"], rtol=1e-9)


def test_warm_up_rises_to_the_top() -> None:
    training = Training(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(step, training) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_plateau_comes_before_a_cosine_that_does_not_fall_below_its_floor() -> None:
    training = Training(steps=100, lr=1.0, final_lr=0.1, warmup=10, plateau=0.2, schedule="floored_cosine")
    rates = [learning_rate(step, training) for step in range(100)]
    assert rates[9:31] == [1.0] * 22
    assert rates[65] == pytest.approx(0.5)
    assert rates[99] == 0.1
    assert learning_rate(50, dataclasses.replace(training, schedule="constant")) == 1.0


def test_an_average_forgets_its_beginning() -> None:
    ramped, copied = Training(ema=0.9), Training(ema=0.9, ema_every=5, ema_ramp="none")
    assert [decay(step, ramped) for step in (0, 5, 1000)] == [0.1, 0.4, 0.9]
    assert [decay(step, copied) for step in (0, 1, 5)] == [0.0, 1.0, 0.9]


class Stop(Exception):
    """What kills a training run in these tests."""


@pytest.mark.parametrize(
    ("name", "preset", "stop"),
    [
        ("latent_additive", "default", 1),
        ("latent_additive", "default", 5),
        pytest.param("scdfm", "small", 3, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_continues_to_the_same_bits(
    screen: Screen,
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    preset: str,
    stop: int,
) -> None:
    asked = recipe(name, preset)
    whole = train(asked, screen, split, out=tmp_path / "whole")
    kill_after(monkeypatch, type(whole.model), stop)
    with pytest.raises(Stop):
        train(asked, screen, split, out=tmp_path / "parts")
    monkeypatch.undo()
    assert (tmp_path / "parts" / CHECKPOINT).exists() == (stop >= 2)
    parts = train(asked, screen, split, out=tmp_path / "parts")
    assert digest(parts.folder / WEIGHTS) == digest(whole.folder / WEIGHTS)
    assert (parts.folder / LOG).read_text() == (whole.folder / LOG).read_text()


def kill_after(monkeypatch: pytest.MonkeyPatch, kind: type[Model], steps: int) -> None:
    original, count = kind.loss, iter(range(steps))

    def loss(self: Model, batch: CellSets, rng: torch.Generator) -> Losses:
        if next(count, None) is None:
            raise Stop
        return original(self, batch, rng)

    monkeypatch.setattr(kind, "loss", loss)


def test_two_commands_do_not_train_in_one_folder(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = models.load("latent_additive").LatentAdditive
    original = kind.loss
    monkeypatch.setattr(files, "PATIENCE", 0.0)

    def loss(self: Model, batch: CellSets, rng: torch.Generator) -> Losses:
        with pytest.raises(UserError, match=r"Another command is at work in .*run.*--out"):
            train(recipe(), screen, split, out=tmp_path / "run")
        return original(self, batch, rng)

    monkeypatch.setattr(kind, "loss", loss)
    assert train(recipe(), screen, split, out=tmp_path / "run").record.finished


def test_what_another_command_made_meanwhile_is_neither_mixed_nor_done_again(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, others = devices.alone, iter([splits.random(screen), split])

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        monkeypatch.undo()
        train("no_effect", screen, next(others), out=folder)
        written = (folder / WEIGHTS).stat().st_mtime_ns
        with alone(folder):
            yield
        assert (folder / WEIGHTS).stat().st_mtime_ns == written

    monkeypatch.setattr(devices, "alone", late)
    with pytest.raises(UserError, match="differs from this one: split"):
        train("no_effect", screen, split, out=tmp_path / "other")
    monkeypatch.setattr(devices, "alone", late)
    assert train("no_effect", screen, split, out=tmp_path / "same").record.finished


def test_a_run_that_is_asked_to_end_loses_nothing(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Slurm asks, before it takes the machine back."""
    asked = recipe(checkpoint_every=0)
    whole = train(asked, screen, split, out=tmp_path / "whole")
    original, count = type(whole.model).loss, iter(range(100))

    def loss(self: Model, batch: CellSets, rng: torch.Generator) -> Losses:
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, rng)

    monkeypatch.setattr(type(whole.model), "loss", loss)
    with pytest.raises(Ended, match="stopped at step 3 of 6"):
        train(asked, screen, split, out=tmp_path / "parts")
    parts = train(asked, screen, split, out=tmp_path / "parts")
    assert next(count) == 6, "no step was done twice"
    assert digest(parts.folder / WEIGHTS) == digest(whole.folder / WEIGHTS)


def test_who_asks_while_processes_agree_is_heard_at_the_next_step(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, highest = iter(range(100)), devices.highest

    def agree(number: int) -> int:
        found = highest(number)
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(devices, "highest", agree)
    with pytest.raises(Ended, match="stopped at step 4 of 6"):
        train(recipe(checkpoint_every=0), screen, split, out=tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT).exists()


@pytest.mark.parametrize("name", ["sets", "cells", "accumulate"])
def test_batches_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"--train.{name} 0.*at least 1"):
        recipe(**{name: 0})


@pytest.mark.parametrize("at", [3, 6])
def test_weights_that_are_no_numbers_are_not_kept(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """After the last step no loss tells of them."""
    asked = recipe(log_every=100, validate_every=0)
    kind, count = type(train(asked, screen, split, out=tmp_path / "good").model), iter(range(1, 100))
    original = kind.loss

    def loss(self: Model, batch: CellSets, rng: torch.Generator) -> Losses:
        losses = original(self, batch, rng)
        broken = losses["total"] * torch.tensor(torch.inf) if next(count) == at else 0.0
        return losses | {"total": losses["total"] + (broken - broken if at == 6 else broken)}

    monkeypatch.setattr(kind, "loss", loss)
    with pytest.raises(UserError, match=rf"diverged by step {4 if at == 3 else 6} .*(weights|total)"):
        train(asked, screen, split, out=tmp_path / "bad")
    assert not (tmp_path / "bad" / WEIGHTS).exists()
    with safetensors.safe_open(tmp_path / "bad" / CHECKPOINT, framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bits(tmp_path: Path) -> None:
    """kill -9 in the middle of training, from outside."""
    main(["simulate", f"{tmp_path}/tiny.h5ad", "--preset", "tiny"])
    command = [sys.executable, "-m", "knockon", "train", "latent_additive", "--data", f"{tmp_path}/tiny.h5ad"]
    command += ["--train.steps", "600", "--train.checkpoint-every", "50", "--device", "cpu"]
    subprocess.run([*command, "--out", f"{tmp_path}/whole"], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", f"{tmp_path}/parts"], stderr=subprocess.DEVNULL)
    while not (tmp_path / "parts" / CHECKPOINT).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    subprocess.run([*command, "--out", f"{tmp_path}/parts"], check=True, capture_output=True)
    assert digest(tmp_path / "parts" / WEIGHTS) == digest(tmp_path / "whole" / WEIGHTS)


def test_the_seed_decides(screen: Screen, split: Split, tmp_path: Path) -> None:
    runs = [
        train(recipe(seed=seed), screen, split, out=tmp_path / name) for name, seed in (("a", 1), ("b", 2))
    ]
    first, second = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    assert not torch.equal(first, second)


def test_training_leaves_the_global_generator_alone(screen: Screen, split: Split, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(recipe(), screen, split, out=tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_patience_stops_and_the_best_weights_are_kept(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 1.0, 2.0, 1.5, 0.0])
    monkeypatch.setattr(validate, "score_by", lambda *_: lambda _: next(scores))
    stopped = train(
        recipe(steps=40, patience=2, schedule="constant"), screen, split, out=tmp_path / "stopped"
    )
    lines = [json.loads(line) for line in (stopped.folder / LOG).read_text().splitlines()]
    assert stopped.record.steps == 8
    assert [line["validation"] for line in lines if "validation" in line] == [3.0, 1.0, 2.0, 1.5]
    best = train(recipe(steps=4, validate_every=0, schedule="constant"), screen, split, out=tmp_path / "best")
    assert digest(stopped.folder / WEIGHTS) == digest(best.folder / WEIGHTS)


def test_a_finished_run_is_not_trained_again(screen: Screen, split: Split, tmp_path: Path) -> None:
    first = train("additive", screen, split, out=tmp_path / "run")
    changed = (first.folder / WEIGHTS).stat().st_mtime_ns
    train("additive", screen, split, out=tmp_path / "run")
    assert (first.folder / WEIGHTS).stat().st_mtime_ns == changed


def test_the_same_screen_may_lie_elsewhere(screen: Screen, split: Split, tmp_path: Path) -> None:
    train("no_effect", dataclasses.replace(screen, source="before.h5ad"), split, out=tmp_path / "run")
    moved = dataclasses.replace(screen, source="now.h5ad")
    assert train("no_effect", moved, split, out=tmp_path / "run").record.finished


@pytest.mark.parametrize("change", [{"seed": 5}, {"steps": 7}])
def test_another_run_in_the_folder_is_refused(
    screen: Screen, split: Split, tmp_path: Path, change: dict
) -> None:
    train(recipe(), screen, split, out=tmp_path / "run")
    with pytest.raises(UserError, match="differs from this one: train"):
        train(recipe(**change), screen, split, out=tmp_path / "run")
    with pytest.raises(UserError, match="split"):
        train(recipe(), screen, splits.random(screen, seed=1), out=tmp_path / "run")


def test_divergence_is_a_message(screen: Screen, split: Split, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diverged by step"):
        train(
            recipe(steps=200, lr=1e9, clip=0.0, ema=0.0, validate_every=0, schedule="constant"),
            screen,
            split,
            out=tmp_path / "run",
        )


def test_precision_is_that_of_the_products_in_the_loss(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = {"bf16": recipe(precision="bf16", steps=1), "float32": recipe(steps=1)}, {}
    kind = type(asked["bf16"].model.build(screen.spec()))
    original = kind.loss

    def loss(self: Model, batch: CellSets, rng: torch.Generator) -> Losses:
        seen.append(torch.nn.functional.linear(batch.target, batch.target[0]).dtype)
        return original(self, batch, rng)

    monkeypatch.setattr(kind, "loss", loss)
    for name, one in asked.items():
        seen: list[torch.dtype] = []
        train(one, screen, split, out=tmp_path / name)
        (found[name],) = seen
    assert found == {"bf16": torch.bfloat16, "float32": torch.float32}


def test_bf16_and_averages_train(screen: Screen, split: Split, tmp_path: Path) -> None:
    run = train(recipe(precision="bf16", steps=2), screen, split, out=tmp_path / "run")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in run.model.parameters())


def test_an_unwritable_folder_is_a_message(screen: Screen, split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        train("no_effect", screen, split, out=tmp_path / "file" / "run")


def test_test_cells_are_out_of_reach(
    screen: Screen, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in the rows of test conditions, the run is the same."""
    spoiled = screen.matrix.copy()
    rows = np.concatenate([screen.rows[label] for label in split.test])
    for row in rows:
        spoiled.data[spoiled.indptr[row] : spoiled.indptr[row + 1]] = 3.0
    other = dataclasses.replace(screen, matrix=spoiled)
    short = recipe("scdfm", "small", steps=2, validate_every=0)
    asked: list[tuple[str | Recipe, Options]] = [
        (name, Options()) for name in ("additive", "linear", "nearest")
    ]
    for model, options in [*asked, (short, Options(genes=40))]:
        a = train(model, screen, split, out=tmp_path / f"a{len(list(tmp_path.iterdir()))}", options=options)
        b = train(model, other, split, out=tmp_path / f"b{len(list(tmp_path.iterdir()))}", options=options)
        assert a.record.preparation == b.record.preparation
        assert digest(a.folder / WEIGHTS) == digest(b.folder / WEIGHTS)


def test_vectors_reach_the_model_and_the_folder(screen: Screen, split: Split, tmp_path: Path) -> None:
    names = sorted({name for label in screen.vocabulary for name in label.perturbations})
    lines = [f"{name},{i},{i * i}" for i, name in enumerate([*names, "UNSEEN"])]
    table = tmp_path / "vectors.csv"
    table.write_text("name,a,b\n" + "\n".join(lines) + "\n")
    quick = recipe(steps=2, validate_every=0)
    run = train(quick, screen, split, out=tmp_path / "run", options=Options(vectors=table))
    assert run.predict(["UNSEEN"], cells=2).n_obs > 2
    assert Run.load(run.folder, screen=screen).model.spec.vectors is not None
    table.write_text("name,a,b\nKLF1,1,2\n")
    with pytest.raises(UserError, match=f"No perturbation of the screen has a vector: {names[0]}"):
        train(quick, screen, split, out=tmp_path / "other", options=Options(vectors=table))
    with pytest.raises(UserError, match="differs from this one: vectors"):
        table.write_text("name,a,b\n" + "\n".join(lines) + "\nMORE,1,2\n")
        train(quick, screen, split, out=tmp_path / "run", options=Options(vectors=table))


def test_a_run_in_python_predicts_at_once(screen: Screen, split: Split, tmp_path: Path) -> None:
    run = train("no_effect", screen, split, out=tmp_path / "run")
    assert isinstance(run, Run)
    assert run.predict("test", cells=3).n_obs > 3
