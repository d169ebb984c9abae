"""The driver over a runner that does what a test says: order, retries, and what it tells those who look."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_run import TEXT_DATA, TEXT_DATA_LINE, make_commits, make_plan

from cache_store.errors import MissingShard, StorageUnavailable, StoreError, TrainingDiverged
from cache_store.records.nodes import Commit
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage
from orchestrator.execution import driver as driver_module
from orchestrator.execution import store_watch
from orchestrator.execution.beat import Beat
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Driver, DriverSettings, Outcome
from orchestrator.execution.event_log import FIELDS, journal
from orchestrator.execution.retry import NodeRetries
from orchestrator.plan.graph import Plan
from orchestrator.progress import Progress
from orchestrator.runners.base import Event, Failed, Succeeded
from workers.control import Update
from workers.specs.orders import WorkOrder


class FakeRunner:
    """`slots` slots. `outcome`: (order, attempt) -> the error it ends with, or None; finishes first in, first out."""

    threads, device = 1, "cpu"

    def __init__(
        self, commits: dict[str, Any], slots: int = 2, outcome: Callable[[WorkOrder, int], Any] | None = None
    ) -> None:
        self.commits = commits
        self.slots = slots
        self.outcome = outcome or (lambda order, attempt: None)
        self.running: deque[WorkOrder] = deque()
        self.submitted: list[str] = []
        self.most = 0

    def start(self) -> None: ...

    def free(self, *, together: bool = False) -> int:
        return self.slots - len(self.running)

    def submit(self, order: WorkOrder) -> None:
        assert len(self.running) < self.slots
        self.running.append(order)
        if not order.production.helper:
            self.submitted.append(order.node_id)
        self.most = max(self.most, len(self.running))

    def wait(self, timeout_s: float) -> list[Event]:
        if not self.running:
            return []
        order = self.running.popleft()
        error = self.outcome(order, self.submitted.count(order.node_id))
        if error is not None:
            return [Failed(order.key, error, lost=isinstance(error, ConnectionError))]
        return [Succeeded(order.key, self.commits[order.node_id])]

    def progress(self) -> dict[str, Update]:
        return {order.key: Update(phase="train", epoch=1) for order in self.running}

    def waiting(self, tasks: int) -> None: ...

    def machine(self, node_id: str) -> str | None:
        return "node-a" if any(order.key == node_id for order in self.running) else None

    def stop(self) -> None: ...

    def close(self) -> None: ...


class NoSets(CommitLog):
    def release(self, node_id: str) -> None:
        self.released.add(node_id)


def drive(
    folder: Path,
    plan: Plan,
    runner: FakeRunner,
    *,
    done: Mapping[str, Commit] | None = None,
    store_deadline_s: float = 60.0,
    **options: Any,
) -> tuple[Outcome, list[dict[str, Any]], list[Beat]]:
    """Outcome, lines of the log, and what was reported."""
    ledger = NoSets(open_storage(str(folder / "store")), dict(done or {}))
    beats: list[Beat] = []
    with Progress(len(plan.nodes), stream=(folder / "out.txt").open("w")) as progress, journal(folder, "fake"):
        driver = Driver(
            plan,
            ledger,
            runner,
            progress,
            DriverSettings(
                str(folder / "store"),
                NodeRetries(max_attempts=3, first_wait_s=0.0),
                store_deadline_s=store_deadline_s,
            ),
            report=beats.append,
            **options,
        )
        outcome = driver.run()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return outcome, lines, beats


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(tmp_path, regimes="[e2e, segprop]")


def test_every_node_runs_once_on_as_many_slots_as_there_are(tmp_path: Path, plan: Plan) -> None:
    runner = FakeRunner(make_commits(plan), slots=3)
    outcome, lines, beats = drive(tmp_path, plan, runner)
    assert outcome.status == "done"
    assert sorted(runner.submitted) == sorted(node.id for node in plan.nodes)
    assert runner.most == 3
    events = [(line["node"], line["event"]) for line in lines]
    for node in plan.nodes:
        mine = [event for node_id, event in events if node_id == node.id]
        assert mine[:3] == ["submitted", "started", "committed"]
        assert mine[3:] == (["released"] if node.kind == "materialize" else [])
    assert beats[-1] == Beat()


def test_free_slots_help_at_sets_and_what_becomes_of_a_helper_is_only_a_note(tmp_path: Path, plan: Plan) -> None:
    helped: list[WorkOrder] = []

    def outcome_of(order: WorkOrder, attempt: int) -> Any:
        if order.production.helper:
            helped.append(order)
            return ConnectionError("gone")
        return None

    runner = FakeRunner(make_commits(plan), slots=4, outcome=outcome_of)
    outcome, _, _ = drive(tmp_path, plan, runner)
    assert outcome.status == "done"
    assert helped
    assert {plan.node(order.node_id).kind for order in helped} == {"materialize"}
    assert all(order.production.shared for order in helped)
    assert sorted(runner.submitted) == sorted(node.id for node in plan.nodes), "a helper is no attempt"
    assert "a helper stopped: gone; the others go on without it" in (tmp_path / "out.txt").read_text()


def test_one_slot_shares_with_nobody(tmp_path: Path, plan: Plan) -> None:
    orders: list[WorkOrder] = []
    runner = FakeRunner(make_commits(plan), slots=1, outcome=lambda order, _: orders.append(order))
    drive(tmp_path, plan, runner)
    assert not any(order.production.shared or order.production.helper for order in orders)


def test_every_line_says_when_what_where_and_for_which_attempt(tmp_path: Path, plan: Plan) -> None:
    _, lines, _ = drive(tmp_path, plan, FakeRunner(make_commits(plan)))
    labels = {node.id: node.label for node in plan.nodes}
    for line in lines:
        assert set(line) <= {"time", "level", "message", *FIELDS}
        assert line["run"] == "fake"
        assert line["time"].endswith("Z")
        assert line["stage"] == labels[line["node"]]
        assert line["attempt"] == 1
    committed = [line for line in lines if line["event"] == "committed"]
    assert all(line["machine"] == "node-a" and line["seconds"] > 0 for line in committed)
    assert lines == sorted(lines, key=lambda line: line["time"])


def test_a_passing_fault_is_retried_and_a_lost_worker_too(tmp_path: Path, plan: Plan) -> None:
    faults = {1: StorageUnavailable("busy"), 2: ConnectionError("gone")}
    stage = plan.regimes["segprop"].stages[0]
    runner = FakeRunner(make_commits(plan), outcome=lambda o, n: faults.get(n) if o.node_id == stage else None)
    outcome, lines, beats = drive(tmp_path, plan, runner)
    assert outcome.status == "done"
    mine = [line for line in lines if line["node"] == stage]
    assert [(line["event"], line["attempt"]) for line in mine if line["event"] != "started"] == [
        ("submitted", 1),
        ("retried", 1),
        ("submitted", 2),
        ("retried", 2),
        ("submitted", 3),
        ("committed", 3),
    ]
    retried = [line for line in mine if line["event"] == "retried"]
    assert [line["error"] for line in retried] == ["busy", "gone"]
    assert all(line["level"] == "warning" and line["after_s"] == 0 for line in retried)
    assert beats[-1].attempts == {stage: 3}


def test_what_a_task_warns_of_is_shown_and_logged_once_it_is_committed(tmp_path: Path, plan: Plan) -> None:
    commits = make_commits(plan)
    data = next(node for node in plan.nodes if node.kind == "data")
    said = ["2 of 100 samples (2.0 %) have no targets and are left out", "3 times: empty answer (row 3 of a.jsonl)"]
    commits[data.id].result["warnings"] = said
    outcome, lines, _ = drive(tmp_path, plan, FakeRunner(commits))
    assert outcome.status == "done"
    warned = [line for line in lines if line["event"] == "warned"]
    assert [(line["node"], line["level"], line["warning"]) for line in warned] == [
        (data.id, "warning", text) for text in said
    ]
    assert lines.index(warned[0]) > [(line["node"], line["event"]) for line in lines].index((data.id, "committed"))
    shown = [line for line in (tmp_path / "out.txt").read_text().splitlines() if "samples" in line or "times" in line]
    assert shown == [f"{data.label}: {text}" for text in said]


def test_what_the_data_came_to_is_said_when_they_are_prepared_and_when_they_are_reused(
    tmp_path: Path, plan: Plan
) -> None:
    commits = make_commits(plan)
    (data,) = [node for node in plan.nodes if node.prepares]
    commits[data.id].result.update(TEXT_DATA)
    for reused in (False, True):
        done = {data.id: commits[data.id]} if reused else {}
        drive(tmp_path, plan, FakeRunner(commits), done=done)
        lines = (tmp_path / "out.txt").read_text().splitlines()
        told = [f"data: {TEXT_DATA_LINE}", f"data: {TEXT_DATA['warnings'][0]}"]
        assert [line for line in lines if "samples" in line] == told
        first = next(number for number, line in enumerate(lines) if "stage" in line and "started" in line)
        assert lines.index(told[0]) < lines.index(told[1]) < first


def test_a_final_failure_is_named_and_what_does_not_depend_on_it_goes_on(tmp_path: Path, plan: Plan) -> None:
    stage = plan.regimes["segprop"].stages[1]
    error = TrainingDiverged("not finite")
    runner = FakeRunner(make_commits(plan), outcome=lambda o, n: error if o.node_id == stage else None)
    outcome, lines, beats = drive(tmp_path, plan, runner)
    assert outcome.status == "failed"
    assert outcome.failures == {stage: "not finite"}
    assert beats[-1].failed == {stage: "not finite"}
    (failed,) = [line for line in lines if line["event"] == "failed"]
    assert (failed["level"], failed["error"], failed["node"]) == ("error", "not finite", stage)
    assert plan.regimes["e2e"].test in runner.submitted
    assert plan.regimes["segprop"].test not in runner.submitted


def test_a_stop_starts_nothing_new_and_says_what_it_stopped(tmp_path: Path, plan: Plan) -> None:
    runner = FakeRunner(make_commits(plan), slots=2)
    outcome, lines, _ = drive(tmp_path, plan, runner, stop_requested=lambda: len(runner.submitted) >= 3)
    assert outcome.status == "stopped"
    # The data and the model, then a stage of each regime, of which one was still running.
    assert len(runner.submitted) == 4
    assert [line["event"] for line in lines].count("stopped") == 1


def test_evaluations_come_after_what_has_followers(tmp_path: Path, plan: Plan) -> None:
    """With one slot, an evaluation starts only when nothing else is ready."""
    runner = FakeRunner(make_commits(plan), slots=1)
    drive(tmp_path, plan, runner)
    kinds = [plan.node(node_id).kind for node_id in runner.submitted]
    first = kinds.index("evaluate")
    assert set(kinds[first:]) == {"evaluate"}


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path: Path, plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").mkdir()
    ledger = NoSets(open_storage(str(tmp_path / "store")))
    runner = FakeRunner(make_commits(plan))
    with Progress(1, quiet=True) as progress, journal(tmp_path, "fake"):
        outcome = Driver(plan, ledger, runner, progress, DriverSettings("", NodeRetries(max_attempts=1))).run()
    assert outcome.status == "done"
    assert capsys.readouterr().err.count("cannot be written") == 1


@pytest.mark.parametrize("error", [StorageUnavailable, MissingShard, StoreError])
def test_outages_of_the_store_are_waited_for_and_cost_no_attempts(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, error: type[StoreError]
) -> None:
    monkeypatch.setattr(store_watch, "LOOK_S", 0.05)
    store, away = tmp_path / "store", tmp_path / "away"
    node, outages = plan.nodes[0].id, 5

    def outcome_of(order: WorkOrder, attempt: int) -> Any:
        if order.node_id != node or attempt > outages:
            return None
        store.rename(away)
        return error("cannot be read")

    def look_at(storage: Storage) -> str | None:
        reason = store_watch.look_at(storage)
        if reason is not None:
            away.rename(store)
        return reason

    monkeypatch.setattr(driver_module, "look_at", look_at)
    runner = FakeRunner(make_commits(plan), slots=1, outcome=outcome_of)
    outcome, lines, _ = drive(tmp_path, plan, runner)
    assert outcome.status == "done"
    assert runner.submitted.count(node) == outages + 1
    said = [line["message"] for line in lines if line["event"] == "message"]
    assert len([message for message in said if "waiting for it, at most 1 min" in message]) == outages, said
    assert len([message for message in said if message.startswith("the store is back after")]) == outages
    assert not any(line["event"] in ("retried", "failed") for line in lines)


def test_a_store_that_does_not_come_back_ends_the_run_with_the_reason(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_watch, "LOOK_S", 0.05)
    store = tmp_path / "store"

    def outcome_of(order: WorkOrder, attempt: int) -> Any:
        if store.exists():
            store.rename(tmp_path / "away")
        return StorageUnavailable("cannot be read")

    runner = FakeRunner(make_commits(plan), slots=1, outcome=outcome_of)
    outcome, _, _ = drive(tmp_path, plan, runner, store_deadline_s=0.3)
    assert outcome.status == "failed"
    assert outcome.failures[plan.nodes[0].id].startswith("cannot be read; the store has been away for")
    assert "resources.store_deadline_s" in outcome.failures[plan.nodes[0].id]


def test_a_fault_of_storage_that_is_there_counts_as_an_attempt(tmp_path: Path, plan: Plan) -> None:
    node = plan.nodes[0].id
    runner = FakeRunner(
        make_commits(plan),
        outcome=lambda order, attempt: StorageUnavailable("in passing") if order.node_id == node else None,
    )
    outcome, _, _ = drive(tmp_path, plan, runner)
    assert runner.submitted.count(node) == 3
    assert outcome.failures[node] == "in passing (after 3 attempts)"
