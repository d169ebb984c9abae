"""What a sweep came to, as one JSON value: `sweep.json`, the only input of its report and of the printed table. Pure.

Figures of a trial are those of its metric's regime, as in `summary`: `seconds` is compute time, whoever ran it, so
that a trial that found its stages done costs what it would have cost alone. What sharing saved is in `sharing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from orchestrator.config.sweep_schema import SweepConfig
from orchestrator.plan.graph import Node
from orchestrator.reports.summary import summarize
from orchestrator.sweeps import plan as sweep_plan
from orchestrator.sweeps.metric import Metric
from orchestrator.sweeps.space import short_keys
from orchestrator.sweeps.steering import Course

Json = dict[str, Any]
FORMAT = 1
#: Of a regime's summary, what the table and the figures of a sweep show.
FIGURES = (
    "status",
    "kind",
    "seconds",
    "peak_device_bytes",
    "peak_host_bytes",
    "host_growth_bytes",
    "trainable_parameters",
    "export",
)


def sweep_summary(
    run: str,
    section: SweepConfig,
    metric: Metric,
    courses: Sequence[Course],
    commits: Mapping[str, Json],
    *,
    status: str,
    environment: Mapping[str, Any],
    before: Collection[str],
    failures: Mapping[str, str],
    exports: Mapping[str, Mapping[str, str]] | None = None,
    wall_seconds: float | None = None,
) -> Json:
    """`before`: nodes that were committed when this invocation began; `failures`: node -> message; `exports`: trial ->
    regime -> folder below its own; `wall_seconds`: of this invocation."""
    exports = exports or {}
    asked = {course.name: asked_nodes(course, metric, commits) for course in courses}
    users: dict[str, int] = {}
    for nodes in asked.values():
        for node in nodes:
            users[node.id] = users.get(node.id, 0) + 1
    done = {name: [node for node in nodes if node.id in commits] for name, nodes in asked.items()}
    trials = [
        _trial(course, metric, commits, asked[course.name], users, exports.get(course.name, {})) for course in courses
    ]
    original: Json = {}
    for trial in trials:
        original = original or trial.pop("original")
        trial.pop("original", None)
    _mark_front(trials, metric)
    _mark_best(trials, metric)
    kinds = sweep_plan.sharing(done, lambda node: commits[node.id]["result"].get("seconds"))
    everything = sweep_plan.total(kinds.values())
    ran = {node.id for nodes in done.values() for node in nodes}
    planned = {node.id for course in courses for node in course.plan.nodes}
    left = [commit["result"] for node_id, commit in commits.items() if node_id not in planned]
    return {
        "format": FORMAT,
        "run": run,
        "status": status,
        "environment": dict(environment),
        "metric": {"key": metric.key, "regime": metric.regime, "split": metric.split, "name": metric.name}
        | {"mode": metric.mode},
        "parameters": {key: {draw.kind: list(draw.values)} for key, draw in section.parameters.items()},
        "short": short_keys(list(section.parameters)),
        "scheduler": section.scheduler.model_dump(),
        "samples": section.samples,
        "seed": section.seed,
        "trials": trials,
        "best": next((trial["name"] for trial in trials if trial["best"]), None),
        "original": original,
        "sharing": {
            "kinds": {kind: dataclasses.asdict(shared) for kind, shared in kinds.items()},
            "total": dataclasses.asdict(everything),
            # Of what was run, in how far an earlier invocation, or another run on this store, had done it.
            "before": len(ran & set(before)),
            # Done for trials that then took over another's stages instead (pbt); not in the figures above.
            "abandoned": {"tasks": len(left), "seconds": sum(result.get("seconds", 0.0) for result in left)},
        },
        "wall_seconds": wall_seconds,
        "failures": [
            {"trial": course.name, "message": course.message} for course in courses if course.status == "failed"
        ],
    }


def asked_nodes(course: Course, metric: Metric, commits: Mapping[str, Json]) -> list[Node]:
    """What a trial asked for: all of its plan, or as far as it was let."""
    plan = course.plan
    if course.status in ("done", "failed", "waiting", "running"):
        return plan.in_order(sweep_plan.closure(plan, plan.targets))
    return plan.in_order(sweep_plan.closure(plan, sweep_plan.level_targets(plan, metric.regime, course.judged)))


def _trial(
    course: Course,
    metric: Metric,
    commits: Mapping[str, Json],
    asked: Sequence[Node],
    users: Mapping[str, int],
    exports: Mapping[str, str],
) -> Json:
    summary = summarize(course.name, course.plan, commits, status=course.status, environment={}, exports=exports)
    own = summary["regimes"][metric.regime]
    stages = [node for node in asked if node.kind == "train"]
    shared = [node for node in asked if users[node.id] > 1]
    return {
        "name": course.name,
        "folder": f"trials/{course.folder}",
        "parameters": dict(course.parameters),
        # Settings of the stages that were taken over, and of those since (pbt).
        "history": [dict(settings) for settings in course.history],
        "status": course.status,
        "metric": metric.of(summary),
        "rungs": [{"stages": stages, "metric": value} for stages, value in course.rungs],
        "best": False,
        "pareto": False,
        "regimes": {
            name: {
                **{key: regime[key] for key in FIGURES},
                "test": regime["final"]["metrics"],
                "validation": regime["final"]["validation"],
            }
            for name, regime in summary["regimes"].items()
        },
        "seconds": own["seconds"],
        "peak_device_bytes": own["peak_device_bytes"],
        "host_growth_bytes": own["host_growth_bytes"],
        "stages": {
            "planned": sum(node.kind == "train" for node in course.plan.nodes),
            "asked": len(stages),
            "done": sum(node.id in commits for node in stages),
            "shared": sum(users[node.id] > 1 for node in stages),
        },
        "nodes": {"asked": len(asked), "shared": len(shared)},
        "message": course.message,
        "original": summary["original"],
    }


def _mark_best(trials: Iterable[Json], metric: Metric) -> None:
    """Among the trials that are through; the first of equals."""
    best: Json | None = None
    for trial in trials:
        value = trial["metric"] if trial["status"] == "done" else None
        if value is not None and (best is None or metric.better(value, best["metric"])):
            best = trial
    if best is not None:
        best["best"] = True


def _mark_front(trials: Sequence[Json], metric: Metric) -> None:
    """Trials that no other beats in quality, memory and time at once."""
    memory = memory_key(trials)
    points = {
        trial["name"]: (metric.sign * trial["metric"], -(trial[memory] or 0), -trial["seconds"])
        for trial in trials
        if trial["status"] == "done" and trial["metric"] is not None
    }
    front = pareto(points)
    for trial in trials:
        trial["pareto"] = trial["name"] in front


def memory_key(trials: Sequence[Mapping[str, Any]]) -> str:
    """Peak of the device where there is one, else growth of the process."""
    return "peak_device_bytes" if any(trial["peak_device_bytes"] for trial in trials) else "host_growth_bytes"


def pareto(points: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Names that no other point dominates: at least as much in every coordinate, more in one."""

    def dominated(name: str) -> bool:
        mine = points[name]
        return any(
            all(a >= b for a, b in zip(other, mine, strict=True))
            and any(a > b for a, b in zip(other, mine, strict=True))
            for key, other in points.items()
            if key != name
        )

    return frozenset(name for name in points if not dominated(name))
