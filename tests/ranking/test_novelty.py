"""What a prediction has to extrapolate, in words."""

import numpy as np
import pytest
import scipy.sparse as sp

from knockon.data.screen import Screen
from knockon.ranking.novelty import Experience
from knockon.types import Label

KNOWN = [
    Label.of(["A"], [1.0], ["t1"]),
    Label.of(["A"], [10.0], ["t1"]),
    Label.of(["B"], [1.0], ["t1"]),
    Label.of(["C"], [1.0], ["t1"]),
    Label.of(["A", "D"], [1.0, 1.0], ["t1"]),
    Label.of(["C"], [1.0], ["t2"]),
]


def ask(names: str, dose: float = 1.0, context: str = "t1", effect: float = 0.5) -> str:
    experience = Experience(labels=KNOWN, largest=1.0, with_vectors={"Y"})
    label = Label.of(list(names), [dose] * len(names), [context])
    return "; ".join(experience.warnings(label, effect))


def test_nothing_is_said_of_what_is_like_training() -> None:
    assert ask("A") == ask("C", context="t2") == ""
    assert ask("A", dose=3.0) == ""


def test_what_was_never_measured() -> None:
    assert ask("X") == "X was never measured"
    assert ask("Y") == "Y was never measured, only its vector is known"
    assert ask("AD") == "D was measured in combinations only"
    assert ask("AB") == "never combined with anything: B"
    assert "never combined with anything: B, C" in ask("BC")
    alone = Experience(labels=KNOWN[:4], largest=1.0).warnings(Label.of("AB", [1.0, 1.0], ["t1"]), 0.5)
    assert alone == ["no combination at all was measured"]


def test_doses_contexts_and_sizes() -> None:
    assert ask("A", dose=30.0) == "A@30 is outside the measured doses 1 to 10"
    assert ask("A", context="t3") == "no perturbation was measured in t3"
    assert ask("A", context="t2") == "not measured in t2: A"
    assert ask("A", effect=1.2) == "larger than any measured effect (1.00)"


def test_the_largest_effect_is_free_of_noise() -> None:
    random = np.random.default_rng(0)
    shift = np.zeros(200)
    shift[:4] = 1.0
    cells = [3 + random.normal(size=(40, 200)) * 0.5 + (shift if i == 1 else 0) for i in range(3)]
    labels = [Label(), Label.of(["A"]), Label.of(["B"])]
    screen = Screen(
        matrix=sp.csr_matrix(np.vstack(cells).astype(np.float32)),
        genes=tuple(f"g{i}" for i in range(200)),
        cells=[str(i) for i in range(120)],
        rows={label: np.arange(40 * i, 40 * i + 40) for i, label in enumerate(labels)},
    )
    assert Experience.of(screen).largest == pytest.approx(2.0, abs=0.3)  # with the noise it would be 2.5
