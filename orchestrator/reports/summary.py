"""Sum up what a run came to, from the plan and the commits alone; runs may be partial.

`summary.json` is the only input of the report, of the trackers and of the printed table, so all of them can be made
again from a finished (or killed) run without touching the store.

Figures of a regime:

- `seconds`: compute time of its training, materialization and averaging, whoever ran it and whenever. This is the
  figure to compare regimes by; evaluations and data preparation are in `seconds_by_kind`.
- `wall_seconds`: the length of time during which at least one of its nodes was running.
- `forwards`: samples that ran forward through each *frozen* block in the whole run, next to how many (sample,
  view) pairs there are: with snapshots the ratio is 1.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.records.nodes import Commit
from cache_store.storage.durable import write_atomically
from orchestrator.environment import Environment
from orchestrator.reports.commit_view import CommitFigures, CommitView, data_summary, maximum, shard_counts, sum_known
from orchestrator.reports.record_json import to_json
from orchestrator.reports.records import (
    About,
    BoundaryFigures,
    BoundarySummary,
    EndedEarly,
    Failure,
    FinalSummary,
    ForwardCount,
    NodeCounts,
    RegimeSummary,
    SetSummary,
    StageSummary,
    Summary,
    WorkFigures,
    WorkPlace,
    WorkSummary,
)
from orchestrator.reports.sections import diagnoses
from orchestrator.reports.stage_summary import summarize_stage
from workers.specs.data_results import DataFigures

if TYPE_CHECKING:
    from orchestrator.costs.boundary_costs import Prediction
    from orchestrator.plan.graph import Node, Plan, RegimePlan

#: Kinds of nodes whose compute time is the training time of a regime.
_TRAINING = ("train", "materialize", "average")


def summarize(
    run: str,
    plan: Plan,
    commits: Mapping[str, Commit],
    *,
    status: str,
    environment: Environment,
    reused: Collection[str] = (),
    failures: Mapping[str, str] | None = None,
    exports: Mapping[str, str] | None = None,
    about: About | None = None,
) -> Summary:
    """Sum up `plan` given the commits that exist (node -> commit).

    `status` is the run's (`driver.Outcome.status`: "done", "failed" or "stopped"); `reused` the nodes that
    were committed before this invocation; `failures` a message by node; `exports` the folder or file of each
    exported regime. Epochs count from 0, as in the commits.
    """
    failures, exports = failures or {}, exports or {}
    nodes: dict[str, Node] = {node.id: node for node in plan.nodes}
    own = {key: commit for key, commit in commits.items() if key in nodes}
    figures = {key: CommitFigures.of(commit) for key, commit in own.items()}
    view = CommitView(nodes=nodes, commits=own, figures=figures, reused=frozenset(reused), failures=failures)
    return Summary(
        run=run,
        status=status,
        environment=environment,
        regimes={name: _regime(view, name, regime, exports.get(name)) for name, regime in plan.regimes.items()},
        nodes=NodeCounts(
            total=len(nodes),
            done=len(own),
            reused=len(view.reused & own.keys()),
            failed=len([key for key in failures if key in nodes]),
        ),
        work=tuple(_work(view, node) for node in nodes.values()),
        original={split: view.of(node).metrics for split, node in plan.original.items()},
        failures=tuple(
            Failure(key, nodes[key].label if key in nodes else key, message) for key, message in failures.items()
        ),
        about=about,
        judged=view.judged(plan.judged),
        data=next((data_summary(own[key].read(DataFigures)) for key in own if nodes[key].prepares), None),
    )


def write_summary(path: Path, record: Any) -> None:
    """Write a record as JSON, replacing `path` atomically: a reader sees the old file or the new one, whole."""
    write_atomically(path, json.dumps(to_json(record), indent=2, allow_nan=False).encode() + b"\n")


def _regime(view: CommitView, name: str, regime: RegimePlan, export: str | None) -> RegimeSummary:
    mine = [node for node in view.nodes.values() if name in node.regimes]
    stages = tuple(summarize_stage(view, node_id, regime) for node_id in regime.stages)
    done = [stage for stage in stages if stage.done]
    by_kind: dict[str, float] = {}
    for node in mine:
        seconds = view.of(node.id).seconds
        if seconds is not None:
            by_kind[node.kind] = by_kind.get(node.kind, 0.0) + float(seconds)
    found = diagnoses(regime, lambda node_id: str(view.nodes[node_id].task["name"]), view.commits)
    return RegimeSummary(
        kind=regime.kind,
        pipeline="wavefront" if regime.rounds else "sequential",
        status=_regime_status(view, mine, regime),
        ended_early=_ended_early(stages, regime),
        stages=stages,
        final=FinalSummary(
            metrics=view.of(regime.test).metrics,
            split="test",
            rows=view.of(regime.test).rows,
            validation=view.of(regime.validation).metrics,
            status=view.status(regime.test),
            by_class=view.of(regime.test).by_class,
        ),
        seconds=sum(by_kind.get(kind, 0.0) for kind in _TRAINING),
        seconds_by_kind=by_kind,
        wall_seconds=_covered(view.of(node.id).where for node in mine),
        export=export,
        peak_device_bytes=maximum(stage.peak_device_bytes for stage in done),
        peak_host_bytes=maximum(stage.peak_host_bytes for stage in done),
        host_growth_bytes=maximum(stage.host_growth_bytes for stage in done),
        trainable_parameters=maximum(stage.trainable_parameters for stage in done),
        snapshot=shard_counts(view.of(node.id) for node in mine if node.trains or node.makes_set),
        snapshots=tuple(_set(view, node) for node in mine if node.makes_set),
        boundaries=tuple(_boundary(view, prediction) for prediction in regime.boundaries),
        forwards=_forwards(view, mine),
        diagnoses=found or None,
        variant=regime.variant,
        notes=regime.notes or None,
        trained_at_once=maximum(stage.trained_at_once for stage in done),
        settings=settings_of([_trained_with(view.nodes[node_id].task) for node_id in regime.stages]) or None,
    )


#: What a regime is trained with: name -> where the task of a stage has it.
_SETTINGS = {
    "loss": ("loss", "name"),
    "loss function": ("loss", "build"),
    "optimizer": ("optimizer", "name"),
    "learning rate": ("optimizer", "lr"),
    "weight decay": ("optimizer", "weight_decay"),
    "schedule": ("schedule", "name"),
    "batch": ("batch_size",),
    "micro-batch": ("micro_batch",),
    "epochs": ("epochs",),
    "precision": ("precision",),
    "LoRA rank": ("lora", "rank"),
}


def _trained_with(task: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the `train` section of a stage's task with the loss, which all stages share; none is cross-entropy."""
    return {**task["train"], "loss": task["experiment"].get("loss")}


def settings_of(trainings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Write what stages are trained with, given the `train` sections of their tasks: each value once, in order."""
    found = {name: [_setting(training, keys) for training in trainings] for name, keys in _SETTINGS.items()}
    return {
        name: ", ".join(dict.fromkeys(texts)) for name, values in found.items() if (texts := list(filter(None, values)))
    }


def _setting(section: Any, keys: Sequence[str]) -> str:
    for key in keys:
        section = section.get(key) if isinstance(section, Mapping) else None
    return f"{section:g}" if isinstance(section, float) else "" if section is None else str(section)


def _ended_early(stages: tuple[StageSummary, ...], regime: RegimePlan) -> EndedEarly | None:
    """Find the stage after which the network was good enough; None where the regime did not end there."""
    for before, stage in itertools.pairwise(stages):
        if stage.exit == "run target":
            return EndedEarly(
                after=before.name,
                stages_left_out=sum(other.exit == "run target" for other in stages),
                target=dict(regime.run_exit),
                reached={key: before.assembled.get(key) for key in regime.run_exit},
            )
    return None


def _boundary(view: CommitView, prediction: Prediction) -> BoundarySummary:
    """Put what one boundary was predicted to cost beside what came of it, once all of its nodes are committed."""
    made = [view.of(node) for node in prediction.sets]
    stages = [view.of(node) for node in prediction.stages]
    # A resumed stage tells of its last attempt alone.
    whole = not any(stage.resumed for stage in stages)
    inputs = sum_known(stage.input_seconds for stage in stages) if whole else None
    stored = prediction.source == "snapshots"
    return BoundarySummary(
        label=prediction.label,
        source=prediction.source,
        reason=prediction.reason,
        basis=prediction.basis,
        views=prediction.views,
        predicted=BoundaryFigures(
            prediction.bytes, prediction.make_seconds, prediction.read_seconds, prediction.recompute_seconds
        ),
        measured=BoundaryFigures(
            bytes=sum_known(result.bytes for result in made) if stored else None,
            make_seconds=sum_known(result.seconds for result in made) if stored else None,
            read_seconds=inputs if stored else None,
            recompute_seconds=None if stored else inputs,
        ),
    )


def _regime_status(view: CommitView, nodes: list[Node], regime: RegimePlan) -> str:
    if any(view.status(node.id) == "failed" for node in nodes):
        return "failed"
    rounds = [part for stage in regime.stages for part in regime.work_of(stage)]
    states = [view.status(node_id) for node_id in (*rounds, regime.test)]
    if "pending" in states:
        return "pending" if set(states) == {"pending"} else "partial"
    return "reused" if set(states) == {"reused"} else "done"


def _set(view: CommitView, node: Node) -> SetSummary:
    made = view.of(node.id)
    return SetSummary(
        label=node.label,
        node=node.id,
        status=view.status(node.id),
        split=node.task.get("split"),
        view=node.task.get("view"),
        boundary=tuple(str(part) for hop in _hops(node) for part in hop),
        set=made.set,
        rows=made.rows,
        bytes=made.bytes,
        seconds=made.seconds,
        shared=len(node.regimes) > 1,
    )


def _hops(node: Node) -> list[list[str]]:
    """Return the blocks that a set's rows went through, grouped by the sets on the way."""
    hops: list[list[str]] = node.task.get("boundary", {}).get("hops", [])
    return hops


def _forwards(view: CommitView, nodes: list[Node]) -> dict[str, ForwardCount]:
    """Count, by frozen block, samples run forward and the distinct (sample, view) pairs that were asked for."""
    samples: dict[str, int] = {}
    wanted: dict[str, dict[tuple[str, Any], int]] = {}
    for node in nodes:
        for block, count in view.of(node.id).forwards.items():
            samples[block] = samples.get(block, 0) + count
        for origin, rows in _rows_made(view, node):
            key = (str(origin.task.get("split")), origin.task.get("view"))
            for block in itertools.chain.from_iterable(_hops(origin)):
                pairs = wanted.setdefault(str(block), {})
                pairs[key] = max(pairs.get(key, 0), rows)
    counted: dict[str, ForwardCount] = {}
    for block in sorted(samples):
        asked = sum(wanted.get(block, {}).values()) or None
        counted[block] = ForwardCount(samples[block], asked, samples[block] / asked if asked else None)
    return counted


def _rows_made(view: CommitView, node: Node) -> Iterable[tuple[Node, int]]:
    """Yield the set nodes whose rows a node made, each with its number of rows, where there are any."""
    figures = view.of(node.id)
    made = [(node, figures.rows or 0)] if node.makes_set else []
    # Of a stage that made its own sets and ended before they were whole.
    made += [(view.nodes[node.parents[role]], part.rows) for role, part in (figures.partial or {}).items()]
    return [(origin, rows) for origin, rows in made if rows]


def _work(view: CommitView, node: Node) -> WorkSummary:
    """Sum up one node for the timeline."""
    figures, predicted = view.of(node.id), node.estimate
    return WorkSummary(
        node=node.id,
        label=node.label,
        kind=node.kind,
        regimes=node.regimes,
        status=view.status(node.id),
        where=figures.where,
        predicted=WorkFigures(predicted.peak_bytes, predicted.snapshot_bytes, round(predicted.seconds, 3)),
        measured=WorkFigures(
            peak_bytes=figures.peak_device_bytes or figures.host_growth,
            snapshot_bytes=figures.bytes if node.makes_set else None,
            seconds=figures.seconds,
        ),
    )


def _covered(places: Iterable[WorkPlace | None]) -> float | None:
    """Return the length of the union of the running intervals: idle time between two invocations does not count."""
    spans = sorted(
        (float(place.started), float(place.finished))
        for place in places
        if place is not None and place.started is not None and place.finished is not None
    )
    if not spans:
        return None
    length, (start, end) = 0.0, spans[0]
    for first, last in spans[1:]:
        if first > end:
            length += end - start
            start, end = first, last
        else:
            end = max(end, last)
    return length + end - start
