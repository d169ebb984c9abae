"""`report.html` in a real browser: tables sorted by hand and keyboard, CSV, the values of curves; and no barriers."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Tab, browsing
from fake_run import make_summary
from summaries import read

from orchestrator.reports.page import write_report

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
BARRIERS = "axe.run().then(found => found.violations.map(each => each.id + ' ' + each.nodes.map(node => node.target)))"
STAGES = "[...document.querySelectorAll('section')].find(each => each.querySelector('h2')?.textContent === 'Stages')"
TABLE = f"{STAGES}.querySelector('table')"
CURVES = "document.querySelector('section svg.figure')"
TOOLS = f"{CURVES}.closest('.scroll').nextElementSibling"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    found = make_summary(tmp_path, epochs=3)
    # What a spreadsheet would compute, and what a page would run.
    found["regimes"]["segprop"]["stages"][1]["name"] = '=1+1,"<img src=x onerror=alert(1)>'
    return found


@pytest.fixture
def shown(summary: dict[str, Any], tmp_path: Path, tab: Tab) -> Tab:
    write_report(read(summary), tmp_path / "report.html")
    tab.complaints.clear()
    tab.look(1200)
    tab.go(f"file://{tmp_path}/report.html")
    return tab


def downloaded(tab: Tab, folder: Path, link: str) -> list[list[str]]:
    """The rows of what a link downloads."""
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    name = tab.evaluate(f"{link}.download")
    tab.evaluate(f"{link}.click()")
    deadline = time.monotonic() + 20
    while not (folder / name).exists():
        assert time.monotonic() < deadline, [path.name for path in folder.iterdir()]
        time.sleep(0.05)
    return list(csv.reader((folder / name).read_text("utf-8-sig").splitlines()))


def column(tab: Tab, number: int) -> list[str]:
    found: list[str] = tab.evaluate(f"[...{TABLE}.tBodies[0].rows].map(row => row.cells[{number}].innerText.trim())")
    return found


def test_tables_are_sorted_by_click_and_keyboard_and_put_back(shown: Tab) -> None:
    before = column(shown, 0), column(shown, 5)
    head = f"{TABLE}.tHead.rows[0].cells[5]"
    shown.evaluate(f"{head}.querySelector('button').click()")
    assert shown.evaluate(f"{head}.getAttribute('aria-sort')") == "ascending"
    values = [float(text.rstrip(" %")) for text in column(shown, 5)]
    assert values == sorted(values)
    # A row that stands alone says which regime it is of.
    assert set(column(shown, 0)) == {"End-to-end", "Layer-wise", "SegProp"}
    shown.evaluate(f"{head}.querySelector('button').focus()")
    shown.enter()
    assert shown.evaluate(f"{head}.getAttribute('aria-sort')") == "descending"
    assert [float(text.rstrip(" %")) for text in column(shown, 5)] == values[::-1]
    shown.enter()
    assert shown.evaluate(f"{head}.getAttribute('aria-sort')") is None
    assert (column(shown, 0), column(shown, 5)) == before
    assert shown.complaints == []


def test_tables_and_curves_are_downloaded_as_csv(shown: Tab, summary: dict[str, Any], tmp_path: Path) -> None:
    head, *rows = downloaded(shown, tmp_path, f"{TABLE}.closest('.scroll').nextElementSibling.querySelector('a')")
    assert head[:4] == ["Regime", "Stage", "Path", "Input"]
    stages = [(name, stage) for name, regime in summary["regimes"].items() for stage in regime["stages"]]
    assert len(rows) == len(stages)
    assert {row[0] for row in rows} == {"End-to-end", "Layer-wise", "SegProp"}
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row)
    head, *rows = downloaded(shown, tmp_path, f"{TOOLS}.querySelector('a')")
    assert head == ["regime", "stage", "curve", "epoch", "value"]
    losses = [float(row[4]) for row in rows if row[0] == "End-to-end" and row[2] == "loss, validation"]
    assert losses == [epoch["validation_loss"] for epoch in summary["regimes"]["e2e"]["stages"][0]["curve"]]
    assert sum(row[2] == "accuracy, training" for row in rows) == sum(len(stage["curve"]) for _, stage in stages)


def test_curves_say_their_values_under_the_pointer_and_by_a_slider(shown: Tab, summary: dict[str, Any]) -> None:
    first = summary["regimes"]["e2e"]["stages"][0]["curve"][0]
    place = shown.evaluate(
        f"(() => {{ {CURVES}.scrollIntoView();"
        "const path = document.querySelector('#curves-e2e-0-validation-accuracy path');"
        "const at = path.getPointAtLength(0).matrixTransform(path.getScreenCTM()); return [at.x, at.y]; })()"
    )
    shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    shown.wait("document.querySelector('.tip')")
    said = shown.evaluate("document.querySelector('.tip').textContent")
    assert said == f"End-to-end, e2e: accuracy, validation: {100 * first['validation_accuracy']:.2f} % (epoch 1)"
    shown.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    shown.wait("!document.querySelector('.tip')")
    shown.evaluate(f"{TOOLS}.querySelector('input').focus()")
    shown.press("ArrowRight", 39)
    heard = shown.evaluate(f"{TOOLS}.querySelector('output').textContent")
    assert heard.endswith("(epoch 2)")
    assert shown.evaluate(f"{TOOLS}.querySelector('input').getAttribute('aria-valuetext')") == heard
    assert shown.complaints == []


def test_the_report_fits_a_small_screen_and_has_no_barriers_by_day_and_by_night(shown: Tab) -> None:
    axe = browser.axe()
    for width, dark in ((400, True), (1200, False)):
        shown.look(width, dark=dark)
        shown.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert shown.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        if axe is not None:
            shown.evaluate(f"{axe};0")
            assert shown.evaluate(BARRIERS) == [], (width, dark)


def test_without_script_the_page_says_what_it_said(summary: dict[str, Any], tmp_path: Path, tab: Tab) -> None:
    write_report(read(summary), tmp_path / "report.html")
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.go(f"file://{tmp_path}/report.html")
        assert tab.evaluate("document.querySelectorAll('.tools, thead button').length") == 0
        assert len(column(tab, 0)) == sum(len(regime["stages"]) for regime in summary["regimes"].values())
        assert tab.evaluate("document.querySelectorAll('svg.figure').length") == 3
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
