"""Compute the learning rate of every step, by the name of its schedule. A new schedule is one row of `SCHEDULES` and
its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from workers.specs.experiment import ScheduleSpec


def _constant(share: Fraction, final: float) -> float:
    return 1.0


def _linear(share: Fraction, final: float) -> float:
    return final + (1.0 - final) * float(1 - share)


def _cosine(share: Fraction, final: float) -> float:
    return final + (1.0 - final) * (0.5 * (1.0 + math.cos(math.pi * float(share))))


#: Name -> the part of the base rate at a share (0..1, exact) of the steps after warm-up; `final`: the part asked for
#: at 1.
SCHEDULES: dict[str, Callable[[Fraction, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def learning_rate(base: float, schedule: ScheduleSpec, step: int, total_steps: int) -> float:
    """Compute the rate of optimizer step `step` (0-based) of `total_steps`: a pure function, so a resumed stage needs
    no state.

    The rates are those of transformers' schedules, to the bit: warm-up is linear from 0 over the first `warmup` share
    of the steps and reaches `base` with the step after it; then the named schedule. All but the constant one go down
    towards `final * base`, which they would reach one step after the last: no step after warm-up has the rate 0.
    """
    warm = round(schedule.warmup * total_steps)
    if step < warm:
        return base * (step / warm)
    share = Fraction(min(step, total_steps) - warm, max(1, total_steps - warm))
    return base * SCHEDULES[schedule.name](share, schedule.final)
