"""What a run came to, as one JSON value, computed from the plan and the commits alone; runs may be partial.

`summary.json` is the only input of the report, of the TensorBoard events and of the printed table, so all of
them can be made again from a finished (or killed) run without touching the store.

Figures of a regime:

- `seconds`: compute time of its training, materialization and averaging, whoever ran it and whenever. This is the
  figure to compare regimes by; evaluations and data preparation are in `seconds_by_kind`.
- `wall_seconds`: the length of time during which at least one of its nodes was running.
- `forwards`: samples that ran forward through each *frozen* block in the whole run, next to how many (sample,
  view) pairs there are: with snapshots the ratio is 1.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.storage.durable import write_atomically
from orchestrator.reports.sections import diagnoses

if TYPE_CHECKING:
    from orchestrator.costs.boundary_costs import Prediction
    from orchestrator.plan.graph import Node, Plan, RegimePlan

Json = dict[str, Any]
FORMAT = 1


def summarize(
    run: str,
    plan: Plan,
    commits: Mapping[str, Json],
    *,
    status: str,
    environment: Mapping[str, Any],
    reused: Collection[str] = (),
    failures: Mapping[str, str] | None = None,
    exports: Mapping[str, str] | None = None,
) -> Json:
    """The summary of `plan` given the commits that exist.

    `status` is the run's (`driver.Outcome.status`: "done", "failed" or "stopped"); `reused` the nodes that
    were committed before this invocation; `failures` a message by node; `exports` the folder or file of each
    exported regime. Epochs count from 0, as in the commits.
    """
    failures = failures or {}
    exports = exports or {}
    nodes: dict[str, Node] = {node.id: node for node in plan.nodes}
    results: dict[str, Json] = {key: commit.get("result", {}) for key, commit in commits.items() if key in nodes}
    view = _View(nodes=nodes, results=results, reused=frozenset(reused), failures=failures)
    original = {split: view.results.get(node, {}).get("metrics", {}) for split, node in plan.original.items()}
    summary: Json = {
        "format": FORMAT,
        "run": run,
        "status": status,
        "environment": dict(environment),
        "regimes": {name: _regime(view, name, regime, exports.get(name)) for name, regime in plan.regimes.items()},
        "nodes": {
            "total": len(nodes),
            "done": len(results),
            "reused": len(view.reused & results.keys()),
            "failed": len([key for key in failures if key in nodes]),
        },
        "work": [_work(view, node) for node in nodes.values()],
        # The model as it came, scored like the regimes ({} where it came without weights).
        "original": original,
        "failures": [
            {"node": key, "label": nodes[key].label if key in nodes else key, "message": message}
            for key, message in failures.items()
        ],
    }
    return _finite(summary)  # type: ignore[no-any-return]


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Replace `path` atomically: a reader sees the old summary or the new one, whole."""
    write_atomically(path, json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n")


@dataclasses.dataclass(frozen=True)
class _View:
    nodes: Mapping[str, Node]
    results: Mapping[str, Json]
    reused: frozenset[str]
    failures: Mapping[str, str]

    def status(self, node_id: str) -> str:
        if node_id in self.results:
            return "reused" if node_id in self.reused else "done"
        return "failed" if node_id in self.failures else "pending"


def _regime(view: _View, name: str, regime: RegimePlan, export: str | None) -> Json:
    mine = [node for node in view.nodes.values() if name in node.regimes]
    stages = [_stage(view, node_id, regime) for node_id in regime.stages]
    done = [stage for stage in stages if stage["status"] in ("done", "reused")]
    by_kind: dict[str, float] = {}
    for node in mine:
        seconds = view.results.get(node.id, {}).get("seconds")
        if seconds is not None:
            by_kind[node.kind] = by_kind.get(node.kind, 0.0) + float(seconds)
    found = diagnoses(regime, lambda node_id: str(view.nodes[node_id].task["name"]), view.results)
    test = view.results.get(regime.test, {})
    validation = view.results.get(regime.validation, {})
    return {
        "kind": regime.kind,
        "pipeline": "wavefront" if regime.rounds else "sequential",
        "status": _regime_status(view, mine, regime),
        "ended_early": _ended_early(stages, regime),
        "stages": stages,
        "final": {
            "metrics": dict(test.get("metrics", {})),
            "split": "test",
            "rows": test.get("rows"),
            "validation": dict(validation.get("metrics", {})),
            "status": view.status(regime.test),
        },
        "seconds": sum(by_kind.get(kind, 0.0) for kind in ("train", "materialize", "average")),
        "seconds_by_kind": by_kind,
        "wall_seconds": _covered([view.results.get(node.id, {}).get("where") for node in mine]),
        "export": export,
        "peak_device_bytes": _maximum(stage["peak_device_bytes"] for stage in done),
        "peak_host_bytes": _maximum(stage["peak_host_bytes"] for stage in done),
        "host_growth_bytes": _maximum(stage["host_growth_bytes"] for stage in done),
        "trainable_parameters": _maximum(stage["trainable_parameters"] for stage in done),
        "snapshot": _snapshot_total(view, mine),
        "snapshots": [_materialized(view, node) for node in mine if node.kind == "materialize"],
        "boundaries": [_boundary(view, prediction) for prediction in regime.boundaries],
        "forwards": _forwards(view, mine),
        **({"diagnoses": found} if found else {}),
    }


def _ended_early(stages: list[Json], regime: RegimePlan) -> Json | None:
    """After which stage the network was good enough, what it had reached and what was asked; None: it was not."""
    for before, stage in itertools.pairwise(stages):
        if stage["exit"] == "run target":
            left = sum(other["exit"] == "run target" for other in stages)
            return {
                "after": before["name"],
                "stages_left_out": left,
                "target": dict(regime.run_exit),
                "reached": {key: before["assembled"].get(key) for key in regime.run_exit},
            }
    return None


def _boundary(view: _View, prediction: Prediction) -> Json:
    """What one boundary was predicted to cost, and what came of it: figures are there once all of their nodes are."""
    made = [view.results.get(node, {}) for node in prediction.sets]
    stages = [view.results.get(node, {}) for node in prediction.stages]
    # A resumed stage tells of its last attempt alone.
    whole = all("input_seconds" in stage and not stage.get("resumed") for stage in stages)
    inputs = _sum(stage.get("input_seconds") for stage in stages) if whole else None
    stored = prediction.source == "snapshots"
    return {
        "label": prediction.label,
        "source": prediction.source,
        "reason": prediction.reason,
        "basis": prediction.basis,
        "predicted": {
            "bytes": prediction.bytes,
            "make_seconds": prediction.make_seconds,
            "read_seconds": prediction.read_seconds,
            "recompute_seconds": prediction.recompute_seconds,
        },
        "measured": {
            "bytes": _sum(result.get("bytes") for result in made) if stored else None,
            "make_seconds": _sum(result.get("seconds") for result in made) if stored else None,
            "read_seconds": inputs if stored else None,
            "recompute_seconds": None if stored else inputs,
        },
    }


def _sum(values: Iterable[Any]) -> Any:
    """None unless all of them are known."""
    known = list(values)
    return None if None in known or not known else sum(known)


def _regime_status(view: _View, nodes: list[Node], regime: RegimePlan) -> str:
    if any(view.status(node.id) == "failed" for node in nodes):
        return "failed"
    rounds = [part for stage in regime.stages for part in regime.work_of(stage)]
    states = [view.status(node_id) for node_id in (*rounds, regime.test)]
    if "pending" in states:
        return "pending" if set(states) == {"pending"} else "partial"
    return "reused" if set(states) == {"reused"} else "done"


def _stage(view: _View, node_id: str, regime: RegimePlan) -> Json:
    """One stage; its rounds, if it was trained in rounds, as if they were one piece of work."""
    node = view.nodes[node_id]
    rounds = regime.work_of(node_id)
    done = [view.results[part] for part in rounds if part in view.results]
    # The newest round holds the epochs of all before it, and says how far the stage is.
    result = done[-1] if done else {}
    task = node.task
    epochs: list[Json] = [dict(epoch) for epoch in result.get("epochs", [])]
    committed = result.get("committed_epoch")
    at_commit: Json = next((epoch for epoch in epochs if epoch.get("epoch") == committed), {})
    assembled = view.results.get(regime.assembled.get(node_id, ""), {})
    metrics = {
        key: at_commit[key]
        for key in ("train_accuracy", "validation_loss", "validation_accuracy")
        if at_commit.get(key) is not None
    }
    own = at_commit.get("validation") or {}
    covers = set(task.get("path", [])) | {b for hop in (task.get("boundary") or {}).get("hops", []) for b in hop}
    whole = covers >= set(regime.weights)
    truncated = view.results.get(regime.truncated.get(node_id, ""), {}).get("metrics", {}) or own
    accuracy = assembled.get("metrics", {}).get("accuracy")
    if accuracy is not None:
        metrics["assembled_accuracy"] = accuracy
    path = [str(part) for part in task.get("path", [])]
    trained = [str(part) for part in task.get("trained", [])]
    # The host's memory is looked at in the first epochs alone.
    sampled = max(done, key=lambda part: _growth(part) or 0, default=result)
    peak_host, baseline, growth = (
        sampled.get("peak_host_bytes"),
        sampled.get("host_baseline_bytes"),
        _growth(sampled),
    )
    peak_device = _maximum(part.get("peak_device_bytes") for part in done)
    decision = regime.decisions.get(node_id)
    predicted = dataclasses.replace(
        node.estimate, seconds=sum(view.nodes[part].estimate.seconds for part in rounds)
    ).to_json()
    forwards: dict[str, int] = {}
    for part in done:
        for block, count in part.get("forwards", {}).items():
            forwards[block] = forwards.get(block, 0) + int(count)
    return {
        "name": task.get("name", node.label),
        "node": node_id,
        "label": node.label,
        "status": "failed" if any(view.status(part) == "failed" for part in rounds) else view.status(node_id),
        # How many pieces of work it is made of, and how many of them are done.
        "rounds": len(rounds),
        "rounds_done": len(done),
        "blocks": [part for part in trained if part != "head"],
        "trained": trained,
        "path": path,
        "source": task.get("source"),
        "source_reason": decision.reason if decision else None,
        "auxiliary": bool(result.get("path_is_auxiliary", "adapter" in path or "aux" in path)),
        "seconds": _sum(part.get("seconds") for part in done),
        "epochs": len(epochs),
        "planned_epochs": task.get("train", {}).get("epochs"),
        "steps": result.get("steps"),
        "exit": result.get("exit"),
        "best_epoch": result.get("best_epoch"),
        "committed_epoch": committed,
        "resumed": _sum(part.get("resumed") for part in done),
        "trainable_parameters": result.get("trainable_parameters"),
        "resident_bytes": result.get("resident_bytes"),
        "train_loss": at_commit.get("train_loss"),
        "metrics": metrics,
        "assembled": dict(assembled.get("metrics", {})),
        # Of language models: the whole chain, the chain as far as it was trained, and how far that is.
        "full": dict(own if whole and own else assembled.get("metrics", {})) if node_id in regime.layers else {},
        "truncated": dict(truncated) if node_id in regime.layers else {},
        "layer": regime.layers.get(node_id),
        "peak_device_bytes": peak_device,
        "peak_device_reserved_bytes": _maximum(part.get("peak_device_reserved_bytes") for part in done),
        "peak_host_bytes": peak_host,
        "host_baseline_bytes": baseline,
        "host_growth_bytes": growth,
        "snapshot": {
            key: sum(part.get("snapshot", {}).get(key, 0) for part in done)
            for key in ("hits", "misses", "bytes_read", "bytes_written")
        },
        "forwards": forwards,
        "reused": node_id in view.reused and node_id in view.results,
        "world_size": (result.get("where") or {}).get("world_size", 1),
        "where": {**result["where"], **_begun(done[0])} if result.get("where") else None,
        "estimate": {
            "predicted": predicted,
            "measured": {
                "trainable": result.get("trainable_parameters"),
                "peak_bytes": peak_device or growth,
                "peak_kind": "device" if peak_device else "host",
                "seconds": _sum(part.get("seconds") for part in done),
            },
        },
        "curve": epochs,
    }


def _begun(result: Json) -> Json:
    """When the first piece of a stage's work began."""
    return {key: value for key, value in (result.get("where") or {}).items() if key in ("started", "first_step")}


def _growth(result: Json) -> int | None:
    """Host memory above the idle level."""
    peak, baseline = result.get("peak_host_bytes"), result.get("host_baseline_bytes")
    return None if peak is None or baseline is None else max(0, peak - baseline)


def _materialized(view: _View, node: Node) -> Json:
    result = view.results.get(node.id, {})
    return {
        "label": node.label,
        "node": node.id,
        "status": view.status(node.id),
        "split": node.task.get("split"),
        "view": node.task.get("view"),
        "boundary": [str(part) for hop in node.task.get("boundary", {}).get("hops", []) for part in hop],
        "set": result.get("set"),
        "rows": result.get("rows"),
        "bytes": result.get("bytes"),
        "seconds": result.get("seconds"),
        "shared": len(node.regimes) > 1,
    }


def _snapshot_total(view: _View, nodes: Iterable[Node]) -> Json:
    total = {"hits": 0, "misses": 0, "bytes_read": 0, "bytes_written": 0}
    for node in nodes:
        if node.kind in ("train", "materialize"):
            counted = view.results.get(node.id, {}).get("snapshot", {})
            for key in total:
                total[key] += int(counted.get(key, 0) or 0)
    return total


def _forwards(view: _View, nodes: list[Node]) -> Json:
    """By frozen block: samples run forward, and how many distinct (sample, view) pairs were asked for."""
    samples: dict[str, int] = {}
    wanted: dict[str, dict[tuple[str, Any], int]] = {}
    for node in nodes:
        result = view.results.get(node.id, {})
        for block, count in result.get("forwards", {}).items():
            samples[str(block)] = samples.get(str(block), 0) + int(count)
        made = [(node, result)] if node.kind == "materialize" else []
        # Of a stage that made its own sets and ended before they were whole.
        made += [(view.nodes[node.parents[role]], part) for role, part in result.get("partial", {}).items()]
        for origin, part in made:
            key = (str(origin.task.get("split")), origin.task.get("view"))
            for hop in origin.task.get("boundary", {}).get("hops", []) if part.get("rows") else ():
                for block in hop:
                    pairs = wanted.setdefault(str(block), {})
                    pairs[key] = max(pairs.get(key, 0), int(part["rows"]))
    out: Json = {}
    for block in sorted(samples):
        asked = sum(wanted.get(block, {}).values()) or None
        out[block] = {
            "samples": samples[block],
            "sample_views": asked,
            "per_sample_view": samples[block] / asked if asked else None,
        }
    return out


def _work(view: _View, node: Node) -> Json:
    """One line of the timeline, with what was predicted for the node beside what was measured."""
    result = view.results.get(node.id, {})
    predicted = node.estimate.to_json()
    growth = _growth(result)
    written = result.get("bytes") if node.kind == "materialize" else None
    return {
        "node": node.id,
        "label": node.label,
        "kind": node.kind,
        "regimes": list(node.regimes),
        "status": view.status(node.id),
        "where": result.get("where"),
        "predicted": {key: predicted.get(key) for key in ("peak_bytes", "snapshot_bytes", "seconds")},
        "measured": {
            "peak_bytes": result.get("peak_device_bytes") or growth,
            "snapshot_bytes": written,
            "seconds": result.get("seconds"),
        },
    }


def _covered(wheres: Iterable[Mapping[str, Any] | None]) -> float | None:
    """Length of the union of the running intervals: idle time between two invocations does not count."""
    spans = sorted(
        (float(where["started"]), float(where["finished"]))
        for where in wheres
        if where and where.get("started") is not None and where.get("finished") is not None
    )
    if not spans:
        return None
    total, (start, end) = 0.0, spans[0]
    for first, last in spans[1:]:
        if first > end:
            total += end - start
            start, end = first, last
        else:
            end = max(end, last)
    return total + end - start


def _maximum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _finite(value: Any) -> Any:
    """JSON has no NaN: figures that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
