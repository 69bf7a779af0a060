"""Training batches without end: which conditions and which cells depend on the seed and the step only."""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knockon.data.ahead import Ahead
from knockon.data.screen import Screen
from knockon.data.values import OnDisk
from knockon.types import CellSets, Label, Spec, UserError

Gather = Callable[[Int[np.ndarray, "rows"]], Float[Tensor, "rows genes"]]
"""Gives the dense values of some rows, on the device."""
WINDOW = 8
"""Cells that are read together from a store, where they lie in random order."""


class Sampler:
    """Draws sets of perturbed cells, each with control cells of its own context.

    A batch costs as much as its own cells, however many the screen has. There is no state: whoever
    resumes at a step gets the batch that the step would have had. From a disk, the next batches are read
    while the model works.

    A shuffled screen gives windows of cells that lie together. Their order is random, so that each set is
    a simple random sample of its condition as it would be cell by cell; and windows begin anywhere, so that
    each cell is drawn equally often. Over the steps, though, neighbors come together more often than others.

    Parameters
    ----------
    screen
        Prepared; it may hold more conditions than are drawn from.
    spec
        Gives the codes of the conditions.
    conditions
        To draw from.
    sets, cells
        Size of a batch.
    seed
        Of the whole sequence.
    device
        Where batches are made; a screen in memory is copied there once, as it is stored.
    replace
        Draw cells with replacement [scdfm, section 1.6]. Otherwise a condition with fewer cells than a set
        gives all of them, and copies, which ``CellSets.real`` tells from them.
    by_cells
        Draw each condition as often as it has cells; otherwise all alike.
    embedded
        A row for each of the screen, to be given instead of the values of cells.
    """

    def __init__(  # noqa: PLR0913 - each is one independent choice
        self,
        screen: Screen,
        spec: Spec,
        *,
        conditions: Sequence[Label],
        sets: int,
        cells: int,
        seed: int,
        device: torch.device | str = "cpu",
        replace: bool = False,
        by_cells: bool = False,
        embedded: Float[Tensor, "rows embedding"] | None = None,
    ) -> None:
        missing = [label for label in conditions if label not in screen.rows]
        if missing or not conditions:
            raise UserError(
                "Conditions without cells", offenders=missing, expected="conditions of the screen"
            )
        self.sets, self.cells, self.seed, self.replace = sets, cells, seed, replace
        self._codes = spec.encode(conditions).to(device)
        self._targets = [screen.rows[label] for label in conditions]
        self._controls = [screen.control_rows(label) for label in conditions]
        self._fills = not replace and min(map(len, self._targets)) < cells
        sizes = np.array([len(rows) for rows in self._targets])
        self._shares = sizes / sizes.sum() if by_cells else None
        self._embedded = embedded
        self._gather = resident(screen, device) if embedded is None else _nothing(screen, device)
        self._device = torch.device(device)
        self._window = min(WINDOW, cells) if screen.shuffled else 1
        self._ahead = Ahead(self._make) if isinstance(screen.matrix, OnDisk) else None
        self.notes = _notes(screen, conditions)

    def batch(self, step: int, number: int = 0) -> CellSets:
        """Draw a batch of a step, both counted from 0."""
        return (self._ahead or self._make)(step, number)

    def _make(self, step: int, number: int) -> CellSets:
        rng = np.random.default_rng((self.seed, step, number))
        if self._shares is None:
            chosen = rng.integers(len(self._targets), size=self.sets)
        else:
            chosen = rng.choice(len(self._targets), size=self.sets, p=self._shares)
        target = np.concatenate([self._draw(self._targets[i], rng) for i in chosen])
        real = None
        if self._fills:
            measured = np.array([min(len(self._targets[i]), self.cells) for i in chosen])
            real = _to_device(np.arange(self.cells) < measured[:, None], self._device)
        control = np.concatenate([self._draw(self._controls[i], rng) for i in chosen])
        shape = (self.sets, self.cells, -1)
        embedded = None
        if self._embedded is not None:
            rows = torch.from_numpy(target).to(self._embedded.device)
            embedded = self._embedded[rows].view(shape).to(self._device)
        return CellSets(
            target=self._gather(target).view(shape),
            control=self._gather(control).view(shape),
            condition=self._codes[_to_device(chosen, self._device)],
            real=real,
            embedded=embedded,
        )

    def _draw(self, rows: Int[np.ndarray, "pool"], rng: np.random.Generator) -> Int[np.ndarray, "cells"]:
        if self._window > 1 and len(rows) >= self.cells + self._window:
            return rows[_windows(len(rows), self.cells, self._window, rng, replace=self.replace)]
        if self.replace:
            return rows[rng.integers(len(rows), size=self.cells)]
        if len(rows) < self.cells:
            copies = rng.integers(len(rows), size=self.cells - len(rows))
            return rows[np.concatenate([rng.permutation(len(rows)), copies])]
        return rows[_distinct(len(rows), self.cells, rng)]


def _distinct(pool: int, count: int, rng: np.random.Generator) -> Int[np.ndarray, "count"]:
    """Distinct numbers below ``pool`` in random order, at a cost that depends on ``count`` only."""
    if pool <= 4 * count:
        return rng.permutation(pool)[:count]
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        drawn |= dict.fromkeys(rng.integers(pool, size=count - len(drawn)).tolist())
    return np.fromiter(drawn, dtype=np.int64, count=count)


def _windows(
    pool: int, count: int, window: int, rng: np.random.Generator, *, replace: bool
) -> Int[np.ndarray, "count"]:
    """Draw windows of numbers that follow each other in a ring of ``pool`` numbers, which begins anywhere."""
    number, places = -(-count // window), pool // window
    drawn = rng.integers(places, size=number) if replace else _distinct(places, number, rng)
    within = rng.integers(pool) + drawn[:, None] * window + np.arange(window)
    return within.ravel()[:count] % pool


def resident(screen: Screen, device: torch.device | str) -> Gather:
    """Make a function that gathers rows of a screen on a device.

    Values in memory are copied to the device once, sparse as they are, and never leave it again;
    values on disk are read when they are asked for.
    """
    if not isinstance(screen.matrix, sp.csr_matrix):
        return lambda rows: _to_device(screen.gather(rows), torch.device(device))
    width = len(screen.genes)
    ends = screen.matrix.indptr.astype(np.int64)
    indices = torch.from_numpy(screen.matrix.indices).to(device)
    data = torch.from_numpy(screen.matrix.data).to(device)

    def gather(rows: Int[np.ndarray, "rows"]) -> Float[Tensor, "rows genes"]:
        counts = ends[rows + 1] - ends[rows]
        stop = np.cumsum(counts)
        # The host knows all sizes, so that the device never has to be asked for one.
        layout = np.stack([counts, ends[rows] - (stop - counts), np.arange(len(rows)) * width])
        counts_, first, base = _to_device(layout, indices.device)
        both = torch.stack([first, base], dim=1)
        spread = both.repeat_interleave(counts_, dim=0, output_size=int(stop[-1]))
        source = torch.arange(len(spread), device=indices.device) + spread[:, 0]
        dense = data.new_zeros(len(rows) * width)
        return dense.scatter_(0, spread[:, 1] + indices[source], data[source]).view(len(rows), width)

    return gather


def _nothing(screen: Screen, device: torch.device | str) -> Gather:
    """Make a function that gives zeros, which take no memory."""
    zero = torch.zeros((), device=device)
    return lambda rows: zero.expand(len(rows), len(screen.genes))


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _notes(screen: Screen, conditions: Sequence[Label]) -> tuple[str, ...]:
    """Say where controls of another context stand in."""
    lacking = sorted({label.covariates for label in conditions if label.control() not in screen.rows})
    return tuple(
        f"no control cells in {' | '.join(levels)}: the control cells of all contexts stand in"
        for levels in lacking
    )
