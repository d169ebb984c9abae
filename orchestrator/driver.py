"""Carries a plan out: submits what is ready, commits and releases as results arrive, retries what was lost.

The driver keeps no state of its own: everything it knows it reads from the store's commits. Kill it at any
moment, run the same command, and it goes on.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from cache_store.crashpoints import reach
from cache_store.errors import Interrupted, StoreError
from orchestrator import journal, retry
from orchestrator.agenda import Agenda
from orchestrator.ledger import Ledger
from orchestrator.plan import Node, Plan
from orchestrator.progress import Progress
from orchestrator.runner import Failed, Runner, Succeeded
from workers.orders import WorkOrder

WAIT_S = 0.5
#: Between two looks at what running tasks report; events are looked at as they come.
PROGRESS_EVERY_S = 0.5
#: Running stages get this long to checkpoint when a run is stopped.
STOP_GRACE_S = 60.0


@dataclass
class Outcome:
    """How a run ended. `status` is `done`, `failed` or `stopped`."""

    status: str
    reused: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    #: The errors behind `failures`, for the exit code.
    errors: dict[str, BaseException] = field(default_factory=dict)


class Steering(Protocol):
    """Changes what is wanted while the driver works. Called between two steps, in the driver's thread."""

    @property
    def open(self) -> bool:
        """Whether more may be wanted later, though nothing is now."""

    def __call__(self, ledger: Ledger, outcome: Outcome) -> Plan | None:
        """The plan to go on with; None: the same as before."""


class Driver:
    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        runner: Runner,
        progress: Progress,
        *,
        store: str,
        max_attempts: int,
        snapshot_memory: int | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        report: Callable[..., None] = lambda **state: None,
        steering: Steering | None = None,
    ) -> None:
        """`report` is told now and then what the driver is doing (see `_state`), for those who look from outside.
        `steering` changes the plan while it is carried out (sweeps, whose trials come and go)."""
        self._nodes = {node.id: node for node in plan.nodes}
        #: Nodes whose commits the ledger has looked for.
        self._looked_up = set(self._nodes)
        self._ledger = ledger
        self._runner = runner
        self._progress = progress
        self._store = store
        self._max_attempts = max_attempts
        self._snapshot_memory = snapshot_memory
        self._stop_requested = stop_requested
        self._report = report
        self._steering = steering
        self._agenda = Agenda(plan, committed=ledger.commits.keys(), released=ledger.released)
        #: Running node -> when it was submitted (unix seconds).
        self._running: dict[str, float] = {}
        #: Running nodes that have shown a sign of life.
        self._begun: set[str] = set()
        #: Nodes that took more than one attempt.
        self._retried: set[str] = set()
        self._looked = 0.0
        self._attempts: Counter[str] = Counter()
        #: Node id -> monotonic time before which it is not tried again.
        self._not_before: dict[str, float] = {}
        self._outcome = Outcome("done", reused=set(ledger.commits))

    def run(self) -> Outcome:
        """Work until every target is committed, nothing more can be done, or a stop is asked for."""
        stopping: float | None = None
        while True:
            if stopping is None and self._stop_requested():
                stopping = time.monotonic()
                for node_id in self._running:
                    self._log("stopped", self._nodes[node_id])
                self._runner.stop()
            if stopping is None and self._steering is not None:
                self._adopt(self._steering(self._ledger, self._outcome))
            if stopping is None:
                self._release_sets()
                waiting = self._submit_ready()
            else:
                waiting = False
                if time.monotonic() - stopping > STOP_GRACE_S:
                    break
            coming = stopping is None and self._steering is not None and self._steering.open
            if not self._running and not waiting and not coming:
                break
            for event in self._runner.wait(WAIT_S):
                self._handle(event, stopping is not None)
            self._look()
        self._report(**self._state({}))
        if stopping is not None:
            self._outcome.status = "stopped"
        elif self._outcome.failures:
            self._outcome.status = "failed"
        return self._outcome

    def _adopt(self, plan: Plan | None) -> None:
        """Go on with another plan. What is running stays; what is new to us may be committed already."""
        if plan is None:
            return
        self._nodes |= {node.id: node for node in plan.nodes}
        known = set(self._ledger.commits)
        self._ledger.look_up(node for node in plan.nodes if node.id not in self._looked_up)
        self._looked_up |= {node.id for node in plan.nodes}
        self._outcome.reused |= self._ledger.commits.keys() - known
        self._agenda = Agenda(
            plan,
            committed=self._ledger.commits.keys(),
            released=self._ledger.released,
            running=self._running.keys(),
            failed=self._outcome.failures.keys(),
        )

    def _submit_ready(self) -> bool:
        """Fill free slots; True when something is ready but has to wait (for a slot or a retry)."""
        for _ in range(self._runner.free()):
            now = time.monotonic()
            node = self._agenda.take(lambda node_id: self._not_before.get(node_id, 0.0) <= now)  # noqa: B023
            if node is None:
                break
            self._attempts[node.id] += 1
            self._runner.submit(self._order(node))
            reach("driver.submitted")
            self._running[node.id] = time.time()
            self._agenda.start(node.id)
            self._progress.started(node.label)
            self._log("submitted", node)
        return self._agenda.waiting > 0

    def _look(self) -> None:
        """Pass on what running tasks report."""
        now = time.monotonic()
        if now - self._looked < PROGRESS_EVERY_S:
            return
        self._looked = now
        self._runner.waiting(self._agenda.waiting)
        latest = self._runner.progress()
        for node_id, update in latest.items():
            node = self._nodes[node_id]
            self._progress.update(node_id, node.label, **update)
            if update and node_id in self._running and node_id not in self._begun:
                self._begun.add(node_id)
                self._log("started", node)
        self._report(**self._state(latest))

    def _state(self, latest: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """`running`: node -> attempt, machine, since, progress; `failed`: node -> reason; `attempts`: node -> how many
        this driver has made, where it is more than one."""
        running = {
            node_id: {
                "attempt": self._attempts[node_id],
                "machine": self._runner.machine(node_id),
                "since": since,
                "progress": dict(latest.get(node_id, {})),
            }
            for node_id, since in self._running.items()
        }
        attempts = {node_id: self._attempts[node_id] for node_id in self._retried}
        return {"running": running, "failed": dict(self._outcome.failures), "attempts": attempts}

    def _log(self, name: str, node: Node, *, level: int = logging.INFO, **fields: Any) -> None:
        machine = fields.pop("machine", None) or (self._runner.machine(node.id) if node.id in self._running else None)
        journal.event(name, node, level=level, attempt=self._attempts[node.id] or None, machine=machine, **fields)

    def _order(self, node: Node) -> WorkOrder:
        return WorkOrder(
            node_id=node.id,
            kind=node.kind,
            task=node.task,
            parents={role: self._ledger.commits[parent] for role, parent in node.parents.items()},
            store=self._store,
            device=self._runner.device,
            threads=self._runner.threads,
            snapshot_memory=self._snapshot_memory,
        )

    def _handle(self, event: Succeeded | Failed, stopping: bool) -> None:
        node = self._nodes[event.node_id]
        machine = self._runner.machine(node.id)
        self._running.pop(node.id, None)
        begun = node.id in self._begun
        self._begun.discard(node.id)
        self._agenda.stop(node.id)
        if isinstance(event, Succeeded):
            self._not_before.pop(node.id, None)
            self._ledger.add(node.id, event.commit)
            self._agenda.commit(node.id)
            reach("driver.committed")
            self._outcome.reused.discard(node.id)
            self._progress.finished(node.label, event.commit["result"].get("seconds", 0.0), reused=False)
            fields = journal.committed_fields(event.commit)
            if not begun:
                self._log("started", node, machine=fields["machine"])
            self._log("committed", node, **fields)
            return
        if stopping and isinstance(event.error, Interrupted):
            return
        decision = retry.decide(event, self._attempts[node.id], self._max_attempts)
        if isinstance(decision, retry.Retry) and not stopping:
            self._not_before[node.id] = time.monotonic() + decision.after_s
            self._retried.add(node.id)
            self._progress.note(
                f"{node.label}: {event.error}; attempt {self._attempts[node.id] + 1} of {self._max_attempts} "
                f"in {decision.after_s:g} s"
            )
            self._log(
                "retried",
                node,
                level=logging.WARNING,
                machine=machine,
                error=str(event.error),
                after_s=decision.after_s,
            )
            return
        reason = decision.reason if isinstance(decision, retry.GiveUp) else str(event.error)
        self._not_before.pop(node.id, None)
        self._outcome.failures[node.id] = reason
        self._outcome.errors[node.id] = event.error
        self._agenda.fail(node.id)
        self._progress.failed(node.label, reason)
        self._log("failed", node, level=logging.ERROR, machine=machine, error=reason)

    def _release_sets(self) -> None:
        for node_id in self._agenda.releasable():
            node = self._nodes[node_id]
            reach("driver.before-release")
            try:
                self._ledger.release(node_id)
            except StoreError as error:
                # Space is not worth a run: the set stays and the next run tries again.
                self._progress.note(f"could not release {node.label}: {error}")
                self._ledger.released.add(node_id)
            else:
                self._log("released", node, bytes=self._ledger.commits[node_id]["result"].get("bytes"))
            self._agenda.release(node_id)
            reach("driver.after-release")


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask for an orderly stop; a second one interrupts at once.

    Enter after `Runner.start()`: ray.init installs handlers of its own.
    """
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
