"""Define what a benchmark says of a model, as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

#: Called with what is answered and all there is to answer of a task, such as requests or problems.
Answered = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure: `value` of `metric` over `n` questions, each asked after `shots` examples. `stderr` is the standard
    error of the mean; `parts` are the groups and subjects the figure is the average of, weighted by their `n`."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    shots: int
    parts: tuple[Score, ...] = ()
    #: What else determines the figure, such as where the examples came from.
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean of `values`, with Bessel's correction; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
