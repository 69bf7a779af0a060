"""The manifest of a prepared screen: all that is known of it but the values, and a mark of every file.

It is written last, so that a folder without one is unfinished, and checked whenever it is read.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from knockon.data.chunks import Sizes, damaged
from knockon.data.conventions import Columns
from knockon.files import digest, from_plain, read_json, write_text
from knockon.types import Covariate, Label, Units, UserError

MANIFEST = "knockon.json"
ASIDE = ".prepare"
"""Folder in an unfinished store with what is sorted already."""
FORMAT = 1
MOST = 2**48
"""Cells, and values, that no store reaches: a thousand terabytes."""

Genes = Literal["same", "shared"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file that a store was made of."""

    name: str
    size: int
    digest: str
    """SHA-256 of its content."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a store is made of, and how: equal plans give equal stores, byte by byte."""

    inputs: tuple[Input, ...]
    columns: Columns
    genes: Genes
    plate_key: str | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Rows of a condition, which follow each other in random order."""

    label: Label
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How the files write a combination."""

    label: Label
    text: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is known of a prepared screen; see ``Screen`` for what is not explained.

    Parameters
    ----------
    format
        Version of the layout.
    plan
        What it was made of.
    genes, units, total, dose_unit, covariates, digest, notes
        Of the screen; the digest is that of the input files, one after another.
    stretches
        Conditions in the order of ``Screen.rows``.
    spellings
        Of combinations.
    values
        Stored ones.
    largest
        Of the values.
    sizes
        How they are parted into files.
    files
        SHA-256 of every other file of the folder, by its path.
    """

    plan: Plan
    genes: tuple[str, ...]
    units: Units
    total: float | None
    dose_unit: str | None
    covariates: tuple[Covariate, ...]
    digest: str
    notes: tuple[str, ...]
    stretches: tuple[Stretch, ...]
    spellings: tuple[Spelling, ...]
    values: int
    largest: float
    sizes: Sizes
    format: int = FORMAT
    files: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """Cells in all."""
        return max(stretch.stop for stretch in self.stretches)

    def write(self, folder: Path) -> None:
        """Write it beside what it tells of; the store is finished then."""
        plain = json.dumps(dataclasses.asdict(self), indent=1)
        write_text(folder / MANIFEST, f'{{"sha256": "{_sum(plain)}", "manifest": {plain}}}\n')

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check it.

        Raises
        ------
        UserError
            If the store is unfinished, or the manifest is damaged or of another version.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise UserError(
                f"{folder} is unfinished: prepare was interrupted",
                expected=f"a store with its {MANIFEST}",
                mend="run it again: the same knockon prepare command continues where it stopped",
            )
        try:
            value = read_json(path)
        except UserError as error:
            raise damaged(path, str(error)) from error
        plain = value.get("manifest")
        if not isinstance(plain, dict) or value.get("sha256") != _sum(json.dumps(plain, indent=1)):
            raise damaged(path, "its checksum does not fit")
        if plain.get("format") != FORMAT:
            raise UserError(
                f"{folder} is a store of format {plain.get('format')}",
                expected=f"format {FORMAT}",
                mend="remove it and prepare it again with this version of knockon",
            )
        found = from_plain(cls, plain, where=str(path))
        found._refuse_disorder(path)
        return found

    def _refuse_disorder(self, path: Path) -> None:
        """Refuse ranges that leave cells out or share some, sizes of no store, and files outside of it."""
        ranges = sorted((stretch.start, stretch.stop) for stretch in self.stretches)
        ends = [0, *(stop for _, stop in ranges)]
        if not ranges or any(
            not end == start < stop for end, (start, stop) in zip(ends, ranges, strict=False)
        ):
            raise damaged(path, "conditions that do not follow each other")
        if self.cells >= MOST or not 0 <= self.values < MOST:
            raise damaged(path, "it tells of more cells or values than a store can hold")
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in self.files):
            raise damaged(path, "it names files outside of its folder")

    def verify(self, folder: Path) -> Iterator[str | None]:
        """Read every file, and give what is wrong with each; None for a file that is as it was written."""
        for name, expected in self.files.items():
            path = folder / name
            try:
                found = digest(path)
            except (OSError, ValueError) as error:  # a name can be none of any file
                yield f"{path} cannot be read ({getattr(error, 'strerror', None) or error})"
                continue
            yield None if found == expected else f"{path} is not what was written: its checksum does not fit"


def is_store(path: Path) -> bool:
    """Whether a folder is a prepared screen, finished or not."""
    return (path / MANIFEST).exists() or (path / ASIDE).exists()


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
