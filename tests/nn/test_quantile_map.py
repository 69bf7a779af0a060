"""Generated values with the distribution of measured ones."""

import numpy as np
import pytest
import torch

from knockon.nn.quantile_map import QuantileMap
from knockon.types import Noise

GENES = 3


def draw(rates: list[float], seed: int, cells: int = 2000) -> np.ndarray:
    """Two conditions, the second with twice the counts of the first; the last gene is never on."""
    rng = np.random.default_rng(seed)
    both = [rng.poisson(np.multiply(rates, factor), size=(cells, GENES)) for factor in (1, 2)]
    return np.stack(both).astype(np.float32)


@pytest.fixture(scope="module")
def mapped() -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Measured, generated and mapped counts: of the first gene too many, of the second too few."""
    measured, generated = draw([0.1, 5, 0], 0), draw([0.5, 3, 0.2], 1)
    model = QuantileMap(GENES)
    model.fit(list(generated), list(measured))
    fresh = draw([0.5, 3, 0.2], 2)
    noise = Noise(torch.Generator().manual_seed(0))
    return measured, fresh, model(torch.from_numpy(fresh), noise)


def test_all_conditions_together_have_the_measured_distribution(mapped):
    measured, _, found = mapped
    for summary in (lambda x: (x == 0).mean((0, 1)), lambda x: x.mean((0, 1)), lambda x: x.std((0, 1))):
        np.testing.assert_allclose(summary(found.numpy()), summary(measured), atol=0.03, rtol=0.03)
    assert not found[..., 2].any()


def test_larger_values_stay_larger(mapped):
    _, generated, found = mapped
    order = generated[..., 1].argsort()
    kept = np.take_along_axis(found[..., 1].numpy(), order, 1)
    for least, most in ((2, 4), (6, 9)):
        low = kept[np.take_along_axis(generated[..., 1], order, 1) <= least]
        high = kept[np.take_along_axis(generated[..., 1], order, 1) >= most]
        assert low.max() <= high.min()
    assert found[1, :, 0].mean() > 1.3 * found[0, :, 0].mean()


def test_before_it_is_fitted_nothing_changes(rng):
    cells = torch.rand(1, 4, GENES, generator=rng) * 9
    assert torch.equal(QuantileMap(GENES)(cells, Noise(rng)), cells)


def test_what_is_beyond_all_generated_values_is_the_largest_measured_one(mapped, rng):
    measured, generated = draw([0.1, 5, 0], 0), draw([0.5, 3, 0.2], 1)
    model = QuantileMap(GENES)
    model.fit(list(generated), list(measured))
    found = model(torch.full((1, 1, GENES), 1e6), Noise(rng))
    torch.testing.assert_close(found[0, 0], torch.from_numpy(measured.max((0, 1))))
