"""Say what a driver is doing, for the beat that it leaves in the store: made to and read from JSON here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.control import NOTHING, Update


@dataclass(frozen=True)
class RunningTask:
    """A task that a driver has submitted. `since`: unix seconds; `progress`: what its worker told last."""

    attempt: int
    machine: str | None = None
    since: float | None = None
    progress: Update = NOTHING

    def to_json(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt,
            "machine": self.machine,
            "since": self.since,
            "progress": self.progress.to_json(),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> RunningTask:
        since = told.get("since")
        return cls(
            attempt=int(told.get("attempt") or 1),
            machine=told.get("machine"),
            since=float(since) if since else None,
            progress=Update.from_json(told.get("progress") or {}),
        )


@dataclass(frozen=True)
class Beat:
    """What a driver does, by node. `failed`: why; `attempts`: how many it has made, where it is more than one."""

    running: Mapping[str, RunningTask] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    attempts: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "running": {node: task.to_json() for node, task in self.running.items()},
            "failed": dict(self.failed),
            "attempts": dict(self.attempts),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Beat:
        """Read a driver's record; what it does not say is empty."""
        return cls(
            running={node: RunningTask.from_json(task) for node, task in told.get("running", {}).items()},
            failed={node: str(reason) for node, reason in told.get("failed", {}).items()},
            attempts=dict(told.get("attempts", {})),
        )


#: Of a driver that has not told anything yet.
NOTHING_DONE = Beat()
