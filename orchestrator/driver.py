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
from itertools import count
from typing import Any

from cache_store.crashpoints import reach
from cache_store.errors import Interrupted, StoreError
from orchestrator import retry, schedule
from orchestrator.ledger import Ledger
from orchestrator.plan import Node, Plan
from orchestrator.progress import Progress
from orchestrator.runner import Failed, Runner, Succeeded
from workers.orders import Production, WorkOrder, node_of, order_key

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
    ) -> None:
        self._plan = plan
        self._nodes = {node.id: node for node in plan.nodes}
        self._ledger = ledger
        self._runner = runner
        self._progress = progress
        self._store = store
        self._max_attempts = max_attempts
        self._stop_requested = stop_requested
        #: Nodes that somebody works on to finish them.
        self._running: set[str] = set()
        #: Order keys of those who only make shards of a running materialize node's set (`Production.helper`).
        self._helpers: set[str] = set()
        #: Materialize nodes of which nothing is left to take, or whose making failed for good though no stage waits
        #: for it.
        self._exhausted: set[str] = set()
        self._given_up: set[str] = set()
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
            if stopping is None:
                self._release_sets()
                waiting = self._submit_ready()
            else:
                waiting = False
                if time.monotonic() - stopping > STOP_GRACE_S:
                    break
            if not self._running and not self._helpers and not waiting:
                break
            for event in self._runner.wait(WAIT_S):
                self._handle(event, stopping is not None)
            for key, update in self._runner.progress().items():
                if key in self._running:  # a helper's share is not the node's progress
                    self._progress.update(key, self._nodes[key].label, **update)
        if stopping is not None:
            self._outcome.status = "stopped"
        elif self._outcome.failures:
            self._outcome.status = "failed"
        return self._outcome

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
            self._submit(node)
        self._fill_spare_slots(now)
        return bool(ready)

    def _submit(self, node: Node) -> None:
        self._attempts[node.id] += 1
        self._runner.submit(self._order(node))
        reach("driver.submitted")
        self._running.add(node.id)
        self._progress.started(node.label)

    def _fill_spare_slots(self, now: float) -> None:
        producers = Counter(node_of(key) for key in self._running | self._helpers)
        chosen = schedule.spare(
            self._plan,
            committed=set(self._ledger.commits),
            released=self._ledger.released,
            running=self._running,
            failed=self._given_up | {node for node, moment in self._not_before.items() if moment > now},
            producers={node: count for node, count in producers.items() if self._nodes[node].kind == "materialize"},
            free=self._runner.free(),
            exhausted=self._exhausted,
        )
        for node_id in chosen:
            node = self._nodes[node_id]
            if node_id not in self._running:
                self._submit(node)
                continue
            number = next(n for n in count(1) if order_key(node_id, n) not in self._helpers)
            order = self._order(node, helper=number)
            self._runner.submit(order)
            self._helpers.add(order.key)

    def _order(self, node: Node, helper: int = 0) -> WorkOrder:
        commits = self._ledger.commits
        return WorkOrder(
            node_id=node.id,
            kind=node.kind,
            task=node.task,
            # An overlapping stage's sets, and what these are made from, may lack theirs: their place is known without.
            parents={role: commits[parent] for role, parent in node.parents.items() if parent in commits},
            store=self._store,
            device=self._runner.device,
            threads=self._runner.threads,
            production=Production(
                shared=self._runner.slots > 1,
                helper=helper,
                unfinished={
                    role: parent
                    for role, parent in node.parents.items()
                    if node.id in self._plan.overlapping
                    and self._nodes[parent].kind == "materialize"
                    and (parent not in commits or parent in self._ledger.released)
                },
            ),
        )

    def _handle(self, event: Succeeded | Failed, stopping: bool) -> None:
        node = self._nodes[node_of(event.key)]
        if event.key in self._helpers:
            self._helpers.discard(event.key)
            self._exhausted.add(node.id)
            if isinstance(event, Failed) and not isinstance(event.error, Interrupted):
                self._progress.note(f"{node.label}: a helper stopped: {event.error}; the others go on without it")
            return
        self._running.discard(node.id)
        self._exhausted.discard(node.id)
        if isinstance(event, Succeeded):
            self._ledger.add(node.id, event.commit)
            reach("driver.committed")
            self._outcome.reused.discard(node.id)
            self._progress.finished(node.label, event.commit["result"].get("seconds", 0.0), reused=False)
            if node.id in self._plan.overlapping:
                self._look_after_sets(node)
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
        if self._is_optional(node):
            self._given_up.add(node.id)
            self._progress.note(f"{node.label}: {reason}; its stage makes what is missing itself")
            return
        self._outcome.failures[node.id] = reason
        self._outcome.errors[node.id] = event.error
        self._progress.failed(node.label, reason)

    def _look_after_sets(self, stage: Node) -> None:
        """A stage that made its own sets has committed the nodes of those that are whole; nobody needs the others."""
        for parent in dict.fromkeys(stage.parents.values()):
            node = self._nodes[parent]
            if node.kind != "materialize" or parent in self._ledger.commits or parent in self._running:
                continue
            if self._ledger.look(parent):
                self._progress.finished(node.label, None, reused=False)
            elif parent in schedule.superfluous(self._plan, committed=self._ledger.commits.keys()):
                self._progress.dropped(node.label)

    def _is_optional(self, node: Node) -> bool:
        """Whether no stage waits for this node: those who read its set make what is missing."""
        return node.kind == "materialize" and node.id not in schedule.wanted(
            self._plan, committed=set(self._ledger.commits), released=self._ledger.released
        )

    def _release_sets(self) -> None:
        for node_id in schedule.releasable(
            self._plan,
            committed=set(self._ledger.commits),
            released=self._ledger.released,
            running=self._running,
            partial=self._ledger.partial.keys(),
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
