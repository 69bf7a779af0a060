"""Ways in which a split can tell training what it is later asked."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt64

from knockon.data.conventions import is_control_name
from knockon.data.screen import Screen
from knockon.data.split_file import Split
from knockon.data.values import EXPRESSED, blocks
from knockon.types import Label

_JOINTS = re.compile(r"[+_|;,/\s]+")


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A held-out condition that training knows, and how.

    Parameters
    ----------
    kind
        What is wrong.
    held, known
        The condition of ``test`` or ``validation``, and the one that gives it away.
    detail
        In plain words.
    """

    kind: Literal["same condition", "reversed names", "alias", "held-out perturbation", "identical cells"]
    held: Label
    known: Label
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.held} is known from {self.known} ({self.detail})"


def audit(split: Split, screen: Screen) -> list[Leak]:
    """Look for test conditions that training or validation knows, and validation ones that training knows.

    Found are: a condition in two parts; reversed names; other spellings of one condition; held-out
    perturbations or levels in training; and cells that occur on both sides.
    """
    found: list[Leak] = []
    for held, known in ((split.test, (*split.train, *split.validation)), (split.validation, split.train)):
        found += _names(held, known)
        found += _identical(held, (*known, *screen.controls), screen)
    return [*found, *_heldout(split)]


def _names(held: Iterable[Label], known: Iterable[Label]) -> Iterator[Leak]:
    spelled: dict[tuple, list[Label]] = defaultdict(list)
    for label in known:
        spelled[_key(label)].append(label)
    for label in held:
        for other in spelled[_key(label)]:
            if other == label:
                yield Leak(
                    kind="same condition", held=label, known=other, detail="it is in two parts of the split"
                )
            elif sorted(_words(label)) == sorted(_words(other)):
                yield Leak(
                    kind="reversed names", held=label, known=other, detail="the same names in another order"
                )
            else:
                yield Leak(kind="alias", held=label, known=other, detail="another spelling of the same names")


def _words(label: Label) -> list[str]:
    """Names of a condition, also those that reading left joined."""
    return [word for name in label.perturbations for word in _JOINTS.split(name) if word]


def _key(label: Label) -> tuple:
    """Make something that is equal for all spellings of a condition."""
    words = sorted(word.lower() for word in _words(label) if not is_control_name(word))
    return tuple(words), tuple(sorted(dose for dose in label.doses if dose)), label.covariates


def _heldout(split: Split) -> Iterator[Leak]:
    for name in split.heldout:
        touched = [label for label in split.test if name in (*label.perturbations, *label.covariates)]
        for label in (*split.train, *split.validation):
            if name in (*label.perturbations, *label.covariates) and touched:
                detail = f"{name} should be unseen"
                yield Leak(kind="held-out perturbation", held=touched[0], known=label, detail=detail)


def _identical(held: Sequence[Label], known: Sequence[Label], screen: Screen) -> Iterator[Leak]:
    """Cells with the same values on both sides; poor cells may be equal by chance and are left out.

    A mark of each held-out cell is in memory, and those of one known condition at a time.
    """
    if not held:
        return
    marks = [_marks(screen, label) for label in held]
    distinct, places = np.unique(np.concatenate([np.zeros(0, np.uint64), *marks]), return_inverse=True)
    owner = np.full(len(distinct), -1)
    for number, label in enumerate(known):
        found = _marks(screen, label)
        at = np.minimum(np.searchsorted(distinct, found), len(distinct) - 1)
        owner[at[distinct[at] == found] if len(distinct) else []] = number
    ends = np.cumsum([len(found) for found in marks])
    for label, own in zip(held, np.split(owner[places], ends[:-1]), strict=True):
        for number, count in Counter(own[own >= 0].tolist()).items():
            detail = f"{count} of {len(screen.rows[label])} cells have the very same values"
            yield Leak(kind="identical cells", held=label, known=known[number], detail=detail)


def _marks(screen: Screen, label: Label) -> UInt64[np.ndarray, "_"]:
    """Find a number for each cell that expresses enough genes, equal where all its values are."""
    marks = [np.zeros(0, np.uint64)]
    rng = np.random.default_rng(0)
    weights = rng.integers(2**63, size=len(screen.genes), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for block in blocks(screen.matrix, screen.rows[label]) if label in screen.rows else ():
        bits = block.data.view(np.uint32).astype(np.uint64) * weights[block.indices]
        sums = np.concatenate([[np.uint64(0)], np.cumsum(bits ^ (bits >> np.uint64(29)), dtype=np.uint64)])
        cells = sums[block.indptr[1:]] - sums[block.indptr[:-1]]
        marks.append(cells[np.diff(block.indptr) >= EXPRESSED])
    return np.concatenate(marks)
