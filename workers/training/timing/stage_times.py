"""Count where the time of a stage goes, for less than half a percent of it.

Every moment of the thread that trains belongs to one phase (`PHASES`): a phase ends when the next one begins, so the
phases add up to the whole. The clock is read at every change of phase, about ten times a step (0.1 µs each). What costs
more is looked at in one step of 16 alone, and scaled up: the processor time of the process (1 µs), the parts of the
forward pass (hooks), and, on a CUDA device, what the device was doing.

A CUDA device works through what the host has given it long before, so the host's clock says little of it. Events are
recorded on its stream at the changes of phase of the steps that are looked at. They divide the device's timeline as the
clock divides the host's, waiting for the host included, and are read when they have passed: nothing here waits for the
device before the end of an epoch.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from workers.specs.results import PHASES, TimeSpent
from workers.training.timing.events import Event, new_event

#: One step in so many is looked at, and a few of the first ones.
LOOKED_AT = 16
#: Steps of which events are kept before those that have passed are added up.
_KEPT = 64
#: Reads a clock, in seconds.
Clock = Callable[[], float]


class Phases:
    """Is told which phase of a stage begins. This one counts nothing."""

    def at(self, phase: str) -> str:
        """Begin a phase; returns the one that ends."""
        return phase


#: For steps that nobody wants to know of.
UNTIMED = Phases()


def looked_at(step: int) -> bool:
    """Say whether to look at the step behind so many others. The first one is not like those that follow."""
    return step > 0 and (step % LOOKED_AT == 0 or (step < LOOKED_AT and step & (step - 1) == 0))


class StageTimes(Phases):
    """Counts the time of one stage. All methods belong to the thread that trains.

    `begin_steps`, then `step_done` after each step, then `end_steps`: what lies between is the steps' time."""

    def __init__(
        self,
        device: torch.device,
        *,
        started: float | None = None,
        clock: Clock = time.perf_counter,
        processor: Clock = time.process_time,
    ) -> None:
        """Begin with the phase `opening`. `started`: when the worker began its order (unix seconds)."""
        self._clock, self._processor_clock = clock, processor
        self._cuda = device.type == "cuda"
        self._parts: Mapping[str, nn.Module] = {}
        self._handles: list[Any] = []
        self.reset("opening")
        if started is not None:
            self._wall["opening"] = max(0.0, time.time() - started)

    def reset(self, phase: str = "rest") -> None:
        """Forget all that was counted; go on in this phase."""
        # By the clock, outside of the steps and within; one of the two is added to.
        self._outside = dict.fromkeys(PHASES, 0.0)
        self._within = dict.fromkeys(PHASES, 0.0)
        self._wall = self._outside
        # While it was looked closely: always outside of the steps, and in some of them.
        self._seen = dict.fromkeys(PHASES, 0.0)
        self._seen_processor = dict.fromkeys(PHASES, 0.0)
        self._seen_parts: dict[str, float] = {}
        self._part_since = 0.0
        self._device = dict.fromkeys(PHASES, 0.0)
        self._steps = self._looked_at = 0
        self._looking = True
        self._in_step = False
        self._events: list[_StepEvents] = []
        self._begun, self._begun_thread = _processor_times(), time.thread_time()
        self._since, self._processor = self._clock(), self._processor_clock()
        self._phase = phase

    def watch(self, parts: Mapping[str, nn.Module]) -> None:
        """Divide the forward pass by these parts of the path, too."""
        self._parts = dict(parts)

    def at(self, phase: str) -> str:
        now = self._clock()
        before, passed = self._phase, now - self._since
        self._wall[before] += passed
        self._phase, self._since = phase, now
        if self._looking:
            self._look(before, passed, phase)
        return before

    def _look(self, before: str, passed: float, phase: str) -> None:
        processor = self._processor_clock()
        self._seen[before] += passed
        self._seen_processor[before] += processor - self._processor
        self._processor = processor
        if self._in_step and self._cuda:
            self._events[-1].mark(phase)

    # -- steps ----------------------------------------------------------------------------------------------

    def begin_steps(self) -> None:
        """Begin with the steps of an epoch."""
        self.at("rest")
        self._wall = self._within
        self._looking = False
        self._begin_step()

    def step_done(self) -> None:
        """End a step, and begin with the next one."""
        self._end_step()
        self._steps += 1
        self._begin_step()

    def end_steps(self) -> None:
        """End the steps of an epoch: the one that was begun last is none."""
        self.at("rest")
        if self._in_step and self._cuda:
            self._events.pop()
        self._let_go()
        self._in_step, self._looking = False, True
        self._wall = self._outside
        self._processor = self._processor_clock()

    def looks_at(self, step: int) -> bool:
        """Say whether to look at the step behind so many others."""
        return looked_at(step)

    def _begin_step(self) -> None:
        if not self.looks_at(self._steps):
            return
        self._handles = [handle for name, part in self._parts.items() for handle in self._hooks(name, part)]
        self._in_step = self._looking = True
        if self._cuda:
            self._add_passed()
            self._events.append(_StepEvents(self._phase))
        self._processor = self._processor_clock()

    def _end_step(self) -> None:
        if not self._in_step:
            return
        self.at("rest")
        self._let_go()
        self._in_step = self._looking = False
        self._looked_at += 1

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hooks(self, name: str, part: nn.Module) -> tuple[Any, Any]:
        before = part.register_forward_pre_hook(partial(self._part_begins, name))
        return before, part.register_forward_hook(partial(self._part_ends, name))

    def _part_begins(self, name: str, *_: Any) -> None:
        # A part that runs once more in the backward pass belongs to that.
        if self._phase != "forward":
            return
        if self._cuda:
            self._events[-1].begin_part(name)
        else:
            self._part_since = self._clock()

    def _part_ends(self, name: str, *_: Any) -> None:
        if self._phase != "forward":
            return
        if self._cuda:
            self._events[-1].end_part()
        else:
            self._add_part(name, self._clock() - self._part_since)

    def _add_part(self, name: str, seconds: float) -> None:
        self._seen_parts[name] = self._seen_parts.get(name, 0.0) + seconds

    # -- events ---------------------------------------------------------------------------------------------

    def _add_passed(self) -> None:
        """Add up the events that have passed, now and then."""
        if len(self._events) >= _KEPT:
            while self._events and self._events[0].passed:
                self._add(self._events.pop(0))

    def _add(self, events: _StepEvents) -> None:
        for phase, seconds in events.phases():
            self._device[phase] += seconds
        for name, seconds in events.parts():
            self._add_part(name, seconds)

    def _settle(self) -> None:
        """Wait for the device, and add up all events but those of a step that is not over."""
        going_on = self._events[-1:] if self._in_step else []
        for events in self._events[: len(self._events) - len(going_on)]:
            events.wait()
            self._add(events)
        self._events = going_on

    # -- what it came to --------------------------------------------------------------------------------------

    def spent(self) -> TimeSpent:
        """Sum up the time until now. Waits for the device."""
        self.at(self._phase)
        self._settle()
        host = {phase: self._outside[phase] + self._within[phase] for phase in PHASES}
        phases, forward = host, self._seen["forward"]
        on_device = sum(self._device.values())
        if on_device:
            steps = sum(self._within.values())
            phases = {p: self._outside[p] + self._device[p] * steps / on_device for p in PHASES}
            forward = self._device["forward"]
        processor = {
            phase: seconds * self._seen_processor[phase] / self._seen[phase]
            for phase, seconds in host.items()
            if self._seen[phase] > 0
        }
        scale = phases["forward"] / forward if forward else 0.0
        user, system = (now - begun for now, begun in zip(_processor_times(), self._begun, strict=True))
        return TimeSpent(
            seconds=sum(phases.values()),
            phases=_taken(phases),
            processor=_taken(processor),
            processor_seconds=user + system,
            thread_seconds=time.thread_time() - self._begun_thread,
            system_seconds=system,
            forward={name: seconds * scale for name, seconds in self._seen_parts.items()},
            steps=self._steps,
            looked_at=self._looked_at,
            host=_taken(host) if on_device else None,
        )

    def close(self) -> None:
        """Take the hooks off the parts again."""
        self._let_go()


class _StepEvents:
    """The events of one step on the stream of a CUDA device."""

    def __init__(self, phase: str) -> None:
        self._marks: list[tuple[str, Event]] = []
        self._parts: list[tuple[str, Event, Event]] = []
        self.mark(phase)

    def mark(self, phase: str) -> None:
        """Note that a phase begins."""
        self._marks.append((phase, new_event()))

    def begin_part(self, name: str) -> None:
        """Note that a part begins."""
        begin = new_event()
        self._parts.append((name, begin, begin))

    def end_part(self) -> None:
        """Note that the part that began last ends."""
        name, begin, _ = self._parts[-1]
        self._parts[-1] = (name, begin, new_event())

    @property
    def passed(self) -> bool:
        """Whether the device is through with the step."""
        return self._marks[-1][1].query()

    def wait(self) -> None:
        """Return when the device is through with the step."""
        self._marks[-1][1].synchronize()

    def phases(self) -> list[tuple[str, float]]:
        """List phases with their seconds, when the device is through."""
        return [(phase, begin.elapsed_time(end) / 1000) for (phase, begin), (_, end) in pairwise(self._marks)]

    def parts(self) -> list[tuple[str, float]]:
        """List parts with their seconds, when the device is through."""
        return [(name, begin.elapsed_time(end) / 1000) for name, begin, end in self._parts]


def _processor_times() -> tuple[float, float]:
    """Processor seconds of the process so far, all threads: for the program, and in the kernel."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def _taken(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: value for phase, value in seconds.items() if value > 0}
