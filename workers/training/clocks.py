"""Measure where a stage's time goes, without waiting for the device."""

from __future__ import annotations

import time
from itertools import takewhile

import torch


class _Clock:
    """Seconds of the current epoch."""

    def __init__(self, earlier: float) -> None:
        self._earlier = earlier
        self._started = time.monotonic()

    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._started


class _DeviceClock:
    """Seconds a CUDA device spends on what is enqueued inside `with`, read without a wait in between; 0 elsewhere."""

    #: Pairs of events that are kept before the finished ones are added up.
    MOST = 1024

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._milliseconds = 0.0

    def __enter__(self) -> None:
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self._open.append((begin, end))

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._open[-1][1].record()
            if len(self._open) >= self.MOST:
                self._add_finished()

    def _add_finished(self) -> None:
        # In order: asked one after the other, a later pair may be found finished where an earlier one was not yet.
        done = list(takewhile(lambda pair: pair[1].query(), self._open))  # type: ignore[no-untyped-call]
        self._milliseconds += sum(begin.elapsed_time(end) for begin, end in done)
        self._open = self._open[len(done) :]

    def seconds(self) -> float:
        """Waits for the device."""
        for _, end in self._open[-1:]:
            end.synchronize()
        self._add_finished()
        return self._milliseconds / 1000
