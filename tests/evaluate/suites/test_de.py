from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import false_discovery_control, mannwhitneyu

from knockon.data.conventions import Columns
from knockon.data.screen import Screen
from knockon.evaluate import differential, truth
from knockon.evaluate.differential import ALPHA, EXPRESSED, PSEUDOCOUNT, differences
from knockon.evaluate.pairs import Pairs
from knockon.evaluate.scores import ceiling
from knockon.evaluate.suites import ALL, de, score
from knockon.evaluate.suites.de import METRICS, Evidence
from knockon.evaluate.truth import TESTED, Truth
from knockon.types import UserError

NAMES = [metric.name for metric in METRICS]
SIGN_BLIND = {"de_overlap", "de_precision", "de_pr_auc", "de_jaccard"}
GENES, TARGETS = 200, ("A", "B", "C", "D", "E", "F")


# ---- a world of a few effects on many genes --------------------------------------------------------


def rates() -> dict[str, np.ndarray]:
    """Expected counts: each target moves its own share of the genes, up or down."""
    draw = np.random.default_rng(3)
    base = np.exp(draw.normal(0, 1, GENES))
    found = {"control": base}
    for moved, target in zip((12, 20, 28, 36, 44, 52), TARGETS, strict=True):
        effect = np.zeros(GENES)
        effect[draw.choice(GENES, moved, replace=False)] = draw.choice([-0.8, 0.8], moved)
        found[target] = base * np.exp(effect)
    return found


def cells_at(rate: np.ndarray, cells: int, seed: int) -> np.ndarray:
    return np.log1p(np.random.default_rng(seed).poisson(rate, (cells, GENES))).astype(np.float32)


@pytest.fixture(scope="module")
def world(make) -> Truth:
    """Every condition is a test condition but one."""
    found = rates()
    sizes = {"control": 300} | dict.fromkeys(TARGETS, 160)
    blocks = [cells_at(found[name], size, seed) for seed, (name, size) in enumerate(sizes.items())]
    obs = pd.DataFrame({"perturbation": np.repeat(list(sizes), list(sizes.values()))})
    obs.index = obs.index.map(lambda i: f"c{i}")
    var = pd.DataFrame(index=[f"G{i}" for i in range(GENES)])
    columns = Columns(perturbation_key="perturbation", control="control", covariate_keys=())
    screen = Screen.from_anndata(AnnData(sp.csr_matrix(np.vstack(blocks)), obs=obs, var=var), columns=columns)
    return Truth.of(screen, make.split(screen, lambda label: label.perturbation != "A"))


def pairs_of(truth: Truth, rate_of, cells: int = 80) -> Pairs:
    """Predict cells at a rate for each condition, a function of its own rate and that of control."""
    found = rates()
    made = [
        cells_at(rate_of(found[label.perturbation], found["control"]), cells, 100 + row)
        for row, label in enumerate(truth.labels)
    ]
    return Pairs(truth=truth, cells=tuple(sp.csr_matrix(x, dtype=float) for x in made))


ADVERSARIES = {
    "replicate": lambda own, control: own,
    "half effect": lambda own, control: np.sqrt(own * control),
    "mean": lambda own, control: np.exp(np.mean([np.log(rate) for rate in rates().values()], axis=0)),
    "no change": lambda own, control: control,
    "sign flip": lambda own, control: control**2 / own,
}


@pytest.fixture(scope="module")
def scored(world: Truth) -> pd.DataFrame:
    tables = {name: score(pairs_of(world, rate_of), "de") for name, rate_of in ADVERSARIES.items()}
    return (
        pd.concat(tables, names=["model"])
        .reset_index("model")
        .pivot_table(index="model", columns="metric", values="value")
    )


def test_the_adversaries_are_put_in_order(scored):
    assert set(scored.columns) == set(NAMES)
    assert scored.notna().all(axis=None)
    for name in ("de_overlap", "de_signed_overlap", "de_jaccard", "de_pr_auc"):
        values = scored.loc[["replicate", "half effect", "mean", "no change"], name]
        assert (values.diff().iloc[1:3] < -0.08).all(), name
        assert values["no change"] <= values["mean"] + 0.02, name
    assert scored["de_count_error"]["replicate"] < 0.2
    assert (scored["de_count_error"].drop(["replicate", "sign flip"]) > 0.4).all()
    assert scored["de_lfc_spearman"]["replicate"] > 0.8
    assert scored["de_direction"]["replicate"] > 0.98
    assert abs(scored["de_direction"]["no change"] - 0.5) < 0.1
    assert scored["de_count_spearman"]["replicate"] > 0.85


def test_a_sign_flip_is_caught_by_the_signed_metrics_and_passes_the_others(scored):
    replicate, flipped = scored.loc["replicate"], scored.loc["sign flip"]
    for name in sorted(SIGN_BLIND):
        assert flipped[name] > 0.75 * replicate[name], name
    assert flipped["de_direction"] < 0.05
    assert flipped["de_signed_overlap"] < 0.02
    assert flipped["de_lfc_spearman"] < -0.7
    signed = {metric.name for metric in METRICS if "sign-blind" not in metric.how}
    assert signed.isdisjoint(SIGN_BLIND)
    assert signed | SIGN_BLIND == set(NAMES)


def test_the_real_cells_themselves_are_perfect(world):
    means = score(Pairs(truth=world, cells=world.cells), "de").groupby("metric")["value"].mean()
    for metric in METRICS:
        assert means[metric.name] == pytest.approx(metric.best), metric.name


def test_scores_do_not_depend_on_what_else_is_scored(world):
    pairs = pairs_of(world, ADVERSARIES["half effect"])
    everything = score(pairs, "de")
    pd.testing.assert_frame_equal(everything, score(pairs, "de"))
    one = replace(pairs, truth=world.select(world.labels[1:2]), cells=pairs.cells[1:2])
    alone = score(one, "de")
    assert set(alone["metric"]) == set(NAMES) - {"de_count_spearman"}  # one condition has no rank
    both = everything.merge(alone, on=["condition", "metric"])
    assert len(both) == len(NAMES) - 1
    np.testing.assert_allclose(both["value_x"], both["value_y"])


def test_a_value_for_all_conditions_has_one_line(world):
    table = score(pairs_of(world, ADVERSARIES["replicate"]), "de")
    assert table.loc[table["condition"] == ALL, "metric"].tolist() == ["de_count_spearman"]
    assert ALL in set(ceiling(world, "de")["condition"])


def test_what_was_found_of_the_real_cells_is_kept(world, monkeypatch):
    score(pairs_of(world, ADVERSARIES["replicate"]), "de")
    assert world.select(world.labels) is world
    calls = []
    monkeypatch.setattr(
        differential,
        "_p_values",
        lambda populations, control: calls.append(1) or np.ones((5, control.shape[1])),
    )
    score(pairs_of(world, ADVERSARIES["no change"]), "de")
    assert len(calls) == 1


# ---- cells -----------------------------------------------------------------------------------------


def test_both_sides_have_half_of_the_real_cells(world, monkeypatch, caplog):
    sizes, compare = [], differential.differences

    def watched(drawn, contexts, controls):
        sizes.append({x.shape[0] for x in drawn})
        return compare(drawn, contexts, controls)

    monkeypatch.setattr(truth, "differences", watched)
    fresh = replace(world)
    fresh.differing(fresh.cells)
    many = replace(fresh, half=np.full(5, 9999))
    many.differing([sp.csr_matrix((400, GENES))] * 5)
    assert sizes == [{80}, {TESTED}]
    assert not caplog.text
    score(pairs_of(world, ADVERSARIES["replicate"], cells=79), "de")
    assert "5 of 5 conditions have fewer predicted cells than the anchors" in caplog.text


def test_one_predicted_cell_and_all_zeros_call_nothing(world):
    replicate = pairs_of(world, ADVERSARIES["replicate"])
    for cells in (
        [x[:1] for x in replicate.cells],
        [sp.csr_matrix((80, GENES))] * 5,
    ):
        table = score(replace(replicate, cells=tuple(cells)), "de")
        means = table.groupby("metric")["value"].mean()
        assert set(means.index) == set(NAMES)
        assert np.isfinite(means).all()


def test_a_few_real_cells_tell_nothing(world):
    few = replace(world, cells=tuple(x[: EXPRESSED - 1] for x in world.cells), half=np.full(5, EXPRESSED - 1))
    table = score(replace(pairs_of(world, ADVERSARIES["replicate"]), truth=few), "de")
    assert table.empty


# ---- the engine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples() -> tuple[list[sp.csr_matrix], sp.csr_matrix]:
    found = rates()
    groups = [sp.csr_matrix(cells_at(found[name], 40, 5), dtype=float) for name in "AF"]
    return groups, sp.csr_matrix(cells_at(found["control"], 90, 6), dtype=float)


def test_p_values_are_those_of_scipy(samples):
    groups, control = samples
    found = differences(groups, [("x",), ("y",)], {("x",): control, ("y",): control})
    together = differences(groups, [()] * 2, {(): control})
    np.testing.assert_array_equal(found.adjusted, together.adjusted)
    for row, group in enumerate(groups):
        x, y = group.toarray(), control.toarray()
        p = mannwhitneyu(x, y, method="asymptotic").pvalue
        tested = found.tested[row]
        share = np.maximum((x > 0).mean(0), (y > 0).mean(0)) * len(x)
        np.testing.assert_array_equal(tested, share >= EXPRESSED)
        wanted = false_discovery_control(p[tested])
        clear = wanted < 0.9  # nearer to 1, a continuity correction that overshoots is cut in other ways
        np.testing.assert_allclose(found.adjusted[row, tested][clear], wanted[clear], rtol=1e-9)
        assert (found.adjusted[row, tested][~clear] > 0.9).all()
        assert (found.adjusted[row, ~tested] == 1).all()
        means = np.expm1(x).mean(0), np.expm1(y).mean(0)
        np.testing.assert_allclose(
            found.lfc[row], np.log2((means[0] + PSEUDOCOUNT) / (means[1] + PSEUDOCOUNT)), atol=2e-6
        )
    np.testing.assert_array_equal(found.significant, found.adjusted < ALPHA)


def test_control_cells_do_not_differ_from_control_cells():
    """Rare genes in few cells of two unequal samples, where the untrimmed test calls dozens."""
    draw = np.random.default_rng(0)
    cells = np.log1p(draw.poisson(np.geomspace(1e-4, 1e-2, 3000), (2040, 3000))).astype(float)
    group, control = sp.csr_matrix(cells[:40]), sp.csr_matrix(cells[40:])
    raw = mannwhitneyu(cells[:40], cells[40:], method="asymptotic").pvalue
    assert (false_discovery_control(raw) < ALPHA).sum() > 20
    assert differences([group], [()], {(): control}).significant.sum() <= 1


def test_copies_of_the_control_change_nothing(samples):
    _, control = samples
    shuffled = control[np.random.default_rng(0).permutation(90)]
    found = differences([shuffled], [()], {(): control})
    assert not found.significant.any()
    assert (found.lfc == 0).all()


def test_each_context_has_its_own_control(make):
    screen = make.screen(make.cells(["control", "A"], contexts=["T", "B"]), ("cell_type",))
    split = make.split(screen, lambda label: label.covariates == ("T",))
    both = make.split(screen, lambda label: True)
    truth = Truth.of(screen, replace(both, train=both.test))
    one = Truth.of(screen, split)
    row = truth.labels.index(one.labels[0])
    np.testing.assert_array_equal(truth.differences.adjusted[row], one.differences.adjusted[0])
    assert not np.array_equal(truth.differences.lfc[0], truth.differences.lfc[1])


def test_the_engine_is_asked_for_where_it_is_missing(samples, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "illico", None)
    groups, control = samples
    with pytest.raises(UserError, match="illico is not installed") as error:
        differences(groups, [()] * 2, {(): control})
    assert "knockon[eval]" in str(error.value)


# ---- closed forms ----------------------------------------------------------------------------------


def evidence(predicted: str, real: str, **given) -> Evidence:
    """One condition; + and - are significant, lower-case u and d change without being, . is unchanged."""
    change = {"+": 2.0, "-": -2.0, "u": 1.0, "d": -1.0, ".": 0.0}
    lfc = [np.array([[change[x] * (1 + 0.1 * i) for i, x in enumerate(text)]]) for text in (predicted, real)]
    called = [np.array([[x in "+-" for x in text]]) for text in (predicted, real)]
    fields = {
        "predicted": called[0],
        "real": called[1],
        "predicted_adjusted": np.where(called[0], 0.01, 1.0),
        "predicted_lfc": lfc[0],
        "real_lfc": lfc[1],
        "predicted_count": called[0].sum(1).astype(float),
        "real_count": called[1].sum(1).astype(float),
    }
    return Evidence(**fields | given)


@pytest.mark.parametrize(
    ("name", "predicted", "real", "value"),
    [
        ("de_overlap", "++....", "++--..", 1 / 2),
        ("de_overlap", "--++..", "++--..", 1.0),
        ("de_overlap", "++++++", "++....", 0.0),  # the two largest changes are the last
        ("de_overlap", "......", "++--..", 0.0),
        ("de_signed_overlap", "--+-..", "++--..", 1 / 4),
        ("de_signed_overlap", "......", "++--..", 0.0),
        ("de_precision", "++++++", "++....", 1 / 3),
        ("de_precision", "......", "++....", 0.0),
        ("de_jaccard", "+++...", ".++++.", 2 / 5),
        ("de_jaccard", "......", ".++++.", 0.0),
        ("de_direction", "ud.+..", "++-+..", 2 / 4),
        ("de_direction", "......", "++-+..", 0.0),
        ("de_lfc_spearman", "......", "++-+..", 0.0),
        ("de_lfc_spearman", "++++..", "++++..", 1.0),
        ("de_lfc_spearman", "----..", "++++..", -1.0),
        ("de_pr_auc", "++....", "++....", 1.0),
        ("de_pr_auc", "......", "++....", 1 / 3),
        ("de_pr_auc", "++++..", "++....", 1 / 2),
        ("de_count_error", "+++...", "+.....", 1.0),
        ("de_count_error", "......", "+++...", 2.0),
        ("de_count_error", "......", "......", 0.0),
        ("de_count_error", "+++...", "......", 2.0),
    ],
)
def test_closed_forms(name, predicted, real, value):
    metric = next(metric for metric in METRICS if metric.name == name)
    assert metric(evidence(predicted, real)) == pytest.approx([value])


def test_without_a_real_gene_only_counts_are_told():
    for metric in METRICS:
        told = np.isfinite(metric(evidence("++....", "......"))).all()
        assert told == (metric.name == "de_count_error"), metric.name


def test_counts_are_ranked_over_conditions_that_tell():
    told = np.array([3.0, 1.0, 2.0, np.nan])
    assert de.count_spearman(np.array([30.0, 10.0, 20.0, 0.0]), told) == pytest.approx(1)
    assert de.count_spearman(np.array([5.0, 5.0, 5.0, 0.0]), told) == 0
    assert np.isnan(de.count_spearman(np.array([1.0, 2.0]), np.array([4.0, 4.0])))
