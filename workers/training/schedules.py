"""Learning rate of every step."""

from __future__ import annotations

import math

from workers.specs.experiment import ScheduleSpec


def learning_rate(base: float, schedule: ScheduleSpec, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based) of `total_steps`: a pure function, so a resumed stage needs no state.

    Warm-up is linear from base/warm to base over the first `warmup` share; then constant, linear or cosine to
    `final * base` at the last step.
    """
    warm = round(schedule.warmup * total_steps)
    if step < warm:
        return base * (step + 1) / warm
    if schedule.name == "constant":
        return base
    remaining = max(1, total_steps - warm - 1)
    share = min(1.0, (step - warm) / remaining)
    decay = 1.0 - share if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return base * (schedule.final + (1.0 - schedule.final) * decay)
