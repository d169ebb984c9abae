"""Stand between whoever decides about trials (Ray Tune, or nobody) and the driver, which runs one plan.

Trials begin, go on stage by stage, and end; each change becomes a change of what the plan's targets are, and nothing
else: the driver runs what is asked for, once, whoever asked. No Ray and no clock here but the one given.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cache_store.errors import UserError
from orchestrator.execution import schedule
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Outcome
from orchestrator.plan.graph import Plan
from orchestrator.sweeps import plan as sweep_plan
from orchestrator.sweeps.event_log import SweepLog
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.records import TrialStatus

#: A decision made before the interruption that does not come up again within this time is forgotten.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Begun:
    """A trial begins, or (pbt) begins anew after the stages of `history`, the settings of each stage so far."""

    trial: str
    parameters: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class WentOn:
    """A trial may do another stage after having reported this many."""

    trial: str
    stages: int


@dataclass(frozen=True)
class Ended:
    """No more of this trial: it is through, was stopped, or failed."""

    trial: str


Message = Begun | WentOn | Ended


class Decider(Protocol):
    """Who decides which trial runs and which goes on. Called from the driver's one thread."""

    def start(self) -> None:
        """Begin. Ray is connected."""

    def poll(self) -> list[Message]:
        """Return what was decided since the last call. Raises when nobody decides any more."""

    def report(self, trial: str, stages: int, value: float | None, *, last: bool) -> None:
        """Take the stages a trial has done and how it stands; None: it has no such figure."""

    def fail(self, trial: str, message: str) -> None:
        """Take note that a trial cannot go on."""

    def close(self) -> None:
        """End, whatever is still open."""


class Everything:
    """All trials to their end: the decider where there is no Ray."""

    def __init__(self, trials: Mapping[str, Mapping[str, Any]]) -> None:
        self._messages: list[Message] = [Begun(trial, parameters) for trial, parameters in trials.items()]

    def start(self) -> None:
        pass

    def poll(self) -> list[Message]:
        messages, self._messages = self._messages, []
        return messages

    def report(self, trial: str, stages: int, value: float | None, *, last: bool) -> None:
        self._messages.append(Ended(trial) if last else WentOn(trial, stages))

    def fail(self, trial: str, message: str) -> None:
        self._messages.append(Ended(trial))

    def close(self) -> None:
        pass


@dataclass
class Course:
    """One trial on its way. `level`: stages it may do; `judged`: stages that were reported."""

    name: str
    folder: str
    plan: Plan
    parameters: Mapping[str, Any]
    status: TrialStatus = "waiting"
    level: int = 0
    judged: int = 0
    #: Reported and not decided yet.
    asked: bool = False
    message: str = ""
    #: (stages, figure) of every report.
    rungs: list[tuple[int, float | None]] = field(default_factory=list)
    #: Settings of each stage so far, where they change on the way (pbt).
    history: tuple[Mapping[str, Any], ...] = ()


def _no_change(course: Course, begun: Begun) -> Plan:
    raise UserError(f"{course.name}: the settings of a trial of this sweep do not change")


@dataclass(frozen=True, kw_only=True)
class TrialHooks:
    """What a steering asks about trials. `score`: the metric of a finished trial; `change`: its plan with other
    settings from some stage on (UserError where that cannot be); `ended` is told of every trial that is over."""

    score: Callable[[Course], float | None]
    change: Callable[[Course, Begun], Plan] = _no_change
    ended: Callable[[Course], None] = lambda course: None


class SweepSteering:
    """Called by the driver between two steps: the plan as it is wanted now, or None when that is unchanged."""

    def __init__(
        self,
        courses: Sequence[Course],
        metric: Metric,
        decider: Decider,
        *,
        gated: bool,
        trials: TrialHooks,
        journal: SweepLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gated`: every stage waits for a decision about the one before."""
        self.courses = {course.name: course for course in courses}
        self.metric = metric
        self.decider = decider
        self._gated = gated
        self._trials = trials
        self._journal = journal
        self._clock = clock
        self._heard = clock()
        self.plan = self._union()
        self._known: tuple[int, int] = (-1, -1)
        self._version = 0

    @property
    def open(self) -> bool:
        """Whether trials are left that nobody has ended."""
        return any(course.status in ("waiting", "running") for course in self.courses.values())

    def stages(self, course: Course) -> int:
        """Return how many stages a trial has in all."""
        return len(course.plan.regimes[self.metric.regime].stages)

    def __call__(self, ledger: CommitLog, outcome: Outcome) -> Plan | None:
        for message in self.decider.poll():
            self._hear(message)
        for course in self.courses.values():
            if course.status == "running":
                self._advance(course, ledger, outcome)
        if (self._version, len(ledger.commits)) == self._known:
            return None
        self._known = (self._version, len(ledger.commits))
        plan = self._wanted(ledger)
        if (plan.nodes, plan.targets, plan.held) == (self.plan.nodes, self.plan.targets, self.plan.held):
            return None
        self.plan = plan
        return plan

    def targets(self, course: Course) -> tuple[str, ...]:
        """Return what a trial has to run now."""
        if course.status in ("waiting", "failed") or not course.level:
            return ()
        return sweep_plan.level_targets(course.plan, self.metric.regime, course.level)

    def _union(self) -> Plan:
        whole = sweep_plan.union({course.name: course.plan for course in self.courses.values()})
        return dataclasses.replace(whole, targets=())

    def _wanted(self, ledger: CommitLog) -> Plan:
        targets = dict.fromkeys(target for course in self.courses.values() for target in self.targets(course))
        coming = dict.fromkeys(
            target
            for course in self.courses.values()
            if course.status in ("waiting", "running")
            for target in course.plan.targets
        )
        held = sweep_plan.held(
            self.plan,
            coming,
            committed=ledger.commits.keys(),
            released=ledger.released,
            partial=ledger.partial.keys(),
        )
        return dataclasses.replace(self.plan, targets=tuple(targets), held=held)

    def _hear(self, message: Message) -> None:
        course = self.courses[message.trial]
        self._version += 1
        self._heard = self._clock()
        if isinstance(message, Begun):
            if message.history or dict(message.parameters) != dict(course.parameters):
                try:
                    course.plan = self._trials.change(course, message)
                except UserError as error:
                    self._fail(course, error.message)
                    return
                course.parameters, course.history = message.parameters, message.history
                self.plan = self._union()
            course.status, course.asked = "running", False
            course.judged = len(message.history)
            course.rungs = course.rungs[: course.judged]
            course.level = course.judged + 1 if self._gated else self.stages(course)
            return
        if course.asked:
            self._journal.add(course.folder, course.judged)
            course.asked = False
        if isinstance(message, WentOn):
            course.level = min(message.stages + 1, self.stages(course))
        elif course.status != "failed":
            course.status = "done" if course.judged >= self.stages(course) else "stopped"
            self._trials.ended(course)

    def _advance(self, course: Course, ledger: CommitLog, outcome: Outcome) -> None:
        targets = self.targets(course)
        broken = outcome.failures.keys() & sweep_plan.closure(course.plan, targets)
        if broken:
            self._fail(course, "; ".join(dict.fromkeys(outcome.failures[node] for node in sorted(broken))))
            return
        if course.asked or course.level <= course.judged:
            return
        last = course.level >= self.stages(course)
        stage = course.plan.regimes[self.metric.regime].stages[course.level - 1]
        # On the way a stage's own commit says how it stands; its evaluations may come later.
        if not all(node in ledger.commits for node in (targets if last else (stage,))) or not self._turn(course):
            return
        value = self._trials.score(course) if last else self.metric.of_stage(ledger.commits[stage])
        course.judged, course.asked = course.level, True
        course.rungs.append((course.level, value))
        self._heard = self._clock()
        self.decider.report(course.name, course.level, value, last=last)

    def _fail(self, course: Course, message: str) -> None:
        course.status, course.message = "failed", message
        self._version += 1
        self.decider.fail(course.name, message)
        self._trials.ended(course)

    def _turn(self, course: Course) -> bool:
        """Whether this report is next: after an interruption decisions are made again in the order they were made in,
        so that they come out the same."""
        over = {other.folder for other in self.courses.values() if other.status in ("done", "stopped", "failed")}
        expected = self._journal.expected(over)
        if expected is None or expected == (course.folder, course.level):
            return True
        if self._clock() - self._heard > PATIENCE_S and not any(other.asked for other in self.courses.values()):
            self._journal.forget()
            return True
        return False


def unfinished(plan: Plan, ledger: CommitLog) -> frozenset[str]:
    """Return the nodes that still have to run for the plan's targets."""
    return schedule.wanted(plan, committed=ledger.commits.keys(), released=ledger.released)
