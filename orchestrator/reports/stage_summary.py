"""Sum up one stage of a regime from the commits of its rounds and evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from orchestrator.reports.commit_view import (
    CommitView,
    epoch_at_commit,
    epochs_of,
    host_growth,
    maximum,
    place_of,
    shard_counts,
    sum_known,
)
from orchestrator.reports.records import EpochSummary, Metrics, StageEstimate, StageMeasured, StageSummary, WorkPlace

if TYPE_CHECKING:
    from orchestrator.costs.formulas import Estimate
    from orchestrator.plan.graph import RegimePlan

#: Parts that stand in for the network's own head.
_LOCAL_HEADS = ("adapter", "aux")


def summarize_stage(view: CommitView, node_id: str, regime: RegimePlan) -> StageSummary:
    """Sum up the stage whose last round is `node_id`; its rounds, if it has several, as one piece of work."""
    node, rounds = view.nodes[node_id], regime.work_of(node_id)
    task, decision = node.task, regime.decisions.get(node_id)
    work = _Work([view.results[part] for part in rounds if part in view.results])
    result, sampled = work.newest, work.sampled
    path, trained = (tuple(str(part) for part in task.get(key, [])) for key in ("path", "trained"))
    assembled = view.metrics(regime.assembled.get(node_id, ""))
    full, truncated = _by_layer(view, node_id, regime, work.at_commit)
    return StageSummary(
        name=task.get("name", node.label),
        node=node_id,
        label=node.label,
        status="failed" if any(view.status(part) == "failed" for part in rounds) else view.status(node_id),
        rounds=len(rounds),
        rounds_done=len(work.done),
        blocks=tuple(part for part in trained if part != "head"),
        trained=trained,
        path=path,
        source=task.get("source"),
        source_reason=decision.reason if decision else None,
        auxiliary=bool(result.get("path_is_auxiliary", any(part in path for part in _LOCAL_HEADS))),
        seconds=sum_known(part.get("seconds") for part in work.done),
        epochs=len(work.epochs),
        planned_epochs=task.get("train", {}).get("epochs"),
        steps=result.get("steps"),
        exit=result.get("exit"),
        best_epoch=result.get("best_epoch"),
        committed_epoch=result.get("committed_epoch"),
        resumed=sum_known(part.get("resumed") for part in work.done),
        trainable_parameters=result.get("trainable_parameters"),
        resident_bytes=result.get("resident_bytes"),
        train_loss=work.at_commit.train_loss,
        metrics=_own_metrics(work.at_commit, assembled),
        assembled=assembled,
        full=full,
        truncated=truncated,
        layer=regime.layers.get(node_id),
        peak_device_bytes=work.largest("peak_device_bytes"),
        peak_device_reserved_bytes=work.largest("peak_device_reserved_bytes"),
        peak_host_bytes=sampled.get("peak_host_bytes"),
        host_baseline_bytes=sampled.get("host_baseline_bytes"),
        host_growth_bytes=host_growth(sampled),
        snapshot=shard_counts(work.done),
        forwards=work.forwards(),
        reused=view.status(node_id) == "reused",
        world_size=(result.get("where") or {}).get("world_size", 1),
        where=work.place(),
        estimate=StageEstimate(_predicted(view, node_id, rounds), work.measured()),
        curve=work.epochs,
    )


@dataclass(frozen=True)
class _Work:
    """The results of a stage's rounds that are done, in order."""

    done: list[Mapping[str, Any]]

    @property
    def newest(self) -> Mapping[str, Any]:
        """The last round's result: it holds the epochs of all before it, and says how far the stage is."""
        return self.done[-1] if self.done else {}

    @cached_property
    def sampled(self) -> Mapping[str, Any]:
        """The round that measured the host's memory, which is looked at in the first epochs alone."""
        return max(self.done, key=lambda part: host_growth(part) or 0, default={})

    @cached_property
    def epochs(self) -> tuple[EpochSummary, ...]:
        return epochs_of(self.newest)

    @cached_property
    def at_commit(self) -> EpochSummary:
        return epoch_at_commit(self.newest, self.epochs)

    def largest(self, key: str) -> int | None:
        return maximum(part.get(key) for part in self.done)

    def forwards(self) -> dict[str, int]:
        """Count the samples that ran forward, by frozen block."""
        counted: dict[str, int] = {}
        for part in self.done:
            for block, count in part.get("forwards", {}).items():
                counted[block] = counted.get(block, 0) + int(count)
        return counted

    def place(self) -> WorkPlace | None:
        """Return where the newest round ran, and when the first began."""
        newest = place_of(self.newest)
        first = place_of(self.done[0]) if self.done else None
        if newest is None or first is None:
            return newest
        # Rounds of old runs may not say when they made their first step.
        step = newest.first_step if first.first_step is None else first.first_step
        return dataclasses.replace(newest, started=first.started, first_step=step)

    def measured(self) -> StageMeasured:
        """Return what came of what was estimated."""
        device = self.largest("peak_device_bytes")
        return StageMeasured(
            trainable=self.newest.get("trainable_parameters"),
            peak_bytes=device or host_growth(self.sampled),
            peak_kind="device" if device else "host",
            seconds=sum_known(part.get("seconds") for part in self.done),
        )


def _own_metrics(epoch: EpochSummary, assembled: Metrics) -> Metrics:
    """Return the figures of the committed epoch, and the accuracy of the whole chain after the stage."""
    metrics: dict[str, float | None] = {
        "train_accuracy": epoch.train_accuracy,
        "validation_loss": epoch.validation_loss,
        "validation_accuracy": epoch.validation_accuracy,
        "assembled_accuracy": assembled.get("accuracy"),
    }
    return {key: value for key, value in metrics.items() if value is not None}


def _by_layer(view: CommitView, node_id: str, regime: RegimePlan, at_commit: EpochSummary) -> tuple[Metrics, Metrics]:
    """Return the metrics of the whole chain and of the chain cut off behind the stage; {} unless stages have layers."""
    if node_id not in regime.layers:
        return {}, {}
    task = view.nodes[node_id].task
    own = at_commit.validation or {}
    covers = set(task.get("path", [])) | {b for hop in (task.get("boundary") or {}).get("hops", []) for b in hop}
    # A stage whose path reaches through the whole chain has judged the whole chain itself.
    whole = own if covers >= set(regime.weights) else {}
    full = whole or view.metrics(regime.assembled.get(node_id, ""))
    return dict(full), dict(view.metrics(regime.truncated.get(node_id, "")) or own)


def _predicted(view: CommitView, node_id: str, rounds: tuple[str, ...]) -> Estimate:
    seconds = sum(view.nodes[part].estimate.seconds for part in rounds)
    return dataclasses.replace(view.nodes[node_id].estimate, seconds=round(seconds, 3))
