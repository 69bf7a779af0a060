"""What the response surface predicts, in worlds whose answers are known."""

import dataclasses

import numpy as np
import pytest
import torch

from knockon.data.screen import Screen
from knockon.models import additive, response_surface
from knockon.nn.surface import FOLDS
from knockon.types import Label, UserError

GENES = 40
NAMES = tuple(f"p{i}" for i in range(10))
EXACT = response_surface.Config(noise=0, cosines=60)
SMALL = response_surface.Config(cosines=60)

Cells = dict[Label, np.ndarray]


def around(mean: np.ndarray, spread: float = 0.2) -> np.ndarray:
    """Four different cells with exactly this mean."""
    return mean * (1 + spread * np.array([[-1.0], [-0.5], [0.5], [1.0]]))


def doubles() -> list[tuple[str, str]]:
    return [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]


def fit(config: object, screen: Screen, without: tuple[Label, ...] = (), vectors: object = None):
    model = config.build(screen.spec(vectors))
    model.fit_statistics(screen.select([label for label in screen.labels if label not in without]))
    return model


def predict(model: object, *labels: Label) -> np.ndarray:
    return model.mean(model.spec.encode(labels)).numpy()


def held_out(model: object, *labels: Label) -> np.ndarray:
    return model.held_out(model.spec.encode(labels)).numpy()


def world(*, bent: bool, noise: float = 0.0, seed: int = 0) -> tuple[Cells, dict[Label, np.ndarray]]:
    """Ten singles and all doubles, whose effects add up, or add up and saturate; and their true means."""
    draw = np.random.default_rng(seed)
    push = dict(zip(NAMES, draw.normal(scale=0.8, size=(10, GENES)), strict=True))
    base = draw.uniform(3, 5, GENES)
    truth = {Label(): base}
    for names in [*((name,) for name in NAMES), *doubles()]:
        total = sum(push[name] for name in names)
        truth[Label.of(names)] = base + (np.tanh(total) if bent else 0.5 * total)
    cells = {x: around(y) for x, y in truth.items()}
    if noise:
        cells = {x: y + draw.normal(scale=noise, size=(20, GENES)) for x, y in truth.items()}
    return cells, truth


def test_where_effects_add_up_combinations_are_the_sum_of_their_parts(make_screen) -> None:
    cells, truth = world(bent=False)
    asked = tuple(Label.of(names) for names in doubles()[::4])
    model = fit(EXACT, make_screen(cells), asked)
    np.testing.assert_allclose(predict(model, *asked), [truth[x] for x in asked], rtol=1e-4)


def test_where_effects_saturate_held_out_doubles_are_nearer_than_their_sums(make_screen) -> None:
    cells, truth = world(bent=True, noise=0.3)
    screen, asked = make_screen(cells), tuple(Label.of(names) for names in doubles()[::4])
    errors = [
        np.square(predict(fit(config, screen, asked), *asked) - [truth[x] for x in asked]).mean()
        for config in (SMALL, dataclasses.replace(SMALL, curved=False), additive.Config())
    ]
    assert errors[0] < 0.5 * errors[1]
    assert errors[1] < errors[2]  # denoised


def test_measured_conditions_are_answered_with_their_effects(make_screen) -> None:
    cells, truth = world(bent=True)
    asked = [Label(), Label.of(["p1"]), Label.of(["p1", "p2"])]
    np.testing.assert_allclose(
        predict(fit(EXACT, make_screen(cells)), *asked), [truth[x] for x in asked], rtol=1e-5
    )


def test_measured_effects_come_nearer_to_the_truth(make_screen) -> None:
    """Effects of few patterns; without options, how much noise is taken out is found by halves."""
    draw = np.random.default_rng(0)
    shapes, base = draw.normal(size=(2, GENES)), np.full(GENES, 4.0)
    truth = {Label.of([name]): base + draw.normal(scale=0.15, size=2) @ shapes for name in NAMES}
    cells = {x: y + draw.normal(scale=0.5, size=(10, GENES)) for x, y in truth.items()}
    cells[Label()] = base + draw.normal(scale=0.5, size=(1000, GENES))
    screen = make_screen(cells)
    wanted = np.array(list(truth.values()))
    errors = [
        np.square(predict(fit(config, screen), *truth) - wanted).mean()
        for config in (SMALL, EXACT, dataclasses.replace(SMALL, noise=1.0))
    ]
    assert errors[0] < 0.5 * errors[1]
    assert errors[0] == pytest.approx(errors[2], rel=0.2)


def test_an_unmeasured_single_is_the_mean_of_its_neighbors_by_their_vectors(make_screen) -> None:
    """What the neighbors of others would have guessed of them is borne out, and the mean over all is not."""
    base, one, other = np.full(GENES, 3.0), np.linspace(-1, 1, GENES), np.cos(np.arange(GENES))
    gone = (Label.of(["new"]), Label.of(["far0", "new"]))
    cells = {Label(): around(base)} | {x: around(base) for x in gone}
    cells |= {Label.of([f"near{i}"]): around(base + (i + 1) * one / 2) for i in range(3)}
    cells |= {Label.of([f"far{i}"]): around(base + other) for i in range(2)}
    angles = {"new": 0.0, "far0": 3.0, "far1": 3.1, "near0": 0.1, "near1": -0.1, "near2": 0.0}
    vectors = {name: np.array([np.cos(a), np.sin(a)]) for name, a in angles.items()}
    config = response_surface.Config(noise=0, cosines=60, neighbors=3, temperature=1e6, components=2)
    model = fit(config, make_screen(cells), gone, vectors)
    near, average = model.belief[1].tolist()
    assert 0.5 < near <= 1
    assert average < 0.2
    new = near * one + average * (3 * one + 2 * other) / 5
    np.testing.assert_allclose(predict(model, Label.of(["new"]))[0], base + new, rtol=1e-4)
    both = base + new + other
    np.testing.assert_allclose(predict(model, Label.of(["far0", "new"]))[0], both, rtol=1e-4)


def test_guesses_are_believed_as_far_as_singles_bear_them_out(make_screen) -> None:
    """The factor is the slope of measured singles on what the mean of the others would have guessed."""
    draw = np.random.default_rng(0)
    common = draw.normal(size=GENES) / 3
    for share in (0.0, 1.0):
        effects = [share * common + (1 - share) * draw.normal(size=GENES) / 3 for _ in range(6)]
        cells = {Label(): around(np.full(GENES, 3.0))}
        cells |= {Label.of([f"p{i}"]): around(3.0 + effect) for i, effect in enumerate(effects)}
        model = fit(response_surface.Config(noise=0, curved=False, missing="mean"), make_screen(cells), ())
        measured = np.array(effects)
        guessed = (measured.sum(0) - measured) / 5
        weight = 1 / np.linalg.norm(measured, axis=1, keepdims=True)
        slope = (weight * guessed * measured).sum() / (weight * guessed**2).sum()
        assert float(model.belief[0, 1]) == pytest.approx(np.clip(slope, 0, 1), abs=1e-3)


def test_where_neighbors_say_nothing_the_mean_effect_stands_in_for_them(make_screen) -> None:
    """All perturbations do much the same, and who is near whom is no more than chance."""
    draw = np.random.default_rng(0)
    names, common = [f"p{i}" for i in range(12)], draw.normal(size=GENES) / 2
    effects = {name: common + draw.normal(size=GENES) / 4 for name in names}
    cells = {Label(): around(np.full(GENES, 3.0))}
    cells |= {Label.of([name]): around(3.0 + effect) for name, effect in effects.items()}
    vectors = {name: draw.normal(size=3) for name in names}
    config = response_surface.Config(noise=0, curved=False, neighbors=1, components=3)
    gone = (Label.of(["p0"]),)
    model = fit(config, make_screen(cells), gone, vectors)
    missed = predict(model, *gone)[0] - 3.0 - effects["p0"]
    neighbor = effects[nearest_to(vectors, "p0")] - effects["p0"]
    assert np.square(missed).sum() < 0.8 * np.square(neighbor).sum()
    assert model.belief[1, 1] > 2 * model.belief[1, 0]


def nearest_to(vectors: dict[str, np.ndarray], name: str) -> str:
    """By cosine."""
    unit = {other: vector / np.linalg.norm(vector) for other, vector in vectors.items()}
    return max(unit.keys() - {name}, key=lambda other: unit[other] @ unit[name])


def test_what_was_never_measured_is_not_known(make_screen) -> None:
    cells, _ = world(bent=False)
    gone = tuple(label for label in cells if "p3" in label.perturbations)
    model = fit(EXACT, make_screen(cells), gone)
    asked = [Label.of(["p3"]), Label.of(["p1", "p3"]), Label.of(["p1", "p2"]), Label.of(["p1"]), Label()]
    assert model.knows(model.spec.encode(asked)).tolist() == [False, False, True, True, True]


@pytest.fixture
def contexts(make_screen) -> Screen:
    """Cell types t and u look alike, v does not; what B, C and D do in v is the contrary. A is not in t."""
    draw = np.random.default_rng(1)
    base = dict(zip("tuv", draw.uniform(3, 5, GENES) + np.array([[0], [0], [1.0]]), strict=True))
    base["v"] = base["v"] + draw.normal(scale=0.5, size=GENES)
    sign = {"t": 1, "u": 1, "v": -1}
    cells = {Label(covariates=(x,)): around(mean) for x, mean in base.items()}
    for name in "ABCD":
        effect = draw.normal(scale=0.6, size=GENES)
        for x in "tuv":
            if name != "A" or x != "t":
                label = Label.of([name], covariates=[x])
                cells[label] = around(base[x] + sign[x] * effect, 0.02)
    return make_screen(cells)


def test_effects_of_a_context_with_the_same_control_cells_are_carried_over(contexts: Screen) -> None:
    config = dataclasses.replace(EXACT, curved=False)
    model, means = fit(config, contexts), contexts.means()
    effect = means[Label.of(["A"], covariates=["u"])] - means[Label(covariates=("u",))]
    asked = Label.of(["A"], covariates=["t"])
    got = predict(model, asked)[0] - means[Label(covariates=("t",))]
    assert np.abs(got - effect).max() < 0.1 * np.abs(effect).max()
    mean = predict(fit(additive.Config(), contexts), asked)[0] - means[Label(covariates=("t",))]
    np.testing.assert_allclose(mean, 0, atol=1e-5)  # the plain mean over contexts says nothing


def test_where_effects_are_the_same_everywhere_all_contexts_count(make_screen) -> None:
    draw = np.random.default_rng(0)
    base = {x: draw.uniform(3, 5, GENES) for x in "tuv"}
    cells = {
        Label(covariates=(x,)): mean + draw.normal(scale=0.4, size=(400, GENES)) for x, mean in base.items()
    }
    truth = draw.normal(scale=0.2, size=(4, GENES))
    for name, effect in zip("ABCD", truth, strict=True):
        for x in "tuv":
            if name != "A" or x != "t":
                cells[Label.of([name], covariates=[x])] = (
                    base[x] + effect + draw.normal(scale=0.4, size=(40, GENES))
                )
    model = fit(dataclasses.replace(EXACT, curved=False), make_screen(cells))
    got = predict(model, Label.of(["A"], covariates=["t"]))[0] - base["t"]
    assert np.square(got - truth[0]).mean() < 0.75 * 0.16 / 40  # better than one context alone


def test_a_context_without_control_cells_borrows_those_of_all(contexts: Screen) -> None:
    few = contexts.select([x for x in contexts.labels if x != Label(covariates=("t",))])
    model = fit(SMALL, few)
    asked = [Label.of([name], covariates=["t"]) for name in "ABC"]
    assert model.knows(model.spec.encode(asked)).all()
    assert np.isfinite(predict(model, *asked)).all()
    assert np.isfinite(held_out(model, *asked)).all()


@pytest.mark.parametrize(("dose", "share"), [(1.0, 0.5), (10.0, 0.75), (100.0, 1.0), (0.1, 0.5), (1e4, 1.0)])
def test_doses_are_interpolated_in_their_logarithm(make_screen, dose: float, share: float) -> None:
    base, effect = np.full(GENES, 3.0), np.linspace(-1, 1, GENES)
    cells = {Label(): around(base), Label.of(["B"], [1.0]): around(base - effect)}
    cells |= {Label.of(["A"], [d]): around(base + k * effect) for d, k in ((1.0, 0.5), (100.0, 1.0))}
    model = fit(EXACT, make_screen(cells))
    np.testing.assert_allclose(predict(model, Label.of(["A"], [dose]))[0], base + share * effect, rtol=1e-4)


def test_doses_of_many_cells_weigh_no_more_between_doses(make_screen) -> None:
    base, effect = np.full(GENES, 3.0), np.linspace(-1, 1, GENES)
    cells = {Label(): around(base), Label.of(["A"], [1.0]): around(base)}
    cells[Label.of(["A"], [100.0])] = np.tile(around(base + effect), (50, 1))
    model = fit(EXACT, make_screen(cells))
    np.testing.assert_allclose(predict(model, Label.of(["A"], [10.0]))[0], base + effect / 2, rtol=1e-4)


def test_folds_have_equally_many_combinations_whatever_their_order(make_screen) -> None:
    cells, _ = world(bent=False)
    singles, pairs = ([x for x in cells if len(x.perturbations) == n] for n in (1, 2))
    order = [x for i in range(3) for x in (*singles[3 * i : 3 * i + 3], pairs[i])] + [Label()]
    model = fit(EXACT, make_screen({label: cells[label] for label in order}))
    several = (model.effects.perturbation > 0).all(1)
    assert len((model.treatment[several] % FOLDS).unique()) == 3


def test_held_out_doubles_are_the_sum_of_their_parts_and_not_what_was_measured(make_screen) -> None:
    cells, truth = world(bent=True)
    model = fit(dataclasses.replace(EXACT, curved=False), make_screen(cells))
    asked = [Label.of(names) for names in doubles()[:5]]
    sums = [sum(truth[Label.of([name])] - truth[Label()] for name in x.perturbations) for x in asked]
    np.testing.assert_allclose(held_out(model, *asked), truth[Label()] + sums, rtol=1e-4)
    np.testing.assert_allclose(predict(model, *asked), [truth[x] for x in asked], rtol=1e-4)


def test_held_out_predictions_do_not_see_the_cells_of_their_condition(make_screen) -> None:
    """Nearly: what genes do over all conditions (``response``), and denoising, have seen them too."""
    cells, _ = world(bent=True, noise=0.1)
    asked = Label.of(["p1", "p2"])
    changed = cells | {asked: cells[asked] + 3}
    one, other = (fit(EXACT, make_screen(x)) for x in (cells, changed))
    np.testing.assert_allclose(predict(other, asked) - predict(one, asked), 3, rtol=1e-3)
    assert np.abs(held_out(other, asked) - held_out(one, asked)).max() < 0.3
    plain = dataclasses.replace(EXACT, curved=False)
    one, other = (fit(plain, make_screen(x)) for x in (cells, changed))
    np.testing.assert_array_equal(held_out(other, asked), held_out(one, asked))


def test_held_out_predictions_tell_what_new_doubles_will_be_like(make_screen) -> None:
    cells, truth = world(bent=True, noise=0.3)
    screen, gone = make_screen(cells), tuple(Label.of(names) for names in doubles()[::4])
    model = fit(SMALL, screen, gone)
    kept = [Label.of(names) for names in doubles() if Label.of(names) not in gone]
    new = np.square(predict(model, *gone) - [truth[x] for x in gone]).mean()
    old = np.square(held_out(model, *kept) - [truth[x] for x in kept]).mean()
    assert old == pytest.approx(new, rel=0.5)


def test_company_does_not_matter(make_screen) -> None:
    """What varies by rounding only, as the difference between contexts where there is one, is no feature."""
    cells, _ = world(bent=True, noise=0.2)
    draw = np.random.default_rng(0)
    vectors = {name: draw.normal(size=4) for name in NAMES}
    gone = tuple(Label.of([name]) for name in NAMES[7:])
    model = fit(SMALL, make_screen(cells), gone, vectors)
    assert model.combine.weight.any()
    asked = model.spec.encode([*cells, *(Label.of([name]) for name in NAMES)])
    for answer in (model.held_out, model.mean):
        alone = torch.cat([answer(asked[i : i + 1]) for i in range(len(asked))])
        torch.testing.assert_close(answer(asked), alone, atol=1e-5, rtol=0)


def test_what_the_others_could_only_guess_is_predicted_as_it_was_measured(make_screen) -> None:
    cells, truth = world(bent=False)
    model = fit(EXACT, make_screen({x: y for x, y in cells.items() if len(x.perturbations) < 2}))
    np.testing.assert_allclose(held_out(model, Label.of(["p1"]))[0], truth[Label.of(["p1"])], rtol=1e-5)


def test_dead_genes_single_cells_and_single_conditions(make_screen) -> None:
    draw = np.random.default_rng(0)
    dead = np.r_[np.zeros(5), np.ones(GENES - 5)]
    base = draw.uniform(2, 4, GENES) * dead
    names = [("a",), ("b",), ("c",), ("d",), ("a", "b"), ("c", "d"), ("a", "c"), ("b", "d"), ("a", "d")]
    cells = {Label(): base + draw.normal(scale=0.1, size=(8, GENES)) * dead}
    cells |= {Label.of(x): base + draw.normal(scale=0.1, size=(1, GENES)) * dead for x in names}
    model = fit(SMALL, make_screen(cells))
    predicted = predict(model, Label.of(["b", "c"]), Label.of(["a"]))
    assert np.isfinite(predicted).all()
    assert not predicted[:, :5].any()
    only = fit(SMALL, make_screen({label: cells[label] for label in (Label(), Label.of(["a"]))}))
    assert np.isfinite(predict(only, Label.of(["a"]))).all()


def test_three_at_once(make_screen) -> None:
    cells, truth = world(bent=False)
    triples = [(NAMES[i], NAMES[i + 1], NAMES[i + 2]) for i in range(8)]
    for names in triples:
        effect = sum(truth[Label.of([name])] - truth[Label()] for name in names)
        truth[Label.of(names)] = truth[Label()] + effect
        cells[Label.of(names)] = around(truth[Label.of(names)])
    asked = (Label.of(triples[0]), Label.of(triples[5]))
    model = fit(EXACT, make_screen(cells), asked)
    np.testing.assert_allclose(predict(model, *asked), [truth[x] for x in asked], rtol=1e-4)


def test_pure_noise_is_taken_out_whole(make_screen) -> None:
    draw = np.random.default_rng(0)
    cells = {Label.of([name]): 4 + draw.normal(scale=0.5, size=(30, GENES)) for name in NAMES}
    cells[Label()] = 4 + draw.normal(scale=0.5, size=(3000, GENES))
    model = fit(SMALL, make_screen(cells))
    raw = np.mean([np.square(cells[Label.of([name])].mean(0) - 4).mean() for name in NAMES])
    assert model.effects.effect.square().mean() < 0.15 * raw


@pytest.mark.parametrize(
    ("field", "value"),
    [("noise", -0.5), ("neighbors", -1), ("temperature", 0.0), ("cosines", 0), ("components", 0)],
)
def test_options_that_mean_nothing_are_refused(make_screen, field: str, value: float) -> None:
    spec = make_screen(world(bent=False)[0]).spec()
    with pytest.raises(UserError, match=f"{field} of response_surface"):
        dataclasses.replace(EXACT, **{field: value}).build(spec)
