"""Events on the stream of a CUDA device: when it reaches a point of what it was given to do."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch


class Event(Protocol):
    """The part of torch.cuda.Event that is used here; torch annotates none of it."""

    def record(self) -> None:
        """Let the device note when it is through with all that it was given so far."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to another one; both have passed."""


def make_event() -> Event:
    """Make an event that notes the time."""
    return cast("Event", cast("Any", torch.cuda.Event)(enable_timing=True))


def new_event() -> Event:
    """Make an event and record it on the current stream."""
    event = make_event()
    event.record()
    return event
