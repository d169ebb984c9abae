"""Stand between whoever decides about trials (Ray Tune, or nobody) and the driver, which runs one plan.

Trials begin, go on stage by stage, and end; each change becomes a change of what the plan's targets are, and nothing
else: the driver runs what is asked for, once, whoever asked. No Ray and no clock here but the one given.
"""

from __future__ import annotations

import itertools
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
        self._nodes = self.plan.nodes
        self._place = {name: place for place, name in enumerate(self.courses)}
        #: Trials to look at in the next step, whatever was committed. The driver calls once an event: looking at all
        #: trials, or nodes, in every step would take minutes of a sweep of a thousand.
        self._changed: set[str] = set(self.courses)
        #: Node -> trials that are looked at when it is committed; how many commits and failures are known.
        self._awaited: dict[str, set[str]] = {}
        self._known = (0, 0)
        #: What each trial asks for now, and what it may ask for later.
        self._asked: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        #: What a trial's targets need, and of which plan and targets that is said.
        self._needed: dict[str, tuple[Plan, tuple[str, ...], frozenset[str]]] = {}

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
        changed = [self._look(self.courses[name], ledger, outcome) for name in self._due(ledger, outcome)]
        if self.plan.nodes is self._nodes and not any(changed):
            return None
        self._nodes = self.plan.nodes
        return self._wanted()

    def _due(self, ledger: CommitLog, outcome: Outcome) -> list[str]:
        """Return the trials that may go on, or have failed, in their order."""
        due, self._changed = self._changed, set()
        commits, failures = self._known
        self._known = (len(ledger.commits), len(outcome.failures))
        if failures != self._known[1]:
            due |= self.courses.keys()
        # New commits come last; one that is made again is none that a trial waits for.
        for node_id in itertools.islice(reversed(ledger.commits), self._known[0] - commits):
            due |= self._awaited.pop(node_id, set())
        return sorted(due, key=self._place.__getitem__)

    def _look(self, course: Course, ledger: CommitLog, outcome: Outcome) -> bool:
        """Let a trial go on if it can; returns whether it asks for something else than before."""
        if course.status == "running":
            self._advance(course, ledger, outcome)
        asked = self.targets(course), course.plan.targets if course.status in ("waiting", "running") else ()
        changed = self._asked.get(course.name) != asked
        self._asked[course.name] = asked
        return changed

    def targets(self, course: Course) -> tuple[str, ...]:
        """Return what a trial has to run now."""
        if course.status in ("waiting", "failed") or not course.level:
            return ()
        return sweep_plan.level_targets(course.plan, self.metric.regime, course.level)

    def _union(self) -> Plan:
        whole = sweep_plan.union({course.name: course.plan for course in self.courses.values()})
        return whole.asking((), whole.targets)

    def _wanted(self) -> Plan:
        every = self._asked.values()
        targets = dict.fromkeys(itertools.chain.from_iterable(now for now, _ in every))
        coming = dict.fromkeys(itertools.chain.from_iterable(later for _, later in every))
        self.plan = self.plan.asking(tuple(targets), tuple(coming))
        return self.plan

    def _hear(self, message: Message) -> None:
        course = self.courses[message.trial]
        self._changed.add(course.name)
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
        broken = outcome.failures.keys() & self._closure(course) if outcome.failures else frozenset[str]()
        if broken:
            self._fail(course, "; ".join(dict.fromkeys(outcome.failures[node] for node in sorted(broken))))
            return
        if course.asked or course.level <= course.judged:
            return
        last = course.level >= self.stages(course)
        stage = course.plan.regimes[self.metric.regime].stages[course.level - 1]
        # On the way a stage's own commit says how it stands; its evaluations may come later.
        awaited = self.targets(course) if last else (stage,)
        missing = next((node for node in awaited if node not in ledger.commits), None)
        if missing is not None:
            self._awaited.setdefault(missing, set()).add(course.name)
            return
        if not self._turn(course):
            self._changed.add(course.name)
            return
        value = self._trials.score(course) if last else self.metric.of_stage(ledger.commits[stage])
        course.judged, course.asked = course.level, True
        course.rungs.append((course.level, value))
        self._heard = self._clock()
        self.decider.report(course.name, course.level, value, last=last)

    def _closure(self, course: Course) -> frozenset[str]:
        """Return what a trial's targets need, itself included."""
        targets = self.targets(course)
        known = self._needed.get(course.name)
        if known is None or known[0] is not course.plan or known[1] != targets:
            known = course.plan, targets, sweep_plan.closure(course.plan, targets)
            self._needed[course.name] = known
        return known[2]

    def _fail(self, course: Course, message: str) -> None:
        course.status, course.message = "failed", message
        self._changed.add(course.name)
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
