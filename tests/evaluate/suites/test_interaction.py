import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import balanced_accuracy_score

from knockon.evaluate.pairs import Pairs
from knockon.evaluate.scores import ceiling
from knockon.evaluate.suites import score
from knockon.evaluate.suites.interaction import (
    CLASSES,
    METRICS,
    RATE,
    Evidence,
    classes,
    gather,
    interaction_ap,
    interaction_auroc,
    interaction_class,
    interaction_cosine,
    interaction_size,
    non_additive,
    table,
)
from knockon.evaluate.truth import Truth
from knockon.types import UserError

NAMES = "interaction_cosine interaction_ap interaction_auroc interaction_class interaction_size"
GENES = 300
CELLS = 80
DOUBLES = ("A+B", "A+C", "B+C")


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- a world of known residuals, additive in log1p ---------------------------------------------------

EFFECTS = {
    name: np.random.default_rng(i).choice([-0.6, 0.0, 0.6], size=GENES) for i, name in enumerate("ABC")
}
KINDS = np.repeat(CLASSES, (GENES - 60, 20, 20, 20))


def change(text: str, *, planted: bool) -> np.ndarray:
    """Change of the mean: the sum of the parts, and in a planted world what ``KINDS`` says of a double."""
    parts = [EFFECTS[name] for name in text.split("+") if name in EFFECTS]
    total = np.sum(parts, axis=0) if parts else np.zeros(GENES)
    if not planted or len(parts) < 2:
        return total
    factor = np.select(
        [KINDS == "synergy", KINDS == "buffering", KINDS == "opposite"], [2.0, 0.25, -0.5], 1.0
    )
    return np.where((total == 0) & (KINDS == "synergy"), 0.8, factor * total)


def population(text: str, cells: int, draw: np.random.Generator, *, planted: bool) -> np.ndarray:
    spread = np.linspace(0.2, 0.6, GENES)[::-1]
    return 5 + change(text, planted=planted) + spread * draw.normal(size=(cells, GENES))


def world(*, planted: bool) -> anndata.AnnData:
    draw = np.random.default_rng(5)
    texts = ["control", "A", "B", "C", *DOUBLES]
    values = np.vstack([population(text, CELLS, draw, planted=planted) for text in texts])
    obs = pd.DataFrame({"perturbation": np.repeat(texts, CELLS)}, index=[f"c{i}" for i in range(len(values))])
    return anndata.AnnData(
        sp.csr_matrix(values), obs=obs, var=pd.DataFrame(index=[f"G{i}" for i in range(GENES)])
    )


def truth_of(make, *, planted: bool) -> Truth:
    screen = make.screen(world(planted=planted))
    return Truth.of(screen, make.split(screen, lambda label: len(label.perturbations) == 2))


@pytest.fixture(scope="module")
def planted(make):
    return truth_of(make, planted=True)


@pytest.fixture(scope="module")
def additive(make):
    return truth_of(make, planted=False)


def predictions(truth: Truth, *, planted: bool) -> dict[str, Pairs]:
    """Cells of predictors by what they know."""
    draw = np.random.default_rng(11)
    expected = table(Pairs(truth=truth, cells=truth.cells)).groupby("condition", sort=False)["expected"]
    sums = [np.array(expected.get_group(str(label))) for label in truth.labels]
    residuals = [change(str(x), planted=planted) - change(str(x), planted=False) for x in truth.labels]

    def cells(means):
        around = [population("control", CELLS, draw, planted=False) - 5 for _ in means]
        return Pairs(
            truth=truth,
            cells=tuple(sp.csr_matrix(mean + noise) for mean, noise in zip(means, around, strict=True)),
        )

    both = list(zip(truth.control, sums, residuals, strict=True))
    return {
        "knows": cells([control + total + residual for control, total, residual in both]),
        "half": cells([control + total + residual / 2 for control, total, residual in both]),
        "additive": cells([control + total for control, total, _ in both]),
        "flipped": cells([control + total - residual for control, total, residual in both]),
        "no effect": cells([control for control, _, _ in both]),
    }


def means(pairs: Pairs) -> pd.Series:
    return score(pairs, "interaction").groupby("metric", sort=False)["value"].mean()


def test_planted_interactions_are_called_and_classed(planted):
    found = table(Pairs(truth=planted, cells=planted.cells))
    assert list(found.columns) == ["condition", "gene", "expected", "real", "predicted", "class"]
    assert len(found) == 3 * GENES
    known = pd.concat(
        [
            pd.DataFrame(
                {"kind": KINDS, "residual": np.abs(change(x, planted=True) - change(x, planted=False))}
            )
            for x in DOUBLES
        ],
        ignore_index=True,
    )
    large = known["residual"] > 0.4
    assert (found["class"][large] == known["kind"][large]).mean() > 0.97
    none = known["residual"] == 0
    assert (found["class"][none] == "additive").mean() > 1 - RATE
    np.testing.assert_allclose(found["predicted"], found["real"])


def test_who_knows_the_interactions_is_near_one_and_the_additive_baseline_at_chance(planted):
    scored = {name: means(pairs) for name, pairs in predictions(planted, planted=True).items()}
    knows, baseline = scored["knows"], scored["additive"]
    assert list(knows.index) == NAMES.split()
    assert (knows[["interaction_ap", "interaction_auroc", "interaction_class"]] > 0.9).all()
    assert knows["interaction_cosine"] > 0.8
    assert knows["interaction_size"] < 0.05
    share = gather(Pairs(truth=planted, cells=planted.cells), 0).called.mean()
    assert baseline["interaction_cosine"] == pytest.approx(0, abs=0.1)
    assert baseline["interaction_ap"] == pytest.approx(share, abs=0.08)
    assert baseline["interaction_auroc"] == pytest.approx(0.5, abs=0.08)
    assert baseline["interaction_class"] == pytest.approx(0, abs=0.2)
    assert baseline["interaction_size"] > 0.7
    half = scored["half"]
    assert half["interaction_size"] == pytest.approx(1 / 3, abs=0.05)
    assert scored["flipped"]["interaction_cosine"] < -0.8
    assert scored["flipped"]["interaction_class"] < -0.4
    assert scored["flipped"]["interaction_auroc"] > 0.9  # detection is blind to signs


def test_a_replicate_is_at_the_ceiling(planted):
    top = ceiling(planted, "interaction").groupby("metric")["value"].mean()
    assert set(top.index) == set(NAMES.split())
    knows = means(predictions(planted, planted=True)["knows"])
    assert knows["interaction_cosine"] == pytest.approx(top["interaction_cosine"], abs=0.1)
    assert top["interaction_auroc"] > 0.9


def test_an_additive_world_has_nothing_to_detect(additive):
    """Neither for a replicate nor for no effect, although their residuals share the noise of the singles."""
    found = gather(Pairs(truth=additive, cells=additive.cells), 0)
    assert not found.called.any()
    for pairs in predictions(additive, planted=False).values():
        assert score(pairs, "interaction").empty
    assert ceiling(additive, "interaction").empty


def test_the_sampling_error_is_that_of_repeated_experiments(additive):
    """In an additive world, residuals in units of their error are standard normal."""
    found = gather(Pairs(truth=additive, cells=additive.cells), 0)
    z = found.real / found.error
    assert z.std() == pytest.approx(1, abs=0.08)
    assert z.mean() == pytest.approx(0, abs=0.15)


# ---- arrays by hand ----------------------------------------------------------------------------------


def test_classes_of_residuals():
    expected = np.array([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.05, -0.05]])
    observed = np.array([[2.0, 0.5, -0.05, -0.5, -2.0, -0.2, 0.3, 0.5, 0.5]])
    named = [CLASSES[kind] for kind in classes(observed - expected, expected)[0]]
    assert named == [
        *("synergy", "buffering", "buffering", "opposite"),
        *("synergy", "buffering", "opposite"),
        *("synergy", "synergy"),
    ]


def test_a_call_needs_size_significance_and_company():
    residual = np.array([[0.05, 0.5, -0.5, 0.9, *np.repeat([0.4, 0.0], (4, 20))]])
    error = np.array([[0.001, 1.0, 0.1, np.nan, *np.repeat([0.05, 1.0], (4, 20))]])
    tested = np.arange(28)[None] != 3
    wanted = [False, False, True, False, *np.repeat([True, False], (4, 20))]
    assert non_additive(residual, error, tested)[0].tolist() == wanted
    assert not non_additive(residual, error, np.zeros_like(tested)).any()
    residual[0, 7] = 0
    assert not non_additive(residual, error, tested).any()


def test_class_is_balanced_accuracy_above_chance(draw):
    """Where the expected change is large, the class tells the direction."""
    expected = np.full((1, 90), 2.0)
    called = np.arange(90)[None] < 80
    real = draw.choice([1.0, -1.0, -3.0], p=[0.6, 0.3, 0.1], size=(1, 90))
    predicted = np.where(draw.random((1, 90)) < 0.6, real, draw.choice([1.0, -1.0, -3.0], size=(1, 90)))
    kinds = [classes(x, expected)[called] for x in (real, predicted)]
    found = interaction_class(predicted, real, expected, called)
    assert found == pytest.approx(balanced_accuracy_score(*kinds, adjusted=True))
    always = [interaction_class(np.full((1, 90), x), real, expected, called)[0] for x in (1.0, -1.0, -3.0)]
    assert always == pytest.approx([0, 0, 0])


def test_a_class_needs_the_direction_where_nothing_was_expected():
    expected = np.array([[0.0, 0.0, 1.0, 1.0]])
    real = np.array([[1.0, -1.0, -0.5, -0.5]])
    called = np.ones((1, 4), dtype=bool)
    assert interaction_class(real, real, expected, called) == 1
    assert interaction_class(np.abs(real), real, expected, called) == pytest.approx(
        -0.5
    )  # a fourth, not a half
    assert interaction_class(0 * real, real, expected, called) == -1  # right in none


def test_detection_is_of_tested_genes_in_units_of_the_sampling_errors():
    predicted, called = np.array([[-0.4, 0.5, 0.5, 9.0]]), np.array([[True, False, False, False]])
    error, doubt = np.array([[0.1, 1.0, 0.0, 0.1]]), np.array([[0.0, 0.0, 1.0, 0.0]])
    tested = np.array([[True, True, True, False]])
    for find, chance in ((interaction_ap, 1 / 3), (interaction_auroc, 0.5)):
        assert find(predicted, error, doubt, tested, called) == 1
        assert find(0 * predicted, error, doubt, tested, called) == pytest.approx(chance)
        assert find(0 * predicted, 0 * error, 0 * doubt, tested, called) == pytest.approx(chance)


def test_cosine_is_of_the_called_genes_and_about_zero():
    real, called = np.array([[3.0, 4.0, 9.0]]), np.array([[True, True, False]])
    assert interaction_cosine(np.array([[4.0, 3.0, -99.0]]), real, called) == pytest.approx(24 / 25)
    assert interaction_cosine(-real, real, called) == pytest.approx(-1)
    assert interaction_cosine(0 * real, real, called) == 0


def test_size_is_blind_to_direction_and_bounded():
    real, called = np.array([[3.0, 4.0, 9.0]]), np.array([[True, True, False]])
    for factor, expected in ((1, 0), (-1, 0), (2, 1 / 3), (0.5, 1 / 3), (0, 1)):
        assert interaction_size(factor * real, real, called) == pytest.approx(expected)


def test_what_the_real_cells_cannot_tell_is_missing():
    real, none = np.array([[0.2, 0.1, np.nan]]), np.zeros((1, 3), dtype=bool)
    for value in (
        interaction_cosine(real, real, none),
        interaction_ap(real, real, real, ~none, none),
        interaction_auroc(real, real, real, ~none, none),
        interaction_auroc(real, real, real, ~none, ~none),
        interaction_class(real, real, real, none),
        interaction_size(real, real, none),
        interaction_class(np.ones((1, 3)), np.ones((1, 3)), np.ones((1, 3)), ~none),  # one class alone
    ):
        assert np.isnan(value).all()


# ---- which conditions --------------------------------------------------------------------------------


def test_the_tuple_only_needs_what_evidence_has():
    assert [metric.name for metric in METRICS] == NAMES.split()
    assert all(set(metric.needs) <= set(Evidence.__dataclass_fields__) and metric.how for metric in METRICS)


def test_genes_that_nobody_expresses_are_not_tested(make):
    cells = world(planted=True)
    cells.X = cells.X.multiply(np.arange(GENES) > 100).tocsr()
    screen = make.screen(cells)
    truth = Truth.of(screen, make.split(screen, lambda label: len(label.perturbations) == 2))
    found = gather(Pairs(truth=truth, cells=truth.cells), 0)
    assert found.tested.tolist() == [(np.arange(GENES) > 100).tolist()] * 3


def test_a_double_of_one_cell_has_nothing_to_find(make):
    lonely = world(planted=True)[: 6 * CELLS + 1].copy()
    screen = make.screen(lonely)
    truth = Truth.of(screen, make.split(screen, lambda label: len(label.perturbations) == 2))
    found = gather(Pairs(truth=truth, cells=truth.cells), 0)
    assert found.called.any(axis=1).tolist() == [True, True, False]


def test_only_doubles_with_both_singles_in_training_are_scored(make):
    screen = make.screen(world(planted=True))
    split = make.split(screen, lambda label: str(label) in ("C", "A+B", "A+C"))
    truth = Truth.of(screen, split)
    found = score(Pairs(truth=truth, cells=truth.cells), "interaction")
    assert set(found["condition"]) == {"A+B"}
    assert set(table(Pairs(truth=truth, cells=truth.cells))["condition"]) == {"A+B"}


def test_without_such_doubles_another_suite_is_advised(make):
    screen = make.screen(world(planted=True))
    truth = Truth.of(screen, make.split(screen, lambda label: str(label) in ("A", "A+B")))
    with pytest.raises(UserError, match=r"two singles .*: A, A\+B\..*another --suite"):
        score(Pairs(truth=truth, cells=truth.cells), "interaction")


def test_singles_are_those_of_the_same_context(make):
    screen = make.screen(make.cells(["control", "A", "B", "A+B"], contexts=["T", "K"]), ("cell_type",))
    split = make.split(screen, lambda label: len(label.perturbations) == 2 or str(label) == "A | K")
    truth = Truth.of(screen, split)
    pairs = Pairs(truth=truth, cells=truth.cells)
    found = table(pairs)
    assert set(found["condition"]) == {"A+B | T"}
    mean = {str(label): value for label, value in screen.means().items()}
    expected = mean["A | T"] + mean["B | T"] - 2 * mean["control | T"]
    np.testing.assert_allclose(found["expected"], expected, atol=1e-6)
    np.testing.assert_allclose(found["real"], mean["A+B | T"] - mean["control | T"], atol=1e-6)
