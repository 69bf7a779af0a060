import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmarks import jobs, page, record, residuals, results
from benchmarks.jobs import Task
from benchmarks.record import Record

from knockon import models, splits
from knockon.data import simulate
from knockon.data.screen import Screen
from knockon.evaluate.summary import BASELINES, CEILING
from knockon.evaluate.tables import LONG
from knockon.files import read_json, write_json
from knockon.model import Recipe
from knockon.record import RECORD
from knockon.types import Label, UserError

TINY = Task(name="tiny", about="a tiny screen", data=simulate.tiny(), seeds=(42, 43))


@pytest.fixture(scope="module")
def screen() -> Screen:
    return Screen.from_anndata(simulate.simulate(simulate.tiny()))


# ---- tasks -----------------------------------------------------------------------------------------


def test_names_of_tasks_differ_and_their_files_are_named_where_they_lie():
    assert len({task.name for task in results.TASKS}) == len(results.TASKS)
    for task in results.TASKS:
        assert jobs.slug(task.name) == task.name
        if task.split.endswith(".json"):
            assert Path(task.split).exists()


def test_a_simulated_screen_is_made_once(tmp_path):
    task = replace(TINY, data=replace(simulate.tiny(), truth_cells=2))
    path = task.file(tmp_path)
    made = path.stat().st_mtime_ns
    assert task.file(tmp_path).stat().st_mtime_ns == made
    assert list(task.folds(task.screen(tmp_path))) == ["42", "43"]


def test_each_level_of_the_first_covariate_is_a_fold(tmp_path):
    small = replace(simulate.contexts(), cells=800, genes=60, drugs=2, doses=(1.0,), truth_cells=2)
    task = Task(name="x", about="", data=small, split="context", each_level=True)
    folds = task.folds(task.screen(tmp_path))
    assert {fold: split.heldout for fold, split in folds.items()} == {
        f"type{i}": (f"type{i}",) for i in (1, 2, 3)
    }


def test_whatever_has_no_basis_is_found_before_it_is_trained(screen):
    """Perturbed genes of this panel have vectors; those of a screen with other names have none."""
    split = splits.unseen(screen, fraction=0.2)
    assert jobs.has_basis(models.recipe("linear"), screen, [split])
    assert not jobs.has_basis(models.recipe("latent_additive"), screen, [split])
    assert jobs.has_basis(models.recipe("latent_additive"), screen, [split, splits.additive(screen)])


# ---- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def score(screen, tmp_path, monkeypatch):
    """Score models in one folder by comparisons whose scores are made up."""
    split, calls = splits.additive(screen), iter(range(100))

    def compare(screen, split, *, out, comparison, options, further):
        recipes = {name: models.recipe(name) for name in BASELINES} | further
        value = next(calls)
        rows = []
        for name, recipe in recipes.items():
            if name == "broken":
                raise UserError("The values are neither counts nor log1p")
            record = out / "runs" / name / RECORD
            if not record.exists():  # a run is as it was trained first
                config, training = jobs.plain(recipe)
                record.parent.mkdir(parents=True)
                write_json(record, {"config": config, "train": training, "made": value})
            rows.append((name, "A+B", "mse", read_json(record)["made"]))
        table = pd.DataFrame([*rows, (CEILING, "A+B", "mse", 0)], columns=LONG)
        table.to_csv(out / "scores.csv", index=False)

    monkeypatch.setattr(jobs, "compare", compare)
    monkeypatch.setattr(jobs, "_took", lambda folder, name: {})

    def scored(*again, **further):
        how = jobs.How(out=tmp_path, again=again)
        return list(jobs.score(TINY, tmp_path, screen, split, how, further))

    return scored


def test_what_is_scored_stays_and_only_what_changed_is_scored_again(score, tmp_path):
    linear = models.recipe("linear")
    softer = replace(linear, model=replace(linear.model, ridge=1.0))
    assert score(linear=linear) == [*BASELINES, "linear"]
    assert score(linear=linear) == []
    assert score(nearest=models.recipe("nearest")) == ["nearest"]
    before = jobs.pooled({"42": tmp_path})
    assert set(before["model"]) == {*BASELINES, "linear", "nearest", CEILING}
    assert before["model"].iloc[-1] == CEILING
    assert set(before["condition"]) == {"42/A+B"}
    assert score(linear=softer) == ["linear"]
    both = before.merge(jobs.pooled({"42": tmp_path}), on=["model", "condition", "metric"])
    assert len(both) == len(before)
    assert set(both.loc[both["value_x"] != both["value_y"], "model"]) == {"linear"}


def test_what_is_asked_for_again_is_made_again(score, tmp_path):
    linear = {"linear": models.recipe("linear")}
    score(**linear)
    assert score("linear", **linear) == ["linear"]
    assert score("additive", **linear) == ["additive"]
    values = jobs.pooled({"42": tmp_path}).set_index("model")["value"]
    assert (values["no_effect"], values["linear"], values["additive"]) == (0, 1, 2)


def test_scores_of_an_older_recipe_are_not_shown_where_the_new_one_failed(score, tmp_path):
    score(linear=models.recipe("linear"))
    done = jobs.finished(tmp_path)
    write_json(tmp_path / "done.json", done | {"linear": {"scored": False, "error": "diverged"}})
    assert "linear" not in set(jobs.pooled({"42": tmp_path})["model"])


def test_a_model_that_cannot_be_scored_keeps_nobody_from_it(score, tmp_path):
    further = {"broken": models.recipe("nearest"), "linear": models.recipe("linear")}
    assert score(**further) == [*BASELINES, "linear"]
    note = jobs.finished(tmp_path)["broken"]
    assert not note["scored"]
    assert "neither counts nor log1p" in str(note["error"])


# ---- configurations and looks -----------------------------------------------------------------------


def test_the_mark_of_a_recipe_differs_for_every_change():
    recipe = models.recipe("scdfm")
    changed = (
        replace(recipe, model=replace(recipe.model, mmd=0.1)),
        replace(recipe, train=replace(recipe.train, lr=1.0)),
    )
    marks = [jobs.configuration(one, 256) for one in (recipe, *changed)] + [jobs.configuration(recipe, 128)]
    assert len(set(marks)) == 4
    assert jobs.configuration(models.recipe("scdfm"), 256) == marks[0]


def test_looks_are_counted_by_place_and_configuration(tmp_path):
    for what in ("scdfm aa", "scdfm aa", "scdfm bb"):
        record.count(tmp_path, "demo0/42", what)
    record.count(tmp_path, "demo0/43", "scdfm aa")
    looks = Record.read(tmp_path).looks
    assert looks == {"demo0/42": {"scdfm aa": 2, "scdfm bb": 1}, "demo0/43": {"scdfm aa": 1}}


@pytest.mark.parametrize("name", results.SIZES)
def test_paper_switches_have_the_sizes_of_the_default_and_nothing_else_of_it(name):
    made, default, paper = results.paper_switches(name), models.recipe(name), models.recipe(name, "paper")
    for field in vars(made.model):
        source = default if field in results.SIZES[name] else paper
        if field == "autoencoder":
            source = Recipe(model=replace(paper.model, autoencoder=results.paper_switches("scldm_vae").model))
        longer = results.LONGER.get(name, ({}, {}))
        assert getattr(made.model, field) == longer[0].get(field, getattr(source.model, field))
    assert made.train == replace(default.train, **results.LONGER.get(name, ({}, {}))[1])


def test_models_that_are_not_there_are_skipped_and_said(caplog):
    found = results.chosen(["no_effect", "linear", "scdfm-paper", "nobody", "linear-paper"])
    assert list(found) == ["linear", "scdfm-paper"]
    assert "nobody is skipped" in caplog.text


# ---- residuals -------------------------------------------------------------------------------------


def test_residuals_are_correlated_against_measured_and_true_singles():
    draw = np.random.default_rng(0)
    control, a, b, beyond, noise = draw.normal(size=(5, 200))
    truth = pd.DataFrame(
        [control, control + a, control + b, control + a + b + beyond], index=["control", "A", "B", "A+B"]
    )
    double, one, other = Label.of(["A", "B"]), Label.of(["A"]), Label.of(["B"])
    exact = {Label(): control, one: control + a, other: control + b}
    rough = exact | {one: control + a + noise}

    def found(predicted: np.ndarray, measured: dict[Label, np.ndarray]) -> tuple[float, float]:
        line = residuals.correlations({double: predicted}, measured, truth).iloc[0]
        assert line["condition"] == "A+B"
        return line["measured"], line["true"]

    assert found(control + a + b, exact) == (0, 0)  # no residual
    assert found(control + a + b + beyond / 2, exact) == pytest.approx((1, 1))
    assert found(control + a + b - beyond, exact) == pytest.approx((-1, -1))
    # the very sum that was measured adds nothing to it, and no effect profits by its noise
    measured, true = found(control + a + b + noise, rough)
    assert measured == 0
    assert abs(true) < 0.2
    shared, clean = found(control, rough)
    assert shared > clean + 0.1


def test_averages_have_an_interval_for_each_way():
    table = pd.DataFrame(
        {"condition": list("abc"), "measured": [0.1, 0.2, 0.3], "true": [0.0] * 3, "model": ["m"] * 3}
    )
    found = residuals.averaged(table)
    assert found.loc[("m", "measured"), "mean"] == pytest.approx(0.2)
    assert tuple(found.loc[("m", "true"), :]) == (0, 0, 0)
    assert found.loc[("m", "measured"), "low"] < 0.2 < found.loc[("m", "measured"), "high"]


# ---- the page --------------------------------------------------------------------------------------


def folder_of(out: Path, task: str, fold: str, values: dict[str, float]) -> None:
    """A finished fold with made-up scores of four conditions, all around one value of a model."""
    rows = [
        (model, f"c{i}", metric, value * (1 + i / 10))
        for model, value in values.items()
        for metric in ("mse", "energy_distance")
        for i in range(4)
    ]
    folder = out / task / fold
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=["model", "condition", "metric", "value"]).to_csv(
        folder / "all_scores.csv", index=False
    )
    note = {
        "configuration": "aa",
        "scored": True,
        "commit": "abc",
        "date": "today",
        "machine": "box",
        "cells": 8,
    }
    note |= {"train": 2.0, "generate": 0.5, "fallback": 0}
    done = {model: note for model in values if model != "ceiling"}
    write_json(folder / "done.json", done | {"broken": {**note, "scored": False, "error": "Not log1p."}})


TASKS = [Task(name=name, about=f"the {name}", data=Path("nowhere.h5ad")) for name in ("one", "two", "three")]
ANCHORS = {"ceiling": 1.0, "no_effect": 4.0, "mean_shift": 3.5, "additive": 3.0}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Record of two tasks."""
    out, folder = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("record")
    for fold in ("42", "43"):
        folder_of(out, "one", fold, ANCHORS | {"mine": 2.0, "other": 3.2})
    folder_of(out, "two", "42", {"ceiling": 3.0, "no_effect": 3.0, "additive": 2.9, "mine": 3.0})
    for place, what in (("one/42", "mine aa"), ("one/42", "mine aa"), ("one/42", "mine bb")):
        record.count(folder, place, what)
    record.count(folder, "one/43", "other aa")
    record.keep(folder, TASKS[0], out, ["mine", "other", "broken"])
    record.keep(folder, TASKS[1], out, ["mine"], ["nobody"])
    return folder


@pytest.fixture(scope="module")
def text(kept):
    order = ("no_effect", "mine", "other")
    return page.written(TASKS, Record.read(kept), order=order, command="the command")


def test_what_is_found_anew_takes_the_place_of_what_was_found_of_it(kept, tmp_path):
    """The runs of the others are gone; so are the older folds of what now has no scores."""
    shutil.copytree(kept, tmp_path / "record")
    folder_of(tmp_path, "one", "42", ANCHORS | {"mine": 1.5, "third": 2.5, "stale": 0.0})
    before = Record.read(kept).found("one")
    record.keep(tmp_path / "record", TASKS[0], tmp_path, ["mine", "third"])
    after = Record.read(tmp_path / "record").found("one")
    assert before is not None
    assert after is not None
    for there, name, value in ((before, "mine", 0.5), (after, "mine", 0.75), (after, "third", 0.25)):
        assert there.lines.loc[(name, "mse"), "calibrated"] == pytest.approx(value)
        assert there.lines.loc[(name, "mean metrics"), "calibrated"] == pytest.approx(value)
    pd.testing.assert_frame_equal(after.lines.loc[["other"]], before.lines.loc[["other"]])
    assert after.notes["broken"] == before.notes["broken"]
    assert [note["conditions"] for note in after.notes["mine"]] == [4]
    assert "stale" not in after.notes
    assert after.folds == 2


def test_a_model_that_fails_now_is_not_shown_with_what_it_once_had(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "record")
    folder_of(tmp_path, "one", "42", ANCHORS)
    done = jobs.finished(tmp_path / "one" / "42")
    write_json(tmp_path / "one" / "42" / "done.json", done | {"mine": done["broken"]})
    record.keep(tmp_path / "record", TASKS[0], tmp_path, ["mine"])
    found = Record.read(tmp_path / "record").found("one")
    assert found is not None
    assert "mine" not in found.lines.index
    assert found.notes["mine"][0]["error"] == "Not log1p."


def row(text: str, start: str, nth: int = 0) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| `{start}` |")]
    return [cell.strip() for cell in lines[nth].strip("|").split("|")]


def test_the_page_pools_folds_and_calibrates(text):
    assert "8 test conditions in 2 folds" in text
    assert row(text, "mine") == ["`mine`", "**0.50** [0.50, 0.50]", "-"]
    assert row(text, "other")[1] == "-0.10 [-0.10, -0.10]"


def test_the_page_says_where_a_model_is_not_better(text):
    _, _, verdicts = text.partition("Where a model is not better")
    mine, _, other = verdicts.partition("- `other`")
    assert "mean metrics: **better** on one; no room to tell on two." in mine
    assert "distribution metrics: **worse** on one; no scores on two." in other


def test_the_page_says_how_it_came_about(text):
    assert "Made by `the command`" in text
    assert "abc on today (box)" in text
    assert "Not run yet: three." in text
    assert "`broken` has no scores in 2 of 2 folds: Not log1p." in text
    assert "not trained: `nobody`." in text


def test_the_page_counts_looks_and_seconds(text):
    assert row(text, "mine", -3)[-3:] == ["2.0", "0.5", "2 (3)"]
    assert row(text, "other", -1)[-1] == "1"
    assert row(text, "mine", -1)[-1] == "0"


def test_numbers_are_short():
    assert [page.number(value) for value in (0.123, -0.001, -48.2, np.inf, -np.inf)] == [
        *("0.12", "0.00", "-48", "∞", "-∞")
    ]
    assert page.span(np.nan, np.nan, np.nan) == "-"
    assert page.span(0.5, np.nan, np.nan) == "0.50"


def test_the_page_in_the_repository_is_that_of_its_record():
    docs = results.HERE.parent / "docs"
    made = page.written(results.TASKS, Record.read(docs), order=results.MODELS, command="")
    written = set((docs / "results.md").read_text(encoding="utf-8").splitlines())
    assert {line for line in made.splitlines() if line.startswith(("| ", "- `"))} <= written
