"""How a running task talks to whoever runs it: it reports progress and asks whether to stop. No Ray, no clock."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Update:
    """How far a task is. All fields are optional; one that is None is not known, or says nothing about this work."""

    #: train, materialize, measure, average, import, …
    phase: str | None = None
    #: Counted from 1, and the number of all.
    epoch: int | None = None
    epochs: int | None = None
    #: Of the epoch.
    step: int | None = None
    steps: int | None = None
    #: Samples (`unit`) a second.
    rate: float | None = None
    seconds_left: float | None = None
    #: So far in this epoch; `accuracy` 0..1.
    loss: float | None = None
    accuracy: float | None = None
    #: Share of the time spent waiting for input, 0..1.
    stalled: float | None = None
    #: Optimizer steps of the stage, and since the last update: loss, accuracy.
    global_step: int | None = None
    recent_loss: float | None = None
    recent_accuracy: float | None = None
    #: Of the last step: its rate, and the norm of its gradients where they are clipped.
    lr: float | None = None
    gradient_norm: float | None = None
    #: Most that tensors have taken on the device so far in this process.
    device_bytes: int | None = None
    #: Epochs that are validated, and what the last of these came to.
    validated: int | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    #: What it is scored by where that is neither loss nor accuracy, and how much that was.
    score: str | None = None
    validation_score: float | None = None
    tokens_rate: float | None = None
    #: Snapshot shards found and not found, and bytes of snapshots.
    hits: int | None = None
    misses: int | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    #: Of work that has no epochs, in `unit`.
    done: int | None = None
    total: int | None = None
    unit: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What is known, as JSON values."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Update:
        """Inverse of `to_json`; what this version does not know is passed over."""
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


#: Nothing was reported yet.
NOTHING = Update()


class Control(Protocol):
    """Both methods are cheap and may be called between any two training steps."""

    def progress(self, update: Update) -> None:
        """Replace the latest progress of the running task."""

    def should_stop(self) -> bool:
        """True once the run is being stopped: checkpoint, then raise `Interrupted`."""


class ThreadControl:
    """A control shared between the thread that works and the thread that polls and stops it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._latest = NOTHING

    def progress(self, update: Update) -> None:
        self._latest = update  # one reference assignment: readers see the old or the new one

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def latest(self) -> Update:
        return self._latest
