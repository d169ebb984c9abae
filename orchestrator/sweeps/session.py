"""Carry out one invocation of a sweep: pick who decides, drive all trials at once, and write what they leave behind."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial

from cache_store.errors import CorruptRecord, SegpropError, UserError
from cache_store.records.record_io import read_local
from cache_store.storage.base import Storage
from cache_store.storage.open import open_storage
from orchestrator.environment import Environment, describe_environment
from orchestrator.execution.commits import CommitLog
from orchestrator.execution.driver import Driver, Outcome
from orchestrator.execution.run_lease import RunLease
from orchestrator.plan.graph import Plan
from orchestrator.progress import Progress
from orchestrator.reports.record_json import from_json
from orchestrator.reports.summary import summarize, write_summary
from orchestrator.runners import factory
from orchestrator.runners.base import RunnerRequest
from orchestrator.runs import session
from orchestrator.runs.prepare import Prepared, with_figures
from orchestrator.runs.signals import stop_on_signals
from orchestrator.sweeps import plan as sweep_plan
from orchestrator.sweeps.event_log import SweepLog
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.page import print_trials, write_sweep_report
from orchestrator.sweeps.prepare import PreparedSweep, claim_sweep_dir, renew
from orchestrator.sweeps.records import SweepSummary, TrialSummary
from orchestrator.sweeps.space import point_text
from orchestrator.sweeps.steering import Begun, Course, Decider, Everything, SweepSteering, TrialHooks, unfinished
from orchestrator.sweeps.summary import Invocation, sweep_summary
from orchestrator.units import seconds_text
from workers.specs.results import NodeFigures

SUMMARY_FILE, REPORT_FILE, JOURNAL_FILE = "sweep.json", "report.html", "decisions.jsonl"
#: Between two looks at how far a sweep is, and how many times as long as the last one took, where that is longer.
SHOW_EVERY_S, SHOW_REST = 0.5, 50


def execute(sweep: PreparedSweep, *, quiet: bool = False, take_over: bool = False) -> int:
    """Run all trials to their end, or as far as the scheduler lets them; returns the exit code. RunTaken when another
    driver is at work on the sweep; `take_over` stops that one instead."""
    started = time.monotonic()
    storage = session.open_store(sweep.config.store)
    claim = partial(claim_sweep_dir, sweep)
    sweep = _measured(sweep, storage, claim, quiet, take_over)
    ledger = CommitLog.read(storage, sweep.plan)
    before = set(ledger.commits)
    run = _Run(sweep, ledger, before, started)
    if sweep.section.scheduler.name == "all" and all(target in ledger.commits for target in sweep.plan.targets):
        session.claim_idle(_as_run(sweep), storage, sweep.plan, claim, take_over)
        for course in run.courses.values():
            course.status, course.judged = "done", len(course.plan.regimes[sweep.metric.regime].stages)
        outcome = Outcome("done", reused=before)
    else:
        with session.leased(_as_run(sweep), sweep.plan, storage, claim, take_over) as lease:
            ledger.look_up(sweep.plan.nodes)
            outcome = _drive(run, quiet, lease)
            if lease.superseded:
                raise SegpropError("stopped: another driver has taken this sweep over and goes on with it")
    summary = run.write_results(outcome)
    print_trials(summary)
    if outcome.status == "stopped":
        raise SegpropError("stopped; finished work and checkpoints are kept: run the same command to go on")
    if not any(course.status == "failed" for course in run.courses.values()):
        return session.EXIT_DONE
    bad_input = any(isinstance(error, UserError) for error in outcome.errors.values())
    return session.EXIT_BAD_INPUT if bad_input else session.EXIT_FAILED


def _measured(
    sweep: PreparedSweep, storage: Storage, claim: Callable[[], None], quiet: bool, take_over: bool
) -> PreparedSweep:
    """Return the sweep with plans made for good: what decides them (snapshots.costs: measured) is measured first."""
    plans = {trial.name: trial.prepared.plan for trial in sweep.trials if trial.prepared.plan.unmeasured}
    if not plans:
        return sweep
    first = sweep_plan.union({name: plan.measuring() for name, plan in plans.items()})
    outcome = session.carry_out(_as_run(sweep), first, CommitLog.read(storage, first), claim, quiet, take_over)
    if outcome.status == "stopped":
        raise SegpropError("stopped; finished work and checkpoints are kept: run the same command to go on")
    if outcome.failures:
        raise next(iter(outcome.errors.values()))
    return sweep.remade(with_figures)


def report(sweep: PreparedSweep) -> None:
    """Write sweep.json and report.html again: figures from what the store holds, decisions as they were told before."""
    ledger = CommitLog.read(open_storage(sweep.config.store), sweep.plan)
    run = _Run(sweep, ledger, set(ledger.commits), time.monotonic())
    told = _told(sweep)
    trials = told.trials if told is not None else ()
    exports = {trial.name: run.recall(trial) for trial in trials if trial.name in run.courses}
    finished = True
    for course in run.courses.values():
        ledger.look_up(course.plan.nodes)
        if all(target in ledger.commits for target in course.plan.targets):
            course.status = "done"
        finished = finished and course.status in ("done", "stopped")
    outcome = Outcome("done" if finished else "stopped", reused=set(ledger.commits))
    wall_seconds = told.wall_seconds if told is not None else None
    print_trials(run.write_sweep(outcome, exports=exports, wall_seconds=wall_seconds))


def _told(sweep: PreparedSweep) -> SweepSummary | None:
    """Return what `sweep.json` says; None where there is none that can be read."""
    path = sweep.run_dir / SUMMARY_FILE
    try:
        told = read_local(path)
    except CorruptRecord:
        return None
    return None if told is None else from_json(SweepSummary, told, str(path))


class _Run:
    """The trials of one invocation, and what is known of them."""

    def __init__(self, sweep: PreparedSweep, ledger: CommitLog, before: set[str], started: float) -> None:
        self.sweep = sweep
        self.ledger = ledger
        self.before = before
        self.started = started
        self.trials = {trial.name: trial for trial in sweep.trials}
        #: As trials are now: pbt changes their configuration on the way.
        self.prepared: dict[str, Prepared] = {trial.name: trial.prepared for trial in sweep.trials}
        self.courses = {
            trial.name: Course(trial.name, trial.folder, trial.prepared.plan, trial.parameters)
            for trial in sweep.trials
        }

    @property
    def metric(self) -> Metric:
        return self.sweep.metric

    def score(self, course: Course) -> float | None:
        """Return the metric of a trial that is through."""
        return self.metric.of(
            summarize(course.name, course.plan, self.ledger.commits, status="done", environment=Environment())
        )

    def change(self, course: Course, begun: Begun) -> Plan:
        trial = self.trials[course.name]
        prepared = self.sweep.changed(trial, begun.parameters, begun.history)
        self.prepared[course.name] = prepared
        return prepared.plan

    def recall(self, trial: TrialSummary) -> dict[str, str]:
        """Take over what `sweep.json` says became of a trial; returns its exports, regime -> folder."""
        course = self.courses[trial.name]
        begun = Begun(course.name, trial.parameters, trial.history)
        if begun.history:
            course.plan = self.change(course, begun)
            course.parameters, course.history = begun.parameters, begun.history
        course.status, course.message = trial.status, trial.message
        course.rungs = [(rung.stages, rung.metric) for rung in trial.rungs]
        course.judged = course.rungs[-1][0] if course.rungs else 0
        return {name: regime.export for name, regime in trial.regimes.items() if regime.export}

    def write_sweep(
        self, outcome: Outcome, *, exports: Mapping[str, Mapping[str, str]], wall_seconds: float | None
    ) -> SweepSummary:
        """Write sweep.json and the report, from what is committed."""
        sweep = self.sweep
        summary = sweep_summary(
            sweep.run,
            sweep.section,
            sweep.metric,
            list(self.courses.values()),
            self.ledger.commits,
            Invocation(
                status=outcome.status,
                environment=describe_environment(),
                before=self.before,
                exports=exports,
                wall_seconds=wall_seconds,
            ),
        )
        write_summary(sweep.run_dir / SUMMARY_FILE, summary)
        write_sweep_report(summary, sweep.run_dir / REPORT_FILE)
        return summary

    def write_results(self, outcome: Outcome) -> SweepSummary:
        """Write every trial's own results, then the sweep's. Of the models the best trial's alone is written."""
        best = self._best()
        exports: dict[str, dict[str, str]] = {}
        seen: set[str] = set()
        for name, course in self.courses.items():
            mine = {node.id for node in course.plan.nodes}
            if course.status == "waiting" or not mine & self.ledger.commits.keys():
                continue
            own = Outcome(
                "done" if course.status == "done" else "failed" if course.status == "failed" else "partial",
                # Another trial's work is as good as an earlier run's.
                reused={node for node in mine if node in outcome.reused or node in seen},
                failures={node: text for node, text in outcome.failures.items() if node in mine},
            )
            seen |= mine
            if course.history:
                renew(self.prepared[name])
            written = session.finish(self.prepared[name], self.ledger, own, export=name == best)
            exports[name] = {regime: found.export for regime, found in written.regimes.items() if found.export}
        return self.write_sweep(outcome, exports=exports, wall_seconds=time.monotonic() - self.started)

    def _best(self) -> str | None:
        best: tuple[str, float] | None = None
        for name, course in self.courses.items():
            value = self.score(course) if course.status == "done" else None
            if value is not None and (best is None or self.metric.better(value, best[1])):
                best = (name, value)
        return best[0] if best else None

    def headline(self, plan: Plan, slots: int) -> str:
        """Say how far the sweep is, in a line."""
        counts = dict.fromkeys(("running", "done", "stopped", "failed"), 0)
        best: Course | None = None
        for course in self.courses.values():
            if course.status in counts:
                counts[course.status] += 1
            value = course.rungs[-1][1] if course.rungs and course.status == "done" else None
            if value is not None and (best is None or self.metric.better(value, best.rungs[-1][1] or 0.0)):
                best = course
        parts = [f"{counts['done']} of {len(self.courses)} trials done"]
        parts += [f"{number} {status}" for status, number in counts.items() if number and status != "done"]
        if best is not None:
            figure = self.metric.written(best.rungs[-1][1])
            parts.append(f"best {best.name} {figure} ({point_text(best.parameters)})")
        left = self._seconds_left(plan, slots)
        if left is not None:
            parts.append(f"about {seconds_text(left)} left")
        return ", ".join(parts)

    def _seconds_left(self, plan: Plan, slots: int) -> float | None:
        open_trials = [course for course in self.courses.values() if course.status in ("waiting", "running")]
        coming = dict.fromkeys(target for course in open_trials for target in course.plan.targets)
        todo = unfinished(dataclasses.replace(plan, targets=tuple(coming)), self.ledger)
        measured = {
            node: commit.read(NodeFigures).seconds or 0.0
            for node, commit in self.ledger.commits.items()
            if node in plan
        }
        return sweep_plan.seconds_left(plan.nodes, measured, todo, slots)


def _as_run(sweep: PreparedSweep) -> Prepared:
    """Return the sweep as one run whose regimes are those of all trials."""
    config = sweep.config.model_copy(update={"run": sweep.run, "run_dir": str(sweep.run_dir)})
    return dataclasses.replace(sweep.trials[0].prepared, config=config, plan=sweep.plan)


def _drive(run: _Run, quiet: bool, lease: RunLease) -> Outcome:
    sweep, ledger = run.sweep, run.ledger
    runner = factory.make_runner(RunnerRequest(sweep.config.resources, sweep.plan, sweep.config.store))
    with Progress(len(sweep.plan.nodes), len(ledger.commits), quiet=quiet) as progress:
        decider: Decider | None = None
        try:
            runner.start()
            slots = runner.slots
            decider = _decider(sweep, slots)
            decider.start()
            gated = sweep.section.scheduler.name != "all"
            steering = SweepSteering(
                list(run.courses.values()),
                sweep.metric,
                decider,
                gated=gated,
                trials=TrialHooks(
                    score=run.score,
                    change=run.change,
                    ended=lambda course: progress.line(_ended(run, course)),
                ),
                journal=SweepLog(sweep.run_dir / JOURNAL_FILE if gated else None),
            )
            with stop_on_signals() as stop_requested:
                driver = Driver(
                    steering.plan,
                    ledger,
                    runner,
                    progress,
                    session.driver_settings(sweep.config),
                    stop_requested=lambda: stop_requested() or lease.superseded,
                    report=lease.report,
                    steering=_Shown(steering, lambda: progress.headline(run.headline(steering.plan, slots))),
                )
                outcome = driver.run()
                lease.outcome = outcome.status
                return outcome
        finally:
            if decider is not None:
                decider.close()
            runner.close()


def _decider(sweep: PreparedSweep, slots: int) -> Decider:
    points = {trial.name: trial.parameters for trial in sweep.trials}
    if not sweep.config.resources.on_ray:
        return Everything(points)
    from orchestrator.sweeps.ray_tune import TuneDecider

    section, regime = sweep.section, sweep.metric.regime
    return TuneDecider(
        points,
        section.parameters,
        sweep.metric,
        section.scheduler,
        stages=max(len(trial.prepared.plan.regimes[regime].stages) for trial in sweep.trials),
        concurrency=slots if section.concurrency == "auto" else section.concurrency,
        seed=section.seed,
    )


def _ended(run: _Run, course: Course) -> str:
    text = f"{course.name} ({point_text(course.parameters)}): {course.status}"
    if course.status == "failed":
        return f"{text}: {course.message}"
    if course.rungs:
        stages, value = course.rungs[-1]
        text += f", {run.metric.key} {run.metric.written(value)}"
        if course.status == "stopped":
            text += f" after {stages} stage{'s' if stages > 1 else ''}"
    return text


class _Shown:
    """A steering whose steps are followed by a look at how far things are, at most once in a while: the look goes over
    all trials and nodes."""

    def __init__(self, steering: SweepSteering, show: Callable[[], None]) -> None:
        self._steering = steering
        self._show = show
        self._next = 0.0

    @property
    def open(self) -> bool:
        return self._steering.open

    def __call__(self, ledger: CommitLog, outcome: Outcome) -> Plan | None:
        plan = self._steering(ledger, outcome)
        now = time.monotonic()
        if now >= self._next:
            self._show()
            self._next = time.monotonic() + max(SHOW_EVERY_S, SHOW_REST * (time.monotonic() - now))
        return plan
