"""Carries a plan out: submits what is ready, commits and releases as results arrive, retries what was lost.

The driver keeps no state of its own: everything it knows it reads from the store's commits. Kill it at any
moment, run the same command, and it goes on.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from cache_store.crashpoints import reach
from cache_store.errors import Interrupted, StoreError
from orchestrator import retry, schedule
from orchestrator.ledger import Ledger
from orchestrator.plan import Node, Plan
from orchestrator.progress import Progress
from orchestrator.runner import Failed, Runner, Succeeded
from workers.orders import WorkOrder

WAIT_S = 0.5
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
        stop_requested: Callable[[], bool] = lambda: False,
        steering: Steering | None = None,
    ) -> None:
        """`steering` changes the plan while it is carried out (sweeps, whose trials come and go)."""
        self._plan = plan
        self._nodes = {node.id: node for node in plan.nodes}
        #: Nodes whose commits the ledger has looked for.
        self._looked_up = set(self._nodes)
        self._ledger = ledger
        self._runner = runner
        self._progress = progress
        self._store = store
        self._max_attempts = max_attempts
        self._stop_requested = stop_requested
        self._steering = steering
        self._running: set[str] = set()
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
            for node_id, update in self._runner.progress().items():
                self._progress.update(node_id, self._nodes[node_id].label, **update)
        if stopping is not None:
            self._outcome.status = "stopped"
        elif self._outcome.failures:
            self._outcome.status = "failed"
        return self._outcome

    def _adopt(self, plan: Plan | None) -> None:
        """Go on with another plan. What is running stays; what is new to us may be committed already."""
        if plan is None:
            return
        self._plan = plan
        self._nodes |= {node.id: node for node in plan.nodes}
        known = set(self._ledger.commits)
        self._ledger.look_up(node for node in plan.nodes if node.id not in self._looked_up)
        self._looked_up = {node.id for node in plan.nodes}
        self._outcome.reused |= self._ledger.commits.keys() - known

    def _submit_ready(self) -> bool:
        """Fill free slots; True when something is ready but has to wait (for a slot or a retry)."""
        ready = schedule.ready(
            self._plan,
            committed=set(self._ledger.commits),
            released=self._ledger.released,
            running=self._running,
            failed=set(self._outcome.failures),
        )
        now = time.monotonic()
        # Nothing but the final table waits for an evaluation; stages and snapshots have followers.
        for node in sorted(ready, key=lambda node: node.kind == "evaluate"):
            if self._not_before.get(node.id, 0.0) > now:
                continue
            if self._runner.free() == 0:
                break
            self._attempts[node.id] += 1
            self._runner.submit(self._order(node))
            reach("driver.submitted")
            self._running.add(node.id)
            self._progress.started(node.label)
        return bool(ready)

    def _order(self, node: Node) -> WorkOrder:
        return WorkOrder(
            node_id=node.id,
            kind=node.kind,
            task=node.task,
            parents={role: self._ledger.commits[parent] for role, parent in node.parents.items()},
            store=self._store,
            device=self._runner.device,
            threads=self._runner.threads,
        )

    def _handle(self, event: Succeeded | Failed, stopping: bool) -> None:
        node = self._nodes[event.node_id]
        self._running.discard(node.id)
        if isinstance(event, Succeeded):
            self._ledger.add(node.id, event.commit)
            reach("driver.committed")
            self._outcome.reused.discard(node.id)
            self._progress.finished(node.label, event.commit["result"].get("seconds", 0.0), reused=False)
            return
        if stopping and isinstance(event.error, Interrupted):
            return
        decision = retry.decide(event, self._attempts[node.id], self._max_attempts)
        if isinstance(decision, retry.Retry) and not stopping:
            self._not_before[node.id] = time.monotonic() + decision.after_s
            self._progress.note(
                f"{node.label}: {event.error}; attempt {self._attempts[node.id] + 1} of {self._max_attempts} "
                f"in {decision.after_s:g} s"
            )
            return
        reason = decision.reason if isinstance(decision, retry.GiveUp) else str(event.error)
        self._outcome.failures[node.id] = reason
        self._outcome.errors[node.id] = event.error
        self._progress.failed(node.label, reason)

    def _release_sets(self) -> None:
        for node_id in schedule.releasable(
            self._plan,
            committed=set(self._ledger.commits),
            released=self._ledger.released,
            running=self._running,
        ):
            reach("driver.before-release")
            try:
                self._ledger.release(node_id)
            except StoreError as error:
                # Space is not worth a run: the set stays and the next pass, or the next run, tries again.
                self._progress.note(f"could not release {self._nodes[node_id].label}: {error}")
                self._ledger.released.add(node_id)
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
