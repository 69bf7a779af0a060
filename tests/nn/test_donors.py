"""Cells that are kept come back as they were."""

import numpy as np
import pytest
import torch

from knockon.nn.donors import Donors

SIZES = (5, 1, 8)


@pytest.fixture
def populations() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    made = [draw.poisson(0.7, (size, 6)).astype(np.float32) for size in SIZES]
    made[0][2] = 0  # a cell without counts
    made[2][:, 3] = 0
    return made


@pytest.fixture
def donors(populations: list[np.ndarray]) -> Donors:
    donors = Donors(6)
    donors.fit(iter(populations))
    return donors


def test_kept_cells_come_back(donors: Donors, populations: list[np.ndarray]) -> None:
    assert len(donors) == len(SIZES)
    for i, cells in enumerate(populations):
        np.testing.assert_array_equal(donors.cells_of(i).numpy(), cells)


@pytest.mark.parametrize("number", [1, 4, 5, 12, 20])
def test_no_cell_is_drawn_more_than_once_oftener_than_another(
    donors: Donors, populations: list[np.ndarray], rng: torch.Generator, number: int
) -> None:
    marked = np.arange(1, 6, dtype=np.float32)[:, None] * np.ones((1, 6), np.float32)
    donors.fit([marked, populations[2]])
    drawn = donors.draw(0, number, rng)
    assert drawn.shape == (number, 6)
    times = torch.bincount(drawn[:, 0].long(), minlength=6)[1:]
    assert times.max() - times.min() <= 1


def test_every_cell_is_as_likely(donors: Donors, rng: torch.Generator) -> None:
    donors.fit([np.eye(6, dtype=np.float32)])
    mean = torch.stack([donors.draw(0, 3, rng).sum(0) for _ in range(500)]).mean(0)
    torch.testing.assert_close(mean, torch.full((6,), 0.5), atol=0.1, rtol=0)


def test_the_same_generator_draws_the_same_cells(donors: Donors) -> None:
    one, again, other = (donors.draw(2, 6, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_values_are_stored_as_sparse_as_they_are(donors: Donors, populations: list[np.ndarray]) -> None:
    assert len(donors.value) == sum(np.count_nonzero(cells) for cells in populations)
    donors.fit(populations[:1])
    assert len(donors) == 1
    np.testing.assert_array_equal(donors.cells_of(0).numpy(), populations[0])
