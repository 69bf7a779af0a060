"""Files as a stranger, a bad disk or a broken download may hand them over, made from good ones."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

WEIRD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 1e308, float("nan"), float("inf"), "", "\x00", "9" * 5000, "A+B+C+D"),
    *("../../etc/passwd", "/etc/passwd", "\U0001f600<script>alert(1)</script>", "__import__('os')"),
    *([], {}, [[]], [None], {"a": 1}, ["x"] * 3, [{"perturbation": None}]),
)
"""Values that a JSON file may hold where something else belongs."""


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Flip a bit, cut off, insert, overwrite or remove some bytes."""
    at, some = int(random.integers(len(content))), random.bytes(int(random.integers(1, 16)))
    return (
        content[:at] + bytes([content[at] ^ 1 << int(random.integers(8))]) + content[at + 1 :],
        content[:at],
        content[:at] + some + content[at:],
        content[:at] + b"\xff" * 8 + content[at + 8 :],
        content[:at] + content[at + len(some) :],
    )[int(random.integers(5))]


def altered(value: Any, random: np.random.Generator) -> Any:
    """Replace one part of a JSON value by something weird, or remove it."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    where, key = places[int(random.integers(len(places)))]
    if isinstance(where, dict) and random.random() < 0.2:
        del where[key]
    else:
        where[key] = copy.deepcopy(WEIRD[int(random.integers(len(WEIRD)))])
    return value


def variants(content: bytes, count: int, *, is_json: bool = False, seed: int = 0) -> Iterator[bytes]:
    """Damaged and altered files, the same each time for a seed."""
    random = np.random.default_rng(seed)
    for turn in range(count):
        yield (
            json.dumps(altered(json.loads(content), random)).encode()
            if is_json and turn % 2
            else damaged(content, random)
        )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Containers and keys, of lists only the first."""
    for key in list(value) if isinstance(value, dict) else range(min(len(value), 2)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])
