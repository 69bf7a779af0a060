import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from knockon.evaluate.suites import ALL
from knockon.evaluate.summary import CALIBRATED, PAIRED, SUMMARY, calibrate, interval, paired, summarize
from knockon.types import UserError


def long(rows: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """Scores from model to metric to the values of conditions 0, 1, ..."""
    return pd.DataFrame(
        [
            (model, str(i), metric, value)
            for model, metrics in rows.items()
            for metric, values in metrics.items()
            for i, value in enumerate(values)
        ],
        columns=["model", "condition", "metric", "value"],
    )


def line(table: pd.DataFrame, model: str, metric: str) -> pd.Series:
    return table[(table["model"] == model) & (table["metric"] == metric)].iloc[0]


@pytest.fixture
def table():
    return summarize(
        long(
            {
                "no_effect": {"mse": [4.0, 6.0], "pearson_delta": [0.1, 0.3]},
                "additive": {"mse": [2.0, 4.0], "pearson_delta": [0.5, 0.7]},
                "mine": {"mse": [1.0, 3.0], "pearson_delta": [0.6, 0.8]},
                "ceiling": {"mse": [1.0, 1.0], "pearson_delta": [0.9, 0.9]},
            }
        )
    )


def test_a_summary_has_one_line_for_each_model_and_metric(table):
    assert tuple(table.columns) == SUMMARY
    assert list(table["model"].unique()) == ["no_effect", "additive", "mine", "ceiling"]
    found = line(table, "mine", "mse")
    assert (found["mean"], found["floor"], found["ceiling"]) == (2.0, 5.0, 1.0)


def test_calibrated_is_zero_for_the_best_baseline_and_one_for_the_ceiling(table):
    for metric in ("mse", "pearson_delta"):
        assert line(table, "additive", metric)["calibrated"] == pytest.approx(0)
        assert line(table, "ceiling", metric)["calibrated"] == pytest.approx(1)
        assert line(table, "no_effect", metric)["calibrated"] < 0
    assert line(table, "mine", "mse")["calibrated"] == pytest.approx(0.5)
    assert line(table, "mine", "pearson_delta")["calibrated"] == pytest.approx(1 / 3)


def test_calibrated_is_empty_where_a_metric_has_no_room():
    rows = {"no_effect": [5.0], "additive": [1.0], "mine": [0.5], "ceiling": [1.0]}
    for top in (1.0, 2.0):
        table = summarize(long({m: {"mse": v} for m, v in (rows | {"ceiling": [top]}).items()}))
        assert table["calibrated"].isna().all()


def test_calibrated_is_of_the_conditions_that_the_ceiling_has():
    """Of few cells the halves of a ceiling may give no value, where whole conditions do."""
    values = [0.9, 0.1, 0.1, 0.1]
    rows = {"no_effect": [0.5, 0.0, 0.0, 0.0], "mine": values, "ceiling": [0.95]}
    table = summarize(long({model: {"pearson_delta": found} for model, found in rows.items()}))
    assert line(table, "mine", "pearson_delta")["calibrated"] == pytest.approx(0.4 / 0.45)
    assert line(table, "ceiling", "pearson_delta")["calibrated"] == 1


def test_a_baseline_without_all_conditions_is_not_where_calibrated_begins():
    rows = {"no_effect": [5.0, 5.0], "additive": [1.0], "mine": [3.0, 3.0], "ceiling": [1.0, 1.0]}
    table = summarize(long({model: {"mse": values} for model, values in rows.items()}))
    assert line(table, "mine", "mse")["calibrated"] == pytest.approx(0.5)


def test_a_ceiling_keeps_to_the_conditions_of_the_models():
    rows = {"no_effect": [5.0], "additive": [3.0], "mine": [2.0], "ceiling": [1.0, 9.0]}
    table = summarize(long({model: {"mse": values} for model, values in rows.items()}))
    assert line(table, "mine", "mse")["ceiling"] == 1
    assert line(table, "mine", "mse")["calibrated"] == pytest.approx(0.5)
    alone = summarize(long({"ceiling": {"mse": [1.0, 9.0]}}))
    assert line(alone, "ceiling", "mse")["mean"] == 5


def test_nothing_to_summarize_is_said():
    for nothing in (long({}), long({"mine": {"mse": [np.nan]}})):
        with pytest.raises(UserError, match=r"none of the scores .* another --suite"):
            summarize(nothing)


def test_absent_anchors_give_empty_values():
    table = summarize(long({"mine": {"mse": [1.0, 2.0]}}))
    assert table[["floor", "ceiling", "calibrated"]].isna().all(axis=None)


def test_an_interval_needs_two_conditions():
    table = summarize(long({"mine": {"mse": [1.0]}, "other": {"mse": [1.0, 1.0]}}))
    assert np.isnan(table.loc[0, "low"])
    assert (table.loc[1, "low"], table.loc[1, "high"]) == (1.0, 1.0)


@pytest.mark.slow
def test_intervals_cover_the_mean_of_the_population_as_often_as_they_say():
    draw = np.random.default_rng(0)
    samples = long({str(i): {"mse": list(draw.normal(size=40))} for i in range(300)})
    table = summarize(samples)
    covered = (table["low"] < 0) & (table["high"] > 0)
    assert 0.9 < covered.mean() < 0.98


# ---- paired tests ----------------------------------------------------------------------------------


def test_differences_are_from_the_best_baseline_and_positive_where_better():
    table = paired(
        long(
            {
                "no_effect": {"mse": [4.0, 6.0], "pearson_delta": [0.1, 0.3]},
                "additive": {"mse": [2.0, 4.0], "pearson_delta": [0.5, 0.7]},
                "mine": {"mse": [1.0, 1.0], "pearson_delta": [0.4, 0.5]},
                "ceiling": {"mse": [0.0, 0.0], "pearson_delta": [0.9, 0.9]},
            }
        )
    )
    assert tuple(table.columns) == PAIRED
    assert set(table["model"]) == {"no_effect", "mine"}
    assert set(table["baseline"]) == {"additive"}
    assert line(table, "mine", "mse")["difference"] == 2.0
    assert line(table, "mine", "pearson_delta")["difference"] == pytest.approx(-0.15)
    assert line(table, "no_effect", "mse")["difference"] == -2.0


def test_conditions_are_paired_by_name_and_those_of_one_side_left_out():
    scores = long({"additive": {"mse": [1.0, 2.0, 3.0]}, "mine": {"mse": [1.0, 1.5]}})
    scores = scores.sample(frac=1, random_state=0)
    found = paired(scores).iloc[0]
    assert (found["conditions"], found["difference"]) == (2, 0.25)


def test_p_is_of_the_signed_rank_test_and_few_conditions_cannot_be_significant():
    draw = np.random.default_rng(0)
    for count in (5, 30):
        ours, theirs = draw.normal(size=count), draw.normal(1.0, size=count)
        found = paired(long({"additive": {"mse": list(theirs)}, "mine": {"mse": list(ours)}})).iloc[0]
        assert found["p"] == pytest.approx(wilcoxon(theirs, ours).pvalue)
    sure = paired(long({"additive": {"mse": [2.0, 3.0, 4.0, 5.0, 6.5]}, "mine": {"mse": [0.0] * 5}})).iloc[0]
    assert sure["p"] == 2**-4


def test_a_model_that_equals_the_baseline_differs_by_nothing():
    found = paired(long({"additive": {"mse": [1.0, 2.0]}, "mine": {"mse": [1.0, 2.0]}})).iloc[0]
    assert (found["difference"], found["p"]) == (0.0, 1.0)


def test_a_value_of_all_conditions_is_not_paired():
    scores = long({"additive": {"mse": [1.0]}, "mine": {"mse": [2.0]}}).assign(condition=ALL)
    assert paired(scores).empty
    assert len(summarize(scores)) == 2


# ---- calibrated scores with intervals --------------------------------------------------------------


def many(seed: int, quality: float, *, count: int = 24) -> pd.DataFrame:
    """Scores of a model that closes a share of the gap between baseline and ceiling, with noise."""
    draw = np.random.default_rng(seed)
    hard = draw.lognormal(size=count)
    rows = {
        "no_effect": {"mse": 3 * hard, "pearson_delta": 0.0 * hard},
        "additive": {"mse": 2 * hard, "pearson_delta": 0.4 + draw.normal(0, 0.02, count)},
        "mine": {
            "mse": (2 - quality) * hard + draw.normal(0, 0.05, count),
            "pearson_delta": 0.4 + 0.4 * quality + draw.normal(0, 0.02, count),
        },
        "ceiling": {"mse": hard, "pearson_delta": np.full(count, 0.8)},
    }
    return long({model: {m: list(v) for m, v in metrics.items()} for model, metrics in rows.items()})


def group(table: pd.DataFrame, model: str, name: str) -> pd.Series:
    return table[(table["model"] == model) & (table["group"] == name)].iloc[0]


def test_calibrated_scores_are_those_of_the_summary_and_lie_in_their_intervals():
    scores = many(0, 0.5)
    short, table = summarize(scores), calibrate(scores, {"mse": ["mse"], "r": ["pearson_delta"]})
    assert tuple(table.columns) == CALIBRATED
    for model in ("additive", "mine", "ceiling"):
        for name, metric in (("mse", "mse"), ("r", "pearson_delta")):
            found = group(table, model, name)
            assert found["calibrated"] == pytest.approx(line(short, model, metric)["calibrated"])
            assert found["low"] <= found["calibrated"] + 1e-9
            assert found["calibrated"] <= found["high"] + 1e-9
    assert tuple(group(table, "additive", "mse")[["low", "high"]]) == (0, 0)
    assert tuple(group(table, "ceiling", "mse")[["low", "high"]]) == pytest.approx((1, 1))


def test_a_group_is_the_mean_of_its_metrics():
    table = calibrate(many(0, 0.5), {"both": ["mse", "pearson_delta"], "a": ["mse"], "b": ["pearson_delta"]})
    parts = [group(table, "mine", name)["calibrated"] for name in "ab"]
    both = group(table, "mine", "both")
    assert both["calibrated"] == pytest.approx(np.mean(parts))
    assert (both["metrics"], both["conditions"]) == (2, 24)


@pytest.mark.slow
def test_intervals_of_calibrated_scores_cover_as_often_as_they_say():
    tables = [calibrate(many(seed, 0.5), {"both": ["mse", "pearson_delta"]}) for seed in range(60)]
    lines = [group(table, "mine", "both") for table in tables]
    covered = np.mean([found["low"] < 0.5 < found["high"] for found in lines])
    assert 0.85 < covered <= 1
    assert all(found["high"] - found["low"] < 0.2 for found in lines)


def test_a_metric_without_clear_room_does_not_count():
    """Of this ceiling nobody knows whether it is better than the baseline."""
    rows = {"additive": [4.0, 6.0] * 4, "mine": [4.0] * 8, "ceiling": [5.9, 3.9] * 4}
    scores = long({model: {"mse": values} for model, values in rows.items()})
    assert summarize(scores)["calibrated"].notna().any()
    found = group(calibrate(scores, {"mse": ["mse"]}), "mine", "mse")
    assert found["metrics"] == 0
    assert found[["calibrated", "low", "high"]].isna().all()


def test_a_sample_without_room_tells_by_the_sign_of_the_gain():
    """One condition leaves no room, and about one sample in a hundred draws it too often."""
    ceiling = [5.5, *[3.0] * 7]
    better, worse = ({"additive": [4.0] * 8, "mine": [mine] * 8, "ceiling": ceiling} for mine in (3.9, 4.1))
    for rows, sign in ((better, 1), (worse, -1)):
        scores = long({model: {"mse": values} for model, values in rows.items()})
        found = group(calibrate(scores, {"mse": ["mse"]}), "mine", "mse")
        assert found["metrics"] == 1
        assert np.isfinite([found["low"], found["high"]]).all()
        assert (sign * found[["low", "calibrated", "high"]] > 0).all()


def test_calibrated_intervals_need_two_conditions():
    rows = {"additive": [3.0], "mine": [2.0], "ceiling": [1.0]}
    found = group(calibrate(long({m: {"mse": v} for m, v in rows.items()}), {"mse": ["mse"]}), "mine", "mse")
    assert found["calibrated"] == 0.5
    assert found[["low", "high"]].isna().all()


def test_an_interval_of_a_mean_is_symmetric_for_two_values():
    assert interval(np.array([0.0, 1.0]), np.random.default_rng(0)) == (0, 1)
