"""List what a run tells Prometheus, as data: names, meanings, and where each value comes from.

Ray puts `ray_` before the names. Values are per slot, not per task: as many series as there are slots, however long
the run. deploy/components/monitoring/segprop.json shows them.
"""

from __future__ import annotations

from workers.control import Update

#: Gauge -> field of a task's progress (`workers.control.Update`), meaning.
TASK: dict[str, tuple[str, str]] = {
    "segprop_samples_per_second": ("rate", "Samples a second of the task in this slot."),
    "segprop_tokens_per_second": ("tokens_rate", "Tokens a second that the loss of the task in this slot is about."),
    "segprop_stalled": ("stalled", "Share of the epoch's time in which the task waited for its input, 0 to 1."),
    "segprop_loss": ("loss", "Training loss so far in this epoch."),
    "segprop_accuracy": ("accuracy", "Training accuracy so far in this epoch, 0 to 1."),
    "segprop_seconds_left": ("seconds_left", "Seconds the task in this slot still needs."),
    "segprop_snapshot_hits": ("hits", "Snapshot shards the task found in the store."),
    "segprop_snapshot_misses": ("misses", "Snapshot shards the task had to compute."),
    "segprop_snapshot_read_bytes": ("bytes_read", "Bytes of snapshots the task has read."),
    "segprop_snapshot_written_bytes": ("bytes_written", "Bytes of snapshots the task has written."),
}
BUSY = "segprop_slot_busy"
QUEUE = "segprop_tasks_waiting"
MEANINGS = {
    BUSY: "1 while a task runs in this slot.",
    QUEUE: "Tasks that could run if there were more slots; of the whole run, under slot 0.",
    **{name: meaning for name, (_, meaning) in TASK.items()},
}
#: What ends with its task; of other figures the last value stays.
RATES = ("segprop_samples_per_second", "segprop_tokens_per_second", "segprop_stalled")


def values(update: Update | None) -> dict[str, float]:
    """Return gauge -> value for one slot. `update`: its task's latest progress, None for an idle slot.

    What the task does not report keeps its last value, except rates, which end with the task."""
    if update is None:
        return {BUSY: 0.0, **dict.fromkeys(RATES, 0.0)}
    known = {name: getattr(update, key) for name, (key, _) in TASK.items()}
    numbers = {name: float(value) for name, value in known.items() if isinstance(value, int | float)}
    return {BUSY: 1.0, **numbers}
