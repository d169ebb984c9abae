"""Read what drivers and workers leave in a store about work under way and done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.execution.run_lease import Held
from orchestrator.reports.record_json import finite, from_json
from orchestrator.reports.records import EpochSummary


@dataclass(frozen=True)
class RunningTask:
    """A task that a driver has submitted. `since`: unix seconds; `progress`: as `orchestrator.progress` documents."""

    attempt: int
    machine: str | None
    since: float | None
    progress: Mapping[str, Any]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> RunningTask:
        """Read one entry of a beat."""
        since = told.get("since")
        return cls(
            attempt=int(told.get("attempt") or 1),
            machine=told.get("machine"),
            since=float(since) if since else None,
            progress=told.get("progress") or {},
        )


@dataclass(frozen=True)
class Beat:
    """A driver's latest sign of life, by node. `failed`: why; `attempts`: how many, where it is more than one."""

    running: Mapping[str, RunningTask] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    attempts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, held: Held | None, *, alive: bool) -> Beat:
        """Read the beat of a run's latest driver. Of one that is gone nothing is running."""
        told = held.beat if held is not None else {}
        return cls(
            running={node: RunningTask.of(task) for node, task in told.get("running", {}).items()} if alive else {},
            failed={node: str(reason) for node, reason in told.get("failed", {}).items()},
            attempts=told.get("attempts", {}),
        )


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is, by its commit or its newest checkpoint. `resumed`: how often it went on from a checkpoint."""

    epochs: tuple[EpochSummary, ...] = ()
    resumed: int = 0

    @classmethod
    def of_checkpoint(cls, progress: Any) -> StageProgress | None:
        """Read the progress of a stage's checkpoint; None where the checkpoint has none that can be read."""
        if not isinstance(progress, dict) or not progress:
            return None
        return cls(_epochs(progress.get("history")), int(progress.get("resumed") or 0))

    @classmethod
    def of_result(cls, result: Mapping[str, Any]) -> StageProgress:
        """Read a stage's result."""
        return cls(_epochs(result.get("epochs")), int(result.get("resumed") or 0))

    @property
    def latest(self) -> EpochSummary:
        return self.epochs[-1] if self.epochs else EpochSummary()


def _epochs(told: Any) -> tuple[EpochSummary, ...]:
    return tuple(from_json(EpochSummary, finite(epoch), "an epoch") for epoch in told or ())
