"""Standard errors of predicted means, in a world whose true means are known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from knockon.cli import main
from knockon.data import simulate
from knockon.data.screen import Screen
from knockon.models import no_effect, perturbdiff, response_surface, ripple
from knockon.models.response_surface import ResponseSurface
from knockon.types import Label, UserError
from knockon.uncertainty import anchor_of, misses, refits, standard_errors

GENES, CELLS, NOISE = 30, 40, 0.6
NAMES = tuple(f"p{i}" for i in range(9))
DOUBLES = tuple(Label.of([a, b]) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :])
TEST = DOUBLES[::6]
CONFIG = response_surface.Config(cosines=60)


def truth(bent: float, seed: int = 0) -> dict[Label, np.ndarray]:
    """Effects that add up, but for what pairs of genes do to each other."""
    draw = np.random.default_rng(seed)
    base, push = draw.uniform(3, 5, GENES), draw.normal(scale=0.5, size=(len(NAMES), GENES))
    found = {Label(): base} | {Label.of([name]): base + push[i] for i, name in enumerate(NAMES)}
    for label in DOUBLES:
        parts = [push[NAMES.index(name)] for name in label.perturbations]
        found[label] = base + sum(parts) + draw.normal(scale=bent, size=GENES)
    return found


@pytest.fixture
def world(make_screen) -> Callable[..., tuple[ResponseSurface, Screen, dict[Label, np.ndarray]]]:
    def made(bent: float, without: tuple[Label, ...] = TEST):
        draw, true = np.random.default_rng(1), truth(bent)
        cells = {x: y + draw.normal(scale=NOISE, size=(CELLS, GENES)) for x, y in true.items()}
        screen = make_screen(cells)
        train = screen.select([label for label in screen.labels if label not in without])
        model = CONFIG.build(screen.spec())
        model.fit_statistics(train)
        return model, train, true

    return made


@pytest.mark.parametrize("bent", [0.0, 0.4])
def test_intervals_hold_true_means_whether_effects_add_up_or_not(world, bent: float) -> None:
    model, train, true = world(bent)
    error = standard_errors(model, train, TEST, fits=5)
    off = model.mean(model.spec.encode(TEST)).numpy() - np.stack([true[label] for label in TEST])
    assert 0.4 < (np.abs(off) < 0.674 * error).mean() < 0.65
    assert (np.abs(off) < 1.96 * error).mean() > 0.9
    assert 0.75 < np.sqrt(np.square(error).mean() / np.square(off).mean()) < 1.5


def test_what_does_not_add_up_is_missed_however_many_cells_there_are(world) -> None:
    model, train, _ = world(0.4)
    missed, spread = misses(model, train, TEST), refits(model, train, TEST, 5)
    assert np.sqrt(np.square(missed).mean()) == pytest.approx(0.4, abs=0.1)
    assert np.sqrt(np.square(spread).mean()) < 2 * NOISE * np.sqrt(3 / CELLS)
    calm, cells, _ = world(0.0)
    assert np.sqrt(np.square(misses(calm, cells, TEST)).mean()) < 0.15


def test_what_was_measured_has_the_noise_of_its_cells_alone(world) -> None:
    model, train, _ = world(0.4)
    asked = (*train.conditions[:3], Label())
    np.testing.assert_array_equal(
        standard_errors(model, train, asked, fits=3), refits(model, train, asked, 3)
    )


def test_nothing_is_said_of_guesses_or_without_anything_to_learn_from(world) -> None:
    gone = Label.of([NAMES[0]])
    model, train, _ = world(0.0, (gone, *TEST))
    lacking = [label for label in TEST if NAMES[0] in label.perturbations]
    rest = [label for label in TEST if NAMES[0] not in label.perturbations]
    assert np.isnan(standard_errors(model, train, lacking, fits=2)).all()
    assert np.isfinite(standard_errors(model, train, rest, fits=2)).all()
    model, train, _ = world(0.0, DOUBLES)
    assert np.isnan(standard_errors(model, train, TEST, fits=2)).all()
    assert np.isfinite(standard_errors(model, train, [gone], fits=2)).all()


def test_one_fit_cannot_differ(world) -> None:
    model, train, _ = world(0.0)
    with pytest.raises(UserError, match="1 fits"):
        refits(model, train, TEST, 1)


def test_the_means_are_those_of_the_model_or_it_has_no_errors(make_screen) -> None:
    spec = make_screen({Label(): np.ones((2, 3)), Label.of(["A"]): np.ones((2, 3))}).spec()
    surface = response_surface.Config().build(spec)
    assert anchor_of(surface) is surface
    moved = ripple.Config().build(spec)
    assert anchor_of(moved) is moved.anchor
    assert anchor_of(ripple.Config(anchor="additive").build(spec)) is None
    assert anchor_of(no_effect.Config().build(spec)) is None
    model = perturbdiff.small().model.build(spec)
    assert anchor_of(model) is model.ripple.anchor
    model.weight.fill_(0.5)
    assert anchor_of(model) is None


@pytest.mark.slow
def test_predict_writes_them(tmp_path: Path, refused: Callable[..., str]) -> None:
    simulate.simulate(simulate.tiny()).write_h5ad(tmp_path / "tiny.h5ad")
    for name in ("response_surface", "additive"):
        main(["train", name, "--data", f"{tmp_path}/tiny.h5ad", "--out", f"{tmp_path}/{name}", "--quiet"])
    asked = ["--part", "test", "--cells", "4", "--out", f"{tmp_path}/pred.h5ad", "--errors"]
    main(["predict", f"{tmp_path}/response_surface", *asked, f"{tmp_path}/errors.csv", "--quiet"])
    found = pd.read_csv(tmp_path / "errors.csv")
    assert list(found) == ["condition", "gene", "control", "mean", "standard_error", "low", "high"]
    inside = found.dropna()
    assert ((inside["low"] <= inside["mean"]) & (inside["mean"] <= inside["high"])).all()
    assert len(inside) == len(found)
    text = refused("predict", f"{tmp_path}/additive", *asked, f"{tmp_path}/none.csv", "--quiet")
    assert "no standard errors of additive" in text
    assert not (tmp_path / "none.csv").exists()
