"""The commands that are disturbed, and what of their output must be the same in the end."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import anndata
import pandas as pd
import safetensors

from benchmarks.faults.process import finish
from knockon.data.manifest import ASIDE as BEGUN
from knockon.data.manifest import MANIFEST

ASIDE = re.compile(r"\.(?P<name>.+)-[0-9a-f]{6}-\d+-[^-]*")
"""Names of temporary files."""
OUTCOMES = ("seconds", "checksum")
"""What a record says of how long it took, and what depends on it."""


@dataclass(frozen=True)
class Command:
    """A command; ``{base}`` in its arguments is the folder of `prepare`, ``{out}`` that of its output."""

    name: str
    arguments: str
    loose: tuple[str, ...] = ()
    """Endings of files that tell times, and are only looked at for being whole."""

    def at(self, base: Path, out: Path) -> list[str]:
        return self.arguments.format(base=base, out=out).split()


TRAINING = (
    "--train.steps 60 --train.cells 8 --train.checkpoint-every 5 --train.log-every 5 --device cpu --quiet"
)
COMMANDS = (
    Command("simulate", "simulate {out}/screen.h5ad --preset tiny"),
    Command("prepare", "prepare {base}/screen.h5ad --out {out}/store --quiet"),
    Command("split", "split {base}/screen.h5ad --out {out}/split.json"),
    Command(
        "train latent_additive",
        "train latent_additive --data {base}/screen.h5ad --split {base}/split.json --out {out}/run "
        "--train.validate-every 20 --train.validate-cells 8 " + TRAINING.replace("60", "400"),
    ),
    Command(
        "train scdfm", "train scdfm --preset small --data {base}/screen.h5ad --out {out}/run " + TRAINING
    ),
    Command(
        "train perturbdiff",
        "train perturbdiff --preset small --data {base}/screen.h5ad --out {out}/run " + TRAINING,
    ),
    Command(
        "train from a store",
        "train latent_additive --data {base}/store --out {out}/run " + TRAINING,
    ),
    Command(
        "predict", "predict {base}/run --part test --cells 64 --device cpu --quiet --out {out}/pred.h5ad"
    ),
    Command("rank", "rank {base}/run --all-pairs --cells 16 --device cpu --quiet --out {out}/rank.csv"),
    Command("evaluate", "evaluate --pred {base}/pred.h5ad --real {base}/screen.h5ad --out {out}/scores"),
    Command(
        "compare",
        "compare --data {base}/screen.h5ad --models latent_additive --steps 60 --cells 16 --device cpu "
        "--quiet --out {out}/cmp",
        loose=(".html",),
    ),
    Command("report", "report {base}/scores --out {out}/report.html"),
)


def prepare(base: Path) -> None:
    """Write what the commands read."""
    base.mkdir(parents=True)
    for line in (
        "simulate {base}/screen.h5ad --preset tiny",
        "split {base}/screen.h5ad --out {base}/split.json",
        "prepare {base}/screen.h5ad --out {base}/store --quiet",
        "train latent_additive --data {base}/screen.h5ad --split {base}/split.json --out {base}/run "
        + TRAINING,
        "predict {base}/run --part test --cells 32 --device cpu --quiet --out {base}/pred.h5ad",
        "evaluate --pred {base}/pred.h5ad --real {base}/screen.h5ad --out {base}/scores",
    ):
        finish(line.format(base=base).split(), base / "log")


def visible(folder: Path) -> list[Path]:
    """Files that a reader may open: not the temporary ones, and not those of an unfinished store."""
    unfinished = {path.parent for path in folder.rglob(BEGUN) if not (path.parent / MANIFEST).exists()}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not ASIDE.fullmatch(path.name) and unfinished.isdisjoint(path.parents)
    )


def leftovers(folder: Path) -> list[Path]:
    """Temporary files."""
    return [path for path in folder.rglob("*") if ASIDE.fullmatch(path.name) or path.name == BEGUN]


def contents(folder: Path, loose: tuple[str, ...] = ()) -> Mapping[str, str]:
    """Digest of what each file says, by its path; a checkpoint is looked at for being whole only.

    Raises
    ------
    Exception
        If a file is half-written.
    """
    found = {}
    for path in visible(folder):
        told = _content(path)
        if path.suffix not in loose and path.parent.name != "checkpoint":
            found[str(path.relative_to(folder))] = hashlib.sha256(told).hexdigest()
    return found


def is_broken(folder: Path) -> bool:
    """Whether a file is half-written."""
    try:
        contents(folder)
    except Exception as error:  # noqa: BLE001 (whatever a half-written file raises)
        print(f"broken: {error}", flush=True)
        return True
    return False


def fresh(folder: Path) -> Path:
    """Empty a folder, or make it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _content(path: Path) -> bytes:
    """What a file says, apart from how long it took to say it."""
    if path.suffix == ".h5ad":
        return _cells(path)
    if path.suffix == ".json":
        plain = json.loads(path.read_text())
        return json.dumps({key: value for key, value in plain.items() if key not in OUTCOMES}).encode()
    if path.suffix == ".jsonl":
        lines = path.read_text().split("\n")
        return json.dumps([json.loads(line) for line in lines[:-1]]).encode()  # the last may be cut off
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="np") as file:
            return b"".join(name.encode() + file.get_tensor(name).tobytes() for name in sorted(file.keys()))
    if path.suffix == ".csv":
        return pd.read_csv(path).to_csv().encode()
    told = path.read_bytes()
    if path.suffix == ".html" and not told.rstrip().endswith(b"</html>"):
        raise ValueError(f"{path} is cut off")
    return told


def _cells(path: Path) -> bytes:
    cells = anndata.read_h5ad(path)
    matrix = cells.X
    tables = cells.obs.to_csv() + cells.var.to_csv()
    return b"".join(
        (matrix.data.tobytes(), matrix.indices.tobytes(), matrix.indptr.tobytes(), tables.encode())
    )
