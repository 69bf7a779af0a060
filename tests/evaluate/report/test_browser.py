"""The report in a browser: opened as a file, without a network, and used with pointer and keys."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import expect, sync_playwright

from knockon.evaluate import scores, tables
from knockon.evaluate.report.page import write

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
GENE = "</script><b>G0"
MODEL = "mine <i>ü</i> & co"


@pytest.fixture(scope="module")
def opened(make, tmp_path_factory):
    """The page of a small evaluation, whose names are as unfriendly as names can be."""
    folder = tmp_path_factory.mktemp("report")
    genes = [GENE, *(f"G{i}" for i in range(1, 40))]
    measured = make.cells(["control", "A", "B", "C", "D", "A+B", "B+C", "C+D"], contexts=["β cells"])
    predicted = make.cells(["A+B", "B+C", "C+D"], cells=20, seed=1, contexts=["β cells"])
    measured.var_names = predicted.var_names = genes
    predicted.uns["knockon"] = {"model": MODEL, "units": "log1p"}
    screen = make.screen(measured, ("cell_type",))
    split = make.split(screen, lambda label: len(label.perturbations) == 2)
    found = scores.judge(scores.Pairs.of(predicted, screen, split), split, seed=0, out=folder).scores
    tables.write(found, folder)
    about = {"screen": {"file": f"/{90 * 'folder'}/screen.h5ad", "cells": 1}, "notes": {MODEL: [300 * "x"]}}
    (folder / "about.json").write_text(json.dumps(about))
    run = folder / "runs" / MODEL
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    log = "".join(f'{{"step": {step}, "total": {1 / step}, "lr": 1}}\n' for step in range(1, 6))
    (run / "log.jsonl").write_text(log)
    write(folder, folder / "report.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield SimpleNamespace(browser=browser, address=f"file://{folder}/report.html", found=found)
        browser.close()


@pytest.fixture
def page(opened):
    yield from used(opened, 1440)


@pytest.fixture
def phone(opened):
    yield from used(opened, 390)


def used(opened, width):
    """A fresh page that must not complain, ask for anything outside, nor be wider than its window."""
    context = opened.browser.new_context(
        viewport={"width": width, "height": 850}, offline=True, color_scheme="light"
    )
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or wrong.append(asked.url))
    page.goto(opened.address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
    assert not wrong


def names(page):
    return page.locator("#cases tbody th").all_inner_texts()


def column(page, number):
    return [
        float(text.replace("−", "-"))
        for text in page.locator(f"#cases tbody td:nth-child({number})").all_inner_texts()
    ]


def drawn(page, plot):
    """A plot of the chosen condition, scrolled to and ready."""
    place = page.locator(f"#{plot}")
    place.scroll_into_view_if_needed()
    expect(place.locator(".main-svg").first).to_be_visible()
    return place


def test_the_worst_cases_come_first_and_heads_sort(page, opened):
    scored = opened.found[(opened.found["model"] == MODEL) & (opened.found["metric"] == "pearson_delta")]
    worst = scored.sort_values("value")["condition"].tolist()
    assert names(page) == worst
    page.locator("#cases thead button", has_text="mine").click()
    assert names(page) == worst[::-1]
    page.locator("#cases thead button", has_text="condition").press("Enter")
    assert names(page) == sorted(worst)


@pytest.mark.parametrize("window", ["page", "phone"])
def test_long_paths_and_notes_wrap(request, window):
    boxes = request.getfixturevalue(window).locator(".facts dd, .notes dd, .card, .facts")
    assert boxes.count() > 3
    assert boxes.evaluate_all("all => all.filter(e => e.offsetParent && e.scrollWidth > e.clientWidth)") == []


def test_another_metric_turns_the_order_where_lower_is_better(page, opened):
    page.locator("#metric").select_option("mse")
    values = column(page, 4)
    assert values == sorted(values, reverse=True)


def test_the_leaderboard_sorts(page):
    page.locator("#leaders thead button", has_text="mse").click()
    shown = page.locator("#leaders tbody td:nth-child(5)").evaluate_all(
        "cells => cells.map(c => +c.dataset.value)"
    )
    assert shown == sorted(shown)
    assert "ascending" in page.locator("#leaders thead th:nth-child(5)").get_attribute("aria-sort")


def test_search_leaves_what_is_sought(page):
    page.locator("#search").fill("b+c")
    assert names(page) == ["B+C | β cells"]
    expect(page.locator("#count")).to_have_text("1 of 3 conditions")
    page.locator("#search").fill("nothing like it")
    assert names(page) == []


def test_a_chosen_condition_is_drawn_and_its_genes_are_named(page):
    page.locator("#cases tbody tr", has_text="C+D").click()
    expect(page.locator("#case")).to_have_text("C+D | β cells")
    place = drawn(page, "change")
    points = place.locator(".scatterlayer .trace").nth(1).locator("path.point")
    expect(points).to_have_count(40)
    page.locator("#change .nsewdrag").hover()
    box = points.first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(place.locator(".hoverlayer")).to_contain_text("observed")
    text = place.locator(".hoverlayer .hovertext").first.text_content()
    assert text.startswith(("G", GENE))


def test_a_hostile_gene_is_a_name_and_nothing_else(page):
    genes = page.evaluate("data.portraits.genes")
    assert genes[0] == GENE
    assert page.evaluate("safe(data.portraits.genes[0])") == "&lt;/script&gt;&lt;b&gt;G0"
    assert page.locator("main i:not([class])").count() == 0  # the model's own markup is text


def test_every_plot_is_drawn_for_every_model(page):
    for model in page.evaluate("data.models.map(m => m.name)"):
        page.locator("#predictor").select_option(model)
        for plot in ("change", "genes", "map", "interaction"):
            drawn(page, plot)
    page.locator("[data-map=pc]").click()
    page.locator("[data-double=beyond]").click()
    expect(page.locator("#together")).to_contain_text("more than its parts")
    expect(page.locator("[data-double=beyond]")).to_have_attribute("aria-pressed", "true")
    page.locator(".curve").scroll_into_view_if_needed()
    expect(page.locator(".curve .scatterlayer .trace")).to_have_count(1)


def test_a_phone_has_it_all(phone):
    phone.locator("#search").fill("c+d")
    phone.locator("#cases tbody tr", has_text="C+D").click()
    for plot in ("change", "genes", "map", "interaction"):
        drawn(phone, plot)
    for box in phone.locator("main > section").all():
        assert box.bounding_box()["width"] <= 390


def test_light_and_dark(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.locator("#theme").click()
    dark = page.evaluate(paper)
    assert light == "rgb(255, 255, 255)"
    assert dark != light
    page.emulate_media(color_scheme="dark")
    page.locator("#theme").click()
    assert page.evaluate(paper) == light  # a wish is stronger than the system
    page.reload()
    assert page.evaluate(paper) == light


def test_paper_is_light(page):
    page.emulate_media(color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(paper)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(paper) == dark


def test_the_next_case_is_better(page):
    expect(page.locator("#previous")).to_be_disabled()
    first = page.locator("#case").inner_text()
    page.locator("#next").press("Enter")
    assert page.locator("#case").inner_text() == names(page)[1] != first


@pytest.mark.parametrize("kept", [["scores.csv"], []], ids=["no portraits", "nothing but one metric"])
def test_less_is_shown_where_less_is_there(opened, tmp_path, kept):
    rows = [("mine", "A", "mse", 0.5), ("mine", "B", "mse", np.nan)]
    frame = opened.found if kept else pd.DataFrame(rows, columns=["model", "condition", "metric", "value"])
    tables.write(frame, tmp_path)
    write(tmp_path, tmp_path / "report.html")
    page = opened.browser.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"file://{tmp_path}/report.html")
    assert len(names(page)) == (3 if kept else 2)
    assert page.locator("#detail").is_hidden()
    page.close()
    assert not wrong


@pytest.mark.slow
def test_a_large_report_opens_at_once(opened, large_folder, tmp_path):
    """Within two seconds on a quiet machine; the bound is for a busy one."""
    write(large_folder, tmp_path / "report.html")
    page = opened.browser.new_page(viewport={"width": 1440, "height": 850})
    began = time.monotonic()
    page.goto(f"file://{tmp_path}/report.html")
    page.locator("#cases tbody tr").nth(99).wait_for()
    listed = time.monotonic() - began
    drawn(page, "change")
    shown = time.monotonic() - began
    page.close()
    assert max(listed, shown) < 10, (listed, shown)
    print(f"listed after {listed:.2f} s, drawn after {shown:.2f} s")
