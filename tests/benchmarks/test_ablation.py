from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from benchmarks import ablation, jobs
from scipy.stats import ttest_rel

from knockon.compare import recipes
from knockon.files import write_json
from knockon.record import WEIGHTS
from knockon.types import UserError


def scores(better: float, *, seeds: int = 3, count: int = 12, noise: float = 0.1) -> pd.DataFrame:
    """A base whose errors are smaller and whose correlations are larger than those of the changed model."""
    draw = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for i in range(count):
            hard = draw.normal()
            for model, value in (("base", 0.0), ("changed", better)):
                error = hard + value + noise * draw.normal()
                rows.append((model, seed, f"42/c{i}", "mse", error))
                rows.append((model, seed, f"42/c{i}", "pearson_delta", -error))
    return pd.DataFrame(rows, columns=["model", "seed", "condition", "metric", "value"])


def test_a_gain_is_paired_and_positive_where_the_switch_helps():
    found = ablation.gains(scores(0.5), "base", "changed")
    for metric in ("mse", "pearson_delta"):
        line = found.loc[metric]
        assert line["low"] < 0.5 < line["high"]
        assert line["high"] - line["low"] < 0.2
        assert (line["agreeing"], line["seeds"], line["verdict"]) == (3, 3, "helps")
    assert ablation.gains(scores(-0.5), "base", "changed").loc["mse", "verdict"] == "hurts"
    assert ablation.gains(scores(0.0), "base", "changed").loc["mse", "verdict"].startswith("no difference")


def test_the_interval_is_that_of_the_paired_t_test():
    table = scores(0.1)
    wide = table[table["metric"] == "mse"].pivot(index=["seed", "condition"], columns="model", values="value")
    bounds = ttest_rel(wide["changed"], wide["base"]).confidence_interval()
    line = ablation.gains(table, "base", "changed").loc["mse"]
    assert (line["low"], line["high"]) == pytest.approx(tuple(bounds))


def test_seeds_that_disagree_are_counted():
    table = pd.concat([scores(0.5, seeds=2), scores(-0.1, seeds=1).assign(seed=7)])
    line = ablation.gains(table, "base", "changed").loc["mse"]
    assert (line["agreeing"], line["seeds"]) == (2, 3)


def test_one_condition_shows_nothing():
    line = ablation.gains(scores(0.5, seeds=1, count=1), "base", "changed").loc["mse"]
    assert line["verdict"] == "no difference beyond its interval"


def leaves(fields: dict[str, object], before: str = "") -> dict[str, object]:
    """Values by dotted names."""
    found = {}
    for name, value in fields.items():
        inner = leaves(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
        found |= inner
    return found


def test_screens_differ_by_their_seed_and_have_what_models_read(tmp_path):
    task = ablation.task_of("contexts", 5)
    assert (task.name, task.data.seed, task.columns.layer) == ("contexts5", 5, "counts")
    small = replace(task, data=replace(task.data, cells=400, genes=30))
    asked = ablation.Ablation(model="scldm", switch="pulled", config={"pulled": False}).recipes()
    assert jobs.readable(asked, small.screen(tmp_path)) == asked
    logs = replace(small, name="logs", columns=ablation.task_of("demo", 5).columns)
    assert jobs.readable(asked, logs.screen(tmp_path)) == {}


def test_a_first_stage_is_trained_once_where_both_sides_have_the_same(tmp_path):
    first = tmp_path / "scldm" / "stage_one"
    first.mkdir(parents=True)
    (first / WEIGHTS).write_text("w")
    for switch in ("quantile_mapped", "embedding"):
        (one,) = [x for x in ablation.ABLATIONS if x.model == "scldm" and x.switch == switch]
        ablation.share_stage(tmp_path, one.recipes())
        assert (tmp_path / one.name / "stage_one" / WEIGHTS).exists() == (switch == "quantile_mapped")
    ablation.share_stage(tmp_path, ablation.ABLATIONS[0].recipes())
    ablation.share_stage(tmp_path / "elsewhere", one.recipes())  # where nothing was trained
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("one", ablation.ABLATIONS, ids=lambda one: one.name)
def test_each_ablation_changes_what_it_says(one):
    base, changed = one.recipes().values()
    for part, fields in (("model", one.config), ("train", one.train)):
        before, after = (leaves(asdict(getattr(side, part))) for side in (base, changed))
        assert {name for name in before if before[name] != after[name]} == set(fields)


def test_names_of_ablations_differ():
    names = [one.name for one in ablation.ABLATIONS]
    assert len(set(names)) == len(names)


def test_verdicts_are_summed():
    verdicts = pd.Series(
        {"mse": "helps", "mae": "no difference beyond its interval", "l2": "hurts", "r": "helps"}
    )
    assert ablation.summed(verdicts) == "**helps**: mse, r; **hurts**: l2"
    assert ablation.summed(verdicts[1:2]) == "no difference beyond its interval"


def test_the_table_goes_between_its_markers():
    page = f"before\n{ablation.BEGIN}\nold\n{ablation.END}\nafter\n"
    assert ablation.placed(page, "new") == f"before\n{ablation.BEGIN}\nnew\n{ablation.END}\nafter\n"
    with pytest.raises(UserError, match="no place for ablations"):
        ablation.placed("before\n", "new")


def test_lines_of_the_record_give_way_to_those_of_as_many_seeds():
    old = ablation.gains(scores(0.5, seeds=2), "base", "changed").dropna().reset_index()
    about = {"model": "ripple", "changed": "`populations=0`", "screen": "demo"}
    old = old.assign(**about, configurations="a b")
    fewer = old.assign(gain=7.0, seeds=1)
    other = old.assign(gain=8.0, screen="interaction")
    newer = old.assign(gain=9.0)
    lines = ablation.kept(ablation.kept(old, fewer), other)
    assert set(lines.loc[lines["screen"] == "demo", "gain"]) == set(old["gain"])
    both = ablation.kept(lines, newer)
    assert set(both.loc[both["screen"] == "demo", "gain"]) == {9.0}
    assert len(both) == len(lines) == 2 * len(old)


def test_lines_of_an_older_default_give_way(tmp_path):
    old = ablation.gains(scores(0.5, seeds=3), "base", "changed").dropna().reset_index()
    old = old.assign(model="ripple", changed="`populations=0`", screen="demo", configurations="")
    new = ablation.gains(scores(0.2, seeds=1), "base", "changed").dropna().reset_index()
    new = new.assign(model="ripple", changed="`populations=0`", screen="demo", configurations="a b")
    assert set(ablation.kept(old, new)["seeds"]) == {1}


def test_only_what_was_done_with_the_configurations_of_today_is_compared(tmp_path):
    one = ablation.ABLATIONS[0]
    how = jobs.How(out=tmp_path, cells=8)
    for seed, older in ((1, False), (2, True)):
        asked = recipes(replace(how, seed=seed).comparison(), one.recipes())
        marks = {name: jobs.configuration(asked[name], 8) for name in one.recipes()}
        changed = "older" if older else marks[one.name]
        folder = tmp_path / f"demo{seed}" / "42"
        folder.mkdir(parents=True)
        done = {one.base: marks[one.base], one.name: changed}
        notes = {name: {"configuration": mark, "scored": True} for name, mark in done.items()}
        write_json(folder / "done.json", notes)
        table = scores(0.5, seeds=1).replace({"base": one.base, "changed": one.name})
        table.drop(columns="seed").to_csv(folder / "all_scores.csv", index=False)
    found = ablation.measured([one], ["demo"], [1, 2], how)
    assert set(found["changed"]) == {one.change}
    assert found.set_index("metric").loc["mse", "seeds"] == 1
    assert ablation.measured([one], ["demo"], [2], how).empty


def test_the_table_is_drawn_from_its_record():
    lines = ablation.read(ablation.RECORD)
    page = (ablation.RECORD.parent / "reproduction.md").read_text()
    for row in ablation.written(lines).splitlines():
        assert row in page
