import numpy as np
import pandas as pd
import pytest

from knockon.evaluate.strata import STRATA, describe, effect_size, stratify
from knockon.evaluate.suites import ALL
from knockon.evaluate.truth import Truth


@pytest.fixture(scope="module")
def wide(make):
    """Two contexts, of which the second is in training only for A, and a double with an unseen part."""
    screen = make.screen(
        make.cells(["control", "A", "B", "C", "A+B", "B+D", "D"], cells=30, contexts=["T", "U"]),
        ("cell_type",),
    )
    tested = {"A+B | T", "B+D | T", "D | T", "D | U", "B | U", "C | U", "A+B | U", "B+D | U", "C | T"}
    return Truth.of(screen, make.split(screen, lambda label: str(label) in tested))


def test_conditions_are_described_by_what_training_has(wide):
    found = describe(wide)
    assert found["seen"]["A+B | T"] == "seen"
    assert found["seen"]["B+D | T"] == "partly unseen"
    assert found["seen"]["D | T"] == "unseen"
    assert set(found["context"]) == {"seen"}
    assert set(found["cells"]) == {"few"}  # all have as many
    assert found["effect"].value_counts().to_dict() == {"weak": 3, "middle": 3, "strong": 3}


def test_a_context_without_training_perturbations_is_unseen(make):
    screen = make.screen(make.cells(["control", "A"], contexts=["T", "U"]), ("cell_type",))
    truth = Truth.of(screen, make.split(screen, lambda label: label.covariates == ("U",)))
    assert list(describe(truth)["context"]) == ["unseen"]


def test_few_conditions_are_not_cut(screen, split):
    assert set(describe(Truth.of(screen, split))["effect"]) == {"middle"}


def test_the_size_of_an_effect_has_no_noise_in_it(make):
    """Of cells of the control population itself it is 0 on average before its root is taken."""
    squares = []
    for seed in range(20):
        cells = make.cells(["control", "control", "A"], cells=40, seed=seed)
        cells.obs["perturbation"] = ["control"] * 40 + ["null"] * 40 + ["A"] * 40
        screen = make.screen(cells)
        truth = Truth.of(screen, make.split(screen, lambda label: label.perturbation == "null"))
        raw = np.linalg.norm(truth.moments.mean - truth.control)
        assert effect_size(truth)[0] < raw
        squares.append(effect_size(truth)[0] / raw)
    assert np.mean(np.array(squares) == 0) > 0.2


def test_means_of_strata_stand_beside_their_anchors(wide):
    names = [str(label) for label in wide.labels]
    scores = pd.DataFrame(
        [(m, n, "mse", float(i)) for m in ("no_effect", "mine") for i, n in enumerate(names)]
        + [("mine", ALL, "de_count_spearman", 1.0)],
        columns=["model", "condition", "metric", "value"],
    )
    table = stratify(scores, wide)
    assert tuple(table.columns) == STRATA
    assert set(table["by"]) == {"effect", "seen"}
    assert set(table["metric"]) == {"mse"}
    seen = table[(table["by"] == "seen") & (table["model"] == "mine")].set_index("stratum")
    assert seen["conditions"].sum() == len(names)
    for stratum, row in seen.iterrows():
        own = [i for i, name in enumerate(names) if describe(wide)["seen"][name] == stratum]
        assert row["mean"] == pytest.approx(np.mean(own))


def test_what_all_conditions_share_is_no_stratum(screen, split):
    truth = Truth.of(screen, split)
    scores = pd.DataFrame({"model": "a", "condition": ["A+B"], "metric": "mse", "value": [1.0]})
    assert stratify(scores, truth).empty
