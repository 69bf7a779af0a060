"""Files that appear whole or not at all, folders of one command at a time, and JSON that is checked."""

import dataclasses
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import time
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from knockon.types import UserError

T = TypeVar("T")

HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
"""Stands for this machine in the names of temporary files."""
ABANDONED = 24 * 3600.0
"""Seconds after which a temporary file that nothing was written to is nobody's, whatever machine it is of."""
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What a disk refuses a write with."""
LOCK = ".lock"
"""In a folder that one command at a time writes to. It stays; what counts is who holds it."""
PATIENCE = 3.0
"""Seconds that a command waits for a folder: processes of one that was killed take a moment to notice."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, and rename it to ``path`` when all went well.

    What a process that was killed left behind while it wrote the same file is removed.

    Raises
    ------
    UserError
        If the folder cannot be written to, or the disk is full; nothing is left behind.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        mark = f"{_prefix(path)}{HERE}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=mark, suffix=path.suffix)
        os.close(handle)
        aside = Path(name)
        yield aside
        aside.chmod(0o644)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        if aside is not None:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> UserError:
    """Say that a file cannot be written, and why."""
    known = [os.strerror(number) for number in OF_THE_DISK if os.strerror(number) in str(error)]
    return UserError(
        f"Cannot write {path} ({(known or [getattr(error, 'strerror', None) or error])[0]})",
        expected="a folder that can be written to, with space on its disk",
        mend="choose another place with --out, or free some space; then give the same command again",
    )


def _prefix(path: Path) -> str:
    """Begin the names of the temporary files of a path; those of no other path begin so."""
    return f".{path.name[:100]}-"


def _sweep(path: Path) -> None:
    """Remove temporary files of a path whose process is gone."""
    prefix = _prefix(path)
    for left in path.parent.glob(f"{glob.escape(prefix)}*{glob.escape(path.suffix)}"):
        rest = left.name.removeprefix(prefix).removesuffix(path.suffix)
        told = re.fullmatch(r"([0-9a-f]{6})-(\d+)-[^-]*", rest)
        if told is None:
            continue
        with suppress(OSError):  # somebody else was faster
            of_the_dead = told[1] == HERE and not psutil.pid_exists(int(told[2]))
            if of_the_dead or time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


@contextmanager
def alone(*folders: Path) -> Iterator[None]:
    """Keep other commands out of folders; who was killed holds nothing any more.

    Raises
    ------
    UserError
        If another command is at work in one of them, or it cannot be written to.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(folder / LOCK, timeout=PATIENCE))
            except Timeout as error:
                raise UserError(
                    f"Another command is at work in {folder}",
                    mend="wait for its end, or choose another --out",
                ) from error
            except OSError as error:
                raise UserError(
                    f"Cannot write {folder} ({error.strerror or error})",
                    expected="a folder that can be written to",
                    mend="choose another place with --out",
                ) from error
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    UserError
        If the file is missing, is no JSON, or holds anything but an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}", mend="check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read {path} ({error})", expected="a JSON file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    return value


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_plain(kind: type[T], value: Mapping[str, Any], *, where: str) -> T:
    """Rebuild a dataclass from ``dataclasses.asdict`` after a trip through JSON.

    Parameters
    ----------
    kind
        A dataclass whose fields are plain values, tuples of them, or dataclasses.
    value
        As read from a file; every field must be there and nothing else.
    where
        Named in errors, such as ``"runs/x/run.json, config"``.

    Raises
    ------
    UserError
        If a field is missing, unknown or of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    wanted = {f.name for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    strange = sorted(set(value) ^ wanted)
    if strange:
        raise UserError(
            f"Missing or unknown fields in {where}",
            offenders=strange,
            expected="an unedited file of this version of knockon",
        )
    return kind(**{name: typed(hints[name], item, where=f"{where}.{name}") for name, item in value.items()})


def from_text(hint: Any, text: str, *, where: str) -> Any:
    """Read a value of the annotated type from the text that a person writes.

    Numbers, words, ``true`` and ``false``; values of a tuple are joined with commas.

    Raises
    ------
    UserError
        If it is of another type.
    """
    if hint is str:
        return text
    if typing.get_origin(hint) is tuple:
        return typed(hint, [_plain(piece) for piece in text.split(",") if piece], where=where)
    return typed(hint, _plain(text), where=where)


def _plain(text: str) -> Any:
    """Take a text for what JSON does, where that is finite; else for itself."""
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value


def typed(hint: Any, value: Any, *, where: str) -> Any:
    """``value`` as the annotated type, where JSON has fewer types than Python.

    Raises
    ------
    UserError
        If it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        found = from_plain(typing.cast(type, hint), value, where=where)
    elif origin in (typing.Union, types.UnionType):
        found = (
            None
            if value is None
            else typed(next(a for a in arguments if a is not type(None)), value, where=where)
        )
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        _require(len(kinds) == len(value), value, f"{len(kinds)} values", where)
        found = tuple(typed(kind, item, where=where) for kind, item in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        found = {str(key): typed(arguments[1], item, where=f"{where}.{key}") for key, item in value.items()}
    elif origin is typing.Literal:
        _require(value in arguments, value, " or ".join(map(str, arguments)), where)
        found = value
    else:
        whole = hint is float and type(value) is int and abs(value) < 2**1023  # none larger is a float
        found = float(value) if whole else value
        _require(type(found) is hint, value, str(getattr(hint, "__name__", hint)), where)
    return found


def _require(fits: bool, value: object, expected: str, where: str) -> None:  # noqa: FBT001
    if not fits:
        raise UserError(f"{where} is {value!r}", expected=expected)
