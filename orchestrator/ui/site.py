"""Answer for every page: what can be seen, and what can be done. Knows nothing of HTTP but its status codes.

What is looked at is shared by all who ask within a second."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from cache_store.errors import UserError
from orchestrator.status.compare import compare
from orchestrator.ui import pages
from orchestrator.ui.folder import Folder, is_sweep_dir
from orchestrator.ui.guard import REPORT_POLICY, Guard
from orchestrator.ui.planning import Planner
from orchestrator.ui.stopping import stop
from orchestrator.ui.sweep_view import filtered, sweep_table

#: Seconds for which a look is shared.
SHARED_S = 1.0
#: Who is told of changes at one time, and runs that are compared.
MOST_LISTENERS, MOST_COMPARED = 24, 12

Query = Mapping[str, list[str]]


@dataclass(frozen=True)
class Answer:
    """What goes back to a visitor."""

    body: bytes
    kind: str = "text/html; charset=utf-8"
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


def html(text: str, status: int = HTTPStatus.OK) -> Answer:
    return Answer(text.encode(errors="replace"), status=status)


@dataclass
class _Look:
    lock: threading.Lock = field(default_factory=threading.Lock)
    when: float = -SHARED_S
    answer: Answer | None = None


class Site:
    """What there is to see and to do, without HTTP's details."""

    def __init__(self, folder: Folder, guard: Guard) -> None:
        self.folder, self.guard = folder, guard
        self.pages = pages.Pages(folder.root.name or str(folder.root), guard.form_word)
        self.planner = Planner()
        self.closing = threading.Event()
        self.listeners = threading.BoundedSemaphore(MOST_LISTENERS)
        self._looks: dict[str, _Look] = {}
        self._lock = threading.Lock()
        self.live: Mapping[str, Callable[[Query], Answer]] = {"/": self.index, "/run": self.run}
        self.gets: Mapping[str, Callable[[Query], Answer]] = {
            **self.live,
            "/compare": self.compare,
            "/plan": self.plan_form,
            "/stop": self.stop_question,
            "/api/runs": self.api_runs,
            "/api/run": self.api_run,
        }
        self.posts: Mapping[str, Callable[[Query], Answer]] = {"/plan": self.plan, "/stop": self.stop}

    def shared(self, address: str, path: str, query: Query) -> Answer:
        """Answer for a page that changes, as it was at most `SHARED_S` ago."""
        with self._lock:
            if len(self._looks) > 8 * MOST_LISTENERS:
                self._looks.clear()
            look = self._looks.setdefault(address, _Look())
        with look.lock:
            if look.answer is None or time.monotonic() - look.when > SHARED_S:
                look.answer = self.live[path](query)
                look.when = time.monotonic()
            return look.answer

    # -- what can be seen

    def index(self, query: Query) -> Answer:
        return html(self.pages.index(self.folder.runs(), plans=bool(self.folder.configs())))

    def run(self, query: Query) -> Answer:
        path, wanted = one(query, "run"), query.get("filter", [""])[0]
        view = self.folder.look(path)
        run_dir = self.folder.run_dir(path)
        table = None
        if is_sweep_dir(run_dir):
            table = sweep_table(run_dir, path, view.regimes, running=view.state == "running")
            table = filtered(table, wanted)
        return html(self.pages.run(view, table, wanted))

    def compare(self, query: Query) -> Answer:
        chosen = list(dict.fromkeys(query.get("run", [])))[:MOST_COMPARED]
        known = [os.path.relpath(path, self.folder.root) for path in self.folder.run_dirs()]
        same = query.get("all", ["0"])[0] == "1"
        if len(chosen) < 2:
            problem = "Choose two runs or more." if chosen else ""
            return html(self.pages.compare(known, None, same=same, problem=problem))
        found = compare([self.folder.run_dir(path) for path in chosen])
        named = [dataclasses.replace(run, path=path) for run, path in zip(found.runs, chosen, strict=True)]
        return html(self.pages.compare(known, dataclasses.replace(found, runs=tuple(named)), same=same))

    def plan_form(self, query: Query) -> Answer:
        return html(self.pages.plan(self.folder.configs(), query.get("config", [""])[0], None))

    def stop_question(self, query: Query) -> Answer:
        return html(self.pages.stop(self.folder.look(one(query, "run"))))

    def api_runs(self, query: Query) -> Answer:
        return _json([dataclasses.asdict(run) for run in self.folder.runs()])

    def api_run(self, query: Query) -> Answer:
        return _json(dataclasses.asdict(self.folder.look(one(query, "run"))))

    def file(self, path: str) -> Answer:
        """Answer with a result file of a run."""
        data = self.folder.result(path)
        suffix = path.rpartition(".")[2]
        if suffix == "html":
            return Answer(data, headers={"Content-Security-Policy": REPORT_POLICY})
        return Answer(data, "application/json" if suffix == "json" else "text/plain; charset=utf-8")

    # -- what can be done

    def plan(self, form: Query) -> Answer:
        chosen = one(form, "config")
        return html(self.pages.plan(self.folder.configs(), chosen, self.planner.plan(self.folder.config(chosen))))

    def stop(self, form: Query) -> Answer:
        path, number = one(form, "run"), one(form, "driver")
        if not number.isdecimal():
            raise UserError("driver: is a number")
        message = stop(self.folder.watched(path), int(number))
        return html(self.pages.said("Asked to stop", message, pages.run_link(path)))


def one(query: Query, name: str) -> str:
    """Return a value of a query. UserError when it is missing, or there are several."""
    found = query.get(name, [])
    if len(found) != 1:
        raise UserError(f"{name}: is missing, or there several times")
    return found[0]


def _json(value: object) -> Answer:
    return Answer(json.dumps(value, indent=1).encode(), "application/json")
