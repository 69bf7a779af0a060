"""ripple moves real cells to its anchor's mean."""

import dataclasses

import numpy as np
import pytest
import torch

from knockon.data.screen import Screen
from knockon.models import ripple
from knockon.types import CellSets, Label, Noise, UserError

GENES, CELLS, PHI = 30, 200, 0.3
ADDITIVE = ripple.Config(anchor="additive")
SILENT, MARKER = 0, 1
"""A gene that no cell has, and one that only cells of context t have."""


def measure(draw: np.random.Generator, rate: np.ndarray, cells: int) -> np.ndarray:
    """Negative binomial counts, one of which is worth 1, 2 or 3 in a cell, as log1p."""
    unit = draw.integers(1, 4, size=(cells, 1))
    counts = draw.poisson(draw.gamma(1 / PHI, PHI, size=(cells, len(rate))) * rate / unit)
    return np.log1p(unit * counts)


@pytest.fixture(scope="module")
def rates() -> dict[str, np.ndarray]:
    """Expected normalized counts of control cells, and by what perturbations multiply them."""
    draw = np.random.default_rng(0)
    base = np.exp(draw.uniform(-1, 2.5, GENES))
    base[SILENT] = 0
    factors = {name: np.exp(draw.normal(scale=0.7, size=GENES)) for name in "ABCD"}
    return {"": base} | factors


def world(make_screen, rates: dict[str, np.ndarray], contexts: tuple[str, ...] = ()) -> Screen:
    draw, cells = np.random.default_rng(1), {}
    for context in contexts or (None,):
        base = rates[""].copy()
        if context not in (None, "t"):
            base[MARKER] = 0
        where = [] if context is None else [context]
        cells[Label(covariates=tuple(where))] = measure(draw, base, CELLS)
        for names in ("A", "B", "C", "D", "AB", "CD"):
            rate = base * np.prod([rates[name] for name in names], axis=0)
            cells[Label.of(list(names), covariates=where)] = measure(draw, rate, CELLS)
    return make_screen(cells)


@pytest.fixture
def screen(make_screen, rates) -> Screen:
    return world(make_screen, rates)


@pytest.fixture
def contexts(make_screen, rates) -> Screen:
    return world(make_screen, rates, ("t", "u"))


def fit(config: ripple.Config, screen: Screen, without: tuple[Label, ...] = ()) -> ripple.Ripple:
    model = config.build(screen.spec())
    model.fit_statistics(screen.select([label for label in screen.labels if label not in without]))
    return model


def sample(
    model: ripple.Ripple, screen: Screen, *labels: Label, cells: int = 100, seed: int = 0
) -> torch.Tensor:
    control = [screen.gather(screen.control_rows(label)[:cells]) for label in labels]
    noise = Noise(torch.Generator().manual_seed(seed))
    return model.sample(torch.from_numpy(np.stack(control)), model.spec.encode(labels), noise)


AB = Label.of(["A", "B"])


@pytest.mark.parametrize("anchor", ["response_surface", "additive", "shrunken_additive"])
def test_cells_have_the_mean_of_the_anchor(screen: Screen, anchor: str) -> None:
    model = fit(ripple.Config(anchor=anchor, populations=1), screen, (AB,))
    mean = model.anchor.mean(model.spec.encode([AB]))[0]
    cells = sample(model, screen, AB)[0]
    control = torch.from_numpy(screen.means()[Label()]).float()
    assert (cells.mean(0) - mean).abs().max() < 0.1
    assert (cells.mean(0) - mean).square().mean() < 0.01 * (control - mean).square().mean()


def test_several_populations_have_the_mean_together(screen: Screen) -> None:
    model = fit(ADDITIVE, screen, (AB,))
    mean = model.anchor.mean(model.spec.encode([AB]))[0]
    cells = sample(model, screen, AB, cells=200)[0]
    assert (cells.mean(0) - mean).square().mean() < 0.02 * mean.square().mean()


def test_populations_look_like_measured_ones(screen: Screen) -> None:
    """Zeros and variances of a double that was not measured; they follow from its mean."""
    model = fit(dataclasses.replace(ADDITIVE, populations=1), screen, (AB,))
    cells, real = sample(model, screen, AB, cells=CELLS)[0].numpy(), screen.cells_of(AB)
    control = screen.cells_of(Label())
    zeros = [np.abs((x == 0).mean(0) - (real == 0).mean(0)).mean() for x in (cells, control)]
    spread = [np.abs(x.std(0) - real.std(0)).mean() for x in (cells, control)]
    assert zeros[0] < 0.5 * zeros[1]
    assert spread[0] < 0.9 * spread[1]


def test_silent_genes_stay_silent(screen: Screen) -> None:
    model = fit(ripple.default().model, screen, (AB,))
    assert not sample(model, screen, AB)[..., SILENT].any()


def test_control_cells_come_back_where_nothing_was_done(screen: Screen) -> None:
    model = fit(ripple.default().model, screen)
    control = torch.from_numpy(screen.cells_of(Label())[:50])
    assert torch.equal(sample(model, screen, AB, Label(), cells=50)[1], control)


def test_the_same_generator_gives_the_same_cells(screen: Screen) -> None:
    model = fit(ADDITIVE, screen)
    one, again, other = (sample(model, screen, AB, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_with_a_generator_for_each_a_set_is_made_as_if_alone(screen: Screen) -> None:
    model, labels = fit(ADDITIVE, screen), [AB, Label(), Label.of(["C"])]
    control = torch.from_numpy(screen.cells_of(Label())[:60]).expand(3, -1, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = model.sample(control, model.spec.encode(labels), Noise(*generators))
    alone = Noise(torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        model.sample(control[2:], model.spec.encode(labels[2:]), alone)[0], together[2]
    )


def sources(model: ripple.Ripple, label: Label) -> torch.Tensor:
    """Share of the cells that come from each population."""
    condition = model.spec.encode([label])
    return model._nearest(model.anchor.mean(condition), condition, None)[0]


def test_cells_come_from_the_nearest_populations(screen: Screen) -> None:
    model = fit(dataclasses.replace(ADDITIVE, populations=2), screen, (AB,))
    weights, names = sources(model, AB), [str(x) for x in screen.labels if x not in (AB, Label())]
    assert (weights > 0).sum() == 2
    assert weights.sum().item() == pytest.approx(1)
    mean = model.anchor.mean(model.spec.encode([AB]))
    distance = (mean - model.mean).norm(dim=1)
    order = distance.argsort()
    assert set(weights.nonzero().flatten().tolist()) == set(order[:2].tolist())
    assert weights[order[0]] > weights[order[1]]
    ratio = (distance[order[1]] / distance[order[0]]).square()
    torch.testing.assert_close(weights[order[0]] / weights[order[1]], ratio, rtol=1e-3, atol=0)
    assert len(names) == len(model.donors) - 1


def test_a_measured_condition_comes_from_its_own_cells(screen: Screen) -> None:
    model = fit(ADDITIVE, screen)
    weights = sources(model, AB)
    assert weights[screen.conditions.index(AB)] > 0.999
    cells = sample(model, screen, AB, cells=120)[0].numpy()
    kept = model.donors.cells_of(screen.conditions.index(AB)).numpy()
    assert np.mean([np.abs(kept - cell).max(1).min() < 0.5 for cell in cells]) > 0.8


def test_cells_come_from_the_asked_context(contexts: Screen) -> None:
    asked = [Label.of(["A", "B"], covariates=[x]) for x in "tu"]
    model = fit(ADDITIVE, contexts, tuple(asked))
    there = [[label.covariates for label in (*contexts.conditions, *contexts.controls) if label not in asked]]
    for label in asked:
        weights = sources(model, label)
        assert weights.sum().item() == pytest.approx(1)
        chosen = {there[0][i] for i in weights.nonzero().flatten().tolist()}
        assert chosen == {label.covariates}
    cells = sample(model, contexts, *asked)
    assert (cells[0, :, MARKER] > 0).any()
    assert not cells[1, :, MARKER].any()


def test_a_context_without_any_cells_borrows_those_of_all(contexts: Screen) -> None:
    gone = tuple(label for label in contexts.labels if label.covariates == ("u",))
    model = fit(ADDITIVE, contexts, gone)
    asked = Label.of(["A"], covariates=["u"])
    assert sources(model, asked).sum().item() == pytest.approx(1)
    assert sample(model, contexts, asked).isfinite().all()


def test_without_populations_cells_start_as_control_cells(screen: Screen) -> None:
    model = fit(dataclasses.replace(ADDITIVE, populations=0, still=6.0), screen, (AB,))  # nothing is drawn
    wanted = model.anchor.mean(model.spec.encode([AB]))[0] > 0.1
    cells, control = sample(model, screen, AB)[0], torch.from_numpy(screen.cells_of(Label())[:100])

    def patterns(x: torch.Tensor) -> list[tuple[bool, ...]]:
        return sorted(tuple(row) for row in (x[:, wanted] > 0).tolist())

    assert patterns(cells) == patterns(control)
    assert not torch.equal(cells > 0, control > 0)  # in another order


@pytest.mark.parametrize("kept", [1, 20, 1000])
def test_kept_caps_the_cells_that_are_stored(screen: Screen, kept: int) -> None:
    model = fit(dataclasses.replace(ADDITIVE, kept=kept), screen)
    for i, label in enumerate((*screen.conditions, *screen.controls)):
        stored, real = model.donors.cells_of(i).numpy(), screen.cells_of(label)
        assert len(stored) == min(kept, CELLS)
        assert all((real == cell).all(1).any() for cell in stored)
        assert len(np.unique(stored, axis=0)) == len(stored)
    assert sample(model, screen, AB).isfinite().all()


def test_knows_what_its_anchor_knows(make_screen, rates) -> None:
    whole = world(make_screen, rates)
    gone = tuple(label for label in whole.labels if "D" in label.perturbations)
    asked = [Label.of(["D"]), Label.of(["C", "D"]), AB, Label.of(["A", "C"]), Label()]
    surface, plain = fit(ripple.Config(), whole, gone), fit(ADDITIVE, whole, gone)
    condition = surface.spec.encode(asked)
    assert surface.knows(condition).tolist() == [False, False, True, True, True]
    for model in (surface, plain):
        known = model.anchor.knows(condition) | (condition.perturbation == 0).all(1)
        assert torch.equal(model.knows(condition), known)


def test_cells_of_another_model_are_pulled_to_the_mean(screen: Screen) -> None:
    model, labels = fit(ADDITIVE, screen, (AB,)), [AB, Label()]
    condition, noise = model.spec.encode(labels), Noise(torch.Generator().manual_seed(0))
    cells = torch.from_numpy(screen.cells_of(Label.of(["C"]))).expand(2, -1, -1)
    assert torch.equal(model.pull(cells, condition, 0.0, noise), cells)
    mean, before = model.anchor.mean(condition)[0], cells[0].mean(0)
    for weight in (0.5, 1.0):
        pulled = model.pull(cells, condition, weight, noise)
        assert torch.equal(pulled[1], cells[1])
        wanted = before + weight * (mean - before)
        assert (pulled[0].mean(0) - wanted).square().mean() < 0.01 * (mean - before).square().mean()


def test_training_conditions_are_drawn_as_if_they_had_not_been_measured(screen: Screen) -> None:
    model = fit(ripple.Config(), screen)
    model.prepare()
    condition = model.spec.encode([AB, Label()])
    control = torch.from_numpy(screen.cells_of(Label())[:100]).expand(2, -1, -1)
    cells = model.held_out(control, condition, Noise(torch.Generator().manual_seed(0)))
    assert torch.equal(cells[1], control[1])
    held = model.anchor.held_out(condition)[0]
    torch.testing.assert_close(model.expect(condition, held_out=True)[0], held)
    measured = torch.from_numpy(screen.means()[AB]).float()
    assert (cells[0].mean(0) - held).square().mean() < 0.2 * (measured - held).square().mean()
    new = model.spec.encode([Label.of(["A", "C"])])
    torch.testing.assert_close(model.expect(new, held_out=True), model.anchor.mean(new))


def test_loss_is_the_squared_error_of_the_mean(screen: Screen, rng: torch.Generator) -> None:
    model = fit(ADDITIVE, screen)
    condition = model.spec.encode([AB])
    target = torch.from_numpy(screen.cells_of(AB))[None]
    batch = CellSets(target=target, control=target, condition=condition)
    expected = (model.anchor.mean(condition) - target.mean(1)).square().mean()
    torch.testing.assert_close(model.loss(batch, rng)["total"], expected)


def test_dispersions_are_those_of_the_counts(make_screen) -> None:
    draw = np.random.default_rng(0)
    rate = np.geomspace(0.3, 20, GENES)
    names = [[], ["A"], ["B"], ["C"]]
    screen = make_screen({Label.of(x): measure(draw, rate * (1 + len(x)), 600) for x in names})
    model = fit(dataclasses.replace(ADDITIVE, kept=600), screen)
    assert model.dispersion[GENES // 2 :].mean().item() == pytest.approx(PHI, rel=0.15)


def test_one_cell_and_double_precision(screen: Screen) -> None:
    model = fit(ADDITIVE, screen, (AB,))
    assert sample(model, screen, AB, cells=1).shape == (1, 1, GENES)
    control = torch.from_numpy(screen.cells_of(Label())[:40]).double()[None]
    cells = model.sample(control, model.spec.encode([AB]), Noise(torch.Generator().manual_seed(0)))
    assert cells.dtype == torch.float64


@pytest.mark.parametrize(("field", "value"), [("kept", 0), ("populations", -1), ("still", -0.1)])
def test_options_that_mean_nothing_are_refused(screen: Screen, field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field} of ripple"):
        dataclasses.replace(ADDITIVE, **{field: value}).build(screen.spec())
