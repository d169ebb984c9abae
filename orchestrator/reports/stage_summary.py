"""Sum up one stage of a regime from the commits of its rounds and evaluations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from typing import TYPE_CHECKING

from orchestrator.reports.commit_view import NO_FIGURES, CommitFigures, CommitView, maximum, shard_counts, sum_known
from orchestrator.reports.records import EpochSummary, Metrics, StageEstimate, StageMeasured, StageSummary, WorkPlace
from workers.domains.metrics import leading
from workers.specs.results import HeldTimes, TimeSpent

if TYPE_CHECKING:
    from orchestrator.costs.formulas import Estimate
    from orchestrator.plan.graph import RegimePlan

#: Parts that stand in for the network's own head.
_LOCAL_HEADS = ("adapter", "aux")


def summarize_stage(view: CommitView, node_id: str, regime: RegimePlan) -> StageSummary:
    """Sum up the stage whose last round is `node_id`; its rounds, if it has several, as one piece of work."""
    node, rounds = view.nodes[node_id], regime.work_of(node_id)
    task, decision = node.task, regime.decisions.get(node_id)
    work = _Work([view.figures[part] for part in rounds if part in view.figures])
    newest, sampled = work.newest, work.sampled
    path, trained = (tuple(str(part) for part in task.get(key, [])) for key in ("path", "trained"))
    assembled = view.of(regime.assembled.get(node_id, "")).metrics
    full, truncated = _by_layer(view, node_id, regime, newest.at_commit)
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
        auxiliary=_is_auxiliary(newest, path),
        seconds=sum_known(part.seconds for part in work.done),
        epochs=len(newest.epochs),
        planned_epochs=task.get("train", {}).get("epochs"),
        steps=newest.steps,
        exit=newest.exit,
        best_epoch=newest.best_epoch,
        committed_epoch=newest.committed_epoch,
        resumed=sum_known(part.resumed for part in work.done),
        trainable_parameters=newest.trainable_parameters,
        resident_bytes=newest.resident_bytes,
        train_loss=newest.at_commit.train_loss,
        metrics=_own_metrics(newest.at_commit, assembled),
        assembled=assembled,
        full=full,
        truncated=truncated,
        layer=regime.layers.get(node_id),
        peak_device_bytes=work.peak_device_bytes,
        peak_device_reserved_bytes=maximum(part.peak_device_reserved_bytes for part in work.done),
        peak_host_bytes=sampled.peak_host_bytes,
        host_baseline_bytes=sampled.host_baseline_bytes,
        host_growth_bytes=sampled.host_growth,
        snapshot=shard_counts(work.done),
        forwards=work.forwards(),
        reused=view.status(node_id) == "reused",
        world_size=1 if newest.where is None else newest.where.world_size or 1,
        where=work.place(),
        estimate=StageEstimate(_predicted(view, node_id, rounds), work.measured()),
        curve=newest.epochs,
        swallowed=maximum(part.swallowed for part in work.done),
        trained_at_once=newest.trained_at_once,
        times=_times(view, rounds),
        judged=view.judged({name: asked[node_id] for name, asked in regime.judged.items() if node_id in asked}),
    )


@dataclass(frozen=True)
class _Work:
    """The results of a stage's rounds that are done, in order."""

    done: list[CommitFigures]

    @property
    def newest(self) -> CommitFigures:
        """The last round's figures: it holds the epochs of all before it, and says how far the stage is."""
        return self.done[-1] if self.done else NO_FIGURES

    @cached_property
    def sampled(self) -> CommitFigures:
        """The round that measured the host's memory, which is looked at in the first epochs alone."""
        return max(self.done, key=lambda part: part.host_growth or 0, default=NO_FIGURES)

    @property
    def peak_device_bytes(self) -> int | None:
        return maximum(part.peak_device_bytes for part in self.done)

    def forwards(self) -> dict[str, int]:
        """Count the samples that ran forward, by frozen block."""
        counted: dict[str, int] = {}
        for part in self.done:
            for block, count in part.forwards.items():
                counted[block] = counted.get(block, 0) + count
        return counted

    def place(self) -> WorkPlace | None:
        """Return where the newest round ran, and when the first began."""
        newest = self.newest.where
        first = self.done[0].where if self.done else None
        if newest is None or first is None:
            return newest
        # Rounds of old runs may not say when they made their first step.
        step = newest.first_step if first.first_step is None else first.first_step
        return dataclasses.replace(newest, started=first.started, first_step=step)

    def measured(self) -> StageMeasured:
        """Return what came of what was estimated."""
        device = self.peak_device_bytes
        return StageMeasured(
            trainable=self.newest.trainable_parameters,
            peak_bytes=device or self.sampled.host_growth,
            peak_kind="device" if device else "host",
            seconds=sum_known(part.seconds for part in self.done),
        )


def _times(view: CommitView, rounds: tuple[str, ...]) -> TimeSpent | None:
    """Return where the time of a stage's rounds went; None where one of those that are done does not say it."""
    found = [view.commits[part].read(HeldTimes).times for part in rounds if part in view.commits]
    known = [times for times in found if times is not None]
    return reduce(add, known) if known and len(known) == len(found) else None


def _is_auxiliary(figures: CommitFigures, path: tuple[str, ...]) -> bool:
    """Say whether a local head stands in for the network's own; of a stage that is not done, by its path."""
    known = figures.path_is_auxiliary
    return any(part in path for part in _LOCAL_HEADS) if known is None else known


def _own_metrics(epoch: EpochSummary, assembled: Metrics) -> Metrics:
    """Return the figures of the committed epoch, and the score of the whole chain after the stage."""
    validation = epoch.validation or {}
    score = leading(validation)
    metrics: dict[str, float | None] = {
        "train_accuracy": epoch.train_accuracy,
        "validation_loss": epoch.validation_loss,
        "validation_accuracy": epoch.validation_accuracy,
        "assembled_accuracy": assembled.get("accuracy"),
        f"validation_{score}": validation.get(score, epoch.figure(f"validation_{score}")),
        f"assembled_{score}": assembled.get(score),
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
    full = whole or view.of(regime.assembled.get(node_id, "")).metrics
    return dict(full), dict(view.of(regime.truncated.get(node_id, "")).metrics or own)


def _predicted(view: CommitView, node_id: str, rounds: tuple[str, ...]) -> Estimate:
    seconds = sum(view.nodes[part].estimate.seconds for part in rounds)
    return dataclasses.replace(view.nodes[node_id].estimate, seconds=round(seconds, 3))
