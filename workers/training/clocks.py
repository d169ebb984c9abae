"""Measure where a stage's time goes, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import TypeVar

import torch

from workers.distributed.gang import Gang
from workers.training.timing.events import Event, make_event
from workers.training.timing.stage_times import UNTIMED, Phases

T = TypeVar("T")
#: Seconds between looks at the loss, the stop flag and the clock. On a device each look is one synchronization.
REPORT_EVERY_S = 1.0


class Clock:
    """Count the seconds of the current epoch."""

    def __init__(self, earlier: float) -> None:
        self._earlier = earlier
        self._started = time.monotonic()

    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._started


class DeviceClock:
    """Count the seconds a CUDA device spends on what is enqueued inside `with`, without waiting for it; 0 elsewhere."""

    #: Pairs of events that are kept before the finished ones are added up.
    MOST = 1024

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[tuple[Event, Event]] = []
        self._milliseconds = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            begin, end = make_event(), make_event()
            begin.record()
            self._open.append((begin, end))

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._open[-1][1].record()
            if len(self._open) >= self.MOST:
                self._add_finished()

    def _add_finished(self) -> None:
        # In order: asked one after the other, a later pair may be found finished where an earlier one was not yet.
        done = list(takewhile(lambda pair: pair[1].query(), self._open))
        self._milliseconds += sum(begin.elapsed_time(end) for begin, end in done)
        self._open = self._open[len(done) :]

    def seconds(self) -> float:
        """Read the count. Waits for the device."""
        for _, end in self._open[-1:]:
            end.synchronize()
        self._add_finished()
        return self._milliseconds / 1000


class Waits:
    """Measure how long the step loop waits for its input, of the time since it was made."""

    def __init__(self, times: Phases = UNTIMED) -> None:
        self._times = times
        self._started = time.monotonic()
        self._seconds = 0.0

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over the items; the time until each is there counts as waiting."""
        iterator = iter(items)
        while True:
            before = time.monotonic()
            self._times.at("data")
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds += time.monotonic() - before
            yield item

    def share(self) -> float:
        """Give the share of the time spent waiting, 0 to 1."""
        return self._seconds / max(time.monotonic() - self._started, 1e-9)


class Looks:
    """Decide when the step loop looks up to report, by the stage's clock, not the epoch's: epochs may be shorter than
    the interval. A gang looks together, after a step that its first rank named at the last look: asking after every
    step would cost messages."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang
        self._looked = time.monotonic()
        #: In a gang: the global step after which all ranks look up, and how many steps after the last look that is.
        self._at = self._every = 1

    def begin(self, global_step: int) -> None:
        """Start: `global_step` steps are done, and the next one is about to run."""
        self._at = global_step + 1

    def due(self, global_step: int) -> bool:
        """Say whether to look up now that so many steps are done. Every rank must ask after every step."""
        now = time.monotonic()
        if self._gang.size > 1:
            if global_step < self._at:
                return False
            pace = (now - self._looked) / self._every
            ahead = min(max(1, int(REPORT_EVERY_S / max(pace, 1e-9))), 2 * self._every)
            self._every = self._gang.agree(ahead)
            self._looked, self._at = now, global_step + self._every
            return True
        if now - self._looked < REPORT_EVERY_S:
            return False
        self._looked = now
        return True
