"""What a run tells Prometheus, as data: names, meanings, and where each value comes from.

Ray puts `ray_` before the names. Values are per slot, not per task: as many series as there are slots, however long
the run. deploy/components/monitoring/segprop.json shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Gauge -> field of a task's progress (see `orchestrator.progress`), meaning.
TASK: dict[str, tuple[str, str]] = {
    "segprop_samples_per_second": ("rate", "Samples a second of the task in this slot."),
    "segprop_loss": ("loss", "Training loss so far in this epoch."),
    "segprop_accuracy": ("accuracy", "Training accuracy so far in this epoch, 0 to 1."),
    "segprop_seconds_left": ("seconds_left", "Seconds the task in this slot still needs."),
    "segprop_snapshot_hits": ("hits", "Snapshot shards the task found in the store."),
    "segprop_snapshot_misses": ("misses", "Snapshot shards the task had to compute."),
}
BUSY = "segprop_slot_busy"
MEANINGS = {BUSY: "1 while a task runs in this slot.", **{name: meaning for name, (_, meaning) in TASK.items()}}


def values(update: Mapping[str, Any] | None) -> dict[str, float]:
    """Gauge -> value for one slot. `update`: its task's latest progress, None for an idle slot.

    What the task does not report keeps its last value, except the rate, which ends with the task."""
    if update is None:
        return {BUSY: 0.0, "segprop_samples_per_second": 0.0}
    known = {name: update.get(key) for name, (key, _) in TASK.items()}
    numbers = {name: float(value) for name, value in known.items() if isinstance(value, int | float)}
    return {BUSY: 1.0, **numbers}
