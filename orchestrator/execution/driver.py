"""Carry a plan out: submit what is ready, commit and release as results arrive, retry what was lost.

The driver keeps no state of its own: everything it knows it reads from the store's commits. Kill it at any
moment, run the same command, and it goes on.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Protocol

from cache_store.crashpoints import reach
from cache_store.errors import Interrupted, StoreError
from cache_store.records.nodes import Commit
from orchestrator.execution import event_log, schedule
from orchestrator.execution.attempts import Attempts
from orchestrator.execution.beat import Beat
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.queues import Queues
from orchestrator.execution.retry import GiveUp, NodeRetries, Retry
from orchestrator.execution.store_watch import Held, StoreWatch, Verdict, look_at
from orchestrator.plan.graph import Node, Plan
from orchestrator.plan.identity import identity_of
from orchestrator.progress import Progress
from orchestrator.reports.commit_view import data_summary
from orchestrator.reports.words import data_lines
from orchestrator.runners.base import Event, Failed, Runner, Succeeded
from orchestrator.units import score_text, seconds_text
from workers.control import NOTHING, Update
from workers.specs.data_results import DataFigures
from workers.specs.orders import CHECKPOINT_MEMORY, INTERRUPTIONS_EVERY_S, Production, WorkOrder, node_of, order_key
from workers.specs.ranks import ON_DEVICE, Strategy, Zero3Spec
from workers.specs.results import NodeFigures

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


def _alone(node: Node) -> bool:
    return False


class Steering(Protocol):
    """Changes what is wanted while the driver works. Called between two steps, in the driver's thread."""

    @property
    def open(self) -> bool:
        """Tell whether more may be wanted later, though nothing is now."""

    def __call__(self, ledger: CommitLog, outcome: Outcome) -> Plan | None:
        """Return the plan to go on with; None: the same as before."""


@dataclass(frozen=True)
class DriverSettings:
    """What a driver is told once."""

    #: Address of the store, as it goes into every order.
    store: str
    retries: NodeRetries
    snapshot_memory: int | None = None
    interruptions_every_s: float = INTERRUPTIONS_EVERY_S
    checkpoint_memory: int = CHECKPOINT_MEMORY
    #: Whether all ranks of a gang run a node, and by which strategy; None: there is no gang.
    together: Callable[[Node], bool] = _alone
    strategy: Strategy | None = None
    zero3: Zero3Spec = ON_DEVICE
    #: Longest wait for a store that cannot be reached (seconds).
    store_deadline_s: float = 600.0


class Driver:
    """Carry a plan out on a runner. One class, because every step of the loop reads and changes the same few things:
    what runs, what waits, what is committed."""

    def __init__(
        self,
        plan: Plan,
        ledger: CommitLog,
        runner: Runner,
        progress: Progress,
        settings: DriverSettings,
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        report: Callable[[Beat], None] = lambda beat: None,
        steering: Steering | None = None,
    ) -> None:
        """`report` is told now and then what the driver is doing, for those who look from outside.
        `steering` changes the plan while it is carried out (sweeps, whose trials come and go)."""
        self._plan = plan
        self._nodes = {node.id: node for node in plan.nodes}
        #: Nodes whose commits the ledger has looked for.
        self._looked_up = set(self._nodes)
        self._ledger = ledger
        self._runner = runner
        self._progress = progress
        self._settings = settings
        self._stop_requested = stop_requested
        self._report = report
        self._steering = steering
        self._queues = Queues(plan, ledger, steered=steering is not None)
        self._attempts = Attempts()
        self._store = StoreWatch(partial(look_at, ledger.storage), settings.store_deadline_s)
        #: Order keys of those who only make shards of a running materialize node's set (`Production.helper`).
        self._helpers: set[str] = set()
        #: Materialize nodes of which nothing is left to take for another helper, and those that nobody waits for and
        #: that failed for good.
        self._exhausted: set[str] = set()
        self._given_up: set[str] = set()
        self._looked = 0.0
        self._outcome = Outcome("done", reused=set(ledger.commits))

    def run(self) -> Outcome:
        """Work until every target is committed, nothing more can be done, or a stop is asked for."""
        stopping: float | None = None
        for node in self._plan.nodes:
            if node.prepares and node.id in self._ledger.commits:
                self._say_data(node)
                self._warn(node, self._ledger.commits[node.id].read(NodeFigures))
        while True:
            if stopping is None and self._stop_requested():
                stopping = time.monotonic()
                self._stop()
            if stopping is None and self._steering is not None and not self._store.holds:
                self._adopt(self._steering(self._ledger, self._outcome))
            if stopping is None and self._settle():
                self._release_sets()
                waiting = self._submit_ready()
            elif stopping is None:
                waiting = True
            else:
                waiting = False
                if time.monotonic() - stopping > STOP_GRACE_S:
                    break
            coming = stopping is None and self._steering is not None and self._steering.open
            if not self._attempts.running and not self._helpers and not waiting and not coming:
                break
            for event in self._runner.wait(WAIT_S):
                self._handle(event, stopping is not None)
            self._look()
        self._report(self._beat({}))
        if stopping is not None:
            self._outcome.status = "stopped"
        elif self._outcome.failures:
            self._outcome.status = "failed"
        return self._outcome

    def _stop(self) -> None:
        for node_id in self._attempts.running:
            self._log("stopped", self._nodes[node_id])
        self._runner.stop()

    def _adopt(self, plan: Plan | None) -> None:
        """Go on with another plan. What is running stays; what is new to us may be committed already."""
        if plan is None:
            return
        if plan.nodes is self._plan.nodes:
            self._plan = plan
            self._queues.ask(plan)
            return
        self._nodes |= {node.id: node for node in plan.nodes}
        known = set(self._ledger.commits)
        self._ledger.look_up([node for node in plan.nodes if node.id not in self._looked_up])
        self._looked_up |= {node.id for node in plan.nodes}
        self._outcome.reused |= self._ledger.commits.keys() - known
        self._plan = plan
        running, failed = self._attempts.running.keys(), self._outcome.failures.keys()
        self._queues = Queues(plan, self._ledger, running=running, failed=failed, steered=True)

    def _submit_ready(self) -> bool:
        """Fill free slots; True when something is ready but has to wait (for a slot or a retry)."""
        slots, gangs = self._places()
        while slots or gangs:
            now = time.monotonic()
            node = self._queues.starting.take(partial(self._may_start, now, slots, gangs))
            if node is None:
                break
            self._submit(node)
            # Of slots the runner need not be asked again; ranks may do the work of either.
            slots, gangs = self._places() if self._settings.strategy is not None else (slots - 1, 0)
        self._fill_spare_slots()
        return self._queues.starting.waiting > 0

    def _submit(self, node: Node) -> None:
        self._attempts.submit(node.id)
        self._runner.submit(self._order(node))
        reach("driver.submitted")
        self._attempts.submitted(node.id)
        self._queues.start(node.id)
        self._progress.started(node.label)
        self._log("submitted", node)

    def _fill_spare_slots(self) -> None:
        """Let slots with nothing else to do make snapshots: ahead of the stages that read them, or with those at it."""
        free, running = self._runner.free(), self._attempts.running
        if not free:
            return
        hands = Counter(node_of(key) for key in (*running, *self._helpers))
        chosen = schedule.spare(
            self._plan,
            committed=self._ledger.commits.keys(),
            released=self._ledger.released,
            running=running.keys(),
            failed=self._given_up | self._attempts.waiting(time.monotonic()),
            # A helper may outlast the one it helps by a moment: then nothing is left to help with.
            producers={node_id: hands[node_id] for node_id in running if self._is_set(node_id)},
            free=free,
            exhausted=self._exhausted,
        )
        for node_id in chosen:
            node = self._nodes[node_id]
            if node_id not in running:
                self._submit(node)
                continue
            number = next(n for n in count(1) if order_key(node_id, n) not in self._helpers)
            order = self._order(node, helper=number)
            self._runner.submit(order)
            self._helpers.add(order.key)

    def _may_start(self, now: float, slots: int, gangs: int, node_id: str) -> bool:
        places = gangs if self._in_gang(self._nodes[node_id]) else slots
        return places > 0 and self._attempts.may_start(node_id, now)

    def _places(self) -> tuple[int, int]:
        """Return how many slots and how many gangs would take an order now."""
        return self._runner.free(), self._runner.free(together=True) if self._settings.strategy is not None else 0

    def _in_gang(self, node: Node) -> bool:
        return self._settings.strategy is not None and self._settings.together(node)

    def _look(self) -> None:
        """Pass on what running tasks report."""
        now = time.monotonic()
        if now - self._looked < PROGRESS_EVERY_S:
            return
        self._looked = now
        self._runner.waiting(self._queues.starting.waiting)
        latest = self._runner.progress()
        for node_id, update in latest.items():
            if node_id in self._helpers:  # a share of the node's work
                continue
            node = self._nodes[node_id]
            self._progress.update(node.label, update)
            if update != NOTHING and self._attempts.begin(node_id):
                self._log("started", node)
        self._report(self._beat(latest))

    def _beat(self, latest: Mapping[str, Update]) -> Beat:
        return self._attempts.beat(latest, self._runner.machine, self._outcome.failures)

    def _log(self, name: str, node: Node, *, level: int = logging.INFO, **fields: Any) -> None:
        machine = fields.pop("machine", None)
        if machine is None and node.id in self._attempts.running:
            machine = self._runner.machine(node.id)
        attempt = self._attempts.count(node.id) or None
        event_log.event(name, node, level=level, attempt=attempt, machine=machine, **fields)

    def _is_set(self, node_id: str) -> bool:
        return self._nodes[node_id].makes_set

    def _order(self, node: Node, helper: int = 0) -> WorkOrder:
        commits = self._ledger.commits
        unfinished = {
            role: parent
            for role, parent in node.parents.items()
            if node.id in self._plan.overlapping
            and self._is_set(parent)
            and (parent not in commits or parent in self._ledger.released)
        }
        return WorkOrder(
            node_id=node.id,
            kind=node.kind,
            task=node.task,
            # The sets of an overlapping stage, and what these are made from, may lack theirs: nothing is read of them.
            parents={role: commits[parent] for role, parent in node.parents.items() if parent in commits},
            store=self._settings.store,
            device=self._runner.device,
            threads=self._runner.threads,
            production=Production(
                shared=self._runner.slots > 1,
                helper=helper,
                first_asked=schedule.first_asked(self._plan, node),
                unfinished=unfinished,
                identities={parent: identity_of(self._nodes[parent]).to_json() for parent in unfinished.values()},
            ),
            strategy=self._settings.strategy if self._in_gang(node) else None,
            zero3=self._settings.zero3,
            snapshot_memory=self._settings.snapshot_memory,
            interruptions_every_s=self._settings.interruptions_every_s,
            checkpoint_memory=self._settings.checkpoint_memory,
            identity=identity_of(node).to_json(),
        )

    def _handle(self, event: Event, stopping: bool) -> None:
        node = self._nodes[node_of(event.key)]
        if event.key in self._helpers:
            self._end_helper(node, event)
            return
        machine = self._runner.machine(node.id)
        begun = self._attempts.end(node.id)
        self._exhausted.discard(node.id)
        self._queues.stop(node.id)
        match event:
            case Succeeded():
                self._commit(node, event.committed, begun)
            case Failed(error=Interrupted()) if stopping:
                pass  # it has left a checkpoint
            case Failed() if not stopping and self._store.hold(Held(node.id, event, machine)):
                pass  # until the store has been looked at
            case Failed():
                self._retry_or_fail(node, event, machine, stopping)

    def _end_helper(self, node: Node, event: Event) -> None:
        self._helpers.discard(event.key)
        self._exhausted.add(node.id)
        if isinstance(event, Failed) and not isinstance(event.error, Interrupted):
            self._progress.note(f"{node.label}: a helper stopped: {event.error}; the others go on without it")

    def _commit(self, node: Node, commit: Commit, begun: bool) -> None:
        """Take in a node's commit. `begun`: it has shown a sign of life before."""
        self._attempts.settle(node.id)
        self._ledger.add(node.id, commit)
        self._queues.commit(node.id)
        reach("driver.committed")
        self._outcome.reused.discard(node.id)
        figures = commit.read(NodeFigures)
        score = score_text(figures.score(), named=True)
        self._progress.finished(node.label, figures.seconds or 0.0, reused=False, score=score)
        fields = event_log.committed_fields(figures)
        if not begun:
            self._log("started", node, machine=fields["machine"])
        self._log("committed", node, **fields)
        if node.prepares:
            self._say_data(node)
        self._warn(node, figures)
        if node.id in self._plan.overlapping:
            self._look_after_sets(node)

    def _say_data(self, node: Node) -> None:
        """Say what the data came to, whoever prepared them, before anything is trained on them."""
        for line in data_lines(data_summary(self._ledger.commits[node.id].read(DataFigures))):
            self._progress.line(f"{node.label}: {line}")

    def _warn(self, node: Node, figures: NodeFigures) -> None:
        for warning in figures.warnings:
            self._progress.note(f"{node.label}: {warning}")
            self._log("warned", node, level=logging.WARNING, warning=warning)

    def _settle(self) -> bool:
        """Take in what became of failures that may be the store's; False while nothing should be begun."""
        for held, verdict in self._store.settle():
            node = self._nodes[held.node_id]
            match verdict:
                case Verdict.COUNTS:
                    self._retry_or_fail(node, held.failure, held.machine, stopping=False)
                case Verdict.FREE:
                    self._attempts.forgive(node.id)
                case Verdict.GIVEN_UP:
                    limit = seconds_text(self._settings.store_deadline_s)
                    reason = f"{held.failure.error}; the store has been away for {limit} (resources.store_deadline_s)"
                    self._give_up(node, held.failure.error, reason, held.machine)
        return not self._store.holds

    def _retry_or_fail(self, node: Node, failure: Failed, machine: str | None, stopping: bool) -> None:
        attempts, retries = self._attempts.count(node.id), self._settings.retries
        decision = retries.decide(failure, attempts)
        if isinstance(decision, Retry) and not stopping:
            self._attempts.put_off(node.id, decision.after_s)
            self._progress.note(
                f"{node.label}: {failure.error}; attempt {attempts + 1} of {retries.max_attempts} "
                f"in {decision.after_s:g} s"
            )
            fields = {"machine": machine, "error": str(failure.error), "after_s": decision.after_s}
            self._log("retried", node, level=logging.WARNING, **fields)
            return
        reason = decision.reason if isinstance(decision, GiveUp) else str(failure.error)
        self._give_up(node, failure.error, reason, machine)

    def _give_up(self, node: Node, error: BaseException, reason: str, machine: str | None) -> None:
        self._attempts.settle(node.id)
        if node.makes_set and not self._queues.starting.wants(node.id):
            self._given_up.add(node.id)
            self._progress.note(f"{node.label}: {reason}; its stage makes what is missing itself")
            return
        self._outcome.failures[node.id] = reason
        self._outcome.errors[node.id] = error
        self._queues.fail(node.id)
        self._progress.failed(node.label, reason)
        self._log("failed", node, level=logging.ERROR, machine=machine, error=reason)

    def _look_after_sets(self, stage: Node) -> None:
        """Take in the sets that a stage made: it has committed those that are whole, and left parts of others."""
        for parent in dict.fromkeys(stage.parents.values()):
            node = self._nodes[parent]
            if not self._is_set(parent) or parent in self._ledger.commits or parent in self._attempts.running:
                continue
            if self._ledger.look(parent):
                self._queues.commit(parent)
                self._progress.finished(node.label, None, reused=False)
            elif schedule.superfluous(self._plan, node, committed=self._ledger.commits.keys()):
                self._progress.dropped(node.label)
        for node_id in self._ledger.note_partial(stage):
            self._queues.releasing.leave(node_id)

    def _release_sets(self) -> None:
        for node_id in self._queues.releasing.releasable():
            node = self._nodes[node_id]
            reach("driver.before-release")
            try:
                self._ledger.release(node_id)
            except StoreError as error:
                # Space is not worth a run: the set stays and the next run tries again.
                self._progress.note(f"could not release {node.label}: {error}")
                self._ledger.released.add(node_id)
            else:
                commit = self._ledger.commits.get(node_id)
                self._log("released", node, bytes=None if commit is None else commit.read(NodeFigures).bytes)
            self._queues.release(node_id)
            reach("driver.after-release")
