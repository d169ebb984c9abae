"""How a running task talks to whoever runs it: it reports progress and asks whether to stop. No Ray, no clock."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class Control(Protocol):
    """Both methods are cheap and may be called between any two training steps."""

    def progress(self, **update: Any) -> None:
        """Replace the latest progress of the running task (see `orchestrator.progress` for the fields)."""

    def should_stop(self) -> bool:
        """True once the run is being stopped: checkpoint, then raise `Interrupted`."""


class ThreadControl:
    """A control shared between the thread that works and the thread that polls and stops it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._latest: dict[str, Any] = {}

    def progress(self, **update: Any) -> None:
        self._latest = update  # one reference assignment: readers see the old or the new one

    def should_stop(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    def latest(self) -> dict[str, Any]:
        return self._latest
