"""Sum up what a sweep came to: `sweep.json`, the only input of its report and of the printed table. Pure.

Figures of a trial are those of its metric's regime, as in `reports.summary`: `seconds` is compute time, whoever ran it,
so that a trial that found its stages done costs what it would have cost alone. What sharing saved is in `sharing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cache_store.records.nodes import Commit
from orchestrator.config.sweep_schema import SweepConfig
from orchestrator.environment import Environment
from orchestrator.plan.graph import Node
from orchestrator.reports.records import Benchmarks, Metrics, RegimeSummary, Summary
from orchestrator.reports.summary import summarize
from orchestrator.sweeps import plan as sweep_plan
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.records import (
    Abandoned,
    DrawRecord,
    MetricRecord,
    Rung,
    SchedulerRecord,
    Sharing,
    StageCounts,
    SweepSummary,
    TaskCounts,
    TrialFailure,
    TrialRegime,
    TrialSummary,
    any_on_device,
)
from orchestrator.sweeps.space import short_keys
from orchestrator.sweeps.steering import Course
from workers.specs.results import NodeFigures

Commits = Mapping[str, Commit]


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What one invocation of a sweep knows beside the commits. `status`: done, failed or stopped; `before`: nodes that
    were committed when it began; `exports`: trial -> regime -> folder below the trial's own; `wall_seconds`: how long
    it took."""

    status: str
    environment: Environment = field(default_factory=Environment)
    before: Collection[str] = ()
    exports: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    wall_seconds: float | None = None


def sweep_summary(
    run: str,
    section: SweepConfig,
    metric: Metric,
    courses: Sequence[Course],
    commits: Commits,
    invocation: Invocation,
) -> SweepSummary:
    """Sum up the trials given the commits that exist (node -> commit)."""
    asked = {course.name: asked_nodes(course, metric) for course in courses}
    users: dict[str, int] = {}
    for nodes in asked.values():
        for node in nodes:
            users[node.id] = users.get(node.id, 0) + 1
    trials: list[TrialSummary] = []
    original: Mapping[str, Metrics] = {}
    judged: Benchmarks | None = None
    for course in courses:
        exports = invocation.exports.get(course.name, {})
        own = summarize(
            course.name, course.plan, commits, status=course.status, environment=Environment(), exports=exports
        )
        trials.append(_trial(course, metric, own, _Asked(asked[course.name], users, commits)))
        original, judged = original or own.original, judged or own.judged
    marked = _marked(trials, metric)
    return SweepSummary(
        run=run,
        status=invocation.status,
        environment=invocation.environment,
        metric=MetricRecord(metric.key, metric.regime, metric.split, metric.name, metric.mode),
        parameters={key: DrawRecord(**{draw.kind: draw.values}) for key, draw in section.parameters.items()},
        short=short_keys(list(section.parameters)),
        scheduler=SchedulerRecord(**section.scheduler.model_dump()),
        samples=section.samples,
        seed=section.seed,
        trials=marked,
        best=next((trial.name for trial in marked if trial.best), None),
        original=original,
        sharing=_sharing(courses, asked, commits, invocation.before),
        wall_seconds=invocation.wall_seconds,
        failures=tuple(TrialFailure(course.name, course.message) for course in courses if course.status == "failed"),
        judged=judged,
    )


def asked_nodes(course: Course, metric: Metric) -> list[Node]:
    """Return what a trial asked for: all of its plan, or as far as it was let."""
    plan, targets = course.plan, course.plan.targets
    if course.status == "stopped":
        targets = sweep_plan.level_targets(plan, metric.regime, course.judged)
    return plan.in_order(sweep_plan.closure(plan, targets))


def _sharing(
    courses: Sequence[Course], asked: Mapping[str, Sequence[Node]], commits: Commits, before: Collection[str]
) -> Sharing:
    done = {name: [node for node in nodes if node.id in commits] for name, nodes in asked.items()}
    kinds = sweep_plan.sharing(done, lambda node: commits[node.id].read(NodeFigures).seconds)
    ran = {node.id for nodes in done.values() for node in nodes}
    planned = {node.id for course in courses for node in course.plan.nodes}
    left = [commit.read(NodeFigures) for node_id, commit in commits.items() if node_id not in planned]
    return Sharing(
        kinds=kinds,
        total=sweep_plan.total(kinds.values()),
        before=len(ran & set(before)),
        abandoned=Abandoned(len(left), sum(figures.seconds or 0.0 for figures in left)),
    )


@dataclass(frozen=True)
class _Asked:
    """What one trial asked for. `users`: node -> how many trials asked for it."""

    nodes: Sequence[Node]
    users: Mapping[str, int]
    commits: Commits

    def stages(self, planned: int) -> StageCounts:
        stages = [node for node in self.nodes if node.trains]
        return StageCounts(
            planned=planned,
            asked=len(stages),
            done=sum(node.id in self.commits for node in stages),
            shared=sum(self.users[node.id] > 1 for node in stages),
        )

    def tasks(self) -> TaskCounts:
        return TaskCounts(len(self.nodes), sum(self.users[node.id] > 1 for node in self.nodes))


def _trial(course: Course, metric: Metric, summary: Summary, asked: _Asked) -> TrialSummary:
    own = summary.regimes[metric.regime]
    return TrialSummary(
        name=course.name,
        folder=f"trials/{course.folder}",
        parameters=dict(course.parameters),
        history=tuple(dict(settings) for settings in course.history),
        status=course.status,
        metric=metric.of(summary),
        rungs=tuple(Rung(stages, value) for stages, value in course.rungs),
        best=False,
        pareto=False,
        regimes={name: _trial_regime(regime) for name, regime in summary.regimes.items()},
        seconds=own.seconds,
        peak_device_bytes=own.peak_device_bytes,
        host_growth_bytes=own.host_growth_bytes,
        stages=asked.stages(sum(node.trains for node in course.plan.nodes)),
        nodes=asked.tasks(),
        message=course.message,
    )


def _trial_regime(regime: RegimeSummary) -> TrialRegime:
    return TrialRegime(
        status=regime.status,
        kind=regime.kind,
        seconds=regime.seconds,
        peak_device_bytes=regime.peak_device_bytes,
        peak_host_bytes=regime.peak_host_bytes,
        host_growth_bytes=regime.host_growth_bytes,
        trainable_parameters=regime.trainable_parameters,
        export=regime.export,
        test=regime.final.metrics,
        validation=regime.final.validation,
        judged=regime.judged or None,
    )


def _marked(trials: Sequence[TrialSummary], metric: Metric) -> tuple[TrialSummary, ...]:
    """Mark the best of the trials that are through (the first of equals), and those that no other beats in quality,
    memory and time at once."""
    on_device = any_on_device(trials)
    best: tuple[str, float] | None = None
    points: dict[str, tuple[float, float, float]] = {}
    for trial in trials:
        value = trial.final
        if value is not None:
            memory = trial.peak_device_bytes if on_device else trial.host_growth_bytes
            points[trial.name] = (metric.sign * value, -(memory or 0), -trial.seconds)
            if best is None or metric.better(value, best[1]):
                best = (trial.name, value)
    front = pareto(points)
    return tuple(
        dataclasses.replace(trial, best=best is not None and trial.name == best[0], pareto=trial.name in front)
        for trial in trials
    )


def pareto(points: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Return the names that no other point dominates: at least as much in every coordinate, more in one."""

    def dominated(name: str) -> bool:
        mine = points[name]
        return any(
            all(a >= b for a, b in zip(other, mine, strict=True))
            and any(a > b for a, b in zip(other, mine, strict=True))
            for key, other in points.items()
            if key != name
        )

    return frozenset(name for name in points if not dominated(name))
