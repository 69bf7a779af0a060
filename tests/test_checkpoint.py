import json
import logging
from pathlib import Path

import pytest
import torch

from knockon.checkpoint import CHECKPOINT, PREVIOUS, Journal, State
from knockon.model import Model
from knockon.types import UserError


class Line(Model):
    """Weights and a buffer, and nothing to do with them."""

    units = "log1p"
    fit_statistics = knows = loss = sample = Model.__init__

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.weight = torch.nn.Parameter(torch.arange(4.0))
        self.register_buffer("seen", torch.tensor(3))


def state(step: int = 0) -> State:
    model, average = Line(), Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    made = State(model, average, optimizer, step=step)
    model.weight.square().sum().backward()
    optimizer.step()
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of step 4, with the one of step 2 beside it."""
    for step in (2, 4):
        state(step).save(tmp_path / CHECKPOINT)
    return tmp_path / CHECKPOINT


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_continued_from(path: Path) -> None:
    found, fresh = state(4), state()
    fresh.model.weight.data.zero_()
    assert fresh.resume(path)
    assert fresh.step == 4
    assert torch.equal(fresh.model.weight, found.model.weight)
    moments, wanted = (one.optimizer.state_dict()["state"][0] for one in (fresh, found))
    assert all(torch.equal(moments[name], wanted[name]) for name in wanted)
    assert not state().resume(path.parent / "elsewhere" / path.name)


def test_no_flipped_bit_goes_unseen(path: Path) -> None:
    (path.with_name(PREVIOUS)).unlink()
    whole = path.read_bytes()
    for at in range(0, len(whole), 31):
        flip(path, at)
        fresh = state()
        with pytest.raises(UserError, match=path.name):
            fresh.resume(path)
        assert fresh.step == 0
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "gone"])
def test_the_checkpoint_before_stands_in_for_a_damaged_one(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if damage == "flipped":
        flip(path, -1)
    elif damage == "gone":  # killed between two renames
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "truncated" else b"")
    fresh = state()
    with caplog.at_level(logging.WARNING, logger="knockon"):
        assert fresh.resume(path)
    assert fresh.step == 2
    assert (str(path) in caplog.text) == (damage != "gone")


@pytest.mark.parametrize("which", ["model", "average"])
def test_weights_that_are_no_numbers_never_replace_a_good_checkpoint(path: Path, which: str) -> None:
    good, bad = path.read_bytes(), state(6)
    getattr(bad, which).weight.data[1] = torch.nan
    with pytest.raises(UserError, match=r"step 6.*lr 0.01.*weight.*state.safetensors is from before") as told:
        bad.save(path)
    assert "--train.lr" in str(told.value)
    assert path.read_bytes() == good


def test_a_loss_that_is_no_number_is_told_with_its_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 3 \(lr 0.1, total nan, mmd 2\); there is no checkpoint"):
        Journal(tmp_path / "log.jsonl", 0).write(3, lr=0.1, total=torch.nan, mmd=2.0)


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    Journal(path, 2).write(3, loss=1.0)
    assert lines(path) == [1, 2, 3]


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "a"}', "\x00", '{"step": ' + "9" * 5000 + "}"])
def test_a_damaged_log_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"line 1 of .*log.jsonl"):
        Journal(path, 2)


def test_a_full_disk_is_told_by_the_log(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl", 0)
    journal.path = Path("/dev/full")
    with pytest.raises(UserError, match=r"Cannot write /dev/full \(No space left on device\)"):
        journal.write(1, loss=1.0)
