"""Render the pages from what was looked at. The templates lay out and escape; nothing is asked here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from orchestrator.reports.page_template import template
from orchestrator.status.compare import Comparison, result_rows, setting_rows
from orchestrator.ui.chart import chart
from orchestrator.ui.planning import PlanText
from orchestrator.ui.records import ListedView, RunView, SweepTable
from orchestrator.ui.sweep_view import magnitude
from orchestrator.units import bytes_text, count_text

_FOLDER = Path(__file__).parent / "templates"
#: Figures that are shown at once; the others open.
OPEN_CURVES = 4
#: State of a part -> what it is called.
PART_WORDS = {
    "stored": "stored: in the store, made by this run",
    "reused": "reused: found in the store",
    "released": "made, and deleted after its last use",
    "stopped": "interrupted, with a checkpoint",
}
_MARK = "@mark@"


@dataclass(frozen=True)
class Pages:
    """Renders for one server. `name`: of the folder that is shown; `form_word`: what forms must carry."""

    name: str
    form_word: str

    def index(self, runs: Sequence[ListedView], *, plans: bool) -> str:
        """Return the list of runs."""
        return self._live("index.html.j2", "/", {"runs": runs, "plans": plans})

    def run(self, view: RunView, table: SweepTable | None, wanted: str) -> str:
        """Return the page of a run; `table`: of a sweep, its trials that meet the filter `wanted`."""
        charts = [chart(curve) for curve in view.curves if curve.lines]
        query = {"run": view.path} | ({"filter": wanted} if wanted else {})
        return self._live(
            "run.html.j2",
            f"/run?{urlencode(query)}",
            {
                "view": view,
                "charts": charts[:OPEN_CURVES],
                "more": charts[OPEN_CURVES:],
                "table": table,
                "wanted": wanted,
                "on_device": any(stage.device_bytes for stage in view.memory),
            },
        )

    def compare(self, runs: Sequence[str], found: Comparison | None, *, same: bool, problem: str = "") -> str:
        """Return runs side by side; without `found` the form that asks which."""
        shown: dict[str, Any] = {"names": (), "settings": (), "results": ()}
        if found is not None:
            shown = {
                "names": [run.path for run in found.runs],
                "settings": [(row[0], found.differs(row[0]), row[1:]) for row in setting_rows(found, same=same)],
                "results": result_rows(found),
            }
        return self._page("compare.html.j2", {**shown, "runs": runs, "same": same, "problem": problem})

    def plan(self, configs: Sequence[str], chosen: str, plan: PlanText | None) -> str:
        """Return the form that asks for a configuration, and its plan."""
        return self._page("plan.html.j2", {"configs": configs, "chosen": chosen, "plan": plan})

    def stop(self, view: RunView) -> str:
        """Return the question whether a run shall be stopped."""
        return self._page("stop.html.j2", {"view": view})

    def said(self, title: str, message: str, back: str = "/") -> str:
        """Return a page that says one thing."""
        return self._page("said.html.j2", {"heading": title, "message": message, "back": back})

    def login(self, after: str, *, wrong: bool) -> str:
        """Return the form that asks for the token."""
        return self._page("login.html.j2", {"after": after, "wrong": wrong})

    def _live(self, name: str, address: str, values: Mapping[str, Any]) -> str:
        """Render a page that changes. Its mark is another one whenever anything on it is."""
        text = self._page(name, {**values, "events": f"/events?{urlencode({'page': address})}"})
        return text.replace(_MARK, mark_of(text), 1)

    def _page(self, name: str, values: Mapping[str, Any]) -> str:
        known = {
            "events": None,
            "mark": _MARK,
            "folder": self.name,
            "form_word": self.form_word,
            "bytes_text": bytes_text,
            "count_text": count_text,
            "moment": moment,
            "run_link": run_link,
            "part_words": PART_WORDS,
            "magnitude": magnitude,
            "file_link": file_link,
        }
        return template(name, _FOLDER).render(**{**known, **values})


def mark_of(text: str) -> str:
    """Return what tells whether a page has changed."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def mark_in(page: bytes) -> str:
    """Return the mark that a page was rendered with."""
    return page.partition(b'data-mark="')[2].partition(b'"')[0].decode()


def style() -> str:
    """Return the style sheet: the palette of the reports, and what the page adds."""
    return template("ui.css.j2", _FOLDER).render()


def moment(when: float | None) -> str:
    """Write a time: 2026-12-01 11:49:12 UTC; empty where it is not known."""
    return "" if when is None else datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def run_link(path: str) -> str:
    return f"/run?{urlencode({'run': path})}"


def file_link(path: str, name: str) -> str:
    return f"/files/{quote(name if path == '.' else f'{path}/{name}')}"
