"""Rankings, on arrays and on a world whose answers are known."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import scipy.sparse as sp

from knockon.data.screen import Screen
from knockon.ranking.rank import cosine, covered, excess, interval, length, rank, scale, square
from knockon.ranking.source import Draws, Source
from knockon.types import Label, UserError

GENES = 60


class World(Source):
    """Singles with random effects; pairs add up but for what is planted; draws are as noisy as cells."""

    def __init__(self, planted: dict[str, float], *, noise: float = 0.3, refused: Sequence[str] = ()) -> None:
        random = np.random.default_rng(0)
        self.single = {name: random.normal(size=GENES) * 0.4 for name in "ABCDEF"}
        self.planted, self.noise, self.refused = planted, noise, refused
        labels = [Label(), *(Label.of([name]) for name in self.single)]
        cells = np.vstack([np.full((3, GENES), 2.0) + self.truth(label) for label in labels])
        self.measured = self.whole = Screen(
            matrix=sp.csr_matrix(np.abs(cells).astype(np.float32)),
            genes=tuple(f"g{i}" for i in range(GENES)),
            cells=[str(i) for i in range(len(cells))],
            rows={label: np.arange(3 * i, 3 * i + 3) for i, label in enumerate(labels)},
        )

    def truth(self, label: Label) -> np.ndarray:
        parts = sum((self.single[name] for name in label.perturbations), np.zeros(GENES))
        return parts * self.planted.get(str(label), 1.0)

    def unknown(self, labels: Sequence[Label]) -> list[Label]:
        return [label for label in labels if set(self.refused) & set(label.perturbations)]

    def candidates(self) -> list[Label]:
        return self.resolve(PAIRS)

    def resolve(self, conditions: Sequence[str | Label]) -> list[Label]:
        return [c if isinstance(c, Label) else Label.of(c.split("+")) for c in conditions if c]

    def draw(self, labels: Sequence[Label], draws: Draws) -> Iterator[tuple[Label, np.ndarray]]:
        for label in labels:
            random = np.random.default_rng([draws.seed, *str(label).encode()])
            noise = random.normal(size=(draws.draws, GENES)) * self.noise / np.sqrt(draws.cells)
            yield label, self.truth(label) + noise


PAIRS = [f"{a}+{b}" for a in "ABCDEF" for b in "ABCDEF" if a < b]
PLANTED = {"A+B": 1.5, "C+D": 0.4, "E+F": 1.2}


def drawn(mean: np.ndarray, draws: int, sd: float, seed: int) -> np.ndarray:
    return mean + np.random.default_rng(seed).normal(size=(draws, len(mean))) * sd


# ---- mathematics -----------------------------------------------------------------------------------


def test_the_square_is_that_of_the_expectation() -> None:
    mean = np.linspace(-1, 1, 50)
    assert square(np.tile(mean, (4, 1))) == pytest.approx(mean @ mean)
    for truth in (mean, np.zeros(50)):
        found = [square(drawn(truth, 4, 0.5, seed)) for seed in range(1000)]
        assert np.mean(found) == pytest.approx(truth @ truth, abs=4 * np.std(found) / np.sqrt(1000))
    assert np.mean(np.array(found) < 0) > 0.3  # unbiased at 0, so negative at times
    assert length(-1.0) == 0


def test_excess_and_scale_are_those_of_the_regression_on_the_sum() -> None:
    s, k = np.linspace(-1, 2, 30), 1.3
    across = np.roll(s, 7) - s * (np.roll(s, 7) @ s) / (s @ s)
    change, expected = np.tile(k * s + across, (3, 1)), np.tile(s, (3, 1))
    assert scale(change, expected) == pytest.approx(k)
    assert excess(change, expected) == pytest.approx((k - 1) * np.linalg.norm(s))
    assert excess(expected, expected) == pytest.approx(0)
    assert excess(change, 0 * expected) == 0
    assert np.isnan(scale(change, 0 * expected))


def test_parts_without_effect_give_no_buffering() -> None:
    """Noise of the parts must not look like an expectation that the combination falls short of."""
    nothing = np.zeros(40)
    found = [excess(drawn(nothing, 5, 1.0, 2 * i), drawn(nothing, 5, 1.0, 2 * i + 1)) for i in range(500)]
    seeming = np.sqrt(40 / 5)  # length of the mean of the parts, by noise alone
    assert abs(np.mean(found)) < 0.1 * seeming


def test_cosine_and_way_covered() -> None:
    way = np.array([3.0, 0.0, 4.0])
    assert cosine(np.tile(0.1 * way, (3, 1)), way) == pytest.approx(1)
    assert cosine(np.tile(-way, (3, 1)), way) == pytest.approx(-1)
    assert cosine(np.zeros((3, 3)), way) == 0
    assert [covered(np.tile(x * way, (3, 1)), way) for x in (1, 0, 0.5, 2)] == pytest.approx([1, 0, 0.75, 0])
    assert covered(np.tile(-way, (3, 1)), way) == pytest.approx(-3)


@pytest.mark.parametrize("draws", [3, 5, 10])
@pytest.mark.parametrize("size", [0.0, 0.05, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(draws: int, size: float) -> None:
    mean = np.linspace(-1, 1, 50) * size
    held = []
    for seed in range(150):
        x, s = drawn(1.2 * mean, draws, 0.2, 2 * seed), drawn(mean, draws, 0.1, 2 * seed + 1)
        _, low, high = interval(square, x)
        held.append(low <= 1.44 * mean @ mean <= high)
        _, low, high = interval(excess, x, s)
        held.append(low <= 0.2 * np.linalg.norm(mean) <= high)
    assert np.mean(held) > 0.9


def test_more_draws_narrow_the_interval() -> None:
    mean = np.linspace(-1, 1, 50)
    widths = []
    for draws in (4, 16, 64):
        ends = [interval(square, drawn(mean, draws, 0.3, seed))[1:] for seed in range(50)]
        widths.append(np.mean([high - low for low, high in ends]))
    assert widths[0] > 2 * widths[1] > 3 * widths[2]


# ---- rankings ----------------------------------------------------------------------------------------


def test_planted_synergy_and_buffering_come_first() -> None:
    world = World(PLANTED)
    synergy, buffering = rank(world, by="synergy"), rank(world, by="buffering")
    assert list(synergy["condition"][:2]) == ["A+B", "E+F"]
    assert (synergy["condition"].iloc[-1], buffering["condition"][0]) == ("C+D", "C+D")
    for table, sign in ((synergy, 1), (buffering, -1)):
        truth = [
            sign
            * (PLANTED.get(name, 1) - 1)
            * np.linalg.norm(sum(world.single[part] for part in name.split("+")))
            for name in table["condition"]
        ]
        assert np.mean((table["low"] <= truth) & (truth <= table["high"])) > 0.85
        assert list(table["rank"]) == list(range(1, 16))
    first = synergy.iloc[0]
    assert first["scale"] == pytest.approx(1.5, abs=0.1)
    assert first["residual"] == pytest.approx(first["score"], rel=0.1)
    assert first["effect"] == pytest.approx(first["scale"] * first["expected"], rel=0.05)


def test_a_change_that_leaves_the_sum_is_a_warning() -> None:
    class Strange(World):
        def truth(self, label: Label) -> np.ndarray:
            elsewhere = 3.0 * (np.arange(GENES) < 20) if str(label) == "A+C" else 0.0
            return super().truth(label) + elsewhere

    table = rank(Strange({}), by="synergy")
    strange = table["warning"].str.contains("mostly unlike the sum")
    assert list(table["condition"][strange]) == ["A+C"]
    assert "mostly unlike" not in "".join(rank(Strange({}), by="effect")["warning"])


def test_effects_come_longest_first_with_their_genes() -> None:
    world = World({}, noise=0.01)
    table = rank(world, by="effect")
    lengths = {pair: np.linalg.norm(world.truth(Label.of(pair.split("+")))) for pair in PAIRS}
    assert list(table["condition"]) == sorted(PAIRS, key=lambda pair: -lengths[pair])
    first = table.iloc[0]
    change = world.truth(Label.of(first["condition"].split("+")))
    assert first["genes_changed"] == (np.abs(change) > 0.25).sum()
    best = change.argmax()
    assert first["up"].startswith(f"g{best}{change[best]:+.2f} ")
    assert first["score"] == pytest.approx(lengths[first["condition"]], rel=0.01)


def test_similarity_finds_the_pair_that_leads_to_the_target() -> None:
    world = World({})
    weights = dict(zip(world.measured.genes, world.truth(Label.of(["B", "E"])), strict=True))
    table = rank(world, by="similarity", target=weights)
    assert table["condition"][0] == "B+E"
    assert table["score"][0] > 0.95
    assert "covered" not in table


def test_the_same_seed_gives_the_same_ranking_and_equal_scores_share_a_rank() -> None:
    world = World({}, noise=0)
    assert rank(world, by="synergy").equals(rank(world, by="synergy"))
    same = rank(World({}, noise=0), [Label.of(["A", "B"]), Label.of(["A", "B"]), "A+C"], by="effect")
    assert len(same) == 2
    world.single = dict.fromkeys("ABCDEF", np.ones(GENES))
    assert list(rank(world, by="effect")["rank"]) == [1] * 15


def test_what_cannot_be_predicted_is_listed_last_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Orphan(World):
        def unknown(self, labels: Sequence[Label]) -> list[Label]:
            return [label for label in labels if str(label) in ("A+B", "F")]

    with caplog.at_level("WARNING", "knockon"):
        table = rank(Orphan({}), by="synergy")
    assert "1 of 15 (A+B)" in caplog.text
    last = table.iloc[-1]
    assert last["condition"] == "A+B"
    assert "left out" in last["warning"]
    assert np.isnan(last["score"])
    assert table["rank"].isna().sum() == 1  # F was measured, which serves for its pairs
    with pytest.raises(UserError, match="no basis"):
        rank(World({}, refused="ABCDEF"))


def test_questions_that_have_no_answer() -> None:
    world = World({})
    with pytest.raises(UserError, match="combinations"):
        rank(world, ["A"], by="synergy")
    with pytest.raises(UserError, match="perturbed"):
        rank(world, [Label()])
    with pytest.raises(UserError, match="without a target"):
        rank(world, by="similarity")
    with pytest.raises(UserError, match="A target"):
        rank(world, by="effect", target={"g1": 1.0})
    with pytest.raises(UserError, match="no gene"):
        rank(world, by="similarity", target={"XYZ": 1.0})
    with pytest.raises(UserError, match="--draws"):
        Draws(draws=2)
    with pytest.raises(UserError, match="--cells"):
        Draws(cells=0)
