"""Compute the learning rate of every step, by the name of its schedule. A new schedule is one row of `SCHEDULES` and
its name."""

from __future__ import annotations

import math
from collections.abc import Callable

from workers.specs.experiment import ScheduleSpec


def _constant(share: float, final: float) -> float:
    return 1.0


def _linear(share: float, final: float) -> float:
    return final + (1.0 - final) * (1.0 - share)


def _cosine(share: float, final: float) -> float:
    return final + (1.0 - final) * (0.5 * (1.0 + math.cos(math.pi * share)))


#: Name -> the part of the base rate at a share (0..1) of the steps after warm-up; `final`: the part asked for at 1.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def learning_rate(base: float, schedule: ScheduleSpec, step: int, total_steps: int) -> float:
    """Compute the rate of optimizer step `step` (0-based) of `total_steps`: a pure function, so a resumed stage needs
    no state.

    Warm-up is linear from base/warm to base over the first `warmup` share; then the named schedule; all but
    the constant one go down to `final * base` at the last step.
    """
    warm = round(schedule.warmup * total_steps)
    if step < warm:
        return base * (step + 1) / warm
    remaining = max(1, total_steps - warm - 1)
    return base * SCHEDULES[schedule.name](min(1.0, (step - warm) / remaining), schedule.final)
