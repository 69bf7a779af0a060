"""Prepared screens: files of cells in any order become one store in which a condition lies together.

Values are sorted outside of memory: blocks of the inputs are sorted one by one and put aside, and all of them
are then read side by side, from begin to end, while the store is written. What is whole on disk is never done
again, so that the same call continues after an interruption, and ends with the same bytes.
"""

import errno
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import write_elem
from jaxtyping import Float, Int

from knockon.data.chunks import NAMES, Chunked, Sizes, codecs, create, number_kind
from knockon.data.conventions import Columns
from knockon.data.join import BYTES, Joined, marked, open_inputs
from knockon.data.manifest import ASIDE, MANIFEST, Genes, Manifest, Plan, Spelling, Stretch
from knockon.data.memory import bytes_of, written
from knockon.data.recognize import Design
from knockon.data.screen import Screen, digest_of, notes_of, read
from knockon.data.values import Scale, Survey, blocks, scale
from knockon.files import alone, digest, from_plain, read_json, write_json
from knockon.progress import bar
from knockon.types import UserError

log = logging.getLogger("knockon")
SIZES = Sizes()
SHARE = 8
"""Part of the memory that one block of values takes: it is copied when it is read, sorted and written."""
TOGETHER = 16
"""Cells that a block must have room for, about: each block is a folder until all are written."""
OTHER = 256
"""Bytes on disk for a cell besides its values, about."""
NOTE = "plan.json"
"""What an unfinished store is to be."""
SUMS = "sums.json"
"""Beside a sorted block: SHA-256 of its files."""


def prepare(  # noqa: PLR0913 - one for each option of the command line
    data: Sequence[str | Path],
    out: str | Path,
    *,
    columns: Columns = Columns(),
    genes: Genes = "same",
    plate_key: str | None = None,
    memory: str = "2GB",
    seed: int = 0,
    quiet: bool = True,
) -> Screen:
    """Write one or many files as a store that is read from disk while a model is trained.

    Cells are ordered by context and condition, and at random within a condition. The same call continues a
    preparation that was interrupted.

    Parameters
    ----------
    data
        ``.h5ad`` or ``.zarr`` files, in CSR or dense.
    out
        Folder to write; scanpy and anndata open it as a ``.zarr``.
    columns
        How the files are read.
    genes
        Refuse files that differ in their genes (``same``), or keep those that all have (``shared``).
    plate_key
        Name of a covariate that tells which file each cell is from; none without it.
    memory
        What values take at most while they are sorted; names and ``obs`` come besides.
    seed
        Of the order of cells within a condition.
    quiet
        Show no progress bar.

    Returns
    -------
    Screen
        As ``Screen.read`` reads the folder.

    Raises
    ------
    UserError
        If a file cannot be used or differs from the others, the memory is too little to sort in, the folder
        holds something else, another command is at work in it, or the disk is full; what is done by then is
        kept for the next call.
    """
    folder, paths = Path(out), [Path(path) for path in data]
    most = max(1, bytes_of(memory) // SHARE)
    joined = open_inputs(paths, columns, genes=genes, plate_key=plate_key)
    _refuse_little(memory, joined)
    plan = Plan(
        inputs=tuple(marked(path) for path in paths),
        columns=joined.columns, genes=genes, plate_key=plate_key, seed=seed,
    )  # fmt: skip
    with _kept(folder):
        if not _finished(folder, plan):
            _refuse_other(folder)
            try:
                with alone(folder / ASIDE):
                    if not _finished(folder, plan):  # by another command, until now
                        _begin(folder, plan)
                        _refuse_full(folder, joined)
                        _Builder(folder, plan, joined, most, quiet).build()
            except UserError:
                if not _finished(folder, plan):  # by another command, which removed what this one waited for
                    raise
        shutil.rmtree(folder / ASIDE, ignore_errors=True)
    return read(folder, joined.columns)


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Turn a full disk, or one that cannot be written to, into one message."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"The disk of {folder} is full" if full else f"Cannot write {folder} ({error.strerror or error})",
            expected="a folder that can be written to, with space on its disk",
            mend="free some space and give the same command again: it continues where it stopped",
        ) from error


def _finished(folder: Path, plan: Plan) -> bool:
    """Whether the folder holds this very store already; another one is refused."""
    if not (folder / MANIFEST).exists():
        return False
    if Manifest.read(folder).plan != plan:
        raise _taken(folder, "a store that was made of other files or in another way")
    log.info("%s is prepared already", folder)
    return True


def _refuse_other(folder: Path) -> None:
    """Refuse a folder with anything but a store, before anything is written there."""
    if (folder / ASIDE / NOTE).exists() or not folder.exists():
        return
    if not folder.is_dir() or any(path.name != ASIDE for path in folder.iterdir()):
        raise _taken(folder, "something else")


def _begin(folder: Path, plan: Plan) -> None:
    """Note what the folder is for, or see that it is for the same."""
    note = folder / ASIDE / NOTE
    if note.exists():
        if from_plain(Plan, read_json(note), where=str(note)) != plan:
            raise _taken(folder, "an unfinished store of other files, or with other options")
        for partial in [*folder.rglob("*.partial"), *folder.glob(".*.json")]:  # what was being written
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        log.info("Continuing %s", folder)
        return
    write_json(note, asdict(plan))


def _taken(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder} holds {what}", expected="an empty folder", mend="choose another --out, or remove it"
    )


def _refuse_little(memory: str, joined: Joined) -> None:
    needed = SHARE * TOGETHER * BYTES * joined.values // len(joined.obs)
    if bytes_of(memory) < needed:
        raise UserError(
            f"--memory is {memory!r}",
            expected=f"at least {written(needed)}, in which some cells of these files find room",
            mend="leave it out, or give more",
        )


def _refuse_full(folder: Path, joined: Joined) -> None:
    """Refuse to begin what the disk has no room for; values lie on it twice until all is done."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = 2 * BYTES * joined.values + OTHER * len(joined.obs) - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The disk of {folder} has {written(free)} free",
            expected=f"up to {written(needed)} for {len(joined.obs):,} cells while they are sorted",
            mend="free some space, or choose another --out",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A sorted block on disk: rows of the store, in their order, and where the values of each begin."""

    folder: Path
    rows: Int[np.ndarray, "cells"]
    starts: Int[np.ndarray, "cells_and_one"]

    def values(self, first: int, last: int) -> tuple[Float[np.ndarray, "_"], Int[np.ndarray, "_"]]:
        """Values and genes of the cells from one place to another."""
        start, count = int(self.starts[first]), int(self.starts[last] - self.starts[first])
        return (
            np.fromfile(self.folder / "data", "<f4", count, offset=4 * start),
            np.fromfile(self.folder / "indices", "<i4", count, offset=4 * start),
        )

    def matrix(self, genes: int) -> sp.csr_matrix:
        """All of it."""
        return sp.csr_matrix((*self.values(0, len(self.rows)), self.starts), (len(self.rows), genes))


class _Builder:
    """The steps from joined files to a finished store."""

    def __init__(self, folder: Path, plan: Plan, joined: Joined, most: int, quiet: bool) -> None:  # noqa: FBT001
        self.folder, self.plan, self.joined, self.most, self.quiet = folder, plan, joined, most, quiet
        self.stretches, self.order = _arranged(joined.design, plan.seed)
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(len(self.order))

    def build(self) -> None:
        """Do what is missing; the manifest comes last."""
        runs, judged, largest = self._sort()
        lengths = np.empty(len(self.order), dtype=np.int64)
        for run in runs:
            lengths[run.rows] = np.diff(run.starts)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        self._write_values(runs, ends)
        self._write_tables(judged)
        design, joined = self.joined.design, self.joined
        rows = {stretch.label: np.arange(stretch.start, stretch.stop) for stretch in self.stretches}
        names = joined.obs.index.astype(str).tolist()
        manifest = Manifest(
            plan=self.plan,
            genes=joined.genes,
            units=judged.units,
            total=judged.total,
            dose_unit=design.dose_unit,
            covariates=design.covariates,
            digest=digest_of(joined.genes, names, design),
            notes=(*joined.notes, *design.notes, *notes_of(rows, judged, self.plan.columns)),
            stretches=self.stretches,
            spellings=tuple(Spelling(label=label, text=text) for label, text in design.spellings.items()),
            values=int(ends[-1]),
            largest=largest,
            sizes=SIZES,
            files=self._checksums(),
        )
        manifest.write(self.folder)

    def _sort(self) -> tuple[list[_Run], Scale, float]:
        """Put sorted blocks of all files aside, and judge the values of each file."""
        runs, scales, largest = [], dict[int, Scale](), 0.0
        planned = list(self.joined.blocks(self.most))
        offsets = np.cumsum([0, *(len(part.obs) for part in self.joined.parts)])
        surveys = [Survey() for _ in self.joined.parts]
        with bar("sorting", total=len(planned), quiet=self.quiet) as advance:
            for number, start, stop in planned:
                run, matrix = self._run((number, start, stop), int(offsets[number]))
                for block in blocks(matrix):
                    surveys[number].see(block)
                runs.append(run)
                if stop == len(self.joined.parts[number].obs):
                    scales[number] = self._judge(number, surveys[number])
                    largest = max(largest, surveys[number].largest)
                advance(self.joined.paths[number].name)
        self._refuse_mixture(scales)
        units = next(iter(scales.values())).units  # as in all others
        totals = {found.total for found in scales.values()}
        return runs, Scale(units=units, total=totals.pop() if len(totals) == 1 else None), largest

    def _judge(self, number: int, survey: Survey) -> Scale:
        try:
            return scale(survey, self.plan.columns.units)
        except UserError as error:
            raise UserError(f"{self.joined.paths[number]}: {error}".rstrip(".")) from error

    def _refuse_mixture(self, scales: Mapping[int, Scale]) -> None:
        if len({found.units for found in scales.values()}) > 1:
            named = ((self.joined.paths[number], found) for number, found in scales.items())
            raise UserError(
                "The files differ in their units",
                offenders=[f"{path.name} ({found.units})" for path, found in named],
                expected="counts in every file, or log1p in every file",
                mend="choose a layer that holds the same in all of them: --layer counts",
            )

    def _run(self, block: tuple[int, int, int], offset: int) -> tuple[_Run, sp.csr_matrix]:
        """Sort a block and put it aside, or take what lies there as it was put."""
        number, start, stop = block
        folder = self.folder / ASIDE / "runs" / "-".join(map(str, block))
        targets = self.place[offset + start : offset + stop]
        order = np.argsort(targets)
        if not _fits(folder):
            shutil.rmtree(folder, ignore_errors=True)
            found = self.joined.read(number, start, stop)[order]
            aside = folder.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            found.data.astype("<f4", copy=False).tofile(aside / "data")
            found.indices.astype("<i4", copy=False).tofile(aside / "indices")
            found.indptr.astype("<i8").tofile(aside / "starts")
            write_json(aside / SUMS, {file.name: digest(file) for file in aside.iterdir()})
            aside.rename(folder)
        run = _Run(folder=folder, rows=targets[order], starts=np.fromfile(folder / "starts", "<i8"))
        return run, run.matrix(len(self.joined.genes))

    def _write_values(self, runs: Sequence[_Run], ends: Int[np.ndarray, "cells_and_one"]) -> None:
        """Write all shards that are not there, or damaged, in their order."""
        root = zarr.open_group(self.folder, mode="a", zarr_format=3, use_consolidated=False)
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        group = root.require_group("X")
        shape = [len(ends) - 1, len(self.joined.genes)]
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
        total, size = int(ends[-1]), SIZES.shard
        number = number_kind(total)
        kinds = {"data": "<f4", "indices": number}
        arrays = {name: _array(group, name, total, kind) for name, kind in kinds.items()}
        there = {
            name: Chunked(folder=self.folder / "X" / name, kind=np.dtype(kind), length=total, sizes=SIZES)
            for name, kind in kinds.items()
        }
        together = max(1, self.most // (BYTES * size)) * size
        with bar("writing", total=-(-total // together), quiet=self.quiet) as advance:
            for start in range(0, total, together):
                stop = min(total, start + together)
                shards = [(a, min(a + size, stop)) for a in range(start, stop, size)]
                missing = [(name, a, b) for name in arrays for a, b in shards if not there[name].fits(a, b)]
                if missing:
                    values = _merged(runs, ends, start, stop)
                    for name, a, b in missing:
                        (there[name].folder / "c" / str(a // size)).unlink(missing_ok=True)  # zarr reads it
                        arrays[name][a:b] = values[name][a - start : b - start]
                advance()
        shutil.rmtree(self.folder / "X" / "indptr", ignore_errors=True)
        _array(group, "indptr", len(ends), number)[:] = ends

    def _write_tables(self, judged: Scale) -> None:
        """Write what is known of cells and genes, as anndata does."""
        root = zarr.open_group(self.folder, mode="a", zarr_format=3, use_consolidated=False)
        obs = self.joined.obs.iloc[self.order]
        obs.index = obs.index.astype(str)
        var = pd.DataFrame(index=pd.Index(self.joined.genes))
        settings = {"chunks": (NAMES,), "compressors": codecs(np.dtype("u1"))}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what zarr and anndata will do differently one day
            write_elem(root, "obs", obs, dataset_kwargs=settings)
            write_elem(root, "var", var, dataset_kwargs=settings)
            write_elem(root, "uns", {"log1p": {"base": float(np.e)}} if judged.units == "log1p" else {})
            zarr.consolidate_metadata(root.store)  # so that nobody looks for more in the folder

    def _checksums(self) -> dict[str, str]:
        """SHA-256 of all files, by their path in the folder."""
        files = sorted(
            path
            for path in self.folder.rglob("*")
            if path.is_file() and ASIDE not in path.relative_to(self.folder).parts
        )
        found = {}
        with bar("checksums", total=len(files), quiet=self.quiet) as advance:
            for path in files:
                found[path.relative_to(self.folder).as_posix()] = digest(path)
                advance()
        return found


def _arranged(design: Design, seed: int) -> tuple[tuple[Stretch, ...], Int[np.ndarray, "cells"]]:
    """Rows of each condition in the store, and the cell that each row holds."""
    labels = design.labels
    by_context = sorted(range(len(labels)), key=lambda i: (labels[i].covariates, not labels[i].is_control, i))
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_context] = np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(design.codes))
    order = order[np.argsort(rank[design.codes[order]], kind="stable")]
    counts = np.bincount(rank[design.codes], minlength=len(labels))
    ends = np.cumsum(counts)
    begins = ends - counts
    stretches = tuple(
        Stretch(label=label, start=int(begins[i]), stop=int(ends[i]))
        for label, i in zip(labels, rank, strict=True)
    )
    return stretches, order


def _fits(folder: Path) -> bool:
    """Whether a sorted block is there as it was put aside."""
    try:
        sums = read_json(folder / SUMS)
        return all(sums.get(name) == digest(folder / name) for name in ("data", "indices", "starts"))
    except (OSError, UserError):
        return False


def _array(group: zarr.Group, name: str, length: int, kind: str) -> zarr.Array:
    found = group.get(name)
    return (
        found if isinstance(found, zarr.Array) else create(group, name, length=length, kind=kind, sizes=SIZES)
    )


def _merged(
    runs: Sequence[_Run], ends: Int[np.ndarray, "cells_and_one"], start: int, stop: int
) -> dict[str, np.ndarray]:
    """Collect the values of the store from one to another from the sorted blocks."""
    first = int(np.searchsorted(ends, start, "right")) - 1
    last = int(np.searchsorted(ends, stop, "left"))
    begin = int(ends[first])
    data = np.empty(int(ends[last]) - begin, "<f4")
    indices = np.empty(len(data), "<i4")
    for run in runs:
        low, high = np.searchsorted(run.rows, [first, last]).tolist()
        lengths = np.diff(run.starts[low : high + 1])
        shift = ends[run.rows[low:high]] - begin - (run.starts[low:high] - run.starts[low])
        places = np.arange(int(lengths.sum())) + np.repeat(shift, lengths)
        data[places], indices[places] = run.values(low, high)
    return {"data": data[start - begin : stop - begin], "indices": indices[start - begin : stop - begin]}
