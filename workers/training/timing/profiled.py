"""Count the time of the first steps of a stage closely, and record the last of them for a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from workers.specs.results import TimeSpent
from workers.training.timing.stage_times import StageTimes

#: Steps before anything is counted: the first of a stage load kernels and fill what loads ahead.
WARM_STEPS = 3
#: Steps that are recorded operator by operator, behind those that are counted: recording slows small operators down.
TRACED_STEPS = 5
#: Names of phases in a trace begin so.
PREFIX = "segprop: "


class ProfiledTimes(StageTimes):
    """Looks at every step. Counts `steps` of them behind the first few, then lets torch's profiler record some more, in
    which every phase is a range, and every part in the forward pass."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self._ends = (WARM_STEPS, WARM_STEPS + steps, WARM_STEPS + steps + TRACED_STEPS)
        self._done = 0
        self._range: Any = None
        self._part_range: Any = None
        self._tracing = False
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profiler = profile(activities=activities, acc_events=True)
        #: Of the steps that were counted; there once they are over.
        self.counted: TimeSpent | None = None
        super().__init__(device)

    @property
    def total(self) -> int:
        """How many steps it takes in all."""
        return self._ends[-1]

    @property
    def traced(self) -> int:
        """How many of them the profiler records."""
        return TRACED_STEPS

    def looks_at(self, step: int) -> bool:
        return True

    def at(self, phase: str) -> str:
        before = super().at(phase)
        if self._tracing:
            self._close_range()
            self._range = record_function(PREFIX + phase)
            self._range.__enter__()
        return before

    def step_done(self) -> None:
        self._done += 1
        warm, counted, traced = self._ends
        if self._done == counted:
            self._end_step()
            self._steps += 1
            self.counted = self.spent()
            self.profiler.start()
            self._tracing = True
            self._begin_step()
            return
        if self._done == traced:
            self.stop()
        super().step_done()
        if self._done == warm:
            # As if the steps began here.
            self.end_steps()
            self.reset()
            self.begin_steps()

    def _part_begins(self, name: str, *given: Any) -> None:
        super()._part_begins(name, *given)
        if self._tracing and self._phase == "forward":
            self._part_range = record_function(f"{PREFIX}forward {name}")
            self._part_range.__enter__()

    def _part_ends(self, name: str, *given: Any) -> None:
        if self._part_range is not None:
            self._part_range.__exit__(None, None, None)
            self._part_range = None
        super()._part_ends(name, *given)

    def stop(self) -> None:
        """End the recording, if there is one."""
        if self._tracing:
            self._tracing = False
            self._close_range()
            self.profiler.stop()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def close(self) -> None:
        self.stop()
        super().close()
