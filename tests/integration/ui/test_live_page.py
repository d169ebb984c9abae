"""The live page in a real browser, beside a run that is killed and goes on, and by keyboard on a small screen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Tab, browsing
from live_page import PageRun, Visitor, served
from running import ROOT, checkpoints, wait_for, write_config

from orchestrator.execution.beat import Beat, RunningTask
from workers.control import Update

pytestmark = pytest.mark.timeout(600)
#: Two stages of some seconds, in the driver's own process: no Ray.
SHORT = {"training.epochs": 3, "training.checkpoint_every_s": 0.01, "split.base": 3, "evaluation.stages": False}
#: What is looked at: every kind of page.
PATHS = (
    *("/", "/run?run=now", "/run?run=earlier", "/compare?run=now&run=earlier&all=1", "/compare"),
    *("/plan", "/stop?run=now", "/login", "/nothing"),
)
STATE = "document.querySelector('#head .chip').textContent"
STAGES = "[...document.querySelectorAll('#stages .stage .chip')].map(chip => chip.textContent)"
ROWS = "[...document.querySelectorAll('#memory-table tbody tr')]"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab | None]:
    """A browser's page; None where there is no browser."""
    if browser.missing():
        yield None
        return
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


def start(config: Path) -> subprocess.Popen[bytes]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEGPROP_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.run", str(config), "--quiet"],
        cwd=ROOT,
        env=kept,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def follow(tab: Tab | None, visitor: Visitor, state: str) -> None:
    """Until the page says so: over HTTP, and in the browser, where there is one, which is not told to load it again."""
    page, chip = partial(visitor.get, "/run?run=run"), f'<span class="chip {state}">{state}</span>'
    wait_for(lambda: chip in page().text, 120, lambda: page().text[:3000])
    if tab is not None:
        tab.wait(f"{STATE} === '{state}'", 20)


def test_a_run_that_is_killed_and_goes_on_is_followed_without_loading_the_page_again(
    tmp_path: Path, tab: Tab | None
) -> None:
    config, run_dir = write_config(tmp_path, SHORT), tmp_path / "run"
    driver = start(config)
    try:
        wait_for(lambda: list(checkpoints(run_dir / "store")), 300)
        # Held still, so that a quick machine is not done before anybody looks.
        driver.send_signal(signal.SIGSTOP)
        with served(tmp_path) as visitor:
            if tab is not None:
                tab.look(1200)
                tab.go(f"http://127.0.0.1:{visitor.port}/run?run=run")
                tab.evaluate("window.loadedOnce = true")
            follow(tab, visitor, "running")
            driver.kill()
            driver.wait()
            follow(tab, visitor, "killed")
            assert "interrupted, with a checkpoint" in visitor.get("/run?run=run").text
            driver = start(config)
            assert driver.wait(timeout=300) == 0
            follow(tab, visitor, "done")
            assert "<polyline" in visitor.get("/run?run=run").text
            if tab is not None:
                assert tab.evaluate("window.loadedOnce") is True
                assert tab.evaluate("document.querySelectorAll('#curves polyline').length") > 0
                assert set(tab.evaluate(STAGES)) == {"stored"}
                assert tab.complaints == []
    finally:
        driver.kill()
        driver.wait()


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[tuple[PageRun, Visitor]]:
    """A made-up run under way beside a finished one."""
    PageRun(tmp_path / "runs" / "earlier").commit_all()
    run = PageRun(tmp_path / "runs" / "now", called="a run with a name that is long enough to be broken somewhere")
    run.commit("data", "model", "e2e/e2e")
    for step in range(60):
        figures = {"train_loss": 2.0 / (step + 1), "train_accuracy": step / 60, "validation_loss": 1.0}
        run.point("e2e", "e2e", step, **figures, a=1.0, b=1.0)
    lease = run.lease()
    running = RunningTask(1, "m", time.time(), Update(epoch=1, epochs=8))
    lease.report(Beat(running={run.id("segprop/stage1-base"): running}))
    with served(tmp_path / "runs") as visitor:
        yield run, visitor
    lease.release("stopped")


def barriers(tab: Tab) -> Any:
    """What axe-core finds; nothing where it is not there."""
    text = browser.axe()
    if text is None:
        return []
    tab.evaluate(f"{text};0")
    return tab.evaluate(
        "axe.run().then(found => found.violations.map(each => each.id + ' ' + each.nodes.map(node => node.target)))"
    )


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_every_page_fits_a_small_screen_and_has_no_barriers_by_day_and_by_night(
    shown: tuple[PageRun, Visitor], tab: Tab
) -> None:
    _, visitor = shown
    for path in PATHS:
        for width, dark in ((400, True), (1200, False)):
            tab.look(width, dark=dark)
            tab.go(f"http://127.0.0.1:{visitor.port}{path}")
            wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{path} is {wide} pixels wider than a screen of {width}"
            assert barriers(tab) == [], (path, width, dark)


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_the_page_is_used_by_keyboard_and_what_is_replaced_keeps_the_visitors_place(
    shown: tuple[PageRun, Visitor], tab: Tab
) -> None:
    run, visitor = shown
    tab.look(400)
    tab.complaints.clear()
    tab.go(f"http://127.0.0.1:{visitor.port}/run?run=now")
    tab.wait("document.getElementById('connection').textContent === 'live'")
    # The first Tab leads past the navigation; every stop has a visible focus.
    tab.tab()
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the content"
    tab.enter()
    tab.tab()
    assert tab.evaluate("document.activeElement.id") == "stop"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.evaluate("document.getElementById('memory-table-sort-3').focus()")
    tab.enter()
    tab.evaluate("document.getElementById('more-curves').open = true")
    run.commit("segprop/stage1-base")
    tab.wait(f"{ROWS}.some(row => /stage1.*segprop.*stored/s.test(row.textContent))")
    assert tab.evaluate("document.activeElement.id") == "memory-table-sort-3"
    assert tab.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    sizes = tab.evaluate(f"{ROWS}.map(row => +row.cells[3].dataset.sort)")
    assert sizes == sorted(sizes)
    run.point("e2e", "e2e", 100, b=3.0)
    tab.wait("document.getElementById('more-curves').textContent.includes('3 at step 100')")
    assert tab.evaluate("document.getElementById('more-curves').open") is True
    assert tab.complaints == []
