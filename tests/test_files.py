import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from safetensors import SafetensorError

from knockon import files
from knockon.files import HERE, alone, from_plain, from_text, read_json, write_json, written_aside
from knockon.types import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ("a", "b")
    pair: tuple[float, float] = (0.9, 1.0)
    kind: Literal["x", "y"] = "x"
    limit: int | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def test_a_dataclass_survives_json(tmp_path: Path) -> None:
    value = Outer(limit=3, notes={"k": "v"})
    write_json(tmp_path / "a.json", dataclasses.asdict(value))
    assert from_plain(Outer, read_json(tmp_path / "a.json"), where="a.json") == value


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "z"}, "kind"),
        ({"inner": {"rate": "fast"}}, "rate"),
        ({"inner": {"rate": 1.0, "more": 2}}, "more"),
        ({"surprise": 1}, "surprise"),
        ({"names": "ab"}, "names"),
        ({"pair": [1.0]}, "pair"),
        ({"limit": True}, "limit"),
        ({"pair": [1.0, 10**400]}, "pair"),
    ],
)
def test_an_edited_file_is_refused_by_name(change: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        from_plain(Outer, dataclasses.asdict(Outer()) | change, where="a.json")


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), written_aside(tmp_path / "a.txt") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_message(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(UserError, match="No space left"), written_aside(target):
        raise OSError(28, "No space left on device")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_an_unwritable_place_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, "9" * 10_000], ids=range(6))
def test_bad_json_is_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "50", 50),
        (float, "50", 50.0),
        (float, "1e-5", 1e-5),
        (bool, "true", True),
        (bool, "False", False),
        (str, "50", "50"),
        (Literal["x", "y"], "y", "y"),
        (tuple[float, ...], "1.5,2", (1.5, 2.0)),
        (tuple[float, ...], "", ()),
        (int | None, "null", None),
    ],
)
def test_text_is_read_as_the_annotated_type(hint: object, text: str, value: object) -> None:
    found = from_text(hint, text, where="x")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "text"),
    [(int, "5.5"), (int, "many"), (float, "nan"), (float, "Infinity"), (float, "1e999"), (bool, "1"),
     (Literal["x", "y"], "z"), (tuple[float, ...], "1,b")],
)  # fmt: skip
def test_text_of_another_type_is_refused_by_name(hint: object, text: str) -> None:
    with pytest.raises(UserError, match="--set steps"):
        from_text(hint, text, where="--set steps")


def left_by(path: Path, process: int, *, machine: str = HERE) -> Path:
    left = path.with_name(f".{path.name}-{machine}-{process}-abcdefgh{path.suffix}")
    left.write_text("half")
    return left


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    ours, of_another = left_by(path, gone.pid), left_by(tmp_path / "b.json", gone.pid)
    write_json(path, {})
    assert not ours.exists()
    assert of_another.exists()


def test_what_may_be_written_at_the_moment_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    alive, elsewhere = left_by(path, os.getppid()), left_by(path, 999_999, machine="0" * 6)
    write_json(path, {})
    assert alive.exists()
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    write_json(path, {})
    assert alive.exists()
    assert not elsewhere.exists()


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(No space left on device\)"), written_aside(tmp_path / "a"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_folder_belongs_to_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    with alone(tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        with pytest.raises(UserError, match=r"Another command is at work in .*b"), alone(tmp_path / "b"):
            pass
        with alone(tmp_path / "c"):
            pass
    with alone(tmp_path / "b"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"), alone(tmp_path / "file" / "x"):
        pass
