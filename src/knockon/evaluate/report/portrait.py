"""What a report shows of cells: a few arrays of each side, made while there are cells to look at.

Of each condition, the genes that matter most and a sample of cells are kept, so that a folder stays small
whatever the screen: a report is a function of its folder alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.populations import num_cells, sample
from knockon.evaluate.strata import effect_size
from knockon.evaluate.truth import Truth
from knockon.files import written_aside
from knockon.types import Label, UserError

FOLDER, TRUTH = "portraits", "truth.npz"
CHANGED, SURPRISING, OWN = 400, 100, 100
"""Genes kept of a condition: those that really change most, those that the sum of single effects misses most,
and, of each model, those of the others that it changes most."""
TOP = 10
"""Genes whose distributions are kept: the first of those that change most."""
LEVELS = np.linspace(0, 1, 21)
"""Quantiles of the cells that express a gene."""
SPOTS, LOOKED_AT = 60, 1000
"""Cells of each condition and side on a map, and most cells that distributions are of; controls are read in
blocks of as many."""
MANY = 120
"""Conditions above which less is kept of each, so that the whole does not grow."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """Cells of each condition: real, control or predicted; NaN where a condition has none.

    Parameters
    ----------
    cells
        How many there are.
    zeros
        Fraction of cells in which each of the top genes is exactly 0.
    quantiles
        Of the other cells, in log1p, at ``LEVELS``.
    spots
        A sample of cells on four axes: the first two principal components of training cells; along the
        real effect (0 is the mean of control, 1 that of the real cells); and the main other direction.
    center
        The mean of all cells on these axes.
    """

    cells: Int[np.ndarray, "conditions"]
    zeros: Float[np.ndarray, "conditions top"]
    quantiles: Float[np.ndarray, "conditions top levels"]
    spots: Float[np.ndarray, "conditions spots 4"]
    center: Float[np.ndarray, "conditions 4"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """The real side.

    Parameters
    ----------
    mark
        Recognizes what belongs to this scene.
    genes, conditions
        Names.
    shown
        Genes kept of each condition, those that change most first.
    level
        Their mean in control cells, in log1p.
    change, expected
        Their real change of the mean against control, and the sum of the changes under each perturbation
        alone; NaN where one was not measured, and for single perturbations.
    effect
        See ``strata.effect_size``.
    real, control
        Cells.
    """

    mark: str
    genes: tuple[str, ...]
    conditions: tuple[str, ...]
    shown: Int[np.ndarray, "conditions shown"]
    level: Float[np.ndarray, "conditions shown"]
    change: Float[np.ndarray, "conditions shown"]
    expected: Float[np.ndarray, "conditions shown"]
    effect: Float[np.ndarray, "conditions"]
    real: Side
    control: Side


@dataclass(frozen=True, kw_only=True, eq=False)
class Portrait:
    """What one model predicted.

    Parameters
    ----------
    mark, conditions
        The scene it belongs to, and which of its conditions these are.
    change
        Predicted change of the scene's genes against the real control.
    own
        Of the other genes those that it changes most.
    own_level, own_real, own_change
        Of these: mean in control cells, real change and predicted change.
    cells
        Predicted cells.
    """

    mark: str
    conditions: tuple[str, ...]
    change: Float[np.ndarray, "conditions shown"]
    own: Int[np.ndarray, "conditions own"]
    own_level: Float[np.ndarray, "conditions own"]
    own_real: Float[np.ndarray, "conditions own"]
    own_change: Float[np.ndarray, "conditions own"]
    cells: Side


Kind = TypeVar("Kind", Scene, Portrait)


@dataclass(frozen=True, kw_only=True, eq=False)
class Album:
    """Writes portraits of models beside their scores.

    Parameters
    ----------
    folder
        Of the scores.
    truth
        What is predicted.
    """

    folder: Path
    truth: Truth

    @classmethod
    def begin(cls, folder: Path, truth: Truth) -> "Album":
        """Write the real side."""
        album = cls(folder=folder, truth=truth)
        save(folder, album.scene)
        return album

    def add(self, name: str, pairs: Pairs) -> None:
        """Write the portrait of a model, which may lack conditions."""
        rows = np.array([self.truth.labels.index(label) for label in pairs.truth.labels])
        change = pairs.moments.mean - self.truth.control[rows]
        shown = self.scene.shown[rows]
        own = _largest_besides(shown, np.abs(change), self._share(OWN))
        real = self.truth.moments.mean[rows] - self.truth.control[rows]
        made = Portrait(
            mark=self.scene.mark,
            conditions=tuple(str(label) for label in pairs.truth.labels),
            change=_take(change, shown),
            own=own,
            own_level=_take(self.truth.control[rows], own),
            own_real=_take(real, own),
            own_change=_take(change, own),
            cells=self._side(pairs.cells, rows),
        )
        save(self.folder, made, name)

    @cached_property
    def scene(self) -> Scene:
        """The real side."""
        truth, shown = self.truth, self._shown
        labels = tuple(str(label) for label in truth.labels)
        change = truth.moments.mean - truth.control
        controls = [self._controls[label.covariates] for label in truth.labels]
        count = [len(truth.screen.control_rows(label)) for label in truth.labels]
        middle = [self._on_axes(origin[None], i)[0] for i, (origin, _) in enumerate(self._frames)]
        marked = hashlib.sha256("\n".join((truth.screen.digest, *labels)).encode() + change.tobytes())
        return Scene(
            mark=marked.hexdigest(),
            genes=truth.screen.genes,
            conditions=labels,
            shown=shown,
            level=_take(truth.control, shown),
            change=_take(change, shown),
            expected=_take(self._expected, shown),
            effect=effect_size(truth),
            real=self._side(truth.cells, np.arange(len(labels))),
            control=replace(  # of all controls, of which the rest is a sample
                self._side(controls, np.arange(len(labels))), cells=np.array(count), center=np.stack(middle)
            ),
        )

    @cached_property
    def _shown(self) -> Int[np.ndarray, "conditions shown"]:
        change = np.abs(self.truth.moments.mean - self.truth.control)
        first = np.argsort(-change, axis=1, kind="stable")[:, : self._share(CHANGED)]
        surprise = np.abs(self._expected - self.truth.moments.mean + self.truth.control)
        surprise = np.where(np.isfinite(surprise), surprise, change)
        return np.hstack([first, _largest_besides(first, surprise, self._share(SURPRISING))])

    @cached_property
    def _expected(self) -> Float[np.ndarray, "conditions genes"]:
        """Sum of the real single effects."""
        row = {label: i for i, label in enumerate(self.truth.screen.conditions)}
        expected = np.full(self.truth.control.shape, np.nan)
        for i, label in enumerate(self.truth.labels):
            parts = [
                Label((name,), (dose,), label.covariates)
                for name, dose in zip(label.perturbations, label.doses, strict=True)
            ]
            if len(parts) > 1 and all(part in row for part in parts):
                alone = self.truth.candidates[[row[part] for part in parts]]
                expected[i] = (alone - self.truth.control[i]).sum(axis=0)
        return expected

    @cached_property
    def _controls(self) -> dict[tuple[str, ...], sp.csr_matrix]:
        """Some control cells of each context."""
        screen, rng = self.truth.screen, np.random.default_rng(0)
        found = {label.covariates: screen.control_rows(label) for label in self.truth.labels}
        chosen = {
            context: np.sort(rng.choice(rows, min(len(rows), LOOKED_AT), replace=False))
            for context, rows in found.items()
        }
        return {context: sp.csr_matrix(screen.matrix[rows]) for context, rows in chosen.items()}

    @cached_property
    def _frames(self) -> list[tuple[Float[np.ndarray, "dims"], Float[np.ndarray, "dims 2"]]]:
        """Of each condition the mean of control, and the directions along and across the real effect."""
        place = self.truth.space.project
        some = {context: place(cells) for context, cells in self._controls.items()}
        mean = {label.covariates: self._control_mean(label) for label in self.truth.labels}
        return [
            _frame(some[label.covariates], mean[label.covariates], place(cells).mean(axis=0))
            for label, cells in zip(self.truth.labels, self.truth.cells, strict=True)
        ]

    def _control_mean(self, label: Label) -> Float[np.ndarray, "dims"]:
        """Mean coordinates of all control cells of a context."""
        rows, matrix = self.truth.screen.control_rows(label), self.truth.screen.matrix
        blocks = np.split(rows, range(LOOKED_AT, len(rows), LOOKED_AT))
        placed = (self.truth.space.project(sp.csr_matrix(matrix[block])) for block in blocks)
        return np.sum([some.sum(axis=0, dtype=np.float64) for some in placed], axis=0) / len(rows)

    def _side(self, populations: Sequence[sp.csr_matrix], rows: Int[np.ndarray, "conditions"]) -> Side:
        place = self.truth.space.project
        top = min(TOP, self._shown.shape[1])
        zeros = np.full((len(rows), top), np.nan)
        quantiles = np.full((len(rows), top, len(LEVELS)), np.nan)
        spots = np.full((len(rows), self._share(SPOTS), 4), np.nan)
        center = np.empty((len(rows), 4))
        for i, (row, cells) in enumerate(zip(rows, populations, strict=True)):
            label = self.truth.labels[row]
            looked = sample(label, cells, LOOKED_AT)
            for j, values in enumerate(looked[:, self._shown[row, :top]].toarray().T):
                zeros[i, j] = (values == 0).mean()
                if values.any():
                    quantiles[i, j] = np.quantile(values[values != 0], LEVELS)
            few = self._on_axes(place(sample(label, cells, spots.shape[1])), row)
            spots[i, : len(few)] = few
            center[i] = self._on_axes(place(cells).mean(axis=0, keepdims=True), row)[0]
        return Side(
            cells=np.array([num_cells(cells) for cells in populations]),
            zeros=zeros,
            quantiles=quantiles,
            spots=spots,
            center=center,
        )

    def _on_axes(
        self, placed: Float[np.ndarray, "points dims"], row: int | np.integer
    ) -> Float[np.ndarray, "points 4"]:
        """Bring coordinates to the axes of a condition; linear, so that means become means."""
        origin, directions = self._frames[row]
        first = np.zeros((len(placed), 2))
        first[:, : placed.shape[1]] = placed[:, :2]
        return np.hstack([first, (placed - origin) @ directions])

    def _share(self, most: int) -> int:
        """How much to keep of each of many conditions."""
        return max(TOP, min(most, most * MANY // len(self.truth.labels)))


def _frame(
    controls: Float[np.ndarray, "controls dims"],
    origin: Float[np.ndarray, "dims"],
    target: Float[np.ndarray, "dims"],
) -> tuple[Float[np.ndarray, "dims"], Float[np.ndarray, "dims 2"]]:
    """Find two directions from the mean of control: to the real mean, which lies at 1, and across.

    The second is the main direction in which control cells, some of which are given, vary besides.
    """
    effect = target - origin
    size = max(float(np.linalg.norm(effect)), 1e-9)
    rest = controls - controls.mean(axis=0)
    rest = rest - np.outer(rest @ effect, effect) / size**2
    across = np.linalg.svd(rest, full_matrices=False)[2][0]
    across = across * np.sign(across[np.abs(across).argmax()])
    return origin, np.stack([effect / size**2, across], axis=1)


def _largest_besides(
    taken: Int[np.ndarray, "conditions taken"], size: Float[np.ndarray, "conditions genes"], count: int
) -> Int[np.ndarray, "conditions more"]:
    """Genes with the largest size that are not taken yet, as many as there are."""
    size = size.copy()
    np.put_along_axis(size, taken, -1.0, axis=1)
    return np.argsort(-size, axis=1, kind="stable")[:, : min(count, size.shape[1] - taken.shape[1])]


def _take(
    values: Float[np.ndarray, "conditions genes"], genes: Int[np.ndarray, "conditions some"]
) -> Float[np.ndarray, "conditions some"]:
    return np.take_along_axis(values, genes, axis=1)


# ---- files -----------------------------------------------------------------------------------------


def save(folder: Path, value: Scene | Portrait, name: str = "") -> None:
    """Write a scene, or the portrait of a model: arrays of numbers and of text, nothing that executes."""
    path = folder / FOLDER / (f"models/{quote(name, safe=' ')}.npz" if isinstance(value, Portrait) else TRUTH)
    arrays: dict[str, np.ndarray] = {}
    for key in (field.name for field in fields(value)):
        item = getattr(value, key)
        if isinstance(item, Side):
            arrays |= {f"{key}.{part}": array for part, array in asdict(item).items()}
        else:
            arrays[key] = np.array(item)
    small = {
        key: array.astype(np.float32) if array.dtype.kind == "f" else array for key, array in arrays.items()
    }
    with written_aside(path) as aside:
        np.savez_compressed(aside, allow_pickle=False, **small)


def read(folder: Path) -> tuple[Scene, dict[str, Portrait]] | None:
    """Read the scene and the portraits that belong to it, by model; None where nothing was drawn.

    Raises
    ------
    UserError
        If a file is damaged.
    """
    path = folder / FOLDER / TRUTH
    if not path.exists():
        return None
    scene = _read(path, Scene)
    found = {
        unquote(path.stem): _read(path, Portrait)
        for path in sorted((folder / FOLDER / "models").glob("*.npz"))
    }
    return scene, {name: portrait for name, portrait in found.items() if portrait.mark == scene.mark}


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = dict(file)
        return kind(**{field.name: _value(stored, field.name) for field in fields(kind)})
    except Exception as error:  # damage shows itself as an error of any kind
        raise UserError(
            f"Cannot read {path} ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            expected="what knockon compare or evaluate wrote",
            mend=f"remove the folder {path.parent} and give the same command again",
        ) from error


def _value(stored: Mapping[str, np.ndarray], name: str) -> Any:
    if f"{name}.cells" in stored:
        return Side(**{field.name: stored[f"{name}.{field.name}"] for field in fields(Side)})
    value = stored[name]
    if value.dtype.kind == "U":
        return tuple(map(str, value)) if value.ndim else str(value)
    return value
