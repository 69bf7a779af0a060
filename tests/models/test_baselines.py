"""What each baseline predicts, on screens whose answers can be written down."""

from pathlib import Path

import numpy as np
import pytest
import torch

from knockon.data.screen import Screen
from knockon.model import Model
from knockon.models import (
    additive,
    latent_additive,
    linear,
    mean_shift,
    nearest,
    no_effect,
    shrunken_additive,
)
from knockon.models._embedding import embed_genes
from knockon.models.linear import solve_bilinear
from knockon.types import Label, Noise, UserError

BASE = np.array([1.0, 2.0, 0.5, 3.0])
A = np.array([0.5, 0.0, 0.25, -1.0])
B = np.array([0.0, -0.5, 0.5, 0.5])
C = np.array([0.2, 0.4, -0.1, 0.6])


def around(mean: np.ndarray) -> np.ndarray:
    """Four different cells with this mean."""
    spread = 0.1 * np.array([[-1.0], [-0.5], [0.5], [1.0]])
    return mean * (1 + spread)


def fit(config: object, screen: Screen, vectors: dict[str, np.ndarray] | None = None) -> Model:
    model = config.build(screen.spec(vectors))
    model.fit_statistics(screen.select([label for label in screen.labels if not held_out(label)]))
    return model


def held_out(label: Label) -> bool:
    """Conditions with a perturbation named HELD are never trained on."""
    return any(name.startswith("HELD") for name in label.perturbations)


def predict(model: Model, *labels: Label) -> np.ndarray:
    return model.mean(model.spec.encode(labels)).numpy()


def known(model: Model, *labels: Label) -> list[bool]:
    return model.knows(model.spec.encode(labels)).tolist()


@pytest.fixture
def pairs(make_screen) -> Screen:
    """Singles A, B, C, the double A+B with a synergy, and a perturbation that was never trained on."""
    return make_screen(
        {
            Label(): around(BASE),
            Label.of(["A"]): around(BASE + A),
            Label.of(["B"]): around(BASE + B),
            Label.of(["C"]): around(BASE + C),
            Label.of(["A", "B"]): around(BASE + A + B + 1),
            Label.of(["C", "HELD"]): around(BASE),
            Label.of(["HELD"]): around(BASE),
        }
    )


@pytest.fixture
def contexts(make_screen) -> Screen:
    """Three cell types; A is measured in t and u, B in u only, and v has only control cells."""
    cells = {
        Label(covariates=("t",)): around(BASE),
        Label(covariates=("u",)): around(BASE + 1),
        Label(covariates=("v",)): around(BASE + 2),
        Label.of(["A"], covariates=["t"]): around(BASE + A),
        Label.of(["A"], covariates=["u"]): around(BASE + 1 + 3 * A),
        Label.of(["B"], covariates=["u"]): around(BASE + 1 + B),
    }
    return make_screen(cells)


@pytest.fixture
def doses(make_screen) -> Screen:
    """A drug at 0.1, 1 and 100."""
    return make_screen(
        {
            Label(): around(BASE),
            **{Label.of(["A"], [d]): around(BASE + k * A) for d, k in ((0.1, 0.2), (1.0, 0.6), (100.0, 1.0))},
            Label.of(["B"], [1.0]): around(BASE + B),
        }
    )


def test_no_effect_returns_the_very_same_cells(pairs: Screen, rng: torch.Generator) -> None:
    model = fit(no_effect.Config(), pairs)
    control = torch.from_numpy(pairs.cells_of(Label()))[None]
    assert torch.equal(model.sample(control, model.spec.encode([Label.of(["A"])]), Noise(rng)), control)


def test_control_is_answered_with_control(pairs: Screen) -> None:
    for config in (mean_shift.Config(), additive.Config(), nearest.Config(), linear.Config()):
        np.testing.assert_allclose(predict(fit(config, pairs), Label())[0], BASE, rtol=1e-6)


def test_mean_shift_is_the_mean_of_training_perturbations(pairs: Screen) -> None:
    expected = np.mean([BASE + A, BASE + B, BASE + C, BASE + A + B + 1], axis=0)
    predicted = predict(fit(mean_shift.Config(), pairs), Label.of(["HELD"]), Label.of(["A"]))
    np.testing.assert_allclose(predicted, [expected] * 2, rtol=1e-6)


def test_mean_shift_keeps_contexts_apart_and_transfers_effects(contexts: Screen) -> None:
    model = fit(mean_shift.Config(), contexts)
    asked = [Label.of(["B"], covariates=[c]) for c in "tuv"]
    expected = [BASE + A, BASE + 1 + (3 * A + B) / 2, BASE + 2 + (4 * A + B) / 3]
    np.testing.assert_allclose(predict(model, *asked), np.maximum(expected, 0), rtol=1e-5)


def test_context_without_control_cells_borrows_those_of_all_contexts(contexts: Screen) -> None:
    known_contexts = [label for label in contexts.labels if label.covariates != ("v",)]
    model = fit(mean_shift.Config(), contexts.select(known_contexts))
    predicted = predict(model, Label.of(["B"], covariates=["v"]))[0]
    np.testing.assert_allclose(predicted, BASE + 0.5 + (4 * A + B) / 3, rtol=1e-5)


def test_additive_sums_singles_and_prefers_what_was_measured(pairs: Screen) -> None:
    model = fit(additive.Config(), pairs)
    asked = [Label.of(["A", "C"]), Label.of(["A", "B"]), Label.of(["B"])]
    np.testing.assert_allclose(predict(model, *asked), [BASE + A + C, BASE + A + B + 1, BASE + B], rtol=1e-5)


def test_predicted_means_are_not_negative(make_screen) -> None:
    cells = {
        Label(): BASE,
        Label.of(["A"]): 0.3 * BASE,
        Label.of(["B"]): 0.3 * BASE,
        Label.of(["A", "HELD"]): BASE,
    }
    model = fit(additive.Config(), make_screen({label: around(mean) for label, mean in cells.items()}))
    assert (predict(model, Label.of(["A", "B"])) == 0).all()


@pytest.mark.parametrize(("missing", "part"), [("mean", (2 * A + 2 * B + C + 1) / 4), ("zero", 0 * A)])
def test_additive_fills_in_missing_singles_on_request(pairs: Screen, missing: str, part: np.ndarray) -> None:
    model = fit(additive.Config(missing=missing), pairs)
    asked = [Label.of(["A", "HELD"]), Label.of(["HELD"])]
    assert known(model, *asked) == [True, True]
    np.testing.assert_allclose(predict(model, *asked), [BASE + A + part, BASE + part], rtol=1e-5)


def test_additive_refuses_missing_singles(pairs: Screen) -> None:
    model = fit(additive.Config(), pairs)
    asked = [Label.of(["A", "HELD"]), Label.of(["HELD"]), Label.of(["A", "B"]), Label.of(["B", "C"])]
    assert known(model, *asked) == [False, False, True, True]


def test_additive_prefers_the_same_context_to_the_others(contexts: Screen) -> None:
    model = fit(additive.Config(), contexts)
    asked = [Label.of(["A"], covariates=[c]) for c in "tuv"] + [Label.of(["B"], covariates=["t"])]
    expected = [BASE + A, BASE + 1 + 3 * A, BASE + 2 + 2 * A, BASE + B]
    np.testing.assert_allclose(predict(model, *asked), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("dose", "share"), [(0.1, 0.2), (1.0, 0.6), (10.0, 0.8), (0.001, 0.2), (1000.0, 1.0), (10**-0.5, 0.4)]
)
@pytest.mark.parametrize("config", [additive.Config(), nearest.Config()])
def test_doses_are_interpolated_in_their_logarithm(
    doses: Screen, config: object, dose: float, share: float
) -> None:
    predicted = predict(fit(config, doses), Label.of(["A"], [dose]))[0]
    np.testing.assert_allclose(predicted, BASE + share * A, rtol=1e-5)


def test_shrunken_additive_multiplies_sums_by_the_slope_of_measured_combinations(pairs: Screen) -> None:
    model = fit(shrunken_additive.Config(), pairs)
    total, found = A + B, A + B + 1
    factor = min(1, (total * found).sum() / (total**2).sum())
    assert model.factor.item() == pytest.approx(factor, rel=1e-5)
    asked = [Label.of(["A", "C"]), Label.of(["A", "B"]), Label.of(["B"]), Label()]
    expected = [BASE + factor * (A + C), BASE + A + B + 1, BASE + B, BASE]
    np.testing.assert_allclose(predict(model, *asked), expected, rtol=1e-5)


@pytest.mark.parametrize(("share", "factor"), [(0.6, 0.6), (1.4, 1.0), (-0.5, 0.0)])
def test_the_factor_of_shrunken_additive_is_between_none_and_all(
    make_screen, share: float, factor: float
) -> None:
    cells = {Label(): BASE, Label.of(["A"]): BASE + A, Label.of(["B"]): BASE + B, Label.of(["C"]): BASE + C}
    cells[Label.of(["A", "B"])] = BASE + share * (A + B)
    model = fit(shrunken_additive.Config(), make_screen({x: around(mean) for x, mean in cells.items()}))
    assert model.factor.item() == pytest.approx(factor, abs=1e-5)
    np.testing.assert_allclose(predict(model, Label.of(["B", "C"]))[0], BASE + factor * (B + C), rtol=1e-5)


def test_without_combinations_sums_are_shrunk_by_what_is_not_noise(make_screen) -> None:
    draw, base = np.random.default_rng(0), np.full(400, 5.0)
    effects = draw.normal(scale=0.1, size=(20, 400))
    cells = {
        Label.of([f"p{i}"]): base + e + draw.normal(scale=0.5, size=(25, 400)) for i, e in enumerate(effects)
    }
    cells[Label()] = base + draw.normal(scale=0.5, size=(100, 400))
    model = fit(shrunken_additive.Config(), make_screen(cells))
    noise = 0.25 * (1 / 25 + 1 / 100)
    assert model.factor.item() == pytest.approx(0.01 / (0.01 + noise), rel=0.1)


def test_shrunken_additive_knows_what_additive_knows(pairs: Screen, contexts: Screen) -> None:
    asked = [Label.of(["A", "HELD"]), Label.of(["HELD"]), Label.of(["A", "B"]), Label.of(["B", "C"])]
    for missing in ("refuse", "mean", "zero"):
        plain = fit(additive.Config(missing=missing), pairs)
        assert known(fit(shrunken_additive.Config(missing=missing), pairs), *asked) == known(plain, *asked)
    model, plain = fit(shrunken_additive.Config(), contexts), fit(additive.Config(), contexts)
    carried = [Label.of(["A"], covariates=["v"]), Label.of(["B"], covariates=["t"])]
    np.testing.assert_array_equal(predict(model, *carried), predict(plain, *carried))  # measured elsewhere


def test_nearest_on_doubles_is_the_matching_mean(pairs: Screen) -> None:
    predicted = predict(fit(nearest.Config(), pairs), Label.of(["A", "C"]), Label.of(["A", "B"]))
    np.testing.assert_allclose(predicted, [BASE + (A + C) / 2, BASE + A + B + 1], rtol=1e-5)


def test_nearest_falls_back_on_combinations_that_hold_the_perturbation(make_screen) -> None:
    cells = {
        Label(): around(BASE),
        Label.of(["A"]): around(BASE + A),
        Label.of(["B", "C"]): around(BASE + B + C),
        Label.of(["A", "HELD"]): around(BASE),
    }
    model = fit(nearest.Config(), make_screen(cells))
    predicted = predict(model, Label.of(["B"]), Label.of(["A", "B"]))
    np.testing.assert_allclose(predicted, [BASE + B + C, BASE + (A + B + C) / 2], rtol=1e-5)
    assert known(model, Label.of(["B"]), Label.of(["HELD"])) == [True, False]


def test_nearest_weighs_neighbors_by_their_distance(pairs: Screen) -> None:
    angles = {"A": 0.5, "B": -0.7, "C": 2.5, "HELD": 0.0}
    # vectors with equal spread and no mean in either direction keep their cosines when standardized
    vectors = {name: np.array([np.cos(a), np.sin(a)]) for name, a in angles.items()}
    model = fit(nearest.Config(neighbors=1, components=2), pairs, vectors)
    assert known(model, Label.of(["HELD"])) == [True]
    codes = pairs.spec(vectors).perturbations
    neighbor = codes[int(model.neighbors.codes[codes.index("HELD") + 1, 0]) - 1]
    effect = {"A": A, "B": B, "C": C}[neighbor]
    np.testing.assert_allclose(predict(model, Label.of(["HELD"]))[0], BASE + effect, rtol=1e-5)
    alike = fit(nearest.Config(neighbors=3, temperature=1e6), pairs, vectors)
    np.testing.assert_allclose(predict(alike, Label.of(["HELD"]))[0], BASE + (A + B + C) / 3, rtol=1e-5)


@pytest.fixture
def panel(make_screen) -> Screen:
    """Perturbations that are genes of the panel, one that is not, and a double."""
    draw = np.random.default_rng(0)
    done = [["g0"], ["g1"], ["g2"], ["g3"], ["g1", "g4"], ["X"], ["g5", "HELD"], ["g6", "HELD"]]
    cells = {Label(): draw.uniform(1, 2, (4, 8))}
    cells |= {Label.of(names): draw.uniform(0.5, 3, (4, 8)) for names in done}
    return make_screen(cells)


def test_linear_is_its_closed_form(panel: Screen) -> None:
    model = fit(linear.Config(components=3, ridge=0.1), panel)
    train = {
        label: panel.cells_of(label).mean(0, dtype=float) for label in panel.labels if not held_out(label)
    }
    x = np.stack(list(train.values()), axis=1)
    centered = x - x.mean(0)
    values, axes = np.linalg.eigh(centered.T @ centered)
    g = centered @ axes[:, np.argsort(-values)[:3]]
    row = {name: g[i] for i, name in enumerate(panel.genes)}
    usable = [label for label in train if "X" not in label.perturbations]
    y = np.stack([train[label] - train[Label()] for label in usable], axis=1)
    p = np.array([sum((row[name] for name in label.perturbations), np.zeros(3)) for label in usable])
    b = y.mean(1, keepdims=True)
    ridge = 0.1 * np.eye(3)
    w = np.linalg.inv(g.T @ g + ridge) @ g.T @ (y - b) @ p @ np.linalg.inv(p.T @ p + ridge)
    for names in (["g5"], ["g0", "g6"], ["g2"]):
        expected = train[Label()] + g @ w @ sum(row[name] for name in names) + b[:, 0]
        np.testing.assert_allclose(predict(model, Label.of(names))[0], expected.clip(0), rtol=1e-4, atol=1e-5)


def test_linear_knows_genes_of_the_panel_only(panel: Screen) -> None:
    model = fit(linear.Config(), panel)
    asked = [Label.of(["g0"]), Label.of(["g4"]), Label.of(["X"]), Label.of(["g0", "X"]), Label.of(["HELD"])]
    assert known(model, *asked) == [True, True, False, False, False]


def test_linear_with_vectors_knows_all(panel: Screen) -> None:
    names = {name for label in panel.vocabulary for name in label.perturbations}
    draw = np.random.default_rng(1)
    model = fit(linear.Config(), panel, {name: draw.normal(size=5) for name in sorted(names)})
    assert known(model, Label.of(["X"]), Label.of(["HELD"])) == [True, True]
    assert np.isfinite(predict(model, Label.of(["X"]), Label.of(["HELD"]))).all()


@pytest.mark.parametrize(
    ("config", "gone"), [(linear.Config(), "X"), (latent_additive.small().model, "HELD")]
)
def test_vectors_of_some_leave_the_others_unknown(panel: Screen, config: object, gone: str) -> None:
    """``X`` was trained, and ``linear`` knows by vectors alone; ``HELD`` was not."""
    names = sorted({name for label in panel.vocabulary for name in label.perturbations})
    draw = np.random.default_rng(1)
    vectors = {name: draw.normal(size=5) for name in names}
    whole, some = (fit(config, panel, {n: v for n, v in vectors.items() if n != out}) for out in ("", gone))
    asked = [Label.of([name]) for name in ("X", "HELD")]
    assert known(whole, *asked) == [True, True]
    assert known(some, *asked) == [name != gone for name in ("X", "HELD")]
    kept = [label for label, knows in zip(asked, known(some, *asked), strict=True) if knows]
    control, noise = torch.ones(len(kept), 4, 8), Noise(torch.Generator())
    assert some.eval().sample(control, some.spec.encode(kept), noise).isfinite().all()


def test_bilinear_solution_recovers_what_made_the_data() -> None:
    draw = np.random.default_rng(0)
    g, w, p = draw.normal(size=(30, 4)), draw.normal(size=(4, 3)), draw.normal(size=(12, 3))
    np.testing.assert_allclose(solve_bilinear(g @ w @ p.T, g, p, ridge=1e-10), w, atol=1e-7)


def test_gene_embedding_keeps_the_geometry_of_the_genes(panel: Screen) -> None:
    x = np.stack(list(panel.means().values()), axis=1)
    centered = x - x.mean(0)
    g = embed_genes(panel, dim=20)
    np.testing.assert_allclose(g @ g.T, centered @ centered.T, atol=1e-9)
    assert embed_genes(panel, dim=2).shape == (8, 2)


@pytest.mark.parametrize("part", ["control", "perturbed"])
def test_training_part_without_control_or_without_perturbed_cells_is_refused(
    pairs: Screen, part: str
) -> None:
    model = additive.Config().build(pairs.spec())
    labels = pairs.conditions if part == "control" else pairs.controls
    with pytest.raises(UserError, match=f"no {part} cells"):
        model.fit_statistics(pairs.select(labels))


DOUBLES = ("KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2")


@pytest.fixture(scope="module")
def norman(shared: Path) -> Screen:
    return Screen.read(shared / "data" / "norman19.h5ad")


@pytest.mark.parametrize(
    ("config", "mse", "pearson"),
    [
        (no_effect.Config(), 0.00466, None),
        (mean_shift.Config(), 0.00416, 0.171),
        (additive.Config(), 0.00040, 0.871),
    ],
)
def test_known_scores_on_norman_doubles(
    norman: Screen, rng: torch.Generator, config: object, mse: float, pearson: float | None
) -> None:
    test = [Label.of(double.split("+")) for double in DOUBLES]
    model = config.build(norman.spec())
    model.fit_statistics(norman.select(set(norman.labels) - set(test)))
    condition = model.spec.encode(test)
    means = norman.means()
    truth, base = np.stack([means[label] for label in test]), means[Label()]
    control = torch.from_numpy(norman.cells_of(Label())).expand(len(test), -1, -1)
    emitted = model.sample(control, condition, Noise(rng)).mean(1, dtype=torch.float64).numpy()
    for predicted, tolerance in ((model.mean(condition).numpy(), 0.012), (emitted, 0.04)):
        assert np.square(predicted - truth).mean() == pytest.approx(mse, rel=tolerance)
        if pearson is not None:
            pairs = zip(predicted - base, truth - base, strict=True)
            correlation = np.mean([np.corrcoef(p, t)[0, 1] for p, t in pairs])
            assert correlation == pytest.approx(pearson, abs=tolerance / 2)
